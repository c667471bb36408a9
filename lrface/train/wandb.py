"""Weights & Biases beside the CSV, for those who use it: one run for each stage."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from lrface.errors import LrfaceError, UsageError
from lrface.files import read_json, write_json
from lrface.methods.base import Method
from lrface.train.observe import Observer

MODES = ("online", "offline")


@dataclass(frozen=True)
class WandbSettings:
    """project: of Weights & Biases. mode: "online", or "offline", which writes below the stage's folder for `wandb sync`.

    Raises:
        UsageError: another mode or an empty project.
    """

    project: str = "lrface"
    mode: str = "online"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"trainer.wandb.mode must be online or offline; found {self.mode!r}")
        if not self.project or "/" in self.project:
            raise UsageError(f"trainer.wandb.project must be a name without '/'; found {self.project!r}")


def import_wandb() -> Any:
    """Raises LrfaceError naming the extra where the package is missing."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise LrfaceError(
            f"trainer.wandb needs the package wandb ({error}): pip install 'lrface[wandb]', or set trainer.wandb=null"
        ) from error


class WandbLog(Observer):
    """Sends rows of the log and validations to Weights & Biases. A stage that is resumed goes on as the same run.

    Args:
        settings: project and mode.
        name: of the run; ``group``: what the runs of one recipe share.
        config: the resolved recipe, plain values.

    Raises:
        LrfaceError: the package is missing.
    """

    def __init__(self, settings: WandbSettings, name: str, group: str, config: dict[str, Any]):
        self.settings = settings
        self.name = name
        self.group = group
        self.config = config
        self._package = import_wandb()
        self._run: Any = None

    def begin(self, step: int, method: Method, folder: Path) -> None:
        known = folder / "wandb.json"
        if not known.is_file():
            write_json(known, {"id": token_hex(8)})
        try:
            self._run = self._package.init(
                project=self.settings.project,
                mode=self.settings.mode,
                dir=str(folder),
                name=self.name,
                group=self.group,
                id=read_json(known, "the stage's number at Weights & Biases").get("id"),
                resume="allow",
                config=self.config,
                settings=self._package.Settings(silent=True),
            )
        except (self._package.Error, OSError) as error:
            raise LrfaceError(
                f"Weights & Biases cannot start ({error}); set trainer.wandb.mode=offline or trainer.wandb=null"
            ) from error
        # Rows of the log and validations each count steps in their own way, and a resume goes back a little.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def logged(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def validated(self, step: int, values: dict[str, float]) -> None:
        """A listener of :class:`lrface.train.validate.Validation`."""
        self._run.log({"step": step, **{f"validation/{key}": value for key, value in values.items()}})

    def end(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
