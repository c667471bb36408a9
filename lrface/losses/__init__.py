"""Losses: pure functions that know no trainer, configuration or rank."""

from lrface.losses.divergence import jensen_shannon
from lrface.losses.quality import quality_loss

__all__ = ["jensen_shannon", "quality_loss"]
