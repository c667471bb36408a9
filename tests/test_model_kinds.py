"""How models of others are named and described, module:function, and the quality of faces."""

import json
import shutil

import cv2
import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lrface import load_embedder
from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.packs import write_pack
from lrface.benchmarks.verification import VerificationSet, evaluate_verification
from lrface.calibrate import calibrate
from lrface.cli import app
from lrface.data.synthetic import SyntheticFaces, verification_pairs
from lrface.degrade.resolution import resample
from lrface.embed import described_beside, open_model, parse_model
from lrface.errors import LrfaceError, UsageError
from lrface.evaluation import feature_stores, verify_models
from lrface.recipes import load_recipe, run_recipe
from lrface.train.checkpoint import load_model, load_parts


@pytest.fixture
def net(pooled_model, tmp_path):
    return shutil.copy(pooled_model, tmp_path / "net.onnx")


@pytest.fixture
def images():
    return torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))


def picture(seed, size=112):
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture
def pack(tmp_path):
    """20 pairs of pictures, as a verification pack."""
    files = [
        cv2.imencode(".png", picture(number // 2 if number % 4 < 2 else number))[1].tobytes()
        for number in range(40)
    ]
    write_pack(tmp_path / "pictures.bin", files, [number % 2 == 0 for number in range(20)])
    return tmp_path / "pictures.bin"


# ---------------------------------------------------------------------------------------------------- describing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/net.onnx", ("a/net.onnx", {})),
        ("net.onnx@colour=BGR", ("net.onnx", {"colour": "BGR"})),
        (
            "a@b/net.onnx@colour=RGB,mean=0.5,std=1/255,output=fc1",
            ("a@b/net.onnx", {"colour": "RGB", "mean": 0.5, "std": 1 / 255, "output": "fc1"}),
        ),
        ("n.pt2@mean=0.4:0.5:0.6", ("n.pt2", {"mean": [0.4, 0.5, 0.6]})),
        ("me@home/run", ("me@home/run", {})),
    ],
)
def test_models_on_command_lines(text, expected):
    assert parse_model(text) == expected


@pytest.mark.parametrize("tail", ["color=BGR", "mean=x", "std=1/0", "colour=BGR,colour=RGB", "mean=1,"])
def test_wrong_descriptions_name_the_part(tail):
    with pytest.raises(UsageError, match=f"net.onnx@{tail}"):
        parse_model(f"net.onnx@{tail}")


def test_a_file_may_have_such_a_name(net, tmp_path):
    odd = tmp_path / "x@colour=BGR"
    odd.write_bytes(b"")
    assert parse_model(str(odd)) == (str(odd), {})


def test_options_and_a_card_beside_say_the_same(net, images):
    by_option = open_model(f"{net}@colour=BGR,mean=0.5,std=0.5")
    described_beside(net).write_text('{"colour": "BGR", "mean": 0.5, "std": 0.5}')
    beside = load_embedder(net)
    assert beside.card["described_by"] == "card beside" and by_option.card["described_by"] == "options"
    assert torch.equal(beside.embed_tensor(images), by_option.embed_tensor(images))
    described_beside(net).unlink()
    plain = load_embedder(net)
    expected = plain.embed_tensor(((images.flip(1) - 0.5) / 0.5).contiguous())
    torch.testing.assert_close(by_option.embed_tensor(images), expected)


def test_card_beside_and_options_do_not_both_count(net):
    described_beside(net).write_text('{"colour": "BGR"}')
    with pytest.raises(UsageError, match=r"net.onnx.json says what net.onnx takes .* leave out mean"):
        load_embedder(net, mean=0.5)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"color": "BGR"}', "unknown field 'color'"),
        ('{"mean": 0.5}', "field 'colour' is missing"),
        ('{"colour": "bgr"}', "colour must be RGB or BGR; found 'bgr'"),
        ('{"colour": "BGR", "std": 0}', "std must not be 0"),
        ('{"colour": "BGR", "mean": "half"}', "net.onnx.json"),
        ('{"colour": "BGR", "mean": null}', "net.onnx.json"),
        ('{"colour": "BGR", "output": 1}', "output must be the name"),
        ("[]", "must hold a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_a_broken_card_beside_is_named(net, content, says):
    described_beside(net).write_text(content)
    with pytest.raises(LrfaceError, match=says):
        load_embedder(net)


def test_of_two_outputs_each_has_its_own_features(net, tmp_path):
    model = onnx.load(net)
    model.graph.node.append(onnx.helper.make_node("Neg", ["embedding"], ["opposite"]))
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("opposite", onnx.TensorProto.FLOAT, ("n", 147))
    )
    onnx.save(model, net)
    cards = [open_model(f"{net}@output={name}").card for name in ("embedding", "opposite")]
    assert cards[0] != cards[1]  # features are kept by card


def test_verify_says_what_it_assumes_and_keeps_quiet_otherwise(net, pack, tmp_path, monkeypatch):
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    arguments = ["verify", "--benchmark", str(pack), "--resolutions", "112", "--json", "--model"]
    assumed = CliRunner().invoke(app, [*arguments, str(net)])
    assert assumed.exit_code == 0, assumed.output
    notes = [line for line in assumed.stderr.splitlines() if "assumed" in line]
    assert len(notes) == 1 and "RGB in [0, 1]" in notes[0] and f"{net}@colour=BGR" in notes[0]
    said = CliRunner().invoke(app, [*arguments, f"{net}@colour=RGB"])
    assert said.exit_code == 0 and "assumed" not in said.stderr
    figures = [json.loads(each.stdout)["results"][0]["accuracy"] for each in (assumed, said)]
    assert figures[0] == figures[1]


# ------------------------------------------------------------------------------------------------ module:function


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current directory, which uses another one beside it."""
    (tmp_path / "own_helper_of_test.py").write_text("SIDE = 16\n")
    (tmp_path / "own_network_of_test.py").write_text(
        "import torch\n"
        "from own_helper_of_test import SIDE\n"
        "def pooled():\n"
        "    return lambda images: torch.nn.functional.avg_pool2d(images - 0.5, SIDE).flatten(1)\n"
        "def small():\n"
        "    network = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Flatten())\n"
        "    network.input_size = 28\n"
        "    return network\n"
        "def nothing(): return 3\n"
        "def flat(): return lambda images: images\n"
        "def fails(): return lambda images: 1 / 0\n"
        "def listed(): return lambda images: [1]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path / "cache"))
    return "own_network_of_test"


def test_a_function_of_the_users(module, images, net, pack, tmp_path):
    import sys

    before = list(sys.path)
    embedder = load_embedder(f"{module}:pooled")
    assert sys.path == before
    torch.testing.assert_close(embedder.embed_tensor(images), load_embedder(net).embed_tensor(images))
    import hashlib

    source = tmp_path / f"{module}.py"
    assert embedder.model_sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert embedder.card["described_by"] == "module:function" and embedder.embedding_size == 147
    # what its features depend on is not known, so they are not kept
    assert feature_stores(embedder, tmp_path) is None
    run = verify_models([f"{module}:pooled", str(net)], [str(pack)], (112, 28), show_progress=False)
    first, second = ([r["accuracy"] for r in run.rows if r["model"] == m] for m in run.areas)
    assert first == second
    calibrate(f"{module}:pooled", str(pack), 0.2, (112,), show_progress=False)
    assert "thresholds" in load_embedder(f"{module}:pooled").card
    assert (tmp_path / f"{module}.py.pooled.thresholds.json").is_file()
    small = load_embedder(f"{module}:small")
    assert small.input_size == 28 and "thresholds" not in small.card
    assert torch.equal(small.embed_tensor(torch.ones(1, 3, 28, 28)), torch.ones(1, 2352))  # no dropout


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("absent", "AttributeError"),
        ("nothing", "found int"),
        ("flat", r"has shape \[1, 3, 112, 112\]"),
        ("fails", "ZeroDivisionError"),
        ("listed", "gives list"),
    ],
)
def test_functions_that_give_no_network(module, function, says):
    with pytest.raises(LrfaceError, match=f"{module}:{function}.*{says}"):
        load_embedder(f"{module}:{function}")


def test_modules_that_are_not_there(module):
    with pytest.raises(LrfaceError, match="No module named 'nowhere_at_all'"):
        load_embedder("nowhere_at_all:make")
    with pytest.raises(UsageError, match="mean describes"):
        load_embedder(f"{module}:pooled", mean=0.5)
    with pytest.raises(UsageError, match="bfloat16 is for safetensors"):
        load_embedder(f"{module}:pooled", precision="bfloat16")


# ----------------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize("flip", [False, True])
def test_quality_is_the_length_of_the_feature(net, flip):
    embedder = load_embedder(net)
    pictures = [picture(seed) for seed in range(5)]
    found = embedder.embed(pictures, flip=flip)
    tensors = torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pictures])
    raw = embedder.embed_tensor(tensors)
    if flip:
        raw = raw + embedder.embed_tensor(tensors.flip(3).contiguous())
    assert found.quality.dtype == np.float32 and found.reconstruction_error is None
    np.testing.assert_allclose(found.quality, raw.norm(dim=1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.vectors * found.quality[:, None], raw.numpy(), atol=1e-5)
    assert embedder.embed([]).quality.shape == (0,)


RUN = [
    "data.synthetic.identities=4",
    "data.synthetic.images_per_identity=4",
    "data.batch_size=8",
    "data.workers=0",
    "backbone.name=ir18",
    "backbone.width=8",
    "backbone.embedding_size=16",
    "decoder.width=8",
    "trainer.device=cpu",
    "trainer.compile=false",
    "trainer.tensorboard=false",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of QualNet and one without a decoder, of two steps a stage."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("qualnet_lm", "naive"):
        stages = range(len(load_recipe(f"demo/{name}").stages))
        overrides = [f"out={folder / name}", *RUN]
        overrides += [f"stages.{n}.{key}" for n in stages for key in ("epochs=1", "schedule.warmup_steps=0")]
        recipe = load_recipe(f"demo/{name}", overrides)
        run_recipe(recipe, show_progress=False, say=lambda message: None)
    return folder


def test_reconstruction_error_by_the_decoder_of_the_run(runs, tmp_path):
    from lrface.models import build_decoder

    embedder = load_embedder(runs / "qualnet_lm", quality="reconstruction")
    pictures = [picture(seed) for seed in range(20)]
    found = embedder.embed(pictures, flip=True, batch_size=7)
    encoder, _ = load_model(runs / "qualnet_lm")
    (last,) = (runs / "qualnet_lm" / "stages").glob("2-*/step-*2")
    parts = load_parts(last)
    decoder = build_decoder("subpixel", encoder.feature_channels, width=8).eval()
    decoder.load_state_dict(
        {key.removeprefix("decoder."): v for key, v in parts.items() if key.startswith("decoder.")}
    )
    tensors = torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pictures])
    with torch.inference_mode():
        drawn = decoder(encoder.features(tensors)).clamp(0, 1)
    expected = (drawn - tensors).abs().mean(dim=(1, 2, 3))
    assert found.reconstruction_error.dtype == np.float32
    np.testing.assert_allclose(found.reconstruction_error, expected.numpy(), atol=1e-5)
    plain = load_embedder(runs / "qualnet_lm").embed(pictures, flip=True)
    np.testing.assert_allclose(found.vectors, plain.vectors, atol=1e-5)
    np.testing.assert_allclose(found.quality, plain.quality, rtol=1e-4)
    assert embedder.embed([]).reconstruction_error.shape == (0,)

    for number in range(3):
        Image.fromarray(pictures[number]).save(tmp_path / f"{number}.png")
    arguments = ["embed", str(tmp_path), "--model", str(runs / "qualnet_lm"), "--flip", "--device", "cpu"]
    for out, more in (("with.parquet", ["--quality", "reconstruction"]), ("without.parquet", [])):
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / out), *more])
        assert done.exit_code == 0, done.output
        table = pq.read_table(tmp_path / out)
        np.testing.assert_allclose(table["quality"].to_numpy(), found.quality[:3], rtol=1e-4)
        assert ("reconstruction_error" in table.column_names) == bool(more)
        if more:
            column = table["reconstruction_error"].to_numpy()
            np.testing.assert_allclose(column, found.reconstruction_error[:3], atol=1e-5)
    done = CliRunner().invoke(
        app, [*arguments, "--out", str(tmp_path / "all.npz"), "--quality", "reconstruction"]
    )
    assert done.exit_code == 0
    with np.load(tmp_path / "all.npz", allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["reconstruction_error"], found.reconstruction_error[:3], atol=1e-5)
        np.testing.assert_allclose(arrays["quality"], found.quality[:3], rtol=1e-4)


def test_where_there_is_no_decoder(runs, net, tmp_path):
    with pytest.raises(LrfaceError, match="has no decoder; a reconstruction error needs"):
        load_embedder(runs / "naive", quality="reconstruction")
    with pytest.raises(UsageError, match="net.onnx is no such run"):
        load_embedder(net, quality="reconstruction")
    with pytest.raises(UsageError, match="quality must be one of norm, reconstruction"):
        load_embedder(net, quality="sharpness")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("model.safetensors", "model.json"):
        shutil.copy(runs / "qualnet_lm" / name, alone)
    with pytest.raises(LrfaceError, match=r"no checkpoints in .*alone/stages"):
        load_embedder(alone, quality="reconstruction")
    # checkpoints of another run
    shutil.copytree(runs / "qualnet_lm" / "stages", alone / "stages")
    (last,) = (alone / "stages").glob("2-*/step-*2")
    card = json.loads((last / "model.json").read_text())
    (last / "model.json").write_text(json.dumps({**card, "weights_sha256": "0" * 64}))
    with pytest.raises(LrfaceError, match="a checkpoint of another model"):
        load_embedder(alone, quality="reconstruction")


def test_verification_refuses_pairs_by_reconstruction_error(runs, tmp_path, monkeypatch):
    """The curve on the page is that of errors measured image by image at each size."""
    monkeypatch.setenv("LRFACE_CACHE", str(tmp_path))
    faces = SyntheticFaces(8, 3)
    left, right, same = verification_pairs(faces, 24)
    benchmark = VerificationSet.from_source(faces, left, right, same, "drawn")
    embedder = load_embedder(runs / "qualnet_lm", quality="reconstruction")
    found = evaluate_verification(
        embedder.embed_tensor,
        benchmark,
        (112, 28),
        progress=False,
        reconstruction_errors=embedder.reconstruction_errors,
    )
    small = found.errors[Condition(size=28)]
    tensors = resample(torch.from_numpy(benchmark.images).permute(0, 3, 1, 2).float() / 255, 28)
    with torch.inference_mode():
        drawn = embedder._network.decoder(embedder._network._encoder.features(tensors)).clamp(0, 1)
    np.testing.assert_allclose(small, (drawn - tensors).abs().mean(dim=(1, 2, 3)).numpy(), atol=1e-5)
    pack = tmp_path / "drawn.bin"
    images = [
        cv2.imencode(".png", benchmark.images[index][..., ::-1])[1].tobytes()
        for pair in zip(benchmark.left, benchmark.right, strict=True)
        for index in pair
    ]
    write_pack(pack, images, benchmark.same)
    command = [
        "verify",
        "--model",
        str(runs / "qualnet_lm"),
        "--benchmark",
        str(pack),
        "--resolutions",
        "112,28",
    ]
    command += ["--quality", "reconstruction", "--report", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert "error against refusal, feature length" in page and "error against refusal, reconstruction" in page
    with pytest.raises(UsageError, match="quality"):
        load_embedder(runs / "qualnet_lm").reconstruction_errors(tensors)
