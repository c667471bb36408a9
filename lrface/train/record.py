"""What a run folder says about how it came about: ``run.json``, one entry for each call that worked on it."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import lrface
from lrface.errors import LrfaceError
from lrface.files import read_json, write_json
from lrface.train.signals import Interrupted

RECORD = "run.json"
SESSIONS_KEPT = 100


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions and hardware that a result can depend on; ``threads`` as the recipe sets them, None for PyTorch's."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "lrface": lrface.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "cpu": processor,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that ``folder`` is a part of, and whether files git knows differ from it; else None.

    A folder that only lies inside of somebody else's checkout (a virtual environment in a repository) is no part of it.
    """

    def git(*arguments: str) -> str:
        # Optional locks are not taken: another git command may be at work in the checkout.
        result = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def lrface_commit() -> str:
    """The commit of lrface itself, abbreviated, as result files name it; "unknown" where it is no checkout."""
    state = git_state(Path(lrface.__file__).parent)
    return "unknown" if state is None else str(state["commit"])[:7]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def recorded(
    out: Path, name: str, stages: Sequence[dict[str, Any]], threads: int | None = None
) -> Iterator[None]:
    """Write ``out/run.json`` now and again when the block ends, however it ends but for a kill.

    Args:
        out: the run's folder, locked.
        name: of the recipe.
        stages: ``{"name", "folder", "steps"}`` of each.
        threads: see :func:`environment`.
    """
    path = out / RECORD
    sessions: list[dict[str, Any]] = []
    if path.exists():
        with suppress(LrfaceError):  # a broken record is no reason not to train
            known = read_json(path, "the record of the run").get("sessions")
            sessions = (
                [entry for entry in known if isinstance(entry, dict)] if isinstance(known, list) else []
            )
    session: dict[str, Any] = {
        "command": sys.argv,
        "folder": os.getcwd(),
        "started": _now(),
        "ended": None,
        "state": "running",
        "process": os.getpid(),
        "environment": environment(threads),
        "git": git_state(Path(lrface.__file__).parent),
    }
    record = {
        "format": "lrface-run",
        "version": 1,
        "name": name,
        "stages": list(stages),
        "sessions": [*sessions[1 - SESSIONS_KEPT :], session],
    }
    write_json(path, record)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        session |= {"ended": _now(), "state": "interrupted" if stopped else "failed"}
        if not stopped:
            session["error"] = (
                f"{error}" if isinstance(error, LrfaceError) else f"{type(error).__name__}: {error}"
            )
        with suppress(LrfaceError):  # what ended the run is what the user is told
            write_json(path, record)
        raise
    session |= {"ended": _now(), "state": "finished"}
    write_json(path, record)
