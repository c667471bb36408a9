"""Training methods by name."""

from lrface.methods.ant import AdversarialNoise
from lrface.methods.base import Method, StepOutput
from lrface.methods.classify import Classify
from lrface.methods.consistency import Consistency
from lrface.methods.distil import Distil
from lrface.methods.qualnet import QualNet
from lrface.registry import Registry

METHODS: Registry[Method] = Registry("method")
METHODS.register("ant", AdversarialNoise)
METHODS.register("classify", Classify)
METHODS.register("consistency", Consistency)
METHODS.register("distil", Distil)
METHODS.register("qualnet", QualNet)

__all__ = ["METHODS", "AdversarialNoise", "Classify", "Consistency", "Distil", "Method", "QualNet", "StepOutput"]
