"""Losses: pure functions that know no trainer, configuration or rank."""

from lrface.losses.quality import quality_loss

__all__ = ["quality_loss"]
