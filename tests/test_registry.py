from functools import partial

import pytest

from lrface.errors import UsageError
from lrface.registry import Registry, nearest


def make(size: int, share: float = 0.5, label: str = "x", flag: bool = False, extra: object = None) -> tuple:
    return size, share, label, flag, extra


@pytest.fixture
def things() -> Registry:
    registry: Registry = Registry("thing")
    registry.register("plain", make)
    registry.register("large", partial(make, size=100))
    return registry


def test_builds_by_name(things):
    assert things.names() == ["large", "plain"]
    assert things.build("plain", size=3) == (3, 0.5, "x", False, None)
    assert things.build("large", share=0.25) == (100, 0.25, "x", False, None)


def test_a_name_is_registered_once(things):
    with pytest.raises(ValueError, match="thing 'plain' is registered twice"):
        things.register("plain", make)


def test_an_unknown_name_gets_the_nearest(things):
    with pytest.raises(
        UsageError, match=r"unknown thing 'plane' \(did you mean 'plain'\?\); known: large, plain"
    ):
        things.build("plane")


def test_an_unknown_argument_gets_the_nearest(things):
    with pytest.raises(
        UsageError, match=r"unknown key thing.shares for thing 'plain' \(did you mean 'share'\?\)"
    ):
        things.build("plain", size=1, shares=0.1)
    with pytest.raises(UsageError, match="unknown key thing.size for thing 'large'"):
        things.build("large", size=3)  # what the name fixes cannot be given


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size": "3"}, "thing.size must be of type int; found '3'"),
        ({"size": 3.5}, "thing.size must be of type int; found 3.5"),
        ({"size": True}, "thing.size must be of type int; found True"),
        ({"size": 3, "share": "half"}, "thing.share must be of type float; found 'half'"),
        ({"size": 3, "share": False}, "thing.share must be of type float; found False"),
        ({"size": 3, "flag": "yes"}, "thing.flag must be of type bool; found 'yes'"),
        ({"size": 3, "label": None}, "thing.label must be of type str; found None"),
    ],
)
def test_a_plain_argument_of_another_type_is_named(things, arguments, message):
    with pytest.raises(UsageError, match=message):
        things.build("plain", **arguments)


def test_whole_numbers_and_exponents_are_floats(things):
    assert things.build("plain", size=1, share=1)[1] == 1.0
    assert things.build("plain", size=1, share="1e-3")[1] == 0.001  # how YAML 1.1 gives 1e-3
    assert things.build("plain", size=1, extra={"any": "thing"})[4] == {"any": "thing"}


def test_nothing_near_gives_no_hint():
    assert nearest("zzz", ["cosface", "arcface"]) == ""
    assert nearest("cosfac", ["cosface", "arcface"]) == " (did you mean 'cosface'?)"


def test_a_value_that_may_be_left_out_is_of_its_type_all_the_same():
    registry: Registry = Registry("thing")
    registry.register("weighed", lambda weight: weight)
    registry.register("typed", weighed)
    assert registry.build("typed") is None and registry.build("typed", weight=None) is None
    assert registry.build("typed", weight="1e-3") == 0.001 and registry.build("typed", weight=2) == 2.0
    with pytest.raises(UsageError, match="thing.weight must be of type float; found 'much'"):
        registry.build("typed", weight="much")
    assert registry.build("weighed", weight="much") == "much"  # which says no type


def weighed(weight: float | None = None) -> float | None:
    return weight
