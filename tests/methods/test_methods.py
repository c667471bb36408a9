import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lrface.degrade.policy import ResolutionPolicy
from lrface.errors import UsageError
from lrface.heads import build_head
from lrface.methods import METHODS, Classify, Method, QualNet
from lrface.methods.base import degrade_batch
from lrface.models import build_backbone, build_decoder
from lrface.train.optimisers import Optimiser
from lrface.train.trainer import Stage, Trainer

IDENTITIES = 5


def parts(seed: int = 0, dropout: float = 0.0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {
        "encoder": build_backbone("ir18", width=4, embedding_size=16, dropout=dropout),
        "head": build_head("cosface", 16, IDENTITIES),
        "decoder": build_decoder("subpixel", 32, width=16),
    }


def qualnet(policy: ResolutionPolicy | None = None, seed: int = 0, **arguments) -> QualNet:
    return QualNet(**parts(seed), policy=policy or ResolutionPolicy(), **arguments)


def raw_batch(n: int = 6, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 112, 112), generator=generator, dtype=torch.uint8)
    return {"image": images, "label": torch.arange(n) % IDENTITIES, "seed": 100 + seed}


def batches(first: int, last: int):
    for step in range(first, last):
        yield raw_batch(seed=step)


def train(method: Method, folder: Path, steps: int = 3) -> None:
    """Real steps by the real trainer."""
    trainer = Trainer(device="cpu", precision="float32", tensorboard=False, show_progress=False)
    card = {"format": "lrface-model", "version": 1}
    trainer.fit(Stage("stage", method, steps, 6, batches, folder, card, Optimiser(learning_rate=0.1)))


def norms(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


def test_names():
    of_papers = ["ada", "ant", "contrastive", "distil", "qualnet", "restore"]
    assert METHODS.names() == sorted(["classify", "consistency", "reconstruct", "robustify", *of_papers])


def test_prepare_degrades_by_the_seed_of_the_batch():
    method = qualnet()
    batch = raw_batch()
    prepared = method.prepare(batch)
    images = batch["image"].float() / 255
    generator = torch.Generator().manual_seed(batch["seed"])
    degraded, hq = method.policy.apply(images, method.policy.sample(6, 112, generator))
    assert torch.equal(prepared["image"], degraded) and torch.equal(prepared["hq"], hq)
    assert prepared["label"] is batch["label"] and "seed" not in prepared
    assert not torch.equal(degraded, hq)
    assert torch.equal(degrade_batch(batch, method.policy)["image"], degraded)
    assert not torch.equal(degrade_batch({**batch, "seed": 1}, method.policy)["image"], degraded)


def test_the_loss_of_classify_is_its_formula():
    modules = parts()
    method = Classify(modules["encoder"], modules["head"], ResolutionPolicy())
    batch = method.prepare(raw_batch())
    reference = copy.deepcopy(modules["encoder"])
    output = method(batch)
    with torch.no_grad():
        embedding = reference(batch["image"])
        cosine = F.cosine_similarity(embedding[:, None], modules["head"].weight[None], dim=2)
        loss = 0.0
        for row, label in enumerate(batch["label"].tolist()):
            logits = 30.0 * cosine[row]
            logits[label] -= 30.0 * 0.25
            loss += (torch.logsumexp(logits, 0) - logits[label]).item() / 6
    assert output.loss.item() == pytest.approx(loss, rel=1e-4)
    assert set(output.logs) == {"accuracy"} and not output.logs["accuracy"].requires_grad


@pytest.mark.parametrize("clip", [True, False])
def test_the_loss_of_qualnet_is_its_formula(clip):
    method = qualnet(quality_weight=0.7, clip=clip)
    with torch.no_grad():
        method.decoder.image.weight.mul_(100)  # some pixels of the reconstruction leave [0, 1]
    batch = method.prepare(raw_batch())
    reference = copy.deepcopy(method)
    output = method(batch)
    with torch.no_grad():
        feature_map = reference.encoder.features(batch["image"])
        logits = reference.head(reference.encoder.embed(feature_map), batch["label"])
        recognition = -torch.log_softmax(logits, 1)[torch.arange(6), batch["label"]].mean()
        drawn = reference.decoder(feature_map)
        assert drawn.max() > 1 or drawn.min() < 0
        if clip:
            drawn = torch.minimum(torch.maximum(drawn, torch.zeros(())), torch.ones(()))
        quality = (drawn - batch["hq"]).abs().sum() / batch["hq"].numel()
    assert output.loss.item() == pytest.approx((recognition + 0.7 * quality).item(), rel=1e-5)
    assert output.logs["recognition"].item() == pytest.approx(recognition.item(), rel=1e-5)
    assert output.logs["quality"].item() == pytest.approx(quality.item(), rel=1e-5)
    assert not any(value.requires_grad for value in output.logs.values())


def test_lambda_zero_is_classification():
    modules = parts()
    classify = Classify(copy.deepcopy(modules["encoder"]), copy.deepcopy(modules["head"]), ResolutionPolicy())
    method = QualNet(**modules, policy=ResolutionPolicy(), quality_weight=0.0)
    one, other = classify(classify.prepare(raw_batch())), method(method.prepare(raw_batch()))
    assert one.loss.item() == other.loss.item()
    one.loss.backward()
    other.loss.backward()
    for (name, a), b in zip(classify.encoder.named_parameters(), method.encoder.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_lambda_moves_the_encoder():
    gradients = []
    for weight in (0.0, 1.0):
        method = qualnet(quality_weight=weight)
        method(method.prepare(raw_batch())).loss.backward()
        gradients.append(method.encoder.stem[0].weight.grad)
    assert not torch.allclose(gradients[0], gradients[1])


def test_stage_one_trains_everything(tmp_path):
    method = qualnet(ResolutionPolicy(clean_share=1.0), clip=False)
    before = copy.deepcopy(method.state_dict())
    train(method, tmp_path)
    same = [key for key, value in method.state_dict().items() if torch.equal(value, before[key])]
    assert same == []


def test_stage_two_keeps_what_is_frozen(tmp_path):
    method = qualnet(freeze=["decoder", "batchnorm"])
    with torch.no_grad():  # statistics that are not those of a fresh network, as after stage 1
        for part in norms(method):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
            part.weight.uniform_(0.5, 1.5)
    before = copy.deepcopy(method.state_dict())
    train(method, tmp_path)
    after = method.state_dict()
    frozen = {key for key in after if key.startswith("decoder.")}
    for name, part in method.encoder.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            frozen |= {f"encoder.{name}.{key}" for key in part.state_dict()}
    assert len(frozen) > 100
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed & frozen == set()
    assert changed == set(after) - frozen  # every convolution, PReLU, the linear layer and the head moved
    assert "encoder.stem.0.weight" in changed and "head.weight" in changed


def test_without_freezing_the_same_steps_do_change_these(tmp_path):
    method = qualnet()
    before = copy.deepcopy(method.state_dict())
    train(method, tmp_path)
    for key in (
        "encoder.stem.1.running_mean",
        "encoder.stem.1.weight",
        "decoder.image.weight",
        "decoder.body.1.running_var",
    ):
        assert not torch.equal(method.state_dict()[key], before[key]), key


def test_frozen_parts_stay_in_eval_mode():
    method = qualnet(freeze=["decoder", "batchnorm"])
    for _ in range(2):
        method.train()
        assert method.training and method.encoder.training and method.encoder.body[0].training
        assert not any(part.training for part in norms(method))
        assert not any(part.training for part in method.decoder.modules())
        dropout = [part for part in method.encoder.modules() if isinstance(part, nn.Dropout)]
        assert dropout and all(part.training for part in dropout)
        method.eval()
        assert not any(part.training for part in method.modules())
    free = qualnet().train()
    assert all(part.training for part in free.modules())


def test_one_part_can_be_frozen_alone():
    decoder_only, norms_only = qualnet(freeze=["decoder"]).train(), qualnet(freeze="batchnorm").train()
    assert not decoder_only.decoder.training and all(part.training for part in norms(decoder_only.encoder))
    assert norms_only.decoder.training and not any(part.training for part in norms(norms_only.encoder))
    assert all(value.requires_grad for value in norms_only.decoder.parameters())


def test_the_frozen_decoder_still_teaches_the_encoder():
    method = qualnet(freeze=["decoder", "batchnorm"]).train()
    feature_map = method.encoder.features(method.prepare(raw_batch())["image"])
    method.decoder(feature_map).sum().backward()
    assert method.encoder.stem[0].weight.grad.abs().sum() > 0
    assert all(value.grad is None for value in method.decoder.parameters())


def test_param_groups_decay_weights_only():
    method = qualnet()
    decayed, plain = method.param_groups()
    assert "weight_decay" not in decayed and plain["weight_decay"] == 0.0
    assert all(value.ndim > 1 for value in decayed["params"]) and all(
        value.ndim == 1 for value in plain["params"]
    )
    given = {id(value) for group in (decayed, plain) for value in group["params"]}
    assert given == {id(value) for value in method.parameters()}
    assert id(method.head.weight) in {id(value) for value in decayed["params"]}


def test_param_groups_leave_out_what_is_frozen():
    method = qualnet(freeze=["decoder", "batchnorm"])
    given = {id(value) for group in method.param_groups() for value in group["params"]}
    frozen = {id(value) for part in (*norms(method.encoder), method.decoder) for value in part.parameters()}
    assert not given & frozen
    assert given | frozen == {id(value) for value in method.parameters()}


def test_wrong_settings_are_named():
    with pytest.raises(UsageError, match="quality_weight .lambda. must be at least 0; found -1"):
        qualnet(quality_weight=-1.0)
    with pytest.raises(UsageError, match="freeze takes decoder and batchnorm; found 'encoder'"):
        qualnet(freeze=["encoder"])
    with pytest.raises(UsageError, match="found 'decodr'"):
        qualnet(freeze="decodr")


def test_a_method_without_forward_says_so():
    with pytest.raises(TypeError, match="Method must define forward"):
        Method()({})
