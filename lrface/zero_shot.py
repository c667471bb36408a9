"""Zero-shot classification by CLIP's text prompts (Radford et al., 2021): a class is the mean direction of sentences that
name it, and an image belongs to the class whose direction its embedding is nearest to. Above features, below probe.

    lrface probe TRAIN TEST --model student=RUN --model clip=open_clip:RN101@pretrained=openai --zero-shot

A student embeds degraded images where its teacher embeds clean ones, so that the teacher's text tower serves both. It comes
from the whole model's file: that which the image tower started from, by its tag or path, or another that is named. Nothing
is looked up on a network but what open_clip downloads for a tag.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lrface.benchmarks.robustness import imagenet_classes
from lrface.errors import LrfaceError, UsageError
from lrface.features import Network
from lrface.models import build_backbone
from lrface.models.library import check_tensors
from lrface.models.open_clip import TOWER, OpenClipBackbone, build_whole, download
from lrface.models.weights import read_weights

PROMPTS = ("openai", "simple")
"""Sentences that come with open_clip: CLIP's 80 for ImageNet, and the 7 of them that its authors found to do as well."""

HIGHEST_SCALE = 100.0
"""CLIP's own limit of its logits' scale."""

_NOTES = ("input_resolution", "context_length", "vocab_size")  # numbers among the tensors of OpenAI's files


@dataclass(frozen=True)
class TextClassifier:
    """Directions of classes, float32 [classes, d] of unit length, and what cosines are multiplied by."""

    directions: Tensor
    scale: float

    def scores(self, features: Tensor) -> Tensor:
        """float32 [n, d] of any length -> float32 [n, classes], CLIP's logits."""
        return self.scale * F.normalize(features, dim=-1) @ self.directions.T


def read_prompts(text: str) -> list[str]:
    """Sentences with {} in place of the class: one of :data:`PROMPTS`, or a file with one a line.

    Raises:
        UsageError: neither, or a line without {}.
    """
    if text in PROMPTS:
        import open_clip

        known = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return [template("{}") for template in known[text]]
    found = _lines(text, "--prompts", f"{', '.join(PROMPTS)}, or a file with a sentence a line")
    for line in found:
        if "{}" not in line:
            raise UsageError(f"--prompts {text}: each line has {{}} where the class goes; found {line!r}")
    return found


def read_class_names(classes: Sequence[str], text: str | None) -> list[str]:
    """What classes are called in sentences: the lines of a file, in the order of the classes; without one, the names that
    the data has, with spaces for underscores, or for WordNet's identifiers of ImageNet those that come with open_clip.

    Raises:
        UsageError: another number of lines; numbers instead of names.
    """
    if text is not None:
        found = _lines(text, "--class-names", "a file with a name a line")
        if len(found) != len(classes):
            raise UsageError(f"--class-names {text}: {len(found)} names for {len(classes)} classes")
        return found
    if all(name.isdigit() for name in classes):
        raise UsageError(
            f"--zero-shot: the data only numbers its classes ({classes[0]} to {classes[-1]}); name them with --class-names "
            "FILE, one a line in this order"
        )
    known = list(imagenet_classes())
    if set(classes) <= set(known):
        import open_clip

        return [open_clip.IMAGENET_CLASSNAMES[known.index(name)] for name in classes]
    return [name.replace("_", " ") for name in classes]


def _lines(text: str, option: str, wanted: str) -> list[str]:
    file = Path(text).expanduser()
    if not file.is_file():
        raise UsageError(f"{option} {text}: no such file; give {wanted}")
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise UsageError(f"{option} {text}: the file is empty; give {wanted}")
    return found


def is_open_clip(card: Mapping[str, Any]) -> bool:
    """Whether a network is an image tower of open_clip, by its card."""
    return bool(card.get("architecture", {}).get("name") == "open_clip")


def text_classifier(
    card: Mapping[str, Any], names: Sequence[str], prompts: Sequence[str], weights: str | None = None
) -> TextClassifier:
    """The classifier of the text tower that belongs to an image tower, on the CPU.

    Args:
        card: the image tower's; see :func:`is_open_clip`.
        names: of the classes, as sentences have them.
        prompts: sentences with {}.
        weights: a file of the whole model, instead of that which the card names.

    Raises:
        LrfaceError: open_clip is not installed; the file is missing, holds no text tower or another model's; the tag's
            weights are not here and cannot be downloaded; the tokenizer cannot be had.
    """
    arguments = card["architecture"]["arguments"]
    model, tag = arguments["model"], arguments.get("pretrained")
    file = weights or arguments.get("weights")
    if not file and not tag:
        raise UsageError(
            f"--zero-shot: {model} started from no file and no tag; name the whole model's file with --text-weights"
        )
    place = Path(file).expanduser() if file else download(model, tag)
    whole = build_whole(model, tag)
    found = read_weights(place)
    state = {key: value for key, value in found.items() if not key.startswith(TOWER) and key not in _NOTES}
    if not any(key.startswith(TOWER) for key in found) or not state:
        raise LrfaceError(
            f"{place} holds no text tower, it is not a whole model's file; name that with --text-weights FILE"
        )
    own = {key: value for key, value in whole.state_dict().items() if not key.startswith(TOWER)}
    check_tensors(own, state, f"{place}, text weights for open_clip's {model},")
    whole.load_state_dict(state, strict=False)
    whole.eval()
    tokens = _tokenizer(model)
    with torch.inference_mode():
        directions = torch.stack(
            [
                F.normalize(
                    whole.encode_text(tokens([line.replace("{}", name) for line in prompts])).float(), dim=-1
                )
                .mean(dim=0)
                .clone()
                for name in names
            ]
        )
        scale = min(float(whole.logit_scale.exp()), HIGHEST_SCALE)
    if not bool(torch.isfinite(directions).all()) or not math.isfinite(scale):
        raise LrfaceError(f"{place}: its text embeddings are not finite; the weights are broken")
    return TextClassifier(F.normalize(directions.clone(), dim=-1), scale)


def _tokenizer(model: str) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(model)
    except Exception as error:  # transformers' own, from a hub: whatever it raises
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(
            f"--zero-shot: the tokenizer of {model} cannot be had ({type(error).__name__}: {reason}). Where there is a "
            f"network, run\n    python -c \"import open_clip; open_clip.get_tokenizer('{model}')\"\nand copy its cache"
        ) from error


# ------------------------------------------------------------------------------------------- open_clip's own networks

PREFIX = "open_clip:"
_OPTIONS = ("weights", "pretrained", "input_size")


def open_clip_network(name: str, text: str, device: str) -> Network:
    """An image tower as it is, of a tag or a file: ``open_clip:RN101@weights=FILE,pretrained=openai``.

    Raises:
        UsageError: an unknown model or option, or neither file nor tag.
        LrfaceError: its weights cannot be had, or do not fit.
    """
    model, _, tail = text.removeprefix(PREFIX).partition("@")
    arguments: dict[str, Any] = {"model": model}
    for part in tail.split(",") if tail else ():
        key, equals, value = part.partition("=")
        if key not in _OPTIONS or key in arguments or not equals or not value:
            raise UsageError(
                f"model {text}: found {part!r} after the @; give {', '.join(f'{key}=...' for key in _OPTIONS)}, each at "
                "most once, with commas between"
            )
        arguments[key] = int(value) if key == "input_size" and value.isdigit() else value
    if not {"weights", "pretrained"} & set(arguments):
        raise UsageError(f"model {text}: say whose weights: {PREFIX}{model}@pretrained=TAG or @weights=FILE")
    network = build_backbone("open_clip", **arguments)
    assert isinstance(network, OpenClipBackbone)
    network.start()
    network.to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode() + b"\0" + value.cpu().contiguous().numpy().tobytes())

    def features(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(images.to(device)).float().cpu()

    card = {"architecture": {"name": "open_clip", "arguments": arguments}}
    assert isinstance(network.input_size, int)
    return Network(name, text, digest.hexdigest(), network.input_size, None, features, card)
