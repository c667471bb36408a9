"""The demo end to end with trainings of a few steps: what it writes, what it says, and that it can be run again."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lrface import demo
from lrface.errors import LrfaceError, UsageError
from lrface.recipes import load_recipe, stage_steps

TINY = [
    "data.synthetic.identities=4",
    "data.synthetic.images_per_identity=4",
    "data.batch_size=8",
    "backbone.embedding_size=32",
    "trainer.threads=1",
]
HELD_OUT = demo.HeldOut(identities=4, images=3, pairs=20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("demo")
    shown: list[str] = []
    summary = demo.run_demo(
        out,
        show_progress=False,
        say=lambda message: None,
        overrides=TINY,
        held_out=HELD_OUT,
        show=shown.append,
    )
    return out, summary, "\n".join(shown)


def test_photograph_shows_six_faces_from_left_to_right(finished):
    _, summary, _ = finished
    assert summary["photo"]["faces"] == 6
    assert summary["photo"]["path"].endswith("insightface/data/images/t1.jpg")
    assert all(60 < resolution < 200 for resolution in summary["photo"]["effective_resolution"])


def test_both_models_are_verified_at_four_resolutions(finished):
    _, summary, _ = finished
    assert set(summary["models"]) == {"qualnet_lm", "naive"}
    for model in summary["models"].values():
        rows = model["results"]
        assert (
            [row["gallery_size"] for row in rows] == [row["probe_size"] for row in rows] == [112, 56, 28, 14]
        )
        assert all(0 <= row["accuracy"] <= 100 and row["pairs"] == 20 for row in rows)


def test_embeddings_of_the_six_faces(finished):
    _, summary, _ = finished
    rows = summary["faces"]["resolutions"]
    assert list(rows) == ["112", "56", "28", "14"]
    assert rows["112"]["own"] == pytest.approx([1.0] * 6, abs=1e-3)
    assert rows["112"]["found"] == 6
    assert all(len(row["own"]) == 6 and max(row["own"]) <= 1.0001 for row in rows.values())
    # By the model inside, not by the two of a few steps: each of the six is found again among them.
    assert summary["faces"]["embedding_size"] == 128
    assert rows["56"]["found"] == rows["28"]["found"] == 6


def test_picture_is_a_png_of_plausible_size(finished):
    out, summary, _ = finished
    path = Path(summary["picture"])
    assert path == out / "demo.png" and path.is_absolute()
    assert path.read_bytes().startswith(b"\x89PNG")
    picture = cv2.imread(str(path))
    height, width = picture.shape[:2]
    assert 1200 < width < 4000 and 800 < height < 3000
    # A page of white would be a picture as well: faces have many colours.
    assert len(np.unique(picture[::5, ::5].reshape(-1, 3), axis=0)) > 1_000
    assert (picture == 255).all(axis=2).mean() < 0.9


def test_summary_on_disk_and_tables(finished):
    out, summary, text = finished
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(summary))
    assert text.count("\n") > 15
    for word in ("QualNet-LM", "naive augmentation", str(out / "demo.png")):
        assert word in text
    for model in summary["models"].values():
        for row in model["results"]:
            assert f"{row['accuracy']:.2f} +- {row['accuracy_std']:.2f}" in text


def test_again_in_the_same_place_uses_what_was_trained(finished):
    out, first, _ = finished
    said: list[str] = []
    again = demo.run_demo(
        out,
        show_progress=False,
        say=said.append,
        overrides=TINY,
        held_out=HELD_OUT,
        show=lambda text: None,
    )
    assert sum("complete" in message for message in said) == 3
    for name in demo.MODELS:
        assert again["models"][name]["weights_sha256"] == first["models"][name]["weights_sha256"]
        assert again["models"][name]["results"] == first["models"][name]["results"]


def test_another_recipe_in_the_same_place_is_refused(finished):
    out, _, _ = finished
    with pytest.raises(UsageError, match=r"batch_size.*give another --out, or delete"):
        demo.run_demo(
            out,
            show_progress=False,
            say=lambda message: None,
            overrides=[*TINY, "data.batch_size=16"],
            held_out=HELD_OUT,
        )


def test_decoder_and_encoder_of_the_reconstruction_are_those_of_the_run(finished):
    """The reconstruction's encoder is the exported model, and its decoder gives a [0, 1] image of every crop."""
    import torch

    from lrface.train.checkpoint import load_model

    out, _, _ = finished
    recipe = load_recipe("demo/qualnet_lm", TINY)
    network = demo.load_reconstruction(out / "qualnet_lm", recipe)
    encoder, _ = load_model(out / "qualnet_lm")
    crops = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        assert torch.allclose(network.encoder(images), encoder(images), atol=1e-5)
    pictures = demo.reconstruct(network, crops)
    assert list(pictures) == [112, 56, 28, 14]
    for picture in pictures.values():
        assert picture.shape == (3, 112, 112, 3) and 0 <= picture.min() and picture.max() <= 1


def test_both_recipes_have_the_same_budget_and_data():
    """As many training images for QualNet-LM's two stages together as for the naive network."""
    seen = {}
    for name in demo.MODELS:
        recipe = load_recipe(f"demo/{name}")
        data = recipe.data.synthetic
        images = data.identities * data.images_per_identity
        seen[name] = (
            sum(stage_steps(stage, images, recipe.data.batch_size) for stage in recipe.stages)
            * recipe.data.batch_size,
            data,
            recipe.backbone,
            recipe.head,
            recipe.seed,
        )
        assert recipe.trainer.compile is False  # a demo must not need a C++ compiler
    assert seen["qualnet_lm"] == seen["naive"]


def test_held_out_identities_may_not_be_trained_on():
    recipe = load_recipe("demo/naive", ["data.synthetic.identities=100"])
    with pytest.raises(UsageError, match="held out"):
        demo._held_out_faces(demo.HeldOut(first_identity=99), [recipe])
    held_out = demo._held_out_faces(demo.HeldOut(identities=3, first_identity=100), [recipe])
    assert held_out.first_identity == 100 and len(held_out.identities) == 3


def test_without_insightface_the_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LrfaceError, match="pip install insightface"):
        demo.find_photo()


def test_a_stopped_training_stops_the_demo_and_goes_on(tmp_path, monkeypatch):
    """Ctrl-C inside a training: KeyboardInterrupt, and the next call takes up the checkpoint."""
    import lrface.recipes
    from lrface.train.signals import Interrupted

    def stop(recipe, **_):
        raise Interrupted(2, 3, tmp_path / "step-00000003")

    monkeypatch.setattr(lrface.recipes, "run_recipe", stop)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        demo._train("naive", tmp_path, 0, TINY, False, said.append)
    assert any("step-00000003" in message for message in said)
