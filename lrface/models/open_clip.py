"""The image towers of open_clip as backbones: CLIP and its like, of any architecture (``pip install 'lrface[clip]'``).

    {name: open_clip, model: RN101, pretrained: openai}      weights that open_clip knows by a tag
    {name: open_clip, model: RN101, weights: rn101.pt}       a file: a whole model's state_dict, or its image tower's

``embed`` ends where CLIP compares images with texts: the embedding is what its ``encode_image`` gives, not normalised to
length 1. Of CLIP's ResNets ``features`` is the map before attention pooling; other towers (ViT, ConvNeXt, ...) are taken as
a whole, with the embedding as a map of one pixel.

Weights are read when training starts (:meth:`OpenClipBackbone.start`): those of a tag by open_clip's own download, which
keeps them in its cache. Without a network the error says by what command they come, and where they go.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrface.errors import LrfaceError, UsageError
from lrface.models.library import LibraryBackbone, NormaliseChannels, check_tensors
from lrface.models.weights import read_weights
from lrface.registry import nearest

TOWER = "visual."
"""Where the image tower's tensors are in a whole model."""


class OpenClipBackbone(LibraryBackbone):
    """An image tower of open_clip; see this module.

    Input RGB float [n, 3, input_size, input_size] in [0, 1]; images are normalised as the tag's weights want them, by
    default as OpenAI's.

    Args:
        model: open_clip's name of it, such as RN101 or ViT-B-32.
        pretrained: a tag of open_clip's for this model, such as openai.
        weights: a file to read instead, .pt or .safetensors; with ``pretrained`` too it is that tag's, and only its
            normalisation is looked up.
        input_size: pixels of a side; by default those of the model.

    Raises:
        LrfaceError: open_clip is not installed.
        UsageError: an unknown model or tag, or one that does not take images of this size.
    """

    library = "open_clip"
    network: Any
    _tag: str | None
    _file: str | None

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        weights: str | None = None,
        input_size: int | None = None,
    ):
        self._tag, self._file = pretrained, weights  # before the rest: what is built depends on them
        size = configuration_of(model)["vision_cfg"]["image_size"] if input_size is None else input_size
        if not isinstance(size, int):
            raise UsageError(
                f"backbone.model: open_clip's {model} takes images of {size} pixels, not square ones"
            )
        super().__init__(model, size, "original", weights or pretrained)

    def _build(self) -> None:
        import open_clip

        configuration = configuration_of(self.model)
        forced: dict[str, Any] = {}
        native = configuration["vision_cfg"]["image_size"]
        if self.input_size != native:
            forced["force_image_size"] = self.input_size
        known = open_clip.get_pretrained_cfg(self.model, self._tag) if self._tag else {}
        if self._tag and not known:
            tags = open_clip.list_pretrained_tags_by_model(self.model)
            raise UsageError(
                f"backbone.pretrained: open_clip has no weights {self._tag!r} for {self.model}"
                f"{nearest(self._tag, tags)}; it has {', '.join(tags) or 'none'}"
            )
        with _quiet():
            try:
                device = torch.get_default_device()  # not the CPU, whatever the context says
                whole: Any = open_clip.create_model(self.model, pretrained=None, device=device, **forced)
            except (AssertionError, ValueError, TypeError, RuntimeError) as error:
                raise UsageError(
                    f"backbone.input_size: open_clip's {self.model} cannot be built for images of {self.input_size} "
                    f"pixels: {str(error)[:200]}"
                ) from error
        self.network = whole.visual
        if known.get("quick_gelu") and any(isinstance(part, nn.GELU) for part in self.network.modules()):
            raise UsageError(
                f"backbone.model: the weights {self._tag!r} of {self.model} were trained with another activation; take "
                f"model: {self.model}-quickgelu"
            )
        said = open_clip.get_model_preprocess_cfg(whole)
        self.normalise = NormaliseChannels(known.get("mean", said["mean"]), known.get("std", said["std"]))
        self.has_map = all(hasattr(self.network, part) for part in ("stem", "layer4", "attnpool"))
        self.classifier = ""

    def own_name(self, key: str) -> str:
        return f"network.{key}"

    def features(self, x: Tensor) -> Tensor:
        network, x = self.network, self.normalise(x)
        if not self.has_map:
            found = network(x)
            # Towers made for captions give the pixels' tokens beside the embedding.
            return (found[0] if isinstance(found, tuple) else found)[:, :, None, None]
        x = network.stem(x)
        return network.layer4(network.layer3(network.layer2(network.layer1(x))))

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.network.attnpool(feature_map) if self.has_map else feature_map.flatten(1)

    def start(self) -> tuple[str, dict[str, Tensor]]:
        """Fill the tower with the tensors of ``weights``, or of ``pretrained`` from open_clip's cache or the network.

        Returns:
            What to tell the user, and no classifier.

        Raises:
            LrfaceError: the file is missing, broken or of another network; the tag's weights are not in the cache and
                cannot be downloaded. The message says what to do.
        """
        file = Path(self._file).expanduser() if self._file else download(self.model, self._tag)
        found = read_weights(file)
        tower = {key.removeprefix(TOWER): value for key, value in found.items() if key.startswith(TOWER)}
        state = {self.own_name(key): value for key, value in (tower or found).items()}
        own = self.state_dict()
        state.update({key: own[key] for key in own if key.startswith("normalise.")})
        state.update(
            {key: own[key] for key in own if key.endswith(".num_batches_tracked") and key not in state}
        )
        check_tensors(own, state, f"{file}, weights for open_clip's {self.model},")
        self.load_state_dict(state)
        return f"starts from {file}", {}


def download(model: str, tag: str | None) -> Path:
    """The file of a tag's weights, of the whole model, from open_clip's cache or the network.

    Raises:
        LrfaceError: neither has it; says by what command it comes.
    """
    import open_clip

    call = f"open_clip.download_pretrained(open_clip.get_pretrained_cfg('{model}', '{tag}'))"
    try:
        with _quiet():
            found = open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, tag))
    except Exception as error:  # huggingface_hub and urllib share no base class below Exception
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(
            f"open_clip's weights {tag!r} of {model} are not on this machine and could not be downloaded "
            f"({type(error).__name__}: {reason}). Where there is a network, run\n"
            f'    python -c "import open_clip; print({call})"\n'
            "copy the file that it names to this machine, and give it as weights: FILE beside pretrained: "
            f"{tag} (backbone.weights=FILE on the command line)"
        ) from error
    return Path(found)


def build_whole(model: str, tag: str | None) -> Any:
    """The whole model, with fresh weights and the activation that those of the tag were trained with."""
    import open_clip

    configuration_of(model)
    known = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    with _quiet():
        return open_clip.create_model(
            model, pretrained=None, force_quick_gelu=bool(known and known.get("quick_gelu"))
        )


def configuration_of(model: str) -> dict[str, Any]:
    """open_clip's description of ``model``. Raises LrfaceError where it is not installed, UsageError for an unknown one."""
    try:
        import open_clip
    except ImportError as error:
        raise LrfaceError(
            f"backbone open_clip ({model}) needs open_clip, which is not installed: pip install 'lrface[clip]'"
        ) from error
    found = open_clip.get_model_config(model)
    if found is None or "image_size" not in found.get("vision_cfg", {}):
        raise UsageError(
            f"backbone.model: open_clip has no model {model!r}{nearest(model, open_clip.list_models())}"
        )
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights, which are filled later."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
