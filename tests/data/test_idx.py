import gzip

import numpy as np
import pytest
from digits import digits, write_idx, write_mnist

from lrface.data.dataset import CachedDataset, FaceDataset
from lrface.data.idx import IdxSource, read_idx
from lrface.data.source import open_source
from lrface.errors import LrfaceError


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_files_are_read_as_they_are(tmp_path, suffix):
    root = write_mnist(tmp_path, 50, 10, suffix)
    images, labels = digits(60)
    source = open_source(root / "mnist" / "train")
    assert isinstance(source, IdxSource) and len(source) == 50
    assert source.identities == [str(number) for number in range(10)]
    assert np.array_equal(source.labels, labels[:50])
    assert source.image(7).shape == (28, 28, 3) and (source.image(7) == images[7][..., None]).all()
    named = open_source(root / "mnist" / "test" / f"t10k-images-idx3-ubyte{suffix}")
    assert len(named) == 10 and (named.image(0)[..., 1] == images[50]).all()
    assert len(set(source.sources())) == 50 and source.encoded(0) is None


def test_a_grey_network_gets_the_bytes_of_the_file(tmp_path):
    source = open_source(write_mnist(tmp_path, 40, 10) / "mnist" / "train")
    images, _ = digits(40)
    for dataset in (FaceDataset(source, 28, channels=1), CachedDataset(source, 28, False, channels=1)):
        batch = dataset.__getitems__([3, 0, 9])
        assert batch["image"].shape == (3, 1, 28, 28)
        assert (batch["image"][:, 0].numpy() == images[[3, 0, 9]]).all()


def test_every_grey_value_survives_three_channels(tmp_path):
    from lrface.data.dataset import in_channels

    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (in_channels(np.repeat(grey[..., None], 3, axis=2), 1)[..., 0] == grey).all()


def test_damage_is_named(tmp_path):
    images, labels = digits(20)
    folder = tmp_path / "a"
    file = write_idx(folder / "train-images-idx3-ubyte", images)
    with pytest.raises(LrfaceError, match="its labels are not beside it; expected .*train-labels-idx1-ubyte"):
        open_source(folder)
    write_idx(folder / "train-labels-idx1-ubyte", labels[:19])
    with pytest.raises(LrfaceError, match="has 20 images, .* 19 labels"):
        open_source(folder)
    whole = file.read_bytes()
    for content, message in (
        (whole[:-1], "holds 15679 bytes after its head, which says 20 x 28 x 28"),
        (b"\x89PNG" + whole[4:], "no IDX file"),
        (whole[:2] + b"\x0d" + whole[3:], "found type 13 in 3"),
        (whole[:10], "no IDX file"),
        (b"", "no IDX file"),
    ):
        file.write_bytes(content)
        with pytest.raises(LrfaceError, match=message):
            read_idx(file, 3)
    packed = folder / "x-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(whole)[:500])
    with pytest.raises(LrfaceError, match="cannot be read"):
        read_idx(packed, 3)
    with pytest.raises(LrfaceError, match="several sets"):
        open_source(folder)
