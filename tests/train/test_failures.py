import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lrface.errors import LrfaceError
from lrface.methods.base import Method, StepOutput
from lrface.train.checkpoint import checkpoints
from lrface.train.failures import is_out_of_memory, largest_that_fits, load_failed
from lrface.train.optimisers import Optimiser
from lrface.train.profile import PHASES, count_flops, profile_stage
from lrface.train.trainer import Stage, Trainer

SIZE = 64


class Hungry(Method):
    """Runs out of memory with more than ``limit`` images at once."""

    needs = ("x", "label")

    def __init__(self, limit: int = SIZE, error: Any = torch.OutOfMemoryError):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 3)
        self.limit, self.error = limit, error
        self.tried: list[int] = []

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        self.tried.append(len(batch["x"]))
        if len(batch["x"]) > self.limit:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the manual.")
        return StepOutput(F.cross_entropy(self.head(self.encoder(batch["x"])), batch["label"]))


def batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(SIZE, 4, generator=generator), "label": torch.arange(SIZE) % 3, "seed": step}


def stream(first: int, last: int):
    for step in range(first, last):
        yield batch(step)


def poisoned(first: int, last: int):
    for step in range(first, last):
        made = batch(step)
        if step == 7:
            made["x"][3, 1] = float("inf")
        yield made


def stage(folder: Path, method: Method, steps: int = 10, batches=stream, **settings) -> Stage:
    return Stage("toy", method, steps, SIZE, batches, folder, {}, **settings)


def trainer(**settings) -> Trainer:
    defaults = {"device": "cpu", "precision": "float32", "checkpoint_every": 3, "log_every": 1}
    return Trainer(**{**defaults, "tensorboard": False, "show_progress": False, **settings})


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_batch_that_failed_is_saved_with_what_it_met(tmp_path, name, log_every):
    """On a GPU the loss is read every log_every steps: the weights must stop at the bad step all the same."""
    settings = {"optimiser": Optimiser(name, learning_rate=0.01)}
    before = Hungry()
    trainer().fit(stage(tmp_path / "before", before, steps=7, **settings))
    made = trainer(log_every=log_every, checkpoint_every=100)
    if log_every > 1:
        made.device = "cuda"  # all that this changes in the loop is how often the loss is read
    with pytest.raises(LrfaceError) as caught:
        made.fit(stage(tmp_path / "run", Hungry(), batches=poisoned, **settings))
    path = tmp_path / "run" / "failed" / "step-00000007.pt"
    message = str(caught.value)
    assert "the loss became nan at step 7 of stage 'toy'" in message and f"--replay {path}`" in message
    assert "there was no checkpoint yet" in message and checkpoints(tmp_path / "run") == []
    content = load_failed(path)
    assert (content["stage"], content["step"], content["batch"]["seed"]) == ("toy", 7, 7)
    assert content["batch"]["x"][3, 1] == float("inf")
    for key, value in before.named_parameters():
        assert torch.equal(content["weights"][key], value)

    found = trainer().replay(Hungry(), path)
    assert found.inputs == ["x"] and found.modules[0] == "encoder.0" and found.loss != found.loss
    assert "encoder.0.weight" in found.gradients
    text = str(found)
    assert "stage toy, step 7: loss nan" in text and "not finite already in the batch: x" in text
    assert "first outputs that are not finite: encoder.0, encoder.1" in text


def test_a_replay_is_the_step_as_it_was(tmp_path):
    """The same dropout, the same weights: the same loss, which here is a huge number and no NaN."""

    class Exploding(Hungry):
        def forward(self, batch):
            output = super().forward(batch)
            self.last = output.loss.detach().clone()
            return StepOutput(output.loss * (float("inf") if batch["seed"] == 4 else 1.0))

    method = Exploding()
    with pytest.raises(LrfaceError, match="the loss became inf at step 4"):
        trainer().fit(stage(tmp_path, method))
    again = Exploding()
    torch.manual_seed(5)
    found = trainer().replay(again, tmp_path / "failed" / "step-00000004.pt")
    assert torch.equal(again.last, method.last)
    assert found.inputs == [] and found.modules == [] and found.loss == float("inf")


def test_files_that_hold_no_failed_batch_are_named(tmp_path):
    with pytest.raises(LrfaceError, match="nowhere.pt does not exist"):
        load_failed(tmp_path / "nowhere.pt")
    (tmp_path / "broken.pt").write_bytes(b"half")
    with pytest.raises(LrfaceError, match="broken.pt cannot be read"):
        load_failed(tmp_path / "broken.pt")
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(LrfaceError, match="other.pt is no batch that `lrface train` saved"):
        load_failed(tmp_path / "other.pt")


def cpu_allocator(_: str) -> RuntimeError:
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, cpu_allocator, MemoryError])
def test_out_of_memory_names_a_batch_that_fits(tmp_path, error):
    method = Hungry(limit=25, error=error)
    with pytest.raises(LrfaceError) as caught:
        trainer().fit(stage(tmp_path, method))
    message = str(caught.value)
    assert "out of memory at step 0 of stage 'toy' with a batch of 64 images (" in message
    assert "A batch of 24 images fits: set data.batch_size=24" in message
    assert "or accumulate=4 of this stage for the same batch in parts of 16" in message
    assert "trainer.checkpoint_activations=true" in message and "See the manual" not in message
    assert method.tried == [64, 32, 16, 24, 28, 26]


def test_out_of_memory_with_a_batch_in_parts(tmp_path):
    method = Hungry(limit=10)
    with pytest.raises(LrfaceError) as caught:
        trainer().fit(stage(tmp_path, method, accumulate=2))
    message = str(caught.value)
    assert "with a batch of 64 images in 2 parts" in message
    assert "A batch of 10 images fits" in message and "accumulate=8 of this stage" in message


def test_out_of_memory_where_nothing_fits_or_parts_are_refused(tmp_path):
    class Contrastive(Hungry):
        accumulable = False

    with pytest.raises(LrfaceError, match="Not even 2 images fit: trainer.checkpoint_activations=true"):
        trainer().fit(stage(tmp_path, Hungry(limit=1)))
    with pytest.raises(LrfaceError, match="A batch of 32 images fits") as caught:
        trainer().fit(stage(tmp_path, Contrastive(limit=33)))
    assert "accumulate" not in str(caught.value)


def test_out_of_memory_later_keeps_the_checkpoints(tmp_path):
    class Growing(Hungry):
        def forward(self, batch):
            self.limit = SIZE if batch["seed"] < 7 else 20
            return super().forward(batch)

    with pytest.raises(LrfaceError, match="out of memory at step 7"):
        trainer().fit(stage(tmp_path, Growing()))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]
    result = trainer().fit(stage(tmp_path, Hungry()))
    assert result.resumed_at == 6


def test_other_errors_stay_what_they_are(tmp_path):
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(ValueError, match="CUDA out of memory"):
        trainer().fit(stage(tmp_path, Hungry(limit=3, error=ValueError)))


@pytest.mark.parametrize("limit, found", [(63, 60), (40, 40), (33, 32), (9, 9), (2, 2), (1, None)])
def test_the_largest_that_fits(limit, found):
    def attempt(number: int) -> None:
        if number > limit:
            raise MemoryError

    assert largest_that_fits(attempt, 64) == found


def test_a_profile_reads_phases_and_leaves_no_checkpoint(tmp_path):
    method = Hungry()
    trace = tmp_path / "profile" / "toy.json"
    reading = profile_stage(trainer(), stage(tmp_path / "stage", method, accumulate=2), trace)
    assert not (tmp_path / "stage").exists()
    assert set(reading.milliseconds) == set(PHASES) and all(
        value > 0 for value in reading.milliseconds.values()
    )
    assert reading.images_per_second == pytest.approx(SIZE / reading.step_milliseconds * 1e3)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(PHASES) <= names
    # 4 x 8 and 8 x 3 weights: two operations each, forward, and again for the gradients of weights and of what
    # enters, which the first layer's images need not.
    assert reading.flops_per_image == 2 * (2 * 4 * 8 + 3 * 8 * 3)
    assert reading.utilisation == pytest.approx(
        reading.flops_per_image * reading.images_per_second / reading.peak_flops
    )
    assert reading.memory_bytes > 2**20 and reading.gpu_idle is None
    text = str(reading)
    assert len(text.splitlines()) < 24 and "data" in text and "optimiser" in text and str(trace) in text


def test_flops_of_a_convolution(tmp_path):
    class Convolution(Method):
        needs = ("x", "label")

        def __init__(self):
            super().__init__()
            self.encoder = nn.Conv2d(3, 5, 3, bias=False)

        def forward(self, batch):
            return StepOutput(self.encoder(batch["x"]).mean())

    made = trainer()
    take = made.ready(stage(tmp_path, Convolution())).take
    images = torch.rand(SIZE, 3, 10, 10)
    forward = 2 * 8 * 8 * 5 * 3 * 9  # 8 x 8 places, 5 filters of 3 x 3 x 3
    assert count_flops(take, {"x": images, "label": torch.zeros(SIZE)}, SIZE) == 2 * forward
