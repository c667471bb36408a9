import pytest
import torch
from torch.nn import functional as F

from lrface.degrade.policies import build_policy
from lrface.errors import UsageError
from lrface.methods import Restore
from lrface.models import build_network

NETWORKS = {
    "edsr": {"blocks": 1, "features": 4, "scale": 2},
    "compressive_autoencoder": {"width": 8, "code": 4, "blocks": 1},
}


def method(name: str = "edsr", **arguments) -> Restore:
    torch.manual_seed(0)
    return Restore(build_network(name, **NETWORKS[name]), build_policy("clean"), **arguments)


def batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(6, 3, 6, 6, generator=generator)
    images = (F.interpolate(coarse, size=24, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return {"image": images, "seed": 100 + seed}


@pytest.mark.parametrize("loss, distance", [("l1", F.l1_loss), ("l2", F.mse_loss)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_is_the_distance_of_the_pair(name, loss, distance):
    model = method(name, loss=loss).train()
    ready = model.prepare(batch())
    assert "seed" not in ready and ready["image"].dtype == torch.float32
    torch.manual_seed(3)  # of the autoencoder's binary code
    output = model(ready)
    torch.manual_seed(3)
    drawn, wanted = model.encoder.training_pair(ready["image"])
    assert float(output.loss.detach()) == pytest.approx(float(distance(drawn, wanted).detach()), rel=1e-6)
    error = F.mse_loss(drawn.clamp(0, 1), wanted)
    assert float(output.logs["psnr"]) == pytest.approx(-10 * float(error.log10()), rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_it_learns_to_draw_images(name):
    model = method(name).train()
    optimiser = torch.optim.Adam(model.param_groups(), 3e-3)
    psnr = []
    for step in range(40):
        output = model(model.prepare(batch(step % 4)))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        psnr.append(float(output.logs["psnr"]))
    assert sum(psnr[-4:]) / 4 > sum(psnr[:4]) / 4 + 1


def test_another_loss():
    with pytest.raises(UsageError, match="method.loss must be l1 or l2; found 'l3'"):
        method(loss="l3")
