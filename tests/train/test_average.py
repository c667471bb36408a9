import torch
from torch import nn

from lrface.heads import build_head
from lrface.train.average import AveragedWeights, BlendedWeights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def move(module: nn.Module, step: int) -> None:
    """Something that changes weights, running statistics and the counter of batches."""
    torch.manual_seed(step)
    module(torch.randn(5, 3))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))


def test_the_average_is_the_formula():
    module = network()
    module[2].requires_grad_(False)
    average = AveragedWeights(module, 0.6)
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    for step in range(30):
        move(module, step)
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
    state = average.state()
    assert set(state) == set(expected)
    for key in ("0.weight", "0.bias", "1.weight", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(state[key], expected[key])
        assert not torch.allclose(state[key], module.state_dict()[key])
    assert state["1.num_batches_tracked"] == 30
    assert torch.equal(state["2.weight"], network()[2].weight)
    assert "2.weight" not in average.values  # frozen: not stored twice


def test_the_averaged_weights_are_shown_and_put_back():
    module = network()
    average = AveragedWeights(module, 0.5)
    for step in range(3):
        move(module, step)
        average.update(step)
    own = {key: value.clone() for key, value in module.state_dict().items()}
    averaged = {key: value.clone() for key, value in average.state().items()}
    with average.shown():
        assert all(torch.equal(value, averaged[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(value, own[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(value, averaged[key]) for key, value in average.state().items())
    assert not torch.equal(own["0.weight"], averaged["0.weight"])


def test_it_goes_on_from_a_state():
    module = network()
    average = AveragedWeights(module, 0.9)
    for step in range(2):
        move(module, step)
        average.update(step)
    state = {key: value.clone() for key, value in average.state().items()}
    again = AveragedWeights(module, 0.9, state)
    assert all(torch.equal(value, state[key]) for key, value in again.state().items())


def test_running_statistics_that_a_head_replaces_are_averaged_too():
    torch.manual_seed(0)
    head = build_head("adaface", 4, 3)
    average = AveragedWeights(head, 0.6)
    expected = {key: value.clone() for key, value in head.named_buffers()}
    for step in range(5):
        head.loss(torch.randn(6, 4) * 30, torch.arange(6) % 3)
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        for key, value in head.named_buffers():
            expected[key] = decay * expected[key] + (1 - decay) * value
    own = {key: value.clone() for key, value in head.named_buffers()}
    with average.shown():
        for key, value in head.named_buffers():
            torch.testing.assert_close(value, expected[key])
            assert not torch.allclose(value, own[key])
    assert all(torch.equal(value, own[key]) for key, value in head.named_buffers())


def taught() -> nn.Module:
    method = nn.Module()
    method.encoder, method.teacher = network(), network().requires_grad_(False)
    method.head = nn.Linear(2, 2)
    for step in range(3):
        move(method.encoder, step)
    return method


def test_the_blend_lies_between_encoder_and_teacher():
    method = taught()
    blended = BlendedWeights(method, 0.2)
    blended.update(0)
    own, found = dict(method.named_parameters()), blended.state()
    assert set(found) == set(method.state_dict())
    for name in ("0.weight", "1.bias", "2.weight"):
        wanted = 0.8 * own[f"encoder.{name}"] + 0.2 * own[f"teacher.{name}"]
        torch.testing.assert_close(found[f"encoder.{name}"], wanted)
    for name in ("teacher.0.weight", "head.weight", "encoder.1.running_mean"):
        assert torch.equal(found[name], method.state_dict()[name])


def test_the_blend_is_shown_and_the_encoders_own_put_back():
    method = taught()
    blended = BlendedWeights(method, 0.2)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with blended.shown():
        inside = method.encoder[0].weight.clone()
    assert torch.equal(
        inside, before["encoder.0.weight"].lerp(before["teacher.0.weight"], 0.2)
    ) and not torch.equal(inside, before["encoder.0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
