"""Sample sheets: what they show, when they are drawn, and that training does not notice."""

import numpy as np
import pytest
import torch
from PIL import Image

from lrface.data.sheet import LABEL_WIDTH, MARGIN, TILE
from lrface.degrade.policies import build_policy
from lrface.degrade.policy import Policy, ResolutionPolicy
from lrface.degrade.resolution import resample
from lrface.errors import LrfaceError
from lrface.heads import build_head
from lrface.methods import Classify, QualNet
from lrface.models import build_backbone, build_decoder
from lrface.train.observe import Observers
from lrface.train.sheets import SampleSheets, kind_of, pick_faces, sample_rows, spread

POLICY = ResolutionPolicy(sizes=(56, 28, 14))


class Faces:
    """Smooth pictures, 3 an identity; images of ``broken`` identities cannot be read."""

    def __init__(self, identities: int = 10, broken: tuple[int, ...] = ()):
        self.identities = [f"person {k}" for k in range(identities)]
        self.labels = np.repeat(np.arange(identities), 3)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        if self.labels[index] in self.broken:
            raise LrfaceError(f"{index}.jpg cannot be decoded")
        coarse = np.random.default_rng(index).integers(0, 256, (4, 4, 3)).astype(np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((112, 112)))


def qualnet() -> QualNet:
    torch.manual_seed(0)
    encoder = build_backbone("ir18", width=4, embedding_size=8, dropout=0.4)
    decoder = build_decoder("subpixel", encoder.feature_channels, width=16, blocks=0)
    return QualNet(encoder, build_head("cosface", 8, 10), decoder, POLICY)


def test_faces_are_of_different_people_and_the_same_each_time():
    names, images = pick_faces(Faces(), 8, 112, seed=3)
    assert len(set(names)) == 8 and images.shape == (8, 112, 112, 3) and images.dtype == np.uint8
    again = pick_faces(Faces(), 8, 112, seed=3)
    assert again[0] == names and np.array_equal(again[1], images)
    few, _ = pick_faces(Faces(identities=3), 8, 112, seed=3)
    assert sorted(few) == ["person 0", "person 1", "person 2"]
    readable, _ = pick_faces(Faces(broken=(0, 1, 2, 3)), 8, 112, seed=3)
    assert sorted(readable) == [f"person {k}" for k in range(4, 10)]
    assert pick_faces(Faces(2, broken=(0, 1)), 8, 56, seed=3)[1].shape == (0, 56, 56, 3)


def test_rows_show_what_the_encoder_sees_and_what_the_decoder_restores():
    method = qualnet().eval()
    names, images = pick_faces(Faces(), 8, 112, seed=0)
    rows, columns = sample_rows(method, names, images, seed=5)
    assert columns == ["input", "degraded", "restored"] and len(rows) == 8
    shown = [int(row.lines[0].split()[0]) for row in rows]
    assert shown == [112, 112, 56, 56, 28, 28, 14, 14]
    assert sorted(row.lines[1] for row in rows) == sorted(names)
    for row, size in zip(rows, shown, strict=True):
        (clean,), (seen,), (restored,) = row.groups
        face = images[names.index(row.lines[1])]
        assert ("(clean)" in row.lines[0]) == (size == 112)
        assert any(np.array_equal(clean, version) for version in (face, face[:, ::-1]))  # mirrored or not
        low = resample(torch.from_numpy(clean).permute(2, 0, 1)[None] / 255.0, size)
        assert np.abs(seen.astype(int) - (low[0].permute(1, 2, 0).numpy() * 255).round()).max() <= 1
        with torch.no_grad():
            seen_tensor = torch.from_numpy(seen).permute(2, 0, 1)[None] / 255.0
            again = method.decoder(method.encoder.features(seen_tensor))[0].clamp(0, 1)
        # The sheet's pictures are rounded to 8 bits, which the network sees.
        assert np.abs(restored / 255 - again.permute(1, 2, 0).numpy()).mean() < 0.05
        error = float(row.lines[2].removeprefix("mean error "))
        assert error == pytest.approx(np.abs(restored / 255 - clean / 255).mean(), abs=0.004)


def test_a_method_without_decoder_or_policy_has_fewer_columns():
    method = qualnet()
    names, images = pick_faces(Faces(), 2, 112, seed=0)
    classify = Classify(method.encoder, method.head, ResolutionPolicy(clean_share=1.0))
    rows, columns = sample_rows(classify, names, images, seed=5)
    assert columns == ["input", "degraded"] and [row.lines[0] for row in rows] == ["112 x 112 (clean)"] * 2
    del classify.policy
    rows, columns = sample_rows(classify, names, images, seed=5)
    assert columns == ["input"] and np.array_equal(rows[0].groups[0][0], images[0])


def kinds(policy: Policy, n: int = 256) -> list[tuple[bool, int, str]]:
    parameters = policy.sample(n, 112, torch.Generator().manual_seed(9))
    return [kind_of(policy, parameters, row, 112) for row in range(n)]


def test_rows_are_spread_over_what_is_drawn():
    drawn = kinds(ResolutionPolicy(continuous=(8, 60)))
    assert len(set(drawn)) > 30
    rows = spread(drawn, 8)
    assert sorted(row // 32 for row in rows) == list(range(8))
    shown = [-drawn[row][1] for row in rows]
    assert shown == sorted(shown, reverse=True) and shown[0] == 112 and shown[1] > 40 and shown[-1] < 16


def test_every_policy_is_put_in_words():
    mixed = build_policy(
        "mixed",
        parts=[{"name": "resolution", "sizes": [14]}, {"name": "corruptions", "names": ["fog", "contrast"]}],
    )
    words = {kind[-1] for kind in kinds(mixed)}
    assert words == {
        "112 x 112 (clean)",
        "14 x 14",
        *(f"{name} {severity}" for name in ("fog", "contrast") for severity in range(1, 6)),
    }
    chain = build_policy(
        "chain",
        parts=[
            {"name": "resolution", "sizes": [28]},
            {"name": "corruptions", "names": ["fog"], "severities": [2]},
        ],
    )
    assert {kind[-1] for kind in kinds(chain)} == {"112 x 112 (clean)", "28 x 28, fog 2"}
    assert {kind[-1] for kind in kinds(build_policy("augmix"))} <= {"112 x 112 (clean)", "degraded"}


def test_corrupted_faces_are_those_of_the_policy():
    policy = build_policy("corruptions", names=["contrast", "jpeg_compression"], mirror=0.0)
    names, images = pick_faces(Faces(), 8, 112, seed=0)
    rows, _ = sample_rows(Classify(qualnet().encoder, qualnet().head, policy), names, images, seed=5)
    assert "(clean)" in rows[0].lines[0] and len({row.lines[0] for row in rows}) == 8
    for row in rows:
        (clean,), (seen,) = row.groups
        assert np.array_equal(clean, images[names.index(row.lines[1])])
        assert np.array_equal(clean, seen) == ("(clean)" in row.lines[0])


def test_sheets_are_drawn_at_the_start_every_so_often_and_at_the_end(tmp_path):
    method = qualnet().train()
    modes = [module.training for module in method.modules()]
    state, before = torch.get_rng_state(), {key: value.clone() for key, value in method.state_dict().items()}
    sheets = SampleSheets(3, Faces(), 112, 0, "recipe, stage", steps=7)
    observer = Observers([sheets])
    observer.begin(0, method, tmp_path)
    for step in range(1, 8):
        assert observer.after_step(step, method) is False
    observer.end()
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step-{step:08d}.png" for step in (0, 3, 6, 7)]
    sheet = np.asarray(Image.open(tmp_path / "samples" / names[0]))
    assert sheet.shape[0] > 8 * TILE and sheet.shape[1] > MARGIN + LABEL_WIDTH + 3 * TILE
    # Weights did not change between the sheets, nor did the faces and degradations: but for the title they are alike.
    last = np.asarray(Image.open(tmp_path / "samples" / names[3]))
    assert np.array_equal(sheet[80:], last[80:]) and not np.array_equal(sheet, last)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in method.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())


def test_a_resumed_stage_has_no_second_first_sheet(tmp_path):
    SampleSheets(3, Faces(), 112, 0).begin(4, qualnet(), tmp_path)
    assert not (tmp_path / "samples").exists()


def test_faces_that_cannot_be_read_end_no_job(tmp_path):
    said: list[str] = []
    sheets = SampleSheets(1, Faces(2, broken=(0, 1)), 112, 0, say=said.append)
    sheets.begin(0, qualnet(), tmp_path)
    sheets.after_step(1, qualnet())
    assert not (tmp_path / "samples").exists()
    assert said == ["sample sheets: none of the faces tried can be read; `lrface data check` lists why"]


def test_training_goes_on_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("lrface.train.sheets.can_draw", lambda: False)
    said: list[str] = []
    sheets = Observers([SampleSheets(1, Faces(), 112, 0, say=said.append)])
    sheets.begin(0, qualnet(), tmp_path)
    sheets.after_step(1, qualnet())
    assert not (tmp_path / "samples").exists()
    assert said == ["sample sheets: matplotlib is missing, so there are none"]


def test_a_second_process_writes_nothing(tmp_path):
    SampleSheets(1, Faces(), 112, 0, main=False).begin(0, qualnet(), tmp_path)
    assert not (tmp_path / "samples").exists()
