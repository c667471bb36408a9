"""Classification heads by name; each owns its class weights and turns embeddings into logits and a loss.

    softmax          a linear layer with bias
    cosface          s (cos theta - m)                                            Wang et al., CVPR 2018
    arcface          s cos(theta + m)                                             Deng et al., CVPR 2019
    combined         s (cos(m1 theta + m2) - m3)                                  Deng et al., CVPR 2019
    sphereface       |x| psi(theta), psi falling like cos(m theta)                Liu et al., CVPR 2017
    sphereface_r     s cos(min(m theta, pi))                                      Liu et al., TPAMI 2022
    sphereface2      a binary classifier a class                                  Wen et al., ICLR 2022
    adaface          the margin follows the length of the embedding               Kim et al., CVPR 2022
    magface          the margin grows with the length, which is taught            Meng et al., CVPR 2021
    curricularface   hard negatives count more as training goes on                Huang et al., CVPR 2020
    discface         arcface with the discrepancy term                            Kim et al., ACCV 2020

    partial          any of these with a softmax over cosines (``of``), on a sample of the classes and split over the
                     ranks of a run                                               An et al., CVPR 2022

All but sphereface2 take ``label_smoothing``; all but softmax take ``discrepancy``, the weight of DiscFace's term.
"""

from typing import Any

from lrface.errors import UsageError
from lrface.heads.adaptive import AdaFace, CurricularFace, MagFace
from lrface.heads.base import Head, HeadLoss
from lrface.heads.margin import ArcFace, CombinedMargin, CosFace, DiscFace, MarginHead, Softmax
from lrface.heads.partial import PartialHead
from lrface.heads.sphere import SphereFace, SphereFace2, SphereFaceR
from lrface.registry import Registry

__all__ = ["HEADS", "Head", "HeadLoss", "MarginHead", "PartialHead", "build_head", "build_margin"]

HEADS: Registry[Head] = Registry("head")
HEADS.register("cosface", CosFace)
HEADS.register("arcface", ArcFace)
HEADS.register("softmax", Softmax)
HEADS.register("combined", CombinedMargin)
HEADS.register("sphereface", SphereFace)
HEADS.register("sphereface_r", SphereFaceR)
HEADS.register("sphereface2", SphereFace2)
HEADS.register("adaface", AdaFace)
HEADS.register("magface", MagFace)
HEADS.register("curricularface", CurricularFace)
HEADS.register("discface", DiscFace)
HEADS.register("partial", PartialHead)


def build_head(name: str, embedding_size: int, identities: int, **arguments: Any) -> Head:
    """The head ``name`` (see above) for ``identities`` classes; partial takes the arguments of the head ``of`` too.

    Raises:
        UsageError: unknown name or arguments.
    """
    if name == "partial":
        of = arguments.pop("of", "cosface")
        known = ("sample_share",)
        own = {key: arguments.pop(key) for key in known if key in arguments}
        arguments = {**own, "inner": build_margin(of, embedding_size, **arguments)}
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
