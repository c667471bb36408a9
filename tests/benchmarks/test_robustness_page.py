import re

import numpy as np
import pytest

from lrface.benchmarks.page import ReportModel
from lrface.benchmarks.robustness import BENCHMARKS, Judged, robustness_figures
from lrface.benchmarks.robustness_page import robustness_page, robustness_text
from lrface.degrade.corruptions import CORRUPTIONS, HELD_OUT
from lrface.errors import LrfaceError

MODELS = ("runs/" + "a_long_folder_name/" * 8 + "clean", "torchvision:resnet50@weights=<w>.pth")


def figures(seed):
    rng = np.random.default_rng(seed)
    right = {
        (name, severity): (rng.random(60) > 0.1 * severity).astype(np.uint8)
        for name in (*CORRUPTIONS, *HELD_OUT)
        for severity in range(1, 6)
    }
    clean = (rng.random(60) > 0.1).astype(np.uint8)
    judged = Judged(right, right, clean, clean)
    return robustness_figures(judged, BENCHMARKS["imagenet_c"], alexnet=True, samples=50)


@pytest.fixture(scope="module")
def shown():
    about = {
        "benchmark": "imagenet_c",
        "title": "ImageNet-C",
        "made": "on the fly",
        "origin": "clean <images>",
        "seed": 0,
        "severities": [1, 2, 3, 4, 5],
        "images": 60,
        "classes": 1000,
        "predictions_among": "all classes of the model",
        "subset": None,
        "notes": ["A note & more."],
        "broken": [["a/<b>.JPEG", "it is empty"]],
    }
    results = [
        {"model": model, "model_sha256": "ab" * 32, **figures(seed)} for seed, model in enumerate(MODELS)
    ]
    models = [
        ReportModel(model, "ab" * 32, {"input": {"colour": "RGB"}}, {"outputs": 1000}) for model in MODELS
    ]
    return about, results, models


@pytest.fixture(scope="module")
def page(shown, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(robustness_page(*shown), encoding="utf-8")
    return path


def test_the_page_holds_everything_and_asks_for_nothing(page, shown):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "<script" not in text and "@import" not in text
    assert "clean &lt;images&gt;" in text and "a/&lt;b&gt;.JPEG" in text and "A note &amp; more." in text
    for result in shown[1]:
        for row in result["corruptions"]:
            assert all(f">{value:.1f}</td>" in text for value in row["errors"])
            assert f">{row['error']:.2f}</td>" in text
        assert f">{result['mce']:.2f}</td>" in text and f">{result['relative_mce']:.2f}</td>" in text
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))
    with pytest.raises(LrfaceError, match="at least one result"):
        robustness_page(shown[0], [], [])


def test_the_text_has_the_same_figures(shown):
    text = robustness_text(*shown[:2])
    for result in shown[1]:
        assert f"{result['mce']:.2f}" in text and f"{result['mean_error']:.2f}" in text
    assert "speckle noise (held out)" in text and "a/<b>.JPEG: it is empty" in text


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page(page, width, browser):
    with browser(page, width, figures=6) as driver:
        assert driver.execute_script("return document.querySelectorAll('.heat td').length") == 2 * 19 * 5
