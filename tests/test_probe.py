"""Linear probes of networks on degraded images: against plain loops, against scikit-learn, and through the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from lrface import probe
from lrface.cli import app
from lrface.errors import LrfaceError, UsageError
from lrface.models import build_backbone
from lrface.probe import (
    Operator,
    ProbeSettings,
    classification_figures,
    directions,
    draw,
    fit_linear,
    is_fixed,
    label_rows,
    parse_relabel,
    prepare_image,
    run_probe,
    summarised,
)
from lrface.train.checkpoint import make_card, save_model

MODULE = '''
import torch

class Means:
    """Means of four by four pixels."""
    input_size = 16
    def __init__(self, factor=1.0, width=4):
        self.factor, self.width = factor, width
    def __call__(self, images):
        found = torch.nn.functional.adaptive_avg_pool2d(images - 0.5, self.width).flatten(1)
        return self.factor * torch.cat([found, torch.ones(len(found), 1)], dim=1)

class Head(Means):
    """Red, green and blue as classes, by the most of it."""
    def __call__(self, images):
        return images.mean(dim=(2, 3))

class Large(Means):
    input_size = 32

def means(): return Means()
def louder(): return Means(50.0)
def narrow(): return Means(width=2)
def large(): return Large()
def broken(): return Means(float("nan"))
def head(): return Head()
def named():
    made = Head()
    made.classes = ["red", "green", "blue"]
    return made
'''
COLOURS = {"red": (180, 90, 90), "green": (90, 180, 90), "blue": (90, 90, 180)}


def paint(folder: Path, name: str, colour, count: int, seed: int) -> None:
    (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = np.array(colour) + rng.normal(0, 45, 3) + rng.normal(0, 20, (16, 16, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name / f"{number:02d}.png")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Three colours, 40 training and 12 test images each; test images have a fourth class in another folder."""
    (tmp_path / "probe_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    for number, (name, colour) in enumerate(COLOURS.items()):
        paint(tmp_path / "train", name, colour, 40, number)
        paint(tmp_path / "test", name, colour, 12, 10 + number)
        paint(tmp_path / "shifted", f"dark {name}", np.array(colour) // 2 + 30, 8, 20 + number)
    return tmp_path


MEANS = "means=probe_models:means"
NOISE = "{name: gaussian_noise, sigma: 0.3}"


def run(models=(MEANS,), train="train", test="test", **options):
    given = {"seeds": 2, "show_progress": False, "device": "cpu", "degrade": NOISE, **options}
    return run_probe(models, train, test, **given)


# ------------------------------------------------------------------------------------------------------------- parts


def test_the_area_is_that_of_scikit_learn():
    from scipy.special import softmax
    from sklearn.metrics import roc_auc_score, top_k_accuracy_score

    rng = np.random.default_rng(0)
    for classes in (3, 7):
        labels = rng.integers(classes, size=200)
        scores = np.round(rng.normal(size=(200, classes)) + np.eye(classes)[labels], 1).astype(np.float32)
        found = classification_figures(scores, labels)
        shares = softmax(scores.astype(np.float64), axis=1)
        assert found["auc"] == pytest.approx(
            roc_auc_score(labels, shares, multi_class="ovr", average="macro"), abs=1e-12
        )
        expected = 100 * top_k_accuracy_score(labels, scores, k=5) if classes > 5 else None
        assert found["top5"] == (expected if expected is None else pytest.approx(expected, abs=0.51))
    labels, scores = rng.integers(2, size=80), rng.normal(size=(80, 2))
    two = classification_figures(scores, labels)
    assert two["auc"] == pytest.approx(roc_auc_score(labels, scores[:, 1] - scores[:, 0]), abs=1e-12)
    assert two["top1"] == pytest.approx(100 * np.mean(scores.argmax(axis=1) == labels))


def test_classes_without_images_do_not_count_for_the_area():
    scores = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [1.0, 0.0, 3.0]])
    assert classification_figures(scores, np.array([0, 1, 1]))["auc"] == pytest.approx((1.0 + 0.5) / 2)
    assert classification_figures(scores, np.array([1, 1, 1]))["auc"] is None


def test_mean_and_standard_error():
    found = summarised([70.0, 72.0, 74.0])
    assert found["mean"] == 72 and found["standard_error"] == pytest.approx(2 / math.sqrt(3), abs=1e-6)
    assert summarised([5.0])["standard_error"] is None
    assert summarised([None]) == {"mean": None, "standard_error": None, "values": []}


@pytest.mark.parametrize("few", [False, True])
def test_the_probe_is_a_plain_loop(few):
    rng = np.random.default_rng(1)
    views = [directions(rng.normal(size=(50, 6)).astype(np.float32)) for _ in range(2)]
    labels = torch.from_numpy(rng.integers(3, size=50))
    settings = ProbeSettings(epochs=3, batch_size=16, few_batch_size=4)
    found = fit_linear(views, labels, 3, settings, few, seed=7)

    state = torch.get_rng_state()
    torch.manual_seed(7)
    layer = nn.Linear(6, 3)
    torch.set_rng_state(state)
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    order = torch.Generator().manual_seed(7)
    size = 4 if few else 16
    for epoch in range(3):
        places = torch.randperm(50, generator=order)
        for start in range(0, 50, size):
            rows = places[start : start + size]
            scores = views[epoch % 2][rows] @ layer.weight.T + layer.bias
            loss = -torch.log_softmax(scores, dim=1)[torch.arange(len(rows)), labels[rows]].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.testing.assert_close(found.weight, layer.weight.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.bias, layer.bias.detach(), atol=1e-6, rtol=1e-5)


def test_features_have_the_length_of_their_width():
    found = directions(np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], np.float32))
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]) * math.sqrt(2)
    torch.testing.assert_close(found, expected)


def test_shares_of_labels_are_balanced_and_nested():
    labels = np.repeat([4, 7, 9], [100, 200, 30])
    sets = {share: label_rows(labels, share, seed=0) for share in (0.01, 0.1, 0.5, 1.0)}
    assert np.bincount(labels[sets[0.1]], minlength=10)[[4, 7, 9]].tolist() == [10, 20, 3]
    assert np.bincount(labels[sets[0.01]], minlength=10)[[4, 7, 9]].tolist() == [1, 2, 1]
    assert set(sets[0.01]) < set(sets[0.1]) < set(sets[0.5]) < set(sets[1.0])
    assert sets[1.0].tolist() == list(range(330))
    assert sets[0.1].tolist() != label_rows(labels, 0.1, seed=1).tolist()


def test_images_come_to_size_as_in_the_paper():
    rng = np.random.default_rng(0)
    own = rng.integers(256, size=(16, 16, 3)).astype(np.uint8)
    assert prepare_image(own, 16) is own
    assert prepare_image(own[:8, :8], 16).shape == prepare_image(own[..., 0], 16).shape == (16, 16, 3)
    # Larger: the shorter side to 8/7, and the middle, as torchvision does it.
    from torchvision.transforms.functional import center_crop, resize

    large = rng.integers(256, size=(300, 500, 3)).astype(np.uint8)
    expected = np.asarray(center_crop(resize(Image.fromarray(large), [256]), [224, 224]))
    assert np.array_equal(prepare_image(large, 224), expected)


def test_operators_degrade_all_images_and_stay_in_place():
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    policy = Operator.parse("{name: gaussian_noise, sigma: 0.2, crop_padding: 2}").policy(training=False)
    degraded, clean = policy.apply(images, draw(policy, 40, 16, 0, 1))
    assert torch.equal(clean, images) and bool((degraded != images).flatten(1).any(dim=1).all())
    lesson = Operator.parse(NOISE).policy(training=True)
    framed = lesson.apply(images, draw(lesson, 40, 16, 0, 1))[1]
    assert not torch.equal(framed, images)  # some are mirrored
    half = Operator.parse("{name: gaussian_noise, clean_share: 0.5}").policy(training=False)
    assert (half.apply(images, draw(half, 40, 16, 3))[0] == images).flatten(1).all(dim=1).sum() == 20
    assert is_fixed(Operator.parse("clean").policy(training=False), 16)
    assert is_fixed(Operator.parse("{name: resolution, sizes: [8]}").policy(training=False), 16)
    assert not is_fixed(policy, 16)
    assert str(Operator.parse(NOISE)) == "gaussian_noise sigma=0.3"


# ----------------------------------------------------------------------------------------------------------- the run


def test_a_probe_by_hand(place):
    """Features, draws and figures of one probe, computed again without it."""
    found = run(
        degrade="clean", train_degrade="{name: clean, mirror: 0.0}", test_degrade=[NOISE], labels=[1.0]
    )

    def features(images):
        means = torch.nn.functional.adaptive_avg_pool2d(images - 0.5, 4).flatten(1)
        return directions(torch.cat([means, torch.ones(len(means), 1)], dim=1).numpy())

    def read(folder):
        files = sorted((place / folder).glob("*/*.png"))
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        labels = [sorted(COLOURS).index(file.parent.name) for file in files]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, np.array(labels)

    images, labels = read("train")
    layer = fit_linear([features(images)], torch.from_numpy(labels), 3, ProbeSettings(), False, 0)
    tests, answers = read("test")
    policy = Operator.parse(NOISE).policy(training=False)
    values = []
    for number in range(2):
        parameters = draw(policy, probe.CHUNK, 16, 0, 1, number, 0)
        noisy = policy.apply(
            torch.cat([tests, torch.zeros(probe.CHUNK - len(tests), 3, 16, 16)]), parameters
        )[0][: len(tests)]
        values.append(100 * float(np.mean(layer(features(noisy)).argmax(dim=1).numpy() == answers)))
    assert found.about["classes"] == sorted(COLOURS)
    assert found.results[0]["top1"]["values"] == pytest.approx(values, abs=1e-5)
    assert found.results[0]["training_images"] == 120 and found.about["images"] == {"train": 120, "test": 36}


def test_models_side_by_side_see_the_same_draws(place):
    """Scaling features changes nothing, and neither does a model beside."""
    alone = run()
    both = run([MEANS, "louder=probe_models:louder"])
    assert both.results[0] == alone.results[0]
    figures = [{name: result[name] for name in probe.FIGURES} for result in both.results]
    assert figures[0]["top1"] == figures[1]["top1"]
    assert 40 < figures[0]["top1"]["mean"] and figures[0]["auc"]["mean"] > 0.6
    assert figures[0]["top5"] == {"mean": None, "standard_error": None, "values": []}
    assert run().to_json() == alone.to_json() and run(seed=1).results != alone.results


def test_draws_do_not_depend_on_what_else_is_asked(place):
    """A share of the labels, and test images, see the same pixels whatever else is probed."""
    together = run(labels=[1.0, 0.25], test_degrade=["clean", NOISE])
    few = run(labels=[0.25], test_degrade=[NOISE])
    assert few.results[0] == next(
        result
        for result in together.results
        if result["labels"] == 0.25 and result["test_degrade"]["name"] == "gaussian_noise"
    )
    assert [result["training_images"] for result in together.results] == [120, 30, 120, 30]
    clean = together.results[0]
    assert len(clean["top1"]["values"]) == 1 and clean["top1"]["standard_error"] is None


def test_views_are_draws_of_their_own(place):
    assert run(views=3).results != run().results
    fixed = {"train_degrade": "{name: clean, mirror: 0.0}"}
    assert run(views=3, **fixed).results == run(**fixed).results


def test_a_classifier_of_another_network(place):
    models = [MEANS, "louder=probe_models:louder"]
    found = run(models, train_degrade="clean", classifier_of="means", labels=[1.0, 0.5])
    kinds = [(result["name"], result["classifier"], result["labels"]) for result in found.results]
    assert kinds[-2:] == [("louder", "means", 1.0), ("louder", "means", 0.5)] and len(kinds) == 6
    # The same directions: what the other's classifier makes of them is what it makes of its own.
    assert found.results[4]["top1"] == found.results[0]["top1"]
    with pytest.raises(UsageError, match="features of 49 numbers, narrow gives 13"):
        run([MEANS, "narrow=probe_models:narrow"], classifier_of="means")
    with pytest.raises(UsageError, match=r"no model is called 'mean' \(did you mean 'means'"):
        run(classifier_of="mean")


def test_an_own_head_is_judged_on_the_same_images(place):
    found = run(own_heads=["end=probe_models:named"], degrade="clean")
    head = found.results[0]
    files = sorted((place / "test").glob("*/*.png"))
    right = [
        np.asarray(Image.open(file)).mean(axis=(0, 1)).argmax() == list(COLOURS).index(file.parent.name)
        for file in files
    ]
    assert head["classifier"] == "own head" and head["labels"] is None and head["training_images"] is None
    assert head["top1"]["mean"] == pytest.approx(100 * np.mean(right), abs=1e-5)
    alone = run([], own_heads=["end=probe_models:named"], degrade="clean")
    assert alone.results == [head] and alone.about["images"]["train"] == 0
    # Outputs without names could be any order of classes with names.
    named = run([], own_heads=["probe_models:head"], degrade="clean")
    assert named.results[0]["name"] == "probe_models:head (own head)"


def test_label_shift(place):
    relabel = ",".join(f"dark {name}={name}" for name in ("red", "blue"))
    found = run(test="shifted", relabel=relabel, degrade="clean", own_heads=["end=probe_models:named"])
    assert found.about["images"]["test"] == 16 and found.about["relabel"]["dark red"] == "red"
    right = [
        np.asarray(Image.open(file)).mean(axis=(0, 1)).argmax() == list(COLOURS).index(name)
        for name in ("red", "blue")
        for file in sorted((place / "shifted" / f"dark {name}").glob("*.png"))
    ]
    assert found.results[0]["top1"]["mean"] == pytest.approx(100 * np.mean(right), abs=1e-5)
    assert 30 < found.results[1]["top1"]["mean"] < 100
    assert parse_relabel("imagenet100")["n07930864"] == "n03062245"
    with pytest.raises(
        UsageError, match="'dark blue' .did you mean 'blue'.., which train lacks: name the classes"
    ):
        run(test="shifted")
    with pytest.raises(UsageError, match=r"--relabel: the training data \(train\) has no class 'reed'"):
        run(test="shifted", relabel="dark red=reed")
    with pytest.raises(UsageError, match=r"shifted has no class 'red' \(did you mean 'dark red'"):
        run(test="shifted", relabel="red=red")
    with pytest.raises(UsageError, match="give imagenet100, or TEST CLASS=TRAINING CLASS"):
        run(test="shifted", relabel="red")


def test_only_some_classes_and_test_images(place):
    (place / "two.txt").write_text("red\nblue\n")
    found = run(classes="two.txt", images=10)
    assert found.about["classes"] == ["blue", "red"] and found.about["images"] == {"train": 80, "test": 10}
    with pytest.raises(UsageError, match="--classes: train has no class 'yellow'"):
        (place / "two.txt").write_text("red\nyellow\n")
        run(classes="two.txt")


def test_restored_images_are_probed_with_a_clean_classifier(place):
    noisy = run(train_degrade="clean")
    restored = run(restore="nlm")
    assert restored.about["train_degrade"] == {"name": "clean"} and restored.about["restore"] == {
        "name": "nlm"
    }
    assert restored.results[0]["top1"]["values"] != noisy.results[0]["top1"]["values"]
    short = run(restore="{name: deep_decoder, steps: 2, channels: 3}", images=6)
    assert len(short.results[0]["top1"]["values"]) == 2


# -------------------------------------------------------------------------------------------------------- the store


@pytest.fixture
def network(place) -> str:
    torch.manual_seed(0)
    encoder = build_backbone("cifar_resnet18", width=4)
    card = make_card({"name": "cifar_resnet18", "arguments": {"width": 4}}, encoder, {})
    save_model(place / "run", encoder, card)
    return f"ours={place / 'run'}"


def test_features_are_kept_by_what_they_are_made_from(place, network, monkeypatch):
    first = run([network], labels=[0.25])
    kept = sorted((place / "cache" / "probe").glob("*.npz"))
    assert len(kept) == 3  # one draw for training, two for tests
    passes = []
    original = probe._Extractor._pass

    def counted(self, *given):
        passes.append(given)
        return original(self, *given)

    monkeypatch.setattr(probe._Extractor, "_pass", counted)
    assert run([network], labels=[0.25]).to_json() == first.to_json() and not passes
    # One more draw alone is computed; another operator, another image, other weights are other features.
    run([network], labels=[0.25], seeds=3)
    assert len(passes) == 1 and len(passes[0][1]) == 1
    run([network], labels=[0.25], test_degrade=["clean"])
    assert len(passes) == 2
    file = next((place / "test").glob("*/*.png"))
    Image.fromarray(np.asarray(Image.open(file)) // 2).save(file)
    run([network], labels=[0.25])
    assert len(passes) == 3
    # A file that is damaged is computed again.
    for path in (place / "cache" / "probe").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    again = run([network], labels=[0.25])
    assert len(passes) == 5 and len(again.results) == 1
    before = set((place / "cache" / "probe").glob("*.npz"))
    run([network], labels=[0.25], seed=5, keep_features=False)
    assert set((place / "cache" / "probe").glob("*.npz")) == before


def test_functions_are_never_kept(place):
    run()
    assert not list((place / "cache").rglob("*.npz"))


def test_what_cannot_be_read_is_listed(place, network):
    (place / "train" / "red" / "05.png").write_bytes(b"no picture")
    (place / "test" / "blue" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for _ in range(2):  # computed, then kept
        found = run([network], seeds=1)
        assert found.about["images"] == {"train": 119, "test": 35}
        assert found.about["broken"]["training"][0][0] == "red/05.png"
        assert found.about["broken"]["test"][0][0] == "blue/03.png"
    assert "1 test images left out, the first: blue/03.png" in found.to_text()


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrade": "gausian_noise"}, r"unknown degrade 'gausian_noise' \(did you mean 'gaussian_noise'"),
        ({"degrade": "{name: gaussian_noise, sigm: 1}"}, "unknown key degrade.sigm"),
        ({"degrade": "{name: "}, "--degrade '{name: ': no valid YAML"),
        ({"test_degrade": ["[1]"]}, "--test-degrade .*give a name, or a mapping with a name"),
        ({"labels": [0.0]}, "--labels: shares must be above 0 and at most 1; found 0.0"),
        ({"labels": []}, "--labels: shares"),
        ({"seeds": 0}, "--seeds: at least 1 is needed; found 0"),
        ({"views": 0}, "--views: at least 1"),
        ({"restore": "nml"}, "unknown restore 'nml'"),
        ({"models": []}, "at least one --model or --own-head"),
        ({"models": [MEANS, "l=probe_models:large"]}, "images of 32x32 pixels, probe_models:means of 16x16"),
        ({"own_heads": ["means=probe_models:named"]}, "two models are called 'means'"),
        ({"image_set": "cifar"}, "--set"),
    ],
)
def test_mistakes_are_named(place, options, message):
    with pytest.raises(UsageError, match=message):
        run(**options)


def test_broken_networks_and_missing_data(place):
    with pytest.raises(LrfaceError, match="features are not finite"):
        run(["probe_models:broken"])
    with pytest.raises(LrfaceError, match="nowhere"):
        run(train="nowhere")


# -------------------------------------------------------------------------------------------------------- the command


def test_through_the_command(place, network):
    arguments = [
        "probe",
        "train",
        "test",
        "--model",
        MEANS,
        "--own-head",
        "end=probe_models:named",
        "--degrade",
        NOISE,
    ]
    arguments += ["--labels", "1.0,0.1", "--seeds", "3", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(r["name"], r["classifier"], r["labels"]) for r in found["results"]] == [
        ("end", "own head", None),
        ("means", "probe", 1.0),
        ("means", "probe", 0.1),
    ]
    assert all(len(result["top1"]["values"]) == 3 for result in found["results"])
    text = CliRunner().invoke(app, arguments)
    mean = found["results"][1]["top1"]["mean"]
    assert f"{mean:.2f} ±" in text.stdout and "gaussian_noise sigma=0.3" in text.stdout
    assert "mean and standard error over 3 draws" in text.stdout
    wrong = CliRunner().invoke(app, [*arguments, "--labels", "all"])
    assert wrong.exit_code == 2 and "--labels 'all': give shares with commas between" in wrong.stderr
