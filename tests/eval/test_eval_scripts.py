"""What the scripts of eval/ say when something is wrong, and where they write."""

import subprocess
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).resolve().parents[2] / "eval"
SCRIPTS = [
    path
    for path in sorted(EVAL.glob("*.py"))
    # They take no data of the user's, or nothing of lrface's.
    if path.stem not in ("bench", "readme_picture", "scale_million", "lfw_onnxruntime")
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["table6_ablation.py", "--rows", "naive", "--steps", "1"],
            1,
            "error: training data 'cifar10/test.parquet'",
        ),
        (["ada_figure3.py", "EDSR=nothere"], 1, "error: training data 'cifar10/test.parquet' was not found"),
        (["ant_tables.py", "--table=99"], 2, "argument --table: invalid choice"),
        (["lfw_onnxruntime.py", "none.onnx", ".", "pairs.txt"], 2, "none.onnx: no such file or folder"),
    ],
)
def test_errors_are_messages(tmp_path, arguments, code, message):
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EVAL / arguments[0]), *arguments[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_ends_with_messages(path):
    text = path.read_text(encoding="utf-8")
    assert '\nif __name__ == "__main__":\n    with errors_for_users():\n' in text


@pytest.mark.parametrize("name", ["ada_line_search", "cifar10c_agreement", "ada_figure1"])
def test_results_go_where_they_should(name):
    done = subprocess.run(
        [sys.executable, str(EVAL / f"{name}.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--out OUT" in done.stdout, "a short trial must not replace the results that are kept"
