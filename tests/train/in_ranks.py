"""What test_distributed.py runs in one process and in two, to compare: ``in_ranks.py OUT NAME...`` as one of two ranks."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrface.data.dataset import CachedDataset, batches
from lrface.data.synthetic import SyntheticFaces
from lrface.degrade.policy import ResolutionPolicy
from lrface.errors import LrfaceError
from lrface.heads import build_head
from lrface.losses.contrastive import VARIANTS
from lrface.methods import AdA, Classify, Contrastive, Distil, QualNet, Robustify
from lrface.methods.base import Method, StepOutput
from lrface.models import build_backbone, build_decoder
from lrface.train import distributed
from lrface.train.checkpoint import latest_checkpoint, load_parts
from lrface.train.optimisers import Optimiser
from lrface.train.trainer import Stage, Trainer

BATCH = 8
IDENTITIES = 11
STEPS = 6
CARD = {"format": "lrface-model", "version": 1}


def trainer(**settings: Any) -> Trainer:
    plain = {"device": "cpu", "precision": "float32", "tensorboard": False, "show_progress": False}
    return Trainer(**{**plain, "checkpoint_every": 2, "log_every": 1, **settings})


class Toy(Method):
    """Small, with BatchNorm, a head whose classes are split, and dropout where it is wanted."""

    needs = ("x", "label")

    def __init__(self, dropout: float, sample_share: float):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.PReLU(), nn.Linear(16, 8))
        self.dropout = nn.Dropout(dropout)
        self.head = build_head("partial", 8, IDENTITIES, of="discface", scale=8.0, sample_share=sample_share)

    def forward(self, batch: dict[str, Any]) -> StepOutput:
        found = self.head.loss(self.dropout(self.encoder(batch["x"])), batch["label"])
        return StepOutput(found.loss, {"accuracy": found.accuracy})


def toy_batches(stop: int | None = None):
    def stream(first: int, last: int):
        rank, ranks = distributed.rank(), distributed.ranks()
        share = BATCH // ranks
        for step in range(first, last):
            if step == stop:
                raise LrfaceError("stopped by the test")
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 6, generator=generator)
            label = torch.randint(IDENTITIES, (BATCH,), generator=generator)
            part = slice(rank * share, (rank + 1) * share)
            yield {"x": x[part], "label": label[part]}

    return stream


def toy(
    folder: Path, stop: int | None = None, name: str = "sgd", dropout: float = 0.0, share: float = 1.0
) -> None:
    """A run of six steps, or its beginning; goes on from where ``folder`` is."""
    optimiser = Optimiser(name, learning_rate=0.05, clip_norm=1.0)
    torch.manual_seed(5)
    stage = Stage("toy", Toy(dropout, share), STEPS, BATCH, toy_batches(stop), folder, CARD, optimiser)
    with contextlib.suppress(LrfaceError) if stop is not None else contextlib.nullcontext():
        trainer().fit(stage)


def faces(kind: str, head: dict[str, Any]) -> Method:
    torch.manual_seed(1)
    encoder = build_backbone("ir18", width=4, embedding_size=16, dropout=0.0)
    parts = {"encoder": encoder, "head": build_head(embedding_size=16, identities=IDENTITIES, **head)}
    policy = ResolutionPolicy(0.5, sizes=(28, 14))
    if kind == "classify":
        return Classify(policy=policy, **parts)
    if kind == "ada":
        network = {"name": "edsr", "blocks": 1, "features": 4, "scale": 2, "input_size": 112}
        return AdA(policy=policy, network=network, radius=0.05, steps=1, **parts)
    if kind.startswith("distil"):
        teacher = {"name": "ir18", "width": 4, "embedding_size": 8}
        # So heavy that most of the gradient is the distillation's.
        weight = {"fitnet": 10.0, "vid": 10.0}.get(loss := kind.removeprefix("distil_"))
        return Distil(policy=policy, teacher=teacher, loss=loss, weight=weight, **parts)
    if kind.startswith("contrastive"):
        teacher = {
            "name": "ir18",
            "width": 4,
            "embedding_size": 8,
        }  # of another width: the projection is there too
        variant = kind.removeprefix("contrastive_")
        return Contrastive(encoder, policy, teacher, variant, temperature=0.5, start="fresh", chunk=3)
    if kind == "robustify":
        teacher = {"name": "ir18", "width": 4, "embedding_size": 16}
        weights = {"quality_weight": 0.0, "recognition_weight": 0.1, "contrast_weight": 1.0}
        return Robustify(policy=policy, teacher=teacher, freeze=[], **weights, **parts)
    decoder = build_decoder("subpixel", encoder.feature_channels, width=16)
    frozen = ("decoder", "batchnorm") if kind == "frozen" else ()
    return QualNet(policy=policy, decoder=decoder, freeze=frozen, **parts)


CASES = {
    "classify": ("classify", {"name": "cosface"}, {}),
    "classify_adaface": ("classify", {"name": "adaface"}, {}),
    "classify_partial": ("classify", {"name": "partial", "of": "arcface", "sample_share": 1.0}, {}),
    "qualnet": ("qualnet", {"name": "cosface"}, {}),
    "qualnet_frozen": ("frozen", {"name": "cosface"}, {"sync_batchnorm": False}),
    "distil_pkt": ("distil_pkt", {"name": "cosface"}, {}),
    "distil_sp": ("distil_sp", {"name": "cosface"}, {}),
    "distil_vid": ("distil_vid", {"name": "cosface"}, {}),
    **{f"contrastive_{name}": (f"contrastive_{name}", {"name": "cosface"}, {}) for name in VARIANTS},
    "robustify": ("robustify", {"name": "cosface"}, {}),
    "ada": ("ada", {"name": "cosface"}, {}),
    "fsdp": ("qualnet", {"name": "cosface"}, {"strategy": "fsdp"}),
    "fsdp_contrastive": ("contrastive_nt_xent", {"name": "cosface"}, {"strategy": "fsdp"}),
    "fsdp_distil": ("distil_sp", {"name": "cosface"}, {"strategy": "fsdp"}),
}


def gradients(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The gradient of one step of one batch of faces, and what the step makes of the weights."""
    kind, head, settings = CASES[name]
    dataset = CachedDataset(SyntheticFaces(IDENTITIES, 2), 112, show_progress=False)
    part = (distributed.rank(), distributed.ranks())

    def stream(first: int, last: int):
        return batches(dataset, BATCH, 7, first, last, part=part)

    optimiser = Optimiser(learning_rate=0.1, clip_norm=1.0)
    run = trainer(channels_last=False)
    # In double precision: a fresh network with BatchNorm makes 1e-3 of the rounding of single precision.
    run.spread = distributed.Spread("cpu", "64-true", **settings)
    run.fabric = run.spread.fabric
    stage = Stage(name, faces(kind, head).double(), 2, BATCH, stream, folder, CARD, optimiser)
    ready = run.ready(stage)
    output = ready.take.gradients(next(stream(0, 1)))
    method = stage.method
    found = {"loss": output.loss, **{f"log {key}": value for key, value in output.logs.items()}}
    for key, parameter in method.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {key}"] = distributed._full(parameter.grad).clone()
    ready.take.update()
    found.update(
        {f"after {key}": distributed._full(value).clone() for key, value in method.state_dict().items()}
    )
    for key, head in distributed.partial_heads(method).items():
        weights = distributed.gathered((found.pop(f"gradient {key}.sampled"), head.weight))
        if weights:
            found[f"gradient {key}"] = torch.cat([gradient for gradient, _ in weights])
            found[f"after {key}"] = torch.cat([weight for _, weight in weights])
    return {key: value.detach().double() for key, value in found.items()}


def half(folder: Path) -> float:
    """The loss of a step in bfloat16."""
    method = faces("classify", {"name": "cosface"})
    dataset = CachedDataset(SyntheticFaces(IDENTITIES, 2), 112, show_progress=False)

    def stream(first: int, last: int):
        part = (distributed.rank(), distributed.ranks())
        return batches(dataset, BATCH, 7, first, last, part=part)

    run = trainer(precision="bfloat16")
    return run.fit(Stage("half", method, 1, BATCH, stream, folder, CARD)).logs["loss"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, its classes too."""
    from safetensors.torch import load_file

    found = latest_checkpoint(folder)
    assert found is not None
    return {**load_parts(found), **load_file(found / distributed.CLASSES)}


def measure(out: Path) -> dict[str, Any]:
    return {name: gradients(name, out / name) for name in CASES} | {"bfloat16": half(out / "half")}


def poisoned(folder: Path) -> str:
    """What a run says whose last rank meets an image that is not a number in step 3."""

    def stream(first: int, last: int):
        for step, batch in enumerate(toy_batches()(first, last), start=first):
            if step == 3 and distributed.rank() == distributed.ranks() - 1:
                batch["x"][0] = float("nan")
            yield batch

    try:
        trainer().fit(Stage("toy", Toy(0.0, 1.0), STEPS, BATCH, stream, folder, CARD))
    except LrfaceError as error:
        return str(error)
    return "nothing"


def first_visit(out: Path) -> dict[str, Any]:
    """Everything that needs two ranks but the last third of the run that changes between two and one."""
    found = measure(out / "two")
    toy(out / "straight")
    toy(out / "changing", stop=2)
    toy(out / "dropout", name="adamw", dropout=0.5, share=0.5)
    toy(out / "dropout_resumed", stop=3, name="adamw", dropout=0.5, share=0.5)
    toy(out / "dropout_resumed", name="adamw", dropout=0.5, share=0.5)
    try:
        distributed.on_first(lambda: 1 // 0)
    except (ZeroDivisionError, distributed.RankFailed) as error:
        told = f"{type(error).__name__}: {error}"
    found["poisoned"] = distributed.gathered(poisoned(out / "poisoned"))
    return {**found, "told": distributed.gathered(told), "agreed": distributed.largest(distributed.rank(), 0)}


def second_visit(out: Path) -> dict[str, Any]:
    toy(out / "changing")
    return {}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.process_group(2, 1, "cpu", 120):
        place, visit = Path(sys.argv[1]), sys.argv[2]
        result = {"first": first_visit, "second": second_visit}[visit](place)
        if distributed.rank() == 0:
            torch.save(result, place / f"{visit}.pt")
