import json

import pytest
from PIL import Image

from lrface.benchmarks.report import (
    format_columns,
    matrix_tables,
    plot_results,
    results_json,
    results_table,
    verification_text,
    write_results,
)
from lrface.errors import LrfaceError, UsageError


def row(gallery: int, probe: int, accuracy: float, **changes) -> dict:
    return {
        "benchmark": "lfw",
        "gallery_size": gallery,
        "probe_size": probe,
        "gallery_losses": "",
        "probe_losses": "",
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.3, accuracy + 0.2],
        "accuracy_std": 0.351,
        "accuracy_insightface": accuracy,
        "auc": 0.99876,
        "eer": 1.25,
        "tar_at_far": {"1e-1": 99.9, "1e-3": None},
        "threshold": 0.3,
        "pairs": 6000,
        "images": 7701,
        "unaligned": 1,
        "folds": 10,
        "down": "nearest",
        "up": "bilinear",
        "flip": True,
    } | changes


ROWS = [row(112, 112, 99.4166), row(14, 14, 76.86), row(112, 14, 77.3)]


def test_the_table_shows_every_row_in_columns():
    lines = results_table(ROWS).splitlines()
    assert len(lines) == 6
    # no benchmark has the pairs for 1e-3
    assert lines[0].split() == "benchmark gallery x probe accuracy 95 % interval TAR@FAR=1e-1 EER AUC".split()
    assert "112 x 112  99.42 +- 0.35  99.12 to 99.62" in lines[2] and lines[2].endswith("99.90  1.25  0.9988")
    assert "112 x 14  77.30 +- 0.35  77.00 to 77.50" in lines[4]
    assert len({len(line) for line in lines[:5]}) == 1
    assert lines[5].startswith(
        "lfw: 6000 pairs of 7701 images, 10 folds, nearest down and bilinear up, with flip"
    )
    assert lines[5].endswith("1 image without a detected face")
    assert results_table([]) == "no results"


def test_the_table_has_a_column_for_models():
    lines = results_table(
        [row(112, 112, 99.0, model="naive"), row(112, 112, 99.4, model="qualnet")]
    ).splitlines()
    assert lines[0].startswith("model") and lines[2].startswith("naive ") and lines[3].startswith("qualnet ")


def test_matrix_areas_and_comparisons_are_written_out():
    rows = [row(g, p, 100.0 - (224 - g - p) / 10, model="a") for g in (112, 14) for p in (112, 14)]
    rows.append(row(112, 112, 80.0, model="a", gallery_losses="jpeg=5", probe_losses="jpeg=5"))
    compared = {
        "benchmark": "lfw",
        "gallery_size": 112,
        "probe_size": 14,
        "gallery_losses": "",
        "probe_losses": "jpeg=5",
        "first": "a",
        "second": "b",
        "difference": -1.25,
        "interval": [-2.0, -0.5],
        "p_value": 0.0004,
    }
    text = " ".join(verification_text(rows, {"a": {"lfw": 91.5}}, [compared]).split())
    assert "112 jpeg=5 x 112 jpeg=5 80.00" in text
    assert matrix_tables(rows).splitlines()[-2:] == ["112  100.00  90.20", "14    90.20  80.40"]
    assert "area under the accuracy-resolution curve, lfw: 91.50 %" in text
    assert "112 x 14 jpeg=5 -1.25 -2.00 to -0.50 0.0004" in text


def test_columns_are_aligned():
    assert format_columns(["a", "n"], [["long", "1"], ["b", "22"]]).splitlines() == [
        "a      n",
        "----  --",
        "long   1",
        "b     22",
    ]


def test_json_is_written_whole(tmp_path):
    path = write_results(tmp_path / "new/results.json", {"results": ROWS})
    assert json.loads(path.read_text())["results"] == ROWS
    assert [child.name for child in path.parent.iterdir()] == ["results.json"]


def test_json_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(LrfaceError, match=r"results\.results\[1\]\.accuracy is not a finite number"):
        write_results(tmp_path / "r.json", {"results": [ROWS[0], row(14, 14, float("nan"))]})
    assert list(tmp_path.iterdir()) == []
    assert json.loads(results_json({"results": []})) == {"results": []}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_of_several_curves_is_written(tmp_path, suffix):
    path = plot_results(
        {"ours": ROWS, "theirs": [row(112, 112, 98.0), row(28, 28, 90.0)]}, tmp_path / f"p/a.{suffix}"
    )
    assert [child.name for child in path.parent.iterdir()] == [f"a.{suffix}"]
    if suffix == "png":
        with Image.open(path) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    else:
        text = path.read_text()
        for label in ("ours", "theirs", "ours, gallery at 112"):
            assert f"<!-- {label} -->" in text
        for tick in ("14", "28", "112"):
            assert f"<!-- {tick} -->" in text


def test_benchmarks_get_a_panel_each(tmp_path):
    one = plot_results({"a": ROWS}, tmp_path / "one.png")
    two = plot_results({"a": [*ROWS, row(112, 112, 95.0, benchmark="cfp_fp")]}, tmp_path / "two.png")
    with Image.open(one) as single, Image.open(two) as double:
        assert double.width == 2 * single.width and double.height == single.height


def test_plot_refuses_bad_input(tmp_path):
    with pytest.raises(UsageError, match="no results"):
        plot_results({"a": []}, tmp_path / "a.png")
    with pytest.raises(UsageError, match="suffix must be one of"):
        plot_results({"a": ROWS}, tmp_path / "a.docx")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(LrfaceError, match="cannot write"):
        plot_results({"a": ROWS}, tmp_path / "folder.png")
    assert [child.name for child in tmp_path.iterdir()] == ["folder.png"]
