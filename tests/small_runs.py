"""Small recipes on drawn pictures: what the tests of recipes/*.py have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, equal

from lrface import config, recipes
from lrface.train.checkpoint import load_parts

TRAINER = {
    "device": "cpu",
    "precision": "float32",
    "tensorboard": False,
    "sheet_every": 0,
    "threads": 1,
}
IREVNET = {
    "name": "irevnet",
    "blocks": [1, 1, 1],
    "strides": [1, 2, 2],
    "channels": [4, 16, 64],
    "input_size": 32,
}


def draw_pictures(root: Path) -> Path:
    """16 pictures of 32 pixels of 4 classes, in ROOT/pictures/CLASS; gives ROOT."""
    for number in range(16):
        folder = root / "pictures" / f"class {number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((32, 32)).save(folder / f"{number}.png")
    return root


def run(recipe: config.Recipe, data: Path, out: Path, **options) -> list[str]:
    """Run the recipe; gives what it said."""
    recipe.out = str(out)
    said: list[str] = []
    recipes.run_recipe(recipe, data=data, show_progress=False, say=said.append, **options)
    return said


class Killed(BaseException):
    """What nothing catches."""


@contextmanager
def killed_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run inside ends without cleaning up where its batch of this number, from 0, would come."""
    original = recipes.batches

    def until_killed(*arguments, **named):
        for number, content in enumerate(original(*arguments, **named)):
            if number == batch:
                raise Killed
            yield content

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(recipes, "batches", until_killed)
        yield


def last(run: Path, stage: str, steps: int | None = None) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint of a stage, or of that of a step."""
    folder = run / "stages" / stage
    return load_parts(max(folder.glob("step-*")) if steps is None else folder / f"step-{steps:08d}")


def of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all tensors are the same to the bit."""
    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
