"""Small galleries for tests: vectors of made-up people, and a search of files for bytes."""

from pathlib import Path

import numpy as np

from lrface.gallery import Gallery
from lrface.gallery.faces import EnrolledFaces
from lrface.gallery.folder import FolderStore

WIDTH = 24
HEADER = {
    "model": {"name": "made up", "sha256": "0", "embedding_size": WIDTH, "input": None, "output": None},
    "pooling": "mean",
    "flip": True,
    "index": "auto",
}


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Unit vectors float32 [count, width]."""
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def faces(names: list[str], rows: np.ndarray, seed: int = 0) -> EnrolledFaces:
    random = np.random.default_rng(seed)
    hashes = [random.bytes(32) for _ in names]
    paths = [f"/photographs/{name}/{number:04d}.jpg" for number, name in enumerate(names)]
    ones = np.ones(len(names), np.float32)
    return EnrolledFaces(list(names), hashes, paths, rows, ones, 112 * ones)


def new_gallery(folder: Path, **settings) -> Gallery:
    """An empty gallery of made-up vectors, without a model."""
    return Gallery(FolderStore.create(folder, {**HEADER, **settings}), str(folder), None)


def files_with(folder: Path, content: bytes) -> list[str]:
    """Names of the files below ``folder`` that hold ``content``."""
    return sorted(
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and content in file.read_bytes()
    )


def traces(each: EnrolledFaces) -> dict[str, bytes]:
    """What must not be left of these faces, in bytes: also any six neighbouring numbers of a vector."""
    found = {}
    for number, name in enumerate(each.names):
        found[f"name {name}"] = name.encode()
        found[f"path {number}"] = each.paths[number].encode()
        found[f"hash {number}"] = each.sha256[number]
        for start in range(0, each.vectors.shape[1], 6):
            found[f"vector {number} at {start}"] = each.vectors[number, start : start + 6].tobytes()
    return found
