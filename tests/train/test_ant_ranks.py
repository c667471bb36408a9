"""Adversarial Noise Training on two ranks is that of one process: generators are moved by all ranks' images."""

import sys
from pathlib import Path

import ant_in_ranks
import torch

from lrface.train.launch import launch


def test_two_ranks_train_the_generators_of_one_process(tmp_path):
    said: list[str] = []
    script = Path(__file__).with_name("ant_in_ranks.py")
    command = [sys.executable, str(script), str(tmp_path / "two")]
    assert launch(command, 2, 1, said.append) == 0, said
    ant_in_ranks.train(tmp_path / "one")
    (two, states), (one, wanted) = (ant_in_ranks.result(tmp_path / name) for name in ("two", "one"))
    assert two.keys() == one.keys() and len(states) == len(wanted) > 3
    # Adam makes steps of one length of gradients that are rounding alone: what counts is the way as a whole.
    moved = float((wanted[-1] - wanted[0]).norm())
    assert moved > 0.05 and float((states - wanted).norm(dim=1).max()) < 0.05 * moved
    for key, value in one.items():
        if value.is_floating_point() and not key.startswith(("generator", "successor")):
            torch.testing.assert_close(two[key], value, rtol=1e-2, atol=2e-3, msg=key)
