"""Models on benchmarks: what `lrface verify` does. Above embed and benchmarks, below the command line."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrface.benchmarks.cache import FeatureStore
from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.corrupted import corruptions_hash
from lrface.benchmarks.face_c import face_c_sections, face_c_tables
from lrface.benchmarks.locate import cache_root
from lrface.benchmarks.metrics import paired_bootstrap
from lrface.benchmarks.page import ReportModel, verification_page
from lrface.benchmarks.verification import (
    RESOLUTIONS,
    Evaluation,
    evaluate_verification,
    load_benchmark,
    resolution_areas,
)
from lrface.embed import FaceEmbedder, open_model, undescribed
from lrface.errors import UsageError


@dataclass
class VerificationRun:
    """Several models on several benchmarks.

    Attributes:
        rows: the rows of all evaluations, with ``model`` and ``model_sha256``.
        areas: area under the accuracy-resolution curve, percent: model -> benchmark -> area.
        comparisons: every further model against the first, row by row: ``benchmark, gallery_size, probe_size,
            gallery_losses, probe_losses, first, second, difference`` (accuracy points), ``interval`` (95 %, paired
            bootstrap) and ``p_value``.
        evaluations: (model, benchmark) -> what the rows were computed from.
        models: how each model was prepared.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    areas: dict[str, dict[str, float]] = field(default_factory=dict)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[tuple[str, str], Evaluation] = field(default_factory=dict)
    models: list[ReportModel] = field(default_factory=list)

    @property
    def face_c(self) -> list[dict[str, Any]]:
        """What corruptions cost: a table a model and benchmark, see :func:`lrface.benchmarks.face_c.face_c_tables`;
        none without corruptions."""
        return [
            {"model": model, **table}
            for (model, _), found in self.evaluations.items()
            for table in face_c_tables(found)
        ]

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints; ``face_c`` only where faces were corrupted."""
        found = {"results": self.rows, "resolution_areas": self.areas, "comparisons": self.comparisons}
        face_c = self.face_c
        return {**found, "face_c": face_c} if face_c else found

    def page(
        self,
        title: str = "Verification at every resolution",
        lead: str = "",
        further: Callable[[Mapping[str, str]], Sequence[str]] = lambda short: [],
    ) -> str:
        """The report as one HTML page that needs nothing else; ``lead`` and ``further`` as in
        :func:`lrface.benchmarks.page.verification_page`."""

        def sections(short: Mapping[str, str]) -> list[str]:
            return [*face_c_sections(self.face_c, short), *further(short)]

        return verification_page(
            self.evaluations, self.models, self.rows, self.areas, self.comparisons, title, lead, sections
        )


def feature_stores(
    embedder: FaceEmbedder, cache: str | Path | None, **preparation: Any
) -> Callable[[Condition], FeatureStore] | None:
    """The stores of one model: one for each condition. ``preparation`` is what else its features depend on.

    None for a module:function: its features may depend on more than the source that can be hashed (files of weights,
    other modules).
    """
    if embedder.card.get("format") == "python":
        return None
    card = {
        key: value
        for key, value in embedder.card.items()
        if not key.startswith(("thresholds", "probability"))
    }
    known = {"card": card, "precision": embedder.precision, **preparation}
    root = cache_root(cache) / "features"

    def store(condition: Condition) -> FeatureStore:
        described = asdict(condition)
        if condition.corruption is None:
            # As it was before there were corruptions: features kept then still count.
            del described["corruption"], described["severity"]
        else:
            described["code"] = corruptions_hash()
        return FeatureStore(root, embedder.model_sha256, {**known, "condition": described})

    return store


def check_described(
    embedder: FaceEmbedder, say: Callable[[str], None] = lambda message: None, assume: bool = True
) -> None:
    """Tell what is assumed of a file that says nothing about its input, or refuse it. Raises UsageError."""
    how = undescribed(embedder)
    if how is None:
        return
    if not assume:
        raise UsageError(
            f"{embedder.file} does not say which colour order and normalisation its network takes, and lrface does not "
            f"guess: {how}"
        )
    say(f"{embedder.file}: assumed to take RGB in [0, 1] and to normalise inside. If not, {how}")


def verify_models(
    models: Sequence[str],
    benchmarks: Sequence[str],
    resolutions: Sequence[int] = RESOLUTIONS,
    *,
    data: str | Path | None = None,
    pairs: str | Path | None = None,
    cache: str | Path | None = None,
    keep_features: bool = True,
    device: str = "auto",
    precision: str = "float32",
    flip: bool = True,
    down: str = "nearest",
    up: str = "bilinear",
    batch_size: int = 64,
    workers: int | None = None,
    cross: bool = False,
    matrix: bool = False,
    degrade: Sequence[Condition] = (),
    native: bool = False,
    quality: str = "norm",
    show_progress: bool = True,
    say: Callable[[str], None] = lambda message: None,
    assume: bool = True,
) -> VerificationRun:
    """Evaluate every model on every benchmark. See :func:`lrface.benchmarks.verification.evaluate_verification`.

    Models are named as in :func:`lrface.embed.parse_model`. Of a file of others whose input nobody describes,
    ``say`` is told which convention is assumed; without ``assume`` it is refused (UsageError).

    With ``quality`` "reconstruction" the report also refuses pairs by the error of what a QualNet's decoder draws.

    ``keep_features`` keeps features below the cache folder by the content of model, preparation and image, so that
    the same call is instant the second time.
    """
    embedders = {
        path: open_model(path, device=device, precision=precision, quality=quality)
        for path in dict.fromkeys(models)
    }
    for embedder in embedders.values():
        check_described(embedder, say, assume)
    run = VerificationRun()
    for path, embedder in embedders.items():
        preparation = {"flip fusion": flip, "down": down, "up": up, "precision": precision, "device": device}
        run.models.append(ReportModel(path, embedder.model_sha256, embedder.card, preparation))
    for name in benchmarks:
        pairs_set = load_benchmark(
            name,
            data=data,
            pairs=pairs,
            cache=cache,
            workers=workers,
            show_progress=show_progress,
            native=native,
        )
        for path, embedder in embedders.items():
            if embedder.input_size != pairs_set.size:
                raise UsageError(
                    f"{path} takes images of {embedder.input_size}x{embedder.input_size} pixels, the faces of "
                    f"{pairs_set.name} are {pairs_set.size}x{pairs_set.size}; this model cannot be judged on it"
                )
            with embedder.alone_on_cpu():
                found = evaluate_verification(
                    embedder.embed_tensor,
                    pairs_set,
                    resolutions,
                    flip=flip,
                    down=down,
                    up=up,
                    batch_size=batch_size,
                    progress=show_progress,
                    cross=cross,
                    matrix=matrix,
                    degrade=degrade,
                    native=native,
                    reconstruction_errors=embedder.reconstruction_errors
                    if quality == "reconstruction"
                    else None,
                    store=feature_stores(embedder, cache, flip=flip, down=down, up=up)
                    if keep_features
                    else None,
                )
            run.evaluations[path, pairs_set.name] = found
            model = {"model": path, "model_sha256": embedder.model_sha256}
            run.rows += [{**model, **row} for row in found.rows]
            run.areas.setdefault(path, {}).update(resolution_areas(found.rows))
        first, *others = embedders
        run.comparisons += [
            row
            for other in others
            for row in _compared(
                first, run.evaluations[first, pairs_set.name], other, run.evaluations[other, pairs_set.name]
            )
        ]
    return run


def _compared(first: str, a: Evaluation, second: str, b: Evaluation) -> list[dict[str, Any]]:
    rows = []
    for row, right_first, right_second in zip(a.rows, a.right, b.right, strict=True):
        found = paired_bootstrap(right_first, right_second)
        kept = ("benchmark", "gallery_size", "probe_size", "gallery_losses", "probe_losses")
        rows.append(
            {
                **{key: row[key] for key in kept},
                "first": first,
                "second": second,
                "difference": round(100 * found.difference, 4),
                "interval": [round(100 * end, 4) for end in found.interval],
                "p_value": found.p_value,
            }
        )
    return rows
