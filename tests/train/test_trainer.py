import copy
import csv
import errno
import json
import os
import random
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lrface.errors import LrfaceError, UsageError
from lrface.methods.base import Method, StepOutput
from lrface.train import checkpoint as checkpoint_module
from lrface.train.checkpoint import checkpoints, load_parts, load_training_state
from lrface.train.observe import Observer
from lrface.train.optimisers import Optimiser, check_param_groups, load_optimiser
from lrface.train.schedule import Schedule
from lrface.train.signals import Interrupted
from lrface.train.trainer import Stage, StageResult, Trainer, resolve_device


class Toy(Method):
    """A method without images: quick, with everything a resume must bring back (dropout, BatchNorm)."""

    needs = ("x", "label")

    def __init__(self, dropout: float = 0.5, hidden: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Dropout(dropout))
        self.head = nn.Linear(hidden, 3)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        logits = self.head(self.encoder(batch["x"]))
        return StepOutput(F.cross_entropy(logits, batch["label"]), {"largest": logits.detach().abs().max()})


class Counting(Toy):
    """With state of its own, as an adversary's optimiser would be."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def prepare(self, batch):
        self.count += 1
        return batch

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(6, 4, generator=generator), "label": torch.arange(6) % 3}


def stream(first: int, last: int):
    for step in range(first, last):
        yield batch(step)


def stage(folder: Path, method: Method | None = None, steps: int = 10, batches=stream, **settings) -> Stage:
    return Stage("toy", method or Toy(), steps, 6, batches, folder, {"card": True}, **settings)


def trainer(**settings) -> Trainer:
    defaults = {"device": "cpu", "precision": "float32", "checkpoint_every": 3, "log_every": 1}
    return Trainer(**{**defaults, "tensorboard": False, "show_progress": False, **settings})


def rows(folder: Path) -> list[tuple[str, ...]]:
    """All of metrics.csv but the speed."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            tuple(value for key, value in row.items() if key != "images_per_second")
            for row in csv.DictReader(file)
        ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(at: int, what):
    """The stream, with ``what`` called instead of the batch of step ``at``."""

    def batches(first: int, last: int):
        for step in range(first, last):
            yield what(step) if step == at else batch(step)

    return batches


def poisoned(step: int) -> dict[str, Any]:
    return {**batch(step), "x": torch.full((6, 4), float("nan"))}


@pytest.fixture
def reference(tmp_path) -> Path:
    """The uninterrupted run."""
    folder = tmp_path / "reference"
    trainer().fit(stage(folder))
    return folder


def assert_same_run(folder: Path, reference: Path) -> None:
    assert rows(folder) == rows(reference) and len(rows(folder)) == 10
    mine, theirs = (load_parts(path / "step-00000010") for path in (folder, reference))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    mine_state, their_state = (load_training_state(path / "step-00000010") for path in (folder, reference))
    assert torch.equal(mine_state.random["cpu"], their_state.random["cpu"])


def test_a_stage_from_start_to_end(tmp_path):
    folder = tmp_path / "stage"
    method = Toy()
    result = trainer().fit(stage(folder, method))
    assert isinstance(result, StageResult)
    assert (result.steps, result.resumed_at, result.checkpoint) == (10, 0, folder / "step-00000010")
    assert result.seconds > 0 and result.images_per_second > 0
    assert set(result.logs) == {"loss", "largest", "learning_rate", "images_per_second"}
    assert names(folder) == ["metrics.csv", "step-00000009", "step-00000010"]
    assert names(folder / "step-00000010") == [
        "model.json",
        "model.safetensors",
        "parts.safetensors",
        "training.pt",
    ]
    saved = load_parts(result.checkpoint)
    assert all(torch.equal(saved[key], value) for key, value in method.state_dict().items())
    assert [row[0] for row in rows(folder)] == [str(step) for step in range(10)]


@pytest.mark.parametrize("keep_last, kept", [(1, [10]), (3, [6, 9, 10]), (9, [3, 6, 9, 10])])
def test_keep_last(tmp_path, keep_last, kept):
    trainer(keep_last=keep_last).fit(stage(tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in kept]


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_the_steps_are_those_of_a_bare_loop(tmp_path, clip_norm):
    method, bare = Toy(dropout=0.0), Toy(dropout=0.0)
    settings = Optimiser(learning_rate=0.2, momentum=0.9, weight_decay=0.1, clip_norm=clip_norm)
    trainer().fit(
        stage(tmp_path, method, optimiser=settings, schedule=Schedule("multistep", (4,), 0.5, warmup_steps=2))
    )

    momenta = {name: torch.zeros_like(value) for name, value in bare.named_parameters()}
    for step in range(10):
        rate = 0.2 * (0.5 if step == 0 else 1.0 if step < 4 else 0.5)
        bare.zero_grad()
        bare(batch(step)).loss.backward()
        norm = torch.cat([value.grad.flatten() for value in bare.parameters()]).norm()
        scale = 1.0 if clip_norm is None else min(1.0, clip_norm / norm.item())
        with torch.no_grad():
            for name, value in bare.named_parameters():
                decay = 0.1 if value.ndim > 1 else 0.0
                momenta[name] = 0.9 * momenta[name] + scale * value.grad + decay * value
                value -= rate * momenta[name]
    for name, value in bare.named_parameters():
        torch.testing.assert_close(dict(method.named_parameters())[name], value, rtol=1e-4, atol=1e-5)
    assert [float(row[-1]) for row in rows(tmp_path)] == pytest.approx([0.1, 0.2, 0.2, 0.2] + [0.1] * 6)


def test_a_resume_is_exact(tmp_path, reference):
    def stop(step):
        raise KeyboardInterrupt

    folder = tmp_path / "stage"
    with pytest.raises(KeyboardInterrupt):
        trainer().fit(stage(folder, batches=failing(8, stop)))
    assert len(rows(folder)) == 8  # two rows of steps that the checkpoint does not know
    torch.manual_seed(12345)  # whatever the new process did before
    result = trainer().fit(stage(folder))
    assert result.resumed_at == 6
    assert_same_run(folder, reference)


def test_a_stage_that_is_complete_is_left_alone(tmp_path):
    trainer().fit(stage(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = trainer().fit(stage(tmp_path, batches=failing(0, pytest.fail)))
    assert (result.resumed_at, result.seconds) == (10, 0.0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, reference):
    folder = tmp_path / "stage"
    with pytest.raises(LrfaceError) as caught:
        trainer().fit(stage(folder, batches=failing(7, poisoned)))
    message = str(caught.value)
    assert "the loss became nan at step 7 of stage 'toy' (learning rate 0.1)" in message
    assert f"the last good checkpoint is {folder / 'step-00000006'}" in message
    assert "optimiser.learning_rate" in message and "--accept-changes" in message
    assert f"--replay {folder / 'failed' / 'step-00000007.pt'}" in message
    parts = load_parts(folder / "step-00000006")
    assert all(bool(torch.isfinite(value).all()) for value in parts.values())
    assert load_training_state(folder / "step-00000006").step == 6
    trainer().fit(stage(folder))
    assert_same_run(folder, reference)


def test_nan_loss_before_the_first_checkpoint(tmp_path):
    method = Toy()
    with pytest.raises(LrfaceError, match="nan at step 1 .*there was no checkpoint yet"):
        trainer().fit(stage(tmp_path, method, batches=failing(1, poisoned)))
    assert names(tmp_path) == ["failed", "metrics.csv"]
    assert all(bool(torch.isfinite(value).all()) for value in method.parameters())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Breaking(Toy):
        def forward(self, batch):
            output = super().forward(batch)
            if batch.get("break"):
                self.head.weight.register_hook(lambda gradient: gradient * float("inf"))
            return output

    with pytest.raises(
        LrfaceError, match="head.weight is not finite after step 5 .*no checkpoint was written"
    ):
        trainer().fit(
            stage(tmp_path, Breaking(), batches=failing(5, lambda step: {**batch(step), "break": True}))
        )
    assert names(tmp_path) == ["metrics.csv", "step-00000003"]


def test_a_missing_key_is_named_at_once(tmp_path):
    def nameless(first, last):
        yield {"x": torch.zeros(6, 4)}

    with pytest.raises(LrfaceError, match=r"method Toy needs \['label'\] in a batch; found \['x'\]"):
        trainer().fit(stage(tmp_path, batches=nameless))


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch, reference):
    folder = tmp_path / "stage"
    real = checkpoint_module.save

    def full(state):
        if "head.weight" in state and (folder / "step-00000003").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(state)

    monkeypatch.setattr(checkpoint_module, "save", full)
    with pytest.raises(LrfaceError, match="cannot write .*step-00000006: the disk is full"):
        trainer().fit(stage(folder))
    assert names(folder) == ["metrics.csv", "step-00000003"]
    assert load_training_state(folder / "step-00000003").step == 3 and load_parts(folder / "step-00000003")
    monkeypatch.setattr(checkpoint_module, "save", real)
    trainer().fit(stage(folder))
    assert_same_run(folder, reference)


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        with pytest.raises(LrfaceError, match="the disk is full"):
            trainer(checkpoint_every=1, keep_last=100).fit(stage(folder / "run", Toy(hidden=3000), steps=50))
        kept = checkpoints(folder / "run")
        assert names(folder / "run") == ["metrics.csv", *(path.name for path in kept)] and kept
        for path in kept:
            assert load_training_state(path).step == int(path.name.removeprefix("step-"))
            assert len(load_parts(path)) == len(Toy().state_dict())
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_what_kills_left_behind_is_removed(tmp_path):
    for name in (".step-00000003.999.tmp", ".step-00000001.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    trainer().fit(stage(tmp_path))
    assert names(tmp_path) == ["metrics.csv", "step-00000009", "step-00000010"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_later(tmp_path, reference, number):
    def kill(step):
        os.kill(os.getpid(), number)
        return batch(step)

    folder = tmp_path / "stage"
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        trainer().fit(stage(folder, batches=failing(4, kill)))
    assert (caught.value.signal, caught.value.step) == (number, 5)
    assert caught.value.checkpoint == folder / "step-00000005" and caught.value.checkpoint.is_dir()
    assert signal.getsignal(number) is handler
    assert trainer().fit(stage(folder)).resumed_at == 5
    assert_same_run(folder, reference)


def test_a_signal_in_the_last_step_is_not_lost(tmp_path):
    def kill(step):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(step)

    with pytest.raises(Interrupted) as caught:
        trainer().fit(stage(tmp_path, batches=failing(9, kill)))
    assert caught.value.step == 10 and caught.value.checkpoint == tmp_path / "step-00000010"


def test_a_warning_and_the_signal_after_it_are_one_request(tmp_path, reference):
    def kill(step):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        return batch(step)

    with pytest.raises(Interrupted) as caught:
        trainer().fit(stage(tmp_path / "run", batches=failing(4, kill)))
    assert (caught.value.signal, caught.value.step, caught.value.exit_code) == (signal.SIGUSR1, 5, 0)
    trainer().fit(stage(tmp_path / "run"))
    assert_same_run(tmp_path / "run", reference)


def test_a_second_signal_stops_at_once(tmp_path):
    def kill(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return batch(step)

    with pytest.raises(KeyboardInterrupt):
        trainer().fit(stage(tmp_path, batches=failing(4, kill)))
    assert names(tmp_path) == ["metrics.csv", "step-00000003"]


def test_training_works_outside_of_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer().fit(stage(tmp_path))))
    thread.start()
    thread.join()
    assert results and results[0].checkpoint.is_dir()


def test_state_of_the_methods_own_is_brought_back(tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer().fit(stage(tmp_path, Counting(), batches=failing(8, stop)))
    method = Counting()
    trainer().fit(stage(tmp_path, method))
    assert method.count == 10


@pytest.mark.parametrize("keep_every, kept", [(4, [4, 8, 10]), (5, [5, 10]), (6, [6, 10])])
def test_keep_every(tmp_path, keep_every, kept):
    trainer(checkpoint_every=3, keep_last=1, keep_every=keep_every).fit(stage(tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}" for step in kept]


class Drawing(Toy):
    """Draws from every generator that a method may use."""

    def prepare(self, batch):
        noise = torch.rand(()) + random.random() + random.gauss(0, 1) + float(np.random.rand())
        return {**batch, "x": batch["x"] + noise}


def test_every_random_generator_is_brought_back(tmp_path):
    def seed(number: int) -> None:
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    def stop(step):
        raise KeyboardInterrupt

    seed(1)
    trainer().fit(stage(tmp_path / "reference", Drawing()))
    seed(1)
    with pytest.raises(KeyboardInterrupt):
        trainer().fit(stage(tmp_path / "run", Drawing(), batches=failing(8, stop)))
    seed(2)
    assert trainer().fit(stage(tmp_path / "run", Drawing())).resumed_at == 6
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def test_a_checkpoint_without_the_newer_fields_is_read(tmp_path, reference):
    def stop(step):
        raise KeyboardInterrupt

    folder = tmp_path / "stage"
    with pytest.raises(KeyboardInterrupt):
        trainer().fit(stage(folder, batches=failing(8, stop)))
    path = folder / "step-00000006" / "training.pt"
    state = torch.load(path, weights_only=True)
    old = {key: state[key] for key in ("step", "optimiser", "extra")}
    torch.save({**old, "random": {"cpu": state["random"]["cpu"]}}, path)
    trainer().fit(stage(folder))
    assert_same_run(folder, reference)


class Plain(Method):
    """Every image counts by itself: no BatchNorm, no dropout."""

    needs = ("x", "label")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.PReLU(8))
        self.head = nn.Linear(8, 3)
        self.sizes: list[int] = []

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        self.sizes.append(len(batch["x"]))
        logits = self.head(self.encoder(batch["x"]))
        return StepOutput(F.cross_entropy(logits, batch["label"]), {"mean": logits.detach().mean()})


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path, clip_norm):
    settings = {"optimiser": Optimiser(learning_rate=0.2, clip_norm=clip_norm)}
    whole, parts = Plain(), Plain()
    expected = trainer().fit(stage(tmp_path / "whole", whole, **settings))
    found = trainer().fit(stage(tmp_path / "parts", parts, accumulate=3, **settings))
    assert whole.sizes == [6] * 10 and parts.sizes == [2] * 30
    for mine, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for key in ("loss", "mean"):
        assert found.logs[key] == pytest.approx(expected.logs[key], rel=1e-4)


def test_a_batch_that_cannot_be_split_is_named(tmp_path):
    class Contrastive(Toy):
        accumulable = False

    for method, accumulate, message in (
        (Toy(), 0, "stage 'toy': accumulate must divide the batch of 6 into equal parts"),
        (Toy(), 4, "accumulate must divide the batch of 6 into equal parts of at least 2 images; found 4"),
        (Toy(), 6, "equal parts of at least 2 images; found 6"),
        (
            Contrastive(),
            2,
            "method Contrastive cannot take a batch in parts .*compares the images of a batch",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            stage(tmp_path, method, accumulate=accumulate)
    stage(tmp_path, Contrastive(), accumulate=1)
    with pytest.raises(
        UsageError, match="stage 'toy': ema must be from 0 to below 1, or null for none; found 1"
    ):
        stage(tmp_path, ema=1.0)


def test_averaged_weights_are_what_is_saved_and_a_resume_is_exact(tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    method = Toy()
    average = {key: value.clone() for key, value in method.state_dict().items()}
    shown = []

    class Watching(Observer):
        def after_step(self, step, method):
            shown.append(method.encoder[0].weight.clone())
            return False

    class Following(Toy):
        """Averages by the formula, when a step is over: at the start of the next one."""

        def prepare(self, batch):
            if self.steps:
                self.take_in()
            self.steps += 1
            return batch

        steps = 0

        def take_in(self):
            decay = min(0.8, self.steps / (9 + self.steps))
            for key, value in self.state_dict().items():
                average[key] = (
                    value if value.dtype == torch.int64 else average[key] * decay + value * (1 - decay)
                )

    method = Following()
    folder = tmp_path / "reference"
    result = trainer().fit(stage(folder, method, ema=0.8, observer=Watching()))
    method.take_in()
    saved = load_parts(result.checkpoint)
    for key, value in average.items():
        torch.testing.assert_close(saved[key], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(shown[-1], saved["encoder.0.weight"])
    card = json.loads((result.checkpoint / "model.json").read_text())
    assert card["weights"] == "exponential moving average of the trained ones, decay 0.8"
    assert all(
        torch.equal(value, load_training_state(result.checkpoint).weights[key])
        for key, value in method.state_dict().items()
    )
    with pytest.raises(KeyboardInterrupt):
        trainer().fit(stage(tmp_path / "run", ema=0.8, batches=failing(8, stop)))
    torch.manual_seed(99)
    trainer().fit(stage(tmp_path / "run", ema=0.8))
    assert_same_run(tmp_path / "run", folder)
    mine, theirs = (
        load_training_state(path / "step-00000010").weights for path in (tmp_path / "run", folder)
    )
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def half_precision(scale: float) -> Trainer:
    """A trainer in float16 on the CPU, which only a test wants: the same scaler as on a GPU."""
    from lightning_fabric.plugins import MixedPrecision

    made = trainer()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    made.fabric.strategy.precision = MixedPrecision("16-mixed", "cpu", scaler)
    made.precision = "float16"
    return made


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_float16_scales_gradients_and_brings_the_scale_back(tmp_path, clip_norm):
    def stop(step):
        raise KeyboardInterrupt

    settings = {"optimiser": Optimiser(learning_rate=0.2, clip_norm=clip_norm)}
    method = Toy(dropout=0.0)
    made = half_precision(2.0**30)  # the first gradients overflow: their steps are left out, the scale falls
    made.fit(stage(tmp_path / "reference", method, **settings))
    scaler = made.fabric.strategy.precision.scaler
    assert 0 < scaler.get_scale() < 2.0**30
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in method.parameters())
    with pytest.raises(KeyboardInterrupt):
        half_precision(2.0**30).fit(
            stage(tmp_path / "run", Toy(dropout=0.0), batches=failing(8, stop), **settings)
        )
    again = half_precision(4.0)
    again.fit(stage(tmp_path / "run", Toy(dropout=0.0), **settings))
    assert again.fabric.strategy.precision.scaler.state_dict() == scaler.state_dict()
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def test_float16_trains_as_float32_does(tmp_path):
    half, exact = Plain(), Plain()
    half_precision(1024.0).fit(stage(tmp_path / "half", half, optimiser=Optimiser(clip_norm=0.5)))
    trainer().fit(stage(tmp_path / "exact", exact, optimiser=Optimiser(clip_norm=0.5)))
    for mine, theirs in zip(half.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.02, atol=0.01)


def test_bfloat16_keeps_float32_weights(tmp_path):
    method = Toy()
    result = trainer(precision="bfloat16").fit(stage(tmp_path, method))
    assert all(value.dtype == torch.float32 for value in method.parameters())
    exact = trainer().fit(stage(tmp_path / "exact"))
    assert result.logs["loss"] != exact.logs["loss"]
    assert result.logs["loss"] == pytest.approx(exact.logs["loss"], rel=0.2)


def test_rows_are_written_every_log_every_steps_and_at_the_end(tmp_path):
    trainer(log_every=4).fit(stage(tmp_path))
    assert [row[0] for row in rows(tmp_path)] == ["0", "4", "8", "9"]


def test_param_groups_must_be_what_is_trainable(tmp_path):
    class Forgetting(Toy):
        def param_groups(self):
            return [{"params": list(self.encoder.parameters())}]

    class Freezing(Toy):
        def param_groups(self):
            groups = super().param_groups()
            self.head.bias.requires_grad_(False)
            return groups

    class Doubling(Toy):
        def param_groups(self):
            return super().param_groups() + [{"params": [self.head.bias]}]

    for kind, message in (
        (Forgetting, "Forgetting.param_groups.. leaves out the trainable parameter head.weight"),
        (Freezing, "Freezing.param_groups.. holds the frozen parameter head.bias"),
        (Doubling, "Doubling.param_groups.. lists a parameter twice"),
    ):
        method = kind()
        with pytest.raises(LrfaceError, match=message):
            check_param_groups(method, method.param_groups())
        with pytest.raises(LrfaceError, match=message):
            trainer().fit(stage(tmp_path / kind.__name__, kind()))
    method = Toy()
    check_param_groups(method, method.param_groups())


def test_momentum_is_brought_back_but_settings_are_the_recipes():
    def trained(**settings):
        method = Toy(dropout=0.0)
        optimiser = torch.optim.SGD(method.param_groups(), lr=0.1, **settings)
        method(batch(0)).loss.backward()
        optimiser.step()
        return method, optimiser

    _, old = trained(momentum=0.9, weight_decay=0.1)
    saved = copy.deepcopy(old.state_dict())
    _, new = trained(momentum=0.5, weight_decay=0.2)
    load_optimiser(new, saved, None)
    assert [group["momentum"] for group in new.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in new.param_groups] == [0.2, 0.0]
    for number, entry in saved["state"].items():
        assert torch.equal(new.state_dict()["state"][number]["momentum_buffer"], entry["momentum_buffer"])
    method = Toy()
    method.head.requires_grad_(False)
    other = torch.optim.SGD(method.param_groups(), lr=0.1)
    with pytest.raises(LrfaceError, match="written with other parameters trained or frozen; .*--restart"):
        load_optimiser(other, saved, Path("step-00000003"))


def test_adamw_is_torchs_and_resumes_exactly(tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    settings = {"optimiser": Optimiser("adamw", learning_rate=0.01, weight_decay=0.1)}
    method, bare = Toy(dropout=0.0), Toy(dropout=0.0)
    trainer().fit(stage(tmp_path / "whole", method, **settings))
    theirs = torch.optim.AdamW(bare.param_groups(), lr=0.01, weight_decay=0.1, fused=True)
    for step in range(10):
        theirs.zero_grad()
        bare(batch(step)).loss.backward()
        for group in theirs.param_groups:
            group["lr"] = 0.01
        theirs.step()
    for mine, value in zip(method.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(mine, value)
    with pytest.raises(KeyboardInterrupt):
        trainer().fit(stage(tmp_path / "run", Toy(dropout=0.0), batches=failing(8, stop), **settings))
    trainer().fit(stage(tmp_path / "run", Toy(dropout=0.0), **settings))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(LrfaceError, match="was written with optimiser adamw, the recipe now says sgd"):
        trainer().fit(stage(tmp_path / "run", Toy(dropout=0.0), steps=20))


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    trainer().fit(stage(tmp_path))
    with pytest.raises(
        LrfaceError, match="checkpoint .*step-00000010 is of another architecture: .*encoder.0.weight"
    ):
        trainer().fit(stage(tmp_path, Toy(hidden=9), steps=20))


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu" and resolve_device("cpu") == "cpu"
    with pytest.raises(
        UsageError,
        match=r"--device \(trainer.device of a recipe\) is cuda but PyTorch finds no GPU here; set it to cpu or auto",
    ):
        resolve_device("cuda")
    with pytest.raises(
        UsageError, match=r"--device \(trainer.device of a recipe\) must be auto, cpu or cuda; found 'gpu'"
    ):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"precision": "half"}, "trainer.precision must be one of bfloat16, float16, float32; found 'half'"),
        (
            {"precision": "float16"},
            "float16 needs a GPU and this run is on cpu; set trainer.precision=bfloat16",
        ),
        ({"keep_every": 0}, "trainer.keep_every must be at least 1; found 0"),
        ({"checkpoint_every": 0}, "trainer.checkpoint_every must be at least 1; found 0"),
        ({"keep_last": 0}, "trainer.keep_last must be at least 1"),
        ({"log_every": 0}, "trainer.log_every must be at least 1"),
        ({"threads": 0}, "trainer.threads must be at least 1"),
    ],
)
def test_wrong_trainer_settings_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        trainer(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "rmsprop"}, "optimiser.name must be sgd, adam or adamw; found 'rmsprop'"),
        ({"learning_rate": -0.1}, "optimiser.learning_rate must be a number of at least 0; found -0.1"),
        (
            {"learning_rate": float("nan")},
            "optimiser.learning_rate must be a number of at least 0; found nan",
        ),
        ({"momentum": -1.0}, "optimiser.momentum must be"),
        ({"weight_decay": -1.0}, "optimiser.weight_decay must be"),
        ({"clip_norm": 0.0}, "optimiser.clip_norm must be above 0"),
        ({"nesterov": True, "momentum": 0.0}, "optimiser.nesterov needs optimiser.momentum above 0"),
    ],
)
def test_wrong_optimiser_settings_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        Optimiser(**settings)
