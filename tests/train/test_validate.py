"""Validation on held-out identities: pairs, accuracy, and a training that does not notice it."""

import copy
import csv
import json
import os
import signal
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from lrface import config, recipes
from lrface.benchmarks.verification import VerificationSet, evaluate_verification
from lrface.degrade.policy import ResolutionPolicy
from lrface.errors import LrfaceError, UsageError
from lrface.heads import build_head
from lrface.methods import Classify
from lrface.train import validate
from lrface.train.checkpoint import checkpoints, load_model, load_parts, load_training_state
from lrface.train.observe import Observer, Observers, untouched
from lrface.train.signals import Interrupted
from lrface.train.trainer import Stage, Trainer
from lrface.train.validate import (
    HeldOut,
    Validation,
    ValidationSettings,
    best_step,
    chosen_checkpoint,
    draw_pairs,
    hold_out,
    read_validation,
)


class Patterns:
    """Coarse patterns, one an identity, with noise of the image's own."""

    format = "patterns"

    def __init__(self, sizes: list[int], side: int = 32, broken: tuple[int, ...] = ()):
        self.labels = np.repeat(np.arange(len(sizes)), sizes)
        self.identities = [f"person {k}" for k in range(len(sizes))]
        self.side = side
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        if index in self.broken:
            raise LrfaceError(f"{index}.jpg cannot be decoded")
        coarse = np.random.default_rng(int(self.labels[index])).integers(40, 216, (4, 4, 3))
        noise = np.random.default_rng((1, index)).integers(-30, 31, (self.side, self.side, 3))
        wide = np.kron(coarse, np.ones((self.side // 4, self.side // 4, 1), dtype=int))
        return np.clip(wide + noise, 0, 255).astype(np.uint8)


SETTINGS = ValidationSettings(every=2, identities=3, sizes=(32, 8), pairs=40)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"every": 0}, "validate.every must be at least 1; found 0"),
        ({"pairs": 19}, "validate.pairs must be at least 20; found 19"),
        ({"seed": -1}, "validate.seed must be at least 0"),
        ({"batch_size": 0}, "validate.batch_size must be at least 1"),
        ({"identities": 0}, "validate.identities must be a share below 1 .* or a whole number"),
        ({"identities": 2.5}, "validate.identities must be .*; found 2.5"),
        ({"identities": float("nan")}, "validate.identities must be .*; found nan"),
        ({"identities": float("inf")}, "validate.identities must be .*; found inf"),
        ({"sizes": ()}, "validate.sizes must list different resolutions"),
        ({"sizes": (14, 0)}, "validate.sizes must list different resolutions"),
        ({"sizes": (14, 14)}, r"validate.sizes must list different resolutions .*; found \[14, 14\]"),
        ({"choose": "first"}, "validate.choose must be last or best; found 'first'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        ValidationSettings(**settings)


def test_a_size_above_the_input_is_named():
    SETTINGS.check_input_size(32)
    with pytest.raises(UsageError, match="validate.sizes: 32 is above the input of the network, 16 pixels"):
        SETTINGS.check_input_size(16)


def test_the_same_people_are_held_out_whatever_their_order():
    source = Patterns([4, 1, 3, 5, 2, 6])
    training, held_out = hold_out(source, SETTINGS, "data")
    assert not set(training.identities) & set(held_out.identities)
    assert set(training.identities) | set(held_out.identities) == set(source.identities)
    assert len(training) + len(held_out) == len(source) and len(held_out.identities) == 3
    assert "person 1" in training.identities  # one image makes no pair
    other = copy.copy(source)
    other.identities, other.labels = source.identities[::-1], 5 - source.labels
    assert set(hold_out(other, SETTINGS, "data")[1].identities) == set(held_out.identities)
    seeds = {
        tuple(hold_out(source, ValidationSettings(identities=3, seed=k), "")[1].identities) for k in range(9)
    }
    assert len(seeds) > 1
    share = hold_out(source, ValidationSettings(identities=0.4), "data")[1]
    assert len(share.identities) == 2
    with pytest.raises(
        UsageError, match="validate.identities=4: data has 5 identities with two images or more"
    ):
        hold_out(source, ValidationSettings(identities=4), "data")


@pytest.mark.parametrize("sizes, pairs", [([40, 2, 9, 15, 3], 60), ([5, 5, 5], 1000), ([300, 300], 400)])
def test_pairs_are_balanced_different_and_the_same_each_time(sizes, pairs):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    left, right, same = draw_pairs(labels, pairs, seed=3)
    possible = sum(size * (size - 1) // 2 for size in sizes)
    different = sum(a * b for a, b in combinations(sizes, 2))
    assert same.sum() == (~same).sum() == min(pairs // 2, possible, different)
    assert np.array_equal(labels[left] == labels[right], same)
    unordered = {frozenset(pair) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert len(unordered) == len(left) and all(len(pair) == 2 for pair in unordered)
    again = draw_pairs(labels.copy(), pairs, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip((left, right, same), again, strict=True))
    assert not np.array_equal(draw_pairs(labels, pairs, seed=4)[0], left)


def test_no_person_outweighs_the_others():
    labels = np.repeat(np.arange(5), [100, 10, 10, 10, 3])
    left, _, same = draw_pairs(labels, 100, seed=0)
    counts = Counter(labels[left[same]].tolist())
    assert counts[4] == 3 and {counts[k] for k in range(4)} <= {11, 12} and sum(counts.values()) == 50


def test_too_few_pairs_are_named():
    with pytest.raises(
        LrfaceError, match="give only 2 pairs of either kind, 10 are needed; raise validate.id"
    ):
        draw_pairs(np.array([0, 0, 1, 1]), 100, seed=0)


class Pooled(nn.Module):
    """Means of the image's sixteenth parts: a network that everybody can compute."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) - 0.5


def test_accuracy_is_that_of_lrface_verify():
    source = Patterns([6, 5, 7, 4])
    held_out = HeldOut(source, SETTINGS, 32)
    found = held_out.accuracies(Pooled(), (32, 8, 1), batch_size=7)
    pairs = VerificationSet("", held_out.images, held_out.left, held_out.right, held_out.same, held_out.folds)
    rows = evaluate_verification(Pooled(), pairs, (32, 8, 1), flip=False, progress=False).rows
    assert list(found) == [32, 8, 1]
    assert list(found.values()) == pytest.approx([row["accuracy"] for row in rows], abs=1e-3)
    assert found[32] == 100.0 and found[1] < 100.0


def test_faces_that_cannot_be_read_are_left_out_and_counted():
    whole = HeldOut(Patterns([6, 5, 7, 4]), SETTINGS, 32)
    said: list[str] = []
    broken = HeldOut(Patterns([6, 5, 7, 4], broken=(3,)), SETTINGS, 32, said.append)
    assert len(broken.same) < len(whole.same)
    assert len(said) == 1 and "1 of 22 held-out faces cannot be read, the first: 3.jpg cannot be" in said[0]
    assert broken.accuracies(Pooled(), (32,), 8) == {32: 100.0}
    with pytest.raises(LrfaceError, match="only 0 pairs of either kind are left"):
        HeldOut(Patterns([6, 5, 7, 4], broken=tuple(range(22))), SETTINGS, 32)


def test_features_that_are_not_finite_are_named():
    class Broken(Pooled):
        def forward(self, images):
            return super().forward(images) * float("nan")

    with pytest.raises(LrfaceError, match="validate: features at 32 pixels are not finite"):
        HeldOut(Patterns([6, 5, 7]), SETTINGS, 32).accuracies(Broken(), (32,), 8)


def test_the_best_step_is_the_earliest_of_the_highest():
    rows = {step: {"accuracy_mean": value} for step, value in ((2, 60.0), (4, 70.0), (6, 70.0), (8, 65.0))}
    assert best_step(rows, rows) == 4 and best_step(rows, [6, 8]) == 6 and best_step(rows, []) is None


SIDE = 32


class Small(nn.Sequential):
    """A quick network with what a resume must bring back and a validation leave alone: BatchNorm and dropout."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=4),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.4),
            nn.Linear(128, 8),
        )


def small_method() -> Classify:
    torch.manual_seed(0)
    return Classify(Small(), build_head("cosface", 8, 4), ResolutionPolicy(sizes=(16, 8)))


class Run:
    """A stage of 7 steps on noise, watched or not; dropout and BatchNorm would show any disturbance."""

    def __init__(self, folder: Path, settings: ValidationSettings | None, scripted=None, steps: int = 7):
        self.folder, self.settings, self.scripted, self.steps = folder, settings, scripted, steps
        self.validated: list[int] = []

    def observer(self) -> Observer:
        if self.settings is None:
            return Observer()
        faces = HeldOut(Patterns([6, 5, 7, 4], side=SIDE), self.settings, SIDE)
        if self.scripted is not None:
            script = self.scripted
            counter = self

            class Scripted(HeldOut):
                def __init__(self):
                    pass

                def accuracies(self, *_):
                    return {56: script[counter.at]}

            faces = Scripted()
        self.validation = Validation(
            self.settings,
            lambda: faces,
            self.steps,
            listeners=[lambda step, values: self.validated.append(step)],
        )
        return Observers([self.validation])

    def go(self, stop_at: int | None = None, keep_last: int = 1, checkpoint_every: int = 3) -> object:
        def stream(first: int, last: int):
            for step in range(first, last):
                self.at = step + 1
                if step + 1 == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop_at is not None and step == stop_at:
                    raise AssertionError("the signal was not seen")
                if stop_at is not None and step + 1 == -stop_at:
                    raise KeyboardInterrupt  # a kill: nothing is saved
                random = torch.Generator().manual_seed(step)
                yield {
                    "image": torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=random, dtype=torch.uint8),
                    "label": torch.arange(4),
                    "seed": step,
                }

        trainer = Trainer(
            device="cpu",
            precision="float32",
            checkpoint_every=checkpoint_every,
            keep_last=keep_last,
            log_every=1,
            tensorboard=False,
            show_progress=False,
        )
        stage = Stage(
            "s", small_method(), self.steps, 4, stream, self.folder, _card(), observer=self.observer()
        )
        return trainer.fit(stage)


def _card() -> dict:
    return {"card": True}


def weights(folder: Path, step: int = 7) -> dict[str, torch.Tensor]:
    path = folder / f"step-{step:08d}"
    return {**load_parts(path), "random": load_training_state(path).random["cpu"]}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


WATCHED = ValidationSettings(every=2, sizes=(32, 8), pairs=40)


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unwatched")
    Run(folder, None).go()
    return folder


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    run = Run(folder, WATCHED)
    run.go()
    assert run.validated == [2, 4, 6, 7]
    return folder


def test_training_does_not_notice_it_is_validated(watched, unwatched):
    assert equal(weights(watched), weights(unwatched))
    rows = read_validation(watched)
    assert list(rows) == [2, 4, 6, 7] and set(rows[2]) == {"accuracy_mean", "accuracy_32", "accuracy_8"}
    for row in rows.values():
        assert row["accuracy_mean"] == pytest.approx((row["accuracy_32"] + row["accuracy_8"]) / 2)
        assert 0 <= row["accuracy_8"] <= 100
    # The picture is there and drawn whole.
    assert cv2.imread(str(watched / "validation.png")).shape[0] > 300
    # What is written is what the network of the checkpoint gives.
    state = {key.removeprefix("encoder."): value for key, value in weights(watched).items()}
    method = small_method()
    method.encoder.load_state_dict({key: state[key] for key in method.encoder.state_dict()})
    faces = HeldOut(Patterns([6, 5, 7, 4], side=SIDE), WATCHED, SIDE)
    found = faces.accuracies(method.encoder.eval(), (32, 8), 5)
    assert rows[7]["accuracy_32"] == pytest.approx(found[32], abs=1e-6)


@pytest.mark.parametrize("stop", [2, 3, 7, -4, -7])
def test_a_resume_validates_nothing_twice_and_ends_alike(watched, tmp_path, stop):
    first = Run(tmp_path, WATCHED)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        first.go(stop)
    newest = checkpoints(tmp_path)
    saved = int(newest[-1].name.removeprefix("step-")) if newest else 0
    second = Run(tmp_path, WATCHED)
    second.go()
    assert second.validated == [step for step in (2, 4, 6, 7) if step > saved]
    assert (tmp_path / "validation.csv").read_bytes() == (watched / "validation.csv").read_bytes()
    assert equal(weights(tmp_path), weights(watched))


BEST = ValidationSettings(every=1, sizes=(56,), choose="best")
SCRIPT = {1: 50.0, 2: 80.0, 3: 60.0, 4: 80.0, 5: 70.0, 6: 10.0, 7: 20.0}


def steps_kept(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path, unwatched):
    Run(tmp_path, BEST, SCRIPT).go()
    assert steps_kept(tmp_path) == [2, 7]
    path, how = chosen_checkpoint(tmp_path, "best")
    assert path == tmp_path / "step-00000002" and how["step"] == 2
    assert how["validation"]["accuracy_mean"] == 80.0 and "held-out training identities" in how["by"]
    assert chosen_checkpoint(tmp_path, "last")[0] == tmp_path / "step-00000007"
    assert equal(weights(tmp_path), weights(unwatched))


@pytest.mark.parametrize("stop", [-3, -4, 3])
def test_the_best_checkpoint_survives_kills(tmp_path, stop):
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        Run(tmp_path, BEST, SCRIPT).go(stop)
    Run(tmp_path, BEST, SCRIPT).go()
    assert steps_kept(tmp_path) == [2, 7] and chosen_checkpoint(tmp_path, "best")[1]["step"] == 2


def test_a_best_step_without_its_checkpoint_cannot_be_chosen(tmp_path):
    last = ValidationSettings(every=1, sizes=(56,), choose="last")
    with pytest.raises(Interrupted):
        Run(tmp_path, last, SCRIPT).go(5)
    assert steps_kept(tmp_path) == [5]
    Run(tmp_path, BEST, SCRIPT).go()  # the recipe was changed
    assert chosen_checkpoint(tmp_path, "best")[1]["step"] == 5
    (tmp_path / "validation.csv").unlink()
    with pytest.raises(LrfaceError, match="validate.choose is best, but no checkpoint there was validated"):
        chosen_checkpoint(tmp_path, "best")
    with pytest.raises(LrfaceError, match="holds no checkpoint"):
        chosen_checkpoint(tmp_path / "nowhere", "last")


def test_a_line_that_a_kill_cut_is_left_out(tmp_path):
    text = "step,accuracy_mean,accuracy_56\n2,50.0,50.0\n4,60.0,60.0\n6,70.0"
    (tmp_path / "validation.csv").write_text(text)
    assert list(read_validation(tmp_path)) == [2, 4]
    (tmp_path / "validation.csv").write_text("nonsense\n")
    assert read_validation(tmp_path) == {} and read_validation(tmp_path / "nowhere") == {}


def test_observers_leave_generators_and_modes_alone_and_ask_together():
    class Drawing(Observer):
        def due(self, step):
            return step != 3

        def after_step(self, step, method):
            torch.rand(3)
            method.eval()
            return step == 2

        def kept(self):
            return (4,)

    method = small_method().train()
    method.encoder.eval()  # frozen in part
    modes = [module.training for module in method.modules()]
    before = torch.get_rng_state()
    both = Observers([Drawing(), Observer()])
    assert [both.after_step(step, method) for step in (1, 2, 3)] == [False, True, False]
    assert set(both.kept()) == {4}
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in method.modules()] == modes
    with pytest.raises(RuntimeError), untouched(method):
        method.train()
        torch.rand(1)
        raise RuntimeError
    assert [module.training for module in method.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_process_computes_and_writes_nothing(tmp_path):
    faces = HeldOut(Patterns([6, 5, 7, 4], side=SIDE), WATCHED, SIDE)
    validation = Validation(WATCHED, lambda: faces, 7, main=False)
    validation.begin(0, small_method(), tmp_path)
    assert validation.after_step(2, small_method()) is False and list(validation.rows) == [2]
    validation.saved(2, tmp_path)
    validation.end()
    assert list(tmp_path.iterdir()) == []


RECIPE = {
    "name": "tiny",
    "data": {"path": "faces", "batch_size": 6},
    "backbone": {"name": "ir18", "width": 4, "embedding_size": 8},
    "trainer": {"device": "cpu", "precision": "float32", "tensorboard": False, "log_every": 1},
    "validate": {"every": 1, "identities": 2, "sizes": [112, 14], "pairs": 24, "choose": "best"},
    "stages": [
        {"name": "one", "method": "classify", "steps": 3},
        {"name": "two", "method": "classify", "load": ["encoder"], "steps": 2},
    ],
}


@pytest.fixture
def faces(tmp_path) -> Path:
    """5 identities with 4 crops each, and one with one."""
    source = Patterns([4, 4, 4, 4, 4, 1], side=112)
    for index in range(len(source)):
        folder = tmp_path / "data" / "faces" / source.identities[source.labels[index]]
        folder.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / f"{index}.png"), source.image(index))
    return tmp_path / "data"


def train(faces: Path, out: Path, *overrides: str) -> tuple[recipes.RunSummary, list[str]]:
    said: list[str] = []
    recipe = config.parse_recipe(copy.deepcopy(RECIPE), [*overrides, f"out={out}"])
    return recipes.run_recipe(recipe, data=faces, show_progress=False, say=said.append), said


def test_a_recipe_trains_without_the_held_out_and_ends_with_the_best(faces, tmp_path, monkeypatch):
    starts = {}
    fit = recipes.Trainer.fit

    def spy(self, stage):
        starts[stage.name] = {key: value.clone() for key, value in stage.method.state_dict().items()}
        return fit(self, stage)

    # The second validation of the first stage is the best there, the first one of the second stage.
    script = iter([70.0, 90.0, 80.0, 60.0, 50.0])

    def scripted(self, encoder, sizes, *_):
        value = next(script)
        return {size: value for size in sizes}

    monkeypatch.setattr(validate.HeldOut, "accuracies", scripted)
    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    out = tmp_path / "run"
    summary, said = train(faces, out, "data.sampling.minimum=2")
    assert (summary.images, summary.identities) == (12, 3)
    assert any(
        "1 identities with fewer than data.sampling.minimum=2 images are left out, 1 " in line
        for line in said
    )
    assert any("2 identities with 8 images are held out for validation" in line for line in said)
    assert starts["one"]["head.weight"].shape == (3, 8)
    one, two = out / "stages" / "1-one", out / "stages" / "2-two"
    chosen = [one / "step-00000002", two / "step-00000001"]
    assert [steps_kept(one), steps_kept(two)] == [[2, 3], [1, 2]]
    begun = load_parts(chosen[0])
    assert all(torch.equal(starts["two"][key], begun[key]) for key in begun if key.startswith("encoder."))
    model, card = load_model(out)
    final = load_parts(chosen[1])
    assert all(torch.equal(value, final[f"encoder.{key}"]) for key, value in model.state_dict().items())
    assert card["chosen"]["step"] == card["step"] == 1
    assert card["chosen"]["by"] == "accuracy on held-out training identities"
    assert set(card["chosen"]["validation"]) == {"accuracy_mean", "accuracy_112", "accuracy_14"}
    assert card["training"]["held_out_identities"] == 2
    assert summary.stages[0]["checkpoint"] == str(chosen[0])
    again, _ = train(faces, out, "data.sampling.minimum=2")
    assert again.weights_sha256 == summary.weights_sha256
    assert json.loads((out / "model.json").read_text())["chosen"] == card["chosen"]


def test_a_run_without_validation_says_last(faces, tmp_path):
    recipe = config.parse_recipe(copy.deepcopy(RECIPE), ["validate=null", f"out={tmp_path / 'run'}"])
    summary = recipes.run_recipe(recipe, data=faces, show_progress=False)
    card = load_model(tmp_path / "run")[1]
    assert card["chosen"] == {"step": 2, "by": "last"} and "held_out_identities" not in card["training"]
    assert (summary.images, summary.identities) == (21, 6)
    assert not list((tmp_path / "run").rglob("validation*"))


def test_what_is_wrong_is_found_before_training(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.Trainer, "fit", pytest.fail)
    for override, message in (
        ("validate.identities=9", "validate.identities=9: .* has 5 identities with two images or more"),
        ("validate.sizes=[224]", "validate.sizes: 224 is above the input of the network, 112 pixels"),
        ("validate.choose=worst", "validate.choose must be last or best"),
        ("data.sampling={kind: identities, identities: 3, images: 4}", "set data.batch_size=12"),
        (
            "data.sampling={kind: identities, identities: 6, images: 1}",
            "fewer than data.sampling.identities=6",
        ),
        ("data.sampling.kind=bag", "data.sampling.kind must be one of"),
        ("data.sampling.minimum=9", "0 of 6 identities have at least data.sampling.minimum=9 images"),
        ("trainer.sheet_every=-1", "trainer.sheet_every must be at least 1, or 0 for no sample sheets"),
        ("trainer.wandb={mode: both}", "trainer.wandb.mode must be online or offline; found 'both'"),
    ):
        with pytest.raises(LrfaceError, match=message):
            train(faces, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_sampling_in_a_recipe_sets_the_length_of_an_epoch(faces, tmp_path, monkeypatch):
    seen = SimpleNamespace()
    fit = recipes.Trainer.fit

    def spy(self, stage):
        seen.steps, seen.labels = stage.steps, [batch["label"].tolist() for batch in stage.batches(0, 4)]
        return fit(self, stage)

    monkeypatch.setattr(recipes.Trainer, "fit", spy)
    stages = '[{"name": "only", "method": "classify", "epochs": 2}]'
    common = (f"stages={stages}", "validate=null", "trainer.sheet_every=0")
    train(faces, tmp_path / "a", *common, "data.sampling={kind: identities, identities: 3, images: 2}")
    assert seen.steps == 6
    assert all([len(set(labels)), labels[::2]] == [3, labels[1::2]] for labels in seen.labels)
    train(faces, tmp_path / "b", *common, "data.sampling.maximum=2")
    assert seen.steps == 2  # 5 * 2 + 1 images, one batch an epoch
    with (tmp_path / "b" / "stages" / "1-only" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
