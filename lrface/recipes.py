"""From a recipe to a trained model: finds recipes, builds what they name, runs their stages in order."""

import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from lrface import config
from lrface.data.dataset import CachedDataset, FaceDataset, batches, cache_size
from lrface.data.source import FaceSource, check_source, open_source
from lrface.degrade.policy import ResolutionPolicy
from lrface.errors import LrfaceError, UsageError
from lrface.files import locked, read_json, write_json, write_text
from lrface.heads import build_head
from lrface.methods import METHODS, Method
from lrface.models import build_backbone, build_decoder
from lrface.registry import nearest
from lrface.train.checkpoint import (
    MODEL,
    fill,
    latest_checkpoint,
    load_model,
    load_parts,
    make_card,
    save_model,
)
from lrface.train.optimisers import Optimiser
from lrface.train.schedule import Schedule
from lrface.train.trainer import Stage, StageResult, Trainer

CACHE_LIMIT = 4 << 30  # bytes of decoded faces that cache: auto keeps in memory


def shipped_recipes() -> dict[str, Path]:
    """Recipes inside the package, by name ("demo/qualnet_lm")."""
    root = Path(str(resources.files("lrface") / "_configs"))
    if not root.is_dir():  # a checkout: the wheel gets configs/ as lrface/_configs
        root = Path(__file__).resolve().parent.parent / "configs"
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe file by path, or a shipped recipe by name, with or without ``.yaml`` or ``configs/`` in front.

    Raises:
        UsageError: neither; names the nearest shipped recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped_recipes()
    key = name.removesuffix(".yaml").removeprefix("configs/")
    if key in known:
        return known[key]
    raise UsageError(
        f"{name}: no such file, and no shipped recipe of that name{nearest(key, known)}; "
        f"shipped: {', '.join(known)}"
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> config.Recipe:
    """The recipe ``name`` with ``overrides`` applied; see :func:`find_recipe`.

    Raises:
        UsageError: with the file's path in front of what is wrong.
    """
    path = find_recipe(name)
    try:
        recipe = config.parse_recipe(config.read_yaml(path), overrides)
        for stage in recipe.stages:
            stage_settings(stage)
        return recipe
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def stage_settings(stage: config.Stage) -> tuple[Optimiser, Schedule]:
    """The optimiser and schedule of ``stage``. Raises UsageError naming the stage for a value out of range."""
    try:
        return Optimiser(**vars(stage.optimiser)), Schedule(**vars(stage.schedule))
    except UsageError as error:
        raise UsageError(f"stage {stage.name!r}: {error}") from error


def find_data(path: str, root: str | Path | None = None) -> Path:
    """``path`` as it stands, else below --data, $LRFACE_DATA, ~/.cache/lrface, in this order.

    Raises:
        LrfaceError: names every place that was looked at.
    """
    roots = [root] if root is not None else []
    if os.environ.get("LRFACE_DATA"):
        roots.append(os.environ["LRFACE_DATA"])
    roots.append(Path.home() / ".cache" / "lrface")
    places = [Path(path)] + [Path(place) / path for place in roots]
    for place in places:
        if place.exists():
            return place
    raise LrfaceError(
        f"training data {path!r} was not found; looked at {', '.join(map(str, places))}. Pass its folder with --data "
        "ROOT (or set LRFACE_DATA), or give a path with data.path=PATH"
    )


def build_source(recipe: config.Recipe, root: str | Path | None = None) -> tuple[FaceSource, str]:
    """The recipe's faces and a name for them."""
    if recipe.data.synthetic is not None:
        from lrface.data.synthetic import SyntheticFaces

        settings = asdict(recipe.data.synthetic)
        source: FaceSource = SyntheticFaces(**settings)
        name = "synthetic:" + ",".join(f"{key}={value}" for key, value in settings.items())
    else:
        assert recipe.data.path is not None
        place = find_data(recipe.data.path, root)
        source, name = open_source(place), str(place)
    check_source(source, name)
    return source, name


def build_method(recipe: config.Recipe, stage: config.Stage, identities: int) -> Method:
    """The method of ``stage`` with fresh networks.

    Raises:
        UsageError: a name or argument the recipe gives is unknown, or a value is out of range.
    """
    for part, named, taken in (
        ("head", recipe.head, ("embedding_size", "identities")),
        ("decoder", recipe.decoder, ("in_channels",)),
        ("method", stage.method, ("encoder", "head", "decoder", "policy")),
    ):
        for key in taken:
            if key in named.arguments:
                raise UsageError(f"{part}.{key} follows from the rest of the recipe and the data; remove it")
    encoder = build_backbone(recipe.backbone.name, **recipe.backbone.arguments)
    arguments: dict[str, Any] = {
        "encoder": encoder,
        "head": build_head(recipe.head.name, encoder.embedding_size, identities, **recipe.head.arguments),
    }
    if stage.method.name == "qualnet":
        arguments["decoder"] = build_decoder(
            recipe.decoder.name, encoder.feature_channels, **recipe.decoder.arguments
        )
    try:
        arguments["policy"] = ResolutionPolicy(**vars(stage.degrade))
        return METHODS.build(stage.method.name, **arguments, **stage.method.arguments)
    except UsageError as error:
        raise UsageError(f"stage {stage.name!r}: {error}") from error


@dataclass
class RunSummary:
    """What a run came to."""

    name: str
    out: str
    model: str
    recipe_sha256: str
    weights_sha256: str
    images: int
    identities: int
    seconds: float
    stages: list[dict[str, Any]] = field(default_factory=list)


def stage_steps(stage: config.Stage, images: int, batch_size: int) -> int:
    """Steps of a stage: as given, or epochs times the full batches of an epoch, at least 1."""
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return max(1, round(stage.epochs * (images // batch_size)))


def _prepare_out(recipe: config.Recipe, out: Path, restart: bool, accept_changes: bool) -> None:
    """Make ``out`` ready; an earlier run there must be of the same recipe."""
    text = config.to_yaml(recipe)
    known = out / "recipe.yaml"
    begun = known.exists()
    if begun and restart:
        for entry in ("stages", MODEL, "model.json", "recipe.yaml", "summary.json"):
            path = out / entry
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if known.exists() and not accept_changes:
        # Parsed, so that a field this version added does not count as a change.
        old = config.to_plain(config.parse_recipe(config.read_yaml(known)))
        new = config.to_plain(recipe)
        for plain in (old, new):
            # Where a run lies and what only says how it is watched does not change what is learned.
            plain.pop("out", None)
            for key in ("log_every", "tensorboard", "keep_last", "checkpoint_every"):
                plain.get("trainer", {}).pop(key, None)
        changed = config.differences(old, new)
        if changed:
            raise UsageError(
                f"{out} holds a run of another recipe: {'; '.join(changed[:5])}"
                f"{' and more' if len(changed) > 5 else ''}. Choose another place with out=DIR, start anew with "
                "--restart, or go on with the changed recipe with --accept-changes"
            )
    elif not begun and out.exists() and set(os.listdir(out)) - {".lock"} and not (out / "stages").exists():
        raise UsageError(f"{out} is not empty and holds no run of lrface; choose another place with out=DIR")
    write_text(known, text)


def run_recipe(
    recipe: config.Recipe,
    *,
    data: str | Path | None = None,
    restart: bool = False,
    accept_changes: bool = False,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> RunSummary:
    """Train every stage of ``recipe``, from where an earlier call with the same recipe stopped.

    Args:
        data: root below which ``data.path`` is looked for.
        restart: delete an earlier run in the same place.
        accept_changes: go on with an earlier run although the recipe changed.
        say: receives a line now and then.

    Returns:
        A summary; the model is ``OUT/model.safetensors`` with ``OUT/model.json``.

    Raises:
        LrfaceError, UsageError: see the messages. lrface.train.trainer.Interrupted: a signal stopped the run.
    """
    started = time.perf_counter()
    out = Path(recipe.out or f"runs/{recipe.name}")
    torch.manual_seed(recipe.seed)
    source, source_name = build_source(recipe, data)
    images, identities = len(source), len(source.identities)
    batch_size = recipe.data.batch_size
    if images < batch_size:
        raise LrfaceError(
            f"{source_name} holds {images} images, fewer than one batch of {batch_size}; "
            f"set data.batch_size={images} or less"
        )
    # What can be wrong in a later stage is found before the first one has run for hours.
    settings = [stage_settings(stage) for stage in recipe.stages]
    methods = [build_method(recipe, stage, identities) for stage in recipe.stages]
    check_loads(recipe, methods)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; a run needs a directory: choose another place with out=DIR")
    with locked(out):
        _prepare_out(recipe, out, restart, accept_changes)
        summary = RunSummary(
            recipe.name,
            str(out),
            str(out / MODEL),
            sha256(config.to_yaml(recipe).encode()).hexdigest(),
            "",
            images,
            identities,
            0.0,
        )
        _run_stages(recipe, source, source_name, methods, settings, summary, show_progress, say)
        summary.weights_sha256 = read_json(out / "model.json", "the card of the model")["weights_sha256"]
        summary.seconds = time.perf_counter() - started
        if any("seconds" in stage for stage in summary.stages):
            write_json(out / "summary.json", asdict(summary))
    return summary


def _run_stages(
    recipe: config.Recipe,
    source: FaceSource,
    source_name: str,
    methods: Sequence[Method],
    settings: Sequence[tuple[Optimiser, Schedule]],
    summary: RunSummary,
    show_progress: bool,
    say: Callable[[str], None],
) -> None:
    """Every stage that is not complete, then the model; fills in ``summary.stages``."""
    out = Path(summary.out)
    images, identities, batch_size = len(source), len(source.identities), recipe.data.batch_size
    plain_trainer = vars(recipe.trainer)
    trainer = Trainer(**{**plain_trainer, "compile": wants_compile(recipe, say)}, show_progress=show_progress)
    say(
        f"{recipe.name}: {images} images of {identities} identities from {source_name}, {recipe.backbone.name}, "
        f"{trainer.device}, {trainer.precision}{', compiled' if trainer.compile else ''} -> {out}"
    )
    architecture = {"name": recipe.backbone.name, "arguments": recipe.backbone.arguments}
    dataset: FaceDataset | None = None
    before: Path | None = None
    for index, (stage, method) in enumerate(zip(recipe.stages, methods, strict=True)):
        folder = out / "stages" / f"{index + 1}-{stage.name}"
        steps = stage_steps(stage, images, batch_size)
        newest = latest_checkpoint(folder)
        if newest is None:
            load_start(recipe, stage, method, before, say)
        elif newest.name == f"step-{steps:08d}":
            say(f"stage {stage.name}: complete ({steps} steps)")
            before = newest
            summary.stages.append({"name": stage.name, "steps": steps, "resumed_at": steps})
            continue
        else:
            say(f"stage {stage.name}: resumes from {newest}")
        if dataset is None:
            dataset = open_dataset(recipe, source, method, show_progress)
        faces = dataset

        # Each stage has its own order and augmentation; stage 1 of two recipes with one seed is alike.
        stage_seed = recipe.seed * 1000 + index

        def stream(first: int, last: int, seed: int = stage_seed, faces: FaceDataset = faces) -> Any:
            return batches(
                faces, batch_size, seed, first, last, recipe.data.workers, pin_memory=trainer.device == "cuda"
            )

        torch.manual_seed(stage_seed)
        card = make_card(
            architecture,
            method.encoder,
            {
                "recipe": recipe.name,
                "recipe_sha256": summary.recipe_sha256,
                "stage": stage.name,
                "method": stage.method.name,
                "seed": recipe.seed,
                "data": source_name,
                "images": images,
                "identities": identities,
            },
        )
        result: StageResult = trainer.fit(
            Stage(
                stage.name,
                method,
                steps,
                batch_size,
                stream,
                folder,
                card,
                *settings[index],
            )
        )
        before = result.checkpoint
        summary.stages.append({"name": stage.name, **vars(result), "checkpoint": str(result.checkpoint)})
    assert before is not None
    final_encoder, final_card = load_model(before)
    save_model(out, final_encoder, {**final_card, "recipe": config.to_plain(recipe)})


def wants_compile(recipe: config.Recipe, say: Callable[[str], None]) -> bool:
    """Whether to compile: as the recipe says; "auto" compiles where a C++ compiler is found.

    Raises:
        UsageError: another word than auto.
    """
    setting = recipe.trainer.compile
    if isinstance(setting, bool):
        return setting
    if setting != "auto":
        raise UsageError(f"trainer.compile must be true, false or auto; found {setting!r}")
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    found = compiler and headers
    if not found:
        lacking = "Python's headers (Python.h)" if compiler else "a C++ compiler"
        say(f"{lacking} not found: training runs without compilation, at about half the speed")
    return found


def check_loads(recipe: config.Recipe, methods: Sequence[Method]) -> None:
    """What a stage loads must be a part of it and of the stage before. Raises UsageError."""
    for index, stage in enumerate(recipe.stages):
        for part in stage.load:
            for number in (index - 1, index):
                if not hasattr(methods[number], part):
                    raise UsageError(
                        f"stages.{index}.load: stage {recipe.stages[number].name!r} (method "
                        f"{recipe.stages[number].method.name}) has no {part}"
                    )


def load_start(
    recipe: config.Recipe,
    stage: config.Stage,
    method: Method,
    before: Path | None,
    say: Callable[[str], None],
) -> None:
    """Fill the method's networks from the stage before, or the first stage's encoder from a model on disk."""
    if before is None:
        if recipe.start_from is not None:
            encoder, card = load_model(recipe.start_from)
            fill(
                method.encoder,
                encoder.state_dict(),
                f"start_from {recipe.start_from} ({card['architecture']})",
            )
            say(f"stage {stage.name}: encoder starts from {recipe.start_from}")
        return
    state = load_parts(before)
    for part in stage.load:
        prefix = f"{part}."
        tensors = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        fill(method.get_submodule(part), tensors, f"{part} of {before}")


def open_dataset(
    recipe: config.Recipe, source: FaceSource, method: Method, show_progress: bool
) -> FaceDataset:
    """Decoded into memory where the recipe wants it and it fits, else decoded as it goes."""
    size: int = method.encoder.input_size  # type: ignore[assignment]
    cache = recipe.data.cache
    if cache not in (True, False, "auto"):
        raise UsageError(f"data.cache must be true, false or auto; found {cache!r}")
    if cache is True or (cache == "auto" and cache_size(source, size) <= CACHE_LIMIT):
        return CachedDataset(source, size, show_progress)
    return FaceDataset(source, size)
