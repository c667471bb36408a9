"""Training logs: a CSV that survives kills and resumes without doubled rows, and TensorBoard beside it."""

import csv
import io
from pathlib import Path
from typing import Any

from lrface.files import explain, write_text


class MetricsLog:
    """``metrics.csv`` (and TensorBoard events) of one stage.

    Args:
        folder: where ``metrics.csv`` and ``tensorboard/`` go.
        first_step: rows at or after this step are dropped: they belong to work that is about to be repeated.
        tensorboard: also write TensorBoard events.
        name: of the CSV; a log of another name has its events in a folder of that name below ``tensorboard/``,
            where dropping the steps of the one log leaves those of the other.
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool = True, name: str = "metrics"):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.csv"
        self._fields: list[str] | None = None
        if self.path.exists():
            self._keep_before(first_step)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = folder / "tensorboard" / ("" if name == "metrics" else name)
            self._writer = SummaryWriter(str(events), purge_step=first_step)
        # Unbuffered: a row is one write, and after a full disk closing does not fail once more.
        self._file = self.path.open("ab", buffering=0)

    def _keep_before(self, first_step: int) -> None:
        kept: list[dict[str, str]] = []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self._fields = list(reader.fieldnames or []) or None
            for row in reader:
                # A kill can leave half a last line: its step may be cut, but then its last field is missing.
                step = row.get("step") or ""
                if None in row.values() or not step.isdigit() or int(step) >= first_step:
                    break
                kept.append(row)
        if not kept:  # the header too may be cut, or of another method: it is written anew with the first row
            self._fields = None
            write_text(self.path, "")
            return
        assert self._fields is not None
        text = io.StringIO()
        writer = csv.DictWriter(text, self._fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_text(self.path, text.getvalue())

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row; floats are written so that they read back exactly."""
        row = {"step": step, **{key: repr(float(value)) for key, value in values.items()}}
        text = io.StringIO()
        if self._fields is None:
            self._fields = list(row)
            text.write(",".join(self._fields) + "\n")
        csv.DictWriter(text, self._fields, lineterminator="\n").writerow(row)
        try:
            self._file.write(text.getvalue().encode())
            if self._writer is not None:
                for key, value in values.items():
                    self._writer.add_scalar(key, value, step)
        except OSError as error:
            raise explain(error, self.path) from error

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
