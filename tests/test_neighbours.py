"""Faces that look alike: block-wise search against the whole matrix, embedding of sources with broken images."""

import numpy as np
import pytest
import torch

from lrface.data.synthetic import SyntheticFaces
from lrface.embed import load_embedder
from lrface.errors import LrfaceError, UsageError
from lrface.neighbours import alike_findings, embed_source, most_alike


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def brute_force(vectors, labels, within, across):
    """For every image the first of the most alike among those before it, by definition."""
    found = []
    for image in range(len(vectors)):
        for same, threshold in ((True, within), (False, across)):
            best, at = threshold, -1
            for other in range(image):
                if (labels[image] == labels[other]) == same:
                    cosine = float(vectors[image].astype(np.float64) @ vectors[other])
                    if cosine > best:
                        best, at = cosine, other
            found.append((at, best))
    return found


@pytest.mark.parametrize("block", [1, 7, 64, 500])
def test_the_search_in_blocks_finds_what_the_definition_says(block):
    random = np.random.default_rng(0)
    labels = random.integers(0, 12, 150)
    vectors = unit(random.normal(size=(150, 16)) + 2 * random.normal(size=(12, 16))[labels])
    alike = most_alike(vectors, labels, 0.8, 0.4, device="cpu", block=block, show_progress=False)
    expected = brute_force(vectors, labels, 0.8, 0.4)
    assert alike.within.tolist() == [at for at, _ in expected[0::2]]
    assert alike.across.tolist() == [at for at, _ in expected[1::2]]
    for index, cosine, part in (
        (alike.within, alike.within_cosine, expected[0::2]),
        (alike.across, alike.across_cosine, expected[1::2]),
    ):
        np.testing.assert_allclose(cosine[index >= 0], [best for at, best in part if at >= 0], atol=1e-5)
    assert 10 < (alike.within >= 0).sum() < 150
    assert 10 < (alike.across >= 0).sum() < 150


def test_memory_is_that_of_a_block():
    """Cosines of all pairs at once would be 400 MB."""
    import resource

    random = np.random.default_rng(0)
    vectors = unit(random.normal(size=(10_000, 8)))
    labels = np.arange(10_000)
    most_alike(vectors[:3000], labels[:3000], 2, 2, device="cpu", block=1024, show_progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    alike = most_alike(vectors, labels, 0.99, 0.99, device="cpu", block=1024, show_progress=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert (alike.within == -1).all()


def test_rows_of_zeros_are_like_nothing():
    vectors = np.zeros((4, 8), np.float32)
    vectors[:2, 0] = 1
    alike = most_alike(vectors, np.zeros(4, int), 0.5, 0.5, device="cpu", show_progress=False)
    assert alike.within.tolist() == [-1, 0, -1, -1]


class Broken(SyntheticFaces):
    """Synthetic faces of which two cannot be decoded."""

    def image(self, index):
        if index in (2, 5):
            raise LrfaceError("broken")
        return super().image(index)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A small network of random weights, saved and loaded as any model."""
    from lrface.models import build_backbone
    from lrface.train.checkpoint import make_card, save_model

    torch.manual_seed(0)
    arguments = {"embedding_size": 32}
    encoder = build_backbone("mobilefacenet", **arguments).eval()
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, encoder, make_card({"name": "mobilefacenet", "arguments": arguments}, encoder, {}))
    return load_embedder(path)


def test_embedding_a_source_is_embedding_its_images(embedder):
    source = Broken(identities=3, images_per_identity=3, size=64)
    vectors = embed_source(source, embedder, batch_size=2, show_progress=False)
    assert vectors.shape == (9, 32)
    known = [index for index in range(9) if index not in (2, 5)]
    assert (vectors.any(axis=1).nonzero()[0]).tolist() == known
    import cv2

    images = np.stack(
        [cv2.resize(source.image(i), (112, 112), interpolation=cv2.INTER_LINEAR) for i in known]
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    expected = torch.nn.functional.normalize(embedder.embed_tensor(pixels), dim=1)
    np.testing.assert_allclose(vectors[known], expected.numpy(), atol=1e-5)
    with pytest.raises(UsageError, match="batch_size"):
        embed_source(source, embedder, batch_size=0)


def test_findings_name_both_images_and_the_cosine():
    source = SyntheticFaces(identities=2, images_per_identity=2, size=16)
    vectors = unit(np.array([[1, 0, 0], [1, 0.1, 0], [0, 0, 1], [1, 0.3, 0.0]]))
    findings = alike_findings(source, vectors, 0.99, 0.9, device="cpu", show_progress=False)
    assert [(one.kind, one.index, one.other) for one in findings] == [
        ("near duplicate", 1, 0),
        ("label noise", 3, 1),
    ]
    cosine = float(vectors[3] @ vectors[1])
    assert findings[1].detail == f"cosine {cosine:.4f}"
    with pytest.raises(UsageError, match="--label-noise"):
        alike_findings(source, vectors, 0.9, 1.5)
