import re

import numpy as np
import pytest

from lrface.benchmarks.identification import identify, open_set
from lrface.benchmarks.identification_page import identification_page, identification_text
from lrface.benchmarks.page import ReportModel
from lrface.errors import LrfaceError
from lrface.identification_run import cumulative_matches


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(0)
    people = rng.normal(size=(60, 16))
    probe_ids = rng.integers(0, 90, 200)  # a third of them are of nobody in the gallery
    probes = np.concatenate([people, rng.normal(size=(30, 16))])[probe_ids] + rng.normal(0, 0.7, (200, 16))
    return identify(probes, probe_ids, people, np.arange(60))


def row(**changes):
    return {
        "model": "a/<first>",
        "benchmark": "drawn",
        "protocol": "closed set",
        "metric": "cosine",
        "flip": True,
        "pooling": None,
        "probe_size": None,
        "rank": {"1": 61.239, "5": 90.0},
        "mean_average_precision": 70.1,
        "fnir_at_fpir": {"0.01": None, "0.1": 33.3333},
        "open_rank": 1,
        "open_mated": 133,
        "open_unmated": 67,
        "removed_share": None,
        "seed": None,
        "probes": 200,
        "mated": 133,
        "unmated": 67,
        "gallery": 60,
        "distractors": 12,
        "gallery_identities": 48,
        "gallery_images": 60,
        "probe_images": 200,
        "unaligned": 7,
        **changes,
    }


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    models = [
        ReportModel(name, "ab" * 32, {"input": {"size": 112}}, {"flip": True})
        for name in ("a/<first>", "b/x")
    ]
    rows = [row(), row(model="b/x", probe_size=28), row(probe_size=112)]
    matches = [cumulative_matches(found)] * 3
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(
        identification_page(rows, matches, [open_set(found)] * 3, models, ["7 <images> are missing"])
    )
    return path


def test_the_curve_of_matches_by_hand(found):
    curve = cumulative_matches(found, 60)
    first = found.first_mate[found.first_mate > 0]
    assert curve.tolist() == [np.mean(first <= k) for k in range(1, 61)]
    assert curve[0] == found.rank[1] and curve[-1] == 1.0


def test_the_text_says_what_was_compared():
    text = identification_text([row()], ["7 images are missing"])
    header, _, line, note, deviation = text.splitlines()
    assert header.split() == "benchmark protocol metric probes rank-1 rank-5 mAP FNIR@FPIR=0.1".split()
    assert line.split() == "drawn closed set cosine, flip native 61.24 90.00 70.10 33.33".split()
    assert (
        "200 probes (133 with a mate) against 60 in the gallery (48 people, 12 of them distractors)" in note
    )
    assert "7 images not aligned" in note and deviation == "not the official set: 7 images are missing"
    assert identification_text([]) == "no results"
    assert "a hit is a mate among the 20 best" in identification_text([row(open_rank=20)])
    assert identification_text([row(), row(model="other")]).splitlines()[0].startswith("model")


def test_the_page_holds_everything_and_asks_for_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text and "@import" not in text
    assert "&lt;first&gt;" in text and "<first>" not in text and "7 &lt;images&gt; are missing" in text
    assert "61.24" in text and "33.33" in text and "ab" * 32 in text and text.count("<svg") == 3
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers)), "two figures share an identifier"
    with pytest.raises(LrfaceError, match="at least one result"):
        identification_page([], [], [], [])


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(page, width, browser):
    with browser(page, width, figures=3):
        pass
