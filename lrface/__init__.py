"""Face recognition for faces of any resolution.

from lrface import load_embedder
embedder = load_embedder("runs/qualnet_lm")
vectors = embedder.embed(["a.jpg", "b.jpg"]).vectors
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrface.embed import FaceEmbedder, load_embedder

__version__ = "0.1.0"
__all__ = ["FaceEmbedder", "__version__", "load_embedder"]


def __getattr__(name: str) -> Any:
    # Only what is used is imported: PyTorch takes seconds, `import lrface` none.
    if name in ("FaceEmbedder", "load_embedder"):
        from lrface import embed

        return getattr(embed, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
