"""Models and checkpoints on disk: safetensors for weights, JSON for the card, nothing that can run code.

A model is NAME.safetensors (the encoder) with NAME.json (its card). A checkpoint is a directory
``step-00001000`` with such a model, the method's other parts (``parts.safetensors``) and what the optimiser and
the random generators need to go on (``training.pt``, read with ``weights_only=True``). A checkpoint directory is
renamed into place when it is complete, so that whatever can be seen can be resumed.
"""

import dataclasses
import hashlib
import io
import pickle
import random
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

import lrface
from lrface.errors import LrfaceError, UsageError
from lrface.files import atomic_directory, atomic_file, read_json, write_json
from lrface.models import build_decoder_for, build_network
from lrface.models.blocks import FaceBackbone
from lrface.shipped import shipped_or

MODEL = "model.safetensors"
PARTS = "parts.safetensors"
TRAINING = "training.pt"


def make_card(architecture: dict[str, Any], encoder: nn.Module, training: dict[str, Any]) -> dict[str, Any]:
    """The facts a model travels with.

    Args:
        architecture: ``{"name": ..., "arguments": {...}}``, what :func:`build_network` is called with.
        encoder: the network, for its embedding, input size and channels.
        training: what it was trained on and how; free form, JSON.
    """
    if isinstance(encoder, FaceBackbone):
        described = encoder.described(architecture.get("arguments", {}))
        architecture = {**architecture, "arguments": described}
    return {
        "format": "lrface-model",
        "version": 1,
        "lrface_version": lrface.__version__,
        "architecture": architecture,
        "embedding_size": encoder.embedding_size,
        "input": {
            "size": encoder.input_size,
            "colour": colour_of(encoder),
            "range": [0, 1],
            "normalisation": "inside",
        },
        "training": training,
        "licence": "unspecified: weights carry the terms of the data they were trained on",
    }


def colour_of(encoder: nn.Module) -> str:
    """ "RGB", or "grey" for a network of one channel."""
    return "grey" if getattr(encoder, "channels", 3) == 1 else "RGB"


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_model(
    path: str | Path, encoder: nn.Module, card: dict[str, Any], state: dict[str, Tensor] | None = None
) -> Path:
    """Write NAME.safetensors and NAME.json.

    Args:
        path: a file ending in .safetensors, or a directory (then model.safetensors in it).
        state: tensors to write instead of the encoder's own: its averaged weights.

    Returns:
        The path of the weights.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / MODEL
    with atomic_file(path) as aside:
        # By Python from memory, here and below: the library's own writer hides that a disk is full.
        aside.write_bytes(save(_contiguous(encoder.state_dict() if state is None else state)))
    write_json(path.with_suffix(".json"), {**card, "weights_sha256": _sha256(path)})
    return path


def _stage_number(folder: Path) -> int:
    number = folder.name.split("-")[0]
    return int(number) if number.isdigit() else -1


def find_model(path: str | Path) -> Path:
    """The weights file that ``path`` means: itself, ``model.safetensors`` in it, a run's newest checkpoint, or for
    "shipped" the model inside the wheel.

    Raises:
        LrfaceError: nothing there is a model.
    """
    path = shipped_or(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LrfaceError(
                f"{path} is not a model: expected a .safetensors or .onnx file, or a directory made by `lrface train`"
            )
        return path
    if not path.exists():
        raise LrfaceError(
            f"{path}: no such model; give a .onnx or .safetensors file or a directory made by `lrface train RECIPE`"
        )
    if (path / MODEL).is_file():
        return path / MODEL
    for stage in sorted((path / "stages").glob("*-*"), key=_stage_number, reverse=True):
        newest = latest_checkpoint(stage)
        if newest is not None:
            return newest / MODEL
    newest = latest_checkpoint(path)
    if newest is not None:
        return newest / MODEL
    raise LrfaceError(f"{path} holds no model: neither {MODEL} nor a checkpoint of `lrface train`")


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises LrfaceError when it is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise LrfaceError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise LrfaceError(
            f"{path} is no readable safetensors file ({error}); copy or train it again"
        ) from error


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without the extra state that modules may have."""
    return {key: value for key, value in module.state_dict().items() if not key.endswith("_extra_state")}


def fill(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load ``state`` into ``module``, all of it and nothing else. Raises LrfaceError: see :func:`check_fits`."""
    check_fits(module, state, what)
    own = tensors(module)
    extra_state = {key: value for key, value in module.state_dict().items() if key not in own}
    module.load_state_dict({**state, **extra_state})


def check_fits(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raises LrfaceError naming the first tensor of ``state`` that is missing, left over or of another shape."""
    own = tensors(module)
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or extra or other:
        found = []
        if other:
            key = other[0]
            found.append(
                f"{len(other)} tensors of another shape, first {key}: {tuple(state[key].shape)} in the file, "
                f"{tuple(own[key].shape)} in the network"
            )
        if missing:
            found.append(f"{len(missing)} missing, first {missing[0]}")
        if extra:
            found.append(f"{len(extra)} not of this network, first {extra[0]}")
        raise LrfaceError(f"{what} is of another architecture: {'; '.join(found)}")


def check_card(card: dict[str, Any], path: Path, ranges: Collection[list[int]] = ([0, 1],)) -> None:
    """Raises LrfaceError unless ``card`` describes a model this version can read and feed correctly.

    ``ranges``: those of pixels that the caller can give.
    """
    if card.get("format") != "lrface-model":
        raise LrfaceError(f"{path}: field 'format' must be 'lrface-model'; found {card.get('format')!r}")
    if card.get("version") != 1:
        raise LrfaceError(
            f"{path}: written in format version {card.get('version')}; this lrface reads version 1"
        )
    entry = card.get("input")
    if not isinstance(entry, dict):
        raise LrfaceError(f"{path}: field 'input' must say size, colour and range; found {entry!r}")
    given = entry.get("range")
    known = given if given in ranges else [0, 1]
    for field, wanted in (("colour", "RGB"), ("range", known), ("normalisation", "inside")):
        if entry.get(field) != wanted and (field, entry.get(field)) != ("colour", "grey"):
            raise LrfaceError(f"{path}: field 'input.{field}' must be {wanted!r}; found {entry.get(field)!r}")


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The encoder in eval mode and its card.

    Args:
        path: see :func:`find_model`.

    Raises:
        LrfaceError: nothing there, card missing or unreadable, weights that do not fit the card (another
            architecture, another file's card).
    """
    weights = find_model(path)
    card_path = weights.with_suffix(".json")
    card = read_json(card_path, "the card of the model")
    check_card(card, card_path)
    architecture = card.get("architecture")
    arguments = architecture.get("arguments", {}) if isinstance(architecture, dict) else None
    if not isinstance(architecture, dict) or "name" not in architecture or not isinstance(arguments, dict):
        raise LrfaceError(
            f"{card_path}: field 'architecture' must hold a name and arguments; found {architecture!r}"
        )
    try:
        encoder = build_network(architecture["name"], **arguments)
    except UsageError as error:
        raise LrfaceError(f"{card_path}: field 'architecture': {error}") from error
    fill(encoder, load_state(weights), f"{weights} (its card says {architecture['name']})")
    if card.get("weights_sha256") != _sha256(weights):
        raise LrfaceError(
            f"{weights} does not belong to {card_path}: its sha256 differs from field 'weights_sha256'"
        )
    for field, stated, own in (
        ("embedding_size", card.get("embedding_size"), encoder.embedding_size),
        ("input.size", card["input"].get("size"), encoder.input_size),
        ("input.colour", card["input"].get("colour"), colour_of(encoder)),
    ):
        if stated != own:
            raise LrfaceError(f"{card_path}: field {field!r} is {stated}, that of the network {own}")
    return encoder.to(device).eval(), card


def _checkpoint_of(stage: Path, card: dict[str, Any]) -> Path | None:
    """The checkpoint whose weights the card describes (the last, or one chosen in validation), else the newest."""
    for path in reversed(checkpoints(stage)):
        kept = read_json(path / "model.json", "the card of the checkpoint").get("weights_sha256")
        if kept == card.get("weights_sha256"):
            return path
    return latest_checkpoint(stage)


def find_parts(weights: Path, card: dict[str, Any]) -> Path | None:
    """The checkpoint that holds what a model was trained with: the model's own folder, or one of the run's stages."""
    folders = [weights.parent] if weights.name == MODEL else []
    for stage in sorted((weights.parent / "stages").glob("*-*"), key=_stage_number, reverse=True):
        folders += reversed(checkpoints(stage))
    for folder in folders:
        if (folder / PARTS).is_file():
            kept = read_json(folder / "model.json", "the card of the checkpoint").get("weights_sha256")
            if kept == card.get("weights_sha256"):
                return folder
    return None


def load_beside(weights: Path, card: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The tensors of a part of the method, such as its head, that ``lrface train`` learned beside a model.

    Raises:
        LrfaceError: no checkpoint of this model beside it, or one without this part.
    """
    folder = find_parts(weights, card)
    if folder is None:
        raise LrfaceError(
            f"{weights} has no {part}: a run of `lrface train` keeps it in its checkpoints (RUN/stages), and none of this "
            "model was found there"
        )
    state = load_state(folder / PARTS)
    found = {
        key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")
    }
    if not found:
        known = ", ".join(sorted({key.split(".")[0] for key in state})) or "nothing"
        raise LrfaceError(f"{folder / PARTS} has no {part}; it has {known}")
    return found


def load_decoder(weights: Path, card: dict[str, Any], encoder: FaceBackbone) -> nn.Module:
    """The decoder that a finished run of `lrface train` learned beside its encoder, in eval mode.

    Args:
        weights: the run's model.safetensors; the decoder is in its last checkpoint.
        card: of these weights; its recipe says what the decoder is.
        encoder: what was loaded from them.

    Raises:
        LrfaceError: no recipe on the card, no checkpoint beside the model or one of another model, or a method that
            trains no decoder.
    """
    needed = (
        "a reconstruction error needs the decoder, which a finished run of QualNet keeps in its checkpoints"
    )
    recipe = card.get("recipe")
    named = dict(recipe.get("decoder") or {}) if isinstance(recipe, dict) else {}
    stages = sorted((weights.parent / "stages").glob("*-*"), key=_stage_number)
    newest = _checkpoint_of(stages[-1], card) if stages else None
    if "name" not in named or newest is None:
        missing = f"no checkpoints in {weights.parent / 'stages'}" if named else "no recipe on its card"
        raise LrfaceError(f"{weights} has no decoder ({missing}); {needed}")
    prefix = "decoder."
    state = {
        key.removeprefix(prefix): value
        for key, value in load_state(newest / PARTS).items()
        if key.startswith(prefix)
    }
    if not state:
        raise LrfaceError(f"{newest / PARTS} has no decoder; {needed}")
    kept = read_json(newest / "model.json", "the card of the checkpoint").get("weights_sha256")
    if kept != card.get("weights_sha256"):
        raise LrfaceError(f"{newest} is a checkpoint of another model than {weights}; {needed}")
    try:
        decoder = build_decoder_for(encoder, **named)
    except UsageError as error:
        raise LrfaceError(f"the recipe on the card of {weights}: {error}") from error
    fill(decoder, state, f"the decoder in {newest / PARTS}")
    return decoder.eval()


@dataclasses.dataclass
class TrainingState:
    """What a run needs to go on exactly, beside the weights of model.safetensors and parts.safetensors.

    step: steps done, which is also the place in the schedule and in the order of the data.
    random: see :func:`random_state`.
    extra: the method's own state.
    scaler: the scale of float16 gradients.
    weights: the method's tensors, where the two files hold averaged ones.
    random_of_others: ``random`` of the other ranks of a distributed run, from rank 1 on.
    """

    step: int
    optimiser: dict[str, Any]
    random: dict[str, Any]
    extra: dict[str, Any]
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, Tensor] | None = None
    random_of_others: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def seed_random(seed: int) -> None:
    """Start every generator of :func:`random_state` at ``seed``."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def torch_random_state() -> dict[str, Any]:
    """PyTorch's random generators on CPU and GPU: cheap enough for every step."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # asking whether there is a GPU takes longer than everything else here
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def random_state() -> dict[str, Any]:
    """Every random generator a method may draw from: PyTorch's on CPU and GPU, Python's and NumPy's global ones."""
    version, words, gauss = random.getstate()
    kind, key, *rest = np.random.get_state(legacy=True)
    return {
        **torch_random_state(),
        "python": (version, torch.tensor(words), gauss),
        "numpy": (str(kind), torch.from_numpy(np.asarray(key).astype(np.int64)), *rest),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators that ``state`` knows; a checkpoint of lrface 0.1 knows PyTorch's only."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "python" in state:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in state:
        kind, key, *rest = state["numpy"]
        np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))


def save_checkpoint(
    folder: Path,
    method: nn.Module,
    card: dict[str, Any],
    state: TrainingState,
    keep_last: int,
    kept: Collection[int] = (),
    keep_every: int | None = None,
    averaged: dict[str, Tensor] | None = None,
    more: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``folder/step-XXXXXXXX`` and then delete all but the newest ``keep_last`` checkpoints and those of
    the steps ``kept``.

    Args:
        keep_every: checkpoints of steps that are a multiple of it stay for ever, too.
        averaged: tensors of the method to write as its weights; its own then go into the training state.
        more: writes further files into the folder it is called with.

    Raises:
        LrfaceError: the disk is full or cannot be written; older checkpoints are kept.
    """
    path = folder / f"step-{state.step:08d}"
    encoder = method.get_submodule("encoder")
    own = tensors(method)
    if averaged is not None:
        state.weights = own
        own = averaged
    parts = {key: value for key, value in own.items() if not key.startswith("encoder.")}
    weights = {key.removeprefix("encoder."): own[key] for key in own if key not in parts}
    with atomic_directory(path) as aside:
        if more is not None:
            more(aside)
        save_model(aside, encoder, {**card, "step": state.step}, weights)
        (aside / PARTS).write_bytes(save(_contiguous(parts)))
        training = io.BytesIO()
        torch.save(vars(state), training)
        (aside / TRAINING).write_bytes(training.getbuffer())
    for old in checkpoints(folder)[:-keep_last]:
        step = int(old.name.removeprefix("step-"))
        if step not in kept and (keep_every is None or step % keep_every):
            remove_directory(old)
    return path


def remove_directory(path: Path) -> None:
    """Delete a checkpoint so that no half of it can ever be taken for a whole."""
    gone = path.with_name(f".{path.name}.deleted")
    path.rename(gone)
    shutil.rmtree(gone)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left of files and checkpoints half written or half deleted."""
    for pattern in (".*.tmp", ".step-*.deleted"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest_checkpoint(folder: Path) -> Path | None:
    found = checkpoints(folder)
    return found[-1] if found else None


def load_parts(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's method: the encoder's under ``encoder.`` and the other parts'."""
    state = {f"encoder.{key}": value for key, value in load_state(path / MODEL).items()}
    return {**state, **load_state(path / PARTS)}


def load_training_state(path: Path) -> TrainingState:
    """Raises LrfaceError when the file is missing or broken."""
    try:
        return TrainingState(**torch.load(path / TRAINING, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        # PyTorch's own words here recommend reading the file unsafely.
        refused = isinstance(error, pickle.UnpicklingError)
        reason = "it is broken or holds something other than tensors and plain values" if refused else error
        raise LrfaceError(
            f"{path / TRAINING} cannot be read ({reason}); delete {path} to resume from the checkpoint before"
        ) from error
