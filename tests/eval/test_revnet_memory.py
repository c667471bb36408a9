"""The counter of the bench: it sees what lives, on the meta device as on the CPU."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "eval" / "bench" / "revnet_memory.py"
    spec = importlib.util.spec_from_file_location("revnet_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BATCH = 5
    return module


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_counter_knows_what_is_alive(bench, device):
    with torch.device(device), bench.Peak(5) as counted:
        first = torch.zeros(5, 3, 2, 2)  # 240 bytes
        second = first + 1
        view = second[:, :1]
        torch.zeros(4, 3, 2, 2)  # another number of rows
        assert (counted.now, counted.most) == (480, 480)
        del first
        assert counted.now == 240
        del second
        assert counted.now == 240  # the view still holds it
        del view
        torch.zeros(5, 3, 2, 2)
        assert (counted.now, counted.most) == (0, 480)


@pytest.mark.parametrize("inverse", [False, True])
def test_nothing_has_to_be_computed_to_be_counted(bench, inverse):
    found = [bench.peak(45, True, inverse, size=32, device=device) for device in ("cpu", "meta")]
    assert found[0] == found[1] > 0


def test_depth_costs_memory_only_where_activations_are_kept(bench):
    shallow, deep, kept = (
        bench.peak(depth, recompute, size=32) for depth, recompute in ((45, True), (150, True), (150, False))
    )
    assert deep == shallow < kept / 4


def test_masks_take_a_bit_where_activations_take_thirty_two(bench):
    masks, deep = (bench.peak(depth, False, inverse=True, size=32) for depth in (45, 150))
    with bench.without_masks():
        kept, kept_deep = (bench.peak(depth, False, inverse=True, size=32) for depth in (45, 150))
    assert 0 < deep - masks < (kept_deep - kept) / 32


def test_three_hundred_layers_are_as_exact_as_promised(bench):
    found = bench.exactness(64, bottleneck=64)
    assert 0 < found["error_float64"] < 1e-9 and 0 < found["gradient_error"] < 1e-8
    assert found["error_float64"] < found["error_float32"] < 1e-3
