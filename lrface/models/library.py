"""Networks of torchvision and timm as backbones: their layers, without their classifiers.

    {name: torchvision, model: resnet50, stem: quality, input_size: 224}
    {name: timm, model: convnextv2_atto}
    resnet18, resnet50, resnext101_32x8d     short for torchvision's of these names

The last feature map before pooling is ``features``; ``embed`` is what the network does from there to the input of its
last linear layer, for most the mean over the pixels. That layer is left out: lrface's head is the classifier.

``stem: quality`` is the papers' ResNet (paper 001, section 4.1; paper 000, appendix A): "we remove max-pooling and
replace the first convolution of stride 1 behind max-pooling with the convolution of stride 2". Taken here as the first
stage made the way the other three are, with stride 2 in its first block:

- blocks of two 3x3 convolutions (ResNet-18, 34): stride 2 in the first, and the shortcut, which was the identity, gets
  the 1x1 convolution of stride 2 with BatchNorm that shortcuts have wherever the shape changes (4,224 more parameters);
- bottlenecks (ResNet-50, ResNeXt-101): stride 2 in the 3x3 convolution and in the shortcut's 1x1 convolution, as in the
  other stages of PyTorch's ResNets. The 1x1 convolution before the 3x3 one comes first in the literal sense; with
  stride 2 there, both ways past it would throw three quarters of the stem's pixels away unseen. No weight changes shape.

The feature map keeps its size. timm's ResNets that average in the shortcut do so here, too.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lrface.errors import LrfaceError, UsageError
from lrface.models.blocks import FaceBackbone, initialise
from lrface.models.weights import read_weights
from lrface.registry import nearest

STEMS = ("original", "quality")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class NormaliseChannels(nn.Module):
    """RGB [n, 3, h, w] in [0, 1] -> (x - mean) / std, a mean and a deviation a channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        deviation = torch.tensor(std).view(1, 3, 1, 1)
        # Kept with the weights: another version of a library may say another mean of the same name.
        self.register_buffer("scale", 1.0 / deviation)
        self.register_buffer("shift", -torch.tensor(mean).view(1, 3, 1, 1) / deviation)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class LibraryBackbone(FaceBackbone):
    """A network of a library; see this module.

    Input RGB float [n, 3, input_size, input_size] in [0, 1]; feature map float [n, feature_channels, feature_size,
    feature_size]; embedding float [n, embedding_size]. The sizes are those of a pass on PyTorch's meta device.

    Args:
        model: the library's name of it.
        input_size: pixels of a side.
        stem: "original", or "quality" for the papers' ResNet without max-pooling.
        weights: a file that a fresh network starts from, of the library's own layout: .pth or .safetensors. It is
            read when training starts (:meth:`start`), not here: a trained network needs it no more.

    Raises:
        UsageError: an unknown model, one without a map of features, or one that does not take images of this size.
    """

    library: ClassVar[str]
    classifier: str
    """Where the classifier's tensors are in the library's own file."""

    def __init__(self, model: str, input_size: int = 224, stem: str = "original", weights: str | None = None):
        super().__init__()
        if stem not in STEMS:
            raise UsageError(f"backbone.stem must be {' or '.join(STEMS)}; found {stem!r}")
        if input_size < 1:
            raise UsageError(f"backbone.input_size must be at least 1; found {input_size}")
        self.model, self.input_size, self.stem, self.weights = model, input_size, stem, weights
        self._shortcut: str | None = None
        self._build()
        self._measure()

    def _build(self) -> None:
        """Set the layers, ``normalise`` and ``classifier``."""
        raise TypeError(f"{type(self).__name__} must define _build()")

    def own_name(self, key: str) -> str:
        """The name here of the library's tensor ``key``."""
        raise TypeError(f"{type(self).__name__} must define own_name(key)")

    def _stride_stem(self, network: nn.Module, place: str) -> None:
        added = quality_stem(network, f"{self.library}'s {self.model}")
        self._shortcut = None if added is None else f"{place}.{added}."

    def _measure(self) -> None:
        state = {key: value.to("meta") for key, value in [*self.named_parameters(), *self.named_buffers()]}
        training = self.training
        self.eval()
        image = torch.empty(1, 3, self.input_size, self.input_size, device="meta")
        try:
            with torch.no_grad():
                feature_map = functional_call(_Part(self, self.features), _inside(state), (image,))
                if feature_map.ndim != 4:
                    raise UsageError(
                        f"backbone.model: {self.library}'s {self.model} gives features of shape "
                        f"{['n', *feature_map.shape[1:]]}, not a map of channels over pixels; choose a convolutional "
                        "network, or one that pools a map (Swin)"
                    )
                embedding = functional_call(_Part(self, self.embed), _inside(state), (feature_map,))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise UsageError(
                f"backbone.input_size: {self.library}'s {self.model} does not take images of {self.input_size} x "
                f"{self.input_size} pixels ({reason})"
            ) from error
        self.train(training)
        if feature_map.shape[2] != feature_map.shape[3] or embedding.ndim != 2:
            raise UsageError(
                f"backbone.model: {self.library}'s {self.model} gives a map of {tuple(feature_map.shape)} and an "
                f"embedding of {tuple(embedding.shape)}; a square map and a vector are needed"
            )
        self.feature_channels, self.feature_size = int(feature_map.shape[1]), int(feature_map.shape[2])
        self.embedding_size = int(embedding.shape[1])

    def start(self) -> tuple[str, dict[str, Tensor]]:
        """Fill the network with the tensors of ``weights``, each of which must fit.

        Where the file was saved from a network of the original stem, the new layers of the shortcut stay fresh.

        Returns:
            What to tell the user, and the classifier's tensors, ``weight`` and ``bias`` where it is a linear layer.

        Raises:
            LrfaceError: the file is missing or broken, or is of another network; the message names the first tensor.
        """
        assert self.weights is not None
        file = Path(self.weights).expanduser()
        found = read_weights(file)
        prefix = f"{self.classifier}."
        classifier = {
            key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)
        }
        state = {self.own_name(key): value for key, value in found.items() if not key.startswith(prefix)}
        own = self.state_dict()
        added = [] if self._shortcut is None else [key for key in own if key.startswith(self._shortcut)]
        fresh = [] if any(key in state for key in added) else added
        normalise = [key for key in own if key.startswith("normalise.")]
        # Files of early versions of PyTorch do not count batches.
        counts = [key for key in own if key.endswith(".num_batches_tracked") and key not in state]
        state.update({key: own[key] for key in [*fresh, *normalise, *counts]})
        check_tensors(own, state, f"{file}, weights for {self.library}'s {self.model},")
        self.load_state_dict(state)
        told = f"starts from {file}"
        return told + ("; the shortcut of its stem is fresh" if fresh else ""), classifier


class _Part(nn.Module):
    """One of a network's functions as a module of its own, for ``functional_call``."""

    def __init__(self, network: nn.Module, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network = network
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _inside(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"network.{key}": value for key, value in state.items()}


def check_tensors(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Raises LrfaceError naming the first tensor of ``state`` that is missing, left over or of another shape."""
    found = []
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if other:
        key = other[0]
        found.append(
            f"{len(other)} tensors of another shape, first {key}: {tuple(state[key].shape)} in the file, "
            f"{tuple(own[key].shape)} in the network"
        )
    for word, keys in (
        ("missing", [key for key in own if key not in state]),
        ("not of this network", [key for key in state if key not in own]),
    ):
        if keys:
            found.append(f"{len(keys)} {word}, first {keys[0]}")
    if found:
        raise LrfaceError(f"{what} is of another architecture: {'; '.join(found)}")


# How torchvision's networks are put together: the children that make the map of features, those that follow ("+" is a
# function in the network's own forward pass), and the classifier. Its last linear layer (SqueezeNet: convolution) is
# lrface's head; what comes before that stays.
_TORCHVISION: dict[str, tuple[str, str, str]] = {
    "ResNet": ("conv1 bn1 relu maxpool layer1 layer2 layer3 layer4", "avgpool +flatten", "fc"),
    "RegNet": ("stem trunk_output", "avgpool +flatten", "fc"),
    "ShuffleNetV2": ("conv1 maxpool stage2 stage3 stage4 conv5", "+pool +flatten", "fc"),
    "DenseNet": ("features +relu", "+pool +flatten", "classifier"),
    "SqueezeNet": ("features", "+pool +flatten", "classifier"),
    "MobileNetV2": ("features", "+pool +flatten", "classifier"),
    "MNASNet": ("layers", "+pool +flatten", "classifier"),
    "VGG": ("features", "avgpool +flatten", "classifier"),
    "AlexNet": ("features", "avgpool +flatten", "classifier"),
    "MobileNetV3": ("features", "avgpool +flatten", "classifier"),
    "EfficientNet": ("features", "avgpool +flatten", "classifier"),
    "ConvNeXt": ("features", "avgpool", "classifier"),
    "MaxVit": ("stem blocks", "", "classifier"),
    "SwinTransformer": ("features norm permute", "avgpool +flatten", "head"),
}
_FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "+relu": lambda: nn.ReLU(inplace=True),
    "+pool": lambda: nn.AdaptiveAvgPool2d(1),
    "+flatten": lambda: nn.Flatten(),
}


def _torchvision_kind(model: str) -> str:
    """The class of torchvision's network ``model``, by its builder's own annotation."""
    from torchvision.models import get_model_builder

    kind = get_model_builder(model).__annotations__.get("return")
    return getattr(kind, "__name__", str(kind))


def _chain(network: nn.Module, names: str) -> nn.Sequential:
    """Children of ``network``, under their own names, one after another."""
    chain = nn.Sequential()
    for name in names.split():
        part = _FUNCTIONS[name]() if name in _FUNCTIONS else network.get_submodule(name)
        chain.add_module(
            name.removeprefix("+"), nn.Sequential(*part) if isinstance(part, nn.ModuleList) else part
        )
    return chain


class TorchvisionBackbone(LibraryBackbone):
    """A network of torchvision, such as resnet50, convnext_tiny or swin_t: see :class:`LibraryBackbone`.

    Images are normalised by ImageNet's mean and deviation, as for torchvision's own weights.
    """

    library = "torchvision"

    def _build(self) -> None:
        from torchvision import models

        known = models.list_models(module=models)
        if self.model not in known:
            raise UsageError(
                f"backbone.model: torchvision has no classifier {self.model!r}{nearest(self.model, known)}"
            )
        kind = _torchvision_kind(self.model)
        if kind not in _TORCHVISION:
            fit = [name for name in known if _torchvision_kind(name) in _TORCHVISION]
            raise UsageError(
                f"backbone.model: torchvision's {self.model} is not a plain map of features with a classifier behind; "
                f"choose one of {', '.join(fit)}"
            )
        network = models.get_model(self.model, weights=None)
        if self.stem == "quality":
            self._stride_stem(network, "body")
        features, after, classifier = _TORCHVISION[kind]
        self.normalise = NormaliseChannels(IMAGENET_MEAN, IMAGENET_STD)
        self.body, self.output = _chain(network, features), _chain(network, after)
        layers = dict(network.get_submodule(classifier).named_children())
        weighted = [name for name, layer in layers.items() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        if weighted:
            kept = nn.Sequential()
            for name in list(layers)[: list(layers).index(weighted[-1])]:
                kept.add_module(name, layers[name])
            self.output.add_module(classifier, kept)
        self.classifier = ".".join([classifier, *weighted[-1:]])

    def own_name(self, key: str) -> str:
        return f"{'body' if key.partition('.')[0] in self.body._modules else 'output'}.{key}"

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.normalise(x))

    def embed(self, feature_map: Tensor) -> Tensor:
        return self.output(feature_map)


class TimmBackbone(LibraryBackbone):
    """A network of timm (``pip install 'lrface[timm]'``): see :class:`LibraryBackbone`.

    Images are normalised as timm's own configuration of the model says.
    """

    library = "timm"
    network: Any

    def _build(self) -> None:
        try:
            import timm
        except ImportError as error:
            raise LrfaceError(
                f"backbone {self.model} needs timm, which is not installed: pip install 'lrface[timm]'"
            ) from error
        if not timm.is_model(self.model):
            bare = self.model.partition(".")[0]
            raise UsageError(
                f"backbone.model: timm has no model {self.model!r}{nearest(bare, timm.list_models())}"
            )
        said = timm.get_pretrained_cfg(self.model)
        fixed: dict[str, Any] = {}
        if said is not None and said.fixed_input_size:
            fixed["img_size"] = self.input_size
        try:
            network: Any = timm.create_model(self.model, pretrained=False, num_classes=0, **fixed)
        except (AssertionError, ValueError, TypeError, RuntimeError) as error:
            raise UsageError(
                f"backbone.model: timm's {self.model} cannot be built for images of {self.input_size} pixels: {error}"
            ) from error
        if self.stem == "quality":
            self._stride_stem(network, "network")
        self.network = network
        own = network.pretrained_cfg
        classifier = own.get("classifier")
        if not isinstance(classifier, str):
            raise UsageError(
                f"backbone.model: timm's {self.model} has not one classifier but {classifier!r}; choose another"
            )
        self.classifier = classifier
        self.normalise = NormaliseChannels(own["mean"], own["std"])
        self.channels_behind = getattr(network, "output_fmt", None) == "NHWC"

    def own_name(self, key: str) -> str:
        return f"network.{key}"

    def features(self, x: Tensor) -> Tensor:
        feature_map = self.network.forward_features(self.normalise(x))
        return feature_map.permute(0, 3, 1, 2) if self.channels_behind else feature_map

    def embed(self, feature_map: Tensor) -> Tensor:
        if self.channels_behind:
            feature_map = feature_map.permute(0, 2, 3, 1)
        return self.network.forward_head(feature_map, pre_logits=True)


def start_networks(method: nn.Module, loaded: Collection[str]) -> list[str]:
    """Fill a method's fresh networks from the files that their ``weights`` name, and where the encoder's file has a
    classifier of as many classes, the method's linear head from that.

    Args:
        loaded: parts of the method that get other tensors.

    Returns:
        What was done, a line each.

    Raises:
        LrfaceError: see :meth:`LibraryBackbone.start`.
    """
    done = []
    for name, part in method.named_modules():
        if not isinstance(part, LibraryBackbone) or part.weights is None:
            continue
        if any(name == each or name.startswith(f"{each}.") for each in loaded):
            continue
        told, classifier = part.start()
        linear = getattr(getattr(method, "head", None), "linear", None)
        if name == "encoder" and "head" not in loaded and isinstance(linear, nn.Linear) and classifier:
            own = linear.state_dict()
            if {key: value.shape for key, value in classifier.items()} == {
                k: v.shape for k, v in own.items()
            }:
                linear.load_state_dict(classifier)
                told += f"; its classifier of {linear.out_features} classes fills the head, in its order of classes"
            else:
                told += f"; its classifier is left out, the head of {linear.out_features} classes is fresh"
        done.append(f"{name} {told}")
    return done


def quality_stem(network: nn.Module, what: str) -> str | None:
    """Give a ResNet the papers' stem, in place; see this module.

    Returns:
        The name of the shortcut that was added, None where there was one already.

    Raises:
        UsageError: no ResNet, or one without max-pooling before its first stage.
    """
    pool, stage = getattr(network, "maxpool", None), getattr(network, "layer1", None)
    first: Any = stage[0] if isinstance(stage, nn.Sequential) and len(stage) else None
    wide = [
        layer
        for layer in ([] if first is None else first.children())
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    ]
    if not isinstance(pool, nn.MaxPool2d) or first is None or not wide or not hasattr(first, "downsample"):
        raise UsageError(
            f"backbone.stem: quality is for ResNets with max-pooling before their first stage; {what} has none: set it to "
            "original"
        )
    network.maxpool = nn.Identity()
    wide[0].stride = (2, 2)
    if first.downsample is None:
        inputs, outputs = wide[0].in_channels, wide[-1].out_channels
        first.downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)
        )
        initialise(first.downsample)
        return "layer1.0.downsample"
    layers = list(first.downsample)
    if isinstance(layers[0], nn.Identity):  # where timm's other stages average before the 1x1 convolution
        first.downsample[0] = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    else:
        next(layer for layer in layers if isinstance(layer, nn.Conv2d)).stride = (2, 2)
    return None
