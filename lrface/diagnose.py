"""Looking into a recipe without training it: where its time goes, why a batch failed, which loss pulls how hard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrface import config
from lrface.errors import LrfaceError, UsageError
from lrface.methods.qualnet import QualNet
from lrface.recipes import (
    TrainingImages,
    build_method,
    build_source,
    build_trainer,
    image_stream,
    images_of_epoch,
    stage_settings,
    stage_steps,
    training_faces,
)
from lrface.train.checkpoint import checkpoints, fill, load_parts
from lrface.train.failures import Replay, load_failed
from lrface.train.profile import Reading, profile_stage
from lrface.train.trainer import Stage


def profile_recipe(
    recipe: config.Recipe,
    *,
    data: str | Path | None = None,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Reading:
    """Take a few dozen steps of the recipe's first stage and read where their time goes.

    The trace goes to OUT/profile/STAGE.json; no checkpoint and no model is written, so that a run in the same place
    is as it was. Another stage is profiled by putting it first: its networks are fresh ones either way.

    Raises:
        LrfaceError, UsageError: as :func:`lrface.recipes.run_recipe`.
    """
    torch.manual_seed(recipe.seed)
    source, name = build_source(recipe, data)
    source, _ = training_faces(recipe, source, name, say)
    stage = recipe.stages[0]
    batch_size = recipe.data.batch_size
    if len(source) < batch_size:
        raise LrfaceError(
            f"{name} holds {len(source)} images, fewer than one batch of {batch_size}; "
            f"set data.batch_size={len(source)} or less"
        )
    optimiser, schedule = stage_settings(stage)
    method = build_method(recipe, stage, len(source.identities))
    trainer = build_trainer(recipe, show_progress, say)
    epoch_images = images_of_epoch(recipe, source, stage)
    method.epoch_steps = epoch_images // batch_size
    dataset = TrainingImages(recipe, source, [method], show_progress, data).of(method, stage)
    folder = Path(recipe.out or f"runs/{recipe.name}") / "profile"
    planned = Stage(
        stage.name,
        method,
        stage_steps(stage, epoch_images, batch_size),
        batch_size,
        image_stream(recipe, dataset, recipe.seed * 1000, trainer),
        folder,
        {},
        optimiser,
        schedule.in_steps(epoch_images // batch_size),
        accumulate=stage.accumulate,
    )
    return profile_stage(trainer, planned, folder / f"{stage.name}.json")


def replay_failed(
    recipe: config.Recipe,
    path: Path,
    *,
    data: str | Path | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Replay:
    """Run a batch once more whose loss was not finite, with the weights that it met: what went wrong first?

    Args:
        path: RUN/stages/STAGE/failed/step-XXXXXXXX.pt, which the failed run named.

    Raises:
        LrfaceError: the file is missing or broken, or of another recipe.
    """
    content = load_failed(path)
    stage = next((stage for stage in recipe.stages if stage.name == content["stage"]), None)
    if stage is None:
        raise LrfaceError(
            f"{path} is of stage {content['stage']!r}, which recipe {recipe.name} does not have"
        )
    source, name = build_source(recipe, data)
    source, _ = training_faces(recipe, source, name, say)
    method = build_method(recipe, stage, len(source.identities))
    method.epoch_steps = images_of_epoch(recipe, source, stage) // recipe.data.batch_size
    recipe.trainer.compile = False
    return build_trainer(recipe, False, say).replay(method, path)


def loss_gradients(method: QualNet, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Gradients of L_softmax and of L_quality, without lambda, on the encoder: float32 [parameters] each.

    Args:
        batch: as :meth:`QualNet.forward` takes it.
    """
    weights = [weight for weight in method.encoder.parameters() if weight.requires_grad]
    feature_map = method.encoder.features(batch["image"])
    recognition = method.head.loss(method.encoder.embed(feature_map), batch["label"]).loss
    quality = method.quality_loss(method.decoder(feature_map), batch["hq"], method.clip)

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        pairs = zip(found, weights, strict=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])

    return gradient(recognition), gradient(quality)


def quality_pull(
    run: str | Path, data: str | Path | None = None, batches: int = 6, seed: int = 0
) -> list[dict[str, Any]]:
    """How hard, and which way, the quality loss of a QualNet pulls its encoder at the end of training, beside L_softmax.

    Args:
        run: a finished run whose last stage is of method ``qualnet``.
        data: root of its training data.
        batches: of the run's size, drawn from its training images with ``seed``; float32.

    Returns:
        For each checkpoint that the last stage kept: ``step, lambda, cosine`` (of the two gradients, mean over the batches),
        ``cosine_range, length`` (that of L_quality's gradient, in lengths of L_softmax's), ``reconstruction``
        (mean absolute difference to the clean image) and ``mean_image`` (that of the batch's mean image).

    Raises:
        LrfaceError: no such run. UsageError: another method.
    """
    run = Path(run)
    recipe = config.parse_recipe(config.read_yaml(run / "recipe.yaml"))
    source, _ = build_source(recipe, data)
    stage = recipe.stages[-1]
    method = build_method(recipe, stage, len(source.identities))
    if not isinstance(method, QualNet):
        raise UsageError(
            f"{run}: its last stage is of method {stage.method.name}; qualnet has a quality loss"
        )
    rows = []
    for checkpoint in checkpoints(run / "stages" / f"{len(recipe.stages)}-{stage.name}"):
        state = load_parts(checkpoint)
        for part, network in method.named_children():
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{part}.")}
            if own:
                fill(network, own, f"{part} of {checkpoint}")
        method.train()
        order = np.random.default_rng(seed).permutation(len(source))
        cosines, lengths, errors, plain = [], [], [], []
        for number in range(batches):
            size = recipe.data.batch_size
            chosen = order[number * size : (number + 1) * size]
            images = torch.from_numpy(np.stack([source.image(int(index)) for index in chosen]))
            labels = torch.from_numpy(np.asarray(source.labels)[chosen].astype(np.int64))
            batch = method.prepare({"image": images.permute(0, 3, 1, 2), "label": labels, "seed": number})
            softmax, quality = loss_gradients(method, batch)
            cosines.append(float(torch.nn.functional.cosine_similarity(softmax, quality, dim=0)))
            lengths.append(float(quality.norm() / softmax.norm()))
            with torch.no_grad():
                drawn = method.decoder(method.encoder.features(batch["image"])).clamp(0, 1)
            errors.append(float((drawn - batch["hq"]).abs().mean()))
            plain.append(float((batch["hq"] - batch["hq"].mean(0)).abs().mean()))
        rows.append(
            {
                "step": int(checkpoint.name.removeprefix("step-")),
                "lambda": method.quality_weight,
                "cosine": round(float(np.mean(cosines)), 4),
                "cosine_range": [round(min(cosines), 4), round(max(cosines), 4)],
                "length": round(float(np.mean(lengths)), 4),
                "reconstruction": round(float(np.mean(errors)), 4),
                "mean_image": round(float(np.mean(plain)), 4),
            }
        )
    if not rows:
        raise LrfaceError(f"{run}: its last stage {stage.name!r} has no checkpoint")
    return rows
