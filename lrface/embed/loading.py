"""Models by name or path: :func:`load_embedder`, and how command lines describe files of others."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lrface.embed.embedder import FaceEmbedder
from lrface.embed.networks import (
    OPTIONS_OF_FILES,
    _device,
    _ExportedNetwork,
    _is_module_function,
    _kept_thresholds,
    _load_torch,
    _Network,
    _OnnxNetwork,
    _PythonNetwork,
    _said,
    _thresholds_of,
    _TorchNetwork,
    described_beside,
)
from lrface.errors import LrfaceError, UsageError
from lrface.shipped import NAME as SHIPPED
from lrface.shipped import shipped_or

if TYPE_CHECKING:
    from lrface.align.detect import FaceDetector

QUALITIES = ("norm", "reconstruction")
PRECISIONS = ("float32", "bfloat16")


def load_embedder(
    model: str | Path = SHIPPED,
    *,
    device: str | torch.device = "cpu",
    precision: str = "float32",
    threads: int | None = None,
    min_face_size: int | None = None,
    min_score: float | None = None,
    detector: "FaceDetector | None" = None,
    detector_model: str | Path | None = None,
    colour: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    output: str | None = None,
    convention: str | None = None,
    quality: str = "norm",
) -> FaceEmbedder:
    """A model, ready to embed.

    Args:
        model: a ``.onnx`` file, a ``.safetensors`` file with its JSON card beside it, a directory that holds
            ``model.safetensors`` and ``model.json``, a run directory of ``lrface train``, a torch.export
            program (``.pt2``, see :mod:`lrface.exported`), an OpenVINO model (``.xml`` with its ``.bin``), or
            ``"module:function"``: a function without arguments of a module in the current directory or installed,
            which gives a callable float32 [n, 3, s, s] RGB in [0, 1] -> [n, d], with s its ``input_size`` where it
            has one, else 112. Only that last kind runs code of the model's author. "shipped", the default, is the
            model inside the wheel; its card is lrface/shipped/README.md.
        device: "auto", "cpu", "cuda" or "cuda:K", for the network and the detector.
        precision: "float32", or "bfloat16" (autocast; safetensors models only).
        threads: CPU threads. For an ONNX file of this session alone; for PyTorch the count is the whole
            process's (``torch.set_num_threads``), set once here. None leaves the library's choice.
        min_face_size: the smallest face looked for in photographs, in pixels; see
            :func:`lrface.align.detect.load_detector` for this and the next two. None takes its default.
        min_score: how sure the detector must be of a face, 0 to 1.
        detector_model: an SCRFD or RetinaFace ONNX file; None finds faces with MTCNN.
        detector: a detector of your own instead.
        colour, mean, std: only for a .onnx or .pt2 file that others exported, where it does not follow lrface's
            convention (RGB in [0, 1], normalisation inside): the network is given ``(x - mean) / std`` with x
            in [0, 1] and channels in the order ``colour``, "RGB" or "BGR". ``mean`` and ``std`` are one
            number or three in that order. A network that wants pixels in [-1, 1] takes ``mean=0.5, std=0.5``;
            one that wants 0 to 255 takes ``mean=0, std=1/255``. Nothing is guessed from names. The same may be
            written in a card beside the file: see :func:`described_beside`.
        output: name of the embedding, where such a file has several outputs.
        convention: "insightface" for a recognition network of insightface's, instead of colour, mean and std: it is given
            what insightface gives it, see :mod:`lrface.models.insightface_files`. Where the file's model package or the
            constants of its graph say so themselves, it need not be said; ``card["described_by"]`` is then
            "insightface convention".
        quality: "norm", or "reconstruction": also give the reconstruction error of every face, for which the
            model must be a finished run of `lrface train` with a decoder (QualNet).

    Raises:
        UsageError: an option with a wrong value, or one that does not fit this kind of model.
        LrfaceError: nothing there, not a model, a card that does not fit its weights, or an input or output
            of another shape than a face embedder's.
    """
    path = shipped_or(model)
    if quality not in QUALITIES:
        raise UsageError(f"quality must be one of {', '.join(QUALITIES)}; found {quality!r}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}; found {precision!r}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1; found {threads}")
    place = _device(device)
    settings = {"model": detector_model, "min_face_size": min_face_size, "min_score": min_score}
    given = {key: value for key, value in settings.items() if value is not None}
    if detector is not None and given:
        raise UsageError(
            "min_face_size, min_score and detector_model are not for a detector of your own; leave them out"
        )
    network: _Network
    kind = path.suffix.lower()
    if kind in (".onnx", ".pt2", ".xml"):
        if not path.is_file():
            raise LrfaceError(
                f"{path}: no such file; give a .onnx, .pt2 or .safetensors file, or a directory made by `lrface "
                "train RECIPE`"
            )
        if precision != "float32":
            raise UsageError(
                f"precision {precision} is for safetensors models; a {kind} file computes as it was exported"
            )
        said = _said(path, colour, mean, std, output, convention)
        if kind == ".xml":
            from lrface.embed.openvino import _OpenVinoNetwork

            network = _OpenVinoNetwork(path, place, threads, said)
        else:
            foreign = _OnnxNetwork if kind == ".onnx" else _ExportedNetwork
            network = foreign(path, place, threads, said)
    else:
        described = zip(OPTIONS_OF_FILES, (colour, mean, std, output, convention), strict=True)
        for name, value in described:
            if value is not None:
                raise UsageError(
                    f"{name} describes a .onnx or .pt2 file of others; {path} says itself what it takes"
                )
        if _is_module_function(model):
            if precision != "float32":
                raise UsageError(
                    f"precision {precision} is for safetensors models; {model} computes as it likes"
                )
            network = _PythonNetwork(str(model), place, threads)
        else:
            network = _load_torch(path, place, precision, threads)
    if network.file.suffix != ".safetensors":
        network.card.update(_kept_thresholds(network.file, _thresholds_of(network)))
    if quality == "reconstruction":
        if not isinstance(network, _TorchNetwork):
            raise UsageError(
                f"quality reconstruction needs the decoder of a run of `lrface train`; {model} is no such run"
            )
        network.add_decoder()
    name = path.stem if path.is_file() or kind in (".onnx", ".pt2", ".xml") else path.resolve().name
    embedder = FaceEmbedder(network, name, place, given, detector)
    if detector is None:
        options = {
            "colour": colour,
            "mean": mean,
            "std": std,
            "output": output,
            "convention": convention,
            "quality": quality,
            **settings,
        }
        options["detector_model"] = options.pop("model")
        if detector_model is not None:
            options["detector_model"] = Path(detector_model).expanduser().resolve()
        made_from = str(model) if _is_module_function(model) else path.resolve()
        embedder._made_by = (made_from, {"device": str(device), "precision": precision, **options})
    return embedder


def parse_model(text: str) -> tuple[str, dict[str, Any]]:
    """A model as command lines name it: ``MODEL`` or ``MODEL@colour=BGR,mean=0.5,std=1/255,output=NAME``,
    or ``MODEL@convention=insightface``.

    Numbers may be fractions; three of them, one a channel, have colons between: ``mean=0.485:0.456:0.406``.

    Returns:
        The model and the options of :func:`load_embedder` of these names.

    Raises:
        UsageError: an unknown option or no number.
    """
    model, at, tail = text.rpartition("@")
    if not at or "=" not in tail or Path(text).exists():
        return text, {}
    options: dict[str, Any] = {}
    for part in tail.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in OPTIONS_OF_FILES or name in options:
            raise UsageError(
                f"model {text}: found {part!r} after the @; give colour=RGB or colour=BGR, mean=NUMBER, std=NUMBER, "
                "output=NAME, convention=insightface, each at most once, with commas between"
            )
        if name in ("mean", "std"):
            try:
                numbers = [float(Fraction(number)) for number in value.split(":")]
            except (ValueError, ZeroDivisionError) as error:
                raise UsageError(
                    f"model {text}: {name} takes one number or three with colons between (0.5, 1/255, "
                    f"0.485:0.456:0.406); found {value!r}"
                ) from error
            options[name] = numbers[0] if len(numbers) == 1 else numbers
        else:
            options[name] = value
    return model, options


def open_model(text: str, **options: Any) -> FaceEmbedder:
    """:func:`load_embedder` for a model as command lines name it, see :func:`parse_model`."""
    model, described = parse_model(text)
    return load_embedder(model, **described, **options)


def undescribed(embedder: FaceEmbedder) -> str | None:
    """For a file of others about whose input nobody has said anything: how to say it. None for any other model."""
    if embedder.card.get("described_by") != "convention":
        return None
    file = embedder.file
    return (
        f"name it as {file}@colour=BGR,mean=0.5,std=0.5 (the network gets (x - mean) / std of pixels x in [0, 1]; "
        f"{file}@colour=RGB where it normalises inside, {file}@convention=insightface for a recogniser of insightface's), "
        f"or write {described_beside(file)} beside it: "
        '{"colour": "BGR", "mean": 0.5, "std": 0.5}'
    )
