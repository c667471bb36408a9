"""The ImageNet-C family of corruptions as batched tensor functions, on CPU and GPU.

    parameters = sample("fog", severity, (224, 224), "imagenet", generator)   # severity: int64 [n], 1 to 5, 0 clean
    corrupted = apply(images, parameters)                                    # uint8 or float [0, 1], [n, 3, h, w]

or in one call ``corrupt(images, "fog", 3, "imagenet", seed=0)``. What happens to an image depends on its severity and
its seed alone, not on the rest of its batch nor on the device.
"""

from lrface.degrade.corruptions.core import (
    CorruptionParameters,
    apply,
    check_name,
    check_set,
    corrupt,
    sample,
)
from lrface.degrade.corruptions.tables import (
    CORRUPTIONS,
    GROUPS,
    HELD_OUT,
    MNIST_SEVERITY,
    SETS,
    CorruptionSet,
)

__all__ = [
    "CORRUPTIONS",
    "GROUPS",
    "HELD_OUT",
    "MNIST_SEVERITY",
    "SETS",
    "CorruptionParameters",
    "CorruptionSet",
    "apply",
    "check_name",
    "check_set",
    "corrupt",
    "sample",
]
