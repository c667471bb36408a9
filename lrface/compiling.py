"""What PyTorch's compiler is told, without importing it."""

from typing import Any

import torch

not_compiled: Any = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
"""Decorator: what compiled code calls as it is.

``torch.compiler.disable`` imports the compiler where it is written, 1.5 seconds; the one that PyTorch marks its own
functions with imports it at the first call.
"""
