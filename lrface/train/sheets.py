"""Sample sheets: the same faces through training, clean, as the encoder sees them, and as the decoder restores them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrface.data.dataset import as_float, batch_seed, fit_image
from lrface.data.sheet import SheetRow, draw_sheet
from lrface.data.source import FaceSource
from lrface.errors import LrfaceError
from lrface.methods.base import Method, degrade_batch
from lrface.train.observe import Observer, can_draw

FACES = 8
DRAWS = 8  # degradations drawn for each face, of which the sheet shows one


class SampleSheets(Observer):
    """Writes ``samples/step-00001000.png`` into the stage's folder: at step 0 and every ``every`` steps.

    Args:
        every: steps between sheets.
        source: whose faces are shown: up to 8 of different identities, always the same ones.
        size: side of the network's input in pixels.
        seed: of the choice and of the degradations, which are the same on every sheet of a stage.
        title: what stands above.
        steps: of the whole stage; there is a sheet of the last one too.
        device, autocast: where and in which precision the networks run: those of training.
        main: False in the further processes of a distributed run: they compute and write nothing.
        say: is told why there are no sheets: no face can be read, or matplotlib is missing.
    """

    def __init__(
        self,
        every: int,
        source: FaceSource,
        size: int,
        seed: int,
        title: str = "",
        steps: int | None = None,
        device: torch.device | str = "cpu",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        main: bool = True,
        say: Callable[[str], None] = lambda message: None,
    ):
        self.every = every
        self.source = source
        self.size = size
        self.seed = seed
        self.title = title
        self.steps = steps
        self.device = device
        self.autocast = autocast
        self.main = main
        self.say = say
        self._faces: tuple[list[str], NDArray[np.uint8]] | None = None
        self._folder: Path | None = None
        self._drawing = True

    def begin(self, step: int, method: Method, folder: Path) -> None:
        self._folder = folder
        self._drawing = can_draw()
        if not self._drawing:
            self.say("sample sheets: matplotlib is missing, so there are none")
        elif step == 0:
            self._draw(0, method)

    def after_step(self, step: int, method: Method) -> bool:
        if self._drawing and (step % self.every == 0 or step == self.steps):
            self._draw(step, method)
        return False

    def _draw(self, step: int, method: Method) -> None:
        assert self._folder is not None
        if self._faces is None:
            self._faces = pick_faces(self.source, FACES, self.size, self.seed)
            if not len(self._faces[1]):
                self.say("sample sheets: none of the faces tried can be read; `lrface data check` lists why")
        names, images = self._faces
        if not len(images):
            return
        rows, columns = sample_rows(method, names, images, self.seed, self.device, self.autocast)
        if not self.main:
            return
        draw_sheet(
            self._folder / "samples" / f"step-{step:08d}.png",
            self.title,
            f"after {step} steps; degradations as in training, the same on every sheet",
            rows,
            columns,
        )


def pick_faces(source: FaceSource, count: int, size: int, seed: int) -> tuple[list[str], NDArray[np.uint8]]:
    """Up to ``count`` readable faces of different identities: their names and images uint8 [k, size, size, 3]."""
    random = np.random.default_rng(seed)
    names: list[str] = []
    images: list[NDArray[np.uint8]] = []
    labels = source.labels
    # A few more than needed are tried, where some cannot be read.
    for label in random.permutation(len(source.identities))[: 4 * count].tolist():
        index = int(random.choice(np.flatnonzero(labels == label)))
        try:
            images.append(fit_image(source.image(index), size))
            names.append(source.identities[label])
        except LrfaceError:
            continue
        if len(images) == count:
            break
    return names, np.stack(images) if images else np.empty((0, size, size, 3), dtype=np.uint8)


def sample_rows(
    method: Method,
    names: Sequence[str],
    images: NDArray[np.uint8],
    seed: int,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[list[SheetRow], list[str]]:
    """Rows and column heads of a sheet: each face clean, as the method's policy degrades it, and restored.

    Of several degradations of a face one is shown, so that the rows go through all resolutions from high to low. A
    method without a policy has no degraded column, one without a decoder no restored one.

    Args:
        images: uint8 [k, size, size, 3].
        seed: of the degradations.
    """
    hq = as_float(torch.from_numpy(images).to(device).permute(0, 3, 1, 2))
    seen, sizes = hq, [int(hq.shape[-1])] * len(hq)
    columns = ["input"]
    policy = getattr(method, "policy", None)
    method.eval()
    with torch.no_grad():
        if policy is not None:
            columns.append("degraded")
            repeated = hq.repeat_interleave(DRAWS, dim=0)
            batch = degrade_batch({"image": repeated, "seed": batch_seed(seed, 0)}, policy)
            drawn = drawn_sizes(policy, len(repeated), int(hq.shape[-1]), batch_seed(seed, 0))
            shown = spread(drawn, len(hq))
            seen, hq, sizes = batch["image"][shown], batch["hq"][shown], [drawn[row] for row in shown]
            names = [names[row // DRAWS] for row in shown]
        restored: Tensor | None = None
        decoder = getattr(method, "decoder", None)
        if decoder is not None:
            columns.append("restored")
            with autocast():
                restored = decoder(method.encoder.features(seen)).float().clamp(0, 1)  # type: ignore[operator]
    rows = []
    for row, name in enumerate(names):
        side = int(hq.shape[-1])
        lines = [f"{sizes[row]} x {sizes[row]}" + (" (clean)" if sizes[row] >= side else ""), name]
        groups: list[list[np.ndarray | None]] = [[picture(hq[row])]]
        if policy is not None:
            groups.append([picture(seen[row])])
        if restored is not None:
            groups.append([picture(restored[row])])
            lines.append(f"mean error {float((restored[row] - hq[row]).abs().mean()):.3f}")
        rows.append(SheetRow(lines, groups))
    return rows, columns


def drawn_sizes(policy: Any, n: int, full_size: int, seed: int) -> list[int]:
    """The resolutions that :func:`~lrface.methods.base.degrade_batch` draws from ``seed``; full size where the policy
    does not say."""
    parameters = policy.sample(n, full_size, torch.Generator().manual_seed(seed))
    sizes = getattr(parameters, "size", None)
    return [full_size] * n if sizes is None else [int(size) for size in sizes.tolist()]


def spread(sizes: Sequence[int], faces: int) -> list[int]:
    """For each face the row of one of its draws, so that together they show all sizes alike, sorted from high to low.

    ``sizes`` holds as many draws of each face, one face after the other.
    """
    different = sorted(set(sizes), reverse=True)
    each = len(sizes) // faces
    free = set(range(faces))
    rows = []
    wanted = [different[face * len(different) // faces] for face in range(faces)]
    # Rare sizes choose first.
    for size in sorted(wanted, key=lambda size: (sizes.count(size), size)):
        open_rows = [row for face in sorted(free) for row in range(face * each, (face + 1) * each)]
        rows.append(min(open_rows, key=lambda row: (abs(np.log(sizes[row] / size)), row)))
        free.remove(rows[-1] // each)
    return sorted(rows, key=lambda row: (-sizes[row], row))


def picture(image: Tensor) -> NDArray[np.uint8]:
    """float [3, h, w] in [0, 1] -> uint8 [h, w, 3]."""
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
