"""SCRFD and RetinaFace files, against networks made here: nothing of insightface's may be shipped."""

import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from lrface.align.onnx_detector import OnnxDetector, suppress
from lrface.align.pipeline import align_folder
from lrface.cli import app
from lrface.data.packed import PackedSource
from lrface.embed import load_embedder
from lrface.errors import LrfaceError, UsageError

onnx = pytest.importorskip("onnx", reason="networks for the test are built with onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SCRFD, RETINA = ((8, 16, 32), 2), ((8, 16, 32, 64, 128), 1)
WIDTHS = (1, 4, 10)

# Five points of a planted face about its middle, in pixels.
POINTS = np.array([[-14, -14], [14, -14], [0, 0], [-12, 15], [12, 15]], np.float32)
REACH = (24, 26, 24, 28)  # left, top, right, bottom of its box
DOT = 3


def write_network(path, layers, widths=WIDTHS, side=None, leading=False, channels=3, batch=1):
    """An ONNX file with one output for each of ``widths`` and each (stride, anchors, {width: (weight, bias)}) of
    ``layers``: a convolution of the image, laid out position by position as insightface exports it."""
    nodes, stored, outputs = [], [], []
    for width in widths:
        for stride, anchors, weights in layers:
            name = f"out_{width}_{stride}"
            weight, bias = weights[width]
            assert weight.shape[0] == anchors * width
            pad = (weight.shape[2] - 1) // 2 if weight.shape[2] % 2 else 0
            shape = np.array([1, -1, width] if leading else [-1, width])
            for key, value in (("w", weight), ("b", bias), ("s", shape)):
                kind = np.int64 if key == "s" else np.float32
                stored.append(numpy_helper.from_array(value.astype(kind), f"{name}_{key}"))
            nodes += [
                helper.make_node(
                    "Conv",
                    ["image", f"{name}_w", f"{name}_b"],
                    [f"{name}_conv"],
                    strides=[stride, stride],
                    pads=[pad] * 4,
                ),
                helper.make_node("Transpose", [f"{name}_conv"], [f"{name}_rows"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{name}_rows", f"{name}_s"], [f"{name}_flat"]),
                helper.make_node({1: "Sigmoid", 4: "Abs"}.get(width, "Identity"), [f"{name}_flat"], [name]),
            ]
            outputs.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, width][not leading :])
            )
    size = ["h", "w"] if side is None else [side, side]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, channels, *size])
    graph = helper.make_graph(nodes, "detector", [image], outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def matched_filter(anchors=2):
    """Finds planted faces at stride 8: the mean of five dots against what lies around, in the red channel."""
    middle, size = 24, 49
    dots = np.zeros((size, size), np.float32)
    for x, y in POINTS.astype(int):
        dots[middle + y - DOT : middle + y + DOT + 1, middle + x - DOT : middle + x + DOT + 1] = 1
    kernel = dots / dots.sum() - (1 - dots) / (1 - dots).sum()
    weight = np.zeros((anchors, 3, size, size), np.float32)
    weight[0, 0] = 20 * kernel  # the second anchor stays silent
    bias = np.array([-20.0] + [-50.0] * (anchors - 1))
    box, points = np.array(REACH) / 8, POINTS.reshape(-1) / 8
    constant = {width: np.zeros((anchors * width, 3, 1, 1)) for width in (4, 10)}
    return {
        1: (weight, bias),
        4: (constant[4], np.tile(box, anchors)),
        10: (constant[10], np.tile(points, anchors)),
    }


def silent(anchors):
    return {
        width: (np.zeros((anchors * width, 3, 1, 1)), np.full(anchors * width, -50.0 if width == 1 else 1.0))
        for width in WIDTHS
    }


def random_layers(strides, anchors, seed=0, spread=6.0):
    """Boxes, landmarks and scores that all depend on the image; a few per cent of scores are above a half."""
    random = np.random.default_rng(seed)
    layers = []
    for stride in strides:
        weights = {}
        for width, scale, bias in ((1, spread, -4.0), (4, 1.0, 2.5), (10, 1.0, 0.0)):
            weight = random.normal(0, scale / stride, (anchors * width, 3, stride, stride))
            weights[width] = (weight, np.full(anchors * width, bias) + random.normal(0, 0.2, anchors * width))
        layers.append((stride, anchors, weights))
    return layers


def planted(places, height=640, width=640):
    image = np.full((height, width, 3), (20, 60, 90), np.uint8)
    for x, y in places:
        for dx, dy in POINTS:
            cv2.rectangle(
                image,
                (int(x + dx) - DOT, int(y + dy) - DOT),
                (int(x + dx) + DOT, int(y + dy) + DOT),
                (250, 60, 90),
                -1,
            )
    return image


@pytest.fixture(scope="module")
def planted_model(tmp_path_factory):
    layers = [(8, 2, matched_filter()), (16, 2, silent(2)), (32, 2, silent(2))]
    return write_network(tmp_path_factory.mktemp("model") / "planted.onnx", layers)


def test_planted_faces_are_found_where_they_are(planted_model):
    places = [(96, 120), (304, 200), (520, 560)]
    detector = OnnxDetector(planted_model)
    assert detector.family == "SCRFD"
    found = detector.detect([planted(places), planted([]), planted(places[:1], 640, 320)])
    assert [len(faces) for faces in found] == [3, 0, 1]
    by_place = sorted(found[0], key=lambda face: face.box[0])
    for face, place in zip(by_place, places, strict=True):
        assert face.score > 0.9 and face.box.dtype == face.landmarks.dtype == np.float32
        np.testing.assert_allclose(face.landmarks, place + POINTS, atol=0.01)
        left, top, right, bottom = REACH
        expected = [place[0] - left, place[1] - top, place[0] + right, place[1] + bottom]
        np.testing.assert_allclose(face.box, expected, atol=0.01)
    np.testing.assert_allclose(found[2][0].landmarks, np.array(places[0]) + POINTS, atol=0.01)


def test_coordinates_are_those_of_the_photograph(planted_model):
    """A photograph of 320 x 240 is searched at twice the size."""
    half = cv2.resize(planted([(304, 200)], 480, 640), (320, 240), interpolation=cv2.INTER_AREA)
    (face,) = OnnxDetector(planted_model).detect([half])[0]
    np.testing.assert_allclose(face.landmarks, (np.array([304, 200]) + POINTS) / 2, atol=0.01)


def test_a_second_look_with_room_around(planted_model):
    """The face is cut by the edge, where no anchor responds enough; mirrored room does not help, its own does."""
    image = planted([(320, 320)])[296:352, 296:344]
    whole = cv2.resize(image, None, fx=8, fy=8, interpolation=cv2.INTER_NEAREST)
    looks = []
    detector = OnnxDetector(planted_model)
    search = detector._search
    detector._search = lambda image: looks.append(image.shape[:2]) or search(image)
    detector.detect([whole])
    border = min(whole.shape[:2]) // 2
    assert looks == [whole.shape[:2], (whole.shape[0] + 2 * border, whole.shape[1] + 2 * border)]
    detector.second_look = False
    assert detector.detect([whole]) == [[]] and len(looks) == 3


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("side", [None, 256])
@pytest.mark.parametrize("strides, anchors", [SCRFD, RETINA])
def test_the_same_as_insightface(tmp_path, six_faces, strides, anchors, side, leading):
    """Same file, same photograph: same boxes, scores and landmarks in the same order."""
    scrfd = pytest.importorskip("insightface.model_zoo.scrfd", reason="insightface is not installed")
    path = write_network(
        tmp_path / "random.onnx", random_layers(strides, anchors), side=side, leading=leading
    )
    peer = scrfd.SCRFD(model_file=str(path))
    peer.prepare(-1)
    ours = OnnxDetector(path)
    total = 0
    # No larger than twice 128 pixels: more is shrunk by averages here, by skipping pixels there.
    for photo in (
        cv2.resize(six_faces, (250, 173)),
        six_faces[100:350, 50:250],
        cv2.resize(six_faces, (90, 130)),
    ):
        boxes, points = peer.detect(photo[:, :, ::-1].copy())
        found = ours.detect([np.ascontiguousarray(photo)])[0]
        assert len(found) == len(boxes)
        total += len(found)
        for face, box, landmarks in zip(found, boxes, points, strict=True):
            np.testing.assert_allclose(face.box, box[:4], atol=0.01)
            np.testing.assert_allclose(face.score, box[4], atol=1e-4)
            np.testing.assert_allclose(face.landmarks, landmarks, atol=0.01)
    assert total > 30


def test_suppression_by_hand():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 4], [0, 5, 9, 9], [30, 30, 39, 39], [1, 0, 10, 9]], np.float32)
    # Overlaps with the first: 0.5, 0.5, 0, 9 / 11; in the order given.
    assert suppress(boxes, 0.4).tolist() == [0, 3]
    assert suppress(boxes, 0.5).tolist() == [0, 1, 2, 3]
    assert suppress(boxes[:0], 0.4).tolist() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (1, 4)}, "6 outputs, as SCRFD without landmarks, which alignment needs.*bnkps"),
        ({"widths": (1,)}, "no known family: it has 3 outputs.*SCRFD has 9 outputs; RetinaFace has 15"),
        ({"widths": (4, 1, 10)}, r"output 0 \(out_4_8\) has shape .*as SCRFD it should be \[n, 1\]"),
        ({"side": 250}, "takes images of 250 x 250 pixels; sides should be multiples of 32"),
        ({"batch": 4}, r"takes image tensor\(float\) \[4, 3, .*takes one image"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, options, message):
    path = write_network(tmp_path / "other.onnx", [(stride, 2, silent(2)) for stride in SCRFD[0]], **options)
    with pytest.raises(LrfaceError, match=f"other.onnx: .*{message}"):
        OnnxDetector(path)


def test_outputs_that_do_not_fit_the_family(tmp_path):
    """One anchor a position where SCRFD has two."""
    path = write_network(tmp_path / "one.onnx", [(stride, 1, silent(1)) for stride in SCRFD[0]])
    with pytest.raises(LrfaceError, match="at stride 8 it gives 256 scores.*SCRFD gives 512 of each"):
        OnnxDetector(path).detect([np.zeros((50, 50, 3), np.uint8)])


def test_files_that_are_no_models(tmp_path):
    with pytest.raises(LrfaceError, match="gone.onnx: no such file"):
        OnnxDetector(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(LrfaceError, match="text.onnx: is no ONNX model"):
        OnnxDetector(tmp_path / "text.onnx")


@pytest.fixture
def photographs(tmp_path):
    places = {"anna": (304, 200), "bob": (96, 480)}
    for name, place in places.items():
        for number in range(3):
            folder = tmp_path / "src" / name
            folder.mkdir(parents=True, exist_ok=True)
            image = planted([(place[0] + 8 * number, place[1])])
            cv2.imwrite(str(folder / f"{number}.png"), image[:, :, ::-1])
    return tmp_path / "src"


def test_aligning_with_a_model(tmp_path, photographs, planted_model):
    out = tmp_path / "out"
    summary = align_folder(photographs, out, detector_model=planted_model, workers=2, show_progress=False)
    assert summary.aligned == 6
    source = PackedSource(out)
    expected = np.array([[304 + 8 * n, 200] for n in range(3)] + [[96 + 8 * n, 480] for n in range(3)])
    np.testing.assert_allclose(source.column("landmarks"), expected[:, None] + POINTS, atol=0.01)
    settings = source.index["align"]["settings"]
    assert settings["detector"] == "onnx" and len(settings["detector_sha256"]) == 64
    assert settings["min_score"] == 0.5
    again = align_folder(photographs, out, detector_model=planted_model, workers=1, show_progress=False)
    assert again.reused == 6


def test_another_model_does_not_go_on(tmp_path, photographs, planted_model):
    out = tmp_path / "out"
    align_folder(photographs, out, detector_model=planted_model, workers=1, show_progress=False)
    other = write_network(tmp_path / "other.onnx", random_layers(*SCRFD))
    with pytest.raises(UsageError, match="begun with detector_sha256 '.*', now it is '"):
        align_folder(photographs, out, detector_model=other, workers=1, show_progress=False)
    with pytest.raises(UsageError, match="begun with detector 'onnx', now it is 'mtcnn'"):
        align_folder(photographs, out, workers=1, show_progress=False)


def test_settings_of_the_other_detector(tmp_path, photographs, planted_model):
    with pytest.raises(UsageError, match="min_face_size is a setting of MTCNN"):
        align_folder(photographs, tmp_path / "out", detector_model=planted_model, min_face_size=30)
    with pytest.raises(UsageError, match="min_score must be between 0 and 1"):
        OnnxDetector(planted_model, min_score=1.0)
    with pytest.raises(LrfaceError, match="gone.onnx: cannot be read: No such file"):
        align_folder(photographs, tmp_path / "out", detector_model=tmp_path / "gone.onnx")
    assert not (tmp_path / "out").exists()


def test_photographs_are_embedded_with_a_model(tmp_path, photographs, planted_model):
    """What is embedded, where no face is and no fallback asked for, and that settings name the model."""
    pooled = helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28])
    flat = helper.make_node("Flatten", ["pooled"], ["embedding"])
    kinds = [("image", ["n", 3, 112, 112]), ("embedding", ["n", 48])]
    image, embedding = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in kinds
    )
    graph = helper.make_graph([pooled, flat], "tiny", [image], [embedding])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "tiny.onnx")
    embedder = load_embedder(tmp_path / "tiny.onnx", detector_model=planted_model)
    found = embedder.embed([photographs / "anna/0.png", photographs / "bob/0.png"])
    np.testing.assert_allclose(found.landmarks[0], np.array([304, 200]) + POINTS, atol=0.01)
    with pytest.raises(LrfaceError, match="no face found in 300 x 200 pixels"):
        embedder.embed(planted([], 200, 300))
    middle = embedder.embed(planted([], 200, 300), fallback="center")
    assert middle.score.tolist() == [0] and middle.box.tolist() == [[50, 0, 250, 200]]
    assert middle.effective_resolution[0] == pytest.approx(200, rel=1e-5)
    described = embedder._settings()["detector"]
    assert described["detector"] == "onnx" and len(described["detector_sha256"]) == 64
    with pytest.raises(UsageError, match="fallback must be one of skip, center; found 'grey'"):
        embedder.embed(planted([]), fallback="grey")


def test_the_commands(tmp_path, photographs, planted_model):
    """lrface align with a model and a fallback, as a user calls it."""
    cv2.imwrite(str(photographs / "bob/nothing.png"), planted([], 60, 90))
    out = tmp_path / "out"
    command = ["align", photographs, out, "--detector-model", planted_model, "--workers", "1", "--json"]
    result = CliRunner().invoke(app, [str(part) for part in [*command, "--fallback", "center"]])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["aligned"], summary["fallback"], summary["faces"]) == (6, 1, 7)
    assert (PackedSource(out).column("score") == 0).sum() == 1
    result = CliRunner().invoke(app, [str(part) for part in [*command, "--fallback", "grey"]])
    assert result.exit_code == 2 and "there are skip, center" in result.stderr
    result = CliRunner().invoke(app, [str(part) for part in [*command, "--min-face-size", "30"]])
    assert result.exit_code == 2 and "a setting of MTCNN" in result.stderr
