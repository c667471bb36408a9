"""Recipes: strict YAML <-> dataclasses, and dotted overrides. An unknown key is an error that names the nearest."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lrface.errors import UsageError
from lrface.registry import nearest


@dataclass
class Named:
    """Something built by name; every further key is an argument of its builder."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Synthetic:
    """The embedded procedural identities (smoke tests and demos, not research)."""

    identities: int = 200
    images_per_identity: int = 20
    seed: int = 0
    first_identity: int = 0


@dataclass
class Sampling:
    """See lrface.data.sampling.Sampling."""

    kind: str = "shuffle"
    beta: float | None = None
    weights: str = "power"
    identities: int | None = None
    images: int | None = None
    maximum: int | None = None
    minimum: int = 1


@dataclass
class Data:
    """What is trained on.

    path: packed data or a folder of identity folders of aligned crops; looked for as it stands, then below
        the data root (--data, $LRFACE_DATA, ~/.cache/lrface). A list of them, of the same identities, is one set: a
        training set and what `lrface deepaugment` made from it.
    synthetic: the embedded identities instead of a path.
    batch_size: images of a step, of all ranks together, so that the learning rate is the same on any number of them.
    cache: true keeps all decoded faces in memory, "auto" does so up to 4 GiB.
    classes: names of the classes in the order of their labels, where the data is of classes and not of people; they
        are stored with the model.
    classes_subset: only these classes of the data: imagenet200 (those of Tiny-ImageNet), imagenet100, or a file with a name
        a line. Their names are stored with the model.
    crop: how images are cut anew each time they are shown: random_resized, ImageNet's (see lrface.data.crop); without it
        they are resized whole.
    stylised: a folder that `lrface stylise` made of the images, for methods that train on stylised ones; looked for as
        it stands, then below $LRFACE_DATA and ~/.cache/lrface.
    sampling: how often the images of each identity are shown.
    """

    path: str | list[str] | None = None
    synthetic: Synthetic | None = None
    batch_size: int = 256
    workers: int = 0
    cache: str | bool = "auto"
    classes: list[str] | None = None
    classes_subset: str | None = None
    crop: Named | None = None
    stylised: str | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Degrade:
    """See lrface.degrade.policy.ResolutionPolicy; with a ``name``, any policy of lrface.degrade.policies instead."""

    clean_share: float = 0.5
    sizes: list[int] = field(default_factory=lambda: [56, 28, 14])
    continuous: list[int] | None = None
    down: list[str] = field(default_factory=lambda: ["nearest"])
    up: list[str] = field(default_factory=lambda: ["bilinear"])
    mirror: float = 0.5


@dataclass
class Layer:
    """See lrface.train.optimisers.Layer."""

    match: str
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None


@dataclass
class Optimiser:
    """See lrface.train.optimisers.Optimiser."""

    name: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    clip_norm: float | None = None
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    decay_norms: bool = False
    layers: list[Layer] = field(default_factory=list)


@dataclass
class Schedule:
    """See lrface.train.schedule.Schedule."""

    kind: str = "multistep"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_steps: int = 0
    final: float = 0.0
    power: float = 2.0
    milestone_epochs: list[float] = field(default_factory=list)
    warmup_epochs: float = 0.0


@dataclass
class Stage:
    """One stage: a method, what it sees, for how long, and what it takes from the stage before.

    load: parts copied from the stage before: encoder, head, decoder, and others that a method has. ``{from: encoder, to:
        decoder.network}`` puts a part in another place, ``{path: RUN, to: decoder.network}`` the encoder of a model on
        disk, in a first stage too; ``{path: RUN, from: head, to: teacher_head}`` what it was trained with.
    backbone: the network of this stage, where it is not the recipe's.
    steps or epochs: exactly one.
    share: of each class's images, above 0 to 1, that the stage trains on, one image at least: few labels. Epochs are of
        these images. Drawn with ``share_seed``, by default the recipe's seed; `lrface probe --labels SHARE --seed SEED`
        takes the same ones.
    accumulate, ema: see lrface.train.trainer.Stage.
    """

    name: str
    method: Named
    degrade: Degrade | Named = field(default_factory=Degrade)
    load: list[str | dict[str, str]] = field(default_factory=list)
    backbone: Named | None = None
    steps: int | None = None
    epochs: float | None = None
    share: float = 1.0
    share_seed: int | None = None
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule = field(default_factory=Schedule)
    accumulate: int = 1
    ema: float | None = None


@dataclass
class Validate:
    """See lrface.train.validate.ValidationSettings."""

    every: int = 1000
    identities: int | float = 50
    sizes: list[int] = field(default_factory=lambda: [112, 56, 28, 14])
    pairs: int = 2000
    choose: str = "last"
    seed: int = 0
    batch_size: int = 128


@dataclass
class Wandb:
    """See lrface.train.wandb.WandbSettings."""

    project: str = "lrface"
    mode: str = "online"


@dataclass
class Trainer:
    """See lrface.train.trainer.Trainer.

    devices, nodes: ranks on each machine and machines; `lrface train` starts those of one machine. With torchrun or
        srun both stay 1.
    timeout_seconds: how long a rank waits for the others before it ends with an error.
    sheet_every: steps between sample sheets (lrface.train.sheets), 0 for none.
    wandb: also log to Weights & Biases.
    """

    device: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    sync_batchnorm: bool | None = None
    timeout_seconds: float = 1800.0
    precision: str = "bfloat16"
    channels_last: bool = True
    compile: str | bool = False
    threads: int | None = None
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    checkpoint_activations: bool = False
    log_every: int = 10
    tensorboard: bool = True
    sheet_every: int = 1000
    wandb: Wandb | None = None


@dataclass
class Recipe:
    """A whole training run.

    start_from: a model whose encoder the first stage starts from.
    validate: identities held out from training, and accuracy on them as training goes on; nothing without it.
    """

    name: str
    stages: list[Stage]
    description: str = ""
    seed: int = 0
    out: str | None = None
    start_from: str | None = None
    data: Data = field(default_factory=Data)
    backbone: Named = field(default_factory=lambda: Named("ir50"))
    head: Named = field(default_factory=lambda: Named("cosface"))
    decoder: Named = field(default_factory=lambda: Named("subpixel"))
    trainer: Trainer = field(default_factory=Trainer)
    validate: Validate | None = None


def _describe(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        problem: UsageError | None = None
        for option in (option for option in options if option is not type(None)):
            try:
                return _convert(option, value, where)
            except UsageError as error:
                problem = problem or error
        assert problem is not None
        raise problem
    if origin is list:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list; found {value!r}")
        (inner,) = typing.get_args(kind)
        return [_convert(inner, item, f"{where}.{index}") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} must be a mapping; found {value!r}")
        return value
    if kind is Named:
        return _named(value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text: only 1.0e-3 is a number to it.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind in (int, float) and isinstance(value, bool)):
        return value
    raise UsageError(f"{where} must be of type {_describe(kind)}; found {value!r}")


def _named(value: Any, where: str) -> Named:
    if isinstance(value, str):
        return Named(value)
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise UsageError(f"{where} must be a name, or a mapping with a name and arguments; found {value!r}")
    return Named(value["name"], {key: item for key, item in value.items() if key != "name"})


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UsageError(f"{where or 'the recipe'} must be a mapping; found {value!r}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise UsageError(
                f"unknown key {prefix}{key}{nearest(str(key), hints)}; known: {', '.join(hints)}"
            )
    for f in dataclasses.fields(kind):
        # "head: {margin: 0.1}", or the override head.margin=0.1, is about the default head.
        if hints[f.name] is Named and f.default_factory is not dataclasses.MISSING:
            given = value.get(f.name)
            if isinstance(given, dict) and "name" not in given:
                value = {**value, f.name: {"name": f.default_factory().name, **given}}
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for key in required:
        if key not in value:
            raise UsageError(f"{prefix}{key} is missing")
    return kind(**{key: _convert(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set ``dotted.key=value`` in ``raw``; the value is read as YAML. List items go by index or by name.

    Raises:
        UsageError: no "=", an index out of range, a path through a value.
    """
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise UsageError(f"an override is key=value, such as data.batch_size=64; found {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"the value of override {override!r} is no YAML: {error}") from error
    place: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            index = _list_index(place, key, override)
            if last:
                place[index] = value
            else:
                place = place[index]
        elif isinstance(place, dict):
            if last:
                place[key] = value
            else:
                if isinstance(place.get(key), str):  # "head: cosface" is short for "head: {name: cosface}"
                    place[key] = {"name": place[key]}
                elif place.get(key) is None:
                    place[key] = {}
                place = place[key]
        else:
            raise UsageError(f"override {override!r}: {'.'.join(keys[:depth])} is a value and has no {key!r}")


def _list_index(items: list[Any], key: str, override: str) -> int:
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    known = ", ".join(str(name) for name in names if name) or "none"
    raise UsageError(f"override {override!r}: no item {key!r}; items 0 to {len(items) - 1}, named {known}")


def parse_recipe(raw: Any, overrides: typing.Sequence[str] = ()) -> Recipe:
    """A recipe from what YAML gave, after ``overrides``.

    Raises:
        UsageError: an unknown key (naming the nearest), a wrong type, a missing field.
    """
    if not isinstance(raw, dict):
        raise UsageError(f"a recipe is a mapping of fields; found {type(raw).__name__}")
    for override in overrides:
        apply_override(raw, override)
    recipe: Recipe = _dataclass(Recipe, raw, "")
    if not recipe.stages:
        raise UsageError("stages must list at least one stage")
    names = [stage.name for stage in recipe.stages]
    for index, stage in enumerate(recipe.stages):
        where = f"stages.{index}"
        if names.count(stage.name) > 1 or not stage.name or "/" in stage.name:
            raise UsageError(f"{where}.name must be unique and without '/'; found {stage.name!r}")
        if (stage.steps is None) == (stage.epochs is None):
            raise UsageError(f"{where}: give exactly one of steps and epochs")
        if not 0 < (stage.epochs if stage.steps is None else stage.steps) < float("inf"):  # type: ignore[operator]
            raise UsageError(f"{where}: steps or epochs must be above 0")
        if not 0 < stage.share <= 1:
            raise UsageError(f"{where}.share must be above 0 and at most 1; found {stage.share}")
        if stage.share_seed is not None and stage.share_seed < 0:
            raise UsageError(f"{where}.share_seed must be at least 0; found {stage.share_seed}")
        for number, entry in enumerate(stage.load):
            if index == 0 and not (isinstance(entry, dict) and "path" in entry):
                raise UsageError(
                    f"{where}.load: the first stage has none before it; use start_from for a model on disk"
                )
            _check_load(entry, f"{where}.load" if isinstance(entry, str) else f"{where}.load.{number}")
    if (recipe.data.path is None) == (recipe.data.synthetic is None):
        raise UsageError("data: give exactly one of path and synthetic")
    if recipe.data.path == []:
        raise UsageError("data.path must name at least one set; found an empty list")
    if recipe.data.batch_size < 2:
        raise UsageError(
            f"data.batch_size must be at least 2 (BatchNorm needs two); found {recipe.data.batch_size}"
        )
    if recipe.data.workers < 0:
        raise UsageError(f"data.workers must be at least 0; found {recipe.data.workers}")
    return recipe


def _check_load(entry: str | dict[str, str], where: str) -> None:
    """Raises UsageError unless ``entry`` is a part's name, or says where something is from and which part it fills."""
    mapping = isinstance(entry, dict)
    if mapping and set(entry) not in ({"from", "to"}, {"path", "to"}, {"path", "from", "to"}):
        raise UsageError(
            f"{where} must be a part, or a mapping such as {{from: encoder, to: decoder.network}} or {{path: RUN, "
            f"to: decoder.network}}; found {entry!r}"
        )
    for value in entry.values() if mapping else [entry]:  # type: ignore[union-attr]
        if not isinstance(value, str) or not value:
            raise UsageError(f"{where} takes names; found {value!r}")


def read_yaml(path: Path) -> Any:
    """What the YAML file holds. Raises UsageError naming the file and line when it is broken."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no valid YAML: {error}") from error


def to_plain(value: Any) -> Any:
    """A dataclass tree as plain values, the way a recipe file would hold it."""
    if isinstance(value, Named):
        return {"name": value.name, **value.arguments}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every field spelled out; reading it back gives the same recipe."""
    return yaml.safe_dump(to_plain(recipe), sort_keys=False, allow_unicode=True)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted keys whose values differ between two plain trees, as "key: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for line in differences(a, b, f"{where}.{i}")
        ]
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]
