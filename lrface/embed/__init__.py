"""From images to embeddings: one call for crops and photographs, one for folders of them.

    from lrface import load_embedder
    embedder = load_embedder("runs/qualnet_lm")            # or model.onnx, model.safetensors
    found = embedder.embed(["anna.jpg", "group.jpg"], faces="all")
    found.vectors, found.source, found.effective_resolution

A network takes RGB float in [0, 1] and gives raw features; :class:`FaceEmbedder` puts decoding, detection,
alignment and batching before it and scaling to unit length behind it.
"""

from lrface.embed.embedder import KINDS, FaceEmbedder
from lrface.embed.loading import (
    PRECISIONS,
    QUALITIES,
    load_embedder,
    open_model,
    parse_model,
    undescribed,
)
from lrface.embed.networks import CARD_KEY, INPUT_SIZE, described_beside, thresholds_file
from lrface.embed.paths import EmbedSummary, embed_paths, find_images
from lrface.embed.results import UNCALIBRATED_THRESHOLD, Comparison, Embeddings, similarity

__all__ = [
    "CARD_KEY",
    "INPUT_SIZE",
    "KINDS",
    "PRECISIONS",
    "QUALITIES",
    "UNCALIBRATED_THRESHOLD",
    "Comparison",
    "EmbedSummary",
    "Embeddings",
    "FaceEmbedder",
    "described_beside",
    "embed_paths",
    "find_images",
    "load_embedder",
    "open_model",
    "parse_model",
    "similarity",
    "thresholds_file",
    "undescribed",
]
