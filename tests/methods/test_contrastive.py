"""Contrastive inversion: what each network sees, what moves, where the student starts, and teachers of all kinds."""

import copy

import pytest
import torch
from onnx_files import write_onnx
from torch import nn

from lrface.degrade import policies
from lrface.errors import LrfaceError, UsageError
from lrface.losses.contrastive import VARIANTS, contrastive_loss
from lrface.methods import METHODS, Contrastive
from lrface.models import build_backbone

N = 8
NETWORK = {"name": "cifar_resnet18", "width": 4}
WIDER = {"name": "cifar_resnet18", "width": 6}


def build(policy: str = "pixel_mask", encoder=NETWORK, **arguments) -> Contrastive:
    torch.manual_seed(0)
    options = {"pixel_mask": {"missing": 0.75, "clean_share": 0.0}, "clean": {"mirror": 0.0}}
    parts = {"encoder": build_backbone(**encoder), "policy": policies.build_policy(policy, **options[policy])}
    method = METHODS.build("contrastive", **arguments, **parts)
    if not isinstance(method.teacher, nn.Module) or not any(True for _ in method.teacher.parameters()):
        return method
    torch.manual_seed(1)
    size = method.teacher.input_size
    for part in method.teacher.modules():  # BatchNorm has seen images, as that of a trained teacher has
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
            part.train()
    with torch.no_grad():
        method.teacher(torch.rand(8, 3, size, size))
    method.teacher.eval()
    return method


def batch(n: int = N, seed: int = 0, size: int = 32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return {"image": images, "seed": seed}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_student_sees_degraded_images_and_the_teacher_their_clean_originals(variant):
    method = build(variant=variant, temperature=0.2).train()
    ready = method.prepare(batch())
    gone = ready["image"] == 0
    assert gone.float().mean() > 0.7 and torch.equal(ready["image"][~gone], ready["hq"][~gone])
    reference = copy.deepcopy(method)
    output = method(ready)
    with torch.no_grad():
        found = contrastive_loss(
            reference.encoder(ready["image"]), reference.teacher.eval()(ready["hq"]), 0.2, variant
        )
    assert output.loss.item() == pytest.approx(found.loss.item(), rel=1e-5)
    logs = {key: value.item() for key, value in output.logs.items()}
    similarity = logs.pop("similarity")
    assert -1 <= similarity <= 1
    if variant == "mse":
        assert logs == {} and output.loss.item() == pytest.approx(-similarity)
    else:
        assert logs["pull"] == pytest.approx(-similarity / 0.2)
        assert logs["pull"] + logs["push"] == pytest.approx(output.loss.item(), rel=1e-5)
        assert logs["push"] == pytest.approx(found.push.item(), rel=1e-5)
    assert not any(value.requires_grad for value in output.logs.values())


@pytest.mark.parametrize("encoder", [NETWORK, WIDER], ids=["as wide", "of another width"])
def test_the_student_and_its_projection_move_and_never_the_teacher(encoder):
    method = build(encoder=encoder, teacher=NETWORK, start="fresh")
    narrow = encoder is NETWORK
    assert isinstance(method.projection, nn.Identity if narrow else nn.Linear)
    optimiser = torch.optim.SGD(method.param_groups(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    before = copy.deepcopy(method.state_dict())
    for seed in range(3):
        method.train()
        assert not any(part.training for part in method.teacher.modules())
        optimiser.zero_grad()
        method(method.prepare(batch(seed=seed))).loss.backward()
        optimiser.step()
    same = {key for key, value in method.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.startswith("teacher.")} and len(same) > 20
    assert any(key.startswith("projection.") for key in before) is not narrow
    held = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    assert held == {id(parameter) for parameter in method.parameters() if parameter.requires_grad}
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_lowers_the_loss(variant):
    method = build(variant=variant)
    method.filled(["teacher"])
    ready = method.prepare(batch(16))
    optimiser = torch.optim.Adam(method.param_groups(), lr=1e-3)
    found, similar = [], []
    for _ in range(15):
        method.train()
        optimiser.zero_grad()
        output = method(ready)
        output.loss.backward()
        optimiser.step()
        found.append(output.loss.item())
        similar.append(output.logs["similarity"].item())
    assert found[-1] < found[0] - 0.03, found
    if variant == "mse":  # the others also spread embeddings that the fresh teacher has all in one place
        assert similar[-1] > similar[0], similar


def test_a_student_of_the_teachers_weights_is_the_teacher_on_clean_images():
    method = build("clean")
    assert method.filled(["teacher"]) == ["encoder starts from the teacher"]
    method.eval()
    output = method(method.prepare(batch()))
    assert output.logs["similarity"].item() == pytest.approx(1, abs=1e-6)


def test_where_the_student_starts():
    method = build()
    own = copy.deepcopy(method.encoder.state_dict())
    torch.nn.init.normal_(next(method.teacher.parameters()))
    for parts in (["teacher", "encoder"], ["encoder.body"]):
        assert method.filled(parts) == []
        assert all(torch.equal(value, own[key]) for key, value in method.encoder.state_dict().items())
    method.filled(["teacher"])
    wanted = method.teacher.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in method.encoder.state_dict().items())
    fresh = build(start="fresh")
    own = copy.deepcopy(fresh.encoder.state_dict())
    assert fresh.filled(["teacher"]) == []
    assert all(torch.equal(value, own[key]) for key, value in fresh.encoder.state_dict().items())


def test_the_same_seed_gives_the_same_step():
    first, second = (build().train() for _ in range(2))
    one, other = first(first.prepare(batch(seed=5))), second(second.prepare(batch(seed=5)))
    third = build().train()
    assert torch.equal(one.loss, other.loss)
    assert not torch.equal(one.loss, third(third.prepare(batch(seed=6))).loss)


def test_what_compares_images_cannot_be_accumulated_and_what_is_needed():
    assert {variant for variant in VARIANTS if build(variant=variant).accumulable} == {"mse"}
    assert build().must_load == {"teacher": "encoder"}
    assert Contrastive.needs == ("image", "seed"), "no labels"


def test_an_onnx_teacher(tmp_path):
    file = tmp_path / "teacher.onnx"
    matrix = write_onnx(file)
    told = {"name": "onnx", "path": str(file), "colour": "BGR", "mean": [0.1, 0.2, 0.3], "std": 0.5}
    method = build(teacher=told, start="fresh")
    assert method.must_load == {} and isinstance(method.projection, nn.Linear)
    images = torch.rand(5, 3, 32, 32, dtype=torch.float64)
    found = method.teacher(images)
    mean = torch.tensor([0.1, 0.2, 0.3]).double()
    wanted = (images.flip(1).mean((2, 3)) - mean) / 0.5 @ matrix.double()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    method.train()
    output = method(method.prepare(batch()))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    assert not any(key.startswith("teacher") for key in method.state_dict())
    copied = copy.deepcopy(method)
    assert torch.equal(copied.teacher(images), found)


@pytest.mark.slow
def test_a_network_that_pytorch_exported_teaches_as_the_network_does(tmp_path):
    pytest.importorskip("onnxscript")
    method = build("clean")
    batch_of_any = torch.export.Dim("n", min=1)
    torch.onnx.export(
        method.teacher,
        (torch.rand(2, 3, 32, 32),),
        str(tmp_path / "teacher.onnx"),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch_of_any},),
    )
    other = build("clean", teacher={"name": "onnx", "path": str(tmp_path / "teacher.onnx")}, start="fresh")
    other.encoder.load_state_dict(method.encoder.state_dict())
    one, two = (each.train()(each.prepare(batch())) for each in (method, other))
    torch.testing.assert_close(two.loss, one.loss, rtol=1e-4, atol=1e-4)


def test_what_an_onnx_teacher_refuses(tmp_path):
    file = tmp_path / "teacher.onnx"
    write_onnx(file)
    two = tmp_path / "two.onnx"
    write_onnx(two, output=True)
    large = tmp_path / "large.onnx"
    write_onnx(large, size=48)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    for arguments, kind, said in (
        ({"path": str(tmp_path / "none.onnx")}, LrfaceError, "none.onnx: no such file"),
        ({"path": str(broken)}, LrfaceError, "is no ONNX model that onnxruntime can run"),
        ({"path": str(two)}, UsageError, "has outputs embedding, flat; name one"),
        ({"path": str(two), "output": "x"}, UsageError, "has no output 'x'"),
        ({"path": str(file), "colour": "rgb"}, UsageError, "colour must be RGB or BGR"),
        ({"path": str(file), "std": 0}, UsageError, "std must not be 0"),
        ({"path": str(file), "mean": [1, 2]}, UsageError, "mean must be a number, or three"),
        ({"path": str(file), "size": 3}, UsageError, "unknown key method.teacher.size"),
        ({"path": str(large)}, UsageError, "takes images of 48 pixels of a side, the student of 32"),
    ):
        with pytest.raises(kind, match=said):
            build(teacher={"name": "onnx", **arguments}, start="fresh")
    with pytest.raises(UsageError, match="cannot start from its weights"):
        build(teacher={"name": "onnx", "path": str(file)})
    build(teacher={"name": "onnx", "path": str(two), "output": "flat"}, start="fresh")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"variant": "student-teacher"}, "method.variant must be one of"),
        ({"temperature": 0.0}, "method.temperature must be above 0"),
        ({"start": "zero"}, "method.start must be teacher or fresh"),
        ({"chunk": 0}, "method.chunk must be at least 1"),
        ({"teacher": WIDER}, "method.start: the student is of another architecture"),
        ({"teacher": "mobilefacenet", "start": "fresh"}, "takes images of 112 pixels of a side"),
        ({"teacher": "resnet0"}, "method.teacher: unknown backbone"),
        ({"teacher": 3}, "method.teacher must be the name of a backbone"),
    ],
)
def test_what_is_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        build(**arguments)
