"""OpenVINO models as embedders, against onnxruntime on the file they were converted from."""

import threading

import numpy as np
import pytest
import torch
from onnx_files import write_onnx, write_recogniser

from lrface.embed import load_embedder
from lrface.embed.openvino import write_openvino
from lrface.errors import LrfaceError, UsageError

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A recogniser in both formats, the OpenVINO one as others write it: without a card."""
    folder = tmp_path_factory.mktemp("openvino")
    write_recogniser(folder / "theirs.onnx")
    openvino.save_model(openvino.Core().read_model(folder / "theirs.onnx"), folder / "theirs.xml")
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_model_of_others_is_described_as_an_onnx_file_is(theirs, images):
    said = {"colour": "BGR", "mean": 0.5, "std": (0.5, 0.4, 0.3)}
    embedder = load_embedder(theirs / "theirs.xml", threads=1, **said)
    wanted = load_embedder(theirs / "theirs.onnx", **said).embed_tensor(images)
    # OpenVINO keeps weights in float16 by default.
    torch.testing.assert_close(embedder.embed_tensor(images), wanted, rtol=1e-2, atol=1e-2)
    assert embedder.card["described_by"] == "options" and embedder.card["format"] == "xml"
    assert (embedder.input_size, embedder.embedding_size) == (16, 8)


def test_several_threads_get_the_same(theirs, images):
    embedder = load_embedder(theirs / "theirs.xml", colour="RGB")
    wanted = embedder.embed_tensor(images)
    found = {}

    def work(number):
        found[number] = [embedder.embed_tensor(images[number : number + 3]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, all_found in found.items():
        for each in all_found:
            torch.testing.assert_close(each, wanted[number : number + 3], rtol=1e-5, atol=1e-5)
    assert len(found) == 4


def test_weights_of_another_model_are_refused(tmp_path):
    for name, scale in (("one", 1.0), ("other", 2.0)):
        write_onnx(tmp_path / f"{name}.onnx", scale=scale)
        card = (
            '{"format": "lrface-model", "version": 1, "embedding_size": 4, "input": {"size": 32, "colour": "RGB", '
            '"range": [0, 1], "normalisation": "inside"}}'
        )
        write_openvino(tmp_path / f"{name}.onnx", tmp_path / f"{name}.xml", card)
    images = torch.rand(2, 3, 32, 32)
    one, other = (load_embedder(tmp_path / f"{name}.xml").embed_tensor(images) for name in ("one", "other"))
    np.testing.assert_allclose(2 * one.numpy(), other.numpy(), rtol=1e-4)
    (tmp_path / "one.bin").write_bytes((tmp_path / "other.bin").read_bytes())
    with pytest.raises(LrfaceError, match="does not belong to"):
        load_embedder(tmp_path / "one.xml")
    (tmp_path / "one.bin").unlink()
    with pytest.raises(LrfaceError, match="one.bin: no such file"):
        load_embedder(tmp_path / "one.xml")
    (tmp_path / "one.bin").write_bytes(b"")
    (tmp_path / "one.xml").write_text("<net/>")
    with pytest.raises(LrfaceError, match="no OpenVINO model"):
        load_embedder(tmp_path / "one.xml")


def test_what_does_not_fit_is_named(theirs, tmp_path, monkeypatch):
    file = theirs / "theirs.xml"
    with pytest.raises(UsageError, match="has no output 'other'; it has embedding"):
        load_embedder(file, output="other")
    with pytest.raises(UsageError, match="for .onnx files"):
        load_embedder(file, convention="insightface")
    with pytest.raises(UsageError, match="precision bfloat16"):
        load_embedder(file, precision="bfloat16")
    with pytest.raises(LrfaceError, match="no such file"):
        load_embedder(tmp_path / "absent.xml")
    write_onnx(tmp_path / "two.onnx", output=True)
    openvino.save_model(openvino.Core().read_model(tmp_path / "two.onnx"), tmp_path / "two.xml")
    with pytest.raises(UsageError, match="2 outputs"):
        load_embedder(tmp_path / "two.xml")
    assert load_embedder(tmp_path / "two.xml", output="flat").embedding_size == 3
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(LrfaceError, match=r"lrface\[openvino\]"):
        load_embedder(file)
