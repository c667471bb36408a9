"""What each loss of a QualNet does to its encoder: the two gradients are the parts of the whole one."""

import pytest
import torch
import yaml

from lrface import config, recipes
from lrface.diagnose import loss_gradients, quality_pull
from lrface.errors import UsageError

RECIPE = {
    "name": "tiny",
    "data": {"synthetic": {"identities": 4, "images_per_identity": 4}, "batch_size": 8},
    "backbone": {"name": "mobilefacenet"},
    "decoder": {"name": "subpixel", "width": 16},
    "trainer": {
        "device": "cpu",
        "precision": "float32",
        "tensorboard": False,
        "sheet_every": 0,
        "threads": 1,
    },
    "stages": [{"name": "one", "method": {"name": "qualnet", "quality_weight": 3.0}, "steps": 1}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "tiny"
    recipe = config.parse_recipe(yaml.safe_load(yaml.safe_dump(RECIPE)), [f"out={out}"])
    recipes.run_recipe(recipe, show_progress=False)
    return out


def test_the_gradients_add_up_to_that_of_the_whole_loss(run):
    recipe = config.parse_recipe(config.read_yaml(run / "recipe.yaml"))
    method = recipes.build_method(recipe, recipe.stages[0], 4).eval()
    images = torch.rand(8, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    batch = method.prepare({"image": images, "label": torch.arange(8) % 4, "seed": 1})
    softmax, quality = loss_gradients(method, batch)
    method(batch).loss.backward()
    whole = torch.cat([weight.grad.flatten() for weight in method.encoder.parameters()])
    assert quality.norm() > 0 and softmax.norm() > 0
    torch.testing.assert_close(softmax + 3.0 * quality, whole, rtol=1e-3, atol=1e-5 * float(whole.norm()))


def test_each_kept_checkpoint_is_read(run):
    (row,) = quality_pull(run, batches=2)
    assert row["step"] == 1 and row["lambda"] == 3.0
    low, high = row["cosine_range"]
    assert -1 <= low <= row["cosine"] <= high <= 1 and row["length"] > 0
    # One step has not taught it to draw: a batch's mean image is nearer.
    assert row["reconstruction"] > row["mean_image"] > 0
    assert quality_pull(run, batches=2) == [row]


def test_a_method_without_a_quality_loss_is_refused(tmp_path):
    plain = {**RECIPE, "stages": [{"name": "one", "method": "classify", "steps": 1}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(UsageError, match="method classify"):
        quality_pull(tmp_path)
