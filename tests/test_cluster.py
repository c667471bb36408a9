"""Work on a local Ray cluster of two workers: the same bytes, and nothing lost or done twice when one is killed."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import pytest
import torch

from lrface import load_embedder
from lrface.align import pipeline
from lrface.align.detect import describe_detector
from lrface.align.pipeline import align_folder
from lrface.cluster import on_ray
from lrface.embed import embed_paths
from lrface.errors import LrfaceError, UsageError
from lrface.models import build_backbone
from lrface.train.checkpoint import make_card, save_model

# Starting a cluster takes ten seconds and more.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """One cluster for the tests that do not start their own; bound to loopback."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'lrface[dist]'")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=80 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        _system_config={"worker_niceness": 0},
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve people with sixteen photographs each, cut from the one that the insightface wheel ships, and what cannot
    be used: twelve parts."""
    spec = importlib.util.find_spec("insightface")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("insightface is not installed: its photograph of six faces is needed")
    six = cv2.imread(str(Path(spec.submodule_search_locations[0]) / "data/images/t1.jpg"))
    root = tmp_path_factory.mktemp("photographs")
    for person in range(12):
        x, y = [(110, 330), (322, 211), (518, 333), (793, 410), (961, 132), (1181, 336)][person % 6]
        (root / f"person{person:02d}").mkdir()
        for copy in range(15):
            cut = six[max(0, y - 110) : y + 110, max(0, x - 100 - copy) : x + 100 + person]
            cv2.imwrite(str(root / f"person{person:02d}/{copy:02d}.jpg"), cut)
        (root / f"person{person:02d}/broken.jpg").write_bytes(b"no photograph")
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    align_folder(photographs, out, workers=2, show_progress=False)
    return content(out)


def actors() -> list[int]:
    """Processes of actors below this one."""
    parents, names = {}, {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            names[int(status.parent.name)] = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(status.parent.name)] = int(fields[1])

    def is_below(process: int) -> bool:
        while process > 1:
            if process == os.getpid():
                return True
            process = parents.get(process, 0)
        return False

    return [process for process in parents if b"ray::_Actor" in names.get(process, b"") and is_below(process)]


def test_the_same_bytes_as_on_one_machine(cluster, photographs, tmp_path, undisturbed):
    summary = align_folder(photographs, tmp_path / "out", engine="ray", workers=2, show_progress=False)
    assert (summary.aligned, summary.unreadable) == (180, 12)
    assert content(tmp_path / "out") == undisturbed


def test_killed_workers_lose_and_repeat_nothing(cluster, photographs, tmp_path, undisturbed):
    out = tmp_path / "out"
    killed: list[int] = []

    def kill_twice():
        deadline = time.monotonic() + 200
        while len(killed) < 2 and time.monotonic() < deadline:
            parts = len(list((out / "unfinished").glob("part-*.arrow")))
            working = [process for process in actors() if process not in killed]
            if parts >= 1 + 3 * len(killed) and working:
                os.kill(working[0], signal.SIGKILL)
                killed.append(working[0])
            time.sleep(0.01)

    killer = threading.Thread(target=kill_twice)
    killer.start()
    summary = align_folder(photographs, out, engine="ray", workers=2, show_progress=False)
    killer.join()
    assert len(killed) == 2
    assert (summary.files, summary.aligned, summary.unreadable) == (192, 180, 12)
    assert content(out) == undisturbed


def test_a_killed_driver_and_another_engine_go_on(photographs, tmp_path, undisturbed):
    """Begun on Ray and killed with its cluster, finished by processes of this machine."""
    out = tmp_path / "out"
    script = (
        "import sys; from lrface.align.pipeline import align_folder\n"
        "align_folder(sys.argv[1], sys.argv[2], engine='ray', workers=2, show_progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(photographs), str(out)])
    deadline = time.monotonic() + 200
    while len(list((out / "unfinished").glob("part-*.arrow"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "it should be running still"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "index.json").exists()
    summary = align_folder(photographs, out, workers=2, show_progress=False)
    assert summary.reused >= 32
    assert content(out) == undisturbed


def test_embedding_gives_the_same_file(cluster, photographs, tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = build_backbone("mobilefacenet", embedding_size=16).eval()
    card = make_card({"name": "mobilefacenet", "arguments": {"embedding_size": 16}}, encoder, {})
    save_model(tmp_path / "model", encoder, card)
    monkeypatch.setattr("lrface.embed.paths._PART_IMAGES", 40)
    monkeypatch.chdir(photographs.parent)
    threads = torch.get_num_threads()
    try:
        embedder = load_embedder(tmp_path / "model", threads=1)
        found = [
            embed_paths(
                embedder,
                [photographs.name],
                tmp_path / f"{engine}.parquet",
                engine=engine,
                workers=2,
                progress=False,
            )
            for engine in ("local", "ray")
        ]
    finally:
        torch.set_num_threads(threads)
    assert [(each.faces, each.failures) for each in found] == [(180, 12)] * 2
    local, ray = (tmp_path / f"{engine}.parquet" for engine in ("local", "ray"))
    assert local.read_bytes() == ray.read_bytes()
    failures = [Path(f"{path}.failures.csv").read_text() for path in (local, ray)]
    assert failures[0] == failures[1] and failures[0].count("broken.jpg") == 12


def test_a_task_that_kills_every_worker_ends_the_job(cluster):
    def make():
        def work(task):
            if task == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return 10 * task

        return work

    done = []
    with pytest.raises(
        LrfaceError, match="4 workers died one after the other on the same part.*run the same"
    ):
        for result in on_ray(make, [0, 1, 2, 3], 2):
            done.append(result)
    assert {(0, 0), (2, 20), (3, 30)} >= set(done)


def test_errors_for_users_cross_machines(cluster):
    def refuse():
        raise LrfaceError("this machine lacks a lamp")

    with pytest.raises(LrfaceError, match="lacks a lamp"):
        list(on_ray(refuse, [1, 2], 2))

    def odd():
        def work(task):
            if task == 2:
                raise UsageError("two is odd")
            return task

        return work

    with pytest.raises(UsageError, match="two is odd"):
        list(on_ray(odd, [1, 2], 1))


def test_a_folder_that_other_machines_do_not_see(cluster, photographs, tmp_path):
    settings = describe_detector()
    crew = pipeline._Crew(Path("/nowhere"), settings, None, "cpu", 1, "ray", None)
    with pytest.raises(LrfaceError, match="/nowhere is not there on .*every machine of the cluster"):
        list(on_ray(crew.ray_worker, [(0, [], tmp_path / "part")], 1))


def test_no_cluster_there():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'lrface[dist]'")
    ray.shutdown()
    with pytest.raises(LrfaceError, match="Ray cluster at 127.0.0.1:1 cannot be reached"):
        list(on_ray(lambda: lambda task: task, [1], 1, "127.0.0.1:1"))
