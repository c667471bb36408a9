"""How well a linear classifier tells classes apart by what networks make of degraded images: paper 002, section 4 and
appendix D. Above features, classifiers and degrade, below the command line.

    lrface probe cifar10/train.parquet cifar10/test.parquet --model student=RUN --model teacher=CLEAN \
        --own-head supervised=OTHER --degrade '{name: gaussian_noise, sigma: 0.5}' --labels 1.0,0.1 --seeds 10

Training and test images go through a forward operator, any policy of lrface.degrade.policies; every network sees the same
draws. Networks stay as they are: their features are kept on disk by what they are made from, so that the next probe of
them takes seconds. A linear layer is fitted to the training features (Adam 1e-3, batches of 128, 10 epochs; batches of 8
where only part of the labels is used, as in the paper) and judged on several draws of the test images.

Features are scaled to length sqrt(d): losses and cosines know directions only, and Adam's steps then mean the same for
features of any length and width. Unlike the paper, which crops, flips and distorts training images anew each epoch, they
are framed and degraded once, or ``views`` times, which epochs take by turns.
"""

import hashlib
import json
import math
import os
import statistics
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import lrface
from lrface.benchmarks.image_sets import FileImages, ImageSet, SourceImages, batches, check_labels
from lrface.benchmarks.imagenet_lists import IMAGENET_100_SHIFT
from lrface.benchmarks.locate import cache_root
from lrface.benchmarks.report import Findings
from lrface.benchmarks.robustness import class_subset
from lrface.corrupt import named_set
from lrface.data.subset import label_rows
from lrface.degrade.policies import POLICIES, build_policy, one_thread
from lrface.degrade.policy import Policy, rows_of
from lrface.errors import LrfaceError, UsageError
from lrface.features import Network, open_data, open_networks, parse_named
from lrface.files import atomic_file
from lrface.progress import progress
from lrface.registry import nearest
from lrface.restorers import Restorer, build_restorer
from lrface.train.trainer import resolve_device

if TYPE_CHECKING:
    from lrface.zero_shot import TextClassifier

CHUNK = 256
"""Images that a policy draws for at once. Draws belong to places in the data: which of them are used changes nothing."""

FIGURES = ("top1", "top5", "auc")


# ------------------------------------------------------------------------------------------------- forward operators


def parse_block(text: str, option: str) -> tuple[str, dict[str, Any]]:
    """ "clean" -> ("clean", {}); "{name: pixel_mask, share: 0.9}" -> ("pixel_mask", {"share": 0.9}).

    Raises:
        UsageError: neither a name nor a YAML mapping with a name.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{option} {text!r}: no valid YAML: {' '.join(str(error).split())}") from error
    found = {"name": found} if isinstance(found, str) else found
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise UsageError(
            f"{option} {text!r}: give a name, or a mapping with a name: '{{name: gaussian_noise, sigma: 0.5}}'"
        )
    return found["name"], {str(key): value for key, value in found.items() if key != "name"}


@dataclass(frozen=True, eq=False)
class Operator:
    """A forward operator A(x): a policy by name and arguments. All images are degraded unless it has a clean_share."""

    name: str
    arguments: dict[str, Any]

    @classmethod
    def parse(cls, text: str, option: str = "--degrade") -> "Operator":
        """As command lines write it. Raises UsageError for what no policy takes."""
        found = cls(*parse_block(text, option))
        try:
            found.policy(training=True)
        except UsageError as error:
            raise UsageError(f"{option} {text!r}: {error}") from error
        return found

    def policy(self, training: bool) -> Policy:
        """With ``training`` images are mirrored and cropped as the policy does by itself, else they stay in place."""
        arguments = dict(self.arguments)
        known = POLICIES.parameters(self.name)
        if "clean_share" in known:
            arguments.setdefault("clean_share", 0.0)
        if not training:
            arguments.pop("crop_padding", None)
            if "mirror" in known:
                arguments["mirror"] = 0.0
        return build_policy(self.name, **arguments)

    @property
    def plain(self) -> dict[str, Any]:
        return {"name": self.name, **self.arguments}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.arguments.items())])


def draw(policy: Policy, count: int, side: int, *numbers: int) -> Any:
    """The parameters of ``count`` images by the numbers: seed, draw, place."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return policy.sample(count, side, torch.Generator().manual_seed(int(state) & 2**63 - 1))


def is_fixed(policy: Policy, side: int) -> bool:
    """Whether a policy does the same to every image whatever is drawn, as blur of one strength does."""
    return _alike(draw(policy, 64, side, 0), draw(policy, 64, side, 1))


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_alike, first, second))
    if is_dataclass(first):
        return all(_alike(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    return bool(first == second)


# --------------------------------------------------------------------------------------------------------- figures


def classification_figures(
    scores: NDArray[np.floating], labels: NDArray[np.int64]
) -> dict[str, float | None]:
    """Top-1 and top-5 in percent, and the area under the ROC curve.

    Args:
        scores: float [n, k], logits.
        labels: int64 [n], 0 to k - 1.

    Returns:
        top1; top5, None for five classes or fewer; auc, 0 to 1: the mean over the classes that have images of the area
        under the curve of one class against the rest by its softmax probability, where ties count half (macro
        one-vs-rest; with two classes the usual area). None where all images are of one class.
    """
    from scipy.special import softmax
    from scipy.stats import rankdata

    count, classes = scores.shape
    best = torch.from_numpy(np.asarray(scores, dtype=np.float64)).topk(min(5, classes), dim=1).indices.numpy()
    hits = best == labels[:, None]
    ranks = rankdata(softmax(scores.astype(np.float64), axis=1), axis=0)
    areas = []
    for label in np.unique(labels):
        own = labels == label
        positives, negatives = int(own.sum()), int(count - own.sum())
        if negatives:
            above = ranks[own, label].sum() - positives * (positives + 1) / 2
            areas.append(above / (positives * negatives))
    return {
        "top1": float(100 * hits[:, 0].mean()),
        "top5": float(100 * hits.any(axis=1).mean()) if classes > 5 else None,
        "auc": float(np.mean(areas)) if areas else None,
    }


def summarised(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, its standard error (the sample's deviation over sqrt(n); None for one value) and the values themselves."""
    there = [value for value in values if value is not None]
    if not there:
        return {"mean": None, "standard_error": None, "values": []}
    error = statistics.stdev(there) / math.sqrt(len(there)) if len(there) > 1 else None
    return {
        "mean": round(statistics.mean(there), 6),
        "standard_error": None if error is None else round(error, 6),
        "values": [round(value, 6) for value in there],
    }


# ------------------------------------------------------------------------------------------------- linear classifier


@dataclass(frozen=True)
class ProbeSettings:
    """How the linear classifier is fitted; defaults are the paper's (appendix D.1).

    Attributes:
        epochs, learning_rate, batch_size: of Adam.
        few_batch_size: in place of batch_size where less than all labels are used.
    """

    epochs: int = 10
    learning_rate: float = 1e-3
    batch_size: int = 128
    few_batch_size: int = 8


def directions(features: NDArray[np.float32]) -> Tensor:
    """float32 [..., d] -> the same, of length sqrt(d)."""
    found = torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32))
    return F.normalize(found, dim=-1) * math.sqrt(found.shape[-1])


def fit_linear(
    views: Sequence[Tensor], labels: Tensor, classes: int, settings: ProbeSettings, few: bool, seed: int
) -> nn.Linear:
    """A linear layer on features, by cross entropy.

    Args:
        views: float32 [n, d] each, features of the same images; an epoch takes one, by turns.
        labels: int64 [n].
        few: whether these are but part of the labels.
        seed: of the layer's first weights and the order of images.
    """
    size = settings.few_batch_size if few else settings.batch_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(views[0].shape[1], classes)
    optimiser = torch.optim.Adam(layer.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    with one_thread(), torch.enable_grad():
        for epoch in range(settings.epochs):
            features = views[epoch % len(views)]
            for rows in torch.randperm(len(labels), generator=generator).split(size):
                optimiser.zero_grad()
                F.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimiser.step()
    return layer.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- images


def prepare_image(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """uint8 [side, side, 3], as in appendix D.1 (224 pixels): small images, CIFAR's and STL-10's, are resized to it; of
    larger ones the shorter side is brought to 8/7 of it (256) and the middle is cut out. Bilinear, antialiased; what has
    this size already stays as it is."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, resize

    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    height, width = image.shape[:2]
    if height == width == side:
        return image
    picture = Image.fromarray(image)
    if max(height, width) <= side:
        return np.asarray(resize(picture, [side, side]))
    return np.asarray(center_crop(resize(picture, [round(side * 8 / 7)]), [side, side]))


def _digest(images: ImageSet, rows: NDArray[np.int64]) -> str:
    """A hash of the chosen images as they are stored, of their names and places."""
    digest = hashlib.sha256(rows.tobytes())
    for row in rows.tolist():
        digest.update(images.names[row].encode("utf-8", "surrogateescape") + b"\0")
        try:
            data = None
            if isinstance(images, FileImages):
                data = (images.root / images.names[row]).read_bytes()
            elif isinstance(images, SourceImages):
                data = images.source.encoded(row)
            if data is None:
                pixels = images.read(row)
                data = str(pixels.shape).encode() + pixels.tobytes()
        except (OSError, LrfaceError, ValueError) as error:
            data = str(error).encode()
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def _code() -> str:
    """A hash of the code that degrades and restores."""
    folder = Path(lrface.__file__).parent
    digest = hashlib.sha256()
    for file in [
        *sorted((folder / "degrade").rglob("*.py")),
        folder / "restorers.py",
        folder / "models" / "deep_decoder.py",
    ]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@dataclass
class _Split:
    """Training or test images: which are used, and their labels by the probe's classes."""

    images: ImageSet
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]  # of every image of the set; -1 where unused
    number: int  # 0 for training, 1 for test: part of what is drawn from
    digest: str = ""
    broken: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """One draw of one operator."""

    operator: Operator
    number: int


@dataclass
class _Found:
    """Features float32 [n, d] of the images that could be read, int64 [n], and what could not with its reason."""

    features: NDArray[np.float32]
    rows: NDArray[np.int64]
    broken: list[tuple[str, str]]


class _Store:
    """Features on disk, a file for each network, set of images and draw."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings

    def path(self, network: Network, split: _Split, job: _Job, restore: Any) -> Path | None:
        # A module:function may depend on more than the source that can be hashed.
        said = network.card.get("format"), network.card.get("described_by")
        if self.folder is None or "python" in said or "module:function" in said:
            return None
        key = {
            **self.settings,
            "model": network.sha256,
            "card": network.card,
            "data": split.digest,
            "split": split.number,
            "operator": job.operator.plain,
            "draw": job.number,
            "restore": restore,
        }
        text = json.dumps(key, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.npz"

    def get(self, path: Path | None) -> _Found | None:
        """What is kept there; a file that cannot be read is passed over."""
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                features, rows, broken = stored["features"], stored["rows"], stored["broken"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if features.dtype != np.float32 or features.ndim != 2 or len(features) != len(rows):
            return None
        return _Found(features, rows, [(str(name), str(why)) for name, why in broken])

    def put(self, path: Path | None, found: _Found) -> None:
        if path is None:
            return
        broken = np.array(found.broken, dtype=np.str_).reshape(-1, 2)
        with atomic_file(path) as aside, open(aside, "wb") as file:
            np.savez(file, features=found.features, rows=found.rows, broken=broken)


class _Extractor:
    """Features of splits by networks, from the store or anew."""

    def __init__(
        self, side: int, seed: int, store: _Store, device: str, batch_size: int, workers: int, show: bool
    ):
        self.side, self.seed, self.store, self.device = side, seed, store, device
        self.batch_size, self.workers, self.show = batch_size, workers, show

    def __call__(
        self,
        split: _Split,
        jobs: Sequence[_Job],
        networks: Sequence[Network],
        restore: tuple[dict[str, Any], Restorer] | None = None,
    ) -> dict[tuple[str, _Job], NDArray[np.float32]]:
        """(name of the network, job) -> float32 [rows of the split, d]. Images that cannot be read leave the split."""
        said = None if restore is None else restore[0]
        found: dict[tuple[str, _Job], _Found] = {}
        missing: list[tuple[Network, _Job]] = []
        for job in jobs:
            for network in networks:
                kept = self.store.get(self.store.path(network, split, job, said))
                if kept is None:
                    missing.append((network, job))
                else:
                    found[network.name, job] = kept
        # Restoring takes long: what one draw gave is kept before the next.
        passes = [[job] for job in jobs] if restore is not None else [list(jobs)]
        count = len(split.rows) * len(missing)
        what = "training" if split.number == 0 else "test"
        with progress(count, f"{what} features", unit="images", enabled=self.show and bool(missing)) as bar:
            for some in passes:
                wanted = [(network, job) for network, job in missing if job in some]
                if not wanted:
                    continue
                fresh = self._pass(split, wanted, None if restore is None else restore[1], bar.advance)
                for (network, job), features in zip(wanted, fresh, strict=True):
                    found[network.name, job] = features
                    self.store.put(self.store.path(network, split, job, said), features)
        first = next(iter(found.values()))
        split.broken.update(first.broken)
        if not len(first.rows):
            name, reason = first.broken[0]
            raise LrfaceError(
                f"{split.images.origin}: none of its images can be used; the first: {name}: {reason}"
            )
        split.rows = first.rows
        return {key: each.features for key, each in found.items()}

    def _pass(
        self,
        split: _Split,
        wanted: Sequence[tuple[Network, _Job]],
        restorer: Restorer | None,
        advance: Callable[[int], None],
    ) -> list[_Found]:
        policies = {job: job.operator.policy(training=split.number == 0) for _, job in wanted}
        parts: list[list[Tensor]] = [[] for _ in wanted]
        rows: list[int] = []
        broken: list[tuple[str, str]] = []
        for place in np.unique(split.rows // CHUNK).tolist():
            chunk = split.rows[split.rows // CHUNK == place].tolist()
            for good, pixels, failed in batches(
                lambda row: prepare_image(split.images.read(row), self.side), chunk, CHUNK, self.workers
            ):
                broken += [(split.images.names[row], reason) for row, reason in failed]
                advance(len(failed) * len(wanted))
                if not good:
                    continue
                rows += good
                images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float().div(255)
                which = torch.tensor(good) % CHUNK
                degraded: dict[_Job, Tensor] = {}
                for job, policy in policies.items():
                    numbers = (self.seed, split.number, job.number, place)
                    parameters = rows_of(draw(policy, CHUNK, self.side, *numbers), which)
                    seen = policy.apply(images.contiguous(), parameters)[0]
                    degraded[job] = (seen if restorer is None else restorer(seen)).cpu()
                for (network, job), part in zip(wanted, parts, strict=True):
                    part.append(self._through(network, degraded[job]))
                    advance(len(good))
        return [
            _Found(
                torch.cat(part).numpy() if part else np.empty((0, 0), np.float32),
                np.array(rows, dtype=np.int64),
                broken,
            )
            for part in parts
        ]

    def _through(self, network: Network, images: Tensor) -> Tensor:
        found = torch.cat(
            [network.features(part).detach().float().cpu() for part in images.split(self.batch_size)]
        )
        if not bool(torch.isfinite(found).all()):
            raise LrfaceError(f"model {network.text}: its features are not finite; its weights are broken")
        return found


# --------------------------------------------------------------------------------------------------------- classes


def _names(images: ImageSet) -> list[str]:
    count = int(check_labels(images).max()) + 1
    return [str(number) for number in range(count)] if images.classes is None else list(images.classes)


def _only_numbers(names: Sequence[str]) -> bool:
    return all(name.isdigit() and int(name) == number for number, name in enumerate(names))


def _check_known(wanted: Sequence[str], names: Sequence[str], option: str, where: str) -> None:
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise UsageError(
            f"{option}: {where} has no class {unknown[0]!r}{nearest(unknown[0], names)}; it has "
            f"{', '.join(list(names)[:5])}{', ...' if len(names) > 5 else ''}"
        )


def parse_shares(text: str) -> list[float]:
    """ "1.0,0.1" -> [1.0, 0.1]. Raises UsageError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--labels {text!r}: give shares with commas between: 1.0,0.1") from error


def parse_relabel(text: str) -> dict[str, str]:
    """ "cup=cocktail shaker,wood rabbit=hare" -> what test images are taken for; "imagenet100" are the five classes of
    Table 3. Raises UsageError."""
    if text == "imagenet100":
        return dict(IMAGENET_100_SHIFT)
    found: dict[str, str] = {}
    for part in text.split(","):
        old, equals, new = (word.strip() for word in part.partition("="))
        if not equals or not old or not new or old in found:
            raise UsageError(
                f"--relabel {text!r}: give imagenet100, or TEST CLASS=TRAINING CLASS with commas between, each once"
            )
        found[old] = new
    return found


def _splits(
    train: ImageSet,
    test: ImageSet,
    classes: Sequence[str] | None,
    relabel: Mapping[str, str] | None,
) -> tuple[list[str], _Split, _Split]:
    """The probe's classes, its training images and its test images."""
    names, others = _names(train), _names(test)
    if classes is None:
        counts = np.bincount(check_labels(train), minlength=len(names))
        chosen = [name for name, count in zip(names, counts, strict=True) if count]
    else:
        _check_known(classes, names, "--classes", train.origin)
        chosen = [name for name in names if name in set(classes)]
    if len(chosen) < 2:
        raise UsageError(f"{train.origin}: a probe tells at least 2 classes apart; found {len(chosen)}")
    number = {name: place for place, name in enumerate(chosen)}
    if relabel is not None:
        _check_known(list(relabel), others, "--relabel", test.origin)
        _check_known(list(relabel.values()), chosen, "--relabel", f"the training data ({train.origin})")
        judged = {old: number[new] for old, new in relabel.items()}
    elif len(others) == len(names) and (_only_numbers(names) or _only_numbers(others)):
        judged = {other: number[name] for name, other in zip(names, others, strict=True) if name in number}
    else:
        judged = {name: number[name] for name in others if name in number}
        unknown = [name for name in others if name not in names]
        if unknown and classes is None:
            raise UsageError(
                f"{test.origin} has the class {unknown[0]!r}{nearest(unknown[0], names)}, which {train.origin} lacks: name "
                "the classes that are meant with --classes, or what they are taken for with --relabel"
            )

    def split(images: ImageSet, all_names: Sequence[str], wanted: Mapping[str, int], which: int) -> _Split:
        table = np.array([wanted.get(name, -1) for name in all_names], dtype=np.int64)
        labels = table[check_labels(images)]
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise LrfaceError(f"{images.origin}: has no images of the classes that are meant")
        return _Split(images, rows, labels, which)

    return chosen, split(train, names, number, 0), split(test, others, judged, 1)


# ----------------------------------------------------------------------------------------------------------- running


class ProbeRun(Findings):
    """What a probe found.

    Attributes:
        about: ``train, test, classes, images`` (of each split), ``size, degrade, train_degrade, test_degrade, restore,
            labels, seeds, views, seed, settings, relabel, broken``.
        results: for each network, share of labels and test operator ``name, model, model_sha256, classifier`` ("probe",
            "own head", "zero-shot", or the name of the network whose probe it is), ``labels, training_images,
            test_degrade`` and for each of :data:`FIGURES` ``mean, standard_error, values``.
    """

    def to_text(self) -> str:
        """What is printed."""
        about = self.about
        train, test = about["images"]["train"], about["images"]["test"]
        lines = [
            f"{about['train']}: {train:,} images, {len(about['classes'])} classes, {_said(about['train_degrade'])}; "
            f"tested on {test:,} of {about['test']}"
        ]
        width = max(len("model"), *(len(result["name"]) for result in self.results))
        operators = [_said(operator) for operator in about["test_degrade"]]
        wide = max(len("test images"), *map(len, operators))
        heads = max(len("classifier"), *(len(result["classifier"]) for result in self.results))
        lines.append(
            f"{'model':{width}}  {'classifier':{heads}}  {'labels':>7}  {'test images':{wide}}  "
            f"{'top-1 (%)':>15} {'top-5 (%)':>15} {'AUC':>17}"
        )
        for result in self.results:
            share = "-" if result["labels"] is None else f"{100 * result['labels']:g} %"
            cells = [_cell(result[name], 2 if name != "auc" else 4) for name in FIGURES]
            lines.append(
                f"{result['name']:{width}}  {result['classifier']:{heads}}  {share:>7}  "
                f"{_said(result['test_degrade']):{wide}}  {cells[0]:>15} {cells[1]:>15} {cells[2]:>17}"
            )
        draws = {len(result["top1"]["values"]) for result in self.results}
        lines.append(
            f"mean and standard error over {max(draws)} draws of the degraded test images"
            + ("" if about["restore"] is None else f", restored by {_said(about['restore'])}")
        )
        for split, broken in about["broken"].items():
            if broken:
                lines.append(f"{len(broken)} {split} images left out, the first: {': '.join(broken[0])}")
        return "\n".join(lines)


def _said(block: Mapping[str, Any]) -> str:
    return " ".join([block["name"], *(f"{key}={value}" for key, value in block.items() if key != "name")])


def _cell(figure: Mapping[str, Any], digits: int) -> str:
    if figure["mean"] is None:
        return "-"
    error = "" if figure["standard_error"] is None else f" ± {figure['standard_error']:.{digits}f}"
    return f"{figure['mean']:.{digits}f}{error}"


def run_probe(
    models: Sequence[str],
    train: str | Path,
    test: str | Path,
    *,
    degrade: str = "clean",
    train_degrade: str | None = None,
    test_degrade: Sequence[str] = (),
    labels: Sequence[float] = (1.0,),
    seeds: int = 10,
    own_heads: Sequence[str] = (),
    classifier_of: str | None = None,
    restore: str | None = None,
    classes: str | None = None,
    relabel: str | None = None,
    images: int | None = None,
    views: int = 1,
    image_set: str | None = None,
    zero_shot: bool = False,
    text_weights: str | None = None,
    prompts: str = "openai",
    class_names: str | None = None,
    settings: ProbeSettings | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    cache: str | Path | None = None,
    keep_features: bool = True,
    device: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    show_progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> ProbeRun:
    """Linear probes of networks on degraded images; see this module.

    Args:
        models: ``NAME=MODEL`` or MODEL, as in :func:`lrface.features.run_features`. An untouched teacher is one of them.
        train, test: images with classes, see :func:`lrface.features.open_data`; of another data set than the networks
            were trained on for transfer.
        degrade: the forward operator for both, see :meth:`Operator.parse`.
        train_degrade: another one for training images; ``clean`` where ``restore`` is given.
        test_degrade: others for test images, each judged apart.
        labels: shares of the training labels, above 0 to 1, drawn alike from each class; a smaller share's images are
            among a larger one's.
        seeds: draws of the degraded test images; one is enough, and taken, where the operator draws nothing.
        own_heads: classifiers (see :func:`lrface.classifiers.open_classifier`), named in the same way, judged on the same
            draws with their own last layer: end-to-end baselines.
        classifier_of: name of a network among ``models``: all the others are also judged with its linear classifier
            (Table 9: a clean teacher's on the student).
        restore: degraded test images are restored first, see :mod:`lrface.restorers`.
        classes: only these, see :func:`lrface.benchmarks.robustness.class_subset`.
        relabel: label shift, see :func:`parse_relabel`: only test images of the classes named are used.
        images: about so many test images at most, drawn alike from each class.
        views: draws of each training image.
        image_set: how large images are for networks that take any size: imagenet-c 224, tiny-imagenet-c 64, cifar-c 32.
        zero_shot: networks of open_clip are also judged by its text tower; see :mod:`lrface.zero_shot`, and there for
            ``text_weights``, ``prompts`` and ``class_names``.
        seed: of all that is drawn.
        keep_features: on disk, below ``cache``, $LRFACE_CACHE or ~/.cache/lrface.

    Raises:
        UsageError: an option that is wrong, networks that take images of different sizes or give features of different
            widths to one classifier, or classes that do not fit.
        LrfaceError: images or networks that cannot be read.
    """
    settings = settings or ProbeSettings()
    shares = list(dict.fromkeys(float(share) for share in labels))
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(
            f"--labels: shares must be above 0 and at most 1; found {', '.join(map(str, labels))}"
        )
    for option, value in (
        ("--seeds", seeds),
        ("--views", views),
        ("--images", images),
        ("--batch-size", batch_size),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{option}: at least 1 is needed; found {value}")
    if not models and not own_heads:
        raise UsageError("probe: at least one --model or --own-head is needed")
    both = Operator.parse(degrade)
    clean = Operator("clean", {})
    teaching = clean if restore is not None else both
    if train_degrade is not None:
        teaching = Operator.parse(train_degrade, "--train-degrade")
    operators = [Operator.parse(text, "--test-degrade") for text in test_degrade] or [both]
    restorer = None
    if restore is not None:
        name, arguments = parse_block(restore, "--restore")
        restorer = {"name": name, **arguments}, build_restorer(name, **arguments)
    place = resolve_device(device)
    kind = None if image_set is None else named_set(image_set)
    probed = open_networks(models, place, kind, say) if models else []
    size = (probed or open_networks(own_heads[:1], place, kind, say))[0].size
    judged = _own_heads(own_heads, [network.name for network in probed], place, size)
    side = _side([*probed, *(head for head, _ in judged)])
    giver = next((network for network in probed if network.name == classifier_of), None)
    if classifier_of is not None and giver is None:
        known = [network.name for network in probed]
        raise UsageError(
            f"--classifier-of: no model is called {classifier_of!r}{nearest(classifier_of, known)}; there are "
            f"{', '.join(known) or 'none'}"
        )

    names, training, testing = _splits(
        open_data(train, root, show_progress),
        open_data(test, root, show_progress),
        None if classes is None else class_subset(classes),
        None if relabel is None else parse_relabel(relabel),
    )
    readers = _text_classifiers(probed, names, prompts, class_names, text_weights) if zero_shot else {}
    lessons_of = {
        share: training.rows[label_rows(training.labels[training.rows], share, seed)] for share in shares
    }
    training.rows = lessons_of[max(shares)]
    if images is not None and images < len(testing.rows):
        share = images / len(testing.rows)
        testing.rows = testing.rows[label_rows(testing.labels[testing.rows], share, seed)]
    folder = cache_root(cache) / "probe" if keep_features else None
    if folder is not None:
        for split in (training, testing) if probed else (testing,):
            split.digest = _digest(split.images, split.rows)
    store = _Store(folder, {"format": 1, "code": _code(), "side": side, "seed": seed, "chunk": CHUNK})
    threads = len(os.sched_getaffinity(0)) if workers is None else workers
    extract = _Extractor(side, seed, store, place, batch_size, threads, show_progress)

    run = ProbeRun(
        {
            "train": str(train),
            "test": str(test),
            "classes": names,
            "images": {},
            "size": side,
            "train_degrade": teaching.plain,
            "test_degrade": [operator.plain for operator in operators],
            "restore": None if restorer is None else restorer[0],
            "labels": shares,
            "seeds": seeds,
            "views": views,
            "seed": seed,
            "settings": vars(settings),
            "relabel": None if relabel is None else parse_relabel(relabel),
            **({"prompts": prompts} if zero_shot else {}),
        }
    )
    # What is fitted: (network, share) -> its classifier.
    layers: dict[tuple[str, float], nn.Linear] = {}
    used: dict[float, int] = {}
    if probed:
        count = 1 if is_fixed(teaching.policy(training=True), side) else views
        lessons = [_Job(teaching, number) for number in range(count)]
        taught = extract(training, lessons, probed)
        answers = training.labels[training.rows]
        for share in shares:
            rows = np.flatnonzero(np.isin(training.rows, lessons_of[share]))
            used[share] = len(rows)
            for network in probed:
                seen = [directions(taught[network.name, lesson][rows]) for lesson in lessons]
                target = torch.from_numpy(answers[rows])
                layers[network.name, share] = fit_linear(seen, target, len(names), settings, share < 1, seed)
        del taught

    everyone = [*probed, *(head for head, _ in judged)]
    columns = {head.name: _outputs(head, outputs, names) for head, outputs in judged}
    for operator in operators:
        fixed = is_fixed(operator.policy(training=False), side)
        jobs = [_Job(operator, number) for number in range(1 if fixed else seeds)]
        own = restorer
        if restorer is not None and restorer[0]["name"] == "deep_decoder" and "missing" not in restorer[0]:
            # Black pixels are missing where a mask made them, dark where anything else did.
            masked = "pixel_mask" in json.dumps(operator.plain)
            said = {**restorer[0], "missing": masked}
            own = said, build_restorer(**said)
        seen_tests = extract(testing, jobs, everyone, own)
        answers = testing.labels[testing.rows]

        def judge(
            network: Network,
            classifier: str,
            share: float | None,
            scores: Callable[[NDArray[np.float32]], NDArray[np.float32]],
            answers: NDArray[np.int64] = answers,
            jobs: Sequence[_Job] = jobs,
            seen: Mapping[tuple[str, _Job], NDArray[np.float32]] = seen_tests,
            operator: Operator = operator,
        ) -> None:
            each = [classification_figures(scores(seen[network.name, job]), answers) for job in jobs]
            run.results.append(
                {
                    "name": network.name,
                    "model": network.text,
                    "model_sha256": network.sha256,
                    "classifier": classifier,
                    "labels": share,
                    "training_images": None if share is None else used[share],
                    "test_degrade": operator.plain,
                    **{figure: summarised([found[figure] for found in each]) for figure in FIGURES},
                }
            )

        for head, _ in judged:
            own_columns = columns[head.name]
            judge(head, "own head", None, lambda scores, own=own_columns: scores[:, own])  # type: ignore[misc]
        for network in probed:
            for share in shares:
                judge(network, "probe", share, _linear(layers[network.name, share], network))
        for network in probed:
            if network.name in readers:
                judge(network, "zero-shot", None, _by_text(readers[network.name]))
        for network in probed:
            if giver is not None and network is not giver:
                for share in shares:
                    judge(network, giver.name, share, _linear(layers[giver.name, share], network))
    run.about["images"] = {"train": len(training.rows) if probed else 0, "test": len(testing.rows)}
    run.about["broken"] = {
        what: [list(pair) for pair in sorted(split.broken.items())]
        for what, split in (("training", training), ("test", testing))
    }
    return run


def _linear(layer: nn.Linear, network: Network) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def scores(features: NDArray[np.float32]) -> NDArray[np.float32]:
        if features.shape[1] != layer.in_features:
            raise UsageError(
                f"--classifier-of: the classifier takes features of {layer.in_features} numbers, {network.name} gives "
                f"{features.shape[1]}"
            )
        with torch.inference_mode():
            return layer(directions(features)).numpy()

    return scores


def _text_classifiers(
    probed: Sequence[Network],
    names: Sequence[str],
    prompts: str,
    class_names: str | None,
    weights: str | None,
) -> "dict[str, TextClassifier]":
    """By network, for those that are image towers of open_clip."""
    from lrface.zero_shot import is_open_clip, read_class_names, read_prompts, text_classifier

    towers = [network for network in probed if is_open_clip(network.card)]
    if not towers:
        raise UsageError(
            "--zero-shot: no --model is of open_clip: a run with backbone {name: open_clip, ...}, or "
            "open_clip:MODEL@weights=FILE"
        )
    called, sentences = read_class_names(names, class_names), read_prompts(prompts)
    return {network.name: text_classifier(network.card, called, sentences, weights) for network in towers}


def _by_text(reader: "TextClassifier") -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    def scores(features: NDArray[np.float32]) -> NDArray[np.float32]:
        if features.shape[1] != reader.directions.shape[1]:
            raise UsageError(
                f"--zero-shot: texts have embeddings of {reader.directions.shape[1]} numbers, the network gives "
                f"{features.shape[1]}"
            )
        return reader.scores(torch.from_numpy(features)).numpy()

    return scores


def _own_heads(texts: Sequence[str], taken: list[str], device: str, side: int) -> list[tuple[Network, int]]:
    """Classifiers with their own last layer as networks whose features are scores, and how many they give."""
    from lrface.classifiers import open_classifier

    found = []
    for text in texts:
        name, model = parse_named(text)
        classifier = open_classifier(model, side, 3, device)
        name = name or f"{Path(model).name} (own head)"
        if name in taken:
            raise UsageError(
                f"--own-head: two models are called {name!r}; name them apart: --own-head NAME=MODEL"
            )
        taken.append(name)
        card = {**classifier.card, "taken": "scores"}
        network = Network(name, model, classifier.sha256, side, classifier.classes, classifier.scores, card)
        found.append((network, classifier.outputs))
    return found


def _side(networks: Sequence[Network]) -> int:
    for other in networks[1:]:
        if other.size != networks[0].size:
            raise UsageError(
                f"--model: {other.text} takes images of {other.size}x{other.size} pixels, {networks[0].text} of "
                f"{networks[0].size}x{networks[0].size}; all models must see the same images"
            )
    return networks[0].size


def _outputs(head: Network, outputs: int, names: Sequence[str]) -> list[int]:
    """Which output is which of the probe's classes."""
    if head.classes is not None and set(names) <= set(head.classes):
        return [list(head.classes).index(name) for name in names]
    if outputs == len(names) and (
        head.classes is None or _only_numbers(names) or _only_numbers(list(head.classes))
    ):
        return list(range(outputs))
    raise UsageError(
        f"--own-head {head.text}: it tells {outputs} classes apart, the training data has {len(names)}, the first "
        f"{names[0]!r}: which output is which class is not known"
    )
