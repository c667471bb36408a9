"""From a recipe to a trained model: finds recipes, builds what they name, runs their stages in order."""

import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lrface import config
from lrface.data.crop import CROPS, RandomResizedCrop
from lrface.data.dataset import CachedDataset, CroppedDataset, FaceDataset, batches, cache_size
from lrface.data.joined import JoinedSource
from lrface.data.sampling import EpochOrders, Sampling
from lrface.data.source import FaceSource, check_source, open_source
from lrface.data.subset import ChosenDataset, choose_classes, drop_small_identities, label_rows
from lrface.degrade.policies import build_policy
from lrface.degrade.policy import Policy, ResolutionPolicy
from lrface.errors import LrfaceError, UsageError
from lrface.files import locked, read_json, write_json, write_text
from lrface.heads import build_head
from lrface.methods import METHODS, Method
from lrface.models import CorruptionNetwork, build_decoder_for, build_network
from lrface.models.library import start_networks
from lrface.registry import nearest
from lrface.train.checkpoint import (
    MODEL,
    check_fits,
    fill,
    find_model,
    latest_checkpoint,
    load_beside,
    load_model,
    load_parts,
    make_card,
    remove_leftovers,
    save_model,
    seed_random,
    tensors,
)
from lrface.train.distributed import (
    from_first,
    load_classes,
    local_ranks,
    on_first,
    process_group,
    rank,
    ranks,
)
from lrface.train.launch import check_batch
from lrface.train.observe import Observer, Observers
from lrface.train.optimisers import Layer, Optimiser
from lrface.train.record import RECORD, recorded
from lrface.train.schedule import Schedule
from lrface.train.sheets import SampleSheets
from lrface.train.signals import preemptible
from lrface.train.trainer import Stage, StageResult, Trainer, check_stage, resolve_device
from lrface.train.validate import HeldOut, Validation, ValidationSettings, chosen_checkpoint, hold_out
from lrface.train.wandb import WandbLog, WandbSettings, import_wandb

CACHE_LIMIT = 4 << 30  # bytes of decoded faces that cache: auto keeps in memory

# Fields of a recipe that say how data is read and how a run is watched or kept: what is learned does not depend on them.
READING = ("workers", "cache")
WATCHING = (
    "log_every",
    "tensorboard",
    "keep_last",
    "keep_every",
    "checkpoint_every",
    "sheet_every",
    "wandb",
)


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
        sampling_settings(recipe)
        crop_settings(recipe)
        watch_settings(recipe)
        return recipe
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def stage_settings(stage: config.Stage) -> tuple[Optimiser, Schedule]:
    """The optimiser and schedule of ``stage``. Raises UsageError naming the stage for a value out of range."""
    try:
        layers = [Layer(**vars(layer)) for layer in stage.optimiser.layers]
        return Optimiser(**{**vars(stage.optimiser), "layers": layers}), Schedule(**vars(stage.schedule))
    except UsageError as error:
        raise UsageError(f"stage {stage.name!r}: {error}") from error


def sampling_settings(recipe: config.Recipe) -> Sampling:
    """How images are chosen. Raises UsageError for a value out of range or a batch size that does not fit."""
    sampling = Sampling(**vars(recipe.data.sampling))
    sampling.check_batch_size(recipe.data.batch_size)
    return sampling


def watch_settings(recipe: config.Recipe) -> tuple[ValidationSettings | None, WandbSettings | None]:
    """How the run is watched. Raises UsageError for a value out of range."""
    if recipe.trainer.sheet_every < 0:
        raise UsageError(
            f"trainer.sheet_every must be at least 1, or 0 for no sample sheets; found {recipe.trainer.sheet_every}"
        )
    validate, wandb = recipe.validate, recipe.trainer.wandb
    return (
        None if validate is None else ValidationSettings(**vars(validate)),
        None if wandb is None else WandbSettings(**vars(wandb)),
    )


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
    # What a method needs is known before it is built; of an unknown one, it is told later what is wrong.
    needs = [getattr(METHODS.get(stage.method.name), "needs", ("label",)) for stage in recipe.stages]
    labelled = any("label" in each for each in needs)
    if recipe.data.synthetic is not None:
        from lrface.data.synthetic import SyntheticFaces

        settings = asdict(recipe.data.synthetic)
        source: FaceSource = SyntheticFaces(**settings)
        name = "synthetic:" + ",".join(f"{key}={value}" for key, value in settings.items())
    else:
        path = recipe.data.path
        assert path is not None
        places = [find_data(each, root) for each in ([path] if isinstance(path, str) else path)]
        opened = [open_source(place, labelled) for place in places]
        source = opened[0] if len(opened) == 1 else JoinedSource(opened, [str(place) for place in places])
        name = " + ".join(map(str, places))
    check_source(source, name, labelled)
    return source, name


def training_faces(
    recipe: config.Recipe, source: FaceSource, name: str, say: Callable[[str], None]
) -> tuple[FaceSource, FaceSource | None]:
    """What of ``source`` is trained on, and the identities held out for validation where the recipe wants some."""
    if recipe.data.classes_subset is not None:
        from lrface.benchmarks.robustness import class_subset

        option = f"data.classes_subset={recipe.data.classes_subset}"
        names = class_subset(recipe.data.classes_subset, "data.classes_subset")
        source = choose_classes(source, names, name, option)
    minimum = sampling_settings(recipe).minimum
    source, identities, images = drop_small_identities(source, minimum, name)
    if identities:
        say(
            f"{name}: {identities} identities with fewer than data.sampling.minimum={minimum} images are left out, "
            f"{images} images in all"
        )
    settings, _ = watch_settings(recipe)
    if settings is None:
        return source, None
    training, held_out = hold_out(source, settings, name)
    say(
        f"{name}: {len(held_out.identities)} identities with {len(held_out)} images are held out for validation"
    )
    return training, held_out


def build_method(recipe: config.Recipe, stage: config.Stage, identities: int) -> Method:
    """The method of ``stage`` with fresh networks.

    Raises:
        UsageError: a name or argument the recipe gives is unknown, or a value is out of range.
    """
    for part, named, taken in (
        ("head", recipe.head, ("embedding_size", "identities")),
        ("decoder", recipe.decoder, ("in_channels", "in_size", "out_size")),
        ("method", stage.method, ("encoder", "head", "decoder", "policy")),
    ):
        for key in taken:
            if key in named.arguments:
                raise UsageError(f"{part}.{key} follows from the rest of the recipe and the data; remove it")
    network = stage_backbone(recipe, stage)
    encoder = build_network(network.name, **network.arguments)
    arguments: dict[str, Any] = {"encoder": encoder}
    draws = stage.method.name == "restore"
    if isinstance(encoder, CorruptionNetwork) != draws:
        raise UsageError(
            f"stage {stage.name!r}: the method restore trains a corruption network, the others a backbone; found "
            f"{stage.method.name} with {network.name}"
        )
    # Robustify computes some of its losses only: what has no weight needs no part.
    unused = {
        part
        for part, weight in (("head", "recognition_weight"), ("decoder", "quality_weight"))
        if stage.method.name == "robustify" and stage.method.arguments.get(weight) == 0
    }
    takes = [each for each in ("head", "decoder") if METHODS.takes(stage.method.name, each)]
    if not isinstance(encoder, CorruptionNetwork) and "head" in takes and "head" not in unused:
        arguments["head"] = build_head(
            recipe.head.name, encoder.embedding_size, identities, **recipe.head.arguments
        )
    if not isinstance(encoder, CorruptionNetwork) and "decoder" in takes and "decoder" not in unused:
        arguments["decoder"] = build_decoder_for(encoder, recipe.decoder.name, **recipe.decoder.arguments)
    try:
        arguments["policy"] = stage_policy(stage)
        return METHODS.build(stage.method.name, **arguments, **stage.method.arguments)
    except UsageError as error:
        raise UsageError(f"stage {stage.name!r}: {error}") from error


def stage_backbone(recipe: config.Recipe, stage: config.Stage) -> config.Named:
    """The network that ``stage`` trains."""
    return recipe.backbone if stage.backbone is None else stage.backbone


def stage_policy(stage: config.Stage) -> Policy:
    """What the stage's ``degrade`` says. Raises UsageError for an unknown name, or a value that is wrong."""
    if isinstance(stage.degrade, config.Named):
        return build_policy(stage.degrade.name, **stage.degrade.arguments)
    return ResolutionPolicy(**vars(stage.degrade))


def _class_names(recipe: config.Recipe, source: FaceSource) -> dict[str, list[str]]:
    """What the card says of classes: their names, where the data is of classes."""
    if recipe.data.classes is not None:
        return {"classes": recipe.data.classes}
    return {} if recipe.data.classes_subset is None else {"classes": list(source.identities)}


def crop_settings(recipe: config.Recipe) -> RandomResizedCrop | None:
    """How images are cut. Raises UsageError for an unknown name, or a value out of range."""
    crop = recipe.data.crop
    return None if crop is None else CROPS.build(crop.name, **crop.arguments)


def check_classes(recipe: config.Recipe, identities: int, name: str) -> None:
    """Raises UsageError unless ``data.classes``, where it is given, has a name of its own for each class."""
    classes = recipe.data.classes
    if classes is None:
        return
    if len(classes) != identities:
        raise UsageError(f"data.classes has {len(classes)} names, {name} has {identities} classes")
    if len(set(classes)) != len(classes):
        raise UsageError("data.classes names a class twice")


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


def stage_rows(recipe: config.Recipe, stage: config.Stage, source: FaceSource) -> NDArray[np.int64]:
    """Which images ``stage`` trains on, int64 [n], ascending: all but where it has a ``share``."""
    if stage.share == 1:
        return np.arange(len(source))
    seed = recipe.seed if stage.share_seed is None else stage.share_seed
    return label_rows(np.asarray(source.labels), stage.share, seed)


def images_of_epoch(recipe: config.Recipe, source: FaceSource, stage: config.Stage) -> int:
    """Images that the sampling shows in an epoch of ``stage``. Raises LrfaceError where they do not give it one batch."""
    labels = np.asarray(source.labels)[stage_rows(recipe, stage, source)]
    found = EpochOrders(sampling_settings(recipe), labels, recipe.seed).length
    if stage.share < 1 and found < recipe.data.batch_size:
        raise LrfaceError(
            f"stage {stage.name!r}: its share of {stage.share:g} is {found} images, fewer than one batch of "
            f"{recipe.data.batch_size}; set data.batch_size={found} or less, or a larger share"
        )
    return found


def _prepare_out(recipe: config.Recipe, out: Path, restart: bool, accept_changes: bool) -> None:
    """Make ``out`` ready; an earlier run there must be of the same recipe."""
    text = config.to_yaml(recipe)
    known = out / "recipe.yaml"
    begun = known.exists()
    if begun and restart:
        for entry in ("stages", MODEL, "model.json", "recipe.yaml", "summary.json", RECORD):
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
            # Where a run lies, how its data is read and how it is watched does not change what is learned.
            plain.pop("out", None)
            for key in READING:
                plain.get("data", {}).pop(key, None)
            for key in (*WATCHING, "devices", "nodes", "timeout_seconds"):
                plain.get("trainer", {}).pop(key, None)
        changed = config.differences(old, new)
        if changed:
            raise UsageError(
                f"{out} holds a run of another recipe: {'; '.join(changed[:5])}"
                f"{' and more' if len(changed) > 5 else ''}. Choose another place with out=DIR, start anew with "
                "--restart, or go on with the changed recipe with --accept-changes"
            )
    elif (
        not begun
        and out.exists()
        and set(os.listdir(out)) - {".lock", "profile"}
        and not (out / "stages").exists()
    ):
        raise UsageError(f"{out} is not empty and holds no run of lrface; choose another place with out=DIR")
    for folder in (out, *(out / "stages").glob("*")):
        remove_leftovers(folder)
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
    settings = recipe.trainer
    device = resolve_device(settings.device)
    with preemptible(), process_group(settings.devices, settings.nodes, device, settings.timeout_seconds):
        check_batch(recipe.data.batch_size, ranks())
        main = rank() == 0
        return _run(
            recipe,
            data,
            restart,
            accept_changes,
            show_progress and main,
            say if main else lambda message: None,
        )


def _run(
    recipe: config.Recipe,
    data: str | Path | None,
    restart: bool,
    accept_changes: bool,
    show_progress: bool,
    say: Callable[[str], None],
) -> RunSummary:
    """See :func:`run_recipe`, in each rank."""
    started = time.perf_counter()
    out = Path(recipe.out or f"runs/{recipe.name}")
    seed_random(recipe.seed)
    source, source_name = build_source(recipe, data)
    source, held_out = training_faces(recipe, source, source_name, say)
    images, identities = len(source), len(source.identities)
    batch_size = recipe.data.batch_size
    check_classes(recipe, identities, source_name)
    if images < batch_size:
        raise LrfaceError(
            f"{source_name} holds {images} images, fewer than one batch of {batch_size}; "
            f"set data.batch_size={images} or less"
        )
    # What can be wrong in a later stage is found before the first one has run for hours.
    settings = [stage_settings(stage) for stage in recipe.stages]
    methods = [build_method(recipe, stage, identities) for stage in recipe.stages]
    check_loads(recipe, methods)
    pictures = TrainingImages(recipe, source, methods, show_progress, data)
    trainer = build_trainer(recipe, show_progress, say)
    for stage, method in zip(recipe.stages, methods, strict=True):
        check_stage(stage.name, method, batch_size // ranks(), stage.accumulate, stage.ema)
    validation, _ = watch_settings(recipe)
    if validation is not None:
        for stage, method in zip(recipe.stages, methods, strict=True):
            if not method.encoder.embedding_size:
                raise UsageError(
                    f"validate compares embeddings, and stage {stage.name!r} trains a network that draws images; leave "
                    "validate out, or train that network in a recipe of its own and load it with {path: RUN}"
                )
        validation.check_input_size(methods[0].encoder.input_size)  # type: ignore[arg-type]
    epochs = [images_of_epoch(recipe, source, stage) for stage in recipe.stages]
    steps = [
        stage_steps(stage, count, batch_size) for stage, count in zip(recipe.stages, epochs, strict=True)
    ]
    for method, count in zip(methods, epochs, strict=True):
        method.epoch_steps = count // batch_size
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; a run needs a directory: choose another place with out=DIR")
    with ExitStack() as stack:

        def prepare() -> None:
            stack.enter_context(locked(out))
            _prepare_out(recipe, out, restart, accept_changes)

        on_first(prepare)
        if not (out / "recipe.yaml").exists():
            raise LrfaceError(
                f"{out} on rank {rank()} is not what rank 0 wrote: `out` must be on a file system that all machines share"
            )
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
        planned = [
            {"name": stage.name, "folder": f"stages/{number}-{stage.name}", "steps": count}
            for number, (stage, count) in enumerate(zip(recipe.stages, steps, strict=True), start=1)
        ]
        with recorded(out, recipe.name, planned, recipe.trainer.threads) if rank() == 0 else nullcontext():
            _run_stages(
                recipe, pictures, held_out, source_name, methods, trainer, steps, settings, summary, say
            )
        summary.weights_sha256 = read_json(out / "model.json", "the card of the model")["weights_sha256"]
        summary.seconds = time.perf_counter() - started
        if any("seconds" in stage for stage in summary.stages) and rank() == 0:
            write_json(out / "summary.json", asdict(summary))
    return summary


def build_trainer(recipe: config.Recipe, show_progress: bool, say: Callable[[str], None]) -> Trainer:
    """The recipe's trainer."""
    watched = ("sheet_every", "wandb", "devices", "nodes", "timeout_seconds")
    settings = {key: value for key, value in vars(recipe.trainer).items() if key not in watched}
    return Trainer(**{**settings, "compile": wants_compile(recipe, say)}, show_progress=show_progress)


def image_stream(
    recipe: config.Recipe, dataset: FaceDataset, seed: int, trainer: Trainer
) -> Callable[[int, int], Generator[dict[str, Any], None, None]]:
    """What gives a stage the batches of its steps ``first`` to ``last`` (excluded); see lrface.data.dataset.batches."""
    sampling = sampling_settings(recipe)

    def stream(first: int, last: int) -> Generator[dict[str, Any], None, None]:
        return batches(
            dataset,
            recipe.data.batch_size,
            seed,
            first,
            last,
            recipe.data.workers,
            pin_memory=trainer.device == "cuda",
            sampling=sampling,
            part=(rank(), ranks()),
        )

    return stream


def _run_stages(
    recipe: config.Recipe,
    pictures: "TrainingImages",
    held_out: FaceSource | None,
    source_name: str,
    methods: Sequence[Method],
    trainer: Trainer,
    planned: Sequence[int],
    settings: Sequence[tuple[Optimiser, Schedule]],
    summary: RunSummary,
    say: Callable[[str], None],
) -> None:
    """Every stage that is not complete, then the model; fills in ``summary.stages``."""
    out, source = Path(summary.out), pictures.source
    images, identities, batch_size = len(source), len(source.identities), recipe.data.batch_size
    say(
        f"{recipe.name}: {images} images of {identities} identities from {source_name}, {recipe.backbone.name}, "
        f"{trainer.device}, {trainer.precision}{', compiled' if trainer.compile else ''} -> {out}"
    )
    watch = Watch(recipe, source, held_out, trainer, say)
    before: Path | None = None
    for index, (stage, method) in enumerate(zip(recipe.stages, methods, strict=True)):
        folder = out / "stages" / f"{index + 1}-{stage.name}"
        steps = planned[index]
        newest = from_first(latest_checkpoint(folder))
        if newest is None:
            load_start(recipe, stage, method, before, say)
        elif newest.name == f"step-{steps:08d}":
            say(f"stage {stage.name}: complete ({steps} steps)")
            before, chosen = on_first(lambda folder=folder: chosen_checkpoint(folder, watch.choose))  # type: ignore[misc]
            summary.stages.append({"name": stage.name, "steps": steps, "resumed_at": steps})
            continue
        else:
            say(f"stage {stage.name}: resumes from {newest}")
        dataset = pictures.of(method, stage)
        # Each stage has its own order and augmentation; stage 1 of two recipes with one seed is alike.
        stage_seed = recipe.seed * 1000 + index
        seed_random(stage_seed)
        card = make_card(
            vars(stage_backbone(recipe, stage)),
            method.encoder,
            {
                "recipe": recipe.name,
                "recipe_sha256": summary.recipe_sha256,
                "stage": stage.name,
                "method": stage.method.name,
                "seed": recipe.seed,
                "data": source_name,
                "images": len(dataset),
                "identities": identities,
                **_class_names(recipe, source),
                **watch.card,
            },
        )
        optimiser, schedule = settings[index]
        result: StageResult = trainer.fit(
            Stage(
                stage.name,
                method,
                steps,
                batch_size,
                image_stream(recipe, dataset, stage_seed, trainer),
                folder,
                card,
                optimiser,
                schedule.in_steps(images_of_epoch(recipe, source, stage) // batch_size),
                accumulate=stage.accumulate,
                ema=stage.ema,
                observer=watch.observer(stage, method, steps, stage_seed),
            )
        )
        before, chosen = on_first(lambda folder=folder: chosen_checkpoint(folder, watch.choose))  # type: ignore[misc]
        summary.stages.append(
            {"name": stage.name, **vars(result), "checkpoint": str(before), "chosen": chosen}
        )
    assert before is not None
    final_encoder, final_card = load_model(before)
    final_card = {**final_card, "chosen": chosen, "recipe": config.to_plain(recipe)}
    on_first(lambda: save_model(out, final_encoder, final_card))


class Watch:
    """What watches the stages of a run: validation, sample sheets, Weights & Biases.

    Attributes:
        choose: how the checkpoint that a stage ends with is chosen: "last" or "best".
        card: what the cards say about held-out identities.
    """

    def __init__(
        self,
        recipe: config.Recipe,
        source: FaceSource,
        held_out: FaceSource | None,
        trainer: Trainer,
        say: Callable[[str], None],
    ):
        self.recipe, self.trainer, self.say = recipe, trainer, say
        self.source, self.held_out = source, held_out
        self.validation, self.wandb = watch_settings(recipe)
        self.choose = "last" if self.validation is None else self.validation.choose
        self.card = {} if held_out is None else {"held_out_identities": len(held_out.identities)}
        self._faces: HeldOut | None = None
        if self.wandb is not None:
            import_wandb()

    def observer(self, stage: config.Stage, method: Method, steps: int, seed: int) -> Observers:
        """The observers of one stage."""
        fabric = self.trainer.fabric
        main = rank() == 0
        size: int = method.encoder.input_size  # type: ignore[assignment]
        members: list[Observer] = []
        log = None
        if self.wandb is not None and main:
            name = self.recipe.name
            log = WandbLog(self.wandb, f"{name}/{stage.name}", name, config.to_plain(self.recipe))
            members.append(log)
        if self.validation is not None:
            members.append(
                Validation(
                    self.validation,
                    lambda: self._held_out_faces(size),
                    steps,
                    stage.name,
                    fabric.device,
                    fabric.autocast,
                    self.recipe.trainer.tensorboard,
                    main,
                    [] if log is None else [log.validated],
                )
            )
        if self.recipe.trainer.sheet_every:
            members.append(
                SampleSheets(
                    self.recipe.trainer.sheet_every,
                    self.source,
                    size,
                    seed,
                    f"{self.recipe.name}, stage {stage.name}",
                    steps,
                    fabric.device,
                    fabric.autocast,
                    main,
                    self.say,
                )
            )
        return Observers(members)

    def _held_out_faces(self, size: int) -> HeldOut:
        if self._faces is None:
            assert self.held_out is not None and self.validation is not None
            self._faces = HeldOut(self.held_out, self.validation, size, self.say)
        return self._faces


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
    """What a stage loads must be a part of the stage before and fit a part of it; stages share the image size.

    Raises:
        UsageError: says which stage lacks what, or what differs.
    """
    for index, stage in enumerate(recipe.stages):
        size, first = methods[index].encoder.input_size, methods[0].encoder.input_size
        if size != first:
            raise UsageError(
                f"stages.{index}: its backbone takes images of {size} x {size} pixels, that of stage "
                f"{recipe.stages[0].name!r} {first} x {first}; all stages of a run see one size"
            )
        if methods[index].encoder.channels != methods[0].encoder.channels:
            raise UsageError(f"stages.{index}: its backbone and that of the first stage take other colours")
        for source, target in map(_from_to, stage.load):
            filled = _part(recipe, index, methods, index, target)
            if source is None:
                continue
            kept = _part(recipe, index, methods, index - 1, source)
            try:
                check_fits(filled, tensors(kept), f"{source} of stage {recipe.stages[index - 1].name!r}")
            except LrfaceError as error:
                raise UsageError(f"stages.{index}.load: {target}: {error}") from error
        loaded = [target for _, target in map(_from_to, stage.load)]
        for part, source in methods[index].must_load.items():
            # A backbone of a library may name the file that it starts from.
            whole = {".".join(part.split(".")[:length]) for length in range(1, part.count(".") + 2)}
            if (
                whole.isdisjoint(loaded)
                and getattr(methods[index].get_submodule(part), "weights", None) is None
            ):
                raise UsageError(
                    f"stages.{index}.load lacks {part}, which knows nothing with fresh weights: add {{from: {source}, "
                    f"to: {part}}}, from the stage before, or {{path: RUN, from: {source}, to: {part}}}, from a run on "
                    "disk"
                )


def _from_to(entry: str | dict[str, str]) -> tuple[str | None, str]:
    """An entry of ``load`` as the part of the stage before, None for a model on disk, and the part that it fills."""
    if isinstance(entry, str):
        return entry, entry
    return None if "path" in entry else entry["from"], entry["to"]


def _part(
    recipe: config.Recipe, index: int, methods: Sequence[Method], number: int, name: str
) -> torch.nn.Module:
    """The part of stage ``number`` that stage ``index`` loads or fills."""
    try:
        return methods[number].get_submodule(name)
    except AttributeError as error:
        stage = recipe.stages[number]
        known = [child for child, _ in methods[number].named_children()]
        raise UsageError(
            f"stages.{index}.load: stage {stage.name!r} (method {stage.method.name}) has no {name}"
            f"{nearest(name, known)}; it has {', '.join(known)}"
        ) from error


def load_start(
    recipe: config.Recipe,
    stage: config.Stage,
    method: Method,
    before: Path | None,
    say: Callable[[str], None],
) -> None:
    """Fill the method's networks from the stage before or models on disk, the first stage's encoder by start_from, and
    what is left of them from the files that backbones name with ``weights``."""
    loaded = {target for _, target in map(_from_to, stage.load)}
    if before is None and recipe.start_from is not None:
        loaded.add("encoder")
    for line in start_networks(method, loaded):
        say(f"stage {stage.name}: {line}")
    if before is None and recipe.start_from is not None:
        _fill_from_model(method.encoder, recipe.start_from, f"start_from {recipe.start_from}")
        say(f"stage {stage.name}: encoder starts from {recipe.start_from}")
    state = {} if before is None else load_parts(before)
    for entry in stage.load:
        source, target = _from_to(entry)
        part = method.get_submodule(target)
        if source is None:
            assert isinstance(entry, dict)
            _fill_from_model(
                part, entry["path"], f"stage {stage.name}: load {entry['path']}", entry.get("from", "encoder")
            )
            say(f"stage {stage.name}: {target} comes from {entry['path']}")
            continue
        prefix = f"{source}."
        kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        fill(part, kept, f"{source} of {before}")
        if target == "head":
            assert before is not None
            load_classes(method, before, momentum=False)
    for line in method.filled(loaded):
        say(f"stage {stage.name}: {line}")


def _fill_from_model(part: torch.nn.Module, path: str, what: str, source: str = "encoder") -> None:
    encoder, card = load_model(path)
    if source == "encoder":
        fill(part, encoder.state_dict(), f"{what} ({card['architecture']})")
    else:
        fill(part, load_beside(find_model(path), card, source), f"{what}: {source}")


class TrainingImages:
    """The images that the stages of a run read, opened once, when a stage first wants them.

    Args:
        methods: those of all stages.
        root: where ``data.stylised`` is looked for, see :func:`find_data`.

    Raises:
        UsageError: a method takes stylised images and the recipe names none. LrfaceError: their folder is not there, or
            lacks some of them.
    """

    def __init__(
        self,
        recipe: config.Recipe,
        source: FaceSource,
        methods: Sequence[Method],
        show_progress: bool,
        root: str | Path | None = None,
    ):
        self.recipe, self.source, self.show_progress = recipe, source, show_progress
        self.stylised: FaceSource | None = None
        self._plain: FaceDataset | None = None
        self._paired: FaceDataset | None = None
        if any("stylised" in method.needs for method in methods):
            if recipe.data.stylised is None:
                raise UsageError(
                    "method.stylised_share takes stylised versions of the images: name their folder in data.stylised; "
                    "`lrface stylise` makes one"
                )
            from lrface.data.stylised import StylisedSource

            self.stylised = StylisedSource(source, find_data(recipe.data.stylised, root))

    def of(self, method: Method, stage: config.Stage | None = None) -> FaceDataset:
        """The images for ``method``, those of ``stage``'s share where it has one, with their stylised versions where it
        takes them."""
        dataset = self._all(method)
        if stage is None or stage.share == 1:
            return dataset
        return ChosenDataset(dataset, stage_rows(self.recipe, stage, self.source))

    def _all(self, method: Method) -> FaceDataset:
        if self._plain is None:
            self._plain = open_dataset(self.recipe, self.source, method, self.show_progress)
        if self.stylised is None or "stylised" not in method.needs:
            return self._plain
        if self._paired is None:
            from lrface.data.stylised import PairedDataset

            other = open_dataset(self.recipe, self.stylised, method, self.show_progress)
            self._paired = PairedDataset(self._plain, other)
        return self._paired


def open_dataset(
    recipe: config.Recipe, source: FaceSource, method: Method, show_progress: bool
) -> FaceDataset:
    """Decoded into the memory of each rank where the recipe wants it and it fits, else decoded as it goes."""
    size: int = method.encoder.input_size  # type: ignore[assignment]
    channels: int = method.encoder.channels  # type: ignore[assignment]
    cache = recipe.data.cache
    if cache not in (True, False, "auto"):
        raise UsageError(f"data.cache must be true, false or auto; found {cache!r}")
    crop = crop_settings(recipe)
    if crop is not None:
        if cache is True:
            raise UsageError(
                "data.cache keeps whole images as they are resized once, data.crop cuts them anew each time: set "
                "data.cache to false"
            )
        return CroppedDataset(source, size, crop, channels)
    if cache is True or (cache == "auto" and cache_size(source, size) * local_ranks() <= CACHE_LIMIT):
        return CachedDataset(source, size, show_progress, channels)
    return FaceDataset(source, size, channels)
