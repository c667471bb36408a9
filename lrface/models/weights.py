"""Weights that others published, read as tensors alone."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lrface.errors import LrfaceError


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, on the CPU, which may hold them under state_dict or model and behind
    ``module.``; nothing in it is run.

    Raises:
        LrfaceError: the file is missing or broken, or holds something else.
    """
    if not file.is_file():
        raise LrfaceError(f"{file}: no such file; lrface loads no weights from the network, put them there")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise LrfaceError(
                f"{file} is no readable safetensors file ({error}); copy it or save it again"
            ) from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises whatever a damaged file leads to
        # Of PyTorch's own words the first sentence: the rest advises to run what is in the file.
        reason = re.split(r"[.\n]", str(error))[0][:200]
        raise LrfaceError(
            f"{file} cannot be read as tensors alone ({reason}); save its state_dict by itself with torch.save, or as "
            ".safetensors"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(value, Tensor) for value in found.values())
    ):
        raise LrfaceError(f"{file} holds no state_dict: tensors by name were expected")
    prefix = "module."
    if all(key.startswith(prefix) for key in found):
        found = {key.removeprefix(prefix): value for key, value in found.items()}
    return dict(found)
