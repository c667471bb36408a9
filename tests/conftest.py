from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"real data is absent: {SHARED / 'data'} does not exist")
    return SHARED


@pytest.fixture(scope="session")
def pooled_model(tmp_path_factory) -> Path:
    """An ONNX model whose embedding anybody can compute: means of 16 x 16 pixels around grey, 147 numbers."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Sub", ["image", "grey"], ["centred"]),
        helper.make_node("AveragePool", ["centred"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "pooled",
        [helper.make_tensor_value_info("image", kind, ("n", 3, 112, 112))],
        [helper.make_tensor_value_info("embedding", kind, ("n", 147))],
        [numpy_helper.from_array(np.float32(0.5).reshape(1), "grey")],
    )
    path = tmp_path_factory.mktemp("models") / "pooled.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
