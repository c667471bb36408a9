import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lrface import config, recipes
from lrface.cli import app
from lrface.data.packed import PackedSource, verify_shards
from lrface.data.source import check_source, open_source
from lrface.deepaugment import deepaugment_set
from lrface.errors import LrfaceError, UsageError
from lrface.models import build_backbone, build_network
from lrface.models.deepaugment import draw_edited, edited
from lrface.train.checkpoint import make_card, save_model

COUNT = 30


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of two classes, and an EDSR and an autoencoder that were never trained."""
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        image = cv2.resize(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8), (32, 32))
        folder = tmp_path / "clean" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / f"{index:02d}.png"), image)
    for name, arguments in (
        ("edsr", {"blocks": 2, "features": 8, "scale": 2}),
        ("compressive_autoencoder", {"width": 8, "code": 4, "blocks": 1}),
    ):
        torch.manual_seed(1)
        network = build_network(name, **arguments)
        save_model(tmp_path / name, network, make_card({"name": name, "arguments": arguments}, network, {}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(out="set", networks=("edsr", "compressive_autoencoder"), copies=2, **options):
    return deepaugment_set("clean", out, networks, copies, show_progress=False, **options)


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith(".")}


def test_a_set_is_packed_data_of_the_same_classes(place):
    summary = make()
    assert (summary.images, summary.written, summary.existing, summary.broken) == (60, 60, 0, [])
    clean, made = open_source("clean"), open_source("set")
    check_source(made, "set")
    verify_shards("set")
    assert isinstance(made, PackedSource) and made.identities == clean.identities and len(made) == 60
    labels = dict(zip(clean.sources(), clean.labels.tolist(), strict=True))
    assert sorted(made.sources()) == sorted(f"{copy}/{name}" for copy in (0, 1) for name in labels)
    assert [labels[name.partition("/")[2]] for name in made.sources()] == made.labels.tolist()
    assert made.image(0).shape == (32, 32, 3)
    noted = made.index["deepaugment"]
    assert noted["copies"] == 2 and noted["seed"] == 0 and len(noted["networks_sha256"]) == 2
    edits = {name.partition(" ")[0]: 0 for name in noted["edits"]}
    assert set(edits) == {"EDSR", "CompressiveAutoencoder"}


def test_images_are_what_the_edited_network_draws(place):
    make(networks=["compressive_autoencoder"], copies=1, seed=5)
    made = open_source("set")
    clean = open_source("clean")
    network = recipes.load_model("compressive_autoencoder")[0].eval()
    order = np.random.default_rng((5, 0, 0)).permutation(COUNT)
    groups = (np.random.default_rng((5, 1, 0)).random(COUNT) < 0.05).cumsum()
    assert groups[0] == 0 and groups[-1] > 0  # more than one edited network
    for at in (0, COUNT - 1):
        own, _ = edited(network, np.random.default_rng((5, 2, 0, int(groups[at]))))
        image = torch.from_numpy(clean.image(int(order[at]))).permute(2, 0, 1)[None].float() / 255
        drawn = draw_edited(own, image, [np.random.default_rng((5, 3, 0, at))])
        expected = (drawn[0] * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(made.image(at).astype(int) - expected).max() <= 1
        assert made.sources()[at] == f"0/{clean.sources()[int(order[at])]}"


def test_the_same_call_gives_the_same_bytes_and_another_seed_others(place):
    make()
    make("again")
    make("other", seed=1)
    assert files("set")["shard-00000.arrow"] == files("again")["shard-00000.arrow"]
    assert files("set")["shard-00000.arrow"] != files("other")["shard-00000.arrow"]


def test_it_goes_on_from_the_last_whole_shard(place, monkeypatch):
    monkeypatch.setattr("lrface.deepaugment.SHARD_ROWS", 16)
    make("whole")
    make("cut")
    assert len(files("cut")) == 5
    os.remove("cut/index.json")
    os.remove("cut/shard-00002.arrow")
    before = Path("cut/shard-00001.arrow").stat().st_mtime_ns
    summary = make("cut")
    assert (summary.images, summary.written, summary.existing) == (60, 16, 44)
    assert Path("cut/shard-00001.arrow").stat().st_mtime_ns == before
    assert files("cut") == files("whole")
    assert make("cut").existing == 60


def test_a_killed_run_goes_on(place, monkeypatch):
    monkeypatch.setattr("lrface.deepaugment.SHARD_ROWS", 8)
    program = """
import lrface.deepaugment as d
d.SHARD_ROWS = 8
d.deepaugment_set("clean", "killed", ["edsr", "compressive_autoencoder"], 2, show_progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not Path("killed/shard-00001.arrow").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() != 0 and not Path("killed/index.json").exists()
    with pytest.raises(LrfaceError):
        open_source("killed")
    assert make("killed").existing >= 8
    make("whole")
    whole, again = files("whole"), files("killed")
    assert [whole[name] for name in sorted(whole)] == [again[name] for name in sorted(again)]


def test_broken_images_are_left_out_of_every_copy(place):
    Path("clean/a/00.png").write_bytes(b"no image")
    summary = make()
    assert summary.images == 58 and [name for name, _ in summary.broken] == ["a/00.png"]
    assert "1 broken images were left out, the first is a/00.png" in str(summary)
    assert not any(name.endswith("a/00.png") for name in open_source("set").sources())
    assert make().broken == summary.broken


def test_what_is_refused(place):
    make()
    with pytest.raises(UsageError, match="set holds a set made with other settings: copies was 2, now 3"):
        make(copies=3)
    with pytest.raises(UsageError, match="clean is not empty"):
        make("clean")
    with pytest.raises(UsageError, match="--copies and --batch-size must be at least 1"):
        make("none", copies=0)
    with pytest.raises(UsageError, match="--network: name at least one"):
        make("none", networks=())
    arguments = {"width": 2}
    backbone = build_backbone("cifar_resnet18", **arguments)
    save_model(
        place / "classifier",
        backbone,
        make_card({"name": "cifar_resnet18", "arguments": arguments}, backbone, {}),
    )
    with pytest.raises(
        LrfaceError, match="classifier holds a cifar_resnet18; --network takes runs of a network that"
    ):
        make("none", networks=["classifier"])
    assert cv2.imwrite("clean/b/large.png", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(LrfaceError, match="pixels, others have .*lrface pack SRC OUT --size"):
        make("sizes")


def test_published_weights(place):
    network = build_network("edsr")
    state = {theirs: network.get_parameter(own).detach() for own, theirs in network.published_names().items()}
    torch.save(state, "published.pt")
    summary = deepaugment_set("clean", "set", ["edsr@weights=published.pt"], 1, show_progress=False)
    assert summary.images == COUNT
    with pytest.raises(LrfaceError, match="absent.pt"):
        deepaugment_set("clean", "other", ["edsr@weights=absent.pt"], 1, show_progress=False)


def test_the_command_and_a_run_on_both_sets(place):
    arguments = [
        "deepaugment",
        "clean",
        "--out",
        "set",
        "--network",
        "edsr",
        "--copies",
        "1",
        "--device",
        "cpu",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == COUNT
    raw = {
        "name": "both",
        "out": "run",
        "data": {"path": ["clean", "set"], "batch_size": 10},
        "backbone": {"name": "cifar_resnet18", "width": 2},
        "head": "softmax",
        "trainer": {"tensorboard": False, "sheet_every": 0, "device": "cpu"},
        "stages": [
            {
                "name": "only",
                "method": "classify",
                "degrade": {"name": "clean", "crop_padding": 4},
                "epochs": 1,
            }
        ],
    }
    summary = recipes.run_recipe(config.parse_recipe(raw), show_progress=False)
    assert (summary.images, summary.identities) == (2 * COUNT, 2)
    card = json.loads(Path("run/model.json").read_text())
    assert card["training"]["data"] == "clean + set"
    result = CliRunner().invoke(app, ["deepaugment", "clean", "--out", "x", "--network", "nowhere"])
    assert result.exit_code == 1 and "nowhere" in result.output
