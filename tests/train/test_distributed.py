"""Two ranks against one process. What two ranks do is in in_ranks.py, and done once for all tests here."""

import copy
import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import in_ranks
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from lrface.cli import app
from lrface.errors import UsageError
from lrface.models import build_backbone
from lrface.train import distributed
from lrface.train.launch import launch

PATIENCE = 900  # seconds that a process may take: a busy machine is no failure
RECIPE = {
    "name": "tiny",
    "data": {"synthetic": {"identities": 8, "images_per_identity": 3}, "batch_size": 4, "cache": True},
    "backbone": {"name": "ir18", "width": 4, "embedding_size": 8},
    "head": {"name": "partial", "of": "cosface", "sample_share": 0.5},
    "trainer": {
        "device": "cpu",
        "devices": 2,
        "checkpoint_every": 5,
        "log_every": 1,
        "tensorboard": False,
        "sheet_every": 0,
    },
    "stages": [
        {"name": "one", "method": "classify", "steps": 100_000, "optimiser": {"learning_rate": 0.001}}
    ],
}


def in_two_ranks(place: Path, visit: str) -> dict:
    said: list[str] = []
    command = [sys.executable, str(Path(__file__).with_name("in_ranks.py")), str(place), visit]
    assert launch(command, 2, 1, said.append) == 0, said
    return torch.load(place / f"{visit}.pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(place: Path) -> dict:
    """What two ranks came to."""
    return in_two_ranks(place, "first")


@pytest.fixture(scope="module")
def one(place: Path) -> dict:
    """What one process comes to; the threads of a test run would round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield in_ranks.measure(place / "one")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", in_ranks.CASES)
def test_two_ranks_have_the_gradients_and_take_the_step_of_one_process(one, two, case):
    found, wanted = two[case], one[case]
    assert set(found) == set(wanted)
    assert sum(key.startswith("gradient") for key in wanted) > 20
    largest = max(float(value.abs().max()) for key, value in wanted.items() if key.startswith("gradient"))
    assert largest > 0.1
    for key, value in wanted.items():
        # Loss and logs are told in single precision.
        tolerance = 1e-9 if key.startswith(("gradient", "after")) else 1e-6
        torch.testing.assert_close(
            found[key], value, rtol=tolerance, atol=tolerance * 1e-2, msg=f"{case}: {key}"
        )


def test_bfloat16_runs_over_ranks(one, two):
    assert two["bfloat16"] == pytest.approx(one["bfloat16"], rel=0.05)


def test_what_fails_on_rank_0_is_told_to_the_others(two):
    assert two["told"][0].startswith("ZeroDivisionError")
    assert two["told"][1].startswith("RankFailed: rank 1 stopped because rank 0 failed: integer division")


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_at_the_same_step(two, place):
    assert all("the loss became nan at step 3" in said for said in two["poisoned"]), two["poisoned"]
    stage = place / "poisoned"
    assert sorted(path.name for path in stage.glob("step-*")) == ["step-00000002"]
    for rank, folder in enumerate((stage, stage / "rank-1")):
        batch = torch.load(folder / "failed" / "step-00000003.pt")["batch"]
        assert bool(batch["x"].isnan().any()) == (rank == 1)


def test_ranks_agree(two):
    assert two["agreed"] == (1, 0)
    assert distributed.largest(3, 0) == (3, 0) and distributed.from_first("x") == "x"


def same(found: Path, wanted: Path, tolerance: float) -> None:
    one, other = in_ranks.weights(found), in_ranks.weights(wanted)
    assert set(one) == set(other) and "head.weight" in one
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=tolerance, atol=tolerance, msg=key)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_resume_with_as_many_ranks_is_exact(two, place):
    """With dropout, a sample of the classes and AdamW: every generator and every row must come back."""
    same(place / "dropout_resumed", place / "dropout", 0.0)
    losses = [row["loss"] for row in rows(place / "dropout_resumed")]
    assert len(losses) == in_ranks.STEPS and losses == [row["loss"] for row in rows(place / "dropout")]


def test_a_run_goes_on_with_one_rank_and_with_two_again(two, place):
    in_ranks.toy(place / "changing", stop=4)
    in_two_ranks(place, "second")
    in_ranks.toy(place / "alone")
    same(place / "changing", place / "straight", 1e-5)
    same(place / "changing", place / "alone", 1e-5)
    changed, straight = rows(place / "changing"), rows(place / "straight")
    assert [row["step"] for row in changed] == [str(step) for step in range(in_ranks.STEPS)]
    for row, wanted in zip(changed, straight, strict=True):
        assert row["learning_rate"] == wanted["learning_rate"]
        assert float(row["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-5)


def test_one_process_has_no_process_group(tmp_path):
    class Looking(in_ranks.Toy):
        def forward(self, batch):
            assert not torch.distributed.is_initialized()
            return super().forward(batch)

    with distributed.process_group(1, 1, "cpu", 60) as found:
        assert found.ranks == 1
        trainer = in_ranks.trainer()
        stage = in_ranks.Stage(
            "toy", Looking(0.0, 1.0), 2, in_ranks.BATCH, in_ranks.toy_batches(), tmp_path, in_ranks.CARD
        )
        trainer.fit(stage)
        assert trainer.fabric.world_size == 1
        assert type(trainer.fabric.strategy).__name__ == "SingleDeviceStrategy"
    assert type(stage.method.encoder[1]) is nn.BatchNorm1d


def test_ranks_that_nobody_started_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="start it with `lrface train`, torchrun or srun"):
        with distributed.process_group(2, 1, "cpu", 60):
            pass
    with pytest.raises(UsageError, match="trainer.strategy must be one of auto, ddp, fsdp; found 'dpp'"):
        in_ranks.trainer(strategy="dpp")


def test_synchronised_batchnorm_keeps_names_and_leaves_frozen_statistics():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(2, 3, 5, 5)
    wanted = network(images)
    distributed.synchronise_batchnorm(network, "cpu")
    assert isinstance(network[1], distributed.SynchronisedBatchNorm) and not network[1].training
    assert torch.equal(network(images), wanted)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_an_irevnet_that_computes_again_counts_no_batch_twice_under_synchronised_batchnorm():
    torch.manual_seed(0)
    arguments = {"blocks": [1, 1], "strides": [1, 2], "channels": [4, 16], "input_size": 8}
    plain = build_backbone("irevnet", **arguments)
    spread = copy.deepcopy(plain)
    images = torch.rand(4, 3, 8, 8)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed.synchronise_batchnorm(spread, "cpu")
        for network in (plain, spread):
            network.train()(images).square().sum().backward()
            with torch.no_grad():
                network.inverse(network.features(images))
    finally:
        torch.distributed.destroy_process_group()
    found, wanted = dict(spread.named_buffers()), dict(plain.named_buffers())
    assert {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")} == {1, 2}
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])
    for mine, other in zip(spread.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_a_gradient_is_clipped_as_pytorch_does():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    others = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    for parameter, other in zip(parameters[:2], others[:2], strict=True):
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()
    parameters[1].sharded = True
    distributed.clip_gradients(parameters, 0.5)
    torch.nn.utils.clip_grad_norm_(others[:2], 0.5)
    for parameter, other in zip(parameters[:2], others[:2], strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_a_batch_that_two_ranks_cannot_share_is_wrong_usage(recipe):
    result = CliRunner().invoke(app, ["train", str(recipe), "data.batch_size=5"])
    assert result.exit_code == 2
    assert "data.batch_size=5 is the batch of all 2 ranks" in result.output


def start(recipe: Path, *arguments: str, command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`lrface train` of the recipe in a process of its own."""
    command = command or (sys.executable, "-m", "lrface.cli")
    return subprocess.Popen(
        [*command, "train", str(recipe), f"out={recipe.parent / 'run'}", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(recipe: Path) -> int:
    metrics = recipe.parent / "run" / "stages" / "1-one" / "metrics.csv"
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0


def wait_for_steps(process: subprocess.Popen[str], recipe: Path, steps: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while steps_of(recipe) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(process: subprocess.Popen[str]) -> dict[int, int]:
    """The processes of the ranks, by rank."""
    found = {}
    for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        environ = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        rank = next(entry for entry in environ if entry.startswith(b"RANK="))
        found[int(rank.removeprefix(b"RANK="))] = int(number)
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the ranks are found in /proc")
def test_a_run_stops_together_goes_on_and_ends_with_a_dead_rank(recipe):
    process = start(recipe)
    wait_for_steps(process, recipe, 3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    match = re.search(
        r"stopped after step (\d+), saved .*step-(\d+); the same command goes on from there", said
    )
    assert match is not None and said.count("stopped after step") == 1
    reached = int(match[1])
    assert int(match[2]) == reached == steps_of(recipe)

    process = start(recipe)
    wait_for_steps(process, recipe, reached + 2)
    os.kill(children(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.monotonic() - killed < 60
    assert f"resumes from {recipe.parent / 'run'}" in said
    assert "rank 1 of 2" in said and "was killed by SIGKILL" in said
    assert "rank 0 lost contact with the other ranks" in said and "Traceback" not in said


@pytest.mark.slow
def test_torchrun_starts_the_ranks(recipe):
    command = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "lrface.cli",
    )
    process = start(recipe, "trainer.devices=1", "stages.one.steps=4", command=command)
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    assert said.count("model: ") == 1 and steps_of(recipe) == 4
    # What one process reads and goes on with.
    process = start(recipe, "trainer.devices=1", "stages.one.steps=6", "--accept-changes")
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0 and "step-00000004" in said and steps_of(recipe) == 6, said
