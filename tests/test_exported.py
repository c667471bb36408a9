"""torch.export programs: the same features as the network, and no way for an archive to run code."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from lrface import load_embedder
from lrface.embed import CARD_KEY
from lrface.errors import LrfaceError, UsageError
from lrface.exported import CARD_FILE, ExportedProgram


class Network(nn.Module):
    """What face networks use: convolution, BatchNorm, attention, sizes that depend on the batch, a buffer that is not
    saved, words and infinities as arguments."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 7, 16)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, images):
        rows = self.norm(self.first(images)).flatten(2).transpose(1, 2)
        rows, _ = self.attention(rows, rows, rows)
        left, right = torch.split(rows, [20, rows.shape[1] - 20], 1)
        found = torch.cat([left.mean(1), right.amax(1)], 1) * torch.cat([self.scale, self.scale])
        found = nn.functional.gelu(found, approximate="tanh")
        return found + torch.full((images.shape[0], 16), float("-inf")).clamp(-1, 1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = Network()
    made.norm.running_mean.uniform_(-1, 1)
    made.norm.running_var.uniform_(0.5, 2)
    return made.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 112, 112, generator=torch.Generator().manual_seed(1))


def export(network, file, dynamic=True, **options):
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},) if dynamic else None
    program = torch.export.export(network, (torch.rand(2, 3, 112, 112),), dynamic_shapes=shapes)
    torch.export.save(program, file, **options)
    return file


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    return export(network, tmp_path_factory.mktemp("exported") / "net.pt2")


def changed(file, out, change=None, **members):
    """The archive with its graph changed, and members replaced or added."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            folder, _, name = entry.filename.partition("/")
            data = old.read(entry)
            if name == "models/model.json" and change is not None:
                graph = json.loads(data)
                change(graph)
                data = json.dumps(graph).encode()
            new.writestr(entry.filename, members.pop(name, data))
        for name, data in members.items():
            new.writestr(f"{folder}/{name}", data)
    return out


def test_the_same_features_as_the_network(network, images, file, tmp_path):
    program = ExportedProgram(file, torch.device("cpu"))
    assert (program.input_size, program.smallest_batch, program.largest_batch) == (112, 1, 64)
    with torch.inference_mode():
        expected = network(images)
        assert torch.equal(program(images)[program.outputs[0]], expected)
    embedder = load_embedder(file)
    assert embedder.card["format"] == "pt2" and embedder.card["described_by"] == "convention"
    torch.testing.assert_close(embedder.embed_tensor(images), expected)
    # a batch that the graph fixes is filled up
    fixed = load_embedder(export(network, tmp_path / "fixed.pt2", dynamic=False))
    torch.testing.assert_close(fixed.embed_tensor(images), expected)


def test_what_goes_in_can_be_said(network, images, file, tmp_path):
    described = load_embedder(file, colour="BGR", mean=0.5, std=[0.5, 0.25, 0.5])
    assert described.card["described_by"] == "options"
    seen = (images.flip(1) - 0.5) / torch.tensor([0.5, 0.25, 0.5]).view(1, 3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(described.embed_tensor(images), network(seen))
    card = {
        "format": "lrface-model",
        "version": 1,
        "embedding_size": 16,
        "input": {"size": 112, "colour": "RGB", "range": [0, 1], "normalisation": "inside"},
    }
    assert CARD_FILE == CARD_KEY
    carded = export(network, tmp_path / "carded.pt2", extra_files={CARD_FILE: json.dumps(card)})
    assert load_embedder(carded).card == card
    with pytest.raises(UsageError, match="carries lrface's card"):
        load_embedder(carded, colour="BGR")


class Bomb:
    """A pickle that says so when it is opened."""

    def __reduce__(self):
        return (open, ("opened", "w"))


def test_no_pickle_is_opened(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    bomb = buffer.getvalue()
    # PyTorch's own loader opens it, which is why it is not used
    example = changed(file, tmp_path / "example.pt2", **{"data/sample_inputs/model.pt": bomb})
    load_embedder(example)
    assert not (tmp_path / "opened").exists()

    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        config = json.loads(archive.read(name))
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    members = {"data/weights/model_weights_config.json": json.dumps(config), "data/weights/weight_0": bomb}
    constants = {"config": {"object": {**entry, "path_name": "opaque_obj_0", "use_pickle": True}}}
    hidden = {"config": {"object": {**entry, "path_name": "custom_obj_0", "use_pickle": False}}}
    for number, bad in enumerate(
        (
            members,
            {"data/weights/model.pt": bomb},
            {"data/constants/model.pt": bomb},
            {
                "data/constants/model_constants_config.json": json.dumps(constants),
                "data/constants/opaque_obj_0": pickle.dumps(Bomb()),
            },
            {"data/constants/model_constants_config.json": json.dumps(hidden)},
        )
    ):
        with pytest.raises(LrfaceError, match="pickle"):
            load_embedder(changed(file, tmp_path / f"bad{number}.pt2", **bad))
        assert not (tmp_path / "opened").exists()


def call(target, **arguments):
    """A node in front of the graph that calls ``target``."""

    def change(model):
        inputs = [
            {"name": name, "arg": {kind: value}, "kind": 2} for name, (kind, value) in arguments.items()
        ]
        node = {
            "target": target,
            "inputs": inputs,
            "outputs": [{"as_tensor": {"name": "evil"}}],
            "metadata": {},
        }
        model["graph_module"]["graph"]["nodes"].insert(0, node)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (call("torch.os.system", command=("as_string", "touch opened")), "torch.os.system"),
        (call("torch.hub.load", repo=("as_string", "x")), "torch.hub.load"),
        (call("torch.ops.aten.__class__.mro"), "only tensor operators"),
        (call("torch.ops.profiler._record_function_enter_new.default"), "only tensor operators"),
        (call("_operator.attrgetter", name=("as_string", "x")), "only tensor operators"),
        (
            call(
                "torch.ops.aten.from_file.default",
                filename=("as_string", "opened"),
                shared=("as_bool", True),
                size=("as_int", 4),
            ),
            "'filename'.*as_string",
        ),
        (call("torch.ops.aten.neg.default", self=("as_custom_obj", {"name": "x"})), "as_custom_obj"),
        (call("torch.ops.aten.neg.default", self=("as_graph", {"name": "x"})), "as_graph"),
    ],
)
def test_nothing_but_tensor_operators_is_called(file, tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LrfaceError, match=says):
        load_embedder(changed(file, tmp_path / "bad.pt2", change))
    assert not (tmp_path / "opened").exists()


def test_symbols_and_guards_are_not_evaluated(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = "__import__('os').system('touch opened')"

    def change(model):
        model["guards_code"] = [evil]
        for value in model["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = evil

    load_embedder(changed(file, tmp_path / "symbols.pt2", change))
    assert not (tmp_path / "opened").exists()


def test_weights_outside_the_bytes_are_refused(file, tmp_path):
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        config = json.loads(archive.read(name))
    meta = next(iter(config["config"].values()))["tensor_meta"]
    for field, value in (("sizes", 10**6), ("storage_offset", 10**9)):
        changed_meta = {**meta, field: [{"as_int": value}] * 4 if field == "sizes" else {"as_int": value}}
        bad = json.loads(json.dumps(config))
        next(iter(bad["config"].values()))["tensor_meta"] = changed_meta
        with pytest.raises(LrfaceError, match="cannot be read"):
            load_embedder(
                changed(
                    file, tmp_path / "far.pt2", **{"data/weights/model_weights_config.json": json.dumps(bad)}
                )
            )


def test_other_files_are_named(network, tmp_path, file):
    other = tmp_path / "other.pt2"
    other.write_bytes(b"nothing")
    with pytest.raises(LrfaceError, match="no torch.export archive"):
        load_embedder(other)
    torch.save(network.state_dict(), other)
    with pytest.raises(LrfaceError, match="a file of torch.save"):
        load_embedder(other)
    with pytest.raises(LrfaceError, match="no such file"):
        load_embedder(tmp_path / "none.pt2")
    with pytest.raises(LrfaceError, match="schema 7"):
        load_embedder(
            changed(file, tmp_path / "old.pt2", lambda model: model["schema_version"].update(major=7))
        )
    with pytest.raises(LrfaceError, match="compiled code"):
        load_embedder(changed(file, tmp_path / "aot.pt2", **{"data/aotinductor/model/x.so": b""}))
    whole = file.read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 30):
        other.write_bytes(whole[:length])
        with pytest.raises(LrfaceError):
            load_embedder(other)
    with pytest.raises(UsageError, match="no output 'x'"):
        load_embedder(file, output="x")


def test_a_network_in_training_mode_is_named(tmp_path):
    made = Network().train()
    with pytest.raises(LrfaceError, match=r"training mode.*call eval\(\)"):
        load_embedder(export(made, tmp_path / "training.pt2"))
    program = torch.export.export(made, (torch.rand(2, 3, 112, 112),)).run_decompositions()
    torch.export.save(program, tmp_path / "decomposed.pt2")
    with pytest.raises(LrfaceError, match=r"call eval\(\)"):
        load_embedder(tmp_path / "decomposed.pt2")
