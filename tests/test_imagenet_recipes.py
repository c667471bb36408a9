"""The ImageNet recipes: the paper's schedule, any network, and whole runs of them on a few small pictures."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import killed_at
from torchvision import models

from lrface import recipes
from lrface.benchmarks.robustness import class_subset, imagenet_classes
from lrface.embed import load_embedder
from lrface.errors import LrfaceError, UsageError
from lrface.methods import QualNet
from lrface.models import build_backbone, build_decoder_for
from lrface.models.irevnet import IRevNetInverse
from lrface.models.library import TorchvisionBackbone
from lrface.recipes import build_method, load_recipe, run_recipe, shipped_recipes, stage_settings
from lrface.robustness import run_robustness
from lrface.train.checkpoint import load_model, load_parts, load_training_state

NAMES = [
    "imagenet/irevnet300",
    "imagenet/vanilla_resnet50",
    "imagenet/naive_resnet50",
    "imagenet/qualnet_resnet50",
    "imagenet/qualnet_finetuned_resnet50",
    "imagenet200/naive",
    "imagenet200/end_to_end",
    "imagenet200/two_stages",
    "imagenet200/qualnet",
]
CLASSES = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331"]
SMALL_INVERTIBLE = (
    "{name: irevnet, blocks: [1, 1, 1, 1], strides: [2, 2, 2, 2], channels: [24, 96, 384, 1536], down_sampling: 2, "
    "input_size: 64, bottleneck: 64}"
)
# timm has a ResNet for tests; without timm, the same is seen with one thirty times as large.
TINY = "timm, model: test_resnet" if importlib.util.find_spec("timm") else "resnet18"
SMALL = [
    "data.batch_size=6",
    "data.workers=0",
    "backbone={name: resnet18, stem: quality, input_size: 64}",
    "trainer.checkpoint_every=2",
    "trainer.tensorboard=false",
    "trainer.device=cpu",
    "trainer.precision=float32",
    "trainer.threads=1",
]
INVERTIBLE = [
    f"backbone={{name: {TINY}, stem: quality, input_size: 64}}",
    f"decoder.network={SMALL_INVERTIBLE}",
    f"stages.invertible.backbone={SMALL_INVERTIBLE}",
]


def steps(count: int, *stages: str) -> list[str]:
    return [f"stages.{stage}.{entry}" for stage in stages for entry in (f"steps={count}", "epochs=null")]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """imagenet/train with three JPEGs of several sizes in each of six classes."""
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(CLASSES):
        place = root / "imagenet" / "train" / name
        place.mkdir(parents=True)
        for image in range(3):
            random = np.random.default_rng(10 * number + image)
            coarse = random.integers(0, 256, (5, 5, 3)).astype(np.uint8)
            size = tuple(int(side) for side in random.integers(50, 200, 2))
            Image.fromarray(coarse).resize(size).save(place / f"{name}_{image}.JPEG")
    return root


@pytest.fixture
def three(tmp_path) -> str:
    """A file that names three of the classes."""
    (tmp_path / "three.txt").write_text("\n".join(CLASSES[1::2]))
    return f"data.classes_subset={tmp_path / 'three.txt'}"


# ------------------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_schedule(name):
    recipe = load_recipe(name)
    assert recipe.data.batch_size == 256 and recipe.data.crop.name == "random_resized"
    assert (recipe.data.classes_subset == "imagenet200") == name.startswith("imagenet200")
    whole = [stage for stage in recipe.stages if stage.epochs == 90]
    assert len(whole) == len(recipe.stages) - ("finetuned" in name)
    for stage in whole:
        optimiser, schedule = stage_settings(stage)
        assert (optimiser.momentum, optimiser.weight_decay, optimiser.decay_norms) == (0.9, 1e-4, True)
        schedule = schedule.in_steps(5004)
        rates = [
            optimiser.learning_rate * schedule.factor(epoch * 5004 + offset, 90 * 5004)
            for epoch, offset in ((0, 0), (30, -1), (30, 0), (60, -1), (60, 0), (90, -1))
        ]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    for stage in recipe.stages:
        arguments = stage.degrade.arguments
        if stage.degrade.name == "corruptions":
            assert (arguments["set"], arguments["clean_share"]) == ("imagenet", 0.5)
        if stage.method.name == "qualnet":
            assert stage.method.arguments["quality_weight"] == (0.6 if "imagenet200" in name else 0.1)


def test_all_of_them_are_known_here():
    made = {name for name in shipped_recipes() if name.startswith(("imagenet/", "imagenet200/"))}
    assert set(NAMES) <= made
    assert {name for name in made if name.startswith("imagenet200/")} <= set(NAMES)


@pytest.mark.parametrize(
    "network, channels", [("resnet18", 512), ("resnet50", 2048), ("resnext101_32x8d", 2048)]
)
def test_any_network_stands_before_the_same_decoder(network, channels):
    recipe = load_recipe("imagenet/qualnet_resnet50", [f"backbone.name={network}"])
    with torch.device("meta"):
        method = build_method(recipe, recipe.stages[1], 1000)
        assert isinstance(method, QualNet) and isinstance(method.decoder, IRevNetInverse)
        encoder = method.encoder
        assert isinstance(encoder, TorchvisionBackbone) and encoder.stem == "quality"
        assert (encoder.feature_channels, encoder.feature_size) == (channels, 7)
        drawn = method.decoder.connector(torch.empty(2, channels, 7, 7))
    assert drawn.shape == (2, 3072, 7, 7)
    assert not any(parameter.requires_grad for parameter in method.decoder.network.parameters())


@pytest.mark.parametrize("depth", [45, 78, 150, 450])
def test_the_depths_of_table_c3(depth):
    name = f"irevnet{depth}"
    recipe = load_recipe(
        "imagenet/qualnet_resnet50", [f"decoder.network={name}", f"stages.invertible.backbone={name}"]
    )
    with torch.device("meta"):
        built = [build_method(recipe, stage, 10) for stage in recipe.stages]
    recipes.check_loads(recipe, built)
    assert len(built[0].encoder.body) * 3 == depth


def test_an_inverse_of_other_images_is_refused_with_its_numbers():
    with torch.device("meta"):
        encoder = build_backbone("resnet50", stem="quality")
        with pytest.raises(
            UsageError, match="draws images of 192 x 192 pixels, the classifier takes 224 x 224"
        ):
            build_decoder_for(encoder, "irevnet_inverse", network={"name": "irevnet300", "input_size": 192})
        # VGG ends at 7 x 7 too; a map of 14 x 14 is larger than that of any i-RevNet named here.
        larger = build_backbone("torchvision", model="vgg11")
        larger.feature_size = 14
        with pytest.raises(
            UsageError, match="has 7 x 7 pixels, the classifier's 14 x 14; the first must be 1, 2, 4"
        ):
            build_decoder_for(larger, "irevnet_inverse", network="irevnet300")


# ----------------------------------------------------------------------------------------------------- the inverse


def test_gradients_pass_the_frozen_inverse_and_no_activations_stay():
    """What autograd keeps of the decoder is its feature map, its image and weights, whatever its depth; and a bit for each
    value of a ReLU."""
    torch.manual_seed(0)
    encoder = build_backbone("torchvision", model="regnet_x_400mf", input_size=64)
    kept: dict[int, int] = {}
    bits: dict[int, int] = {}
    for blocks in (1, 4):
        network = {
            "name": "irevnet",
            "blocks": [blocks] * 4,
            "strides": [2] * 4,
            "channels": [24, 96, 384, 1536],
        }
        network |= {"down_sampling": 2, "input_size": 64, "bottleneck": 64}
        decoder = build_decoder_for(encoder, "irevnet_inverse", network=network)
        weights = {value.data_ptr() for value in decoder.state_dict().values()}
        feature_map = torch.rand(2, encoder.feature_channels, 2, 2, requires_grad=True)
        held: list[int] = []
        masks: list[int] = []

        def pack(
            tensor: torch.Tensor,
            held: list[int] = held,
            masks: list[int] = masks,
            weights: set[int] = weights,
        ) -> torch.Tensor:
            if tensor.dtype == torch.uint8:
                masks.append(8 * tensor.untyped_storage().nbytes())
            elif tensor.data_ptr() not in weights:
                held.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            drawn = decoder(feature_map)
        kept[blocks], bits[blocks] = sum(held), sum(masks)
        drawn.square().sum().backward()
        assert feature_map.grad is not None and bool((feature_map.grad != 0).any())
        assert all(parameter.grad is None for parameter in decoder.network.parameters())
        assert decoder.connector[0].weight.grad is not None
    assert kept[4] == kept[1] > 0
    assert bits[4] > bits[1] > 0


# ------------------------------------------------------------------------------------------------------ whole runs


def run(name: str, data: Path, out: Path, *overrides: str, say=lambda line: None) -> recipes.RunSummary:
    recipe = load_recipe(name, [*SMALL, f"out={out}", *overrides])
    return run_recipe(recipe, data=data, show_progress=False, say=say)


def test_qualnet_from_crops_of_a_subset_and_a_killed_run_comes_to_the_same_bits(
    data, three, tmp_path, monkeypatch
):
    overrides = [*INVERTIBLE, *steps(4, "invertible", "quality"), three]
    summary = run("imagenet200/qualnet", data, tmp_path / "whole", *overrides)
    assert (summary.images, summary.identities) == (9, 3)
    for batch in (3, 2):
        with killed_at(batch, monkeypatch):
            run("imagenet200/qualnet", data, tmp_path / "killed", *overrides)
    # Another number of workers changes nothing.
    run("imagenet200/qualnet", data, tmp_path / "killed", *overrides, "data.workers=1")
    for stage in ("1-invertible", "2-quality"):
        one, other = (tmp_path / run / "stages" / stage / "step-00000004" for run in ("whole", "killed"))
        for key, value in load_parts(one).items():
            assert torch.equal(value, load_parts(other)[key]), key
        ours, theirs = load_training_state(one), load_training_state(other)
        assert ours.step == theirs.step == 4
    _, card = load_model(tmp_path / "whole")
    assert card["training"]["classes"] == CLASSES[1::2]
    assert card["architecture"]["arguments"].items() >= {"stem": "quality", "input_size": 64}.items()


def test_the_inverse_is_not_moved_and_the_run_is_judged_on_corruptions(data, three, tmp_path):
    out = tmp_path / "run"
    run("imagenet200/qualnet", data, out, *INVERTIBLE, *steps(2, "invertible", "quality"), three)
    first, second = (
        load_parts(out / "stages" / name / "step-00000002") for name in ("1-invertible", "2-quality")
    )
    network = {
        key.removeprefix("encoder."): value for key, value in first.items() if key.startswith("encoder.")
    }
    for key, value in network.items():
        assert torch.equal(value, second[f"decoder.network.{key}"]), key

    # Tiny-ImageNet-C has images of this size; their classes are found by name.
    clean = tmp_path / "clean"
    for name in CLASSES:
        (clean / name).mkdir(parents=True)
        for file in (data / "imagenet" / "train" / name).iterdir():
            Image.open(file).resize((64, 64)).save(clean / name / f"{file.stem}.png")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES[1::2]))
    judged = run_robustness(
        [str(out)],
        "tiny_imagenet_c",
        clean,
        corruptions=["contrast"],
        severities=[5],
        classes=str(tmp_path / "names.txt"),
        device="cpu",
        show_progress=False,
    )
    assert judged.about["images"] == 9 and judged.about["classes"] == 3
    assert 0 <= judged.results[0]["clean_error"] <= 100
    embedder = load_embedder(out, device="cpu")
    assert embedder.embedding_size == load_model(out)[0].embedding_size


def test_a_run_from_a_published_file_needs_it_once(data, tmp_path, monkeypatch):
    torch.manual_seed(0)
    network = models.resnet18(num_classes=6)
    file = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), file)
    overrides = [*steps(4, "naive"), f"backbone.weights={file}", "stages.naive.optimiser.learning_rate=0"]
    said: list[str] = []
    with killed_at(3, monkeypatch):
        run("imagenet/naive_resnet50", data, tmp_path / "run", *overrides, say=said.append)
    assert any("encoder starts from" in line and "fills the head" in line for line in said)
    file.unlink()
    said.clear()
    run("imagenet/naive_resnet50", data, tmp_path / "run", *overrides, say=said.append)
    assert not any("starts from" in line for line in said) and any("resumes" in line for line in said)
    encoder, _ = load_model(tmp_path / "run")
    # With a learning rate of 0 the weights are still those of the file.
    assert torch.equal(encoder.body.conv1.weight, network.conv1.weight)
    head = load_parts(tmp_path / "run" / "stages" / "1-naive" / "step-00000004")["head.linear.weight"]
    assert torch.equal(head, network.fc.weight)
    with pytest.raises(LrfaceError, match="resnet18.pth: no such file"):
        run("imagenet/naive_resnet50", data, tmp_path / "again", *overrides)


@pytest.mark.parametrize("model", ["resnet10t", "convnext_atto"])
def test_timms_networks_train_and_are_embedders(model, data, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed: pip install 'lrface[timm]'")
    network = f"backbone={{name: timm, model: {model}, input_size: 64}}"
    run("imagenet/vanilla_resnet50", data, tmp_path / "run", network, *steps(2, "vanilla"))
    encoder, card = load_model(tmp_path / "run")
    assert card["architecture"]["arguments"]["model"] == model
    with torch.no_grad():
        assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, encoder.embedding_size)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.cache=true", "data.crop cuts them anew each time: set data.cache to false"),
        (
            "data.classes_subset=imagenet200",
            r"lacks 19\d of the 200 classes of data.classes_subset=imagenet200",
        ),
        (
            "data.classes_subset=imagenet20",
            "data.classes_subset imagenet20: neither imagenet100, imagenet100b, imagenet200 nor a file",
        ),
        ("data.crop=random_resize", r"unknown data.crop 'random_resize' \(did you mean 'random_resized'\?\)"),
        ("data.crop.scale=[0.5]", "data.crop.scale must be two numbers in order"),
    ],
)
def test_what_does_not_fit(override, message, data, tmp_path):
    with pytest.raises(LrfaceError, match=message):
        run("imagenet/vanilla_resnet50", data, tmp_path / "run", *steps(2, "vanilla"), override)


def test_the_200_classes_are_imagenets():
    names = class_subset("imagenet200")
    assert len(set(names)) == 200 and set(names) <= set(imagenet_classes())
