"""ONNX graphs changed in place: what goes in, which output there is, the batch, the card; and what they tell of whoever
exported them removed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrface.errors import LrfaceError
from lrface.models.insightface_files import SIGNED, own_rule
from lrface.models.onnx_teacher import CARD_KEY

BATCH = "batch"
# The newest that onnxruntime 1.18 reads.
_IR_VERSION = 10


def load_onnx(file: Path) -> Any:
    """The onnx.ModelProto of ``file`` with all its weights. Raises LrfaceError: no onnx, or no such file."""
    try:
        import onnx
    except ImportError as error:
        raise LrfaceError(
            f"{file}: changing an ONNX file needs onnx: pip install 'lrface[export]'"
        ) from error
    try:
        return onnx.load(str(file))
    except Exception as error:  # protobuf's and onnx's own errors share no base class below Exception
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(f"{file} is no readable ONNX file: {reason}") from error


def feed(model: Any, swap: bool, scale: Sequence[float], shift: Sequence[float]) -> None:
    """Let a graph take ``x``, where it took ``scale * x + shift`` with its channels reversed if ``swap``.

    Args:
        scale, shift: three numbers each, in the order of the graph's own channels.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    image = image_input(model)
    kind = np.float16 if image.type.tensor_type.elem_type == 10 else np.float32
    steps: list[tuple[str, str, np.ndarray]] = []
    if swap:
        steps.append(("Gather", "channels", np.array([2, 1, 0], np.int64)))
    if any(each != 1 for each in scale):
        steps.append(("Mul", "scale", np.array(scale, kind).reshape(1, 3, 1, 1)))
    if any(each != 0 for each in shift):
        steps.append(("Add", "shift", np.array(shift, kind).reshape(1, 3, 1, 1)))
    if not steps:
        return
    # A file may have been exported before: names are as new as they need to be.
    taken = {each.name for each in (*graph.initializer, *graph.node)}
    number = next(
        each for each in range(len(taken) + 1) if not any(n.startswith(f"lrface{each}_") for n in taken)
    )
    nodes, last = [], image.name
    for operator, name, value in steps:
        name = f"lrface{number}_{name}"
        graph.initializer.append(numpy_helper.from_array(value, f"{name}_value"))
        node = helper.make_node(operator, [last, f"{name}_value"], [f"{name}_given"], name)
        if operator == "Gather":
            node.attribute.append(helper.make_attribute("axis", 1))
        nodes.append(node)
        last = f"{name}_given"
    _rename(graph, image.name, last)
    before = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *before])


def image_input(model: Any) -> Any:
    """The only input that is no weight."""
    weights = {each.name for each in model.graph.initializer}
    (image,) = (each for each in model.graph.input if each.name not in weights)
    return image


def _rename(graph: Any, old: str, new: str) -> None:
    """Whoever reads the value ``old`` reads ``new``, in branches and loops too."""
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                if inner.node:
                    _rename(inner, old, new)
    for output in graph.output:
        if output.name == old:
            output.name = new


def keep_output(model: Any, output: str) -> None:
    """Leave the graph with the one output ``output``."""
    kept = [each for each in model.graph.output if each.name == output]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def sort_nodes(model: Any) -> None:
    """Put every node behind those whose outputs it reads: onnxruntime's tools append some at the end."""
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    done: set[str] = set()
    ordered: list[Any] = []
    for last in graph.node:
        waiting = [(last, False)]
        while waiting:
            node, ready = waiting.pop()
            if ready:
                ordered.append(node)
            elif node.output[0] not in done:
                done.add(node.output[0])
                waiting.append((node, True))
                waiting += [(made[name], False) for name in reversed(_read_by(node)) if name in made]
    del graph.node[:]
    graph.node.extend(ordered)


def _read_by(node: Any) -> list[str]:
    """Names that a node reads, with those that its branches and loops may read."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            names += [name for each in inner.node for name in _read_by(each)]
            names += [each.name for each in inner.output]
    return names


def free_batch(model: Any) -> None:
    """Declare that the graph takes any number of images. Whether it can is seen by running it."""
    for value in (image_input(model), *model.graph.output):
        dimension = value.type.tensor_type.shape.dim
        if dimension:
            dimension[0].Clear()
            dimension[0].dim_param = BATCH
    # Shapes in between may have been stated for one batch.
    del model.graph.value_info[:]


def for_insightface(model: Any) -> None:
    """Name nodes so that insightface gives the graph (x - 127.5) / 127.5: its rule goes by the names of the first eight."""
    for node in model.graph.node[:8]:
        if node.name.startswith(("Sub", "_minus", "Mul", "_mul")):
            node.name = f"lrface_{node.name}"
    assert own_rule(model) == SIGNED


def finish(model: Any, card: str) -> bytes:
    """The file: with the card, without paths and source lines of the machine that exported it.

    Raises LrfaceError: more than the 2 GB of a protobuf file.
    """
    import onnx

    import lrface

    model.producer_name, model.producer_version = "lrface", lrface.__version__
    model.ir_version = min(model.ir_version, _IR_VERSION)
    model.doc_string = ""
    del model.metadata_props[:]
    model.metadata_props.add(key=CARD_KEY, value=card)
    graph = model.graph
    for entry in (
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
        *model.functions,
    ):
        entry.doc_string = ""
        if hasattr(entry, "metadata_props"):
            del entry.metadata_props[:]
    try:
        content = model.SerializeToString()
        onnx.checker.check_model(content, full_check=True)
    except Exception as error:  # protobuf's and onnx's own errors share no base class below Exception
        reason = str(error).partition("\n")[0][:300]
        raise LrfaceError(f"the ONNX graph that was made does not pass onnx.checker: {reason}") from error
    return content
