"""What test_ant_ranks.py runs in one process and in two: ``ant_in_ranks.py OUT`` as one of two ranks."""

import sys
from pathlib import Path

import torch

from lrface.data.dataset import CachedDataset, batches
from lrface.data.synthetic import SyntheticFaces
from lrface.degrade.policies import build_policy
from lrface.heads import build_head
from lrface.methods import METHODS
from lrface.models import build_backbone
from lrface.train import distributed
from lrface.train.checkpoint import latest_checkpoint, load_parts, load_training_state
from lrface.train.optimisers import Optimiser
from lrface.train.trainer import Stage, Trainer

BATCH, IDENTITIES, STEPS = 12, 6, 7


def train(folder: Path) -> None:
    """Seven steps, with a restart in them."""
    torch.manual_seed(distributed.rank())  # rank 0's start is everybody's
    encoder = build_backbone("cifar_resnet18", width=4)
    method = METHODS.build(
        "ant",
        encoder=encoder,
        head=build_head("cosface", encoder.embedding_size, IDENTITIES, scale=8.0),
        policy=build_policy("clean"),
        restart_steps=4,
        save_steps=1,
        learning_rate=0.01,
    )
    dataset = CachedDataset(SyntheticFaces(IDENTITIES, 4), 32, show_progress=False)
    part = (distributed.rank(), distributed.ranks())

    def stream(first: int, last: int):
        return batches(dataset, BATCH, 7, first, last, part=part)

    trainer = Trainer(device="cpu", precision="float32", tensorboard=False, show_progress=False, log_every=1)
    card = {"format": "lrface-model", "version": 1}
    trainer.fit(Stage("noise", method, STEPS, BATCH, stream, folder, card, Optimiser(learning_rate=0.001)))


def result(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All tensors at the end, and the saved states of generators."""
    found = latest_checkpoint(folder)
    assert found is not None
    return load_parts(found), load_training_state(found).extra["states"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.process_group(2, 1, "cpu", 120):
        train(Path(sys.argv[1]))
