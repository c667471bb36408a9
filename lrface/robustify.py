"""`lrface robustify`: a recogniser that exists becomes one for low resolutions, on the user's own aligned faces.

An ordinary recipe is written for it (lrface.methods.robustify) and run by lrface.recipes.run_recipe: what comes of it is a
run like any other.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrface import config, recipes
from lrface.data.source import FaceSource, open_source
from lrface.errors import LrfaceError, UsageError
from lrface.models import build_decoder_for, build_network
from lrface.models.blocks import FaceBackbone
from lrface.train.checkpoint import find_model, load_model
from lrface.train.trainer import Stage

MINUTES = 45.0
DECODER_SHARE = 0.1
"""Part of the time for stage 1."""
SPARE = 0.05  # for reading the images, checkpoints and the model's own files
TIMED_SECONDS, TIMED_STEPS, WARM_STEPS = 20.0, 10, 2  # at most, after the first, which are not counted
DECODER, ROBUST = "decoder", "robust"


@dataclass
class Robustified:
    """What a call came to.

    recipe: file of the recipe that was run; minutes: of the whole call; steps: of each stage.
    """

    model: str
    recipe: str
    minutes: float
    steps: dict[str, int]
    summary: dict[str, Any]


def backbone_of(model: str) -> tuple[dict[str, Any], Path | None]:
    """``model`` as a recipe's backbone, and the run on disk that its weights come from where the backbone has none.

    Args:
        model: a run, a checkpoint or a .safetensors file of lrface, an .onnx file, or module:function; see
            lrface.models.python_network and lrface.embed.parse_model for ``FILE@colour=BGR,mean=0.5,std=0.5``.

    Raises:
        LrfaceError, UsageError: no such model, or one of another kind.
    """
    from lrface.embed import parse_model

    name, described = parse_model(model)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".onnx":
        if not path.is_file():
            raise LrfaceError(
                f"{path}: no such file; give an .onnx file, a run of `lrface train`, or module:function"
            )
        return {"name": "onnx", "path": str(path.resolve()), **described}, None
    if described:
        raise UsageError(f"{model}: only an .onnx file takes options behind an @")
    if ":" in name and not path.exists():
        return {"name": "python", "function": name}, None
    weights = find_model(path)
    network, card = load_model(weights)
    if not isinstance(network, FaceBackbone) or not network.embedding_size:
        raise UsageError(f"{weights} is no recogniser: {card['architecture']['name']} gives no embeddings")
    arguments = dict(card["architecture"].get("arguments", {}))
    if isinstance(arguments.get("weights"), str):
        del arguments["weights"]  # a library's file that the run itself started from
    return {"name": card["architecture"]["name"], **arguments}, weights.resolve()


def robust_recipe(
    backbone: dict[str, Any],
    weights: Path | None,
    data: Path,
    out: Path,
    labelled: bool,
    drawn: bool,
    overrides: Sequence[str] = (),
) -> config.Recipe:
    """The recipe, with 1 step a stage.

    Args:
        backbone, weights: see :func:`backbone_of`.
        labelled: whether the faces have identities to learn from.
        drawn: whether the network has a map of features that a decoder can draw from.
        overrides: ``key=value`` as of `lrface train`.

    Raises:
        UsageError: an override that does not fit.
    """
    # A fifth stays as it is, and the smallest are drawn most: they have the furthest to go.
    sizes = {"name": "resolution", "clean_share": 0.0, "sizes": [56, 28, 28, 14, 14, 14]}
    degrade = {"name": "chain", "clean_share": 0.2, "crop_padding": 4, "parts": [sizes]}
    method = {
        "name": "robustify",
        "quality_weight": 0.1 if drawn else 0.0,
        "quality_share": 0.25,
        "mixed_share": 0.5,
        "teacher_share": 0.2,
        "recognition_weight": 0.003 if labelled else 0.0,
    }
    # Networks whose BatchNorm is folded into their weights take no more; SGD at 0.02 undoes what they know.
    # Few people are no reason to move far, hence the small weight of recognition.
    optimiser = {"name": "adam", "learning_rate": 3.0e-4, "weight_decay": 0.0, "clip_norm": 10.0}
    start = [] if weights is None else [{"path": str(weights), "to": "encoder"}]
    stages: list[dict[str, Any]] = [
        {
            "name": DECODER,
            "method": "reconstruct",
            "degrade": {"clean_share": 1.0},
            "load": start,
            "steps": 1,
            "optimiser": {"name": "adam", "learning_rate": 2.0e-3, "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup_epochs": 0.2},
        },
        {
            "name": ROBUST,
            "method": method,
            "degrade": degrade,
            "load": ["encoder", "decoder"],
            "steps": 1,
            "optimiser": optimiser,
            "schedule": {"kind": "cosine", "warmup_epochs": 1.0},
        },
    ]
    if not drawn:
        stages = [{**stages[1], "load": start}]
    raw: dict[str, Any] = {
        "name": f"robust-{out.name}",
        "description": "lrface robustify: a recogniser taught low resolutions by itself",
        "out": str(out),
        "data": {"path": str(data), "batch_size": 64},
        "backbone": backbone,
        "head": {"name": "cosface", "scale": 30, "margin": 0.25},
        "decoder": {"name": "subpixel", "width": 32},
        "trainer": {"checkpoint_every": 200},
        "stages": stages,
    }
    return config.parse_recipe(raw, overrides)


def can_be_drawn(backbone: dict[str, Any], decoder: config.Named, say: Callable[[str], None]) -> bool:
    """Whether the decoder fits the network's map of features; says why not."""
    network = build_network(**backbone)
    assert isinstance(network, FaceBackbone)
    try:
        if network.feature_size == 1:
            raise UsageError("the network has no map of features of more than one pixel")
        build_decoder_for(network, decoder.name, **decoder.arguments)
    except UsageError as error:
        say(f"no stage {DECODER!r}, and no reconstruction in training: {error}")
        return False
    return True


def step_seconds(recipe: config.Recipe, stage: config.Stage, identities: int) -> float:
    """Seconds a step of ``stage`` takes here: a few steps on noise, with fresh weights where a stage before has them."""
    method = recipes.build_method(recipe, stage, identities)
    trainer = recipes.build_trainer(recipe, False, lambda message: None)
    optimiser, schedule = recipes.stage_settings(stage)
    size: Any = method.encoder.input_size
    n = recipe.data.batch_size
    folder = Path(recipe.out or ".") / "timing"  # nothing is written there
    planned = Stage(stage.name, method, 1, n, _no_batches, folder, {}, optimiser, schedule)
    take = trainer.ready(planned, resume=False).take
    images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8)
    batch = {
        "image": images.contiguous(memory_format=torch.channels_last),
        "label": torch.arange(n) % max(1, identities),
    }
    taken: list[float] = []
    begun = time.perf_counter()
    for step in range(WARM_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        take.gradients({**batch, "seed": step})
        take.update()
        if trainer.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
        if step >= WARM_STEPS and time.perf_counter() - begun > TIMED_SECONDS:
            break
    return statistics.median(taken[WARM_STEPS:])


def _no_batches(first: int, last: int) -> Any:
    raise LrfaceError("a stage that is only timed has no batches")


def plan_steps(seconds: dict[str, float], minutes: float) -> dict[str, int]:
    """Steps of each stage for ``minutes``, by what a step of each takes.

    Raises:
        UsageError: the time does not suffice for one step a stage.
    """
    left = minutes * 60 * (1 - SPARE)
    steps = {}
    for name, each in seconds.items():
        share = DECODER_SHARE if name == DECODER else 1.0 - (DECODER_SHARE if DECODER in seconds else 0.0)
        steps[name] = int(left * share / each)
        if steps[name] < 1:
            raise UsageError(
                f"--minutes {minutes:g}: a step of stage {name!r} takes {each:.1f} s here; give more time, or --steps"
            )
    return steps


def robustify(
    model: str,
    data: str | Path,
    out: str | Path | None = None,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    restart: bool = False,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> Robustified:
    """Train a recogniser that exists to give for faces of low resolution what it gives for clean ones.

    A call with the same arguments goes on where one before stopped; steps that were chosen by time stay as they were.

    Args:
        model: see :func:`backbone_of`.
        data: aligned faces in any format that lrface reads; identities are used where there are at least two.
        out: the run's folder, by default runs/robust-NAME.
        minutes: time for all of it, 45 by default; the steps follow from a short measurement.
        steps: of the second stage, instead; the first takes a quarter of them.
        overrides: ``key=value`` as of `lrface train`, such as ``stages.robust.optimiser.learning_rate=1e-3``.
        restart: delete an earlier run in the same place.

    Raises:
        LrfaceError, UsageError: see the messages. lrface.train.trainer.Interrupted: a signal stopped the run.
    """
    started = time.perf_counter()
    if minutes is not None and steps is not None:
        raise UsageError("give --minutes or --steps, not both")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UsageError(f"--minutes must be above 0; found {minutes}")
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be at least 1; found {steps}")
    place = recipes.find_data(str(data)).resolve()
    source = open_source(place, labelled=False)
    identities = len(source.identities)
    labelled = _labelled(source)
    backbone, weights = backbone_of(model)
    name = Path(model.partition("@")[0]).stem if weights is None else _name_of(weights)
    folder = Path(out) if out is not None else Path("runs") / f"robust-{name.replace(':', '-')}"
    given = config.parse_recipe(
        config.to_plain(robust_recipe(backbone, weights, place, folder, labelled, True)), overrides
    )
    drawn = given.stages[-1].method.arguments.get("quality_weight") != 0 and can_be_drawn(
        backbone, given.decoder, say
    )
    recipe = robust_recipe(backbone, weights, place, folder, labelled, drawn, overrides)
    before = {} if restart else _steps_before(folder)
    names = [stage.name for stage in recipe.stages]
    chosen = {stage.name for stage in recipe.stages if _overridden(stage.name, names, overrides)}
    if steps is not None:
        planned = {stage: steps if stage == ROBUST else max(1, steps // 4) for stage in names}
    elif before.keys() == set(names):
        planned = before
    else:
        seconds = {stage.name: step_seconds(recipe, stage, identities) for stage in recipe.stages}
        planned = plan_steps(seconds, minutes or MINUTES)
        told = ", ".join(f"{stage} {planned[stage]} steps of {each:.2f} s" for stage, each in seconds.items())
        say(f"{minutes or MINUTES:g} minutes: {told}")
    for stage in recipe.stages:
        if stage.name not in chosen:
            stage.steps = planned[stage.name]
            stage.schedule.warmup_epochs = 0.0
            stage.schedule.warmup_steps = min(200, planned[stage.name] // 10)
    faces = f"{identities} identities" if labelled else "no labels are used"
    say(f"{model}: {len(source)} faces from {place}, {faces}")
    summary = recipes.run_recipe(recipe, restart=restart, show_progress=show_progress, say=say)
    return Robustified(
        summary.model,
        str(folder / "recipe.yaml"),
        (time.perf_counter() - started) / 60,
        {stage.name: stage.steps or 0 for stage in recipe.stages},
        dict(vars(summary)),
    )


def _labelled(source: FaceSource) -> bool:
    """Whether there are identities to tell apart: at least two, and not one for each image."""
    return 2 <= len(source.identities) <= len(source) // 2


def _name_of(weights: Path) -> str:
    """The run's name, for one that is model.safetensors in a folder."""
    return weights.parent.name if weights.stem == "model" else weights.stem


def _overridden(stage: str, names: Sequence[str], overrides: Sequence[str]) -> bool:
    """Whether an override says how long ``stage`` takes."""
    keys = [
        f"stages.{place}.{what}=" for place in (stage, names.index(stage)) for what in ("steps", "epochs")
    ]
    return any(each.startswith(key) for each in overrides for key in keys)


def _steps_before(folder: Path) -> dict[str, int]:
    """What an earlier call chose for its stages."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        return {}
    recipe = config.parse_recipe(config.read_yaml(file))
    return {stage.name: stage.steps for stage in recipe.stages if stage.steps is not None}
