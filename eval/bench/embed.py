"""From images to vectors: `load_embedder(...).embed` against what one writes without it.

embed_onnx: 1,000 aligned faces in memory, uint8, batch 64. The peer is ONNX Runtime alone on the same file, in its own
session with as many threads, and is handed float32 batches of 64 that are ready; lrface converts the faces, estimates
their effective resolution, scales vectors to unit length and tells quality within its time.

embed_bf16: the same call on an IR-50 in PyTorch, precision "bfloat16" against "float32" (and ``mobilefacenet``: the
same ratio for the small network, whose depthwise convolutions gain less).

embed_photos: photographs of LFW to vectors, against facenet-pytorch called face by face: open a photograph, ``MTCNN()
.detect(image, landmarks=True)``, cut the face out, run the same network on it alone. lrface is given the paths.

Both take their turns; the median of each counts, and of the ratios of the turns. Needs
``../shared/oracle/mobilefacenet_ms1m.onnx``, and the photographs of LFW in ``$LRFACE_DATA`` or ``../shared/data``.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = ("embed_onnx", "embed_bf16", "embed_photos")
THREADS, BATCH = 2, 64
SHARED = Path(__file__).resolve().parents[3] / "shared"
ORACLE = SHARED / "oracle" / "mobilefacenet_ms1m.onnx"


def run(
    faces: int = 1000,
    photographs: int = 400,
    rounds: int = 5,
    names: Sequence[str] = NAMES,
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Rows of the benchmark; ``ours`` and ``peer`` in images a second, the ratio is ours / peer."""
    import cv2

    torch.set_num_threads(THREADS)
    cv2.setNumThreads(THREADS)
    if quick:
        faces, photographs, rounds = 128, 32, 2
    if not ORACLE.is_file():
        raise SystemExit(f"the embedder's figures need {ORACLE}")
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "embed_onnx": lambda: _onnx(faces, rounds),
        "embed_bf16": lambda: _bf16(faces // 4, rounds),
        "embed_photos": lambda: _photos(photographs, max(2, rounds - 2)),
    }
    return [
        {"name": name, "unit": "images/s", "threads": THREADS, **measures[name]()}
        for name in NAMES
        if name in names
    ]


def _turns(ours: Callable[[], None], peer: Callable[[], None], images: int, rounds: int) -> dict[str, Any]:
    rates: list[tuple[float, float]] = []
    for number in range(rounds):
        seconds = {}
        for turn in (ours, peer) if number % 2 == 0 else (peer, ours):
            started = time.perf_counter()
            turn()
            seconds[turn] = time.perf_counter() - started
        rates.append((images / seconds[ours], images / seconds[peer]))
    return {
        "ours": round(statistics.median(rate for rate, _ in rates), 2),
        "peer": round(statistics.median(rate for _, rate in rates), 2),
        "ratio": round(statistics.median(rate / other for rate, other in rates), 3),
        "images": images,
        "rounds": rounds,
    }


def _crops(count: int) -> np.ndarray:
    """Faces with the detail of photographs: uint8 [n, 112, 112, 3]."""
    from lrface.align.pipeline import read_photo
    from lrface.align.warp import central_landmarks, warp_face

    paths = _photographs(count)
    images = [read_photo(path) for path in paths]
    return np.stack([warp_face(image, central_landmarks(*image.shape[:2])) for image in images])


def _photographs(count: int) -> list[Path]:
    from lrface.benchmarks.locate import data_roots

    places = [root / "lfw" / "images" for _, root in data_roots()] + [SHARED / "data" / "lfw" / "images"]
    for place in places:
        if place.is_dir():
            paths = sorted(place.glob("*/*.jpg"))
            return paths[:: max(1, len(paths) // count)][:count]
    raise SystemExit(
        f"the photographs of LFW were not found in {', '.join(map(str, places))}; set LRFACE_DATA"
    )


def _session() -> Callable[[np.ndarray], np.ndarray]:
    """ONNX Runtime alone: float32 [n, 3, 112, 112] -> [n, d]."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(ORACLE), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _onnx(count: int, rounds: int) -> dict[str, Any]:
    from lrface.embed import load_embedder

    crops = _crops(count)
    embedder = load_embedder(ORACLE, colour="RGB", threads=THREADS)
    ready = np.ascontiguousarray(crops.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
    alone = _session()

    def ours() -> None:
        embedder.embed(crops, kind="crop", batch_size=BATCH)

    def peer() -> None:
        for start in range(0, count, BATCH):
            alone(ready[start : start + BATCH])

    theirs = alone(ready[:BATCH])
    cosine = (embedder.embed(crops[:BATCH], kind="crop").vectors * theirs).sum(1) / np.linalg.norm(
        theirs, axis=1
    )
    assert cosine.min() > 0.9999, "the two do not compute the same"
    return _turns(ours, peer, count, rounds)


def _bf16(count: int, rounds: int) -> dict[str, Any]:
    crops = _crops(count)
    row = _bf16_network("ir50", crops, rounds)
    small = _bf16_network("mobilefacenet", crops, rounds)
    return {**row, "mobilefacenet": {key: small[key] for key in ("ours", "peer", "ratio")}}


def _bf16_network(name: str, crops: np.ndarray, rounds: int) -> dict[str, Any]:
    from lrface.embed import load_embedder
    from lrface.models import build_backbone
    from lrface.train.checkpoint import make_card, save_model

    torch.manual_seed(0)
    encoder = build_backbone(name).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", encoder, make_card({"name": name, "arguments": {}}, encoder, {}))
        exact, coarse = (
            load_embedder(Path(folder) / "model", precision=precision)
            for precision in ("float32", "bfloat16")
        )

    def embed(embedder: Any) -> Any:
        return embedder.embed(crops, kind="crop", batch_size=BATCH).vectors

    agreement = (embed(exact)[:16] * embed(coarse)[:16]).sum(1).min()
    row = _turns(lambda: embed(coarse), lambda: embed(exact), len(crops), rounds)
    return {**row, "network": name, "least_cosine": round(float(agreement), 5)}


def _photos(count: int, rounds: int) -> dict[str, Any]:
    from facenet_pytorch import MTCNN
    from PIL import Image

    from lrface.align.warp import warp_face
    from lrface.embed import load_embedder

    paths = _photographs(count)
    embedder = load_embedder(ORACLE, colour="RGB", threads=THREADS)
    detector, alone = MTCNN(), _session()
    found: dict[str, int] = {}

    def ours() -> None:
        found["ours"] = len(embedder.embed(paths, kind="photo", batch_size=BATCH, on_error="skip"))

    def peer() -> None:
        faces = 0
        for path in paths:
            image = Image.open(path).convert("RGB")
            boxes, _, landmarks = detector.detect(image, landmarks=True)
            if boxes is None:
                continue
            crop = warp_face(np.asarray(image), landmarks[0])
            vector = alone(crop.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))[0]
            faces += bool(np.linalg.norm(vector) > 0)
        found["peer"] = faces

    embedder.embed(paths[:8], kind="photo", on_error="skip")
    detector.detect(Image.open(paths[0]).convert("RGB"), landmarks=True)
    row = _turns(ours, peer, len(paths), rounds)
    return {**row, "faces_ours": found["ours"], "faces_peer": found["peer"]}
