import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from lrface import config, recipes
from lrface.errors import LrfaceError, UsageError
from lrface.train.checkpoint import load_model, load_parts

TINY = {
    "name": "tiny",
    "data": {"path": "faces", "batch_size": 8},
    "backbone": {"name": "ir18", "width": 4, "embedding_size": 8},
    "decoder": {"name": "subpixel", "width": 16, "blocks": 0},
    "trainer": {"device": "cpu", "precision": "float32", "tensorboard": False, "log_every": 1},
    "stages": [
        {
            "name": "one",
            "method": {"name": "qualnet", "clip": False},
            "degrade": {"clean_share": 1.0},
            "steps": 2,
        },
        {
            "name": "two",
            "method": {"name": "qualnet", "freeze": ["decoder", "batchnorm"]},
            "load": ["encoder", "head", "decoder"],
            "steps": 2,
        },
    ],
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """4 identities with 4 crops each."""
    root = tmp_path_factory.mktemp("data") / "faces"
    for number in range(16):
        folder = root / f"person {number // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
        assert cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (112, 112)))
    return root


def tiny(*overrides: str, **changes) -> config.Recipe:
    return config.parse_recipe(copy.deepcopy({**TINY, **changes}), overrides)


def run(recipe: config.Recipe, faces: Path, out: Path, **settings) -> tuple[recipes.RunSummary, list[str]]:
    recipe.out = str(out)
    said: list[str] = []
    summary = recipes.run_recipe(recipe, data=faces.parent, show_progress=False, say=said.append, **settings)
    return summary, said


ONE_STAGE = [{"name": "only", "method": "classify", "steps": 1}]


@pytest.fixture(scope="module")
def finished(faces, tmp_path_factory) -> Path:
    """A run of one stage that is complete; tests that change it copy it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run(tiny(stages=ONE_STAGE), faces, out)
    return out


def test_two_stages_carry_encoder_head_and_decoder_over(faces, tmp_path, monkeypatch):
    starts: dict[str, dict[str, torch.Tensor]] = {}
    fit = recipes.Trainer.fit

    def spy(self, stage):
        starts[stage.name] = {key: value.clone() for key, value in stage.method.state_dict().items()}
        return fit(self, stage)

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    out = tmp_path / "run"
    summary, said = run(tiny(), faces, out)
    last = load_parts(out / "stages" / "1-one" / "step-00000002")
    assert set(starts["two"]) == set(last)
    assert all(torch.equal(starts["two"][key], last[key]) for key in last)
    assert not all(torch.equal(starts["one"][key], last[key]) for key in last)

    # The model at the end is the last stage's encoder, with a card that says where it comes from.
    model, card = load_model(out)
    final = load_parts(out / "stages" / "2-two" / "step-00000002")
    assert all(torch.equal(value, final[f"encoder.{key}"]) for key, value in model.state_dict().items())
    assert card["architecture"] == {"name": "ir18", "arguments": {"width": 4, "embedding_size": 8}}
    assert card["training"]["stage"] == "two" and card["training"]["identities"] == 4
    assert card["training"]["images"] == 16 and card["training"]["seed"] == 0
    assert card["recipe"] == config.to_plain(config.parse_recipe(config.read_yaml(out / "recipe.yaml")))
    assert summary.weights_sha256 == card["weights_sha256"] and summary.model == str(
        out / "model.safetensors"
    )
    assert [stage["name"] for stage in summary.stages] == ["one", "two"]
    assert json.loads((out / "summary.json").read_text())["weights_sha256"] == summary.weights_sha256
    assert "16 images of 4 identities" in said[0]


def test_only_what_a_stage_loads_is_carried_over(faces, tmp_path, monkeypatch):
    starts = {}
    fit = recipes.Trainer.fit

    def spy(self, stage):
        starts[stage.name] = copy.deepcopy(stage.method.state_dict())
        return fit(self, stage)

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    loads = "stages.1.load=[encoder]"
    with pytest.raises(
        UsageError, match=r"stages.1.load lacks decoder, .*add \{from: decoder, to: decoder\}"
    ):
        run(tiny(loads), faces, tmp_path / "frozen")
    settings = (loads, "stages.1.method.freeze=[batchnorm]", "stages.0.steps=1", "stages.1.steps=1")
    run(tiny(*settings), faces, tmp_path / "run")
    last = load_parts(tmp_path / "run" / "stages" / "1-one" / "step-00000001")
    equal = {key for key in last if torch.equal(last[key], starts["two"][key])}
    assert {key for key in last if key.startswith("encoder.")} <= equal
    assert "head.weight" not in equal and "decoder.image.weight" not in equal


def test_a_complete_run_says_so_and_trains_nothing(finished, faces, monkeypatch):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    before = (finished / "model.safetensors").read_bytes()
    summary, said = run(tiny(stages=ONE_STAGE), faces, finished)
    assert "stage only: complete (1 steps)" in said
    assert (finished / "model.safetensors").read_bytes() == before
    assert summary.weights_sha256 == json.loads((finished / "model.json").read_text())["weights_sha256"]
    assert json.loads((finished / "summary.json").read_text())["stages"][0]["resumed_at"] == 0


def test_schedules_in_epochs_become_steps_of_the_runs_epochs(faces, tmp_path, monkeypatch):
    """16 images in batches of 4: an epoch is 4 steps."""
    seen = []
    fit = recipes.Trainer.fit

    def spy(self, stage):
        seen.append([round(stage.rate(step), 6) for step in range(stage.steps)])
        return fit(self, stage)

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    stages = [
        {
            "name": "only",
            "method": "classify",
            "epochs": 3,
            "optimiser": {"learning_rate": 0.01},
            "schedule": {"milestone_epochs": [1, 2.5], "warmup_epochs": 0.5},
        }
    ]
    run(tiny("data.batch_size=4", stages=stages), faces, tmp_path / "run")
    assert seen == [[0.005, 0.01, 0.01, 0.01] + [0.001] * 6 + [0.0001] * 2]


def test_the_model_at_the_end_says_that_its_weights_are_averaged(faces, tmp_path):
    stages = [{**ONE_STAGE[0], "steps": 3, "ema": 0.9}]
    run(tiny(stages=stages), faces, tmp_path / "run")
    model, card = load_model(tmp_path / "run")
    assert card["weights"] == "exponential moving average of the trained ones, decay 0.9"
    kept = load_parts(tmp_path / "run" / "stages" / "1-only" / "step-00000003")
    assert all(torch.equal(value, kept[f"encoder.{key}"]) for key, value in model.state_dict().items())


def test_a_run_of_another_recipe_is_refused_naming_the_keys(finished, faces):
    other = tiny("seed=3", "stages.0.optimiser.learning_rate=0.5", stages=ONE_STAGE)
    with pytest.raises(UsageError) as caught:
        run(other, faces, finished)
    message = str(caught.value)
    assert "holds a run of another recipe: " in message
    assert "stages.0.optimiser.learning_rate: 0.1 -> 0.5" in message and "seed: 0 -> 3" in message
    assert "--restart" in message and "--accept-changes" in message


def test_what_only_changes_how_a_run_is_fed_and_watched_is_no_other_recipe(finished, faces, monkeypatch):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    watched = ("log_every=7", "keep_last=5", "keep_every=4", "checkpoint_every=9")
    changed = tiny(
        *(f"trainer.{item}" for item in watched), "data.workers=1", "data.cache=false", stages=ONE_STAGE
    )
    _, said = run(changed, faces, finished)
    assert "stage only: complete (1 steps)" in said


def test_accepted_changes_go_on_and_a_restart_starts_anew(faces, tmp_path):
    out = tmp_path / "run"
    run(tiny(stages=ONE_STAGE), faces, out)
    longer = [{**ONE_STAGE[0], "steps": 2}]
    with pytest.raises(UsageError, match="stages.0.steps: 1 -> 2"):
        run(tiny(stages=longer), faces, out)
    summary, said = run(tiny(stages=longer), faces, out, accept_changes=True)
    assert summary.stages[0]["resumed_at"] == 1 and summary.stages[0]["steps"] == 2
    assert any("stage only: resumes from" in line for line in said)
    assert config.read_yaml(out / "recipe.yaml")["stages"][0]["steps"] == 2
    keepsake = out / "notes.txt"
    keepsake.write_text("mine")
    summary, _ = run(tiny(stages=ONE_STAGE), faces, out, restart=True)
    assert summary.stages[0]["resumed_at"] == 0
    assert [path.name for path in (out / "stages" / "1-only").glob("step-*")] == ["step-00000001"]
    assert keepsake.read_text() == "mine"


def test_a_place_that_holds_something_else_is_refused(faces, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for settings in ({}, {"restart": True}, {"accept_changes": True}):
        with pytest.raises(UsageError, match="is not empty and holds no run of lrface; choose another place"):
            run(tiny(stages=ONE_STAGE), faces, tmp_path, **settings)
    with pytest.raises(UsageError, match="thesis.tex is a file; a run needs a directory"):
        run(tiny(stages=ONE_STAGE), faces, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_is_wrong_in_a_later_stage_is_found_before_the_first_runs(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    for overrides, message in (
        (["stages.two.schedule.kind=cosin"], "stage 'two': schedule.kind must be one of"),
        (["stages.two.optimiser.momentum=-1"], "stage 'two': optimiser.momentum must be"),
        (["stages.two.degrade.clean_share=2"], "stage 'two': degrade.clean_share must be between 0 and 1"),
        (["stages.one.method=classify"], r"stages.1.load: stage 'one' \(method classify\) has no decoder"),
        (["stages.two.method=classify"], r"stages.1.load: stage 'two' \(method classify\) has no decoder"),
    ):
        with pytest.raises(UsageError, match=message):
            run(tiny(*overrides), faces, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_first_stage_starts_from_a_model_on_disk(finished, faces, tmp_path, monkeypatch):
    seen = {}

    def spy(self, stage):
        seen.update(copy.deepcopy(stage.method.encoder.state_dict()))
        raise LrfaceError("seen enough")

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    with pytest.raises(LrfaceError, match="seen enough"):
        run(tiny(f"start_from={finished}", stages=ONE_STAGE), faces, tmp_path / "run")
    model, _ = load_model(finished)
    assert all(torch.equal(seen[key], value) for key, value in model.state_dict().items())
    with pytest.raises(LrfaceError, match="start_from .* is of another architecture"):
        run(tiny(f"start_from={finished}", "backbone.width=8", stages=ONE_STAGE), faces, tmp_path / "other")
    with pytest.raises(LrfaceError, match="nowhere: no such model"):
        run(tiny("start_from=nowhere", stages=ONE_STAGE), faces, tmp_path / "third")


def test_data_that_is_not_found_lists_the_places(tmp_path, monkeypatch):
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "environment"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with pytest.raises(LrfaceError) as caught:
        recipes.find_data("faces-of-nobody", tmp_path / "option")
    places = [
        "faces-of-nobody",
        *(f"{tmp_path}/{p}/faces-of-nobody" for p in ("option", "environment", "home/.cache/lrface")),
    ]
    assert ", ".join(places) in str(caught.value) and "--data" in str(caught.value)


def test_data_is_found_in_the_stated_order(tmp_path, monkeypatch):
    monkeypatch.setenv("LRFACE_DATA", str(tmp_path / "environment"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    for place in ("home/.cache/lrface", "environment", "option"):
        (tmp_path / place / "faces").mkdir(parents=True)
        assert recipes.find_data("faces", tmp_path / "option") == tmp_path / place / "faces"
    (tmp_path / "faces").mkdir()
    assert recipes.find_data("faces", tmp_path / "option") == Path("faces")


def test_fewer_images_than_a_batch(faces, tmp_path):
    with pytest.raises(
        LrfaceError, match="holds 16 images, fewer than one batch of 64; set data.batch_size=16 or less"
    ):
        run(tiny("data.batch_size=64"), faces, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_identity_only(faces, tmp_path):
    recipe = tiny(f"data.path={faces / 'person 0'}")
    with pytest.raises(LrfaceError, match="no images found; expected .*IDENTITY/IMAGE.jpg"):
        run(recipe, faces, tmp_path / "run")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "ann").symlink_to(faces / "person 0")
    with pytest.raises(LrfaceError, match=r"holds one identity only \(ann\)"):
        run(tiny(f"data.path={tmp_path / 'one'}"), faces, tmp_path / "run")


def test_synthetic_identities():
    raw = {**TINY, "data": {"synthetic": {"identities": 3, "images_per_identity": 2, "seed": 5}}}
    source, name = recipes.build_source(config.parse_recipe(copy.deepcopy(raw)))
    assert len(source) == 6 and len(source.identities) == 3 and source.image(0).shape == (112, 112, 3)
    assert name == "synthetic:identities=3,images_per_identity=2,seed=5,first_identity=0"


def test_recipes_by_path_and_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(config.to_yaml(tiny()))
    assert recipes.find_recipe(str(path)) == path
    assert recipes.load_recipe(str(path), ["seed=4"]).seed == 4
    naive = recipes.find_recipe("celeba300/naive")
    assert naive.name == "naive.yaml" and naive.parent.name == "celeba300"
    assert recipes.find_recipe("configs/celeba300/naive.yaml").samefile(naive)
    with pytest.raises(
        UsageError, match=r"celeba300/naiv: no such file, .*\(did you mean 'celeba300/naive'\?\); shipped: "
    ):
        recipes.find_recipe("celeba300/naiv")


def test_errors_name_the_recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\nstages: []\n")
    with pytest.raises(UsageError, match="mine.yaml: stages must list at least one stage"):
        recipes.load_recipe(str(path))
    path.write_text(config.to_yaml(tiny()))
    with pytest.raises(UsageError, match="mine.yaml: stage 'one': schedule: .*gamma above 0"):
        recipes.load_recipe(str(path), ["stages.0.schedule.gamma=0"])


def test_steps_of_a_stage():
    stage = tiny().stages[0]
    assert recipes.stage_steps(stage, 100, 8) == 2
    stage.steps = None
    for epochs, steps in ((1.0, 12), (2.5, 30), (0.01, 1), (20.0, 240)):
        stage.epochs = epochs
        assert recipes.stage_steps(stage, 100, 8) == steps


def test_compile_setting(tmp_path, monkeypatch):
    said: list[str] = []
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(recipes.sysconfig, "get_path", lambda name: str(tmp_path))
    recipe = tiny()
    monkeypatch.setattr(recipes.shutil, "which", lambda name: None)
    for setting, expected in ((True, True), (False, False), ("auto", False)):
        recipe.trainer.compile = setting
        assert recipes.wants_compile(recipe, said.append) is expected
    assert len(said) == 1 and "a C++ compiler not found: training runs without compilation" in said[0]
    monkeypatch.setattr(recipes.shutil, "which", lambda name: "/usr/bin/c++")
    assert recipes.wants_compile(recipe, said.append) is True
    (tmp_path / "Python.h").unlink()
    assert recipes.wants_compile(recipe, said.append) is False
    assert "Python's headers (Python.h) not found" in said[1]
    recipe.trainer.compile = "always"
    with pytest.raises(UsageError, match="trainer.compile must be true, false or auto; found 'always'"):
        recipes.wants_compile(recipe, said.append)


def test_cache_setting(faces):
    from lrface.data.dataset import CachedDataset, FaceDataset

    recipe = tiny(stages=ONE_STAGE)
    source, _ = recipes.build_source(recipe, faces.parent)
    method = recipes.build_method(recipe, recipe.stages[0], 4)
    for setting, kind in ((True, CachedDataset), ("auto", CachedDataset), (False, FaceDataset)):
        recipe.data.cache = setting
        assert type(recipes.open_dataset(recipe, source, method, False)) is kind
    recipe.data.cache = "some"
    with pytest.raises(UsageError, match="data.cache must be true, false or auto; found 'some'"):
        recipes.open_dataset(recipe, source, method, False)


def test_auto_cache_has_a_limit(faces, monkeypatch):
    from lrface.data.dataset import FaceDataset

    recipe = tiny(stages=ONE_STAGE)
    source, _ = recipes.build_source(recipe, faces.parent)
    method = recipes.build_method(recipe, recipe.stages[0], 4)
    monkeypatch.setattr(recipes, "CACHE_LIMIT", 16 * 112 * 112 * 3 - 1)
    assert type(recipes.open_dataset(recipe, source, method, False)) is FaceDataset
