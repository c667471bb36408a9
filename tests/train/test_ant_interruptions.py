"""A run of Adversarial Noise Training that is killed (kill -9) in the middle of a restart comes to the same bits."""

import pytest
import torch
from test_interruptions import has_rows, kill_when, nursery_of

from lrface.train.checkpoint import checkpoints, load_parts, load_training_state

STEPS, RESTART = 14, 6
RECIPE = {
    "name": "tiny",
    "data": {"path": "faces", "batch_size": 8},
    "backbone": {"name": "cifar_resnet18", "width": 4},
    "head": "cosface",
    "trainer": {
        "device": "cpu",
        "precision": "float32",
        "threads": 1,
        "checkpoint_every": 1,
        "keep_last": 20,
        "log_every": 1,
        "tensorboard": False,
        "sheet_every": 0,
    },
    "stages": [
        {
            "name": "noise",
            "method": {
                "name": "ant",
                "restart_steps": RESTART,
                "fresh_share": 0.67,
                "save_steps": 1,
                "replay_size": 3,
                "learning_rate": 0.01,
            },
            "degrade": "clean",
            "steps": STEPS,
            "optimiser": {"learning_rate": 0.01},
        }
    ],
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with nursery_of(tmp_path_factory.mktemp("kills"), RECIPE, people=4, images=6, size=32, coarse=4) as found:
        yield found


def test_kills_in_the_middle_of_restarts(nursery):
    nursery.finish("reference")
    killed = nursery.folder / "killed"
    places = set()
    for rows in (4, 10):  # successors learn in steps 2 to 5 and 8 to 11
        pid = nursery.start("killed")
        assert kill_when(nursery, pid, lambda rows=rows: has_rows(killed, "1-noise", rows)), nursery.log(
            "killed"
        )
        reached = load_training_state(checkpoints(killed / "stages" / "1-noise")[-1])
        places.add(reached.step % RESTART)
        assert reached.step < STEPS and reached.extra["step"] == reached.step
    assert places & {3, 4, 5}
    nursery.finish("killed")
    for step in range(1, STEPS + 1):
        name = f"stages/1-noise/step-{step:08d}"
        whole, other = nursery.folder / "reference" / name, killed / name
        first, second = load_parts(whole), load_parts(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), step
        states = [load_training_state(place).extra for place in (whole, other)]
        assert (
            torch.equal(states[0]["states"], states[1]["states"]) and states[0]["seen"] == states[1]["seen"]
        )
