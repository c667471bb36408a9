"""Adversarial Noise Training step by step: who moves whom, what noise the classifier sees, replay and restarts."""

import copy

import pytest
import torch
from torch import nn

from lrface.degrade.policies import build_policy
from lrface.degrade.rescaling import rescale
from lrface.errors import UsageError
from lrface.heads import build_head
from lrface.methods import METHODS
from lrface.methods.ant import CLEAN, CURRENT, REPLAYED, STYLISED, AdversarialNoise
from lrface.models import build_backbone
from lrface.models.noise import NOISE_GENERATORS

CLASSES = 5
CLEAN_POLICY = {"name": "clean", "mirror": 0.5, "crop_padding": 2}


def ant(
    head: str = "softmax", backbone: str = "cifar_resnet18", policy=CLEAN_POLICY, **arguments
) -> AdversarialNoise:
    torch.manual_seed(0)
    encoder = build_backbone(backbone, width=4)
    method = METHODS.build(
        "ant",
        encoder=encoder,
        head=build_head(head, encoder.embedding_size, CLASSES),
        policy=build_policy(**policy),
        **{"restart_steps": 0, "learning_rate": 0.01, "save_steps": 2, **arguments},
    )
    return method.train()


def batch(seed: int = 0, n: int = 20, size: int = 32, **more) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator).to(torch.uint8)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return {"image": images, "label": labels, "seed": seed, **more}


def perturbation(ready: dict) -> torch.Tensor:
    return (ready["image"].double() - ready["hq"].double()).flatten(1).norm(dim=1)


def test_half_of_the_batch_is_clean_and_the_noise_has_its_length():
    method = ant()
    assert method.epsilon == pytest.approx(135 * 32 / 224)
    for seed in range(3):
        length = perturbation(method.prepare(batch(seed)))
        assert int((length == 0).sum()) == 10
        torch.testing.assert_close(
            length[length > 0], torch.full((10,), method.epsilon).double(), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    "shares, counts",
    [
        ({}, (20, 0, 12, 8)),
        ({"replay": False}, (20, 0, 20, 0)),
        ({"clean_share": 0.25, "stylised_share": 0.3, "current_share": 0.225}, (10, 12, 9, 9)),
        ({"clean_share": 0.0, "current_share": 1.0}, (0, 0, 40, 0)),
    ],
)
def test_shares_are_exact_and_those_of_the_paper(shares, counts):
    method = ant(**shares)
    for seed in range(5):
        roles, seeds = method._roles(batch(seed, 40))
        found = tuple(int((roles == role).sum()) for role in (CLEAN, STYLISED, CURRENT, REPLAYED))
        assert found == counts and len(seeds.unique()) == 40
    others = [method._roles(batch(seed, 40))[0] for seed in range(2)]
    assert torch.equal(*others) is (counts[2] == 40)


def test_stylised_images_take_the_place_of_their_share():
    method = ant(clean_share=0.25, stylised_share=0.3, current_share=0.225)
    assert "stylised" in method.needs and "stylised" not in ant().needs
    given = batch(0, 20, stylised=torch.full((20, 3, 32, 32), 128, dtype=torch.uint8))
    given["policy"] = None
    ready = method.prepare(given)
    roles, _ = method._roles(batch(0, 20))
    styled = ready["image"][roles == STYLISED]
    # Framed as their originals: grey, or the black around a crop.
    assert len(styled) == 6 and bool(((styled - 128 / 255).abs() < 1e-6).logical_or(styled == 0).all())
    assert torch.equal(ready["image"][roles == CLEAN], ready["hq"][roles == CLEAN])
    assert "stylised" not in ready


def test_the_noise_is_that_of_the_generator_as_it_is_after_its_step():
    """The published code went on using the generator it began with."""
    method = ant(replay=False)
    first = method.generator.state()
    for seed in range(4):
        ready = method.prepare(batch(seed))
    roles, seeds = method._roles(batch(3))
    noisy = roles == CURRENT
    now = method.noise(method.generator, ready["hq"][noisy].shape, seeds[noisy], "noise")
    assert torch.equal(ready["image"][noisy], rescale(ready["hq"][noisy], now, method.epsilon).images)
    stale = copy.deepcopy(method.generator)
    stale.load(first)
    assert not torch.equal(stale.state(), method.generator.state())
    old = method.noise(stale, ready["hq"][noisy].shape, seeds[noisy], "noise")
    assert not torch.allclose(
        ready["image"][noisy], rescale(ready["hq"][noisy], old, method.epsilon).images, atol=1e-3
    )


def test_the_generator_climbs_the_loss_of_the_classifier():
    method = ant(learning_rate=0.02)
    with torch.no_grad():
        method.head.linear.weight *= 300  # fresh weights hardly tell classes apart
    losses = [float(method.prepare({**batch(7), "seed": seed})["adversarial"]) for seed in range(40)]
    assert sum(losses[-8:]) > sum(losses[:8]) * 1.05


def test_the_step_of_the_generator_is_that_of_adam_on_its_gradient():
    method, given = ant(), batch(3)
    before, optimiser_of = copy.deepcopy(method.generator), torch.optim.Adam
    roles, seeds = method._roles(given)
    ready = method.prepare(given)
    rows = roles >= CURRENT
    before.requires_grad_(True)
    wanted = optimiser_of(before.parameters(), 0.01)
    method.eval()
    normal = method.noise(before, ready["hq"][rows].shape, seeds[rows], "ascent")
    noisy = rescale(ready["hq"][rows], normal, method.epsilon).images
    loss = method.head.loss(method.encoder(noisy), given["label"][rows]).loss
    assert float(ready["adversarial"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    (-loss).backward()
    wanted.step()
    torch.testing.assert_close(method.generator.state(), before.state(), rtol=1e-4, atol=1e-5)


def test_neither_sees_the_gradient_of_the_other():
    method = ant()
    statistics = {key: value.clone() for key, value in method.encoder.named_buffers()}
    weights = {key: value.clone() for key, value in method.encoder.named_parameters()}
    ready = method.prepare(batch(0))
    assert method.training and all(part.training for part in method.encoder.modules())
    assert all(torch.equal(value, statistics[key]) for key, value in method.encoder.named_buffers())
    assert all(torch.equal(value, weights[key]) for key, value in method.encoder.named_parameters())
    assert all(parameter.grad is None for parameter in method.parameters())
    assert not ready["image"].requires_grad and not ready["adversarial"].requires_grad
    state = method.generator.state()
    method(ready).loss.backward()
    generators = [*method.generator.parameters(), *method.successor.parameters()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in generators)
    assert torch.equal(method.generator.state(), state)
    assert all(parameter.grad is not None for parameter in method.encoder.parameters())
    owned = {id(parameter) for group in method.param_groups() for parameter in group["params"]}
    assert owned == {id(p) for part in (method.encoder, method.head) for p in part.parameters()}
    assert any(not torch.equal(value, statistics[key]) for key, value in method.encoder.named_buffers())


def test_in_eval_mode_nothing_moves():
    method = ant().eval()
    state = method.generator.state()
    ready = method.prepare(batch(0))
    assert "adversarial" not in ready and method.step == 0 and torch.equal(method.generator.state(), state)
    assert "adversarial" not in method(ready).logs


def test_a_restart_trains_a_fresh_generator_and_puts_it_in_the_place_of_the_old():
    method = ant(restart_steps=6, fresh_share=0.5, save_steps=100)
    fresh = NOISE_GENERATORS.build("noise1x1").convolutions[-1].weight
    history = []
    for step in range(14):
        method.prepare(batch(step))
        history.append((method.generator.state(), method.successor.state()))
    for step in range(1, 14):
        (current, successor), (current_before, successor_before) = history[step], history[step - 1]
        place = step % 6
        if place == 0:  # the successor takes over, and goes on learning
            assert not torch.equal(current, current_before)
            assert float((current - successor_before).abs().max()) <= 0.0101
            assert len(method.states) >= step // 6
        else:  # one of both learns, the other stays
            assert torch.equal(current, current_before) is (place >= 3)
            assert torch.equal(successor, successor_before) is (place < 3)
        if place == 3:  # begun anew: one step of Adam from noise as it came
            last = method.successor.convolutions[-1].weight if step == 13 else None
            assert last is None
            assert float(successor[-63:].abs().max()) <= 0.0101 and float(fresh.detach().abs().max()) == 0
    assert len(method.states) == 2  # the last state of each that was replaced
    assert torch.equal(method.states[0], history[5][0]) and torch.equal(method.states[1], history[11][0])


def test_the_optimiser_goes_with_its_generator():
    method = ant(restart_steps=4, fresh_share=0.5)
    for step in range(5):
        method.prepare(batch(step))
    for generator, optimiser in zip((method.generator, method.successor), method.optimisers, strict=True):
        assert [id(p) for p in optimiser.param_groups[0]["params"]] == [id(p) for p in generator.parameters()]
    steps = [int(next(iter(optimiser.state.values()))["step"]) for optimiser in method.optimisers]
    assert steps == [3, 2]  # two as a successor and one since; the old one had two


def test_replayed_images_have_the_noise_of_saved_states():
    method = ant(save_steps=1, learning_rate=0.05)
    for step in range(5):
        method.prepare(batch(step))
    given = batch(9)
    ready = method.prepare(given)
    states = method.states
    roles, seeds = method._roles(given)
    rows = (roles == REPLAYED).nonzero().squeeze(1)
    assert len(rows) == 4
    used = set()
    for row in rows.tolist():
        hq, image = ready["hq"][row : row + 1], ready["image"][row : row + 1]
        matches = []
        for number, state in enumerate(states):
            generator = NOISE_GENERATORS.build("noise1x1")
            generator.load(state)
            noise = method.noise(generator, hq.shape, seeds[row : row + 1], "noise")
            difference = (rescale(hq, noise, method.epsilon).images - image).abs().max()
            matches += [number] if float(difference.detach()) < 1e-4 else []
        assert len(matches) == 1
        used.add(matches[0])
    assert len(used) > 1


def test_without_replay_there_are_no_states():
    method = ant(replay=False, save_steps=1)
    for step in range(3):
        ready = method.prepare(batch(step))
    assert len(method.states) == 0 and float(method(ready).logs["replay_states"]) == 0


def test_the_memory_of_the_replay_is_bounded_told_and_a_uniform_sample():
    method = ant(save_steps=1, replay_size=8, restart_steps=0)
    kept: list[int] = []
    for run in range(40):
        method.states, method.seen = method.states[:0], 0
        for number in range(40):
            with torch.no_grad():
                method.generator.convolutions[0].bias.fill_(number)
            method._save(run * 1000 + number)
        assert method.states.shape == (8, 983) and method.seen == 40
        kept += method.states[:, 60].long().tolist()  # the first bias
    assert abs(sum(kept) / len(kept) - 19.5) < 3
    early = sum(number < 8 for number in kept) / len(kept)
    assert 0.1 < early < 0.3  # a fifth of all
    logs = method(method.prepare(batch(0))).logs
    assert float(logs["replay_states"]) == 8 and float(logs["replay_mib"]) == pytest.approx(
        8 * 983 * 4 / 2**20
    )


def test_a_seed_replays_a_run():
    runs = []
    for _ in range(2):
        method = ant(restart_steps=4, save_steps=1)
        runs.append([method.prepare(batch(step))["image"] for step in range(6)] + [method.generator.state()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 8])
def test_a_state_comes_back_exactly_at_any_step_of_an_interval(stop):
    """In the middle of a restart too."""
    settings = {"restart_steps": 5, "fresh_share": 0.6, "save_steps": 2, "replay_size": 3}
    whole = ant(**settings)
    for step in range(stop):
        whole.prepare(batch(step, 8))
    extra = copy.deepcopy(whole.get_extra_state())
    resumed = ant(**settings)
    tensors = {key: value for key, value in whole.state_dict().items() if not key.endswith("_extra_state")}
    resumed.load_state_dict({**tensors, "_extra_state": resumed.get_extra_state()})
    resumed.set_extra_state(extra)
    for step in range(stop, stop + 3):
        assert torch.equal(whole.prepare(batch(step, 8))["image"], resumed.prepare(batch(step, 8))["image"])
    assert torch.equal(whole.successor.state(), resumed.successor.state())
    assert torch.equal(whole.states, resumed.states)


def test_a_rank_sees_its_part_of_the_batch():
    method, whole = ant(), batch(5)
    roles, seeds = method._roles(whole)
    for rank in range(2):
        own = slice(rank * 10, rank * 10 + 10)
        part = {
            **{key: value[own] for key, value in whole.items() if key != "seed"},
            "seed": 5,
            "part": (rank, 2),
        }
        found, own_seeds = method._roles(part)
        assert torch.equal(found, roles[own]) and torch.equal(own_seeds, seeds[own])


def test_a_rank_whose_images_all_stay_clean():
    method, whole = ant(), batch(5, 2)
    rank = int(method._roles(whole)[0].argmin())
    part = {"image": whole["image"][:1], "label": whole["label"][:1], "seed": 5, "part": (rank, 2)}
    method.epsilon = 1.0
    state = method.generator.state()
    ready = method.prepare(part)
    assert torch.equal(ready["image"], ready["hq"])
    assert torch.equal(method.generator.state(), state)  # by itself it has nothing to say


@pytest.mark.parametrize("generator", ["noise1x1", {"name": "noise3x3", "depth": 2, "width": 6}])
def test_faces_with_a_margin_head(generator):
    torch.manual_seed(0)
    encoder = build_backbone("ir18", width=4, embedding_size=8)
    method = METHODS.build(
        "ant",
        encoder=encoder,
        head=build_head("adaface", 8, CLASSES),
        policy=build_policy("resolution", sizes=[28]),
        generator=generator,
        restart_steps=2,
        learning_rate=0.01,
    ).train()
    assert method.epsilon == 67.5
    buffers = {key: value.clone() for key, value in method.head.named_buffers()}
    ready = method.prepare(batch(0, 6, 112))
    assert buffers and all(torch.equal(value, buffers[key]) for key, value in method.head.named_buffers())
    output = method(ready)
    output.loss.backward()
    assert bool(torch.isfinite(output.loss)) and {"adversarial", "accuracy"} <= set(output.logs)


def test_networks_run_in_the_precision_of_the_run():
    method = ant()
    seen = []
    method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    method.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    ready = method.prepare(batch(0))
    assert seen == [torch.bfloat16] and ready["image"].dtype == torch.float32
    length = perturbation(ready)
    assert float((length[length > 0] - method.epsilon).abs().max()) < 1e-4
    assert method.generator.state().dtype == torch.float32


def test_epochs_need_to_be_known():
    method = ant(restart_steps=None, restart_epochs=0.33)
    with pytest.raises(UsageError, match="give restart_steps"):
        method.prepare(batch(0))
    method.epoch_steps = 391
    assert method.interval == 129 and ant(restart_steps=None).restart_epochs == 0.33
    assert ant(restart_steps=None, restart_epochs=0).interval == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"epsilon": 0}, "method.epsilon must be above 0"),
        ({"learning_rate": -1.0}, "method.learning_rate must be above 0"),
        ({"replay_size": 0}, "method.replay_size must be above 0"),
        ({"fresh_share": 1.5}, "method.fresh_share must be at most 1"),
        ({"clean_share": -0.1}, "method.clean_share must be between 0 and 1"),
        ({"clean_share": 0.8}, "must come to 1 at most; found 1.1"),
        ({"clean_share": 1.0, "current_share": 0.0}, "leave no image for noise"),
        ({"restart_steps": 5, "restart_epochs": 0.1}, "not both"),
        ({"restart_steps": -1}, "method.restart_steps must be at least 0"),
        ({"restart_steps": 2.5}, "method.restart_steps must be of type int"),
        ({"generator": "noise"}, "unknown generator 'noise'"),
        ({"generator": {"name": "noise1x1", "widht": 2}}, "unknown key generator.widht .*width"),
        ({"generator": {"name": "noise1x1", "channels": 3}}, "channels follows from the backbone"),
        ({"generator": 3}, "must be a name, or a mapping"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        ant(**arguments)


def test_a_partial_head_is_refused():
    encoder = build_backbone("cifar_resnet18", width=4)
    head = build_head("partial", 32, CLASSES, of="cosface")
    with pytest.raises(UsageError, match="needs the loss over all classes"):
        AdversarialNoise(encoder, head, build_policy("clean"))
    assert not AdversarialNoise.splittable and isinstance(ant().head, nn.Module)
