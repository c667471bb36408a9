import math

import pytest

from lrface.errors import UsageError
from lrface.train.schedule import Schedule


def test_multistep_falls_at_each_milestone():
    schedule = Schedule("multistep", (18_000, 28_000, 36_000, 44_000), 0.1)
    factors = [
        schedule.factor(step, 47_000) for step in (0, 17_999, 18_000, 27_999, 28_000, 36_000, 44_000, 46_999)
    ]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001])


def test_cosine_falls_from_one_to_final():
    schedule = Schedule("cosine", final=0.1)
    for step in (0, 1, 25, 50, 99):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2
        assert schedule.factor(step, 100) == pytest.approx(expected)
    assert schedule.factor(0, 100) == 1.0 and schedule.factor(50, 100) == pytest.approx(0.55)
    assert schedule.factor(100, 100) == pytest.approx(0.1)


def test_constant():
    assert {Schedule("constant").factor(step, 10) for step in range(10)} == {1.0}


@pytest.mark.parametrize("kind", ["multistep", "cosine", "constant"])
def test_warmup_rises_linearly_to_one(kind):
    schedule = Schedule(kind, warmup_steps=4)
    assert [schedule.factor(step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.factor(4, 20) == 1.0


def test_cosine_begins_after_the_warmup():
    schedule = Schedule("cosine", warmup_steps=20)
    assert schedule.factor(60, 100) == pytest.approx(0.5)
    assert Schedule("cosine", warmup_steps=10).factor(9, 10) == 1.0  # warmup alone


def test_poly_falls_as_a_power_of_what_is_left():
    schedule = Schedule("poly", power=2.0, warmup_steps=2)
    assert [schedule.factor(step, 12) for step in (0, 1, 2, 7, 11)] == pytest.approx([0.5, 1, 1, 0.25, 0.01])
    assert schedule.factor(12, 12) == 0.0
    line = Schedule("poly", power=1.0, final=0.2)
    assert [line.factor(step, 4) for step in range(5)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_epochs_become_steps():
    schedule = Schedule("multistep", gamma=0.5, milestone_epochs=(1, 2.5), warmup_epochs=0.25).in_steps(8)
    assert [schedule.factor(step, 24) for step in (0, 1, 7, 8, 19, 20)] == [0.5, 1, 1, 0.5, 0.5, 0.25]
    assert schedule == Schedule("multistep", [8, 20], 0.5, warmup_steps=2)
    given = Schedule("multistep", (3, 5), warmup_steps=2)
    assert given.in_steps(100).milestones == (3, 5) and given.in_steps(100).warmup_steps == 2
    with pytest.raises(UsageError, match="milestone_epochs and warmup_epochs need the length of an epoch"):
        Schedule(warmup_epochs=1.0).factor(0, 10)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "cosin"}, "schedule.kind must be one of multistep, cosine, poly, constant; found 'cosin'"),
        ({"milestones": (5, 3)}, r"schedule.milestones must rise; found \[5, 3\]"),
        ({"warmup_steps": -1}, "warmup_steps, warmup_epochs and final must be at least 0"),
        ({"gamma": 0.0}, "gamma above 0"),
        ({"final": -0.1}, "warmup_steps, warmup_epochs and final must be at least 0"),
        ({"milestone_epochs": (2.0, 1.0)}, r"schedule.milestone_epochs must rise; found \[2.0, 1.0\]"),
        ({"warmup_epochs": -1.0}, "warmup_epochs and final must be at least 0"),
        ({"power": 0.0}, "schedule.power must be above 0; found 0.0"),
        ({"milestones": (5,), "milestone_epochs": (1.0,)}, "give milestones or milestone_epochs, not both"),
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "give warmup_steps or warmup_epochs, not both"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        Schedule(**arguments)
