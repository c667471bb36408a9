import pytest
import torch

from lrface.errors import LrfaceError
from lrface.heads import build_head
from lrface.models import build_backbone
from lrface.models.blocks import parameter_count
from lrface.train.checkpoint import load_model, make_card, save_model


def test_it_is_the_published_network():
    network = build_backbone("madry_mnist")
    head = build_head("softmax", network.embedding_size, 10)
    # 5*5*32 + 32, 5*5*32*64 + 64, 3136*1024 + 1024, 1024*10 + 10.
    assert parameter_count(network) + parameter_count(head) == 832 + 51264 + 3212288 + 10250 == 3274634
    images = torch.rand(3, 1, 28, 28)
    assert network.features(images).shape == (3, 64, 7, 7)
    assert network(images).shape == (3, 1024)


def test_grey_networks_say_so_and_are_no_face_embedders(tmp_path):
    from lrface.embed import load_embedder

    network = build_backbone("madry_mnist")
    card = make_card({"name": "madry_mnist", "arguments": {}}, network, {})
    assert card["input"]["colour"] == "grey"
    save_model(tmp_path, network, card)
    loaded, _ = load_model(tmp_path)
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded(images), network.eval()(images))
    with pytest.raises(LrfaceError, match="takes grey images"):
        load_embedder(tmp_path)
    save_model(tmp_path, network, {**card, "input": {**card["input"], "colour": "RGB"}})
    with pytest.raises(LrfaceError, match="'input.colour' is RGB, that of the network grey"):
        load_model(tmp_path)
