import re

import numpy as np
import pytest
import torch

from lrface.benchmarks.page import (
    ReportModel,
    error_against_refusal,
    short_names,
    verification_page,
    worst_errors,
)
from lrface.benchmarks.verification import VerificationSet, evaluate_verification
from lrface.data.synthetic import SyntheticFaces, verification_pairs
from lrface.errors import LrfaceError

WEIGHT = torch.randn(3 * 14 * 14, 24, generator=torch.Generator().manual_seed(0))


def embed(images):
    small = torch.nn.functional.interpolate(images, (14, 14), mode="area") - 0.5
    return small.flatten(1) @ WEIGHT


@pytest.fixture(scope="module")
def evaluation():
    faces = SyntheticFaces(20, 4)
    left, right, same = verification_pairs(faces, 80)
    benchmark = VerificationSet.from_source(faces, left, right, same, "drawn <faces>")
    return evaluate_verification(embed, benchmark, (112, 28, 14), matrix=True, progress=False)


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
    model = ReportModel(
        "runs/" + "a_long_folder_name/" * 8 + "model",
        "ab" * 32,
        {"input": {"colour": "RGB", "size": 112}},
        {"flip": True},
    )
    rows = [{"model": model.name, **row} for row in evaluation.rows]
    text = verification_page(
        {(model.name, "drawn <faces>"): evaluation}, [model], rows, {model.name: {"drawn <faces>": 77.7}}
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_page_holds_everything_and_asks_for_nothing(page, evaluation):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text and "@import" not in text
    assert "drawn &lt;faces&gt;" in text and "drawn <faces>" not in text
    for row in evaluation.rows:
        assert f"<b>{row['accuracy']:.2f}</b>" in text
    assert "77.70 %" in text and "ab" * 32 in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers)), "two figures share an identifier"
    with pytest.raises(LrfaceError, match="at least one result"):
        verification_page({}, [], [], {})


def test_the_worst_errors_are_the_worst(evaluation):
    found = worst_errors(evaluation, 7)
    assert 0 < len(found) <= 7
    for index in {row for row, _, _ in found}:
        margin = np.abs(evaluation.scores[index] - evaluation.rows[index]["threshold"])
        wrong = ~evaluation.right[index]
        shown = [pair for row, pair, _ in found if row == index]
        assert wrong[shown].all()
        left_out = np.setdiff1d(np.flatnonzero(wrong), shown)
        assert len(left_out) == 0 or margin[shown].min() >= margin[left_out].max()


def test_error_against_refusal_by_hand():
    shares, errors = error_against_refusal(
        np.array([True, False, False, True]), np.array([0.1, 0.5, 0.5, 0.9]), 0.9
    )
    np.testing.assert_allclose(shares, [0, 0.25, 0.75])
    np.testing.assert_allclose(errors, [0.5, 1 / 3, 1.0])


def test_names_are_short_where_that_is_clear():
    assert short_names(["a/naive", "b/qualnet"]) == {"a/naive": "naive", "b/qualnet": "qualnet"}
    assert short_names(["a/naive", "b/naive"]) == {"a/naive": "a/naive", "b/naive": "b/naive"}


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(page, width, browser):
    with browser(page, width, figures=8) as driver:
        assert driver.execute_script(
            "return [...document.images].length > 0 && [...document.images].every(i => i.complete && i.naturalWidth > 0)"
        )
