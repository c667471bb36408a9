"""Training methods by name."""

from lrface.methods.ada import AdA
from lrface.methods.ant import AdversarialNoise
from lrface.methods.base import Method, StepOutput
from lrface.methods.classify import Classify
from lrface.methods.consistency import Consistency
from lrface.methods.contrastive import Contrastive
from lrface.methods.distil import Distil
from lrface.methods.qualnet import QualNet
from lrface.methods.restore import Restore
from lrface.methods.robustify import Reconstruct, Robustify
from lrface.registry import Registry

METHODS: Registry[Method] = Registry("method")
METHODS.register("ada", AdA)
METHODS.register("ant", AdversarialNoise)
METHODS.register("classify", Classify)
METHODS.register("consistency", Consistency)
METHODS.register("contrastive", Contrastive)
METHODS.register("distil", Distil)
METHODS.register("qualnet", QualNet)
METHODS.register("reconstruct", Reconstruct)
METHODS.register("restore", Restore)
METHODS.register("robustify", Robustify)

__all__ = [
    "METHODS",
    "AdA",
    "AdversarialNoise",
    "Classify",
    "Consistency",
    "Contrastive",
    "Distil",
    "Method",
    "QualNet",
    "Reconstruct",
    "Restore",
    "Robustify",
    "StepOutput",
]
