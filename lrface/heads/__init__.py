"""Classification heads by name; each owns its class weights and turns embeddings into logits."""

from typing import Any

from torch import nn

from lrface.heads.margin import ArcFace, CosFace, Softmax
from lrface.registry import Registry

HEADS: Registry[nn.Module] = Registry("head")
HEADS.register("cosface", CosFace)
HEADS.register("arcface", ArcFace)
HEADS.register("softmax", Softmax)


def build_head(name: str, embedding_size: int, identities: int, **arguments: Any) -> nn.Module:
    """The head ``name`` (cosface, arcface, softmax) for ``identities`` classes.

    Raises:
        UsageError: unknown name or arguments.
    """
    return HEADS.build(name, embedding_size=embedding_size, identities=identities, **arguments)
