import numpy as np
import pytest

from lrface.benchmarks.published_ada import (
    NAMES,
    TABLE_1,
    TABLE_1_CORRUPTIONS,
    TABLE_2,
    TABLE_2_COLUMNS,
    TABLE_3,
    TABLE_3_CORRUPTIONS,
    TABLE_3_NAMES,
)
from lrface.degrade.corruptions import CORRUPTIONS


def test_rows_have_a_number_for_each_column():
    assert TABLE_3_CORRUPTIONS == CORRUPTIONS and set(TABLE_1) == set(TABLE_2) == set(NAMES)
    assert all(len(row) == len(TABLE_1_CORRUPTIONS) for _, row in TABLE_1.values())
    assert all(len(row) == len(TABLE_2_COLUMNS) for row in TABLE_2.values())
    assert set(TABLE_3) == set(TABLE_3_NAMES)


@pytest.mark.parametrize("key", TABLE_3)
def test_the_paper_s_mce_is_the_mean_of_its_errors(key):
    """Errors are printed with one decimal."""
    _, mce, errors = TABLE_3[key]
    assert float(np.mean(errors)) == pytest.approx(mce, abs=0.06)


@pytest.mark.parametrize("key", ["ada", "ada_deepaugment10_augmix"])
def test_table_1_s_numbers_are_the_first_twelve_of_table_3_s(key):
    mce, errors = TABLE_1[key]
    assert mce == TABLE_3[key][1]
    assert np.abs(np.array(errors) - TABLE_3[key][2][:12]).max() < 0.7


@pytest.mark.parametrize("key", TABLE_1)
def test_the_three_missing_errors_are_possible(key):
    mce, errors = TABLE_1[key]
    missing = (15 * mce - sum(errors)) / 3
    assert 4 < missing < 30
