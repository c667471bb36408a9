"""Losses: pure functions and small modules that know no trainer, configuration or rank."""

from lrface.losses.divergence import jensen_shannon
from lrface.losses.quality import QUALITY, QualityLoss, build_quality, quality_loss

__all__ = ["QUALITY", "QualityLoss", "build_quality", "jensen_shannon", "quality_loss"]
