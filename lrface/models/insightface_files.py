"""What a recognition network of insightface takes, from where that is written down: its package, its graph, its own rule.

insightface gives a network RGB, aligned to the standard template (``norm_crop``), as ``(x - mean) / std`` of pixels x from 0
to 255, and finds mean and std so (``insightface.model_zoo`` of version 2.1):

- a model package of version 2 has them in ``manifest.json``, ``tasks.recognition.preprocessing``;
- any other file: 0 and 1 where among the names of its first eight nodes one begins with ``Sub`` or ``_minus`` and one with
  ``Mul`` or ``_mul`` (what MXNet exported, which normalises inside), else 127.5 and 127.5 (``ArcFaceONNX``).

Here mean and std are of pixels in [0, 1], as everywhere in lrface: 0 and 1/255, or 0.5 and 0.5.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lrface.errors import LrfaceError

BYTES = (0.0, 1 / 255)
SIGNED = (0.5, 0.5)
MANIFEST = "manifest.json"


def package_says(file: Path) -> tuple[float, float] | None:
    """Mean and std of ``file`` from the manifest of its model package; None where it is in none.

    Raises LrfaceError: a manifest of version 2 that names the file and says something else than mean and std about it.
    """
    try:
        manifest = json.loads((file.parent / MANIFEST).read_text(encoding="utf-8"))
        if manifest["manifest_version"] != 2:
            return None
        task = manifest["tasks"]["recognition"]
        if (file.parent / task["file"]).resolve() != file.resolve():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # some other file of this name
    given = task.get("preprocessing", {"mean": 127.5, "std": 127.5})
    if given == "embedded":
        return BYTES
    try:
        mean, std = float(given["mean"]), float(given["std"])
    except (KeyError, TypeError, ValueError):
        mean = std = math.nan
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise LrfaceError(
            f"{file.parent / MANIFEST}: field 'tasks.recognition.preprocessing' must be \"embedded\" or hold mean and std; "
            f"found {given!r}"
        )
    return mean / 255, std / 255


def read_graph(file: Path) -> Any:
    """The onnx.ModelProto of a file, without weights kept in files beside it. Raises LrfaceError."""
    try:
        import onnx
    except ImportError as error:
        raise LrfaceError(f"reading the graph of {file} needs onnx: pip install 'lrface[export]'") from error
    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own errors share no base class below Exception
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(f"{file} is no readable ONNX file: {reason}") from error


def own_rule(model: Any) -> tuple[float, float]:
    """Mean and std that insightface itself takes for a graph: its rule of names, see above."""
    names = [node.name for node in model.graph.node[:8]]
    inside = any(name.startswith(("Sub", "_minus")) for name in names) and any(
        name.startswith(("Mul", "_mul")) for name in names
    )
    return BYTES if inside else SIGNED


def takes_bytes(model: Any) -> bool:
    """Whether the first thing a graph does to its image brings 0 to 255 to about [-1, 1], by its operators and constants.

    That is what insightface's files of MXNet do. Such a graph cannot be meant for pixels in [0, 1].
    """
    constants = _constants(model.graph)
    images = [each.name for each in model.graph.input if each.name not in constants]
    if len(images) != 1:
        return False
    name, scale, shift = images[0], np.ones(1), np.zeros(1)
    while True:
        users = [node for node in model.graph.node if name in node.input]
        if len(users) != 1:
            break
        node = users[0]
        if node.op_type in ("Identity", "Cast", "Dropout"):
            name = node.output[0]
            continue
        others = [constants.get(each) for each in node.input if each != name]
        if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(others) != 1 or others[0] is None:
            break
        value, first = others[0].reshape(-1), node.input[0] == name
        if value.size not in (1, 3) or (node.op_type == "Div" and not (first and value.all())):
            break
        if node.op_type == "Add":
            shift = shift + value
        elif node.op_type == "Sub":
            scale, shift = (scale, shift - value) if first else (-scale, value - shift)
        else:
            factor = value if node.op_type == "Mul" else 1 / value
            scale, shift = scale * factor, shift * factor
        name = node.output[0]
    low, high = shift, 255 * scale + shift
    return bool((np.abs(low + 1) < 0.05).all() and (np.abs(high - 1) < 0.05).all())


def _constants(graph: Any) -> dict[str, np.ndarray]:
    """Small numbers of a graph by name."""
    from onnx import numpy_helper

    found = [each for each in graph.initializer if np.prod(each.dims, dtype=np.int64) <= 3]
    named = {each.name: each for each in found}
    for node in graph.node:
        if node.op_type == "Constant":
            named.update((node.output[0], each.t) for each in node.attribute if each.name == "value")
    kept = {name: each for name, each in named.items() if np.prod(each.dims, dtype=np.int64) <= 3}
    # A name without numbers still is no image.
    absent = {each.name: np.zeros(0) for each in graph.initializer}
    return absent | {name: numpy_helper.to_array(each).astype(np.float64) for name, each in kept.items()}
