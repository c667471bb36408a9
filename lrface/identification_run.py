"""Models on identification and template benchmarks: what `lrface identify` does, and `lrface verify` for IJB.

Above embed and benchmarks, below the command line. Every row of a result names the protocol that it was measured by.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.faces import (
    CHUNK,
    Faces,
    FacesPart,
    SourceFaces,
    check_input,
    enlarged_faces,
    face_features,
    photograph_faces,
    unaligned,
)
from lrface.benchmarks.identification import (
    DISTRACTOR,
    POOLING,
    RANKS,
    Identification,
    OpenSet,
    identify,
    open_set,
    pool_templates,
    without_identities,
)
from lrface.benchmarks.identification_page import identification_page, identification_sections
from lrface.benchmarks.ijb import (
    GALLERIES,
    SETS,
    WEIGHTINGS,
    TemplateSet,
    accept_rates,
    find_ijb,
    pair_scores,
    pool_media,
    read_enrolment,
    read_ijb,
    read_pairs,
    template_rows,
)
from lrface.benchmarks.page import ReportModel
from lrface.benchmarks.survface import IDENTIFICATION, find_survface, read_survface
from lrface.benchmarks.tinyface import find_tinyface, read_tinyface
from lrface.data.folder import FolderSource
from lrface.data.source import open_source
from lrface.embed import FaceEmbedder, open_model
from lrface.errors import LrfaceError, UsageError
from lrface.evaluation import feature_stores
from lrface.progress import progress

BENCHMARKS = ("tinyface", "survface", *SETS)
FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1, 0.2, 0.3)
CURVE_RANKS = 100
TINYFACE_RANK = 1
SURVFACE_RANK = 20

TINYFACE_AUTHORS = "TinyFace authors"
ADAFACE = "AdaFace/CVLface"


@dataclass(frozen=True)
class Protocol:
    """How features become a row.

    Attributes:
        name: what the row is called.
        metric: "cosine" or "euclidean" (features as they are).
        flip: whether the features of an image and of its mirror are added.
        rank: of the open-set figures, how many candidates are looked at.
        closed, opened: whether the row gives rank-k and mean average precision, and open-set figures.
    """

    name: str
    metric: str
    flip: bool
    rank: int = 1
    closed: bool = True
    opened: bool = False


@dataclass
class IdentificationSet:
    """A gallery and probes.

    Attributes:
        name: what rows are called.
        gallery, probe: the faces; gallery_ids, probe_ids int64: who is on them.
        protocols: the rows that are made.
        pooling: None for image against image, or how the images of a template are pooled.
        gallery_templates, probe_templates: int64, the template of each image; None for one an image.
        deviations: differences from the official set, in words.
        origin: where it was read from.
    """

    name: str
    gallery: Faces
    gallery_ids: NDArray[np.int64]
    probe: Faces
    probe_ids: NDArray[np.int64]
    protocols: Sequence[Protocol]
    pooling: str | None = None
    gallery_templates: NDArray[np.int64] | None = None
    probe_templates: NDArray[np.int64] | None = None
    deviations: list[str] = field(default_factory=list)
    origin: str = ""


@dataclass
class Curves:
    """What a row's curves are drawn from: shares float64 [k] of probes found within rank 1 ... k, and the open-set
    rates; None where the row has no such figures."""

    cmc: NDArray[np.float64] | None = None
    opened: OpenSet | None = None


@dataclass
class IdentificationRun:
    """Several models on one benchmark. ``rows`` as ``--json`` prints them, ``curves`` beside each, ``notes`` on the
    set: counts that differ from the official ones."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: list[Curves] = field(default_factory=list)
    models: list[ReportModel] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        return {"results": self.rows, "deviations": self.notes}

    def page(self, title: str = "Identification", lead: str = "") -> str:
        """The report as one HTML page that needs nothing else; ``lead`` is HTML put before the curves."""
        cmc, opened = self._drawn()
        return identification_page(self.rows, cmc, opened, self.models, self.notes, title, lead)

    def sections(self, short: Mapping[str, str]) -> list[str]:
        """What the page shows of the rows, as HTML, with short names of models."""
        rows = [{**row, "model": short[row["model"]]} for row in self.rows]
        return identification_sections(rows, *self._drawn(), self.notes)

    def _drawn(self) -> tuple[list[NDArray[np.float64] | None], list[OpenSet | None]]:
        return [curves.cmc for curves in self.curves], [curves.opened for curves in self.curves]


# --------------------------------------------------------------------------------------------------------- sets


def tinyface_set(
    data: str | Path | None = None,
    crops: str | Path | None = None,
    align: bool = True,
    cache: str | Path | None = None,
    workers: int | None = None,
    show_progress: bool = True,
) -> IdentificationSet:
    """TinyFace's identification test. ``crops``: aligned crops laid out like Testing_Set, for instance those that
    AdaFace's authors give out; else the photographs are aligned here, or enlarged whole without ``align``.

    Two protocols side by side. "TinyFace authors" is their MATLAB evaluation: Euclidean distance of the submitted
    features as they are, each of one image. "AdaFace/CVLface" is cosine of unit features, the raw features of image
    and mirror image added before: CVLface adds them, and AdaFace's validate_tinyface.py by default
    ("pre_norm_vector_add") adds unit features times their lengths, which is the same. AdaFace aligns by MTCNN with a
    margin of its own and publishes the crops, not the script; figures on other crops differ.
    """
    found = read_tinyface(find_tinyface(data), crops)
    paths = [*found.gallery_paths, *found.probe_paths]
    faces = photograph_faces(found.images, paths, "tinyface", cache, workers, show_progress, align)
    at = len(found.gallery_paths)
    gallery, probe = FacesPart(faces, 0, at), FacesPart(faces, at, len(faces))
    return IdentificationSet(
        "tinyface",
        gallery,
        found.gallery_ids,
        probe,
        found.probe_ids,
        (
            Protocol(TINYFACE_AUTHORS, "euclidean", flip=False),
            Protocol(ADAFACE, "cosine", flip=True),
            Protocol("open set", "cosine", flip=True, rank=TINYFACE_RANK, closed=False, opened=True),
        ),
        deviations=found.deviations(),
        origin=str(found.images),
    )


def survface_set(data: str | Path | None = None, pooling: str | None = "mean") -> IdentificationSet:
    """QMUL-SurvFace's open-set test: one template a gallery identity (the mean of its unit features), every probe
    image by itself, TPIR20 at FPIR 0.3, 0.2, 0.1 and less. ``pooling`` None compares image with image."""
    found = read_survface(find_survface(IDENTIFICATION, data))
    gallery = enlarged_faces(found.images, found.gallery_paths)
    probe = enlarged_faces(found.images, found.probe_paths)
    return IdentificationSet(
        "survface",
        gallery,
        found.gallery_ids,
        probe,
        found.probe_ids,
        (Protocol("QMUL-SurvFace", "cosine", flip=True, rank=SURVFACE_RANK, opened=True),),
        pooling,
        found.gallery_ids if pooling else None,
        None,
        found.deviations(),
        str(found.images),
    )


def folders_set(
    gallery: str | Path,
    probe: str | Path,
    flip: bool = True,
    pooling: str | None = None,
    cache: str | Path | None = None,
    workers: int | None = None,
    show_progress: bool = True,
) -> IdentificationSet:
    """Any gallery and probes: identity folders of crops or photographs, or any format of training data. Who is who
    goes by the identities' names.

    With ``pooling`` the images of one folder make a template: IDENTITY/*.jpg one, every IDENTITY/OCCASION/*.jpg one.

    Raises:
        UsageError: pooling by quality where no detector gave a score.
        LrfaceError: no common identity, or broken data.
    """
    faces, names, templates = [], [], []
    for path in (gallery, probe):
        found, people, folders = _folder(Path(path), cache, workers, show_progress)
        faces.append(found)
        names.append(people)
        templates.append(np.unique(folders, return_inverse=True)[1].astype(np.int64))
        if pooling == "quality" and found.scores is None:
            raise UsageError(
                f"--pool quality weighs faces by the detector's score, and {path} has none; give photographs or what "
                "`lrface align` wrote, or take --pool norm"
            )
    if not set(names[0]) & set(names[1]):
        raise LrfaceError(
            f"{gallery} and {probe} have no identity in common ({names[0][0]!r} ... and {names[1][0]!r} ...); folders "
            "of one person need the same name in both"
        )
    numbers = {name: number for number, name in enumerate(sorted({*names[0], *names[1]}))}
    gallery_ids, probe_ids = (np.array([numbers[name] for name in each], dtype=np.int64) for each in names)
    return IdentificationSet(
        f"{Path(gallery).name} / {Path(probe).name}",
        faces[0],
        gallery_ids,
        faces[1],
        probe_ids,
        (
            Protocol("closed set", "cosine", flip),
            Protocol("open set", "cosine", flip, closed=False, opened=True),
        ),
        pooling,
        templates[0] if pooling else None,
        templates[1] if pooling else None,
        origin=f"{gallery}, {probe}",
    )


def _folder(
    path: Path, cache: str | Path | None, workers: int | None, show_progress: bool
) -> tuple[Faces, list[str], list[str]]:
    """The faces, the identity of each, and the folder that each lies in."""
    source = open_source(path)
    names = source.sources()
    folders = [
        f"{source.identities[label]}/{name.rpartition('/')[0]}"
        for label, name in zip(source.labels, names, strict=True)
    ]
    people = [source.identities[label] for label in source.labels]
    if isinstance(source, FolderSource):
        return photograph_faces(source.root, names, path.name, cache, workers, show_progress), people, folders
    scores = source.column("score").astype(np.float64) if hasattr(source, "column") else None
    if scores is None or not (scores > 0).any():
        return SourceFaces(source, name=str(path)), people, folders
    return SourceFaces(source, None, scores > 0, scores, str(path)), people, folders


# --------------------------------------------------------------------------------------------------------- runs


def load_models(
    models: Sequence[str], device: str, precision: str, preparation: Mapping[str, Any]
) -> tuple[dict[str, FaceEmbedder], list[ReportModel]]:
    """The embedders by path, each once, and how they are named on a page."""
    embedders = {path: open_model(path, device=device, precision=precision) for path in dict.fromkeys(models)}
    prepared = {**preparation, "precision": precision, "device": device}
    return embedders, [
        ReportModel(path, embedder.model_sha256, embedder.card, prepared)
        for path, embedder in embedders.items()
    ]


def identify_models(
    models: Sequence[str],
    benchmark: IdentificationSet,
    resolutions: Sequence[int] = (),
    *,
    ranks: Sequence[int] = RANKS,
    open_share: float = 0.5,
    seed: int = 0,
    cache: str | Path | None = None,
    keep_features: bool = True,
    device: str = "auto",
    precision: str = "float32",
    down: str = "nearest",
    up: str = "bilinear",
    batch_size: int = 64,
    chunk: int = CHUNK,
    show_progress: bool = True,
) -> IdentificationRun:
    """Search every probe in the gallery, for every model, protocol and probe size.

    Args:
        models: as :func:`lrface.embed.parse_model` takes them.
        benchmark: the gallery and probes.
        resolutions: sizes in pixels that probes are brought down to (and up again); none: as they are. The gallery
            stays as it is.
        ranks: the k of rank-k.
        open_share, seed: the share of identities that leave the gallery for the open-set row, where no probe is of
            somebody else from the start.
        keep_features: keep features below the cache folder.
        chunk: crops in memory at once.

    Returns:
        Rows with ``model, model_sha256, benchmark, protocol, metric, flip, pooling, gallery_size, probe_size`` (None:
        native), ``rank`` (k -> percent) and ``mean_average_precision`` (percent; None in rows of an open set only),
        ``fnir_at_fpir`` and ``tpir_at_fpir`` (rate -> percent, None where the unmated probes are too few),
        ``open_rank, open_mated, open_unmated, removed_share, seed`` (None in rows without open set), ``probes, mated,
        unmated, gallery, distractors, gallery_images, probe_images, gallery_identities, gallery_unaligned,
        probe_unaligned, unaligned, down, up``.

    Raises:
        UsageError: a size outside of 1 to that of the crops, a model that takes another size.
        LrfaceError: features that are not finite, broken images.
    """
    size = benchmark.gallery.size
    for resolution in resolutions:
        if not 1 <= resolution <= size:
            raise UsageError(
                f"--resolutions: {resolution} is not a whole number of pixels between 1 and {size}, the size of the "
                f"faces of {benchmark.name}"
            )
    conditions = [
        Condition() if resolution >= size else Condition(size=int(resolution))
        for resolution in dict.fromkeys(resolutions)
    ] or [Condition()]
    embedders, reported = load_models(
        models, device, precision, {"down": down, "up": up, "faces": benchmark.origin}
    )
    run = IdentificationRun(models=reported, notes=list(benchmark.deviations))
    for path, embedder in embedders.items():
        for faces in (benchmark.gallery, benchmark.probe):
            check_input(path, embedder.input_size, faces, benchmark.name)
    flips = {protocol.flip for protocol in benchmark.protocols}
    for path, embedder in embedders.items():
        total = len(benchmark.gallery) + len(conditions) * len(benchmark.probe)
        read = _Features(
            embedder,
            flips,
            cache if keep_features else None,
            keep_features,
            down,
            up,
            batch_size,
            device,
            chunk,
        )
        with progress(total, f"embed {benchmark.name}", enabled=show_progress) as bar:
            gallery = read(benchmark.gallery, Condition(), f"{benchmark.name} gallery", bar.advance)
            for condition in conditions:
                probe = read(benchmark.probe, condition, f"{benchmark.name} probes", bar.advance)
                for protocol in benchmark.protocols:
                    row, curves = _row(
                        benchmark,
                        protocol,
                        gallery[protocol.flip],
                        probe[protocol.flip],
                        ranks,
                        open_share,
                        seed,
                    )
                    run.rows.append(
                        {
                            "model": path,
                            "model_sha256": embedder.model_sha256,
                            **row,
                            "gallery_size": size,
                            "probe_size": condition.size or (size if resolutions else None),
                            "down": down,
                            "up": up,
                        }
                    )
                    run.curves.append(curves)
    return run


class _Features:
    """Features of faces with and without their mirror images, from one pass over the images."""

    def __init__(
        self,
        embedder: FaceEmbedder,
        flips: set[bool],
        cache: str | Path | None,
        keep: bool,
        down: str,
        up: str,
        batch_size: int,
        device: str,
        chunk: int,
    ):
        self.embedder, self.flips, self.chunk, self.batch_size = embedder, flips, chunk, batch_size
        self.down, self.up = down, up
        self.both = flips == {True, False}
        # Both kinds are kept side by side in one row, so that no image is embedded twice.
        kind: Any = "beside" if self.both else next(iter(flips))
        self.stores = feature_stores(embedder, cache, flip=kind, down=down, up=up) if keep else None

    def _beside(self, images: Any) -> Any:
        import torch

        embed = self.embedder.embed_tensor
        return torch.cat([embed(images), embed(torch.flip(images, dims=(3,)))], dim=1)

    def __call__(
        self, faces: Faces, condition: Condition, name: str, advance: Callable[[int], None]
    ) -> dict[bool, NDArray[np.float32]]:
        found = face_features(
            self._beside if self.both else self.embedder.embed_tensor,
            faces,
            condition,
            name=name,
            flip=self.flips == {True},
            down=self.down,
            up=self.up,
            batch_size=self.batch_size,
            store=self.stores(condition) if self.stores else None,
            chunk=self.chunk,
            advance=advance,
        )
        if not self.both:
            return {next(iter(self.flips)): found}
        width = found.shape[1] // 2
        return {False: found[:, :width], True: found[:, :width] + found[:, width:]}


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else round(100.0 * fraction, 4)


def _pooled(
    features: NDArray[np.float32],
    identities: NDArray[np.int64],
    templates: NDArray[np.int64] | None,
    pooling: str | None,
    scores: NDArray[np.float64] | None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if templates is None or pooling is None:
        return features, identities
    quality = None
    if pooling == "quality":
        if scores is None:
            raise UsageError("pooling by quality needs the detector's score of each face")
        # A template of faces that no detector found has nothing to weigh by: its faces count alike.
        best = np.zeros(int(templates.max()) + 1)
        np.maximum.at(best, templates, scores)
        quality = np.where(best[templates] > 0, np.maximum(scores, 0.0), 1.0)
    pooled, numbers = pool_templates(features, templates, pooling, quality)
    first = np.unique(templates, return_index=True)[1]
    assert len(first) == len(numbers)
    return pooled, identities[first]


def _row(
    benchmark: IdentificationSet,
    protocol: Protocol,
    gallery: NDArray[np.float32],
    probe: NDArray[np.float32],
    ranks: Sequence[int],
    share: float,
    seed: int,
) -> tuple[dict[str, Any], Curves]:
    pooling = benchmark.pooling
    faces, gallery_ids = _pooled(
        gallery, benchmark.gallery_ids, benchmark.gallery_templates, pooling, benchmark.gallery.scores
    )
    probes, probe_ids = _pooled(
        probe, benchmark.probe_ids, benchmark.probe_templates, pooling, benchmark.probe.scores
    )
    mated = np.isin(probe_ids, gallery_ids[gallery_ids != DISTRACTOR])
    curves = Curves()
    closed: Identification | None = None
    if protocol.closed or (protocol.opened and not mated.all()):
        closed = identify(probes, probe_ids, faces, gallery_ids, protocol.metric, ranks)
    if protocol.closed:
        assert closed is not None
        curves.cmc = cumulative_matches(closed)
    removed: float | None = None
    if protocol.opened:
        if not mated.all():
            assert closed is not None
            curves.opened = open_set(closed, protocol.rank)
        else:
            removed = share
            stays = without_identities(gallery_ids, share, seed)
            found = identify(probes, probe_ids, faces[stays], gallery_ids[stays], protocol.metric, ranks)
            curves.opened = open_set(found, protocol.rank)
    return {
        "benchmark": benchmark.name,
        "protocol": protocol.name,
        "metric": protocol.metric,
        "flip": protocol.flip,
        "pooling": pooling,
        **_closed_figures(closed if protocol.closed else None),
        **_open_figures(curves.opened, removed, seed),
        "probes": len(probe_ids),
        "mated": int(mated.sum()),
        "unmated": int((~mated).sum()),
        "gallery": len(gallery_ids),
        "distractors": int((gallery_ids == DISTRACTOR).sum()),
        "gallery_identities": len(np.unique(gallery_ids[gallery_ids != DISTRACTOR])),
        "gallery_images": len(benchmark.gallery),
        "probe_images": len(benchmark.probe),
        "gallery_unaligned": unaligned(benchmark.gallery),
        "probe_unaligned": unaligned(benchmark.probe),
        "unaligned": unaligned(benchmark.gallery) + unaligned(benchmark.probe),
    }, curves


def cumulative_matches(found: Identification, ranks: int = CURVE_RANKS) -> NDArray[np.float64]:
    """The CMC curve: shares float64 [ranks] of mated probes whose identity is among the 1, 2, ... best."""
    first = found.first_mate[found.first_mate > 0]
    return np.searchsorted(np.sort(first), np.arange(1, ranks + 1), side="right") / len(first)


def _closed_figures(found: Identification | None) -> dict[str, Any]:
    if found is None:
        return {"rank": None, "mean_average_precision": None}
    return {
        "rank": {str(k): _percent(value) for k, value in found.rank.items()},
        "mean_average_precision": _percent(found.mean_average_precision),
    }


def _open_figures(found: OpenSet | None, removed: float | None, seed: int) -> dict[str, Any]:
    if found is None:
        names = (
            "fnir_at_fpir",
            "tpir_at_fpir",
            "open_rank",
            "open_mated",
            "open_unmated",
            "removed_share",
            "seed",
        )
        return dict.fromkeys(names)
    rates = {f"{rate:g}": found.fnir_at(rate) for rate in FALSE_POSITIVE_RATES}
    return {
        "fnir_at_fpir": {rate: _percent(value) for rate, value in rates.items()},
        "tpir_at_fpir": {
            rate: None if value is None else _percent(1.0 - value) for rate, value in rates.items()
        },
        "open_rank": found.rank,
        "open_mated": found.mated,
        "open_unmated": found.unmated,
        "removed_share": removed,
        "seed": None if removed is None else seed,
    }


# ----------------------------------------------------------------------------------------------- IJB-B and IJB-C


def is_template_benchmark(name: str) -> str | None:
    """ "ijbb" or "ijbc" for any spelling of them (IJB-C, ijb_c), else None."""
    key = "".join(letter for letter in name.lower() if letter.isalnum())
    return key if key in SETS else None


def only_template_benchmark(names: Sequence[str]) -> str | None:
    """The one of ``names`` that is IJB-B or IJB-C, None where none is.

    Raises:
        UsageError: it is not the only one; its rows have other columns than those of pairs of images.
    """
    found = [name for name in names if is_template_benchmark(name)]
    if found and len(names) > 1:
        raise UsageError(
            f"--benchmark {found[0]}: templates are verified by themselves; leave the others out"
        )
    return is_template_benchmark(found[0]) if found else None


def _template_features(
    embedder: FaceEmbedder, path: str, found: TemplateSet, run: Mapping[str, Any]
) -> tuple[NDArray[np.float32], Faces]:
    faces = found.faces()
    check_input(path, embedder.input_size, faces, found.name)
    read = _Features(
        embedder,
        {True},
        run["cache"],
        run["keep_features"],
        "nearest",
        "bilinear",
        run["batch_size"],
        run["device"],
        run["chunk"],
    )
    with progress(len(faces), f"embed {found.name}", enabled=run["show_progress"]) as bar:
        return read(faces, Condition(), found.name, bar.advance)[True], faces


def verify_templates(
    models: Sequence[str],
    name: str,
    *,
    data: str | Path | None = None,
    cache: str | Path | None = None,
    keep_features: bool = True,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int = 64,
    chunk: int = CHUNK,
    show_progress: bool = True,
) -> IdentificationRun:
    """The 1:1 protocol of IJB-B or IJB-C: TAR at FAR 1e-1 ... 1e-6 over all pairs of templates, with flip fusion, for
    every way of weighing faces (:data:`lrface.benchmarks.ijb.WEIGHTINGS`).

    Rows: ``model, model_sha256, benchmark, protocol, weighting, tar_at_far`` (percent, None where pairs are too few),
    ``pairs, same, different, templates, images, media, unaligned``.
    """
    found = read_ijb(find_ijb(name, data), name)
    left, right, same = read_pairs(found)
    embedders, reported = load_models(
        models, device, precision, {"flip fusion": True, "images": str(found.images)}
    )
    run = IdentificationRun(models=reported, notes=found.deviations(len(same)))
    settings = {
        "cache": cache,
        "keep_features": keep_features,
        "batch_size": batch_size,
        "device": device,
        "chunk": chunk,
        "show_progress": show_progress,
    }
    numbers = np.unique(found.templates)
    left, right = (template_rows(numbers, side, f"{found.name}: pairs") for side in (left, right))
    for path, embedder in embedders.items():
        features, faces = _template_features(embedder, path, found, settings)
        for weighting, keep_length, by_score in WEIGHTINGS:
            pooled, _ = pool_media(
                features, found.templates, found.media, keep_length, found.scores if by_score else None
            )
            rates = accept_rates(pair_scores(pooled, left, right), same)
            run.rows.append(
                {
                    "model": path,
                    "model_sha256": embedder.model_sha256,
                    "benchmark": found.name,
                    "protocol": "1:1 templates",
                    "weighting": weighting,
                    "tar_at_far": {rate: _percent(value) for rate, value in rates.items()},
                    "pairs": len(same),
                    "same": int(same.sum()),
                    "different": int((~same).sum()),
                    "templates": len(numbers),
                    "images": len(faces),
                    "media": len(np.unique(np.stack([found.templates, found.media]), axis=1).T),
                    "unaligned": unaligned(faces),
                }
            )
            run.curves.append(Curves())
    return run


def identify_templates(
    models: Sequence[str],
    name: str,
    *,
    ranks: Sequence[int] = RANKS,
    data: str | Path | None = None,
    cache: str | Path | None = None,
    keep_features: bool = True,
    device: str = "auto",
    precision: str = "float32",
    batch_size: int = 64,
    chunk: int = CHUNK,
    show_progress: bool = True,
) -> IdentificationRun:
    """The 1:N protocol of IJB-B or IJB-C: mixed-media probes against each of the two galleries, and their mean.

    Templates are pooled as InsightFace does (N1D1F1). In each gallery half of the probes have a mate: rank-k counts
    those, and the others are the false positives of TPIR at FPIR. The row "mean of both" is what papers report; "both
    galleries joined" is InsightFace's closed set, in which every probe has a mate.
    """
    found = read_ijb(find_ijb(name, data), name)
    galleries = [read_enrolment(found, f"gallery_{which}") for which in GALLERIES[name]]
    probes = read_enrolment(found, "probe_mixed")
    embedders, reported = load_models(
        models, device, precision, {"flip fusion": True, "images": str(found.images)}
    )
    run = IdentificationRun(models=reported, notes=found.deviations())
    settings = {
        "cache": cache,
        "keep_features": keep_features,
        "batch_size": batch_size,
        "device": device,
        "chunk": chunk,
        "show_progress": show_progress,
    }
    numbers = np.unique(found.templates)
    probe_rows = template_rows(numbers, probes.templates, f"{name} {probes.name}")
    gallery_rows = [template_rows(numbers, each.templates, f"{name} {each.name}") for each in galleries]
    for path, embedder in embedders.items():
        features, faces = _template_features(embedder, path, found, settings)
        pooled, _ = pool_media(features, found.templates, found.media, True, found.scores)

        def searched(
            title: str,
            rows: NDArray[np.int64],
            subjects: NDArray[np.int64],
            path: str = path,
            pooled: NDArray[np.float32] = pooled,
            faces: Faces = faces,
            sha256: str = embedder.model_sha256,
        ) -> tuple[dict[str, Any], Curves]:
            result = identify(pooled[probe_rows], probes.subjects, pooled[rows], subjects, "cosine", ranks)
            opened = open_set(result) if result.unmated else None
            return {
                "model": path,
                "model_sha256": sha256,
                "benchmark": name,
                "protocol": f"1:N templates, {title}",
                "metric": "cosine",
                "flip": True,
                "pooling": WEIGHTINGS[0][0],
                **_closed_figures(result),
                **_open_figures(opened, None, 0),
                "probes": len(probe_rows),
                "mated": result.mated,
                "unmated": result.unmated,
                "gallery": len(rows),
                "distractors": 0,
                "gallery_identities": len(np.unique(subjects)),
                "gallery_images": int(np.isin(found.templates, numbers[rows]).sum()),
                "probe_images": int(np.isin(found.templates, probes.templates).sum()),
                "gallery_unaligned": None,
                "probe_unaligned": None,
                "unaligned": unaligned(faces),
                "gallery_size": faces.size,
                "probe_size": None,
            }, Curves(cumulative_matches(result), opened)

        parts = [
            searched(f"gallery {which}", rows, each.subjects)
            for which, rows, each in zip(GALLERIES[name], gallery_rows, galleries, strict=True)
        ]
        joined = searched(
            "both galleries joined",
            np.concatenate(gallery_rows),
            np.concatenate([each.subjects for each in galleries]),
        )
        for row, curves in [*parts, (_mean_row([row for row, _ in parts]), Curves()), joined]:
            run.rows.append(row)
            run.curves.append(curves)
    return run


def _mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of figures over galleries; counts of probes are those of both, summed."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(float(np.mean(known)), 4) if len(known) == len(values) else None

    first = rows[0]
    row = {**first, "protocol": "1:N templates, mean of both"}
    for field_name in ("rank", "fnir_at_fpir", "tpir_at_fpir"):
        if all(each[field_name] is not None for each in rows):
            row[field_name] = {
                key: mean([each[field_name][key] for each in rows]) for key in first[field_name]
            }
    row["mean_average_precision"] = mean([each["mean_average_precision"] for each in rows])
    for field_name in (
        "probes", "mated", "unmated", "gallery", "gallery_identities", "gallery_images", "probe_images",
        "open_mated", "open_unmated",
    ):  # fmt: skip
        values = [each[field_name] for each in rows]
        row[field_name] = None if None in values else sum(values)
    return row


def run_identification(
    models: Sequence[str],
    benchmark: str | None = None,
    gallery: str | Path | None = None,
    probe: str | Path | None = None,
    resolutions: Sequence[int] = (),
    *,
    data: str | Path | None = None,
    crops: str | Path | None = None,
    align: bool = True,
    flip: bool = True,
    pooling: str | None = None,
    open_share: float = 0.5,
    seed: int = 0,
    workers: int | None = None,
    down: str = "nearest",
    up: str = "bilinear",
    cache: str | Path | None = None,
    show_progress: bool = True,
    **settings: Any,
) -> IdentificationRun:
    """What `lrface identify` does: a benchmark by name, or a gallery and probes. ``settings`` are ``keep_features,
    device, precision, batch_size`` of :func:`identify_models`.

    Raises:
        UsageError: neither or both are given, an unknown benchmark, an option that the benchmark has no use for.
    """
    if (benchmark is None) == (gallery is None and probe is None) or (gallery is None) != (probe is None):
        raise UsageError(f"give --benchmark NAME ({', '.join(BENCHMARKS)}), or --gallery and --probe")
    if pooling is not None and pooling not in ("none", *POOLING):
        raise UsageError(f"--pool must be none, {', '.join(POOLING)}; found {pooling!r}")
    if crops is not None and benchmark != "tinyface":
        raise UsageError("--crops goes with --benchmark tinyface")
    settings = {**settings, "cache": cache, "show_progress": show_progress}
    if benchmark is None:
        assert gallery is not None and probe is not None
        found = folders_set(
            gallery, probe, flip, None if pooling == "none" else pooling, cache, workers, show_progress
        )
    elif (name := is_template_benchmark(benchmark)) is not None:
        if resolutions or pooling is not None:
            raise UsageError(
                f"--benchmark {benchmark}: templates are pooled as its protocol says, at native size"
            )
        return identify_templates(models, name, data=data, **settings)
    elif benchmark == "tinyface":
        if pooling not in (None, "none"):
            raise UsageError("--benchmark tinyface compares image with image; leave --pool out")
        found = tinyface_set(data, crops, align, cache, workers, show_progress)
    elif benchmark == "survface":
        if pooling == "quality":
            raise UsageError("--benchmark survface has no detector's scores to pool by; take mean or norm")
        found = survface_set(data, None if pooling == "none" else pooling or "mean")
    else:
        raise UsageError(f"--benchmark {benchmark}: identification knows {', '.join(BENCHMARKS)}")
    return identify_models(
        models, found, resolutions, open_share=open_share, seed=seed, down=down, up=up, **settings
    )
