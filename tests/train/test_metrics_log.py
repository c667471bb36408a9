import csv
import errno
from pathlib import Path

import pytest

from lrface.errors import LrfaceError
from lrface.train.log import MetricsLog


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder: Path, first: int, last: int, columns: tuple[str, ...] = ("loss", "speed")) -> None:
    log = MetricsLog(folder, first, tensorboard=False)
    for step in range(first, last):
        log.write(step, {column: step + 0.1 for column in columns})
    log.close()


def test_floats_read_back_exactly(tmp_path):
    log = MetricsLog(tmp_path / "stage", 0, tensorboard=False)
    values = [1 / 3, 1e-17, 123456789.123456789, 0.1 + 0.2]
    for step, value in enumerate(values):
        log.write(step, {"loss": value})
    log.close()
    assert [float(row["loss"]) for row in rows(tmp_path / "stage")] == values
    assert (tmp_path / "stage" / "metrics.csv").read_text().startswith("step,loss\n0,")


def test_every_row_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.write(0, {"loss": 1.0})
    assert len(rows(tmp_path)) == 1
    log.write(1, {"loss": 1.0})
    assert len(rows(tmp_path)) == 2
    log.close()


def test_a_resume_drops_what_is_repeated(tmp_path):
    write(tmp_path, 0, 10)
    before = rows(tmp_path)
    write(tmp_path, 6, 8)
    assert rows(tmp_path) == before[:8]


@pytest.mark.parametrize("cut", ["7,7.", "7", "7,", "", "7,7.1,", "seven,1,2\n"])
def test_a_line_that_a_kill_cut_in_half_is_repaired(tmp_path, cut):
    write(tmp_path, 0, 7)
    expected = rows(tmp_path)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(cut)
    write(tmp_path, 7, 9)
    assert rows(tmp_path)[:7] == expected
    assert [row["step"] for row in rows(tmp_path)] == [str(step) for step in range(9)]


@pytest.mark.parametrize(
    "cut", ["", "st", "step,lo", "step,loss,speed", "step,loss,speed\n", "step,loss,speed\n0,1"]
)
def test_a_header_that_a_kill_cut_in_half_is_repaired(tmp_path, cut):
    (tmp_path / "metrics.csv").write_text(cut)
    write(tmp_path, 0, 3)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]
    assert list(rows(tmp_path)[0]) == ["step", "loss", "speed"]


def test_a_stage_that_starts_anew_may_have_other_columns(tmp_path):
    write(tmp_path, 0, 3)
    write(tmp_path, 0, 2, ("loss", "quality", "speed"))
    assert list(rows(tmp_path)[0]) == ["step", "loss", "quality", "speed"] and len(rows(tmp_path)) == 2


def test_a_full_disk_is_named(tmp_path):
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log._file.close()
    log._file = Full()
    with pytest.raises(LrfaceError, match="cannot write .*metrics.csv: the disk is full"):
        log.write(0, {"loss": 1.0})
    log.close()


def test_tensorboard_gets_the_same_values(tmp_path):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path, 0)
    log.write(0, {"loss": 0.5})
    log.write(1, {"loss": 0.25})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.5), (1, 0.25)]


def test_two_logs_in_a_folder_do_not_drop_each_others_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # A stage is validated after step 4, resumes there, and its own rows from 4 on are done again.
    for first, steps in ((0, (3, 4)), (4, (4,))):
        metrics, validation = MetricsLog(tmp_path, first), MetricsLog(tmp_path, first + 1, name="validation")
        for step in steps:
            metrics.write(step, {"loss": 0.5 + first})
        if first == 0:
            validation.write(4, {"accuracy_mean": 60.0})
        metrics.close()
        validation.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n3,0.5\n4,4.5\n"
    assert (tmp_path / "validation.csv").read_text() == "step,accuracy_mean\n4,60.0\n"
    for folder, tag, expected in (
        ("tensorboard", "loss", [(3, 0.5), (4, 4.5)]),
        ("tensorboard/validation", "accuracy_mean", [(4, 60.0)]),
    ):
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
