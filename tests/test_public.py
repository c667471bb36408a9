"""What `import lrface` gives, and what it costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lrface


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def test_importing_lrface_imports_nothing_heavy():
    heavy = "torch torchvision numpy cv2 PIL pyarrow onnxruntime facenet_pytorch lightning_fabric matplotlib"
    code = f"import sys, lrface; print(*[name for name in '{heavy}'.split() if name in sys.modules])"
    assert run(code) == ""


def test_importing_the_embedder_leaves_optional_packages_alone():
    heavy = "onnxruntime facenet_pytorch insightface lightning_fabric matplotlib sklearn pyarrow torchvision"
    code = (
        "import sys; from lrface import load_embedder, FaceEmbedder;"
        f"print(*[name for name in '{heavy}'.split() if name in sys.modules]);"
        # What trains comes without PyTorch's compiler.
        "import lrface.recipes; print(*[name for name in ['torch._dynamo'] if name in sys.modules])"
    )
    assert run(code) == ""


def test_public_names():
    assert set(lrface.__all__) == {"FaceEmbedder", "load_embedder", "__version__"}
    assert set(lrface.__all__) <= set(dir(lrface))
    from lrface.embed import FaceEmbedder, load_embedder

    assert lrface.load_embedder is load_embedder
    assert lrface.FaceEmbedder is FaceEmbedder


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_embeder'"):
        lrface.load_embeder  # noqa: B018


def test_the_version_of_the_package_is_this_one():
    assert lrface.__version__ == "0.1.0"
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "lrface/__init__.py"
