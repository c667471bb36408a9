"""Features kept on disk by what they are made from, so that a second test of the same model is instant.

A store belongs to one model and one way of preparing images; in it every image is found by a hash of its pixels. Each
call that computed something new adds one file.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.files import atomic_file

HASH_BYTES = 16


def image_hashes(images: NDArray[np.uint8]) -> NDArray[np.void]:
    """A hash of each image's pixels: void16 [n] of uint8 [n, h, w, 3]. Shape counts."""
    start = hashlib.blake2b(str(images.shape[1:]).encode(), digest_size=HASH_BYTES)
    digests = []
    for image in images:
        digest = start.copy()
        digest.update(np.ascontiguousarray(image).data)
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), dtype=f"V{HASH_BYTES}")


class FeatureStore:
    """Features float32 [d] by image hash, for one model and one way of preparing images.

    Args:
        root: folder that holds all stores.
        model: hash of the model's weights.
        preparation: everything else that a feature depends on, as JSON values.

    A file that cannot be read is passed over: what was in it is computed again.
    """

    def __init__(self, root: str | Path, model: str, preparation: Mapping[str, Any]):
        description = json.dumps({"model": model, **preparation}, sort_keys=True)
        self.folder = Path(root) / hashlib.sha256(description.encode()).hexdigest()[:32]
        self.description = description
        self._rows: dict[bytes, int] = {}
        self._features: list[NDArray[np.float32]] = []
        for path in sorted(self.folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as stored:
                    hashes, features = stored["hashes"], stored["features"]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue
            if hashes.dtype != f"V{HASH_BYTES}" or features.ndim != 2 or len(hashes) != len(features):
                continue
            self._add(hashes, features)

    def _add(self, hashes: NDArray[np.void], features: NDArray[np.float32]) -> None:
        start = len(self._features)
        self._features += list(features)
        self._rows.update((value.tobytes(), start + row) for row, value in enumerate(hashes))

    def __len__(self) -> int:
        return len(self._rows)

    def known(self, hashes: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which images have a feature: bool [n]."""
        return np.array([value.tobytes() in self._rows for value in hashes], dtype=bool)

    def get(self, hashes: NDArray[np.void]) -> NDArray[np.float32]:
        """Features [n, d] of known images."""
        return np.stack([self._features[self._rows[value.tobytes()]] for value in hashes])

    def put(self, hashes: NDArray[np.void], features: NDArray[np.float32]) -> None:
        """Keep new features; on disk whole or not at all."""
        if len(hashes) == 0:
            return
        self._add(hashes, features)
        readme = self.folder / "what.json"
        if not readme.exists():
            with atomic_file(readme) as aside:
                aside.write_text(self.description + "\n", encoding="utf-8")
        name = hashlib.sha256(hashes.tobytes()).hexdigest()[:32]
        with atomic_file(self.folder / f"{name}.npz") as aside, open(aside, "wb") as file:
            np.savez(file, hashes=hashes, features=features)
