"""Sample sheets: the same faces through training, clean, as the encoder sees them, and as the decoder restores them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrface.data.dataset import as_float, batch_seed, fit_image, in_channels
from lrface.data.sheet import SheetRow, draw_sheet
from lrface.data.source import FaceSource
from lrface.degrade.policy import Policy, rows_of
from lrface.errors import LrfaceError
from lrface.methods.base import Method
from lrface.train.observe import Observer, can_draw

FACES = 8
DRAWS = 32  # degradations drawn for each face, of which the sheet shows one


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

    def due(self, step: int) -> bool:
        return self._drawing and (step % self.every == 0 or step == self.steps)

    def after_step(self, step: int, method: Method) -> bool:
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

    Of several degradations of a face one is shown, so that the rows go through all kinds, from clean to worst. A
    method without a policy has no degraded column, one without a decoder no restored one.

    Args:
        images: uint8 [k, size, size, 3].
        seed: of the degradations.
    """
    channels: int = getattr(method.encoder, "channels", 3)
    pixels = np.stack([in_channels(image, channels) for image in images])
    hq = as_float(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))
    side = int(hq.shape[-1])
    seen, kinds = hq, [(False, -side, f"{side} x {side} (clean)")] * len(hq)
    columns = ["input"]
    policy: Policy | None = getattr(method, "policy", None)
    method.eval()
    with torch.no_grad():
        if policy is not None:
            columns.append("degraded")
            generator = torch.Generator().manual_seed(batch_seed(seed, 0))
            parameters = policy.sample(len(hq) * DRAWS, side, generator)
            drawn = [kind_of(policy, parameters, row, side) for row in range(len(hq) * DRAWS)]
            shown = spread(drawn, len(hq))
            faces = [row // DRAWS for row in shown]
            kinds, names = [drawn[row] for row in shown], [names[face] for face in faces]
            seen, hq = policy.apply(hq[faces], rows_of(parameters, torch.tensor(shown)))
        restored: Tensor | None = None
        decoder = getattr(method, "decoder", None)
        if decoder is not None:
            columns.append("restored")
            with autocast():
                restored = decoder(method.encoder.features(seen)).float().clamp(0, 1)  # type: ignore[operator]
    rows = []
    for row, name in enumerate(names):
        lines = [kinds[row][-1], name]
        groups: list[list[np.ndarray | None]] = [[picture(hq[row])]]
        if policy is not None:
            groups.append([picture(seen[row])])
        if restored is not None:
            groups.append([picture(restored[row])])
            lines.append(f"mean error {float((restored[row] - hq[row]).abs().mean()):.3f}")
        rows.append(SheetRow(lines, groups))
    return rows, columns


Kind = tuple[bool, int, str]
"""Whether an image is degraded, minus its resolution in pixels, and both in words: sorted, from clean to worst."""


def kind_of(policy: Policy, parameters: Any, row: int, side: int) -> Kind:
    """What ``policy`` does to image ``row`` of those that ``parameters`` are for, images of ``side`` pixels."""
    clean = (False, -side, f"{side} x {side} (clean)")
    if hasattr(parameters, "size"):
        size = int(parameters.size[row])
        return clean if size >= side else (True, -size, f"{size} x {size}")
    if hasattr(parameters, "severity"):
        severity = int(parameters.severity[row])
        names = policy.names  # type: ignore[attr-defined]
        return clean if severity == 0 else (True, 0, f"{names[int(parameters.name[row])]} {severity}")
    if hasattr(parameters, "parts"):
        parts = list(zip(policy.parts, parameters.parts, strict=True))  # type: ignore[attr-defined]
        if hasattr(parameters, "part"):
            number = int(parameters.part[row])
            return clean if number < 0 else kind_of(*parts[number], row, side)
        if bool(parameters.clean[row]):
            return clean
        kinds = [kind for part in parts if (kind := kind_of(*part, row, side))[0]]
        text = ", ".join(kind[-1] for kind in kinds)
        return (True, max(kind[1] for kind in kinds), text) if kinds else clean
    return (True, 0, "degraded")


def spread(kinds: Sequence[Kind], faces: int) -> list[int]:
    """For each face the row of one of its draws, so that together they show all kinds alike, sorted from clean to worst.

    ``kinds`` holds as many draws of each face, one face after the other.
    """
    different = sorted(set(kinds))
    place = {kind: number for number, kind in enumerate(different)}
    each = len(kinds) // faces
    free = set(range(faces))
    rows = []
    wanted = [different[face * len(different) // faces] for face in range(faces)]
    # Rare kinds choose first.
    for kind in sorted(wanted, key=lambda kind: (kinds.count(kind), kind)):
        open_rows = [row for face in sorted(free) for row in range(face * each, (face + 1) * each)]
        rows.append(min(open_rows, key=lambda row: (abs(place[kinds[row]] - place[kind]), row)))
        free.remove(rows[-1] // each)
    return sorted(rows, key=lambda row: (kinds[row], row))


def picture(image: Tensor) -> NDArray[np.uint8]:
    """float [3, h, w] or grey [1, h, w] in [0, 1] -> uint8 [h, w, 3]."""
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu()
    return pixels.expand(-1, -1, 3).contiguous().numpy()
