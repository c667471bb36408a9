"""torch.export programs (.pt2), read without running anything that is in them.

``torch.export.load`` unpickles parts of the archive, hands its symbolic shapes to ``eval`` and resolves names of
functions to whatever lives below ``torch``, so that a file of somebody else's runs what its author wishes (PyTorch says
so: never load data from an untrusted source). Here the archive's JSON graph is interpreted: weights are bytes, the only
functions that it can name are tensor operators of ATen and arithmetic of sizes, pickles are never opened.

The format is that of PyTorch 2.8 and later: ``torch/csrc/export/pt2_archive_constants.h`` for the archive and
``torch/_export/serde/schema.py`` for the graph, major version 8.
"""

import json
import operator
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrface.errors import LrfaceError

SCHEMA_MAJOR = 8
CARD_FILE = "lrface_card"
"""Extra file of a .pt2 archive with lrface's card (``torch.export.save(..., extra_files={"lrface_card": JSON})``)."""

# Numbers of torch/_export/serde/schema.py.
_TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_STRIDED = 7

_SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            "add sub mul floordiv truediv mod neg eq ne lt le gt ge and_ or_ not_ getitem pow".split()
        )
    },
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
}
# Arguments of operators that are words. Any other word could be the name of a file (aten::from_file).
_WORDS = ("approximate", "rounding_mode", "mode", "padding", "padding_mode", "equation", "reduce", "indexing")
# Conversions of sizes that export leaves in the graph: they check, and change nothing.
_CHECKS = re.compile(r"torch\.ops\.aten\.(_assert\w*|sym_constrain_range\w*)\.\w+")


class ExportedProgram:
    """A program of one image batch: float [n, 3, side, side] -> its outputs by name.

    Attributes:
        input_size: side of the images; None where the graph leaves it open.
        smallest_batch, largest_batch: batches the graph was exported for.
        outputs: names of what it gives.
        card: text of lrface's card in the archive, or None.

    Raises:
        LrfaceError: not such an archive, one that needs a pickle or an operator that is no tensor operator of ATen, or
            a graph that does not take one batch of square images.
    """

    def __init__(self, file: Path, device: torch.device):
        self._file = file
        self._device = device
        try:
            with zipfile.ZipFile(file) as archive:
                self._read(archive)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise LrfaceError(f"{file} is no torch.export archive (.pt2): {error}") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise LrfaceError(
                f"{file}: its graph cannot be read ({type(error).__name__}: {error}); export the model again with "
                "torch.export.save of PyTorch 2.8 or later"
            ) from error

    def _refuse(self, what: str) -> LrfaceError:
        return LrfaceError(f"{self._file}: {what}")

    def _read(self, archive: zipfile.ZipFile) -> None:
        members = {}
        for entry in archive.infolist():
            # PyTorch stores; what inflates could fill the memory.
            if entry.compress_type != zipfile.ZIP_STORED:
                raise self._refuse(f"{entry.filename} is compressed, which torch.export.save never does")
            members[entry.filename.partition("/")[2]] = entry
        models = [name for name in members if re.fullmatch(r"models/[^/]+\.json", name)]
        if len(models) != 1 or "archive_format" not in members:
            raise self._refuse(
                "no torch.export archive of one model as PyTorch 2.8 or later writes it; a file of torch.save or "
                "torch.jit.save holds pickles, which lrface does not open: export it with torch.export.save"
            )
        foreign = [name for name in members if name.startswith(("data/aotinductor/", "data/executorch/"))]
        if foreign:
            raise self._refuse(f"it holds compiled code ({foreign[0]}), which lrface does not run")
        name = models[0].removeprefix("models/").removesuffix(".json")

        def text(member: str) -> Any:
            return json.loads(archive.read(members[member]))

        model = text(models[0])
        major = model["schema_version"]["major"]
        if major != SCHEMA_MAJOR:
            raise self._refuse(f"written in schema {major} of torch.export; this lrface reads {SCHEMA_MAJOR}")
        state: dict[str, Tensor] = {}
        for folder, kind in (("weights", "weight_"), ("constants", "tensor_")):
            if f"data/{folder}/{name}.pt" in members:
                raise self._refuse(f"data/{folder}/{name}.pt is a pickle, which lrface does not open")
            config = text(f"data/{folder}/{name}_{folder}_config.json")["config"]
            for key, entry in config.items():
                path = entry["path_name"]
                if entry["use_pickle"] or not path.startswith(kind):
                    raise self._refuse(
                        f"{key} is kept as a pickle ({path}), which lrface does not open, since pickles run code; "
                        "export a model of plain tensors"
                    )
                state[key] = self._tensor(
                    archive.read(members[f"data/{folder}/{path}"]), entry["tensor_meta"]
                )
        extra = members.get(f"extra/{CARD_FILE}")
        self.card = None if extra is None else archive.read(extra).decode("utf-8")
        self._build(model, state)

    def _tensor(self, data: bytes, meta: Mapping[str, Any]) -> Tensor:
        kind = _TYPES[meta["dtype"]]
        flat = torch.frombuffer(bytearray(data), dtype=kind) if data else torch.empty(0, dtype=kind)
        sizes, strides = ([side["as_int"] for side in meta[field]] for field in ("sizes", "strides"))
        # as_strided refuses what would lie outside the bytes.
        return flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"]).to(self._device)

    def _build(self, model: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        module = model["graph_module"]
        graph, signature = module["graph"], module["signature"]
        self._fixed: dict[str, Any] = {}
        images = []
        for spec in signature["input_specs"]:
            ((kind, entry),) = spec.items()
            if kind == "user_input":
                images.append(entry["arg"])
            elif kind in ("parameter", "buffer", "tensor_constant"):
                self._fixed[entry["arg"]["name"]] = state[entry[f"{kind}_name"]]
            else:
                raise self._refuse(f"its graph takes a {kind}, which no network of plain tensors needs")
        if len(images) != 1 or "as_tensor" not in images[0]:
            raise self._refuse(
                f"it takes {len(images)} inputs; a face embedder takes one, images [n, 3, 112, 112]"
            )
        self._image = images[0]["as_tensor"]["name"]
        self.outputs = []
        for spec in signature["output_specs"]:
            ((kind, entry),) = spec.items()
            if kind != "user_output":
                raise self._refuse(
                    f"it changes its own weights ({kind}): call eval() on the network before torch.export.export"
                )
            self.outputs.append(entry["arg"]["as_tensor"]["name"])
        meta = graph["tensor_values"][self._image]
        if meta["dtype"] not in (6, 7) or len(meta["sizes"]) != 4:
            raise self._refuse("a face embedder takes float images [n, 3, side, side]")
        self.input_type = _TYPES[meta["dtype"]]
        batch, channels, height, width = (side.get("as_int") for side in meta["sizes"])
        if channels not in (3, None) or height != width:
            raise self._refuse(
                f"it takes images [{batch}, {channels}, {height}, {width}]; a face embedder takes [n, 3, side, side]"
            )
        self.input_size = height
        # The batch is a number, or a symbol whose range is stated.
        bounds: Mapping[str, Any] = {"min_val": batch, "max_val": batch}
        if batch is None:
            symbol = re.search(r"\bs\d+\b", meta["sizes"][0]["as_expr"]["expr_str"])
            bounds = model["range_constraints"].get(symbol[0] if symbol else "") or {}
        self.smallest_batch = max(1, bounds.get("min_val") or 1)
        self.largest_batch = bounds.get("max_val")
        self._steps = [self._step(node) for node in graph["nodes"] if not _CHECKS.fullmatch(node["target"])]
        last: dict[str, int] = {}
        for number, (_, _, _, _, names) in enumerate(self._steps):
            last.update(dict.fromkeys(names, number))
        # What no later step needs is let go: memory stays that of the widest place.
        self._spent: list[list[str]] = [[] for _ in self._steps]
        for value, number in last.items():
            if value not in self.outputs and value not in self._fixed:
                self._spent[number].append(value)

    def _step(
        self, node: Mapping[str, Any]
    ) -> tuple[Callable[..., Any], list[Any], dict[str, Any], Any, set[str]]:
        """Function, positional and keyword arguments, outputs, and the names of values that go in."""
        target = node["target"]
        function = _SIZE_FUNCTIONS.get(target) or self._operator(target)
        names: set[str] = set()
        positional, keyword = [], {}
        for entry in node["inputs"]:
            value = self._argument(entry["arg"], entry["name"], target, names)
            if entry["kind"] == 2:
                keyword[entry["name"]] = value
            else:
                positional.append(value)
        return function, positional, keyword, node["outputs"], names

    def _operator(self, target: str) -> Callable[..., Any]:
        found = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
        if found:
            packet = getattr(torch.ops.aten, found[1], None)
            function = getattr(packet, found[2], None)
            if isinstance(function, torch._ops.OpOverload):
                return function
        raise self._refuse(
            f"its graph calls {target!r}; only tensor operators of PyTorch's own (torch.ops.aten) are run. A model with "
            "operators of others can be given as module:function"
        )

    def _argument(self, arg: Mapping[str, Any], name: str, target: str, names: set[str]) -> "_Value":
        ((kind, value),) = arg.items()
        if name in ("training", "train") and kind == "as_bool" and value:
            raise self._refuse(
                f"it was exported in training mode ({target}): call eval() on the network before torch.export.export"
            )
        if kind == "as_none":
            return _Constant(None)
        if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_int_lists"):
            if kind in ("as_float", "as_floats"):  # infinities are words in JSON
                value = [float(each) for each in value] if kind == "as_floats" else float(value)
            return _Constant(value)
        if kind == "as_scalar_type":
            return _Constant(_TYPES[value])
        if kind == "as_memory_format":
            return _Constant(_MEMORY_FORMATS[value])
        if kind == "as_layout" and value == _STRIDED:
            return _Constant(torch.strided)
        if kind == "as_device":
            return _Constant(self._device)
        if kind == "as_string" and name in _WORDS and target.startswith("torch.ops.aten."):
            return _Constant(value)
        if kind == "as_tensors":
            names.update(each["name"] for each in value)
            return _Several([_Named(each["name"]) for each in value])
        if kind in ("as_optional_tensors", "as_sym_ints"):
            return _Several([self._single(each, names) for each in value])
        if kind in ("as_tensor", "as_optional_tensor", "as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._single(value, names)
        raise self._refuse(f"argument {name!r} of {target} is of a kind that lrface does not run ({kind})")

    def _single(self, value: Mapping[str, Any], names: set[str]) -> "_Value":
        """A tensor or a size by name, a number, or nothing."""
        inner = value.get("as_tensor", value)
        name = inner.get("name", value.get("as_name"))
        if name is not None:
            names.add(name)
            return _Named(name)
        return _Constant(
            next((value[key] for key in ("as_int", "as_float", "as_bool") if key in value), None)
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs for images [n, 3, side, side] of the program's number type, on its device."""
        values: dict[str, Any] = {**self._fixed, self._image: images}
        for (function, positional, keyword, outputs, _), spent in zip(self._steps, self._spent, strict=True):
            result = function(
                *(value.of(values) for value in positional), **{k: v.of(values) for k, v in keyword.items()}
            )
            _keep(outputs, result, values)
            for name in spent:
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}


class _Value:
    def of(self, values: Mapping[str, Any]) -> Any:
        raise NotImplementedError


class _Constant(_Value):
    def __init__(self, value: Any):
        self.value = value

    def of(self, values: Mapping[str, Any]) -> Any:
        return self.value


class _Named(_Value):
    def __init__(self, name: str):
        self.name = name

    def of(self, values: Mapping[str, Any]) -> Any:
        return values[self.name]


class _Several(_Value):
    def __init__(self, parts: list[_Value]):
        self.parts = parts

    def of(self, values: Mapping[str, Any]) -> Any:
        return [part.of(values) for part in self.parts]


def _keep(outputs: list[Mapping[str, Any]], result: Any, values: dict[str, Any]) -> None:
    """Put what a step gave where its outputs say."""
    results = [result] if len(outputs) == 1 else list(result)
    for entry, given in zip(outputs, results, strict=True):
        ((kind, named),) = entry.items()
        if kind == "as_tensors":
            values.update({each["name"]: part for each, part in zip(named, given, strict=True)})
        elif kind != "as_none":
            name = named.get("as_tensor", named).get("name", named.get("as_name")) if named else None
            if name is not None:
                values[name] = given
