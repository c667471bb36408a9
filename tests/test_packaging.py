"""The wheel as a user gets it: what lies inside, and that it works from an empty folder away from the checkout."""

import os
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import lrface
from lrface.cli import app

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built once, with the build backend that the dev extra installs (no network)."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"lrface-{lrface.__version__}.dist-info/METADATA").decode()
    return HeaderParser().parsestr(text)


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, away from the checkout: on PYTHONPATH it stands before any other lrface."""
    place = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def run_installed(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(folder)}
    environment.pop("LRFACE_DATA", None)
    command = [sys.executable, "-m", "lrface.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, stdin=subprocess.DEVNULL
    )


def test_wheel_has_one_top_level_name(names: list[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"lrface", f"lrface-{lrface.__version__}.dist-info"}


def test_wheel_runs_on_every_platform(wheel: Path) -> None:
    assert wheel.name == f"lrface-{lrface.__version__}-py3-none-any.whl"


def test_wheel_has_every_module(names: list[str]) -> None:
    inside = {name for name in names if name.startswith("lrface/") and name.endswith(".py")}
    assert inside == {path.relative_to(ROOT).as_posix() for path in (ROOT / "lrface").rglob("*.py")}


def test_wheel_says_that_it_is_typed(names: list[str]) -> None:
    assert "lrface/py.typed" in names


def test_wheel_has_every_recipe_as_it_is(wheel: Path) -> None:
    recipes = {
        path.relative_to(ROOT / "configs").as_posix(): path for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert len({name.split("/")[0] for name in recipes}) >= 2, "recipes lie in nested folders"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("lrface/_configs/")}
        assert inside == {f"lrface/_configs/{name}" for name in recipes}
        for name, path in recipes.items():
            assert archive.read(f"lrface/_configs/{name}") == path.read_bytes()


def test_wheel_has_nothing_else(names: list[str]) -> None:
    """No tests, caches, data: Python modules, recipes, the page of `lrface ui`, the model and the metadata only."""
    page = {f"lrface/serve/page/{name}" for name in ("index.html", "page.css", "page.js")}
    page |= {f"lrface/shipped/{name}" for name in ("model.safetensors", "model.json", "README.md")}
    assert page <= set(names)
    others = [
        name
        for name in names
        if not name.endswith((".py", "/py.typed"))
        and not name.startswith("lrface/_configs/")
        and name not in page
    ]
    assert {name.split("/")[0] for name in others} == {f"lrface-{lrface.__version__}.dist-info"}


def test_metadata(wheel: Path, metadata: Message) -> None:
    assert metadata["Name"] == "lrface"
    assert metadata["Version"] == lrface.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload().startswith("# lrface")
    with zipfile.ZipFile(wheel) as archive:
        folder = f"lrface-{lrface.__version__}.dist-info"
        assert "lrface = lrface.cli:app" in archive.read(f"{folder}/entry_points.txt").decode()
        assert "lrface authors" in archive.read(f"{folder}/licenses/LICENSE").decode()


def test_one_opencv_is_asked_for(metadata: Message) -> None:
    """Two packages that both hold cv2 overwrite each other's files."""
    wanted = [line for line in metadata.get_all("Requires-Dist", []) if "opencv" in line]
    assert [line.split(">")[0] for line in wanted] == ["opencv-python"]


def test_no_registry_address_in_project_files() -> None:
    """Where packages come from is the machine's business."""
    for name in ("pyproject.toml", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for word in ("://", "--index", "find-links"):
            assert word not in text, f"{name} holds {word}"


def test_command_is_installed(tmp_path: Path) -> None:
    """The `lrface` script beside this Python, started in an empty folder."""
    script = Path(sys.executable).parent / "lrface"
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"lrface {lrface.__version__}"


def test_help_lists_every_command(installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert COMMANDS and all(command in done.stdout for command in COMMANDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command(command: str, installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, tmp_path, command, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_recipes_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = run_installed(installed, tmp_path, "recipes")
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    inside = (installed / "lrface" / "_configs").rglob("*.yaml")
    expected = (
        path.relative_to(installed / "lrface" / "_configs").with_suffix("").as_posix() for path in inside
    )
    assert listed == sorted(expected)

    where = "import lrface.recipes as r; print(r.__file__); print(*r.shipped_recipes().values(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.run(
        [sys.executable, "-c", where],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    ).stdout.splitlines()
    assert len(found) == len(listed) + 1
    assert all(Path(path).is_relative_to(installed) for path in found)


def test_shipped_recipe_trains_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """A few steps of a shipped recipe in an empty folder; the model lies where the command says."""
    overrides = [
        "data.synthetic.identities=4",
        "data.synthetic.images_per_identity=4",
        "data.batch_size=4",
        "stages.0.steps=2",
        "stages.0.epochs=null",
        "trainer.compile=false",
        "trainer.threads=1",
    ]
    done = run_installed(installed, tmp_path, "train", "demo/naive", *overrides)
    assert done.returncode == 0, done.stderr
    model = tmp_path / done.stdout.strip().removeprefix("model: ")
    assert model.is_file() and model.suffix == ".safetensors"
    assert model.with_suffix(".json").is_file()
