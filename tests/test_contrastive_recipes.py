"""Contrastive inversion as a recipe: a teacher of clean images, then the student that starts from it, in one run."""

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
from onnx_files import write_onnx
from small_runs import TRAINER, draw_pictures, last, of, run, same

from lrface import config, recipes
from lrface.embed import open_model
from lrface.errors import LrfaceError, UsageError
from lrface.export import export_model
from lrface.methods import Contrastive
from lrface.probe import run_probe
from lrface.recipes import build_method, check_loads, load_recipe
from lrface.train.checkpoint import load_model

NETWORK = {"name": "cifar_resnet18", "width": 4}
TINY = {
    "name": "tiny",
    "data": {"path": "pictures", "batch_size": 8},
    "backbone": NETWORK,
    "head": "softmax",
    "trainer": {**TRAINER, "checkpoint_every": 2, "log_every": 1},
    "stages": [
        {
            "name": "teacher",
            "method": "classify",
            "degrade": "clean",
            "steps": 2,
            "optimiser": {"learning_rate": 0.01},
        },
        {
            "name": "student",
            "method": {"name": "contrastive", "teacher": NETWORK},
            "load": [{"from": "encoder", "to": "teacher"}],
            "degrade": {"name": "pixel_mask", "missing": 0.5, "clean_share": 0.0},
            "steps": 6,
            "optimiser": {"name": "adam", "learning_rate": 0.001, "weight_decay": 1e-4},
        },
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("data"))


def tiny(*overrides: str, stages: slice = slice(None)) -> config.Recipe:
    raw = copy.deepcopy(TINY)
    raw["stages"] = raw["stages"][stages]
    if len(raw["stages"]) == 1:
        del raw["stages"][0]["load"]
    return config.parse_recipe(raw, overrides)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(tiny(), data, out)


def test_the_student_starts_from_the_teacher_which_stays(finished, data, tmp_path):
    out, said = finished
    assert "stage student: encoder starts from the teacher" in said
    first, second = last(out, "1-teacher"), last(out, "2-student")
    teacher = of(first, "encoder.")
    assert len(teacher) > 50 and same(teacher, of(second, "teacher."))
    assert not same(teacher, of(second, "encoder."))
    assert not any(key.startswith("head.") for key in second), "no head is trained, none is kept"
    still = tiny("stages.1.optimiser.learning_rate=0", "stages.1.steps=1")
    run(still, data, tmp_path / "still")
    found = of(last(tmp_path / "still", "2-student"), "encoder.")
    moved = {key for key in teacher if not torch.equal(found[key], teacher[key])}
    assert all("running" in key or "num_batches" in key for key in moved), "only BatchNorm's statistics move"


def test_the_terms_are_in_the_log(finished):
    with (finished[0] / "stages" / "2-student" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        pull, push, similarity = (float(row[key]) for key in ("pull", "push", "similarity"))
        assert float(row["loss"]) == pytest.approx(pull + push, rel=1e-4, abs=1e-4)
        assert pull == pytest.approx(-similarity / 0.1, rel=1e-4)


def test_the_model_at_the_end_is_the_student_alone(finished):
    encoder, card = load_model(finished[0])
    assert card["architecture"] == {"name": "cifar_resnet18", "arguments": {"width": 4}}
    assert card["training"]["method"] == "contrastive"
    assert same(dict(encoder.state_dict()), of(last(finished[0], "2-student"), "encoder."))


@pytest.mark.parametrize("variant", ["student_teacher", "nt_xent"])
def test_a_run_that_was_stopped_comes_to_the_same_bits(variant, data, tmp_path, monkeypatch):
    """With a projection, its momentum and an average of the weights; stopped between checkpoints."""
    overrides = [f"stages.1.method.variant={variant}"]
    if variant == "nt_xent":
        overrides += [
            "stages.1.backbone={name: cifar_resnet18, width: 6}",
            "stages.1.method.start=fresh",
            "stages.1.ema=0.9",
        ]
    run(tiny(*overrides), data, tmp_path / "whole")
    forward = Contrastive.forward
    steps = []

    def until_the_power_is_gone(self, batch):
        steps.append(1)
        if len(steps) == 4:
            raise LrfaceError("the power is gone")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Contrastive, "forward", until_the_power_is_gone)
        with pytest.raises(LrfaceError, match="power"):
            run(tiny(*overrides), data, tmp_path / "stopped")
    said = run(tiny(*overrides), data, tmp_path / "stopped")
    assert any("resumes from" in line and "step-00000002" in line for line in said)
    assert "stage student: encoder starts from the teacher" not in said
    whole, stopped = last(tmp_path / "whole", "2-student"), last(tmp_path / "stopped", "2-student")
    assert same(whole, stopped)
    assert any(key.startswith("projection.") for key in whole) is (variant == "nt_xent")
    with (tmp_path / "stopped/stages/2-student/metrics.csv").open() as one:
        assert one.read().count("\n") == 7


def test_a_teacher_from_a_model_on_disk_and_a_student_of_its_own(finished, data, tmp_path):
    source = str(finished[0] / "stages" / "1-teacher")
    recipe = tiny(stages=slice(1, 2))
    recipe.stages[0].load = [{"path": source, "to": "teacher"}]
    assert "stage student: encoder starts from the teacher" in run(recipe, data, tmp_path / "one")
    assert same(
        of(last(tmp_path / "one", "1-student"), "teacher."), of(last(finished[0], "1-teacher"), "encoder.")
    )
    both = tiny(stages=slice(1, 2))
    both.stages[0].load = [{"path": source, "to": "teacher"}, {"path": source, "to": "encoder"}]
    said = run(both, data, tmp_path / "two")
    assert not any("starts from the teacher" in line for line in said)
    assert same(last(tmp_path / "one", "1-student"), last(tmp_path / "two", "1-student"))


def test_no_labels_are_read(data, finished, tmp_path):
    """The same images as one class, with other names of classes: the same student."""
    folder = tmp_path / "pictures" / "all of them"
    folder.mkdir(parents=True)
    for number in range(16):
        image = data / "pictures" / f"class {number % 4}" / f"{number}.png"
        (folder / f"{number % 4} {number:02}.png").write_bytes(image.read_bytes())
    recipe = tiny(stages=slice(1, 2))
    recipe.stages[0].load = [{"path": str(finished[0] / "stages" / "1-teacher"), "to": "teacher"}]
    run(recipe, tmp_path, tmp_path / "run")
    assert len(last(tmp_path / "run", "1-student")) > 100
    with pytest.raises(LrfaceError, match="holds one identity only"):
        run(tiny(), tmp_path, tmp_path / "labels")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["stages.1.load=[]"], "stages.1.load lacks teacher, .*add {from: encoder, to: teacher}"),
        (["stages.1.load=[{from: head, to: head}]"], "student.* has no head"),
        (["stages.1.accumulate=2"], r"method Contrastive cannot take a batch in parts \(accumulate=2\): its loss comp"),
        (["stages.1.method.variant=x"], "stage 'student': method.variant must be one of student_teacher"),
        (["stages.1.method.tau=1"], r"stage 'student': unknown key method.tau"),
        (["stages.1.method.teacher={name: cifar_resnet18, width: 8}"], "method.start: the student is of another arch"),
        (["stages.0.backbone={name: cifar_resnet18, width: 8}"], "teacher: encoder of stage 'teacher' is of another"),
        (["stages.1.method.policy=x"], "method.policy follows from the rest of the recipe"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_found_before_the_first_stage(overrides, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    with pytest.raises(UsageError, match=message):
        run(tiny(*overrides), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mse_can_be_accumulated(data, tmp_path):
    run(tiny("stages.1.method.variant=mse", "stages.1.accumulate=2"), data, tmp_path / "run")
    assert len(last(tmp_path / "run", "2-student")) > 100


def test_open_clip_without_a_download(data, tmp_path):
    """Built with random weights, saved, loaded from the file as teacher and student, trained, and loaded again."""
    open_clip = pytest.importorskip("open_clip", reason="pip install 'lrface[clip]'")
    tower = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-clip.json").write_text(
        json.dumps({"embed_dim": 32, "vision_cfg": tower, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    clip = open_clip.create_model("tiny-clip", pretrained=None)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    recipe = tiny("backbone={name: open_clip, model: tiny-clip}", stages=slice(1, 2))
    del recipe.stages[0].method.arguments["teacher"]
    with pytest.raises(UsageError, match="stages.0.load lacks teacher"):
        run(recipe, data, tmp_path / "none")
    recipe.backbone.arguments["weights"] = str(tmp_path / "clip.pt")
    said = run(recipe, data, tmp_path / "run")
    assert f"stage student: teacher starts from {tmp_path / 'clip.pt'}" in said
    wanted = {
        key.removeprefix("visual."): v for key, v in clip.state_dict().items() if key.startswith("visual.")
    }
    assert same(of(last(tmp_path / "run", "1-student"), "teacher.network."), wanted)
    (tmp_path / "clip.pt").unlink()  # a trained network needs it no more
    encoder, _ = load_model(tmp_path / "run")
    assert not same(of(dict(encoder.state_dict()), "network."), wanted)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        embedded = encoder.eval()(images)
    assert embedded.shape == (3, 32)
    # As a model like any other: embedded, exported, probed.
    opened = open_model(str(tmp_path / "run"), device="cpu")
    torch.testing.assert_close(opened.embed_tensor(images), embedded, rtol=1e-4, atol=1e-5)
    place = data / "pictures"
    done = export_model(tmp_path / "run", tmp_path / "student.onnx", to="onnx", faces=place)
    assert all(row["minimum_cosine"] > 0.9999 for row in done.rows)
    models = [f"run={tmp_path / 'run'}", f"onnx={tmp_path / 'student.onnx'}"]
    told = {"degrade": "{name: pixel_mask, missing: 0.5}", "seeds": 2, "keep_features": False}
    found = run_probe(models, place, place, device="cpu", show_progress=False, **told)
    own, exported = (result["auc"]["values"] for result in found.results)
    assert own == pytest.approx(exported, abs=0.05)


def test_an_onnx_teacher_in_a_recipe(data, tmp_path):
    write_onnx(tmp_path / "teacher.onnx")
    told = f"stages.0.method.teacher={{name: onnx, path: {tmp_path / 'teacher.onnx'}}}"
    run(tiny(told, "stages.0.method.start=fresh", stages=slice(1, 2)), data, tmp_path / "run")
    kept = last(tmp_path / "run", "1-student")
    assert not any(key.startswith("teacher.") for key in kept)
    assert any(key.startswith("projection.") for key in kept)


# The shipped recipes.


@pytest.mark.parametrize("name", ["mask", "noise", "blur"])
def test_the_shipped_recipes_for_cifar(name):
    recipe = load_recipe(f"cifar10/contrastive_{name}")
    methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
    check_loads(recipe, methods)
    student = methods[1]
    assert isinstance(student, Contrastive) and student.temperature == 0.1
    x = torch.rand(4, 3, 32, 32)
    degraded, hq = student.policy.apply(x, student.policy.sample(4, 32, torch.Generator().manual_seed(0)))
    assert bool((degraded != hq).flatten(1).any(1).all()), "no image stays clean"


def test_the_recipe_for_faces():
    recipe = load_recipe("celeba300/contrastive")
    methods = [build_method(recipe, stage, 300) for stage in recipe.stages]
    check_loads(recipe, methods)
    assert isinstance(methods[1], Contrastive) and "label" not in methods[1].needs


@pytest.mark.parametrize("name", ["mask", "mask_range", "noise", "noise_range", "blur", "blur_noise"])
def test_the_recipes_of_the_paper_have_its_settings(name):
    recipe = load_recipe(f"imagenet100/contrastive_{name}")
    (stage,) = recipe.stages
    assert (recipe.data.batch_size, recipe.data.classes_subset, stage.epochs) == (256, "imagenet100", 25)
    assert recipe.backbone.arguments == {"model": "RN101", "pretrained": "openai"}
    optimiser, schedule = recipes.stage_settings(stage)
    assert (optimiser.name, optimiser.learning_rate, optimiser.weight_decay) == ("adam", 1e-4, 1e-4)
    assert list(optimiser.betas) == [0.9, 0.999] and optimiser.decay_norms and schedule.kind == "cosine"
    policy = recipes.stage_policy(stage)
    assert policy.clean_share == 0 and stage.method.arguments["temperature"] == 0.1
