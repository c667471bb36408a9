"""A gallery's folder: what is acknowledged stays, what is removed is gone, one writer and many readers."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gallery_people import HEADER, faces, files_with, new_gallery, traces, vectors

from lrface import files as files_module
from lrface.errors import LrfaceError, UsageError
from lrface.gallery import folder as folder_module
from lrface.gallery.faces import templates_of
from lrface.gallery.folder import MANIFEST, FolderStore

FORK = multiprocessing.get_context("fork")


def best(store, rows):
    return [found[0].name if found else None for found in store.search(np.atleast_2d(rows), 1)]


def filled(folder, people=40, header=HEADER):
    """A store and what is in it: two images a person."""
    store = FolderStore.create(folder, header)
    given = faces([f"person {number // 2}" for number in range(2 * people)], vectors(2 * people))
    with store.writing():
        store.add(given)
    return store, given


def add(store, given):
    with store.writing():
        return store.add(given)


def remove(store, *names):
    with store.writing():
        return store.remove(names)


# ------------------------------------------------------------------------------------------- adding and looking


def test_what_is_enrolled_is_found_by_another_opener(tmp_path):
    store, given = filled(tmp_path / "g")
    other = FolderStore(tmp_path / "g")
    pooled = templates_of(given, "mean")
    found = other.search(pooled.vectors, 3)
    assert [each[0].name for each in found] == pooled.names
    assert all(abs(each[0].similarity - 1) < 1e-6 and each[0].images == 2 for each in found)
    assert other.enrolled([given.sha256[5], b"\0" * 32]) == {given.sha256[5]: "person 2"}
    assert other.names() == {name: 2 for name in sorted(pooled.names)}
    assert other.info()["people"] == 40 and other.info()["images"] == 80


def test_search_scores_are_the_cosines_in_order(tmp_path):
    store, given = filled(tmp_path / "g")
    pooled, probes = templates_of(given, "mean"), vectors(7, seed=3)
    cosines = probes.astype(np.float64) @ pooled.vectors.T.astype(np.float64)
    for found, row in zip(store.search(probes, 5), cosines, strict=True):
        assert [each.name for each in found] == [pooled.names[i] for i in np.argsort(-row)[:5]]
        assert np.allclose([each.similarity for each in found], np.sort(row)[::-1][:5], atol=1e-7)
    assert len(store.search(probes, 1000)[0]) == 40


def test_more_images_of_a_person_are_pooled_with_the_earlier_ones(tmp_path):
    store, given = filled(tmp_path / "g", people=3)
    more = faces(["person 1", "somebody"], vectors(2, seed=8), seed=8)
    assert add(store, more) == 1
    rows = np.concatenate([given.vectors[2:4], more.vectors[:1]]).astype(np.float64)
    mean = rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0))
    (found,) = store.search(mean[None].astype(np.float32), 4)
    assert found[0].name == "person 1" and found[0].images == 3 and abs(found[0].similarity - 1) < 1e-6
    assert sorted(each.name for each in found) == ["person 0", "person 1", "person 2", "somebody"]
    assert store.info()["people"] == 4


def test_an_empty_gallery_finds_nobody(tmp_path):
    store = FolderStore.create(tmp_path / "g", HEADER)
    assert store.search(vectors(2), 5) == [[], []] and store.names() == {} and store.info()["people"] == 0
    assert store.enrolled([b"\0" * 32]) == {} and remove(store, "nobody") == ({}, ["nobody"])


def test_many_small_adds_become_few_files_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_sync", lambda path: None)
    store = FolderStore.create(tmp_path / "g", HEADER)
    rows = vectors(150)
    with store.writing():
        for number in range(150):
            # Every third is one more image of the person before.
            store.add(faces([f"p{number - (number % 3 == 2)}"], rows[number : number + 1], seed=number))
    other = FolderStore(tmp_path / "g")
    assert other.info()["people"] == 100 and other.info()["images"] == 150
    assert other.info()["files"] < 40
    assert (
        sum(len(part) for part in other._look().templates) < 150
    )  # templates that newer ones replaced are gone
    assert best(other, rows[np.arange(150) % 3 == 0]) == [f"p{n}" for n in range(0, 150, 3)]
    assert set(os.listdir(tmp_path / "g")) == {".lock", MANIFEST} | {
        each["file"] for kind in ("faces", "templates") for each in other.header[kind]
    }


def test_large_files_of_replaced_templates_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_sync", lambda path: None)
    monkeypatch.setattr(folder_module, "LARGE", 8)
    store = FolderStore.create(tmp_path / "g", HEADER)
    with store.writing():
        for turn in range(20):
            store.add(faces([f"p{number}" for number in range(30)], vectors(30, seed=turn), seed=turn))
    assert len(store._look().rows) == 30 and store.info()["images"] == 600


# ---------------------------------------------------------------------------------------------------- removing


@pytest.mark.parametrize("index", ["exact", "hnsw", "ivf"])
def test_no_byte_of_a_removed_person_is_left(tmp_path, index):
    if index != "exact":
        pytest.importorskip("faiss", reason="faiss is not installed (extra search)")
    header = {**HEADER, "index": index}
    store, given = filled(tmp_path / "g", people=60, header=header)
    more = faces(["person 7", "late person"], vectors(2, seed=4), seed=4)
    with store.writing():
        store.add(more)
        store.refresh_index(show_progress=False)
    everything = folder_module.joined([given, more])
    own = [number for number, name in enumerate(everything.names) if name == "person 7"]
    gone = folder_module.joined([_only(everything, own)])
    pooled = templates_of(gone, "mean").vectors
    early = templates_of(_only(given, own[:2]), "mean").vectors
    marks = traces(gone)
    for start in range(0, pooled.shape[1], 6):
        marks[f"template at {start}"] = pooled[0, start : start + 6].tobytes()
        marks[f"replaced template at {start}"] = early[0, start : start + 6].tobytes()
    left = [what for what, content in marks.items() if not files_with(tmp_path / "g", content)]
    assert not [what for what in left if "replaced" not in what]  # all of them are there to be found before
    if index != "exact":
        assert any("index" in file for file in files_with(tmp_path / "g", pooled.tobytes()))

    reader = FolderStore(tmp_path / "g")
    assert best(reader, pooled) == ["person 7"]
    with store.writing():
        assert store.remove(["person 7"]) == ({"person 7": 3}, [])
        # Acknowledged: from here on it holds, also before an index is built again.
        assert [what for what, content in marks.items() if files_with(tmp_path / "g", content)] == []
        store.refresh_index(show_progress=False)
    assert [what for what, content in marks.items() if files_with(tmp_path / "g", content)] == []
    assert reader.info()["search"] == index
    assert best(reader, pooled) != ["person 7"] and "person 7" not in reader.names()
    others = templates_of(_only(everything, [n for n in range(len(everything)) if n not in own]), "mean")
    assert best(reader, others.vectors) == others.names
    # The others' bytes are where they were.
    assert files_with(tmp_path / "g", b"late person") and files_with(
        tmp_path / "g", given.vectors[0].tobytes()
    )


def _only(given, numbers):
    return type(given)(
        [given.names[n] for n in numbers],
        [given.sha256[n] for n in numbers],
        [given.paths[n] for n in numbers],
        given.vectors[numbers],
        given.quality[numbers],
        given.resolution[numbers],
    )


def test_the_last_person_is_removed_too(tmp_path):
    store, given = filled(tmp_path / "g", people=1)
    remove(store, "person 0")
    assert [what for what, content in traces(given).items() if files_with(tmp_path / "g", content)] == []
    assert set(os.listdir(tmp_path / "g")) == {".lock", MANIFEST} and store.search(vectors(1), 3) == [[]]
    assert add(store, given) == 1 and best(store, given.vectors[0]) == ["person 0"]


def test_a_removal_deletes_what_killed_writers_left(tmp_path):
    store, given = filled(tmp_path / "g")
    folder = tmp_path / "g"
    source = (folder / store._look().templates[0].file).read_bytes()
    left = [
        "templates-00000900.arrow",
        ".faces-00000901.arrow.4711.tmp",
        "index-00000007.faiss",
        ".gallery.json.9.tmp",
    ]
    for name in left:
        (folder / name).write_bytes(source)
    (folder / "notes.txt").write_text("not ours")
    remove(store, "person 0")
    assert not set(left) & set(os.listdir(folder)) and (folder / "notes.txt").read_text() == "not ours"
    assert files_with(folder, b"person 0") == []


def test_a_name_that_begins_another_is_not_removed_with_it(tmp_path):
    store = FolderStore.create(tmp_path / "g", HEADER)
    add(store, faces(["Ann", "Anna", "ann"], vectors(3)))
    assert remove(store, "Ann", "Bob") == ({"Ann": 1}, ["Bob"])
    assert store.names() == {"Anna": 1, "ann": 1}


# ------------------------------------------------------------------------------------------------------ crashes


def _count_operations(kill_at, tell):
    """From here on the ``kill_at``-th write, sync, rename or deletion of a file kills this process before it happens."""
    done = [0]

    def watched(function):
        def call(*arguments, **options):
            done[0] += 1
            if done[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    files_module._sync = watched(lambda path: None)
    os.replace = watched(os.replace)
    Path.unlink = watched(Path.unlink)
    folder_module.pa.OSFile = watched(folder_module.pa.OSFile)
    tell(done)


def _work(folder, kill_at, pipe):
    counter = []
    _count_operations(kill_at, counter.append)
    store = FolderStore(folder)
    with store.writing():
        for number in range(10):  # enough for a merge
            given = faces([f"new {number}", "person 1"], vectors(2, seed=100 + number), seed=100 + number)
            store.add(given)
            os.write(pipe, f"+new {number}\n".encode())
        store.remove(["person 3", "new 2"])
        os.write(pipe, b"-person 3\n-new 2\n")
    os.write(pipe, f"={counter[0][0]}\n".encode())


def _run_killed(folder, kill_at):
    """What the process acknowledged before it was killed, and how many operations it did if it was not."""
    ours, theirs = os.pipe()
    child = FORK.Process(target=_work, args=(folder, kill_at, theirs))
    child.start()
    os.close(theirs)
    with os.fdopen(ours) as told:
        lines = told.read().splitlines()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    operations = [int(line[1:]) for line in lines if line[0] == "="]
    return [line for line in lines if line[0] != "="], operations[0] if operations else None


def _check_after(folder, base, acknowledged):
    store = FolderStore(folder)
    names = store.names()
    for line in acknowledged:
        if line[0] == "+" and f"-{line[1:]}" not in acknowledged and line[1:] != "new 2":
            number = int(line.split()[1])
            assert best(store, vectors(2, seed=100 + number)[0]) == [line[1:]], line
        if line[0] == "-":
            assert line[1:] not in names and files_with(folder, line[1:].encode() + b"/0") == []
    for person in ("person 0", "person 2", "person 4"):
        assert names[person] == 2
    added = sum(line[0] == "+" for line in acknowledged)
    assert 2 + added <= names["person 1"] <= 3 + added
    # It goes on: nothing that was left stands in the way, and nothing is left.
    remove(store, "person 3", "new 2")
    assert add(store, faces(["after"], vectors(1, seed=77), seed=77)) == 1
    assert best(store, vectors(1, seed=77)) == ["after"] and files_with(folder, b"person 3") == []
    named = {each["file"] for kind in ("faces", "templates") for each in store._look().manifest[kind]}
    assert set(os.listdir(folder)) == named | {".lock", MANIFEST}


def _killed_at(tmp_path, moments):
    import shutil

    _, base = filled(tmp_path / "start", people=5)
    for moment in moments:
        folder = tmp_path / f"killed {moment}"
        shutil.copytree(tmp_path / "start", folder)
        acknowledged, operations = _run_killed(folder, moment)
        assert (operations is None) == (moment > 0)
        _check_after(folder, base, acknowledged)
        shutil.rmtree(folder)


def _operations(tmp_path):
    filled(tmp_path / "whole", people=5)
    acknowledged, operations = _run_killed(tmp_path / "whole", 0)
    assert len(acknowledged) == 12 and operations > 80
    return operations


def test_killed_before_any_of_the_operations_on_files_nothing_acknowledged_is_lost(tmp_path):
    operations = _operations(tmp_path)
    _killed_at(tmp_path, np.random.default_rng().choice(np.arange(1, operations + 1), 4, replace=False))


@pytest.mark.slow
def test_killed_before_every_one_of_the_operations_on_files(tmp_path):
    _killed_at(tmp_path, range(1, _operations(tmp_path) + 1))


def _enrol_for_ever(folder, pipe):
    store = FolderStore(folder)
    number = 0
    with store.writing():
        while True:
            store.add(faces([f"new {number}"], vectors(1, seed=number), seed=number))
            os.write(pipe, f"{number}\n".encode())
            number += 1


def _kill_at_random(tmp_path, times):
    random = np.random.default_rng()
    for turn in range(times):
        folder = tmp_path / f"g{turn}"
        FolderStore.create(folder, HEADER)
        ours, theirs = os.pipe()
        child = FORK.Process(target=_enrol_for_ever, args=(folder, theirs))
        child.start()
        os.close(theirs)
        with os.fdopen(ours) as told:
            first = told.readline()  # it is at work
            time.sleep(random.uniform(0, 0.6))
            child.kill()
            lines = [first, *told.read().splitlines()]
        child.join()
        store = FolderStore(folder)
        last = len(lines)
        assert best(store, np.concatenate([vectors(1, seed=n) for n in range(last)])) == [
            f"new {n}" for n in range(last)
        ]
        assert last <= store.info()["people"] <= last + 1
        assert add(store, faces(["after"], vectors(1, seed=10**6), seed=10**6)) == 1


def test_killed_at_a_random_moment_nobody_acknowledged_is_lost(tmp_path):
    _kill_at_random(tmp_path, 2)


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path):
    _kill_at_random(tmp_path, 100)


def test_files_are_synced_before_gallery_json_names_them(tmp_path, monkeypatch):
    store = FolderStore.create(tmp_path / "g", HEADER)
    events = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(("rename", str(a), str(b))), replace(a, b))
    )
    add(store, faces(["Anna"], vectors(1)))
    at = next(i for i, event in enumerate(events) if event[0] == "rename" and event[2].endswith(MANIFEST))
    before, after = events[:at], events[at + 1 :]
    for kind in ("faces", "templates"):
        aside = next(event[1] for event in before if event[0] == "rename" and kind in event[2])
        assert ("sync", aside) in before
    assert ("sync", events[at][1]) in before  # gallery.json itself
    folder = ("sync", str(tmp_path / "g"))
    assert folder in before and folder in after


# ------------------------------------------------------------------------------------- readers, writers, the disk


def test_readers_see_whole_versions_while_files_are_merged_and_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_sync", lambda path: None)
    store, given = filled(tmp_path / "g")
    pooled = templates_of(given, "mean")
    stop, wrong, looks = threading.Event(), [], [0]

    def read():
        while not stop.is_set():
            reader = FolderStore(tmp_path / "g")
            for _ in range(5):
                found = best(reader, pooled.vectors)
                people = reader.names()
                looks[0] += 1
                # One of a pair is never there without the other.
                if found != pooled.names or ("left" in people) != ("right" in people):
                    wrong.append((found, people))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(25):
        add(store, faces(["left", "right"], vectors(2, seed=turn + 50), seed=turn + 50))
        if turn % 3 == 0:
            remove(store, "left", "right")
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == [] and looks[0] > 3


def test_what_a_reader_has_open_survives_the_files(tmp_path):
    store, given = filled(tmp_path / "g")
    pooled = templates_of(given, "mean")
    reader = FolderStore(tmp_path / "g")
    view = reader._look()
    for number in range(1, 40):
        remove(store, f"person {number}") if number % 13 == 0 else None
    assert not (tmp_path / "g" / view.templates[0].file).exists()
    probe, at = reader._nearest(view, pooled.vectors, 1)
    assert np.array_equal(at, np.arange(40))  # the version it looked at
    assert best(reader, pooled.vectors[13]) != ["person 13"]  # the next call looks again


def _hold(folder, ready, go):
    with FolderStore(folder).writing():
        ready.set()
        go.wait(60)


def test_a_second_writer_is_refused_and_readers_are_not(tmp_path):
    store, given = filled(tmp_path / "g")
    ready, go = FORK.Event(), FORK.Event()
    other = FORK.Process(target=_hold, args=(tmp_path / "g", ready, go))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(LrfaceError, match="another run is working on it"):
            add(store, faces(["late"], vectors(1, seed=5)))
        assert best(FolderStore(tmp_path / "g"), templates_of(given, "mean").vectors[3]) == ["person 3"]
    finally:
        go.set()
        other.join()
    assert add(store, faces(["late"], vectors(1, seed=5))) == 1


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    store, _ = filled(tmp_path / "g")
    second = FolderStore(tmp_path / "g" / ".." / "g")
    with store.writing():
        with pytest.raises(LrfaceError, match="another thread of this process is writing"):
            add(second, faces(["late"], vectors(1, seed=5)))
    assert add(second, faces(["late"], vectors(1, seed=5))) == 1 and "late" in store.names()


def mounted(folder, options):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")


def test_a_full_disk_loses_nothing_and_is_named(tmp_path):
    mounted(tmp_path / "disk", "size=200k")
    try:
        store, given = filled(tmp_path / "disk" / "g", people=30)
        pooled = templates_of(given, "mean")
        with pytest.raises(LrfaceError, match="the disk is full"):
            for number in range(10):
                add(store, faces([f"more {number} {n}" for n in range(200)], vectors(200, number), number))
        people = store.names()
        assert best(store, pooled.vectors) == pooled.names
        # What was half written is gone, so that there is room to remove somebody.
        named = {each["file"] for kind in ("faces", "templates") for each in store._look().manifest[kind]}
        assert set(os.listdir(tmp_path / "disk" / "g")) == named | {".lock", MANIFEST}
        assert remove(store, "person 0")[0] == {"person 0": 2}
        assert len(store.names()) == len(people) - 1 and files_with(tmp_path / "disk", b"person 0/") == []
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_a_read_only_folder_is_searched_and_not_written(tmp_path):
    mounted(tmp_path / "disk", "size=2m")
    try:
        _, given = filled(tmp_path / "disk" / "g", people=3)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        store = FolderStore(tmp_path / "disk" / "g")
        assert best(store, templates_of(given, "mean").vectors[1]) == ["person 1"]
        for change in (lambda: add(store, faces(["late"], vectors(1))), lambda: remove(store, "person 1")):
            with pytest.raises(LrfaceError, match=r"cannot write .*\.lock: Read-only file system"):
                change()
        with pytest.raises(LrfaceError, match="cannot write .*Read-only file system"):
            FolderStore.create(tmp_path / "disk" / "h", HEADER)
        store.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_an_add_that_fails_half_way_leaves_no_files(tmp_path, monkeypatch):
    store, _ = filled(tmp_path / "g")
    before = set(os.listdir(tmp_path / "g"))
    write_json = folder_module.write_json

    def full(path, value):
        raise files_module.explain(OSError(errno.ENOSPC, "full"), path)

    monkeypatch.setattr(folder_module, "write_json", full)
    with pytest.raises(LrfaceError, match="the disk is full"):
        add(store, faces(["late"], vectors(1, seed=5)))
    monkeypatch.setattr(folder_module, "write_json", write_json)
    assert set(os.listdir(tmp_path / "g")) == before and "late" not in store.names()


# ------------------------------------------------------------------------------------------- damage and wrong places


def test_wrong_places(tmp_path):
    with pytest.raises(LrfaceError, match=r"missing is no gallery: it has no gallery.json"):
        FolderStore(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(LrfaceError, match="is no gallery"):
        FolderStore(tmp_path / "file")
    with pytest.raises(UsageError, match="file is a file; a gallery is a folder"):
        FolderStore.create(tmp_path / "file", HEADER)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").write_text("")
    with pytest.raises(UsageError, match="holds photo.jpg and is no gallery"):
        FolderStore.create(tmp_path / "full", HEADER)
    filled(tmp_path / "g", people=1)
    with pytest.raises(UsageError, match="holds faces-00000001.arrow"):
        FolderStore.create(tmp_path / "g", HEADER)


def test_damage_is_named(tmp_path):
    store, _ = filled(tmp_path / "g")
    folder = tmp_path / "g"
    manifest = json.loads((folder / MANIFEST).read_text())
    file = folder / manifest["templates"][0]["file"]
    content = file.read_bytes()

    for cut in (0, 7, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(LrfaceError, match=file.name):
            FolderStore(folder)
    file.unlink()
    with pytest.raises(LrfaceError, match=f"{file.name} is missing, though .*gallery.json names it"):
        FolderStore(folder)
    file.write_bytes(content)
    FolderStore(folder)

    for change, message in (
        ({"format": "other"}, "is not of the format"),
        ({"format_version": 2}, "is not of the format"),
        ({"next_row": None}, None),
        ({"templates": [{"file": "../secret.arrow", "rows": 1}]}, "which is no file of a gallery"),
        ({"templates": [{**manifest["templates"][0], "rows": 3}]}, "3 rows of .* were written; found 40"),
        ({"templates": manifest["faces"]}, "is damaged"),
        ({"model": {**HEADER["model"], "embedding_size": 25}}, "is damaged"),
    ):
        changed = {**manifest, **change}
        if message is None:
            del changed["next_row"]
            message = "is damaged: next_row is missing"
        (folder / MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(LrfaceError, match=message):
            FolderStore(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(LrfaceError, match="gallery.json is damaged"):
        FolderStore(folder)


def test_a_gallery_that_was_made_anew_in_the_same_place_is_read_anew(tmp_path):
    import shutil

    store, given = filled(tmp_path / "g", people=2)
    assert best(store, templates_of(given, "mean").vectors) == ["person 0", "person 1"]
    shutil.rmtree(tmp_path / "g")
    other = FolderStore.create(tmp_path / "g", HEADER)
    add(other, faces(["Zoe"], vectors(1, seed=6)))
    assert best(store, vectors(1, seed=6)) == ["Zoe"] and store.names() == {"Zoe": 1}


# ---------------------------------------------------------------------------------------------- approximate search


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_people_added_or_changed_after_the_index_was_built_are_found(tmp_path, kind):
    pytest.importorskip("faiss", reason="faiss is not installed (extra search)")
    gallery = new_gallery(tmp_path / "g")
    rows = vectors(500)
    gallery.add_vectors([f"p{n}" for n in range(500)], rows, index=kind)
    assert gallery.info()["search"] == kind and gallery.info()["search_index"]["rows"] == 500
    gallery.add_vectors(["late", "p3"], vectors(2, seed=9))
    said = gallery.info()
    assert said["search_index"]["people_searched_exactly"] == 2 and said["people"] == 501
    matches = gallery.search_vectors(np.concatenate([rows, vectors(2, seed=9)[:1]]), k=3, threshold=0.5)
    assert np.mean([match.name == f"p{n}" for n, match in enumerate(matches[:500])]) > 0.97
    assert matches[500].name == "late"
    (changed,) = gallery.search_vectors(rows[3] + vectors(2, seed=9)[1], k=3)
    assert (changed.candidates[0].name, changed.candidates[0].images) == ("p3", 2)
    assert [each.name for each in changed.candidates].count("p3") == 1
    # Enough of them, and it is built again.
    gallery.add_vectors([f"q{n}" for n in range(60)], vectors(60, seed=10))
    assert gallery.info()["search_index"]["people_searched_exactly"] == 0
    assert gallery.info()["search_index"]["rows"] == 561
    gallery.add_vectors([], np.zeros((0, 24)), index="exact")
    assert gallery.info()["search"] == "exact" and not list((tmp_path / "g").glob("*.faiss"))


def test_beyond_a_million_people_auto_takes_an_index(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed (extra search)")
    monkeypatch.setattr(folder_module, "EXACT_ROWS", 200)
    gallery = new_gallery(tmp_path / "g")
    gallery.add_vectors([f"p{n}" for n in range(200)], vectors(200))
    assert gallery.info()["search"] == "exact"
    gallery.add_vectors(["one more"], vectors(1, seed=2))
    assert gallery.info()["search"] == "hnsw"


def test_without_faiss_an_index_is_refused_and_an_indexed_gallery_searched_exactly(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="faiss is not installed (extra search)")
    gallery = new_gallery(tmp_path / "g")
    rows = vectors(100)
    gallery.add_vectors([f"p{n}" for n in range(100)], rows, index="hnsw")
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    again = FolderStore(tmp_path / "g")
    assert again.info()["search"] == "exact" and best(again, rows[:9]) == [f"p{n}" for n in range(9)]
    with pytest.raises(LrfaceError, match=r"pip install 'lrface\[search\]'"):
        new_gallery(tmp_path / "h").add_vectors(["a"], rows[:1], index="ivf")
