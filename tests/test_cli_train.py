"""`lrface train` and `lrface recipes` as a user runs them: processes, kills, exit codes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from lrface.cli import app

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20
PATIENCE = 1200  # seconds that a process may take: a busy machine is no failure
RECIPE = {
    "name": "tiny",
    "data": {"path": "faces", "batch_size": 8},
    # Dropout is on: the random generators must come back too.
    "backbone": {"name": "ir18", "width": 8, "embedding_size": 16},
    "decoder": {"name": "subpixel", "width": 16, "blocks": 0},
    "trainer": {
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
        "checkpoint_every": 4,
        "log_every": 1,
        "tensorboard": False,
    },
    "stages": [
        {
            "name": "one",
            "method": {"name": "qualnet", "clip": False},
            "degrade": {"clean_share": 1.0},
            "steps": STEPS,
            "schedule": {"kind": "cosine", "warmup_steps": 2},
        },
        {
            "name": "two",
            "method": {"name": "qualnet", "freeze": ["decoder", "batchnorm"]},
            "load": ["encoder", "head", "decoder"],
            "steps": STEPS,
            "optimiser": {"learning_rate": 0.05},
        },
    ],
}
STAGES = ("1-one", "2-two")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with 40 crops of 5 identities and a recipe."""
    root = tmp_path_factory.mktemp("train")
    for number in range(40):
        folder = root / "faces" / f"person {number // 8}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3)).astype(np.uint8)
        assert cv2.imwrite(str(folder / f"{number}.png"), cv2.resize(coarse, (112, 112)))
    (root / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return root


def start(workplace: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lrface.cli", "train", "tiny.yaml", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=workplace, env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


def steps_of(path: Path) -> int:
    return path.read_text().count("\n") - 1 if path.exists() else 0


def wait_for_step(process: subprocess.Popen, metrics: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while steps_of(metrics) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def losses(run: Path, stage: str) -> list[tuple[str, str, str]]:
    with (run / "stages" / stage / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader(file)]


def weights(run: Path) -> str:
    return json.loads((run / "model.json").read_text())["weights_sha256"]


@pytest.fixture(scope="module")
def reference(workplace) -> Path:
    """The run that nobody interrupts."""
    output = finish(start(workplace, "out=reference"))
    assert output == "model: reference/model.safetensors\n"
    return workplace / "reference"


def assert_same_run(run: Path, reference: Path) -> None:
    for stage in STAGES:
        expected = losses(reference, stage)
        assert [step for step, _, _ in expected] == [str(step) for step in range(STEPS)]
        assert len({loss for _, loss, _ in expected}) == STEPS
        assert losses(run, stage) == expected
    assert weights(run) == weights(reference)
    assert [path.name for path in run.rglob(".*") if path.name != ".lock"] == []  # nothing half-written


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_moment_resumes_to_the_same_losses(workplace, reference, stage):
    run = workplace / f"killed-{stage}"
    process = start(workplace, f"out={run.name}")
    wait_for_step(process, run / "stages" / stage / "metrics.csv", 7)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "model.safetensors").exists()
    assert 7 <= steps_of(run / "stages" / stage / "metrics.csv") < STEPS
    process = start(workplace, f"out={run.name}", "--json")
    summary = json.loads(finish(process))
    resumed = [entry["resumed_at"] for entry in summary["stages"]]
    assert 4 <= resumed[STAGES.index(stage)] < STEPS and resumed[STAGES.index(stage)] % 4 == 0
    if stage == "2-two":
        assert resumed[0] == STEPS
    assert_same_run(run, reference)


def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(workplace, reference):
    run = workplace / "stopped"
    process = start(workplace, f"out={run.name}")
    wait_for_step(process, run / "stages" / "1-one" / "metrics.csv", 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    # Pre-emption by a scheduler is no failure.
    assert process.returncode == 0, errors
    done = steps_of(run / "stages" / "1-one" / "metrics.csv")
    assert f"stopped after step {done}, saved " in errors and "the same command goes on from there" in errors
    assert (run / "stages" / "1-one" / f"step-{done:08d}").is_dir()
    errors = start(workplace, f"out={run.name}").communicate(timeout=PATIENCE)[1]
    assert f"stage one: resumes from {run.name}/stages/1-one/step-{done:08d}" in errors
    assert_same_run(run, reference)


def test_a_batch_that_failed_is_run_again(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    hot = ("stages.0.optimiser.learning_rate=1e30", "stages.0.schedule.warmup_steps=0", "out=hot")
    result = cli("train", "tiny.yaml", *hot)
    assert result.exit_code == 1 and "error: the loss became " in result.stderr
    path = result.stderr.partition("--replay ")[2].partition("`")[0]
    assert path.startswith("hot/stages/1-one/failed/step-") and Path(path).is_file()
    again = cli("train", "tiny.yaml", *hot, "--replay", path)
    assert again.exit_code == 0, again.stderr
    assert again.stdout.startswith("stage one, step ") and "first outputs that are not finite" in again.stdout
    found = json.loads(cli("train", "tiny.yaml", *hot, "--replay", path, "--json").stdout)
    assert found["stage"] == "one" and (found["modules"] or found["gradients"])
    other = cli("train", "tiny.yaml", "stages.0.name=first", "--replay", path)
    assert other.exit_code == 1 and "is of stage 'one', which recipe tiny does not have" in other.stderr


def test_a_profile_leaves_nothing_but_its_trace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    result = cli("train", "tiny.yaml", "out=profiled", "--profile")
    assert result.exit_code == 0, result.stderr
    for words in (
        "images/s",
        "data",
        "prepare",
        "forward",
        "backward",
        "optimiser",
        "GFLOP an image",
        "peak: ",
    ):
        assert words in result.stdout
    files = [path for path in (workplace / "profiled").rglob("*") if path.is_file()]
    assert files == [workplace / "profiled" / "profile" / "one.json"]
    assert json.loads(files[0].read_text())["traceEvents"]
    # The place is still free for the run itself.
    assert cli("train", "tiny.yaml", "out=profiled", "stages.0.steps=1", "stages.1.steps=1").exit_code == 0


def test_training_needs_no_optional_package(workplace):
    """A GPU machine often has PyTorch and little else."""
    code = """
import sys
import lrface, lrface.cli
assert "torch" not in sys.modules, "lrface --help must not wait for PyTorch"
absent = ["facenet_pytorch", "insightface", "bcolz", "sklearn", "onnxruntime", "matplotlib"]
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
for name in absent:
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can still be imported: this test tests nothing")
from lrface import recipes
recipe = recipes.load_recipe("tiny.yaml", ["out=bare", "stages.0.steps=1", "stages.1.steps=1"])
recipes.run_recipe(recipe, show_progress=False)
print([name for name in absent if name in sys.modules])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert (workplace / "bare" / "model.safetensors").exists()


def cli(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_wrong_usage_exits_with_2_and_no_traceback(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    for arguments, message in (
        (["celeba300/naiv"], "did you mean 'celeba300/naive'"),
        (
            ["tiny.yaml", "data.batchsize=3"],
            "tiny.yaml: unknown key data.batchsize (did you mean 'batch_size'?)",
        ),
        (["tiny.yaml", "backbone.widht=3", "out=never"], "unknown key backbone.widht"),
        (["tiny.yaml", "seed"], "an override is key=value"),
        (["tiny.yaml", "stages.one.schedule.kind=cosin"], "stage 'one': schedule.kind must be one of"),
        (
            ["tiny.yaml", "stages.one.accumulate=3", "out=never"],
            "stage 'one': accumulate must divide the batch",
        ),
        (["tiny.yaml", "stages.one.ema=1", "out=never"], "stage 'one': ema must be from 0 to below 1"),
        (
            ["tiny.yaml", "trainer.precision=float16", "out=never"],
            "float16 needs a GPU and this run is on cpu",
        ),
        (
            ["tiny.yaml", "stages.one.optimiser.betas=[0.9]"],
            "stage 'one': optimiser.betas must be two numbers",
        ),
        (
            ["tiny.yaml", "stages.one.optimiser.layers=[{match: x.*, weight_decay: -1}]"],
            "stage 'one': optimiser.layers 'x.*': weight_decay must be at least 0",
        ),
    ):
        result = cli("train", *arguments)
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert result.stdout == "" and "Traceback" not in result.stderr
    assert not (workplace / "never").exists()


def test_a_failed_job_exits_with_1(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    result = cli("train", "tiny.yaml", "data.path=nowhere", "out=never")
    assert (
        result.exit_code == 1
        and "error: training data 'nowhere' was not found; looked at nowhere, " in result.stderr
    )
    result = cli("train", "tiny.yaml", "data.batch_size=41", "out=never")
    assert (
        result.exit_code == 1
        and "fewer than one batch of 41; set data.batch_size=40 or less" in result.stderr
    )
    assert not (workplace / "never").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_stopped_run_says_where_it_goes_on(workplace, monkeypatch, number, code):
    from lrface import recipes
    from lrface.train.signals import Interrupted

    def stopped(*_, **__):
        raise Interrupted(number, 12, Path("runs/tiny/stages/1-one/step-00000012"))

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(recipes, "run_recipe", stopped)
    result = cli("train", "tiny.yaml")
    assert result.exit_code == code and result.stdout == ""
    assert (
        "stopped after step 12, saved runs/tiny/stages/1-one/step-00000012; the same command goes on"
        in result.stderr
    )


def test_check_prints_the_recipe_resolved(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    result = cli("train", "tiny.yaml", "seed=5", "--check")
    assert result.exit_code == 0
    resolved = yaml.safe_load(result.stdout)
    assert resolved["seed"] == 5 and resolved["stages"][0]["optimiser"]["momentum"] == 0.9
    result = cli("train", "tiny.yaml", "--check", "--json")
    assert json.loads(result.stdout)["head"] == {"name": "cosface"}
    assert cli("train", "tiny.yaml", "head=cosfase", "--check").exit_code == 2
    assert not (workplace / "runs").exists()


def test_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = cli("recipes")
    assert listed.exit_code == 0 and "celeba300/qualnet_lm" in listed.stdout
    names = json.loads(cli("recipes", "list", "--json").stdout)
    assert {"celeba300/naive", "casia/qualnet_lm_r50"} <= set(names) and all(names.values())
    shown = cli("recipes", "show", "celeba300/naive").stdout
    assert yaml.safe_load(shown)["name"] == "celeba300-naive"
    assert cli("recipes", "copy", "celeba300/naive").exit_code == 0
    assert (tmp_path / "naive.yaml").read_text() == shown
    again = cli("recipes", "copy", "celeba300/naive")
    assert again.exit_code == 2 and "naive.yaml exists; give another file name" in again.stderr
    assert cli("recipes", "copy", "celeba300/naive", "mine.yaml").exit_code == 0
    assert cli("recipes", "drop", "celeba300/naive").exit_code == 2
    assert cli("recipes", "show").exit_code == 2


def test_help_comes_without_pytorch():
    code = (
        "import sys; sys.argv = ['lrface', '--help']\ntry:\n    import lrface.cli; lrface.cli.app()\nfinally:\n    "
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0 and "train" in result.stdout
    assert result.stderr.strip() == "False"
