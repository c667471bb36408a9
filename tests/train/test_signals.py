import os
import signal

import pytest

from lrface.train.signals import Interrupted, Signals, preemptible


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_outside_of_training_a_scheduler_stops_a_run_at_once(number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, preemptible():
        try:
            os.kill(os.getpid(), number)
        except Exception:  # what code on the way does with failures of its own
            pytest.fail("a request to stop is no failure that may be handled")
    assert (caught.value.signal, caught.value.step, caught.value.checkpoint) == (number, None, None)
    assert caught.value.exit_code == 0
    assert str(caught.value) == "stopped between training steps; the same command goes on from there"
    assert signal.getsignal(number) is before


def test_in_training_the_step_is_finished_first():
    outer = signal.getsignal(signal.SIGTERM)
    with preemptible():
        around = signal.getsignal(signal.SIGTERM)
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is around
    assert signal.getsignal(signal.SIGTERM) is outer


def test_ctrl_c_is_no_pre_emption(tmp_path):
    stopped = Interrupted(signal.SIGINT, 7, tmp_path)
    assert stopped.exit_code == 130
    assert str(stopped) == f"stopped after step 7, saved {tmp_path}; the same command goes on from there"
