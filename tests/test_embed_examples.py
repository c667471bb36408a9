"""The examples in the embedder's docstrings are run, and the package says that it is typed."""

import doctest
from importlib.resources import files

import cv2
import numpy as np
import pytest
from PIL import Image
from test_embed import faces_photo, people, write_onnx  # noqa: F401 (fixtures)
from test_embed_video import scene, write_video  # noqa: F401 (a fixture)

import lrface.embed
import lrface.embed.embedder
from lrface import load_embedder


@pytest.fixture(scope="module")
def place(tmp_path_factory, people, scene):  # noqa: F811
    """A folder with everything that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    write_onnx(folder / "model.onnx")
    for name, left in (("anna", 100), ("bert", 400)):
        detail = np.random.default_rng(left).normal(0, 12, (112, 112, 1))  # nothing enlarged is as sharp
        face = cv2.resize(people[60:180, left : left + 120], (112, 112)) + detail
        Image.fromarray(np.clip(face, 0, 255).astype(np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(people).save(folder / "group.jpg", quality=95)
    still = np.repeat(scene[None], 5, axis=0)
    writer = cv2.VideoWriter(
        str(folder / "door.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, still.shape[2:0:-1]
    )
    for picture in still:
        writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    writer.release()
    return folder


@pytest.mark.parametrize(("module", "least"), [(lrface.embed, 4), (lrface.embed.embedder, 5)])
def test_examples(module, least, place, monkeypatch):
    monkeypatch.chdir(place)
    found = doctest.testmod(module, extraglobs={"embedder": load_embedder("model.onnx")}, report=True)
    assert found.failed == 0 and found.attempted >= least


def test_the_package_says_that_it_is_typed():
    assert (files("lrface") / "py.typed").is_file()
