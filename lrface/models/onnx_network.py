"""An ONNX file as a backbone: a PyTorch network with the file's weights, which can be trained (``pip install
'lrface[onnx]'``).

    {name: onnx, path: recogniser.onnx}
    {name: onnx, path: recogniser.onnx, colour: BGR, mean: 0.5, std: 0.5}

The file is converted by onnx2torch. ``features`` ends at the last square map of more than one pixel that everything behind
it is computed from; a network without one is taken as a whole, with the embedding as a map of one pixel. What the file does
to the pixels before its first layer stays as it is in training; slopes, scales and biases behind it are trained, as the
weights of its layers are, even where the file has them as plain numbers.

The card of a trained network keeps the file's structure (``graph``: the file without the numbers of its weights, packed), so
that the file is needed for training alone.
"""

import base64
import binascii
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lrface.errors import LrfaceError, UsageError
from lrface.models.blocks import PReLU
from lrface.models.onnx_teacher import CARD_KEY, takes_signed
from lrface.models.traced import TracedBackbone, shapes_of, tidy

KEPT = 64
"""Numbers of a tensor that the structure keeps: shapes, bounds and scales, but no weights."""
OPSET = 17
LARGEST = 256 << 20  # bytes of an unpacked structure
# What a plain number of the file may be trained in.
_TRAINED = ("OnnxBinaryMathOperation", "OnnxMatMul", "OnnxGemm", "OnnxPReLU", "OnnxSum")


class OnnxBackbone(TracedBackbone):
    """The network of an ONNX file; see this module.

    Input RGB float [n, 3, input_size, input_size] in [0, 1]; feature map float [n, feature_channels, feature_size,
    feature_size]; embedding float [n, embedding_size].

    Args:
        path: the .onnx file: one input, float images [n, 3, side, side] of a fixed side, embeddings [n, d].
        graph: the file's structure as a card has it, instead: the network has no weights then.
        colour: "RGB" or "BGR", the order of the file's channels.
        mean, std: the file takes (x - mean) / std; a number, or one a channel in the order of its channels. By default
            it takes [0, 1] and normalises inside.
        output: name of the output, where the file has several.

    Raises:
        UsageError: a wrong argument, or one that contradicts lrface's card in the file.
        LrfaceError: onnx2torch is not installed; no such file, none that it can convert, or one of another shape.
    """

    def __init__(
        self,
        path: str | None = None,
        graph: str | None = None,
        colour: str = "RGB",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        output: str | None = None,
    ):
        super().__init__()
        if (path is None) == (graph is None):
            raise UsageError(
                "backbone onnx: give path, an .onnx file (backbone.path=FILE on the command line)"
            )
        if colour not in ("RGB", "BGR"):
            raise UsageError(f"backbone.colour must be RGB or BGR; found {colour!r}")
        self._given = {"colour": colour, "mean": mean, "std": std}
        _normalisation(self._given)  # before a file is read
        self.weights = path  # as of the backbones of libraries: it needs none from a stage before
        if path is not None:
            what = str(path)
            model = _read(Path(path).expanduser())
            if _check_card(model, what, self._given):
                self._given.update(mean=0.5, std=0.5)
        else:
            assert graph is not None
            what = "the structure of an ONNX network (backbone.graph)"
            model = _unpack(graph)
        self.input_size = _choose(model, output, what)
        self.graph = _pack(model)
        device = torch.get_default_device()  # "meta" where only shapes are wanted, and shapes need a run here
        with torch.device("cpu"):
            self.normalise = _normalisation(self._given)
            self._build(model, what)
        self.to(device)

    def prepared(self, x: Tensor) -> Tensor:
        return self.normalise(x)

    def described(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"graph": self.graph, **self._given}

    def _build(self, model: Any, what: str) -> None:
        network = _convert(model, what)
        _flatten(network, [shapes_of(network, n, self.input_size, what) for n in (2, 3)])
        _trained(network)
        self._part(network, what)


class _Normalise(nn.Module):
    """RGB float [n, 3, h, w] in [0, 1] -> what a file takes."""

    mean: Tensor
    std: Tensor

    def __init__(self, swap: bool, mean: Tensor, std: Tensor):
        super().__init__()
        if (std == 0).any():
            raise UsageError("backbone.std must not be 0")
        self.swap, self.plain = swap, bool((mean == 0).all() and (std == 1).all())
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.swap:
            x = x.flip(1)
        return x if self.plain else (x - self.mean) / self.std


def _normalisation(given: dict[str, Any]) -> _Normalise:
    with torch.device("cpu"):
        mean, std = _channels("mean", given["mean"]), _channels("std", given["std"])
        return _Normalise(given["colour"] == "BGR", mean, std)


def _channels(name: str, given: Any) -> Tensor:
    """float32 [1, 1 or 3, 1, 1]."""
    try:
        values = torch.tensor(np.asarray(given, np.float32).reshape(1, -1, 1, 1))
    except (TypeError, ValueError):
        values = torch.empty(1, 0, 1, 1)
    if values.shape[1] not in (1, 3) or not values.isfinite().all():
        raise UsageError(f"backbone.{name} must be a number, or three; found {given!r}")
    return values


def _onnx() -> Any:
    try:
        import onnx
        import onnx2torch  # noqa: F401
    except ImportError as error:
        raise LrfaceError(
            f"backbone onnx needs onnx2torch and onnx ({error}): pip install 'lrface[onnx]'"
        ) from error
    return onnx


def _read(file: Path) -> Any:
    """The file as onnx reads it."""
    onnx = _onnx()
    if not file.is_file():
        raise LrfaceError(
            f"{file}: no such file; backbone.path must be an .onnx file, which training starts from"
        )
    try:
        return onnx.load(str(file))
    except Exception as error:  # protobuf's and onnx's own errors share no base class below Exception
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(f"{file} is no readable ONNX file: {reason}") from error


def _check_card(model: Any, what: str, given: dict[str, Any]) -> bool:
    """lrface's own files take RGB in [0, 1], or, where this is True, in [-1, 1]."""
    text = {entry.key: entry.value for entry in model.metadata_props}.get(CARD_KEY)
    if text is None:
        return False
    signed = takes_signed(text, what)
    if given != {"colour": "RGB", "mean": 0.0, "std": 1.0}:
        raise UsageError(
            f"{what} was exported by lrface and takes RGB in [0, 1]; leave out backbone.colour, mean and std"
        )
    return signed


def _choose(model: Any, output: str | None, what: str) -> int:
    """Leave ``model`` with one output; gives the side of its images."""
    weights = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]
    shape = [each.dim_value for each in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(shape) != 4 or shape[1] != 3 or shape[2] < 1 or shape[2] != shape[3]:
        found = ", ".join(
            f"{each.name} {[d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]}"
            for each in inputs
        )
        raise LrfaceError(
            f"{what} takes {found or 'no input'}; a backbone takes one input, images [n, 3, side, side]"
        )
    if inputs[0].type.tensor_type.elem_type != 1:
        raise LrfaceError(f"{what} takes other numbers than float32; export it in float32 to train it")
    outputs = {each.name: each for each in model.graph.output}
    if output is None and len(outputs) != 1:
        raise UsageError(f"{what} has outputs {', '.join(outputs)}; name one with backbone.output")
    if output is not None and output not in outputs:
        raise UsageError(f"{what} has no output {output!r}; it has {', '.join(outputs)}")
    chosen = outputs[output or next(iter(outputs))]
    del model.graph.output[:]
    model.graph.output.append(chosen)
    return int(shape[2])


def _tensors(model: Any) -> list[Any]:
    """The float tensors of the file that are too large for a card."""
    found = list(model.graph.initializer)
    for node in model.graph.node:
        if node.op_type == "Constant":
            found += [each.t for each in node.attribute if each.name == "value"]
    return [each for each in found if each.data_type == 1 and np.prod(each.dims, dtype=np.int64) > KEPT]


def _pack(model: Any) -> str:
    """The file without the numbers of its weights: zlib, base64."""
    bare = type(model)()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    # Exporters write where in whose source an operator comes from; a card is for everybody.
    graph = bare.graph
    for part in (bare, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        for name in {"doc_string", "metadata_props"}.intersection(part.DESCRIPTOR.fields_by_name):
            part.ClearField(name)
    for tensor in _tensors(bare):
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
    return base64.b64encode(zlib.compress(bare.SerializeToString(deterministic=True), 9)).decode("ascii")


def _unpack(graph: str) -> Any:
    """What :func:`_pack` packed, with zeros for weights."""
    onnx = _onnx()
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(graph, validate=True), LARGEST)
        if unpacker.unconsumed_tail:
            raise ValueError(f"more than {LARGEST} bytes")
        model = onnx.load_from_string(content)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise UsageError(f"backbone.graph is no packed structure of an ONNX file: {error}") from error
    except Exception as error:  # protobuf's own errors share no base class below Exception
        raise UsageError(f"backbone.graph holds no ONNX model: {str(error)[:200]}") from error
    for tensor in _tensors(model):
        tensor.raw_data = bytes(4 * int(np.prod(tensor.dims, dtype=np.int64)))
    return model


def _older(model: Any) -> Any:
    """``model`` in the operators of :data:`OPSET`, which onnx2torch knows, where that can be done."""
    onnx = _onnx()
    from onnx import version_converter

    if all(each.version <= OPSET for each in model.opset_import if not each.domain):
        return model
    try:
        older = version_converter.convert_version(model, OPSET)
    except (
        Exception
    ):  # onnx's own errors share no base class below Exception; the conversion then says what is wrong
        return model
    shapes = {
        each.name: onnx.numpy_helper.to_array(each) for each in older.graph.initializer if each.data_type == 7
    }
    for node in older.graph.node:
        if node.op_type == "Reshape" and node.input[1] in shapes and (shapes[node.input[1]] != 0).all():
            # It says what a zero means; there is none.
            kept = [each for each in node.attribute if each.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return older


def _convert(model: Any, what: str) -> fx.GraphModule:
    import onnx2torch

    try:
        network: fx.GraphModule = onnx2torch.convert(_older(model))
    except Exception as error:  # it raises whatever an operator that it does not know leads to
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(
            f"{what} cannot be turned into a PyTorch network ({type(error).__name__}: {reason}); such a file can "
            "still be a teacher that onnxruntime runs: method.teacher={name: onnx, path: FILE}"
        ) from error
    return network.eval()


def _flatten(network: fx.GraphModule, shapes: Sequence[dict[str, torch.Size | None]]) -> None:
    """Reshapes to [n, all the rest] by sizes that the file computes become plain flattening."""
    for node in list(network.graph.nodes):
        if node.op != "call_module" or type(network.get_submodule(node.target)).__name__ != "OnnxReshape":
            continue
        pairs = [(each[node.args[0].name], each[node.name]) for each in shapes]
        if all(a is not None and b is not None and b == (a[0], a[1:].numel()) for a, b in pairs):
            network.set_submodule(node.target, nn.Flatten(1))
            node.args = node.args[:1]
    tidy(network)


def _trained(network: fx.GraphModule) -> None:
    """Plain numbers that a float layer behind the first one computes with become parameters."""
    begun = False
    for node in list(network.graph.nodes):
        if node.op != "call_module":
            continue
        layer = network.get_submodule(node.target)
        kind = type(layer).__name__
        begun = begun or kind in ("OnnxMatMul", "OnnxGemm") or next(layer.parameters(), None) is not None
        if not begun or kind not in _TRAINED:
            continue
        for other in [each for each in node.all_input_nodes if each.op == "get_attr"]:
            owner, _, name = str(other.target).rpartition(".")
            holder = network.get_submodule(owner)
            value = getattr(holder, name)
            if isinstance(value, nn.Parameter) or not value.is_floating_point() or value.numel() < 2:
                continue
            if kind == "OnnxPReLU" and value.numel() == len(value):
                slopes = PReLU(len(value))
                slopes.weight = nn.Parameter(value.detach().reshape(-1).clone())
                network.set_submodule(node.target, slopes)
                node.args = node.args[:1]
            else:
                delattr(holder, name)
                holder.register_parameter(name, nn.Parameter(value.detach().clone()))
    tidy(network)
