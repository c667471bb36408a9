"""The model inside the wheel, for whoever names none. README.md beside this file is its card."""

from pathlib import Path

NAME = "shipped"
"""What it is called where a model is named."""

FOLDER = Path(__file__).parent


def shipped_or(path: str | Path) -> Path:
    """``path``, or the folder of the shipped model for :data:`NAME` where no file has that name."""
    found = Path(path).expanduser()
    return FOLDER if str(path) == NAME and not found.exists() else found
