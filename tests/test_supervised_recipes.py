"""The end-to-end baselines of contrastive inversion: they build, tune encoder and head, and are judged beside probes."""

import numpy as np
import pytest
import torch
from test_classification_recipes import write_images

from lrface import recipes
from lrface.benchmarks.image_sets import check_labels
from lrface.data.source import open_source
from lrface.data.subset import label_rows
from lrface.errors import LrfaceError
from lrface.features import open_data
from lrface.probe import run_probe
from lrface.recipes import build_method, check_loads, load_recipe, run_recipe, stage_settings
from lrface.train.checkpoint import load_model, load_parts

NAMES = ["mask", "noise", "blur"]


@pytest.mark.parametrize("name", NAMES)
def test_they_have_the_papers_settings(name):
    recipe = load_recipe(f"cifar10/supervised_{name}")
    methods = [build_method(recipe, stage, 10) for stage in recipe.stages]
    check_loads(recipe, methods)
    optimiser, schedule = stage_settings(recipe.stages[1])
    assert (optimiser.name, optimiser.learning_rate, optimiser.weight_decay) == ("adam", 1e-3, 0)
    assert list(optimiser.betas) == [0.9, 0.999] and schedule.kind == "cosine"
    policy = methods[1].policy
    degraded, hq = policy.apply(
        torch.rand(4, 3, 32, 32), policy.sample(4, 32, torch.Generator().manual_seed(0))
    )
    assert bool((degraded != hq).flatten(1).any(1).all())


@pytest.mark.parametrize("name", [*NAMES, "mask_range", "noise_range"])
def test_those_of_imagenet100_see_what_their_students_see(name):
    own, student = (load_recipe(f"imagenet100/{kind}_{name}") for kind in ("supervised", "contrastive"))
    (stage,) = own.stages
    optimiser, schedule = stage_settings(stage)
    assert (optimiser.name, optimiser.learning_rate, schedule.kind) == ("adam", 1e-3, "cosine")
    assert (own.data.batch_size, own.data.classes_subset, stage.epochs) == (64, "imagenet100", 25)
    assert own.backbone.arguments["weights"] == "resnet101.pth", "never from fresh weights"
    wanted = {**student.stages[0].degrade.arguments, "mirror": 0}
    assert stage.degrade.name == student.stages[0].degrade.name and stage.degrade.arguments == wanted


def test_a_share_of_the_labels_is_that_of_a_probe(tmp_path, monkeypatch):
    """Ten epochs of a tenth are as many steps as one of all; the first stage has all images."""
    write_images(tmp_path / "cifar10" / "train.parquet", 200)
    overrides = ["backbone.width=4", "data.batch_size=10", "trainer.device=cpu", "trainer.threads=1"]
    overrides += ["trainer.tensorboard=false", "stages.0.schedule.warmup_steps=0", "stages.0.epochs=1"]
    overrides += ["stages.1.epochs=3", "stages.1.share=0.1", "seed=3", f"out={tmp_path / 'run'}"]
    seen: list[list[int]] = []

    def watched(recipe, dataset, seed, trainer):
        rows = getattr(dataset, "rows", np.arange(len(dataset)))
        seen.append(rows.tolist())
        return stream(recipe, dataset, seed, trainer)

    stream = recipes.image_stream
    monkeypatch.setattr(recipes, "image_stream", watched)
    summary = run_recipe(
        load_recipe("cifar10/supervised_noise", overrides), data=tmp_path, show_progress=False
    )
    assert [stage["steps"] for stage in summary.stages] == [20, 6]
    images = open_data(tmp_path / "cifar10" / "train.parquet", None, False)
    assert seen[0] == list(range(200)) and seen[1] == label_rows(check_labels(images), 0.1, seed=3).tolist()
    assert load_model(tmp_path / "run")[1]["training"]["images"] == 20
    pinned = load_recipe("cifar10/supervised_noise", [*overrides, "stages.1.share_seed=0"])
    rows = recipes.stage_rows(pinned, pinned.stages[1], open_source(tmp_path / "cifar10" / "train.parquet"))
    assert rows.tolist() == label_rows(check_labels(images), 0.1, seed=0).tolist() != seen[1]
    small = load_recipe("cifar10/supervised_noise", [*overrides, "data.batch_size=32", "out=x"])
    with pytest.raises(
        LrfaceError, match="stage 'supervised': its share of 0.1 is 20 images, fewer than one"
    ):
        run_recipe(small, data=tmp_path, show_progress=False)


def test_a_baseline_trains_and_is_judged_with_its_own_head(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / "cifar10" / f"{part}.parquet", 40)
    overrides = ["backbone.width=4", "data.batch_size=10", "trainer.device=cpu", "trainer.threads=1"]
    overrides += [
        "trainer.tensorboard=false",
        "stages.teacher.schedule.warmup_steps=0",
        f"out={tmp_path / 'run'}",
    ]
    overrides += [f"stages.{stage}.{key}" for stage in (0, 1) for key in ("steps=3", "epochs=null")]
    run_recipe(load_recipe("cifar10/supervised_mask", overrides), data=tmp_path, show_progress=False)
    start, end = (
        load_parts(tmp_path / "run" / "stages" / stage / "step-00000003")
        for stage in ("1-teacher", "2-supervised")
    )
    assert not torch.equal(start["head.linear.weight"], end["head.linear.weight"])
    found = run_probe(
        [f"probe={tmp_path / 'run'}"],
        "cifar10/train.parquet",
        "cifar10/test.parquet",
        own_heads=[f"own={tmp_path / 'run'}"],
        degrade="{name: pixel_mask, missing: 0.9}",
        seeds=2,
        root=tmp_path,
        keep_features=False,
        device="cpu",
        show_progress=False,
    )
    assert [result["classifier"] for result in found.results] == ["own head", "probe"]
    blurred = run_probe(
        [f"probe={tmp_path / 'run'}"],
        "cifar10/train.parquet",
        "cifar10/test.parquet",
        degrade="{name: gaussian_blur, kernel: 37, sigma: 9, reference_size: 224}",
        seeds=2,
        root=tmp_path,
        keep_features=False,
        device="cpu",
        show_progress=False,
    )
    assert len(blurred.results[0]["top1"]["values"]) == 1  # blur draws nothing
