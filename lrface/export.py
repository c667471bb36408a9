"""Models for use without lrface: ONNX, torch.export and OpenVINO files that are held against the model they came from.

    from lrface.export import export_model
    print(export_model("runs/qualnet_lm", "qualnet.onnx", to="onnx", faces="my_faces"))

An exported file takes any number of images RGB float [n, 3, s, s] in [0, 1], normalises inside and gives features [n, d]
that are not of unit length; lrface's card travels in it. It appears only when it loads as an embedder again and gives, for
real faces at every test size, what the model gives.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import lrface
from lrface.degrade.resolution import resample, resize
from lrface.embed import FaceEmbedder, open_model, parse_model
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_file
from lrface.models.blocks import FaceBackbone
from lrface.progress import progress

if TYPE_CHECKING:
    from lrface.data.source import FaceSource

ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml", "safetensors": ".safetensors"}
FLAVOURS = ("lrface", "insightface")
PRECISIONS = ("float32", "float16")
INT8 = ("dynamic", "static")
RESOLUTIONS = (112, 56, 28, 14)
BATCHES = (1, 2, 7)
"""Batches that an exported file has to take, each at once."""

MINIMUM_COSINE = 0.9999
INT8_MINIMUM_COSINE = 0.95
"""The worst face that an int8 file may give by default. A MobileFaceNet's gave 0.98 (static) and 0.96 (dynamic) at worst;
what that costs in accuracy is seen with ``benchmark``."""

FACES = 32
CALIBRATION_FACES = 64
SIGNED_RANGE = [-1, 1]
"""What insightface gives its networks; the card of such a file says so."""

_OPSETS = range(13, 24)


@dataclass(frozen=True)
class Export:
    """An exported file.

    Attributes:
        file, to, flavour, precision, int8: what was written.
        bytes: its size (with the .bin of OpenVINO); ``source_bytes`` that of the model's own file, None for a
            module:function.
        opset: of an ONNX file.
        faces: what it was held against the model on; ``calibration`` what the ranges of a static int8 file are from.
        minimum_cosine: the worst face allowed.
        rows: one dict a test size: ``resolution, faces, minimum_cosine, mean_cosine`` to the model's own features.
        accuracy: with a benchmark, one dict a row of it: ``benchmark, gallery_size, probe_size, model, exported,
            difference`` in percent, and the 95 % ``interval`` of the difference.
        thresholds_dropped: the model's operating thresholds were left out, since they are not those of an int8 network.
    """

    file: str
    to: str
    flavour: str
    precision: str
    int8: str | None
    bytes: int
    source_bytes: int | None
    opset: int | None
    faces: str
    calibration: str | None
    minimum_cosine: float
    rows: list[dict[str, Any]]
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    thresholds_dropped: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        from lrface.benchmarks.report import format_columns

        kind = f"{self.to}, {'int8 ' + self.int8 if self.int8 else self.precision}"
        kind += f", opset {self.opset}" if self.opset else ""
        kind += ", for insightface" if self.flavour == "insightface" else ""
        lines = [
            f"{self.file}: {self.bytes / 1e6:.2f} MB ({kind})"
            + (f"; the model has {self.source_bytes / 1e6:.2f} MB" if self.source_bytes is not None else ""),
            f"Cosine to the model's features on {self.faces} (at least {self.minimum_cosine:g} wanted):",
            format_columns(
                ["pixels", "minimum", "mean"],
                [
                    [str(row["resolution"]), f"{row['minimum_cosine']:.6f}", f"{row['mean_cosine']:.6f}"]
                    for row in self.rows
                ],
            ),
        ]
        if self.calibration:
            lines.append(f"Ranges measured on {self.calibration}.")
        if self.accuracy:
            lines.append(
                format_columns(
                    ["benchmark", "sizes", "model %", "exported %", "difference", "95 %"],
                    [
                        [
                            row["benchmark"],
                            f"{row['gallery_size']} x {row['probe_size']}",
                            f"{row['model']:.2f}",
                            f"{row['exported']:.2f}",
                            f"{row['difference']:+.2f}",
                            f"{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}",
                        ]
                        for row in self.accuracy
                    ],
                )
            )
        if self.thresholds_dropped:
            lines.append(
                "Its operating thresholds are not the model's: measure them with `lrface calibrate`."
            )
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class _Source:
    """A model to export.

    Attributes:
        name: as the caller named it.
        embedder: what gives the features to keep to.
        network: takes RGB [n, 3, s, s] in [0, 1]; None for an ONNX file.
        swap, mean, std: what an ONNX file takes: ``(x - mean) / std`` with its channels reversed if ``swap``.
    """

    name: str
    embedder: FaceEmbedder
    network: nn.Module | None
    swap: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


def _open(model: str | Path) -> _Source:
    """Raises UsageError: a file that does not say what it takes, or nothing that can be exported."""
    from lrface.evaluation import check_described

    name = str(model)
    embedder = open_model(name)
    check_described(embedder, assume=False)
    file, card = embedder.file, embedder.card
    if card.get("format") == "python":
        return _Source(name, embedder, _users_network(name))
    if file.suffix == ".safetensors":
        from lrface.train.checkpoint import load_model

        return _Source(name, embedder, load_model(file)[0])
    kind = file.suffix.lower()
    if kind not in (".onnx", ".pt2"):
        raise UsageError(f"{file} was exported already; export the model that it was made from")
    entry = card["input"]
    swap, normalisation = entry["colour"] == "BGR", entry["normalisation"]
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if isinstance(normalisation, dict):
        mean, std = tuple(normalisation["mean"]), tuple(normalisation["std"])
    elif entry["range"] == SIGNED_RANGE:
        mean, std = (0.5,) * 3, (0.5,) * 3
    mean, std = (each * (3 // len(each)) for each in (mean, std))
    network = None if kind == ".onnx" else _Program(file, swap, mean, std, card.get("output"))
    return _Source(name, embedder, network, swap, mean, std)


def _users_network(text: str) -> nn.Module:
    from lrface.embed.networks import _made_by_user

    _, made = _made_by_user(text)
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"{text} gives a {type(made).__name__}, of which there is no graph to export; let the function give a "
            "torch.nn.Module"
        )
    return made.eval().requires_grad_(False).cpu()


class _Program(nn.Module):
    """A torch.export program of others' as a module: its operators, called one after the other."""

    def __init__(
        self, file: Path, swap: bool, mean: Sequence[float], std: Sequence[float], output: str | None
    ):
        from lrface.exported import ExportedProgram

        super().__init__()
        self.program = ExportedProgram(file, torch.device("cpu"))
        self.swap, self.output = swap, output or self.program.outputs[0]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.flip(1) if self.swap else images
        images = (images - self.mean) / self.std
        return self.program(images.to(self.program.input_type))[self.output]


class _Network(nn.Module):
    """What is exported: float32 [n, 3, s, s] -> float32 [n, d]; ``signed``: from [-1, 1] instead of [0, 1]."""

    def __init__(self, network: nn.Module, signed: bool, half: bool = False):
        super().__init__()
        self.network = copy.deepcopy(network).half() if half else network
        self.signed, self.half_precision = signed, half
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if self.signed:
            images = images * 0.5 + 0.5
        return self.network(images.half() if self.half_precision else images).float()


# ------------------------------------------------------------------------------------------------------ the faces


@dataclass(frozen=True)
class _Faces:
    """Aligned faces float32 [n, 3, s, s] in [0, 1], what they are, and others of the same place to measure ranges on."""

    images: Tensor
    described: str
    calibration: Tensor
    calibration_described: str | None = None


def _load_faces(path: str | Path | None, size: int, calibrate: bool, say: Callable[[str], None]) -> _Faces:
    """Faces of ``path`` evenly spread, or those that come with lrface and insightface."""
    if path is not None:
        from lrface.data.source import open_source

        source = open_source(path)
        wanted = FACES + (CALIBRATION_FACES if calibrate else 0)
        if calibrate and len(source) < 2:
            raise LrfaceError(
                f"{path} has {len(source)} faces; int8 static measures ranges on some and is judged on others"
            )
        chosen = np.unique(np.linspace(0, len(source) - 1, min(wanted, len(source))).round().astype(int))
        images, unreadable = _crops(source, chosen, size)
        if not len(images) or (calibrate and len(images) < 2):
            raise LrfaceError(
                f"{path}: none of {len(chosen)} images could be read; `lrface data check {path}` lists why"
            )
        if unreadable:
            say(f"{path}: {unreadable} of {len(chosen)} faces cannot be read and were passed over")
        judged = torch.zeros(len(images), dtype=torch.bool)
        # Every third one judges where some are calibrated on, so that both parts span the whole set.
        judged[:: 3 if calibrate else 1] = True
        count = int((~judged).sum())
        return _Faces(
            images[judged],
            f"{int(judged.sum())} faces of {path}",
            images[~judged],
            f"{count} other faces of {path}" if calibrate else None,
        )
    if calibrate:
        raise UsageError("int8 static measures the ranges of activations on real faces: give --faces FOLDER")
    from lrface.data.synthetic import SyntheticFaces

    real = _photographed(size)
    drawn, _ = _crops(
        SyntheticFaces(FACES - len(real), 1, size=max(size, 16)), range(FACES - len(real)), size
    )
    described = f"{len(real)} faces of insightface's photograph and {len(drawn)} drawn ones"
    say(f"held against the model on {described}; give --faces FOLDER to have it held on your own")
    return _Faces(torch.cat([real, drawn]), described, drawn[:0])


def _crops(source: "FaceSource | Any", chosen: Sequence[int] | np.ndarray, size: int) -> tuple[Tensor, int]:
    """Float32 [n, 3, size, size] in [0, 1], and how many could not be read."""
    crops, unreadable = [], 0
    for index in chosen:
        try:
            image = source.image(int(index))
        except (LrfaceError, OSError, ValueError):
            unreadable += 1
            continue
        image = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()[None] / 255
        kernel = "area" if min(pixels.shape[-2:]) > size else "bilinear"
        crops.append(resize(pixels, size, kernel))
    return (torch.cat(crops) if crops else torch.zeros(0, 3, size, size)), unreadable


def _photographed(size: int) -> Tensor:
    """The faces of insightface's group photograph, aligned; none where its wheel has no photograph."""
    from lrface.demo import align_photo, find_photo

    try:
        crops = align_photo(find_photo()).crops
    except LrfaceError:
        return torch.zeros(0, 3, size, size)
    pixels = torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 3, 1, 2))).float() / 255
    return resize(pixels, size, "area" if size < pixels.shape[-1] else "bilinear")


def _at_resolutions(faces: Tensor) -> dict[int, Tensor]:
    """Faces by test size, nearest down and bilinear up as `lrface verify` does; no size above the network's own."""
    size = faces.shape[-1]
    sizes = [each for each in RESOLUTIONS if each <= size] or [size]
    return {each: resample(faces, each) for each in sizes}


# ------------------------------------------------------------------------------------------------------- the gate


def _features(embedder: FaceEmbedder, sets: dict[int, Tensor], what: str, enabled: bool) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    with progress(sum(map(len, sets.values())), what, unit="faces", enabled=enabled) as bar:
        for size, faces in sets.items():
            parts = []
            for part in faces.split(8):
                parts.append(embedder.embed_tensor(part))
                bar.advance(len(part))
            found[size] = torch.cat(parts)
    return found


def _compared(own: dict[int, Tensor], exported: dict[int, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for size, features in own.items():
        a, b = features.double(), exported[size].double()
        # Not cosine_similarity: its epsilon would call two zero vectors unlike, and NaN must stay NaN.
        cosines = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
        rows.append(
            {
                "resolution": size,
                "faces": len(cosines),
                "minimum_cosine": float(cosines.min()),
                "mean_cosine": float(cosines.mean()),
            }
        )
    return rows


def _check(rows: list[dict[str, Any]], minimum: float, what: str, advice: str) -> None:
    # NaN compares as too low.
    worst = [row for row in rows if not row["minimum_cosine"] >= minimum]
    if worst:
        seen = ", ".join(f"{row['minimum_cosine']:.6f} at {row['resolution']}" for row in rows)
        raise LrfaceError(
            f"{what} does not give the model's features: the lowest cosine is {seen} pixels, wanted is at least "
            f"{minimum:g}, so no file was written. {advice}"
        )


def _check_batches(
    embedder: FaceEmbedder, faces: Tensor, features: Tensor, minimum: float, what: str
) -> None:
    """Hold the file against the model's features once more, with batches of :data:`BATCHES` that go through it whole."""
    network: Any = embedder._network
    if network._batch is not None or network._smallest > 1:
        raise LrfaceError(
            f"{what} takes {network._batch or network._smallest} images at once, not any number, so no file was "
            "written; export the model that it was made from with a batch of any size"
        )
    for size in BATCHES:
        places = torch.arange(size) % len(faces)
        given = network(faces[places])
        row = _compared({size: features[places]}, {size: given})[0]
        if not row["minimum_cosine"] >= minimum:
            raise LrfaceError(
                f"{what} does not give the model's features in a batch of {size} (cosine {row['minimum_cosine']:.6f}), so "
                "no file was written: its graph computes over the batch"
            )


# ----------------------------------------------------------------------------------------------------- the export


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    to: str = "onnx",
    faces: str | Path | None = None,
    flavour: str = "lrface",
    precision: str = "float32",
    int8: str | None = None,
    minimum_cosine: float | None = None,
    opset: int | None = None,
    benchmark: str | None = None,
    data: str | Path | None = None,
    pairs: str | Path | None = None,
    resolutions: Sequence[int] = RESOLUTIONS,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Export:
    """Write a model as a file for use without lrface, checked against the model.

    Args:
        model: as command lines name it, see :func:`lrface.embed.parse_model`: a run, .safetensors, .onnx or .pt2 file, or a
            module:function that gives a torch.nn.Module. A file of others has to be described (FILE@colour=RGB).
        out: the file, of the ending that belongs to ``to``. One that is there already is replaced when the new one is good.
            OpenVINO's weights lie beside it, in NAME.bin, the card of a .safetensors file in NAME.json.
        to: "onnx", "torch-export" (.pt2), "openvino" (.xml; ``pip install 'lrface[openvino]'``), or "safetensors": the model
            without its run, for one of lrface's own networks.
        faces: training data of any format with aligned faces to hold the file against the model on: 32, evenly spread, at
            112, 56, 28 and 14 pixels. None takes the faces of a photograph in insightface's wheel and drawn ones.
        flavour: "insightface" for an ONNX file that insightface's FaceAnalysis takes as its recognition model.
        precision: "float16" keeps weights in half precision, and computes in it where the runtime does.
        int8: "static" (convolutions and matrices on int8, with ranges measured on other ``faces`` at all test sizes) or
            "dynamic" (ranges measured on each batch, so that a face's features change a little with those beside it); ONNX
            alone.
        minimum_cosine: of any face to the model's features; by default 0.9999, for int8 :data:`INT8_MINIMUM_COSINE`.
        opset: of an ONNX file; by default PyTorch's choice, or that of the model where it is an ONNX file.
        benchmark: also measure what it does to verification accuracy, as ``lrface verify`` names benchmarks; ``data``,
            ``pairs`` and ``resolutions`` as there.

    Raises:
        UsageError: options that do not fit, or a model that nobody described.
        LrfaceError: a package is missing, the network cannot be exported (the message has the first reason), or the file
            does not give the model's features: then there is no file.
    """
    started = time.monotonic()
    out = Path(out).expanduser()
    _check_options(model, out, to, flavour, precision, int8, minimum_cosine, opset)
    needed = MINIMUM_COSINE if minimum_cosine is None or int8 else minimum_cosine
    source = _open(model)
    own = source.embedder
    signed = flavour == "insightface"
    if signed and (
        own.input_size < 112 or own.input_size % 16 or (own.input_size % 112 and own.input_size % 128)
    ):
        raise UsageError(
            f"insightface aligns faces to multiples of 112 or of 128 pixels; {source.name} takes {own.input_size}"
        )
    given = _load_faces(faces, own.input_size, int8 == "static", say)
    sets = _at_resolutions(given.images)
    wanted = _features(own, sets, "model", show_progress)
    card = _make_card(source, to, flavour, precision, int8)
    text = json.dumps(card, ensure_ascii=False)
    number: int | None = None
    with _aside(out) as (folder, keep):
        file, graph = folder / out.name, folder / f"{out.stem}.onnx"
        if to == "safetensors":
            _write_weights(source, file, precision, card)
        elif to == "torch-export":
            _write_program(source, file, precision, text)
        else:
            number = _write_onnx(
                source,
                graph,
                signed,
                precision if to == "onnx" else "float32",
                opset,
                text,
            )
            if to == "openvino":
                from lrface.embed.openvino import write_openvino

                write_openvino(graph, file, text, half=precision == "float16")
        what = f"{source.name} as {to}"
        advice = (
            "Please report the model's architecture" if precision == "float32" else "Export it in float32"
        )
        rows = _gate(file, sets, wanted, needed, what, advice, show_progress)
        if int8 is not None:
            from lrface.quantise import quantise

            calibration = (
                torch.cat(list(_at_resolutions(given.calibration).values())) if int8 == "static" else None
            )
            quantise(file, file, int8, calibration, signed, text, show_progress)
            needed = INT8_MINIMUM_COSINE if minimum_cosine is None else minimum_cosine
            other = "static" if int8 == "dynamic" else "float32 or float16"
            rows = _gate(
                file,
                sets,
                wanted,
                needed,
                f"{source.name} in int8 ({int8})",
                f"Try {other}, or allow it with --minimum-cosine and see with --benchmark what it costs",
                show_progress,
            )
        accuracy = []
        if benchmark is not None:
            accuracy = _accuracy(source.name, file, benchmark, resolutions, data, pairs, show_progress, say)
        size = keep()
    dropped = int8 is not None and "thresholds" in own.card
    return Export(
        str(out),
        to,
        flavour,
        precision,
        int8,
        size,
        None if own.card.get("format") == "python" else own.file.stat().st_size,
        number,
        given.described,
        given.calibration_described,
        needed,
        rows,
        accuracy,
        dropped,
        round(time.monotonic() - started, 2),
    )


def _gate(
    file: Path,
    sets: dict[int, Tensor],
    wanted: dict[int, Tensor],
    minimum: float,
    what: str,
    advice: str,
    show_progress: bool,
) -> list[dict[str, Any]]:
    """Load the file as an embedder and hold it against the model's features."""
    embedder = open_model(str(file))
    first = next(iter(sets))
    found = _features(embedder, sets, "exported", show_progress)
    rows = _compared(wanted, found)
    _check(rows, minimum, what, advice)
    if file.suffix.lower() != ENDINGS["safetensors"]:  # a graph may have been traced for one size
        _check_batches(embedder, sets[first], wanted[first], minimum, what)
    return rows


def _check_options(
    model: str | Path,
    out: Path,
    to: str,
    flavour: str,
    precision: str,
    int8: str | None,
    minimum_cosine: float | None,
    opset: int | None,
) -> None:
    for name, value, allowed in (
        ("to", to, tuple(ENDINGS)),
        ("flavour", flavour, FLAVOURS),
        ("precision", precision, PRECISIONS),
        ("int8", int8, (None, *INT8)),
    ):
        if value not in allowed:
            words = ", ".join(str(each) for each in allowed if each)
            raise UsageError(f"{name} must be one of {words}; found {value!r}")
    if out.suffix.lower() != ENDINGS[to]:
        raise UsageError(f"{out}: {to} files end in {ENDINGS[to]}; found {out.suffix or 'no ending'}")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name the file to write")
    file = Path(parse_model(str(model))[0]).expanduser()
    if file.exists() and out.exists() and file.samefile(out):
        raise UsageError(f"{out} is the model itself; give another file name")
    if to != "onnx":
        for name, used in (("flavour insightface", flavour != "lrface"), ("int8", int8), ("opset", opset)):
            if used:
                raise UsageError(f"{name} is for ONNX files: --to onnx")
    if int8 and precision != "float32":
        raise UsageError(f"int8 and precision {precision} exclude each other; leave one out")
    if minimum_cosine is not None and not -1 <= minimum_cosine <= 1:
        raise UsageError(f"a cosine lies between -1 and 1; found a minimum of {minimum_cosine}")
    if opset is not None and opset not in _OPSETS:
        raise UsageError(f"opset must be {_OPSETS.start} to {_OPSETS.stop - 1}; found {opset}")


def _make_card(source: _Source, to: str, flavour: str, precision: str, int8: str | None) -> dict[str, Any]:
    """The model's card, with what the exported file takes and where it is from."""
    embedder = source.embedder
    card = embedder.card
    if card.get("format") != "lrface-model":
        # A file of others: what is known of it.
        described = {"described_by": card["described_by"], "format": card["format"]}
        card = {
            "format": "lrface-model",
            "version": 1,
            "lrface_version": lrface.__version__,
            "embedding_size": embedder.embedding_size,
            "source": described,
            "licence": "unspecified: weights carry the terms of the data they were trained on",
            **{key: card[key] for key in ("thresholds", "thresholds_measured") if key in card},
        }
    if int8:
        card = {key: value for key, value in card.items() if not key.startswith("thresholds")}
    return {
        **card,
        "input": {
            "size": embedder.input_size,
            "colour": "RGB",
            "range": SIGNED_RANGE if flavour == "insightface" else [0, 1],
            "normalisation": "inside",
        },
        "exported": {
            "to": to,
            "flavour": flavour,
            "precision": "int8" if int8 else precision,
            **({"int8": int8} if int8 else {}),
            "from": embedder.file.name,
            "from_sha256": embedder.model_sha256,
            "lrface_version": lrface.__version__,
        },
    }


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[tuple[Path, Callable[[], int]]]:
    """A folder to work in, and what moves the file there in place, which gives its size in bytes.

    Weights are replaced before the .xml that has their hash, so that no reader takes one file's for another's.
    """
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(atomic_file(out))
        beside = {ENDINGS["openvino"]: ".bin", ENDINGS["safetensors"]: ".json"}.get(out.suffix.lower())
        other = None if beside is None else stack.enter_context(atomic_file(out.with_suffix(beside)))
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)

        def keep() -> int:
            os.replace(folder / out.name, place)
            if other is None or beside is None:
                return place.stat().st_size
            os.replace(folder / out.with_suffix(beside).name, other)
            return place.stat().st_size + other.stat().st_size

        yield folder, keep


def _write_weights(source: _Source, file: Path, precision: str, card: dict[str, Any]) -> None:
    """Weights and card as `lrface train` writes them; weights in half precision are widened again where they are loaded."""
    from lrface.train.checkpoint import save_model

    if source.network is None or "architecture" not in card:
        raise UsageError(
            f"{source.name} is no network of lrface's own, of which alone there are .safetensors files"
        )
    state = source.network.state_dict()
    if precision == "float16":
        state = {name: each.half() if each.is_floating_point() else each for name, each in state.items()}
    save_model(file, source.network, card, state)


def _write_program(source: _Source, file: Path, precision: str, card: str) -> None:
    from lrface.exported import CARD_FILE

    network = source.network if source.network is not None else _converted(source)
    size = source.embedder.input_size
    with _quietly():
        try:
            program = torch.export.export(
                _Network(network, signed=False, half=precision == "float16"),
                (torch.rand(2, 3, size, size),),
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                strict=False,
            )
            for module in program.graph_module.modules():
                for node in getattr(getattr(module, "graph", None), "nodes", ()):
                    node.meta.pop("stack_trace", None)  # paths and source lines of this machine
            program._example_inputs = None  # noise, as large as two images
            written = io.BytesIO()
            torch.export.save(program, written, extra_files={CARD_FILE: card})
        except Exception as error:  # whatever an operation that cannot be traced leads to
            raise LrfaceError(f"{source.name}: torch.export cannot export it: {_reason(error)}") from error
    file.write_bytes(written.getbuffer())


def _converted(source: _Source) -> FaceBackbone:
    """The network of an ONNX file in PyTorch."""
    from lrface.models.onnx_network import OnnxBackbone

    said: dict[str, Any] = {}
    card = source.embedder.card
    if card.get("format") != "lrface-model":
        said = {"colour": "BGR" if source.swap else "RGB", "mean": source.mean, "std": source.std}
    network = OnnxBackbone(path=str(source.embedder.file), output=card.get("output"), **said)
    return network.eval()


def _write_onnx(
    source: _Source, file: Path, signed: bool, precision: str, opset: int | None, card: str
) -> int:
    """Write the file; returns its opset."""
    from lrface import onnx_graph

    if source.network is not None:
        model = _traced(source, signed, opset)
    else:
        model = onnx_graph.load_onnx(source.embedder.file)
        output = source.embedder.card.get("output")
        if output is not None:
            onnx_graph.keep_output(model, output)
        # What is given is x, or (x - 0.5) / 0.5; what the graph takes is (x - mean) / std.
        factor, offset = (0.5, 0.5) if signed else (1.0, 0.0)
        onnx_graph.feed(
            model,
            source.swap,
            [factor / std for std in source.std],
            [(offset - mean) / std for mean, std in zip(source.mean, source.std, strict=True)],
        )
        onnx_graph.free_batch(model)
        model = _converted_opset(model, opset, source.name)
    if precision == "float16":
        model = _halved(model, source.name)
    if signed:
        onnx_graph.for_insightface(model)
    file.write_bytes(onnx_graph.finish(model, card))
    return max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))


def _traced(source: _Source, signed: bool, opset: int | None) -> Any:
    """The ONNX graph of a PyTorch network."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise LrfaceError(
            f"exporting to ONNX needs onnx and onnxscript ({error}): pip install 'lrface[export]'"
        ) from error
    assert source.network is not None
    size = source.embedder.input_size
    with _quietly():
        try:
            program = torch.onnx.export(
                _Network(source.network, signed),
                (torch.rand(2, 3, size, size),),
                dynamo=True,
                input_names=["images"],
                output_names=["embedding"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
        except Exception as error:  # whatever an operation without a counterpart leads to
            raise LrfaceError(f"{source.name}: PyTorch cannot export it to ONNX: {_reason(error)}") from error
    found = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset not in (None, found):
        raise LrfaceError(
            f"{source.name}: PyTorch exported it in opset {found}, not {opset}; leave opset out, or try another"
        )
    return model


def _converted_opset(model: Any, opset: int | None, name: str) -> Any:
    found = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if opset in (None, found):
        return model
    from onnx import version_converter

    try:
        return version_converter.convert_version(model, opset)
    except Exception as error:  # its own errors share no base class below Exception
        raise LrfaceError(
            f"{name}: onnx cannot convert it from opset {found} to {opset}: {_reason(error)}; leave opset out"
        ) from error


def _halved(model: Any, name: str) -> Any:
    """Weights and arithmetic in float16, input and output in float32."""
    from lrface import onnx_graph

    with _quietly():
        try:
            from onnxruntime.transformers.float16 import convert_float_to_float16

            halved = convert_float_to_float16(model, keep_io_types=True)
        except Exception as error:  # as above
            raise LrfaceError(
                f"{name}: onnxruntime cannot convert it to float16: {_reason(error)}"
            ) from error
    onnx_graph.sort_nodes(halved)
    return halved


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporters print and warn about their own insides; what matters is checked. Standard output is for results."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _accuracy(
    model: str,
    file: Path,
    benchmark: str,
    resolutions: Sequence[int],
    data: str | Path | None,
    pairs: str | Path | None,
    show_progress: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Verification accuracy of the model and of the file, and their difference."""
    from lrface.evaluation import verify_models

    run = verify_models(
        [model, str(file)],
        [benchmark],
        resolutions,
        data=data,
        pairs=pairs,
        device="cpu",
        show_progress=show_progress,
        say=say,
    )
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in run.rows:
        by_model.setdefault(row["model"], []).append(row)
    first, second = by_model[model], by_model[str(file)]
    return [
        {
            **{key: a[key] for key in ("benchmark", "gallery_size", "probe_size", "pairs")},
            "model": a["accuracy"],
            "exported": b["accuracy"],
            "difference": round(b["accuracy"] - a["accuracy"], 4),
            "interval": compared["interval"],
        }
        for a, b, compared in zip(first, second, run.comparisons, strict=True)
    ]
