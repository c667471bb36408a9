"""Small ONNX files for tests."""

import numpy as np
import pytest
import torch


def write_onnx(file, scale: float = 1.0, size: int = 32, width: int = 4, output: bool = False):
    """A file that multiplies the means of the channels by a fixed matrix."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    matrix = np.arange(3 * width, dtype=np.float32).reshape(3, width) - 5
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["embedding"]),
    ]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", width])]
    if output:
        outputs.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, ["n", 3]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, size, size])],
        outputs,
        [numpy_helper.from_array(matrix * scale, "matrix")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(file))
    return torch.from_numpy(matrix * scale)


def write_recogniser(
    file, size: int = 16, width: int = 8, bgr: bool = False, metadata: str | None = None, opset: int = 17
):
    """A small recogniser as exporters write them, with random weights: normalisation inside (or none, with ``bgr``), two
    convolutions with PReLU and BatchNorm, a scale, a Reshape by a shape that is computed, and a linear layer."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)

    def weight(name, *shape, scale=0.3, shift=0.0):
        return numpy_helper.from_array((random.normal(size=shape) * scale + shift).astype(np.float32), name)

    side = size // 4
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["c1"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("PRelu", ["c1", "slopes"], ["a1"]),
        helper.make_node("Conv", ["a1", "w2"], ["c2"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c2", "gamma", "beta", "mean", "variance"], ["n2"]),
        helper.make_node("Relu", ["n2"], ["r2"]),
        helper.make_node("Mul", ["r2", "scale"], ["map"]),
        helper.make_node("Shape", ["map"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["count"]),
        helper.make_node("Concat", ["count", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["map", "wanted"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["embedding"], transB=1),
    ]
    weights = [
        weight("w1", width, 3, 3, 3),
        weight("b1", width),
        weight("slopes", width, 1, 1, scale=0.1, shift=0.25),
        weight("w2", 2 * width, width, 3, 3),
        weight("gamma", 2 * width, scale=0.1, shift=1.0),
        weight("beta", 2 * width),
        weight("mean", 2 * width),
        numpy_helper.from_array(np.full(2 * width, 0.5, np.float32), "variance"),
        weight("scale", 1, 2 * width, 1, 1, scale=0.1, shift=1.0),
        numpy_helper.from_array(np.array([0]), "zero"),
        numpy_helper.from_array(np.array([-1]), "rest"),
        weight("w3", width, 2 * width * side * side),
        weight("b3", width),
    ]
    if opset > 17:  # as PyTorch's exporter writes it
        nodes[6:10] = [helper.make_node("Reshape", ["map", "wanted"], ["flat"], allowzero=1)]
        weights.append(numpy_helper.from_array(np.array([-1, 2 * width * side * side]), "wanted"))
    if not bgr:
        nodes[:0] = [
            helper.make_node("Sub", ["images", "centre"], ["centred"]),
            helper.make_node("Div", ["centred", "spread"], ["input"]),
        ]
        centre = np.array([0.4, 0.5, 0.6], np.float32).reshape(1, 3, 1, 1)
        weights += [
            numpy_helper.from_array(centre, "centre"),
            weight("spread", 1, 3, 1, 1, scale=0.0, shift=0.5),
        ]
    name = "input" if bgr else "images"
    graph = helper.make_graph(
        nodes,
        "recogniser",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", width])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    if metadata is not None:
        helper.set_model_props(model, {"lrface_card": metadata})
    onnx.save(model, str(file))
    return file
