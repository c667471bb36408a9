import os
import subprocess
import sys

import pytest

import lrface
from lrface.errors import LrfaceError
from lrface.files import read_json
from lrface.train.record import RECORD, SESSIONS_KEPT, environment, git_state, recorded
from lrface.train.signals import Interrupted

STAGES = [{"name": "one", "folder": "stages/1-one", "steps": 4}]


def record(folder):
    return read_json(folder / RECORD, "the record")


def test_a_run_is_recorded_from_start_to_end(tmp_path):
    with recorded(tmp_path, "tiny", STAGES, threads=7):
        during = record(tmp_path)
        assert during["sessions"][0]["state"] == "running" and during["sessions"][0]["ended"] is None
    found = record(tmp_path)
    (session,) = found["sessions"]
    assert (found["format"], found["version"], found["name"], found["stages"]) == (
        "lrface-run",
        1,
        "tiny",
        STAGES,
    )
    assert session["state"] == "finished" and session["started"] <= session["ended"]
    assert session["command"] == sys.argv and session["process"] == os.getpid()
    assert session["environment"]["lrface"] == lrface.__version__
    assert session["environment"]["threads"] == 7


@pytest.mark.parametrize(
    "error, state, text",
    [
        (LrfaceError("the disk is full"), "failed", "the disk is full"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), "interrupted", None),
        (Interrupted(15, 3, "x"), "interrupted", None),
    ],
)
def test_how_a_run_ended_is_recorded(tmp_path, error, state, text):
    with pytest.raises(type(error)), recorded(tmp_path, "tiny", STAGES):
        raise error
    (session,) = record(tmp_path)["sessions"]
    assert session["state"] == state and session.get("error") == text and session["ended"]


def test_each_call_adds_an_entry_and_a_broken_record_stops_nothing(tmp_path):
    for _ in range(3):
        with recorded(tmp_path, "tiny", STAGES):
            pass
    assert len(record(tmp_path)["sessions"]) == 3
    (tmp_path / RECORD).write_text("{half")
    with recorded(tmp_path, "tiny", STAGES):
        pass
    assert len(record(tmp_path)["sessions"]) == 1
    (tmp_path / RECORD).write_text('{"sessions": [' + ", ".join(["{}"] * 500) + "]}")
    with recorded(tmp_path, "tiny", STAGES):
        pass
    assert len(record(tmp_path)["sessions"]) == SESSIONS_KEPT


def test_the_environment_says_what_results_depend_on():
    found = environment()
    assert {"lrface", "python", "torch", "system", "cpu", "cpu_cores", "threads", "gpus", "cuda"} == set(
        found
    )
    assert found["python"].startswith("3.") and found["threads"] >= 1 and found["cpu"]


def test_git_state(tmp_path):
    package = tmp_path / "checkout" / "lrface"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_state(package) is None

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(package), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert git_state(package) is None  # inside of a checkout, but no part of it
    git("add", "__init__.py")
    git("commit", "-q", "-m", "first")
    assert git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (package / "notes.txt").write_text("not known to git")
    assert git_state(package)["dirty"] is False
    (package / "__init__.py").write_text("changed = True")
    assert git_state(package)["dirty"] is True
