"""Classification heads by name; each owns its class weights and turns embeddings into logits."""

from typing import Any

from lrface.errors import UsageError
from lrface.heads.base import Head, HeadLoss
from lrface.heads.margin import ArcFace, CosFace, MarginHead, Softmax
from lrface.registry import Registry

__all__ = ["HEADS", "Head", "HeadLoss", "MarginHead", "build_head", "build_margin"]

HEADS: Registry[Head] = Registry("head")
HEADS.register("cosface", CosFace)
HEADS.register("arcface", ArcFace)
HEADS.register("softmax", Softmax)


def build_head(name: str, embedding_size: int, identities: int, **arguments: Any) -> Head:
    """The head ``name`` (cosface, arcface, softmax) for ``identities`` classes.

    Raises:
        UsageError: unknown name or arguments.
    """
    return HEADS.build(name, embedding_size=embedding_size, identities=identities, **arguments)


def build_margin(name: str, embedding_size: int, **arguments: Any) -> MarginHead:
    """The head ``name`` without class weights, for a module that holds them itself and calls ``margin`` on some.

    Raises:
        UsageError: unknown name or arguments, or a head that acts on more than cosines.
    """
    # The margin does not depend on how many classes there are; the weights of these two are dropped.
    head = build_head(name, embedding_size, identities=2, **arguments)
    if not isinstance(head, MarginHead):
        raise UsageError(f"head {name!r} has no margin to apply to some of the classes")
    head.register_parameter("weight", None)
    return head
