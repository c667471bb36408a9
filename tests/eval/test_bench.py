"""The runner of the bench: what it takes from the scripts, what it keeps on disk, what it says when asked wrongly."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lrface.errors import LrfaceError

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
NAMES = ["first", "second"]

def run(names=None, quick=False):
    rows = [
        {"name": name, "ours": 3.0, "peer": 2.0, "ratio": 1.5, "unit": "images/s", "threads": 2, "quick": quick}
        for name in NAMES
    ]
    return [row for row in rows if row["name"] in names]
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner, with a folder of its own for scripts and results."""
    spec = importlib.util.spec_from_file_location("bench_runner", ROOT / "eval" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "pair.py").write_text(SCRIPT)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / "bench.json")
    monkeypatch.setattr(module, "find_figures", lambda find=module.find_figures: find(scripts))
    return module


def stored(bench: ModuleType) -> list[dict]:
    return json.loads(bench.RESULTS.read_text())


def test_figures_of_other_names_stay(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"name": "elsewhere", "ours": 1.0, "peer": 2.0, "ratio": 0.5}
    stale = {"name": "second", "ours": 9.0, "peer": 9.0, "ratio": 1.0}
    bench.RESULTS.parent.mkdir()
    bench.RESULTS.write_text(json.dumps([stale, old]))
    assert bench.main([]) == 0
    rows = {row["name"]: row for row in stored(bench)}
    assert list(rows) == ["second", "elsewhere", "first"]
    assert rows["elsewhere"] == old
    assert rows["second"]["ours"] == 3.0
    for name in ("first", "second"):
        assert {"name", "ours", "peer", "ratio", "unit", "threads", "commit", "date"} <= set(rows[name])
    assert "1.500" in capsys.readouterr().out


def test_only_measures_one(bench: ModuleType) -> None:
    assert bench.main(["--only", "second"]) == 0
    assert [row["name"] for row in stored(bench)] == ["second"]


def test_quick_is_passed_on_and_writes_nothing(bench: ModuleType) -> None:
    script = bench.find_figures()["first"]
    assert bench.measure(script, ["first"], quick=True)[0]["quick"] is True
    assert bench.main(["--quick"]) == 0
    assert not bench.RESULTS.exists()


def test_unknown_name_lists_the_known(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--only", "third"]) == 2
    assert "first, second" in capsys.readouterr().err
    assert not bench.RESULTS.exists()


def test_failed_script_leaves_the_others(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "scripts" / "apart.py").write_text(
        "from lrface.errors import LrfaceError\nNAMES = ['apart']\ndef run():\n    raise LrfaceError('no data')\n"
    )
    assert bench.main([]) == 1
    assert [row["name"] for row in stored(bench)] == ["first", "second"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("'ratio': float('nan')", "ratio"),
        ("'peer': 0.0", "peer"),
        ("'name': 'other'", "no figure"),
        ("'unit'", "lacks"),
    ],
)
def test_bad_rows_are_refused(bench: ModuleType, tmp_path: Path, change: str, message: str) -> None:
    row = "{'name': 'one', 'ours': 1.0, 'peer': 1.0, 'ratio': 1.0, 'unit': 's', 'threads': 1}"
    key, _, value = change.partition(": ")
    edit = f"row[{key}] = {value}" if value else f"del row[{key}]"
    (tmp_path / "scripts" / "one.py").write_text(
        f"NAMES = ['one']\ndef run():\n    row = {row}\n    {edit}\n    return [row]\n"
    )
    with pytest.raises(LrfaceError, match=message):
        bench.measure(bench.find_figures()["one"], ["one"], quick=False)


def test_two_scripts_of_one_name_are_refused(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "scripts" / "twin.py").write_text("NAMES = ['first']\n")
    with pytest.raises(LrfaceError, match="'first'"):
        bench.find_figures()


def test_broken_results_are_not_overwritten(bench: ModuleType) -> None:
    bench.RESULTS.parent.mkdir()
    bench.RESULTS.write_text("{")
    assert bench.main([]) == 1
    assert bench.RESULTS.read_text() == "{"


def test_scripts_of_the_checkout_load() -> None:
    """Every script in eval/bench names its figures, none twice."""
    spec = importlib.util.spec_from_file_location("bench_runner_whole", ROOT / "eval" / "bench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {"train_overhead", "train_overhead_packed"} <= set(module.find_figures())
