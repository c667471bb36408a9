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
