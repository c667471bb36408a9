"""The embedder against small networks whose features the tests compute themselves."""

import io
import json
import threading
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from lrface import FaceEmbedder, load_embedder
from lrface.data.synthetic import draw_face
from lrface.degrade.resolution import resize
from lrface.embed import CARD_KEY, UNCALIBRATED_THRESHOLD, embed_paths, find_images, intake, paths, similarity
from lrface.errors import LrfaceError, UsageError
from lrface.models import build_backbone
from lrface.train.checkpoint import make_card, save_model

WIDTH = 16


def weights(width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(48, width)).astype(np.float32)


def expected(images, width=WIDTH, seed=0):
    """What the network of :func:`write_onnx` gives: means of 4 x 4 blocks of 28 x 28 pixels, times
    weights."""
    images = np.asarray(images, dtype=np.float32)
    blocks = images.reshape(len(images), 3, 4, 28, 4, 28).mean(axis=(3, 5), dtype=np.float64)
    return (blocks.reshape(len(images), 48) @ weights(width, seed)).astype(np.float32)


def write_onnx(
    path,
    shape=("n", 3, 112, 112),
    out_shape=("n", WIDTH),
    card=None,
    matrix=None,
    outputs=1,
    inputs=1,
    half=False,
    plain=False,
):
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    matrix = weights() if matrix is None else matrix
    nodes = [
        helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["embedding"]),
    ]
    if plain:  # the pixels themselves: takes images of any shape
        nodes, out_shape = [helper.make_node("Flatten", ["image"], ["embedding"])], ("n", "d")
    graph_outputs = [helper.make_tensor_value_info("embedding", kind, out_shape)]
    graph_inputs = [helper.make_tensor_value_info("image", kind, shape)]
    if outputs == 2:
        nodes.append(helper.make_node("Neg", ["embedding"], ["opposite"]))
        graph_outputs.append(helper.make_tensor_value_info("opposite", kind, out_shape))
    if inputs == 2:
        nodes.append(helper.make_node("Identity", ["other"], ["unused"]))
        graph_inputs.append(helper.make_tensor_value_info("other", kind, [1]))
    stored = numpy_helper.from_array(matrix.astype(np.float16 if half else np.float32), "w")
    graph = helper.make_graph(nodes, "tiny", graph_inputs, graph_outputs, [stored])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if card is not None:
        entry = model.metadata_props.add()
        entry.key, entry.value = CARD_KEY, card if isinstance(card, str) else json.dumps(card)
    onnx.save(model, path)
    return path


def onnx_card(**changes):
    card = {
        "format": "lrface-model",
        "version": 1,
        "embedding_size": WIDTH,
        "input": {"size": 112, "colour": "RGB", "range": [0, 1], "normalisation": "inside"},
    }
    return {**card, **changes}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> FaceEmbedder:
    return load_embedder(write_onnx(tmp_path_factory.mktemp("tiny") / "tiny.onnx"), threads=1)


@pytest.fixture(scope="module")
def faces_photo() -> Path:
    """A photograph of six people that the insightface package ships, 1280 x 886 pixels."""
    return Path(str(files("insightface"))) / "data" / "images" / "t1.jpg"


@pytest.fixture(scope="module")
def people(faces_photo) -> np.ndarray:
    """The same at half the size, which is a quarter of the work."""
    with Image.open(faces_photo) as image:
        return np.asarray(image.convert("RGB").resize((640, 443), Image.Resampling.LANCZOS))


@cache
def crop(seed=0, size=112) -> np.ndarray:
    """A drawn face with detail down to the pixel, so that nothing looks enlarged: uint8 [size, size, 3], read-only."""
    face = draw_face(0, 9 if seed == 4 else seed, 0, size)  # the fourth is drawn out of focus
    face.setflags(write=False)
    return face


def as_input(image) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)


def unit(features):
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ ONNX models


@pytest.mark.parametrize("count", [0, 1, 5, 70])
def test_raw_features_of_an_onnx_model(tiny, count):
    images = torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    features = tiny.embed_tensor(images)
    assert features.dtype == torch.float32 and features.shape == (count, WIDTH)
    np.testing.assert_allclose(features.numpy(), expected(images), atol=2e-5)
    for batch_size in (1, 3):
        np.testing.assert_allclose(tiny.embed_tensor(images, batch_size), features, atol=1e-5)


def test_what_an_onnx_model_without_card_says_about_itself(tiny):
    assert (tiny.name, tiny.embedding_size, tiny.input_size) == ("tiny", WIDTH, 112)
    assert tiny.card["described_by"] == "convention"
    assert tiny.card["input"] == {"size": 112, "colour": "RGB", "range": [0, 1], "normalisation": "inside"}


def test_features_can_be_trained_on(tiny):
    head = torch.nn.Linear(WIDTH, 1)
    head(tiny.embed_tensor(torch.rand(2, 3, 112, 112))).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.rand(2, 3, 96, 96), r"\[n, 3, 112, 112\]; found \[2, 3, 96, 96\]"),
        (torch.rand(3, 112, 112), r"found \[3, 112, 112\]"),
        (torch.zeros(1, 3, 112, 112, dtype=torch.uint8), "float32 .* found torch.uint8"),
        (np.zeros((1, 3, 112, 112), np.float32), "found ndarray"),
    ],
)
def test_embed_tensor_names_a_wrong_shape_or_type(tiny, images, says):
    with pytest.raises(UsageError, match=says):
        tiny.embed_tensor(images)


def test_a_foreign_model_is_described_by_options(tmp_path):
    path = write_onnx(tmp_path / "foreign.onnx")
    images = torch.rand(3, 3, 112, 112)
    embedder = load_embedder(path, colour="BGR", mean=(0.1, 0.2, 0.3), std=0.5)
    given = (images.numpy()[:, ::-1] - np.array([0.1, 0.2, 0.3], np.float32).reshape(1, 3, 1, 1)) / 0.5
    np.testing.assert_allclose(embedder.embed_tensor(images), expected(given), atol=5e-5)
    assert embedder.card["described_by"] == "options"
    assert embedder.card["input"]["colour"] == "BGR"
    assert embedder.card["input"]["normalisation"]["std"] == [0.5, 0.5, 0.5]
    np.testing.assert_allclose(embedder.card["input"]["normalisation"]["mean"], [0.1, 0.2, 0.3], atol=1e-6)
    pixels = load_embedder(path, mean=0, std=1 / 255)
    np.testing.assert_allclose(
        pixels.embed_tensor(images), expected(images.numpy() * 255), rtol=1e-4, atol=5e-3
    )


@pytest.mark.parametrize(
    "option",
    [{"colour": "GBR"}, {"mean": (0.5, 0.5)}, {"std": 0}, {"std": (1, 1, 0)}, {"mean": float("nan")}],
)
def test_wrong_descriptions_are_named(tmp_path, option):
    with pytest.raises(UsageError, match=next(iter(option))):
        load_embedder(write_onnx(tmp_path / "m.onnx"), **option)


def test_a_fixed_batch_is_filled_up(tmp_path):
    embedder = load_embedder(write_onnx(tmp_path / "four.onnx", (4, 3, 112, 112), (4, WIDTH)))
    images = torch.rand(6, 3, 112, 112)
    np.testing.assert_allclose(embedder.embed_tensor(images), expected(images), atol=2e-5)


def test_open_sizes_take_the_convention_and_the_width_that_shows(tmp_path):
    embedder = load_embedder(write_onnx(tmp_path / "open.onnx", ("n", 3, "h", "w"), ("n", "d")))
    assert (embedder.input_size, embedder.embedding_size) == (112, WIDTH)


def test_a_half_precision_model(tmp_path):
    embedder = load_embedder(write_onnx(tmp_path / "half.onnx", half=True))
    images = torch.rand(2, 3, 112, 112)
    features = embedder.embed_tensor(images)
    assert features.dtype == torch.float32
    np.testing.assert_allclose(features, expected(images), atol=0.05)


def test_another_input_size(tmp_path):
    path = write_onnx(tmp_path / "small.onnx", ("n", 3, 84, 84), ("n", 4), matrix=weights(4)[:27])
    embedder = load_embedder(path)
    assert embedder.input_size == 84
    found = embedder.embed([crop(0, 84), crop(1, 112)])
    assert found.effective_resolution.tolist() == [84, 112]
    small = resize(as_input(crop(1, 112))[None], 84, "bilinear")
    np.testing.assert_allclose(found.vectors[1], unit(embedder.embed_tensor(small)[0]), atol=1e-6)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"plain": True, "shape": ("n", 3, 96, 112)},
            r"'image' has shape \['n', 3, 96, 112\]; .*\[n, 3, side, side\]",
        ),
        ({"plain": True, "shape": ("n", 1, 112, 112)}, r"has shape \['n', 1, 112, 112\]"),
        (
            {"plain": True, "shape": ("n", 112, 112, 3)},
            r"has shape \['n', 112, 112, 3\].*channels before rows",
        ),
        ({"inputs": 2}, r"takes 2 inputs \(image, other\)"),
    ],
)
def test_networks_that_are_no_face_embedders_are_named(tmp_path, how, says):
    path = write_onnx(tmp_path / "odd.onnx", **how)
    with pytest.raises(LrfaceError, match=says) as caught:
        load_embedder(path)
    assert str(path) in str(caught.value)


def test_a_feature_map_is_no_embedding(tmp_path):
    nodes = [helper.make_node("AveragePool", ["image"], ["map"], kernel_shape=[28, 28], strides=[28, 28])]
    graph = helper.make_graph(
        nodes,
        "map",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["n", 3, 4, 4])],
    )
    path = tmp_path / "map.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(LrfaceError, match=r"output 'map' has shape .*an embedding is \[n, d\]"):
        load_embedder(path)


def test_of_several_outputs_one_is_named(tmp_path):
    path = write_onnx(tmp_path / "two.onnx", outputs=2)
    with pytest.raises(UsageError, match=r"2 outputs \(embedding, opposite\)"):
        load_embedder(path)
    with pytest.raises(UsageError, match="no output 'feature'"):
        load_embedder(path, output="feature")
    images = torch.rand(2, 3, 112, 112)
    opposite = load_embedder(path, output="opposite").embed_tensor(images)
    np.testing.assert_allclose(opposite, -expected(images), atol=2e-5)


def test_missing_and_broken_onnx_files(tmp_path):
    with pytest.raises(LrfaceError, match=r"absent\.onnx: no such file.*lrface train"):
        load_embedder(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a network")
    with pytest.raises(LrfaceError, match=r"text\.onnx is no ONNX model"):
        load_embedder(tmp_path / "text.onnx")


def test_a_card_in_the_onnx_file_is_used(tmp_path):
    path = write_onnx(tmp_path / "m.onnx", card=onnx_card(thresholds={"112": 0.4}, licence="none"))
    embedder = load_embedder(str(path))
    assert embedder.card["licence"] == "none" and embedder.card["thresholds"] == {"112": 0.4}
    with pytest.raises(UsageError, match="carries lrface's card.*leave out colour, std"):
        load_embedder(path, colour="RGB", std=1)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        (onnx_card(embedding_size=99), "embedding_size 99, the network gives 16"),
        (onnx_card(input={**onnx_card()["input"], "size": 96}), "input size 96, its graph takes 112 x 112"),
        (onnx_card(input={**onnx_card()["input"], "size": "big"}), "'input.size'.*found 'big'"),
        (
            onnx_card(input={**onnx_card()["input"], "colour": "BGR"}),
            "'input.colour' must be 'RGB'; found 'BGR'",
        ),
        (onnx_card(format="other"), "'format' must be 'lrface-model'; found 'other'"),
        ("{broken", "'lrface_card' is no JSON"),
        ("[1]", "must hold a JSON object; found list"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path, card, says):
    with pytest.raises(LrfaceError, match=says):
        load_embedder(write_onnx(tmp_path / "m.onnx", card=card))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"precision": "float16"}, "precision must be one of float32, bfloat16; found 'float16'"),
        ({"precision": "bfloat16"}, "bfloat16 is for safetensors models"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda"),
        ({"device": "meta"}, "device must be auto, cpu, cuda"),
        ({"device": "cuda:99"}, "PyTorch finds .* GPUs"),
        ({"detector": object(), "min_score": 0.5}, "detector of your own"),
    ],
)
def test_wrong_options_are_named(tmp_path, option, says):
    with pytest.raises(UsageError, match=says):
        load_embedder(write_onnx(tmp_path / "m.onnx"), **option)


# -------------------------------------------------------------------------------------------- lrface's models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    encoder = build_backbone("mobilefacenet", embedding_size=32).eval()
    card = make_card({"name": "mobilefacenet", "arguments": {"embedding_size": 32}}, encoder, {})
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "run" / "stages" / "1-clean" / "step-00000002", encoder, card)
    save_model(folder / "one" / "small.safetensors", encoder, card)
    return folder, encoder


def test_a_run_a_directory_and_a_file_are_the_same_model(saved):
    folder, encoder = saved
    images = torch.rand(3, 3, 112, 112)
    with torch.no_grad():
        wanted = encoder(images)
    checkpoint = folder / "run" / "stages" / "1-clean" / "step-00000002"
    for place in (
        folder / "run",
        checkpoint,
        checkpoint / "model.safetensors",
        folder / "one" / "small.safetensors",
    ):
        embedder = load_embedder(place)
        assert embedder.embedding_size == 32
        torch.testing.assert_close(embedder.embed_tensor(images), wanted, atol=1e-4, rtol=1e-4)
    assert load_embedder(folder / "run").name == "run"
    assert load_embedder(folder / "one" / "small.safetensors").name == "small"


def test_bfloat16_stays_near(saved):
    images = torch.stack([as_input(crop(seed)) for seed in range(3)])
    exact = load_embedder(saved[0] / "run").embed_tensor(images)
    coarse = load_embedder(saved[0] / "run", precision="bfloat16").embed_tensor(images)
    assert coarse.dtype == torch.float32
    assert not torch.equal(exact, coarse)
    assert float(torch.nn.functional.cosine_similarity(exact, coarse).min()) > 0.99


def test_a_directory_of_other_names_says_which_file_to_name(saved, tmp_path):
    with pytest.raises(LrfaceError, match=r"holds no model.*it holds small\.safetensors: name the file"):
        load_embedder(saved[0] / "one")
    with pytest.raises(LrfaceError, match="holds no model"):
        load_embedder(tmp_path)
    with pytest.raises(LrfaceError, match="no such model.*lrface train"):
        load_embedder(tmp_path / "nowhere")
    (tmp_path / "weights.pth").write_bytes(b"PK")
    with pytest.raises(LrfaceError, match=r"weights\.pth is not a model"):
        load_embedder(tmp_path / "weights.pth")


def test_onnx_options_do_not_fit_a_model_of_lrface(saved):
    with pytest.raises(UsageError, match="mean describes a .onnx or .pt2 file"):
        load_embedder(saved[0] / "run", mean=0.5)


def test_vectors_do_not_depend_on_the_batch(saved):
    embedder = load_embedder(saved[0] / "run")
    images = [crop(seed, size) for seed, size in enumerate([112, 14, 56, 112, 28, 112, 100])]
    together = embedder.embed(images).vectors
    for batch_size in (1, 3):
        np.testing.assert_allclose(embedder.embed(images, batch_size=batch_size).vectors, together, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(images[::-1]).vectors[::-1], together, atol=1e-5)


def test_several_threads_get_the_same(saved):
    embedder = load_embedder(saved[0] / "run")
    images = [crop(seed) for seed in range(4)]
    wanted = embedder.embed(images).vectors
    results = {}

    def work(number):
        results[number] = embedder.embed(images).vectors

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2, 3]
    for result in results.values():
        np.testing.assert_allclose(result, wanted, atol=1e-6)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# ------------------------------------------------------------------------------------------------------ crops


def test_every_kind_of_input_gives_the_same_vector(tiny, tmp_path):
    image = crop(3)
    path = tmp_path / "crop.png"
    Image.fromarray(image).save(path)
    inputs = [
        str(path),
        path,
        path.read_bytes(),
        Image.fromarray(image),
        image,
        image.astype(np.float32) / 255,
        image.astype(np.float64) / 255,
        torch.from_numpy(image.copy()).permute(2, 0, 1),
        as_input(image),
    ]
    found = tiny.embed(inputs)
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (len(inputs), WIDTH)
    wanted = unit(expected(as_input(image)[None]))[0]
    np.testing.assert_allclose(found.vectors, np.tile(wanted, (len(inputs), 1)), atol=1e-5)
    assert found.source.tolist() == list(range(len(inputs))) and found.source.dtype == np.int64
    assert found.effective_resolution.tolist() == [112] * len(inputs)
    assert np.isnan(found.box).all() and found.box.shape == (len(inputs), 4)
    assert np.isnan(found.score).all() and found.score.dtype == np.float32
    assert np.isnan(found.landmarks).all() and found.landmarks.shape == (len(inputs), 5, 2)
    assert found.failures == []
    for each in inputs:
        np.testing.assert_allclose(tiny.embed(each).vectors, found.vectors[:1], atol=1e-5)


def test_batches_and_empty_lists(tiny):
    images = np.stack([crop(0), crop(1)])
    wanted = tiny.embed(list(images)).vectors
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    for batch in (
        images,
        images / np.float32(255),
        channels_first,
        channels_first.float() / 255,
        iter(images),
    ):
        np.testing.assert_allclose(tiny.embed(batch).vectors, wanted, atol=1e-5)
    for nothing in ([], np.zeros((0, 112, 112, 3), np.uint8), torch.zeros(0, 3, 112, 112)):
        empty = tiny.embed(nothing)
        assert empty.vectors.shape == (0, WIDTH) and empty.box.shape == (0, 4) and len(empty) == 0


@pytest.mark.parametrize("size", [1, 14, 28, 111])
def test_a_small_crop_is_enlarged_and_keeps_its_resolution(tiny, size):
    image = crop(4, size)
    found = tiny.embed(image)
    enlarged = resize(as_input(image)[None], 112, "bilinear")
    np.testing.assert_allclose(found.vectors, unit(expected(enlarged)), atol=1e-5)
    assert found.effective_resolution.tolist() == [size]


def test_a_large_crop_is_shrunk_with_averaging(tiny):
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    found = tiny.embed(noise, kind="crop")
    assert found.effective_resolution.tolist() == [448]
    averaged = noise.reshape(112, 4, 112, 4, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    # Averaging keeps block means; picking every fourth pixel of noise would not.
    np.testing.assert_allclose(found.vectors, tiny.embed(averaged).vectors, atol=1e-3)


def test_flip_adds_the_mirrored_face(tiny):
    image = crop(5)
    features = expected(as_input(image)[None]) + expected(as_input(image[:, ::-1])[None])
    np.testing.assert_allclose(tiny.embed(image, flip=True).vectors, unit(features), atol=1e-5)
    assert np.abs(tiny.embed(image).vectors - unit(features)).max() > 1e-3


def test_grey_images(tiny, tmp_path):
    grey = crop(6)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    wanted = tiny.embed(np.repeat(grey[:, :, None], 3, axis=2)).vectors
    inputs = [grey, grey[:, :, None], torch.from_numpy(grey.copy())[None], tmp_path / "grey.png", grey / 255]
    np.testing.assert_allclose(tiny.embed(inputs).vectors, np.tile(wanted, (len(inputs), 1)), atol=1e-5)


def test_opaque_alpha_changes_nothing(tiny, tmp_path):
    image = crop(7)
    opaque = np.concatenate([image, np.full((112, 112, 1), 255, np.uint8)], axis=2)
    Image.fromarray(opaque).save(tmp_path / "alpha.png")
    found = tiny.embed([tmp_path / "alpha.png", Image.fromarray(opaque), image])
    np.testing.assert_allclose(found.vectors, np.tile(found.vectors[2], (3, 1)), atol=1e-5)


def test_read_only_and_reversed_arrays(tiny):
    image = crop(8).copy()
    wanted = tiny.embed(image).vectors
    reversed_twice = image[:, :, ::-1].copy()[:, :, ::-1]
    image.setflags(write=False)
    np.testing.assert_allclose(
        tiny.embed([image, reversed_twice]).vectors, np.tile(wanted, (2, 1)), atol=1e-6
    )


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (crop(0).astype(np.float32), r"must lie in \[0, 1\]; found .* to 2"),
        (np.full((112, 112, 3), np.nan), r"must lie in \[0, 1\]; found nan"),
        (as_input(crop(0)) * 2 - 1, r"must lie in \[0, 1\]; found -"),
        (crop(0).astype(np.int64), "uint8, or floating point.*found int64"),
        (torch.zeros(3, 112, 112, dtype=torch.int32), "uint8, or floating point.*found torch.int32"),
        (np.zeros((112, 112, 4), np.uint8), r"RGB \[h, w, 3\].*found shape \[112, 112, 4\]"),
        (np.zeros((0, 112, 3), np.uint8), r"found shape \[0, 112, 3\]"),
        (torch.zeros(112, 112, 3), r"RGB \[3, h, w\].*found shape \[112, 112, 3\]"),
    ],
)
def test_images_that_cannot_be_used_are_named_or_listed(tiny, image, reason):
    with pytest.raises(LrfaceError, match=f"image 1: .*{reason}"):
        tiny.embed([crop(0), image])
    found = tiny.embed([crop(0), image, crop(1)], on_error="skip")
    assert found.source.tolist() == [0, 2]
    assert [index for index, _ in found.failures] == [1]
    np.testing.assert_allclose(found.vectors, tiny.embed([crop(0), crop(1)]).vectors, atol=1e-6)


def test_a_crop_must_be_square(tiny):
    with pytest.raises(LrfaceError, match="a crop must be square; found 112 x 80 pixels"):
        tiny.embed(crop(0)[:80], kind="crop")


@pytest.mark.parametrize(
    ("images", "options", "says"),
    [
        (7, {}, "found int"),
        ([crop(0), 7], {}, "image 1 is a int"),
        ([[crop(0)]], {}, "image 0 is a list"),
        (np.zeros(5, np.uint8), {}, r"found shape \[5\]"),
        (crop(0), {"kind": "face"}, "kind must be one of auto, crop, photo; found 'face'"),
        (crop(0), {"faces": "first"}, "faces must be one of .*found 'first'"),
        (crop(0), {"on_error": "ignore"}, "on_error must be one of raise, skip"),
        (crop(0), {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_calls_are_named(tiny, images, options, says):
    with pytest.raises(UsageError, match=says):
        tiny.embed(images, **options)


def test_a_network_that_gives_nothing_is_reported_not_divided_by(tmp_path):
    dead = load_embedder(write_onnx(tmp_path / "dead.onnx", matrix=np.zeros((48, WIDTH))))
    with pytest.raises(LrfaceError, match="image 0: the network's features are zero or not finite"):
        dead.embed(crop(0))
    found = dead.embed([crop(0), crop(1)], on_error="skip")
    assert len(found) == 0 and [index for index, _ in found.failures] == [0, 1]
    matrix = weights()
    matrix[0, 0] = np.inf
    broken = load_embedder(write_onnx(tmp_path / "broken.onnx", matrix=matrix))
    assert len(broken.embed(crop(0), on_error="skip").failures) == 1


# ------------------------------------------------------------------------------------------------ photographs


def test_six_faces_of_a_photograph(tiny, faces_photo):
    found = tiny.embed(faces_photo, faces="all")
    assert len(found) == 6
    assert found.source.tolist() == [0] * 6
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-6)
    assert (found.score > 0.9).all() and (found.score <= 1).all()
    middle = (found.box[:, :2] + found.box[:, 2:]) / 2
    assert (middle > 0).all() and (middle < (1280, 886)).all()
    inside = (found.landmarks > found.box[:, None, :2]) & (found.landmarks < found.box[:, None, 2:])
    assert inside.all()
    width = found.box[:, 2] - found.box[:, 0]
    ratio = found.effective_resolution / width
    assert (ratio > 0.9).all() and (ratio < 2.0).all()
    area = width * (found.box[:, 3] - found.box[:, 1])
    assert (np.diff(area) <= 0).all()


def test_a_photograph_is_aligned_like_the_crops_of_align(tiny, people):
    from lrface.align.warp import warp_face

    found = tiny.embed(people, faces="all")
    crops = [warp_face(people, landmarks) for landmarks in found.landmarks]
    np.testing.assert_allclose(found.vectors, tiny.embed(crops).vectors, atol=1e-6)


def test_one_face_a_photograph_and_its_rules(tiny, people):
    window = people[:215, 49:269]  # one face in the middle, a larger one at the edge
    every = tiny.embed(window, faces="all")
    assert len(every) == 2
    np.testing.assert_array_equal(tiny.embed(window, faces="largest").box, every.box[:1])
    np.testing.assert_array_equal(tiny.embed(window).box, every.box[1:])


def test_effective_resolution_follows_the_photograph(tiny, people):
    half = np.asarray(Image.fromarray(people).resize((320, 222), Image.Resampling.LANCZOS))
    whole, small = (tiny.embed(image, faces="largest").effective_resolution[0] for image in (people, half))
    assert small == pytest.approx(whole / 2, rel=0.06)


def test_photographs_and_crops_in_one_call(tiny, people):
    blank = np.full((300, 200, 3), 127, np.uint8)
    images = [crop(0), people, crop(1, 56), blank, people[:, ::-1]]
    found = tiny.embed(images, faces="all", on_error="skip")
    assert found.source.tolist() == [0] + [1] * 6 + [2] + [4] * 6
    assert found.failures == [(3, "no face found in 200 x 300 pixels; an aligned crop needs kind='crop'")]
    alone = tiny.embed(people, faces="all")
    np.testing.assert_allclose(found.vectors[1:7], alone.vectors, atol=1e-4)
    np.testing.assert_allclose(found.box[1:7], alone.box, atol=1e-2)
    assert np.isnan(found.score[[0, 7]]).all() and np.isfinite(found.score[1:7]).all()
    with pytest.raises(LrfaceError, match="image 3: no face found"):
        tiny.embed(images)


def test_the_rule_of_auto(tiny):
    assert tiny.embed(crop(0, 112)).effective_resolution.tolist() == [112]
    grey = np.full((113, 113, 3), 127, np.uint8)
    with pytest.raises(LrfaceError, match="no face found in 113 x 113"):
        tiny.embed(grey)
    with pytest.raises(LrfaceError, match="no face found in 112 x 111"):
        tiny.embed(grey[:111, :112])
    with pytest.raises(LrfaceError, match="no face found in 112 x 112"):
        tiny.embed(grey[:112, :112], kind="photo")
    assert tiny.embed(crop(0, 200), kind="crop").effective_resolution.tolist() == [200]


def test_a_photograph_in_floating_point(tiny, people):
    people = people[:, :320]
    found = tiny.embed([people, as_input(people)])
    np.testing.assert_allclose(found.vectors[0], found.vectors[1], atol=1e-6)


def test_rotation_by_exif_is_undone(tiny, people, tmp_path):
    upright, turned = tmp_path / "upright.png", tmp_path / "turned.png"
    Image.fromarray(people).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(people))).save(turned, exif=exif)
    with Image.open(turned) as opened:
        found = tiny.embed([upright, turned, opened], faces="largest")
    np.testing.assert_allclose(found.vectors, np.tile(found.vectors[0], (3, 1)), atol=1e-5)
    np.testing.assert_allclose(found.box, np.tile(found.box[0], (3, 1)), atol=1e-2)


def test_detector_options_reach_the_detector(tiny, tmp_path, people):
    path = write_onnx(tmp_path / "m.onnx")
    scores = np.sort(tiny.embed(people, faces="all").score)
    middle = float(scores[2] + scores[3]) / 2
    strict = load_embedder(path, min_score=middle, min_face_size=24)
    assert (strict.detector.min_score, strict.detector.min_face_size) == (middle, 24)
    assert (strict.embed(people, faces="all").score > middle).all()
    own = load_embedder(path, detector=strict.detector)
    assert own.detector is strict.detector


# ----------------------------------------------------------------------------------------- bad files in lists


def test_unreadable_files_are_named_or_listed(tiny, tmp_path):
    good = tmp_path / "good.png"
    good.write_bytes(png(crop(0)))
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(png(crop(1))[:200])
    bad = [tmp_path / name for name in ("text.jpg", "empty.jpg", "cut.png", "absent.jpg")]
    for path in bad:
        with pytest.raises(LrfaceError) as caught:
            tiny.embed([good, path])
        assert str(caught.value).startswith(f"{path}: ")
    found = tiny.embed([*bad[:2], good, *bad[2:], b"no image either"], on_error="skip")
    assert found.source.tolist() == [2]
    assert [index for index, _ in found.failures] == [0, 1, 3, 4, 5]
    assert all(reason for _, reason in found.failures)


# ---------------------------------------------------------------------------------------- similarity, compare


def test_similarity_is_the_cosine(tiny):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 8)), rng.normal(size=(5, 8))
    matrix = similarity(a, b)
    assert matrix.shape == (3, 5) and matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, unit(a) @ unit(b).T, atol=1e-6)
    np.testing.assert_allclose(similarity(a[0], b), matrix[:1], atol=1e-6)
    found = tiny.embed([crop(0), crop(1)])
    np.testing.assert_allclose(np.diag(tiny.similarity(found, found)), 1, atol=1e-6)
    with pytest.raises(UsageError, match=r"\[3, 8\] and \[5, 7\]"):
        similarity(a, b[:, :7])
    with pytest.raises(UsageError, match="zero or not finite"):
        similarity(a, np.zeros((1, 8)))


def test_compare_says_what_its_threshold_rests_on(tiny, tmp_path):
    a, b = crop(0), crop(1)
    result = tiny.compare(a, b)
    assert (result.threshold, result.threshold_from) == (UNCALIBRATED_THRESHOLD, "default")
    assert not result.calibrated and "uncalibrated" in result.statement
    flipped = tiny.embed([a, b], flip=True).vectors
    assert result.similarity == pytest.approx(float(flipped[0] @ flipped[1]), abs=1e-6)
    assert result.effective_resolutions == (112, 112)

    given = tiny.compare(a, b, threshold=-1)
    assert given.verdict is True and given.calibrated and "same person" in given.statement
    assert tiny.compare(a, b, threshold=1).verdict is False
    assert tiny.compare(a, a, threshold=0.999).verdict is True

    card = onnx_card(thresholds={"112": 0.5, "56": 0.4, "14": 0.1})
    carded = load_embedder(write_onnx(tmp_path / "m.onnx", card=card))
    thresholds = [carded.compare(a, crop(1, size)).threshold for size in (112, 90, 70, 30, 27, 10)]
    assert thresholds == [0.5, 0.5, 0.4, 0.4, 0.1, 0.1]
    assert carded.compare(a, b).calibrated and "card" in carded.compare(a, b).statement
    assert carded.compare(a, b, threshold=0.2).threshold_from == "given"


def test_compare_names_what_is_wrong(tiny, tmp_path):
    with pytest.raises(UsageError, match="threshold is a cosine"):
        tiny.compare(crop(0), crop(1), threshold=40)
    with pytest.raises(UsageError, match="the second holds 2"):
        tiny.compare(crop(0), [crop(0), crop(1)])
    with pytest.raises(UsageError, match="one face an image"):
        tiny.compare(crop(0), crop(1), faces="all")
    with pytest.raises(LrfaceError, match="no face found"):
        tiny.compare(crop(0), np.zeros((200, 300, 3), np.uint8))
    for thresholds in ([0.3], {"large": 0.3}, {"112": None}, {"112": 40}, {"0": 0.3}):
        broken = load_embedder(write_onnx(tmp_path / "m.onnx", card=onnx_card(thresholds=thresholds)))
        with pytest.raises(LrfaceError, match="field 'thresholds'"):
            broken.compare(crop(0), crop(1))


# --------------------------------------------------------------------------------------------- many at a time


@pytest.fixture
def album(tmp_path):
    """Ten crops in folders, three files that cannot be used, and what is passed over."""
    root = tmp_path / "album"
    for number in range(10):
        folder = root / ("b" if number % 2 else "a/deep")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(crop(number, 112 if number < 8 else 28)))
    (root / "broken.jpg").write_text("no image")
    (root / "empty.png").write_bytes(b"")
    (root / "blank.png").write_bytes(png(np.full((200, 300, 3), 90, np.uint8)))
    (root / "notes.txt").write_text("passed over")
    (root / ".hidden.png").write_bytes(png(crop(0)))
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(png(crop(0)))
    return root


def read_parquet(path):
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {}
    for name in table.column_names:
        values = table[name].combine_chunks()
        size = getattr(values.type, "list_size", None)
        columns[name] = values.to_pylist() if size is None else values.flatten().to_numpy().reshape(-1, size)
    return columns, table.schema


def test_folders_to_parquet(tiny, album, tmp_path):
    import csv

    import pyarrow as pa

    out = tmp_path / "out" / "vectors.parquet"
    summary = embed_paths(tiny, [album], out, progress=False)
    assert (summary.images, summary.embedded, summary.faces, summary.failures) == (13, 10, 10, 3)
    assert summary.out == out and summary.failures_file == tmp_path / "out" / "vectors.parquet.failures.csv"
    columns, schema = read_parquet(out)
    assert schema.field("vector").type == pa.list_(pa.float32(), WIDTH)
    assert schema.field("box").type == pa.list_(pa.float32(), 4)
    assert schema.field("face").type == pa.int32()
    images = [path for path in find_images([album]) if path.parent != album]
    assert columns["path"] == [str(path) for path in images]
    assert columns["face"] == [0] * 10
    np.testing.assert_allclose(columns["vector"], tiny.embed(images).vectors, atol=1e-6)
    assert sorted(columns["effective_resolution"]) == [28] * 2 + [112] * 8
    assert json.loads(schema.metadata[b"lrface_card"]) == tiny.card
    assert schema.metadata[b"lrface_model_sha256"].decode() == tiny.model_sha256
    assert json.loads(schema.metadata[b"lrface_settings"])["flip"] is False
    assert b"failures" not in schema.metadata
    with summary.failures_file.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"]
    assert sorted(row[0] for row in rows[1:]) == [
        str(album / n) for n in ("blank.png", "broken.jpg", "empty.png")
    ]
    assert all(row[1] for row in rows[1:])
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "vectors.parquet",
        "vectors.parquet.failures.csv",
    ]


def test_npz_holds_the_same(tiny, album, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_PART_IMAGES", 4)
    embed_paths(tiny, [album], tmp_path / "v.parquet", progress=False)
    embed_paths(tiny, [album], tmp_path / "v.npz", progress=False)
    columns, _ = read_parquet(tmp_path / "v.parquet")
    with np.load(tmp_path / "v.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {*columns, "metadata"}
        assert arrays["path"].tolist() == columns["path"]
        for name in ("vector", "box", "landmarks", "score", "effective_resolution", "face"):
            np.testing.assert_array_equal(arrays[name], np.asarray(columns[name], arrays[name].dtype))
        assert arrays["vector"].dtype == np.float32 and arrays["vector"].shape == (10, WIDTH)
        described = json.loads(str(arrays["metadata"]))
    assert described["lrface_model"] == "tiny" and json.loads(described["lrface_card"]) == tiny.card


def test_faces_of_one_photograph_are_numbered(tiny, people, tmp_path):
    photo = tmp_path / "people.png"
    photo.write_bytes(png(people))
    embed_paths(tiny, [photo], tmp_path / "v.parquet", faces="all", progress=False)
    columns, _ = read_parquet(tmp_path / "v.parquet")
    assert columns["path"] == [str(photo)] * 6 and columns["face"] == list(range(6))
    found = tiny.embed(people, faces="all")
    np.testing.assert_allclose(columns["landmarks"].reshape(-1, 5, 2), found.landmarks, atol=1e-3)
    np.testing.assert_allclose(columns["vector"], found.vectors, atol=1e-4)


def test_a_killed_run_goes_on_where_it_stopped(tiny, album, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_PART_IMAGES", 3)
    out = tmp_path / "v.parquet"
    embed_paths(tiny, [album], out, progress=False)
    whole, _ = read_parquet(out)
    out.unlink()

    tried = []
    original = intake._decode

    def decode(item):
        if stop_after is not None and len(tried) >= stop_after:
            raise KeyboardInterrupt
        tried.append(item.label)
        return original(item)

    monkeypatch.setattr(intake, "_decode", decode)
    stop_after = 8
    with pytest.raises(KeyboardInterrupt):
        embed_paths(tiny, [album], out, progress=False, workers=1)
    assert not out.exists()
    stop_after = None
    tried.clear()
    summary = embed_paths(tiny, [album], out, progress=False, workers=1)
    assert len(tried) == 13 - 6  # two parts of three were finished
    assert (summary.images, summary.embedded, summary.failures) == (13, 10, 3)
    again, _ = read_parquet(out)
    assert again["path"] == whole["path"]
    np.testing.assert_array_equal(again["vector"], whole["vector"])

    # Parts of another job are not taken: the same files, but one of them changed.
    stop_after = 8
    tried.clear()
    with pytest.raises(KeyboardInterrupt):
        embed_paths(tiny, [album], out, progress=False, workers=1)
    assert out.exists()  # the older result stays until the new one is whole
    (album / "b" / "1.png").write_bytes(png(crop(77)) + b" ")
    stop_after = None
    tried.clear()
    embed_paths(tiny, [album], out, progress=False, workers=1)
    assert len(tried) == 13
    changed, _ = read_parquet(out)
    row = changed["path"].index(str(album / "b" / "1.png"))
    np.testing.assert_allclose(changed["vector"][row], tiny.embed(crop(77)).vectors[0], atol=1e-6)


def test_other_settings_do_not_take_over_parts(tiny, album, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_PART_IMAGES", 3)
    out = tmp_path / "v.parquet"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(paths, "_merge", stop)
        with pytest.raises(KeyboardInterrupt):
            embed_paths(tiny, [album], out, progress=False)
    embed_paths(tiny, [album], out, flip=True, progress=False)
    columns, _ = read_parquet(out)
    np.testing.assert_allclose(columns["vector"], tiny.embed(columns["path"], flip=True).vectors, atol=1e-6)


def test_nothing_to_embed(tiny, tmp_path, album):
    out = tmp_path / "v.parquet"
    (tmp_path / "void").mkdir()
    for given in ([], [tmp_path / "void"], [tmp_path / "absent.jpg"]):
        with pytest.raises(LrfaceError, match="no images found in"):
            embed_paths(tiny, given, out, progress=False)
    out.write_text("older")
    with pytest.raises(LrfaceError, match="none of 2 images gave a face.*failures.csv has the reasons"):
        embed_paths(tiny, [album / "broken.jpg", album / "blank.png"], out, progress=False)
    assert out.read_text() == "older"
    assert len((tmp_path / "v.parquet.failures.csv").read_text().splitlines()) == 3
    with pytest.raises(UsageError, match=r"\.parquet or \.npz; found the ending '\.csv'"):
        embed_paths(tiny, [album], tmp_path / "v.csv", progress=False)


def test_a_file_named_itself_is_tried_and_counted_once(tiny, tmp_path):
    odd = tmp_path / "picture.data"
    odd.write_bytes(png(crop(0)))
    summary = embed_paths(tiny, [odd, tmp_path / "absent.png", odd], tmp_path / "v.parquet", progress=False)
    assert (summary.images, summary.faces, summary.failures) == (2, 1, 1)


def test_a_file_name_that_is_no_text(tiny, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    path = bytes(folder) + b"/caf\xe9.png"
    try:
        Path(str(path, "utf-8", "surrogateescape")).write_bytes(png(crop(0)))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    embed_paths(tiny, [folder], tmp_path / "v.parquet", progress=False)
    columns, _ = read_parquet(tmp_path / "v.parquet")
    assert columns["path"] == [f"{folder}/caf\\udce9.png"]


def test_progress_goes_to_standard_error(tiny, album, tmp_path, capsys):
    embed_paths(tiny, [album], tmp_path / "v.parquet")
    captured = capsys.readouterr()
    assert captured.out == "" and "13/13" in captured.err


# -------------------------------------------------------------------------------------------- real recogniser


def test_the_real_recogniser_tells_people_apart(shared):
    path = shared / "oracle" / "mobilefacenet_ms1m.onnx"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    embedder = load_embedder(path, threads=1)
    people = sorted(path for path in (shared / "data" / "celeba300_112").iterdir() if path.is_dir())[:10]
    chosen = [sorted(person.iterdir())[:4] for person in people]
    images = [image for those in chosen for image in those]
    labels = np.repeat(np.arange(len(chosen)), [len(those) for those in chosen])
    cosines = similarity(*[embedder.embed(images, flip=True)] * 2)
    same = labels[:, None] == labels[None, :]
    others = ~np.eye(len(labels), dtype=bool)
    assert np.median(cosines[same & others]) > 0.4
    assert np.median(cosines[~same]) < 0.2
    small = embedder.embed([np.asarray(Image.open(image).resize((14, 14))) for image in images[:8]])
    assert small.effective_resolution.tolist() == [14] * 8
