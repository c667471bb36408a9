"""Looking into a recipe without training it: where its time goes, and why a batch failed."""

from collections.abc import Callable
from pathlib import Path

import torch

from lrface import config
from lrface.errors import LrfaceError
from lrface.recipes import (
    build_method,
    build_source,
    build_trainer,
    image_stream,
    images_of_epoch,
    open_dataset,
    stage_settings,
    stage_steps,
    training_faces,
)
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
    epoch_images = images_of_epoch(recipe, source)
    method.epoch_steps = epoch_images // batch_size
    dataset = open_dataset(recipe, source, method, show_progress)
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
    method.epoch_steps = images_of_epoch(recipe, source) // recipe.data.batch_size
    recipe.trainer.compile = False
    return build_trainer(recipe, False, say).replay(method, path)
