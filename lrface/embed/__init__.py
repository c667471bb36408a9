"""From images to embeddings: one call for crops, photographs, videos, folders of them.

>>> from lrface import load_embedder
>>> embedder = load_embedder("model.onnx")  # or the run directory of `lrface train`, model.safetensors, ...
>>> found = embedder.embed(["anna.png", "group.jpg"], faces="all")
>>> found.vectors.shape[1] == embedder.embedding_size, found.source.tolist()
(True, [0, 1, 1, 1, 1, 1, 1])

A vector comes with ``box``, ``landmarks`` and ``score`` of the face in its photograph, ``quality``, and
``effective_resolution``: a crop of 112 pixels that was enlarged from 20 says about 20.

>>> embedder.compare("anna.png", "anna.png").verdict
True

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
from lrface.embed.paths import EmbedSummary, are_videos, embed_paths, embed_videos, find_images
from lrface.embed.resolution import effective_resolutions
from lrface.embed.results import UNCALIBRATED_THRESHOLD, Comparison, Embeddings, similarity
from lrface.embed.video import Frame, is_video

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
    "Frame",
    "are_videos",
    "described_beside",
    "effective_resolutions",
    "embed_paths",
    "embed_videos",
    "find_images",
    "is_video",
    "load_embedder",
    "open_model",
    "parse_model",
    "similarity",
    "thresholds_file",
    "undescribed",
]
