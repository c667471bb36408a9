import pytest
import torch
from torch import nn

from lrface.errors import UsageError
from lrface.models import build_backbone
from lrface.models.memory import recompute_activations

NETWORKS = [("ir18", {"width": 8, "embedding_size": 16}), ("mobilefacenet", {"embedding_size": 16})]


def step(encoder: nn.Module, size: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)  # dropout draws the same numbers in each of the runs that are compared
    encoder(torch.rand(size, 3, 112, 112)).square().sum().backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}


@pytest.mark.parametrize("name, arguments", NETWORKS)
@pytest.mark.parametrize("mode", ["train", "frozen statistics"])
def test_gradients_and_statistics_are_those_of_the_plain_network(name, arguments, mode):
    torch.manual_seed(0)
    plain = build_backbone(name, **arguments)
    saving = build_backbone(name, **arguments)
    saving.load_state_dict(plain.state_dict())
    recompute_activations(saving)
    for encoder in (plain, saving):
        encoder.train(mode == "train")
    expected, found = step(plain), step(saving)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    for key, value in plain.state_dict().items():
        assert torch.equal(saving.state_dict()[key], value), key
    counters = [value for key, value in saving.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counters and {int(value) for value in counters} == {1 if mode == "train" else 0}
    assert list(saving.state_dict()) == list(plain.state_dict())


def test_less_is_kept_for_the_backward_pass():
    def kept(saving: bool) -> int:
        torch.manual_seed(0)
        encoder = build_backbone("ir18", width=8, embedding_size=16)
        if saving:
            recompute_activations(encoder)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder(torch.rand(2, 3, 112, 112))
        return sum(sizes.values())

    assert kept(True) < 0.5 * kept(False)


def test_nothing_is_recomputed_without_gradients():
    encoder = build_backbone("ir18", width=8, embedding_size=16).eval()
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        expected = encoder(images)
        recompute_activations(encoder)
        assert torch.equal(encoder(images), expected)


def test_a_network_without_blocks_is_named():
    with pytest.raises(UsageError, match="trainer.checkpoint_activations: Linear is not made of blocks"):
        recompute_activations(nn.Linear(2, 2))
