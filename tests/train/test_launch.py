"""The launcher and where a process finds its place; ranks here are small Python programs without PyTorch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrface.errors import UsageError
from lrface.train.launch import (
    Place,
    check_batch,
    expected_ranks,
    find_place,
    first_host,
    launch,
    wanted,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008],login",
    "SLURM_JOB_ID": "123456",
}


def test_the_place_that_torchrun_gives():
    place = find_place(TORCHRUN)
    assert place == Place(5, 8, 1, 4, "node0", 29500)
    told: dict[str, str] = {}
    place.export(told)
    assert told == TORCHRUN


def test_the_place_that_srun_gives():
    assert find_place(SRUN) == Place(9, 16, 1, 8, "gpu007", 20000 + 123456 % 20000)
    assert find_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}) == Place(
        9, 16, 1, 8, "10.0.0.1", 7
    )


def test_a_batch_script_of_slurm_is_no_step_of_it():
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}) is None
    assert find_place({}) is None


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("rack2-[7,9]-ib", "rack2-7-ib"),
    ],
)
def test_the_first_machine_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_what_is_wrong_in_the_environment_is_named():
    with pytest.raises(UsageError, match="LOCAL_RANK must be a number.*'x'"):
        find_place({**TORCHRUN, "LOCAL_RANK": "x"})
    with pytest.raises(UsageError, match="MASTER_ADDR is not"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match="16 tasks on 3 nodes"):
        find_place({**SRUN, "SLURM_STEP_NUM_NODES": "3"})


def test_how_many_ranks_there_are():
    assert expected_ranks(1, 1, None) == 1
    assert expected_ranks(4, 2, None) == 8
    assert expected_ranks(1, 1, find_place(TORCHRUN)) == 8
    assert expected_ranks(4, 2, find_place(TORCHRUN)) == 8
    with pytest.raises(UsageError, match="ask for 4 ranks, but the launcher started 8"):
        expected_ranks(4, 1, find_place(TORCHRUN))
    with pytest.raises(UsageError, match="trainer.devices must be at least 1; found 0"):
        expected_ranks(0, 1, None)


def test_who_starts_the_ranks(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert wanted(2, 1) and not wanted(1, 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert not wanted(8, 1)


def test_a_batch_that_ranks_cannot_share_is_refused():
    check_batch(64, 4)
    with pytest.raises(UsageError, match="data.batch_size=30 is the batch of all 4 ranks.*take 28 or 32"):
        check_batch(30, 4)
    with pytest.raises(UsageError, match="take 4$"):
        check_batch(2, 4)


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr("lrface.train.launch.GRACE", 2.0)


def run(program: str, devices: int = 2, environ: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code of the launcher and what it said, for ranks that run ``program``."""
    said: list[str] = []
    code = launch([sys.executable, "-c", program], devices, 1, said.append, {**os.environ, **(environ or {})})
    return code, "\n".join(said)


def test_every_rank_learns_its_place(tmp_path):
    program = (
        "import os, pathlib; "
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(' '.join(os.environ[name] for name in "
        "('WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'OMP_NUM_THREADS')))"
    )
    assert run(program, 3, {"OMP_NUM_THREADS": "5"}) == (0, "")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        str(rank): f"3 {rank} 3 127.0.0.1 5" for rank in range(3)
    }


def test_a_rank_that_is_killed_ends_the_others():
    program = "import os, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(1000)"
    began = time.monotonic()
    code, said = run(program)
    assert code == 1 and time.monotonic() - began < 60
    assert "rank 1 of 2" in said and "killed by SIGKILL, as the system does when memory runs out" in said
    assert "the same command goes on from the last checkpoint" in said


def test_the_message_of_the_rank_that_failed_first_is_shown():
    # Rank 0 only loses contact; rank 1 says what was wrong.
    program = (
        "import os, sys, time; first = os.environ['RANK'] == '0'\n"
        "first and time.sleep(0.5)\n"
        "print('error: contact lost' if first else 'error: the disk of rank 1 is full', file=sys.stderr)\n"
        "sys.exit(3 if first else 1)"
    )
    code, said = run(program)
    assert code == 1 and said.startswith("error: the disk of rank 1 is full\nerror: rank 1 of 2")
    assert "exit code 1, its message is above" in said


def test_a_rank_that_stands_still_is_named():
    program = "import os, sys, time; os.environ['RANK'] == '1' and time.sleep(1000); sys.exit(3)"
    code, said = run(program)
    assert code == 1
    assert "rank 1 of 2" in said and "gave no answer and was killed" in said


def test_wrong_usage_stays_wrong_usage():
    assert run("import sys; sys.exit(2)") == (2, "")


def test_several_machines_need_to_be_told_who_they_are():
    with pytest.raises(UsageError, match="NODE_RANK=0 to 3, MASTER_ADDR"):
        launch([sys.executable, "-c", ""], 2, 4, print, {})


SIGNALLED = """
import sys
from lrface.train.launch import launch
program = '''
import os, pathlib, signal, sys, time
def stop(number, frame):
    pathlib.Path(sys.argv[1], "got" + os.environ["RANK"]).write_text(str(number))
    os.environ["RANK"] in sys.argv[3:] and os.abort()
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1], "ready" + os.environ["RANK"]).touch()
time.sleep(1000)
'''
sys.exit(launch([sys.executable, "-c", program, *sys.argv[1:]], 2, 1, print))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_reach_every_rank_once(tmp_path: Path, number, code):
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED, str(tmp_path), str(code)])
    wait_for(tmp_path, "ready0", "ready1")
    process.send_signal(number)
    assert process.wait(60) == code
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


@pytest.mark.parametrize(("aborting", "code"), [("1", 0), ("0", 1)])
def test_once_rank_0_has_stopped_well_another_may_abort(tmp_path: Path, aborting, code):
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path), "0", aborting]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_for(tmp_path, "ready0", "ready1")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == code
    assert ("rank 0 of 2" in said and "killed by SIGABRT" in said) if code else not said


def test_an_abort_is_shown_with_what_it_said():
    program = "import os; os.environ['RANK'] == '1' and (os.write(2, b'terminate called'), os.abort())"
    code, said = run(program)
    assert (
        code == 1 and said.startswith("terminate called\nerror: rank 1 of 2") and "killed by SIGABRT" in said
    )


def test_ranks_end_with_a_launcher_that_was_killed(tmp_path: Path):
    program = f"""
import os, pathlib, sys, time
from lrface.train.launch import end_with_launcher
end_with_launcher()
pathlib.Path({str(tmp_path)!r}, "ready" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(1000)
"""
    outer = f"import sys; from lrface.train.launch import launch; launch([sys.executable, '-c', {program!r}], 2, 1, print)"
    process = subprocess.Popen([sys.executable, "-c", outer])
    wait_for(tmp_path, "ready0", "ready1")
    time.sleep(0.2)  # what is written is there whole
    numbers = [int((tmp_path / f"ready{rank}").read_text()) for rank in (0, 1)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{number}").exists() and running(number) for number in numbers):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.1)


def running(number: int) -> bool:
    """Whether the process is more than an entry that nobody has waited for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 120
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear"
        time.sleep(0.05)
