"""Weights & Biases: offline where the package is installed, and a named refusal where it is not."""

import sys

import pytest

from lrface.errors import LrfaceError, UsageError
from lrface.files import read_json
from lrface.train.wandb import WandbLog, WandbSettings, import_wandb


def test_wrong_settings_are_named():
    with pytest.raises(UsageError, match="trainer.wandb.mode must be online or offline; found 'disabled'"):
        WandbSettings(mode="disabled")
    with pytest.raises(UsageError, match="trainer.wandb.project must be a name without '/'; found 'a/b'"):
        WandbSettings(project="a/b")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        LrfaceError, match=r"trainer.wandb needs the package wandb .*pip install 'lrface\[wandb\]'"
    ):
        import_wandb()
    with pytest.raises(LrfaceError, match="trainer.wandb=null"):
        WandbLog(WandbSettings(), "run", "group", {})


def test_a_stage_is_one_run_that_goes_on_after_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = WandbSettings(project="lrface-tests", mode="offline")
    for step in (0, 5):
        log = WandbLog(settings, "tiny/one", "tiny", {"seed": 1})
        log.begin(step, None, tmp_path)  # type: ignore[arg-type]
        log.logged(step, {"loss": 1.0 + step})
        log.validated(step + 2, {"accuracy_mean": 60.0 + step})
        log.end()
        log.end()  # a stage ends once more when a run fails
    number = read_json(tmp_path / "wandb.json", "")["id"]
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert 1 <= len(runs) <= 2 and all(run.name.endswith(number) for run in runs)
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*.wandb"))
    for text in (b"validation/accuracy_mean", b"loss", b"tiny/one", b"lrface-tests"):
        assert text in written
