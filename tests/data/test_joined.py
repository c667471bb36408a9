import numpy as np
import pytest
import yaml

from lrface import config, recipes
from lrface.data.dataset import FaceDataset
from lrface.data.joined import JoinedSource
from lrface.data.packed import PackedWriter
from lrface.data.source import FaceSource, check_source
from lrface.data.synthetic import SyntheticFaces
from lrface.errors import LrfaceError, UsageError


class Numbers:
    """Image k of a set shows ``first`` + k."""

    format = "numbers"

    def __init__(self, first: int, labels: list[int], identities: list[str]):
        self.first, self.labels, self.identities = first, np.array(labels, dtype=np.int64), identities

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        return np.full((2, 2, 3), self.first + index, dtype=np.uint8)

    def encoded(self, index: int) -> bytes | None:
        return None

    def sources(self) -> list[str]:
        return [f"{k}.png" for k in range(len(self))]


def joined() -> JoinedSource:
    parts = [Numbers(0, [0, 1, 0], ["a", "b"]), Numbers(100, [1, 1], ["a", "b"])]
    return JoinedSource(parts, ["one", "two"])


def test_images_follow_one_another():
    source = joined()
    assert isinstance(source, FaceSource) and len(source) == 5
    assert source.labels.tolist() == [0, 1, 0, 1, 1]
    assert [int(source.image(index)[0, 0, 0]) for index in (0, 2, 3, 4, -1, -5)] == [0, 2, 100, 101, 101, 0]
    assert source.sources() == ["0/0.png", "0/1.png", "0/2.png", "1/0.png", "1/1.png"]
    check_source(source, "both")
    batch = FaceDataset(source, 2).__getitems__([4, 0])
    assert batch["image"][:, 0, 0, 0].tolist() == [101, 0] and batch["label"].tolist() == [1, 0]
    for index in (5, -6):
        with pytest.raises(IndexError):
            source.image(index)


@pytest.mark.parametrize(
    ("identities", "said"),
    [(["a", "c"], "label 1 is 'c' and 'b'"), (["a", "b", "c"], "3 and 2 identities")],
)
def test_other_identities(identities, said):
    with pytest.raises(LrfaceError, match=f"data.path: two and one cannot be joined: {said}"):
        JoinedSource([Numbers(0, [0, 1], ["a", "b"]), Numbers(0, [0, 1], identities)], ["one", "two"])


def recipe(path) -> config.Recipe:
    text = f"""
name: joined
data: {{path: {path}, batch_size: 2}}
backbone: {{name: mobilefacenet}}
stages: [{{name: only, method: classify, steps: 1}}]
"""
    return config.parse_recipe(yaml.safe_load(text))


def test_a_recipe_names_several_sets(tmp_path):
    faces = SyntheticFaces(identities=2, images_per_identity=2)
    for name in ("clean", "more"):
        (tmp_path / name).mkdir()
        writer = PackedWriter(tmp_path / name)
        for index in range(len(faces)):
            unknown = {"face": 0, "landmarks": np.zeros(10), "box": np.zeros(4), "score": 0.0}
            label = int(faces.labels[index])
            said = {"label": label, "identity": faces.identities[label], "source": str(index)}
            writer.add({"image": png(faces.image(index)), **said, **unknown})
        writer.finish((112, 112), faces.identities)
    source, name = recipes.build_source(recipe("[clean, more]"), tmp_path)
    assert len(source) == 8 and name == f"{tmp_path / 'clean'} + {tmp_path / 'more'}"
    np.testing.assert_array_equal(source.image(6), faces.image(2))
    alone, name = recipes.build_source(recipe("clean"), tmp_path)
    assert len(alone) == 4 and name == str(tmp_path / "clean")
    with pytest.raises(LrfaceError, match="training data 'none' was not found"):
        recipes.build_source(recipe("[clean, none]"), tmp_path)


def png(image: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_a_path_is_a_name_or_a_list_of_names():
    assert config.parse_recipe(yaml.safe_load(config.to_yaml(recipe("[a, b]")))).data.path == ["a", "b"]
    with pytest.raises(UsageError, match="data.path must name at least one set"):
        recipe("[]")
    with pytest.raises(UsageError, match="data.path must be of type str; found 3"):
        recipe("3")
