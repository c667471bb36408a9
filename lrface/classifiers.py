"""Classifiers of images, from wherever they come: runs of lrface, torchvision, timm, ONNX files, functions.

What goes into a network is said by the run's card, by the published weights that the file is, or by the caller; never
guessed from a name.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrface.benchmarks.robustness import imagenet_classes
from lrface.embed.networks import (
    _first_line,
    _is_module_function,
    _made_by_user,
    _onnx_session,
    described_beside,
)
from lrface.errors import LrfaceError, UsageError
from lrface.files import read_json
from lrface.models.blocks import channels_last
from lrface.models.weights import read_weights
from lrface.registry import nearest
from lrface.train.trainer import resolve_device

MODELS = (
    "a run of `lrface train` with head softmax, torchvision:NAME@weights=FILE, timm:NAME@weights=FILE,mean=...,std=..., "
    "FILE.onnx@colour=RGB,mean=...,std=..., or module:function"
)
_OPTIONS = ("weights", "colour", "mean", "std", "output", "classes")


@dataclass
class Classifier:
    """A network from images to class scores.

    Attributes:
        name: what the user called it.
        sha256: of its weights (of the module's source for module:function).
        network: float32 [n, c, s, s] RGB (or grey) in [0, 1] -> scores [n, outputs].
        outputs: how many classes it tells apart.
        classes: their names in the order of the outputs; None where nobody says.
        input_size: side in pixels that it takes; None for any.
        channels: 3, or 1 for grey.
        card: what goes in and how it was trained, for reports.
    """

    name: str
    sha256: str
    network: Callable[[Tensor], Tensor]
    outputs: int
    classes: list[str] | None
    input_size: int | None
    channels: int
    card: Mapping[str, Any]

    def scores(self, images: Tensor) -> Tensor:
        """float32 [n, c, s, s] in [0, 1] -> float32 [n, outputs] on the CPU.

        Raises:
            LrfaceError: the network fails on them, or gives another shape or values that are not finite.
        """
        with torch.inference_mode():
            found = _checked(self.name, self.network, images)
        if found.shape[1] != self.outputs:
            raise LrfaceError(f"{self.name} gave {self.outputs} scores at first and {found.shape[1]} later")
        if not bool(torch.isfinite(found).all()):
            raise LrfaceError(
                f"{self.name}: its scores are not finite; its weights are broken, or mean and std do not fit"
            )
        return found


def _checked(name: str, network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    try:
        found = network(images)
    except LrfaceError:
        raise
    except Exception as error:  # anything may go wrong in code of others
        raise LrfaceError(
            f"{name} fails on images of shape {list(images.shape)}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise LrfaceError(
            f"{name} gives {shape} for {len(images)} images; class scores are [{len(images)}, classes]"
        )
    return found.detach().float().cpu()


@dataclass
class _Found:
    network: Callable[[Tensor], Tensor]
    file: Path
    classes: list[str] | None
    input_size: int | None
    channels: int
    card: dict[str, Any]


def parse_classifier(text: str) -> tuple[str, dict[str, str]]:
    """ "torchvision:resnet50@weights=FILE,mean=0.5" -> ("torchvision:resnet50", {"weights": "FILE", "mean": "0.5"}).

    Raises:
        UsageError: an unknown option, or one given twice.
    """
    model, at, tail = text.partition("@")
    if not at or "=" not in tail or Path(text).exists():
        return text, {}
    options: dict[str, str] = {}
    for part in tail.split(","):
        name, equals, value = part.partition("=")
        if not equals or name not in _OPTIONS or name in options or not value:
            raise UsageError(
                f"model {text}: found {part!r} after the @{nearest(name, _OPTIONS)}; give "
                f"{', '.join(f'{option}=...' for option in _OPTIONS)}, each at most once, with commas between"
            )
        options[name] = value
    return model, options


def open_classifier(text: str, side: int, channels: int = 3, device: str = "auto") -> Classifier:
    """A classifier as command lines name it, for square images of ``side`` pixels.

    - a run of ``lrface train`` with head softmax: encoder and head of the model's checkpoint;
    - ``torchvision:NAME@weights=FILE`` or ``weights=IMAGENET1K_V1`` (the file that torchvision's own loader would have
      kept). A file that is one of torchvision's own, by its hash, has their normalisation; any other must be
      described: ``mean=0.485:0.456:0.406,std=0.229:0.224:0.225`` (the network gets (x - mean) / std of RGB in [0, 1]);
    - ``timm:NAME@weights=FILE,mean=...,std=...``;
    - ``FILE.onnx@colour=RGB,mean=...,std=...``, or described in FILE.onnx.json, as for faces;
    - ``module:function``: called without arguments, it gives a callable [n, c, s, s] RGB in [0, 1] -> [n, classes],
      which may have ``input_size``, ``channels`` and ``classes``.

    ``classes=FILE`` names the outputs, one a line; ``classes=imagenet`` are the 1000 identifiers of ILSVRC 2012.

    Raises:
        UsageError: an option that is wrong or missing, or an input of another size than the benchmark's images.
        LrfaceError: nothing there, or weights that do not fit.
    """
    place = resolve_device(device)
    model, options = parse_classifier(text)
    kind, _, rest = model.partition(":")
    if kind == "torchvision":
        found = _torchvision(text, rest, options, place)
    elif kind == "timm":
        found = _timm(text, rest, options, place)
    elif model.lower().endswith(".onnx"):
        found = _onnx(text, Path(model).expanduser(), options, place)
    elif _is_module_function(model):
        _allow(text, options, ("classes",))
        found = _function(model, place)
    else:
        _allow(text, options, ("classes",))
        found = _run(Path(model).expanduser(), place)
    if "classes" in options:
        found.classes = _class_names(text, options["classes"])
    if found.input_size not in (None, side):
        raise UsageError(
            f"{text} takes images of {found.input_size}x{found.input_size} pixels, the benchmark's are {side}x{side}; "
            "it cannot be judged on it"
        )
    if found.channels != channels:
        raise UsageError(
            f"{text} takes images of {found.channels} channels, the benchmark's have {channels}; it cannot be judged "
            "on it"
        )
    with torch.inference_mode():
        shown = _checked(text, found.network, torch.full((1, channels, side, side), 0.5))
    outputs = shown.shape[1]
    if found.classes is not None and len(found.classes) != outputs:
        raise LrfaceError(f"{text} has {outputs} outputs and {len(found.classes)} names of classes")
    with found.file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Classifier(
        text, digest, found.network, outputs, found.classes, found.input_size, found.channels, found.card
    )


def _allow(text: str, options: Mapping[str, str], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise UsageError(
                f"model {text}: {name} is not for this kind of model; it takes {', '.join(known)}"
            )


def _class_names(text: str, named: str) -> list[str]:
    if named == "imagenet":
        return list(imagenet_classes())
    file = Path(named).expanduser()
    if not file.is_file():
        raise UsageError(
            f"model {text}: classes={named}: no such file; give one with a name a line, or imagenet"
        )
    names = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [name for name in names if name]


def _numbers(text: str, name: str, value: str) -> Tensor:
    """One number or three with colons between, as [1, 3, 1, 1] (or [1, 1, 1, 1])."""
    try:
        numbers = [float(Fraction(number)) for number in str(value).split(":")]
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"model {text}: {name} takes one number or three with colons between (0.5, 1/255, 0.485:0.456:0.406); "
            f"found {value!r}"
        ) from error
    if len(numbers) not in (1, 3) or not all(np.isfinite(numbers)) or name == "std" and 0 in numbers:
        raise UsageError(f"model {text}: {name} takes one number or three, of std none 0; found {value!r}")
    return torch.tensor(numbers).view(1, -1, 1, 1)


class _Normalised(nn.Module):
    """A network that is given (x - mean) / std, with channels in the order it wants."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor, swap: bool = False):
        super().__init__()
        self.network = network
        self.swap = swap
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.mean.device)
        images = ((images.flip(1) if self.swap else images) - self.mean) / self.std
        return self.network(images.contiguous(memory_format=torch.channels_last))


def _described(size: int | None, colour: str, mean: Tensor, std: Tensor, by: str) -> dict[str, Any]:
    said = {
        "mean": [round(x, 6) for x in mean.flatten().tolist()],
        "std": [round(x, 6) for x in std.flatten().tolist()],
    }
    size_said: int | str = "any" if size is None else size
    return {
        "input": {"size": size_said, "colour": colour, "range": [0, 1], "normalisation": said},
        "described_by": by,
    }


# ------------------------------------------------------------------------------------------------- lrface's own


class _EncoderAndHead(nn.Module):
    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor):
        super().__init__()
        self.encoder = channels_last(encoder)
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.linear.weight.device, memory_format=torch.channels_last)
        return self.linear(self.encoder(images))


def _run(path: Path, device: str) -> _Found:
    from lrface.train.checkpoint import PARTS, find_model, find_parts, load_model, load_state

    if not path.exists():
        raise LrfaceError(f"{path}: no such model; give {MODELS}")
    weights = find_model(path)
    encoder, card = load_model(weights, device)
    folder = find_parts(weights, card)
    if folder is None:
        raise LrfaceError(
            f"{weights} has no classes: a classifier needs the head of its training, which a run of `lrface train` keeps "
            "in its checkpoints (RUN/stages); none of this model was found there"
        )
    parts = load_state(folder / PARTS)
    try:
        weight, bias = parts["head.linear.weight"], parts["head.linear.bias"]
    except KeyError:
        raise LrfaceError(
            f"{folder / PARTS} holds no softmax head (it has {', '.join(sorted(parts)[:3]) or 'nothing'}): a classifier "
            "is a run of a recipe with `head: softmax`"
        ) from None
    classes = card.get("training", {}).get("classes")
    if classes is not None and (not isinstance(classes, list) or len(classes) != len(weight)):
        raise LrfaceError(
            f"{weights.with_suffix('.json')}: field 'training.classes' should name {len(weight)} classes; found {classes!r}"
        )
    network = _EncoderAndHead(encoder, weight, bias).to(device).eval().requires_grad_(False)
    shown = {"input": card["input"], "training": card.get("training", {})}
    channels = 1 if card["input"]["colour"] == "grey" else 3
    return _Found(network, weights, classes, int(card["input"]["size"]), channels, shown)


# --------------------------------------------------------------------------------------------- networks of others


def _filled(text: str, file: Path, build: Callable[[int], nn.Module]) -> nn.Module:
    """The network with the tensors of ``file``, all of them and nothing else. ``build`` takes the number of classes,
    which the last tensor of such a network has in the file."""
    state = read_weights(file)
    with torch.device("meta"):
        last = list(build(1000).state_dict())[-1]
    network = build(int(state[last].shape[0]) if last in state and state[last].ndim else 1000)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise LrfaceError(
            f"{file} does not fit {text}: {(lines[1] if len(lines) > 1 else lines[0]).strip()[:300]}"
        ) from error
    return network.eval().requires_grad_(False)


def _torchvision(text: str, name: str, options: Mapping[str, str], device: str) -> _Found:
    import torchvision

    _allow(text, options, ("weights", "mean", "std", "classes"))
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UsageError(f"model {text}: torchvision has no classifier {name!r}{nearest(name, known)}")
    entries = list(torchvision.models.get_model_weights(name))
    file, entry = _torchvision_file(text, name, options.get("weights"), entries)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    # torchvision's own files carry the first digits of their hash in their names.
    marks = {each: re.search(r"-([0-9a-f]{8,})\.pth$", each.url) for each in entries}
    own = [each for each, mark in marks.items() if mark is not None and digest.startswith(mark.group(1))]
    if entry is not None and entry not in own:
        raise LrfaceError(f"{file} is not what torchvision calls {entry}: its hash differs. Get it again")
    entry = own[0] if own else None
    mean, std = _stated(text, options, entry)
    by = "options" if "mean" in options else f"torchvision's {entry}"
    network = _filled(text, file, lambda classes: torchvision.models.get_model(name, num_classes=classes))
    normalised = channels_last(_Normalised(network, mean, std)).to(device)
    classes = list(imagenet_classes()) if entry is not None else None
    return _Found(normalised, file, classes, None, 3, _described(None, "RGB", mean, std, by))


def _torchvision_file(text: str, name: str, named: str | None, entries: list[Any]) -> tuple[Path, Any]:
    """The file of weights, and which of torchvision's own it is where that was said."""
    names = [entry.name for entry in entries]
    if named is None:
        raise UsageError(
            f"model {text}: say which weights: torchvision:{name}@weights=FILE, or weights={' or weights='.join(names)}"
        )
    if Path(named).expanduser().is_file():
        return Path(named).expanduser(), None
    if named not in names:
        raise LrfaceError(
            f"model {text}: weights={named} is no file, nor one of {', '.join(names)}{nearest(named, names)}"
        )
    entry = entries[names.index(named)]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if not file.is_file():
        raise LrfaceError(
            f"model {text}: its weights are not on this machine, and lrface loads nothing by itself. Get them with\n"
            f"  curl -L --create-dirs -o {file} {entry.url}"
        )
    return file, entry


def _stated(text: str, options: Mapping[str, str], entry: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation as the caller says, or as torchvision says of its own weights."""
    if "mean" in options or "std" in options:
        if not ("mean" in options and "std" in options):
            raise UsageError(f"model {text}: give both mean and std, or neither")
        return _numbers(text, "mean", options["mean"]), _numbers(text, "std", options["std"])
    if entry is None:
        raise UsageError(
            f"model {text}: this file is none of torchvision's own, and how its images were normalised is not guessed: add "
            "mean=...,std=... (the network gets (x - mean) / std of RGB in [0, 1]), for example "
            "mean=0.485:0.456:0.406,std=0.229:0.224:0.225"
        )
    made = entry.transforms()
    return torch.tensor(made.mean).view(1, 3, 1, 1), torch.tensor(made.std).view(1, 3, 1, 1)


def _timm(text: str, name: str, options: Mapping[str, str], device: str) -> _Found:
    _allow(text, options, ("weights", "mean", "std", "classes"))
    try:
        import timm
    except ImportError as error:
        raise LrfaceError(
            f"model {text} needs timm, which is not installed: pip install 'lrface[timm]'"
        ) from error
    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        raise UsageError(f"model {text}: timm has no model {name!r}{nearest(bare, timm.list_models())}")
    named = options.get("weights")
    if named is None or not Path(named).expanduser().is_file():
        found = "" if named is None else f" (found no file {named})"
        raise UsageError(f"model {text}: say which file holds the weights: timm:{name}@weights=FILE{found}")
    if not ("mean" in options and "std" in options):
        own = timm.get_pretrained_cfg(name)
        told = ""
        if own is not None:
            stated = [":".join(f"{number:g}" for number in values) for values in (own.mean, own.std)]
            told = f"; where the file is timm's own of this name: mean={stated[0]},std={stated[1]}"
        raise UsageError(
            f"model {text}: add mean=...,std=... (the network gets (x - mean) / std of RGB in [0, 1]){told}"
        )
    mean, std = _numbers(text, "mean", options["mean"]), _numbers(text, "std", options["std"])
    file = Path(named).expanduser()
    network = _filled(
        text, file, lambda classes: timm.create_model(name, pretrained=False, num_classes=classes)
    )
    normalised = channels_last(_Normalised(network, mean, std)).to(device)
    return _Found(normalised, file, None, None, 3, _described(None, "RGB", mean, std, "options"))


def _onnx(text: str, file: Path, options: dict[str, str], device: str) -> _Found:
    _allow(text, options, ("colour", "mean", "std", "output", "classes"))
    if not file.is_file():
        raise LrfaceError(f"{file}: no such file; give {MODELS}")
    beside = described_beside(file)
    by = "options"
    if beside.is_file():
        said = read_json(beside, "the description of the model")
        _allow(str(beside), {key: "" for key in said}, ("colour", "mean", "std", "output"))
        if options.keys() - {"classes"}:
            raise UsageError(
                f"{beside} says what {file.name} takes; leave out what follows the @, or correct that file"
            )
        lists = {
            key: ":".join(map(str, value)) if isinstance(value, list) else str(value)
            for key, value in said.items()
        }
        options, by = {**options, **lists}, "card beside"
    session = _onnx_session(file, torch.device(device), None)
    inputs, outputs = session.get_inputs(), {each.name: each for each in session.get_outputs()}
    shape = [side if isinstance(side, int) else None for side in inputs[0].shape]
    if len(inputs) != 1 or len(shape) != 4 or shape[1] not in (1, 3, None) or shape[2] != shape[3]:
        raise LrfaceError(
            f"{file}: takes {', '.join(f'{each.name} {each.shape}' for each in inputs)}; a classifier takes one batch of "
            "square images [n, channels, side, side]"
        )
    output = options.get("output", next(iter(outputs)))
    if output not in outputs or "output" not in options and len(outputs) > 1:
        raise UsageError(
            f"{file} has the outputs {', '.join(outputs)}; name the class scores with output=..."
        )
    channels = shape[1] or 3
    if not (
        "mean" in options and "std" in options and (channels == 1 or options.get("colour") in ("RGB", "BGR"))
    ):
        raise UsageError(
            f"{file} does not say what goes in, and that is not guessed: name it as {file}@colour=RGB,mean=...,std=... (the "
            "network gets (x - mean) / std of pixels x in [0, 1]; mean=0,std=1 where it normalises inside)"
        )
    mean, std = _numbers(text, "mean", options["mean"]), _numbers(text, "std", options["std"])
    colour = options.get("colour", "grey") if channels == 3 else "grey"
    dtype = np.float16 if inputs[0].type == "tensor(float16)" else np.float32
    batch = shape[0]

    def network(images: Tensor) -> Tensor:
        images = ((images.flip(1) if colour == "BGR" else images) - mean) / std
        parts = []
        step = batch or len(images)
        for start in range(0, len(images), step):  # a graph may fix its batch: the last one is filled up
            part = images[start : start + step]
            padded = torch.cat([part, torch.zeros(step - len(part), *part.shape[1:])]).numpy().astype(dtype)
            found = session.run([output], {inputs[0].name: padded})[0]
            parts.append(torch.from_numpy(np.asarray(found, dtype=np.float32))[: len(part)])
        return torch.cat(parts)

    return _Found(network, file, None, shape[2], channels, _described(shape[2], colour, mean, std, by))


def _function(text: str, device: str) -> _Found:
    file, made = _made_by_user(text)
    if isinstance(made, nn.Module):
        made = made.eval().requires_grad_(False).to(device)
    size, channels, classes = (getattr(made, name, None) for name in ("input_size", "channels", "classes"))
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise LrfaceError(f"{text}: its input_size must be a whole number; found {size!r}")
    card = {
        "input": {"size": size or "any", "colour": "RGB", "range": [0, 1], "normalisation": "inside"},
        "described_by": "module:function",
    }
    return _Found(
        lambda images: made(images.to(device)),
        file,
        None if classes is None else [str(name) for name in classes],
        size,
        1 if channels == 1 else 3,
        card,
    )
