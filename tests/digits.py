"""Real handwritten digits, those of scikit-learn, as MNIST's files: what the tests of grey images train on."""

import gzip
import struct
from pathlib import Path

import cv2
import numpy as np


def digits(count: int = 1797) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 28, 28] and uint8 labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = [cv2.resize(image, (20, 20), interpolation=cv2.INTER_CUBIC) for image in found.images[:count]]
    pixels = np.pad(np.stack(images), ((0, 0), (4, 4), (4, 4)))
    return np.clip(pixels * (255 / 16), 0, 255).round().astype(np.uint8), found.target[:count].astype(
        np.uint8
    )


def write_idx(path: Path, array: np.ndarray) -> Path:
    """An IDX file of unsigned bytes, gzipped where the name ends in .gz."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_mnist(root: Path, train: int = 1200, test: int = 300, suffix: str = ".gz") -> Path:
    """ROOT/mnist/train and ROOT/mnist/test, as data_prep/mnist.py puts them."""
    images, labels = digits(train + test)
    for split, name, part in (
        ("train", "train", slice(0, train)),
        ("test", "t10k", slice(train, train + test)),
    ):
        folder = root / "mnist" / split
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images[part])
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", labels[part])
    return root
