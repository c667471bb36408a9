"""A network that a function of the user's own makes, as a backbone: its weights are those that it comes with.

    {name: python, function: "package.module:function"}

The function takes no arguments and gives a ``torch.nn.Module``: RGB float [n, 3, s, s] in [0, 1] -> [n, d], with s its
``input_size`` where it has one, else 112. This runs code of the network's author, and so does loading what was trained from
it. A network of lrface is taken as it is; any other is traced by torch.fx, see lrface.models.traced.
"""

import copy
import importlib
import os
import sys
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from lrface.errors import LrfaceError, UsageError
from lrface.models.blocks import FaceBackbone
from lrface.models.traced import TracedBackbone


class PythonBackbone(TracedBackbone):
    """See this module.

    Args:
        function: ``module:function``, of a module in the current directory or installed.

    Raises:
        UsageError: no such text.
        LrfaceError: no such module or function, no network, or one that torch.fx cannot trace.
    """

    def __init__(self, function: str):
        super().__init__()
        device = torch.get_default_device()
        with torch.device("cpu"):
            made = made_by(function).float().eval()
            self.weights = function  # as of the backbones of libraries: it needs none from a stage before
            self.input_size = getattr(made, "input_size", FaceBackbone.input_size)
            if isinstance(made, FaceBackbone):
                self.network = made
                for name in ("embedding_size", "feature_channels", "feature_size", "channels"):
                    setattr(self, name, getattr(made, name))
            else:
                self._part(_traced(made, function), function)
        self.to(device)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.features(x) if hasattr(self, "network") else super().features(x)

    def embed(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.network.embed(feature_map) if hasattr(self, "network") else super().embed(feature_map)


def made_by(function: str) -> nn.Module:
    """What the function gives, a copy of its own. Raises: see :class:`PythonBackbone`."""
    name, _, called = function.partition(":")
    if not name or not called.isidentifier():
        raise UsageError(f"backbone.function must be module:function; found {function!r}")
    _, made = module_and_made(function)
    if not isinstance(made, nn.Module):
        raise LrfaceError(f"{function} gives {type(made).__name__}; a torch.nn.Module is needed to train it")
    return copy.deepcopy(made)


def module_and_made(text: str) -> tuple[ModuleType, Any]:
    """The module in ``module:function``, and what the function gives. Raises LrfaceError for what fails in either."""
    name, _, function = text.partition(":")
    # As `python -m` does: modules of the current directory come first, while this one is imported and called.
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
        return module, getattr(module, function)()
    except Exception as error:  # anything may go wrong in code of the user's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LrfaceError(
            f"{text}: {type(error).__name__}: {reason}; the module is imported from the current directory or an "
            "installed package, and the function is called without arguments"
        ) from error
    finally:
        sys.path.remove(os.getcwd())


def _traced(network: nn.Module, what: str) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(network).eval()
    except Exception as error:  # whatever code of the user's does with a tensor that has no values
        reason = str(error).partition("\n")[0][:200]
        raise LrfaceError(
            f"{what}: torch.fx cannot trace the network ({type(error).__name__}: {reason}); export it to ONNX, or let "
            "the function give an lrface.models.blocks.FaceBackbone with features() and embed()"
        ) from error
