"""LFW without lrface: an ONNX face network, aligned crops, the official pairs, and nothing but ONNX Runtime, OpenCV,
NumPy and pyarrow. A second opinion on what `lrface verify` says.

    lrface align DATA/lfw/images lfw_aligned
    lrface export shipped --to onnx --out shipped.onnx
    python eval/lfw_onnxruntime.py shipped.onnx lfw_aligned DATA/lfw/pairs.txt

Both faces at 112, 56, 28 and 14 pixels, then 112 against each smaller size: nearest down, bilinear up, the features of a
face and of its mirror image added, cosine, the best threshold of nine folds on the tenth. Prints JSON, percent.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pyarrow as pa

SIZES = (112, 56, 28, 14)


def read_crops(folder: Path) -> dict[str, np.ndarray]:
    """Photograph (NAME/NAME_0001.jpg) -> its crop, uint8 [112, 112, 3] RGB."""
    crops: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(shard)) as file:
            table = pa.ipc.open_file(file).read_all()
            for source, image in zip(table["source"].to_pylist(), table["image"].to_pylist(), strict=True):
                decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
                crops[source] = cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)
    return crops


def read_pairs(file: Path) -> list[tuple[str, str, bool]]:
    """LFW's pairs.txt: ten folds, each of same and then of different people."""
    lines = [line.split() for line in file.read_text().splitlines()[1:] if line.strip()]

    def photograph(name: str, number: str) -> str:
        return f"{name}/{name}_{int(number):04d}.jpg"

    pairs = []
    for words in lines:
        if len(words) == 3:
            name, first, second = words
            pairs.append((photograph(name, first), photograph(name, second), True))
        else:
            name, first, other, second = words
            pairs.append((photograph(name, first), photograph(other, second), False))
    return pairs


def at_size(crop: np.ndarray, size: int) -> np.ndarray:
    """float32 [3, 112, 112] in [0, 1] of a crop brought down to ``size`` and up again."""
    image = crop.astype(np.float32) / 255
    if size != len(crop):
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_NEAREST)
        image = cv2.resize(image, crop.shape[:2], interpolation=cv2.INTER_LINEAR)
    return image.transpose(2, 0, 1)


def embed(session: onnxruntime.InferenceSession, images: list[np.ndarray]) -> np.ndarray:
    """Unit vectors [n, d]."""
    name = session.get_inputs()[0].name
    features = []
    for start in range(0, len(images), 32):
        batch = np.stack(images[start : start + 32])
        mirrored = np.ascontiguousarray(batch[..., ::-1])
        features.append(session.run(None, {name: batch})[0] + session.run(None, {name: mirrored})[0])
    found = np.concatenate(features)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """Of the thresholds that are right most often, the middle one."""
    order = np.argsort(scores)
    scores, same = scores[order], same[order]
    # Refusing the k smallest scores: the different among those are right, and the same among the others.
    right = np.concatenate(([0], np.cumsum(~same))) + np.concatenate((np.cumsum(same[::-1])[::-1], [0]))
    edges = np.concatenate(([-2], scores, [2]))
    apart = np.flatnonzero((edges[1:] > edges[:-1]) & (right == right.max()))
    k = apart[(len(apart) - 1) // 2]
    return float((edges[k] + edges[k + 1]) / 2)


def accuracy(scores: np.ndarray, same: np.ndarray) -> float:
    """Percent, mean of ten folds of consecutive pairs."""
    fold = np.arange(len(scores)) * 10 // len(scores)
    right = []
    for number in range(10):
        threshold = best_threshold(scores[fold != number], same[fold != number])
        test = fold == number
        right.append(np.mean((scores[test] >= threshold) == same[test]))
    return 100 * float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help=".onnx: float32 [n, 3, 112, 112] RGB in [0, 1] -> [n, d]")
    parser.add_argument("aligned", type=Path, help="what `lrface align` made of LFW")
    parser.add_argument("pairs", type=Path, help="LFW's pairs.txt")
    found = parser.parse_args()
    for path in (found.model, found.aligned, found.pairs):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    session = onnxruntime.InferenceSession(str(found.model), providers=["CPUExecutionProvider"])
    crops, pairs = read_crops(found.aligned), read_pairs(found.pairs)
    names = sorted({name for first, second, _ in pairs for name in (first, second)})
    place = {name: number for number, name in enumerate(names)}
    first = np.array([place[pair[0]] for pair in pairs])
    second = np.array([place[pair[1]] for pair in pairs])
    same = np.array([pair[2] for pair in pairs])
    vectors = {size: embed(session, [at_size(crops[name], size) for name in names]) for size in SIZES}
    figures = {}
    for gallery, probe in [(size, size) for size in SIZES] + [(SIZES[0], size) for size in SIZES[1:]]:
        scores = np.sum(vectors[gallery][first] * vectors[probe][second], axis=1)
        figures[f"{gallery}x{probe}"] = round(accuracy(scores, same), 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
