"""The report: one HTML page that holds everything, with no request to anywhere. Drawn with matplotlib as inline SVG."""

import base64
import html
import io
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

import lrface
from lrface.benchmarks.conditions import Condition
from lrface.benchmarks.metrics import roc_curve
from lrface.benchmarks.report import native_range, size_name
from lrface.benchmarks.verification import Evaluation
from lrface.errors import LrfaceError

COLOURS = ("#1f5fa8", "#d9722b", "#2e8b57", "#8d4aa3", "#b8343c", "#6b6b6b", "#b08d00", "#0f8b8d")
WORST = 24
SCATTER_IMAGES = 120

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 76rem; }
h1, h2, h3, p { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { margin: 2.2rem 0 .4rem; font-size: 1.25rem; }
h3 { margin: 1.4rem 0 .3rem; font-size: 1.05rem; } p { margin: .3rem 0 .7rem; } .note { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } .left { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .85rem; color: #555; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; }
.pair { border: 1px solid #ddd; border-radius: 4px; padding: .3rem; font-size: .8rem; line-height: 1.3; }
.pair img { width: 100%; display: block; image-rendering: pixelated; }
.heat td { color: #111; border: 1px solid #fff; text-align: center; min-width: 4rem; }
code { font-size: .85em; overflow-wrap: anywhere; } dl { display: grid; grid-template-columns: max-content 1fr;
  gap: .1rem 1rem; font-size: .85rem; } dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { body { padding: .7rem; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } h2, h3 { break-after: avoid; }
  figure, .pair, table { break-inside: avoid; } .scroll { overflow: visible; }
  .figures { grid-template-columns: 1fr 1fr; } .pairs { grid-template-columns: repeat(6, 1fr); } }
"""


@dataclass
class ReportModel:
    """A model as the page names it.

    Attributes:
        name: what the user called it.
        sha256: of the file.
        card: what it says about itself (colour order, input size, normalisation, training).
        preparation: what was done before the network: flip fusion, kernels, precision.
    """

    name: str
    sha256: str
    card: Mapping[str, Any]
    preparation: Mapping[str, Any]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """What each model is called on the page: the last part of its path, or all of it where two would be alike."""
    last = {name: Path(name).name or name for name in names}
    return {name: last[name] if list(last.values()).count(last[name]) == 1 else name for name in last}


def escape(text: object) -> str:
    """Text as HTML shows it."""
    return html.escape(str(text))


def _svg(figure: Any) -> str:
    """A figure as inline SVG; text stays text, identifiers do not clash between figures on one page."""
    import matplotlib

    buffer = io.StringIO()
    salt = f"lrface-{_svg.count}"  # type: ignore[attr-defined]
    _svg.count += 1  # type: ignore[attr-defined]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # One page holds many figures, and matplotlib names the groups of each figure alike.
    drawn = text[text.index("<svg") :]
    for name in (
        "figure_",
        "axes_",
        "patch_",
        "line2d_",
        "text_",
        "legend_",
        "matplotlib.axis_",
        "xtick_",
        "ytick_",
    ):
        drawn = drawn.replace(f'id="{name}', f'id="{salt}-{name}')
    return drawn


_svg.count = 0  # type: ignore[attr-defined]


def restart_figures() -> None:
    """Number figures from the first again: the same results then make the same page."""
    _svg.count = 0  # type: ignore[attr-defined]


def new_axes(xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    """A figure of the page's size and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_html(figure: Any, caption: str) -> str:
    """A figure with its caption."""
    text = escape(caption)
    return f'<figure role="img" aria-label="{text}">{_svg(figure)}<figcaption>{text}</figcaption></figure>'


def _same_size(evaluation: Evaluation) -> list[int]:
    """Rows with both images under one condition and no loss but resolution, largest size first."""
    chosen = [
        number
        for number, row in enumerate(evaluation.rows)
        if row["gallery_size"] == row["probe_size"] and not (row["gallery_losses"] or row["probe_losses"])
    ]
    return sorted(chosen, key=lambda number: -evaluation.rows[number]["probe_size"])


def _label(row: Mapping[str, Any]) -> str:
    """The size of a row for people: "14 px" or "native size"."""
    return "native size" if size_name(row) == "native" else f"{row['probe_size']} px"


def _native(name: str, evaluations: Mapping[str, Evaluation]) -> str:
    """Accuracy by native size, for benchmarks whose images are small by themselves."""
    figure, axes = new_axes(
        "pixels of the original across the smaller face", "accuracy (%)", f"{name}: accuracy by native size"
    )
    names: list[str] = []
    for number, (model, evaluation) in enumerate(evaluations.items()):
        for row in evaluation.rows:
            parts = row["by_native_size"] or []
            if not parts:
                continue
            names = names or [f"{native_range(part)}\n{part['pairs']:,} pairs" for part in parts]
            low = [part["accuracy"] - part["accuracy_interval"][0] for part in parts]
            high = [part["accuracy_interval"][1] - part["accuracy"] for part in parts]
            axes.errorbar(
                np.arange(len(parts)) + 0.06 * number,
                [part["accuracy"] for part in parts],
                yerr=[np.maximum(low, 0), np.maximum(high, 0)],
                fmt="o-",
                capsize=3,
                markersize=4,
                color=COLOURS[number % len(COLOURS)],
                label=model,
            )
    if not names:
        return ""
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.legend(frameon=False, fontsize=9)
    return figure_html(
        figure,
        "Pairs as they are, by the native size of the smaller face, under the thresholds that all pairs gave; bars are "
        "95 % bootstrap intervals.",
    )


def _condition(evaluation: Evaluation, size: int) -> Condition:
    """Under which the images were at this size, without other losses."""
    return Condition() if size == evaluation.benchmark.size else Condition(size=size)


def _size_ticks(axes: Any, sizes: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(sizes)))
    axes.set_xticklabels([str(size) for size in sorted(sizes)])
    axes.xaxis.set_minor_locator(NullLocator())


def _curves(name: str, evaluations: Mapping[str, Evaluation]) -> str:
    figure, axes = new_axes(
        "resolution of both images (pixels)", "accuracy (%)", f"{name}: accuracy against resolution"
    )
    sizes: set[int] = set()
    for number, (model, evaluation) in enumerate(evaluations.items()):
        rows = [evaluation.rows[index] for index in reversed(_same_size(evaluation))]
        rows = [row for row in rows if size_name(row) != "native"]
        if not rows:
            continue
        places = [row["probe_size"] for row in rows]
        sizes.update(places)
        colour = COLOURS[number % len(COLOURS)]
        axes.fill_between(
            places,
            [row["accuracy_interval"][0] for row in rows],
            [row["accuracy_interval"][1] for row in rows],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
        axes.plot(places, [row["accuracy"] for row in rows], "o-", color=colour, markersize=4, label=model)
    if not sizes:
        return ""
    _size_ticks(axes, sorted(sizes))
    axes.legend(frameon=False, fontsize=9)
    return figure_html(
        figure, "Ten-fold accuracy with both images at each size; bands are 95 % bootstrap intervals."
    )


def _roc(name: str, evaluation: Evaluation) -> str:
    from matplotlib.ticker import NullLocator

    figure, axes = new_axes("false accept rate", "true accept rate", f"{name}: ROC")
    det_figure, det = new_axes("false accept rate", "false reject rate", f"{name}: DET")
    same = evaluation.benchmark.same
    smallest = 1 / max(1, int((~same).sum()))
    for number, index in enumerate(_same_size(evaluation)):
        false_accepts, accepts = roc_curve(evaluation.scores[index], same)
        # Of points with one rate the last is reached; the steps between hold no more information.
        keep = np.append(np.diff(false_accepts) > 0, True)
        shown = np.maximum(false_accepts[keep], smallest)
        label = _label(evaluation.rows[index])
        colour = COLOURS[number % len(COLOURS)]
        axes.step(shown, accepts[keep], where="post", color=colour, label=label, linewidth=1.4)
        misses = np.maximum(1 - accepts[keep], 1 / max(1, int(same.sum())) / 2)
        det.step(shown, misses, where="post", color=colour, label=label, linewidth=1.4)
    for drawn in (axes, det):
        drawn.set_xscale("log")
        drawn.set_xlim(smallest, 1)
        drawn.xaxis.set_minor_locator(NullLocator())
        drawn.legend(frameon=False, fontsize=9)
    det.set_yscale("log")
    det.yaxis.set_minor_locator(NullLocator())
    return figure_html(figure, "True accepts against false accepts, both images at each size.") + figure_html(
        det_figure, "Detection error trade-off: lower is better."
    )


def _histograms(name: str, evaluation: Evaluation) -> str:
    parts = []
    same = evaluation.benchmark.same
    for index in _same_size(evaluation):
        row = evaluation.rows[index]
        figure, axes = new_axes("cosine", "share of pairs", f"{name}: scores, {_label(row)}")
        bins = np.linspace(-0.4, 1.0, 57).tolist()
        scores = np.clip(evaluation.scores[index], -0.4, 1.0)
        for kind, label, colour in (
            (same, "same person", COLOURS[0]),
            (~same, "different people", COLOURS[1]),
        ):
            if kind.any():
                weights = np.full(int(kind.sum()), 1 / kind.sum())
                axes.hist(scores[kind], bins=bins, weights=weights, alpha=0.55, color=colour, label=label)
        axes.margins(y=0.28)  # room for the legend
        axes.axvline(row["threshold"], color="#333", linewidth=1, linestyle="--", label="threshold")
        axes.legend(frameon=False, fontsize=9)
        parts.append(figure_html(figure, f"Scores of the pairs, both images {_label(row)}."))
    return "".join(parts)


def heat_cell(share: float, text: str) -> str:
    """A cell of a heat map: from orange (``share`` 0) over white to blue (1), light enough for dark text."""
    warm, cold, white = np.array([244, 170, 120]), np.array([130, 178, 225]), np.array([252, 252, 252])
    end, strength = (cold, 2 * share - 1) if share > 0.5 else (warm, 1 - 2 * share)
    red, green, blue = (round(float(part)) for part in white + (end - white) * strength)
    return f'<td style="background:rgb({red},{green},{blue})">{text}</td>'


def _heat(evaluation: Evaluation) -> str:
    cells = {
        (row["gallery_size"], row["probe_size"]): row["accuracy"]
        for row in evaluation.rows
        if not (row["gallery_losses"] or row["probe_losses"] or size_name(row) == "native")
    }
    sizes = sorted({gallery for gallery, _ in cells}, reverse=True)
    probes = sorted({probe for _, probe in cells}, reverse=True)
    if len(cells) <= len(set(sizes) | set(probes)):
        return ""
    low, high = min(cells.values()), max(cells.values())

    def cell(gallery: int, probe: int) -> str:
        value = cells.get((gallery, probe))
        if value is None:
            return "<td></td>"
        share = 1.0 if high == low else (value - low) / (high - low)
        return heat_cell(share, f"{value:.2f}")

    head = "".join(f"<th>{probe}</th>" for probe in probes)
    body = "".join(
        f"<tr><th>{gallery}</th>{''.join(cell(gallery, probe) for probe in probes)}</tr>" for gallery in sizes
    )
    return (
        "<h3>Gallery size (down) against probe size (across)</h3>"
        f'<div class="scroll"><table class="heat"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _face(evaluation: Evaluation, image: int, condition: Condition) -> NDArray[np.uint8]:
    """The image as the model saw it: uint8 [size, size, 3] RGB."""
    benchmark, row = evaluation.benchmark, evaluation.rows[0]
    pixels = torch.from_numpy(benchmark.images[image : image + 1]).permute(0, 3, 1, 2).float() / 255.0
    seen = condition.apply(pixels, row["down"], row["up"], [0])
    return (seen[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def worst_errors(evaluation: Evaluation, count: int = WORST) -> list[tuple[int, int, float]]:
    """The pairs judged wrong with the largest distance to the threshold, an equal share for each size.

    Returns (row, pair, score less threshold), worst first within each size.
    """
    rows = _same_size(evaluation)
    found = []
    for number, index in enumerate(rows):
        share = count // len(rows) + (number < count % len(rows))
        margin = evaluation.scores[index] - evaluation.rows[index]["threshold"]
        wrong = np.flatnonzero(~evaluation.right[index])
        order = wrong[np.argsort(-np.abs(margin[wrong]), kind="stable")][:share]
        found += [(index, int(pair), float(margin[pair])) for pair in order]
    return found


def _worst(evaluation: Evaluation) -> str:
    cards = []
    for index, pair, _ in worst_errors(evaluation):
        row = evaluation.rows[index]
        condition = _condition(evaluation, row["probe_size"])
        benchmark = evaluation.benchmark
        faces = [_face(evaluation, int(side[pair]), condition) for side in (benchmark.left, benchmark.right)]
        _, encoded = cv2.imencode(".jpg", np.hstack(faces)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
        data = base64.b64encode(encoded.tobytes()).decode()
        same = bool(benchmark.same[pair])
        what = "same person, called different" if same else "different people, called same"
        score = float(evaluation.scores[index][pair])
        cards.append(
            f'<div class="pair"><img alt="pair {pair}" src="data:image/jpeg;base64,{data}">{_label(row)}: '
            f"{what}<br>cosine {score:.3f}, threshold {row['threshold']:.3f}</div>"
        )
    if not cards:
        return "<p>No pair was judged wrong.</p>"
    return f'<div class="pairs">{"".join(cards)}</div>'


def _scatter(name: str, evaluation: Evaluation) -> str:
    """Figure 2 of the paper (001): features of the same images clear and degraded, in two dimensions."""
    from sklearn.manifold import TSNE

    rows = [evaluation.rows[index] for index in _same_size(evaluation)]
    rows = [row for row in rows if size_name(row) != "native"]
    if len(rows) < 2:
        return ""
    largest, smallest = rows[0]["probe_size"], rows[-1]["probe_size"]
    conditions = [_condition(evaluation, size) for size in (largest, smallest)]
    chosen = np.random.default_rng(0).permutation(len(evaluation.benchmark.images))[:SCATTER_IMAGES]
    if len(chosen) < 10:
        return ""
    clear, degraded = (evaluation.features[condition][chosen] for condition in conditions)
    perplexity = min(30.0, (2 * len(chosen) - 1) / 3)
    places = TSNE(2, init="pca", random_state=0, perplexity=perplexity).fit_transform(
        np.concatenate([clear, degraded])
    )
    first, second = places[: len(chosen)], places[len(chosen) :]
    figure, axes = new_axes("", "", f"{name}: features at {largest} and {smallest} pixels (t-SNE)")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    lines = np.stack([first, second], axis=1)
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(list(lines), colors="#bbbbbb", linewidths=0.6, zorder=1))
    axes.scatter(*first.T, s=12, color=COLOURS[0], label=f"{largest} px", zorder=2)
    axes.scatter(*second.T, s=12, color=COLOURS[1], label=f"{smallest} px", zorder=2)
    axes.legend(frameon=False, fontsize=9)
    cosine = float(np.mean(np.sum(clear * degraded, axis=1)))
    return figure_html(
        figure,
        f"{len(chosen)} images at both sizes, joined by lines: the shorter, the less a feature depends on resolution. "
        f"Mean cosine between an image's two features: {cosine:.3f}.",
    )


def _rejection(name: str, evaluation: Evaluation) -> str:
    """Error against the share of pairs refused for the quality of their worse image, for each measure of quality that
    is known."""
    return "".join(
        _rejection_by(name, evaluation, values, measure, words)
        for values, measure, words in (
            (
                evaluation.norms,
                "feature length",
                "the shorter of their two features (feature length as quality)",
            ),
            (
                {condition: -errors for condition, errors in evaluation.errors.items()},
                "reconstruction",
                "the larger of their two reconstruction errors (the decoder's drawing against the image)",
            ),
        )
        if values
    )


def _rejection_by(
    name: str, evaluation: Evaluation, values: Mapping[Condition, NDArray[Any]], measure: str, words: str
) -> str:
    title = f"{name}: error against refusal, {measure}"
    figure, axes = new_axes("share of pairs refused (%)", "error (%)", title)
    for number, index in enumerate(_same_size(evaluation)):
        row = evaluation.rows[index]
        known = values[_condition(evaluation, row["probe_size"])]
        quality = np.minimum(known[evaluation.benchmark.left], known[evaluation.benchmark.right])
        shares, errors = error_against_refusal(~evaluation.right[index], quality)
        axes.plot(
            100 * shares,
            100 * errors,
            color=COLOURS[number % len(COLOURS)],
            label=_label(row),
            linewidth=1.4,
        )
    axes.legend(frameon=False, fontsize=9)
    return figure_html(
        figure,
        f"Pairs are refused by {words}. A falling curve means that the model knows when it does not know.",
    )


def error_against_refusal(
    wrong: NDArray[np.bool_], quality: NDArray[np.float64], most: float = 0.9
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The share of wrong pairs among those that stay when the pairs of lowest quality are refused.

    Args:
        wrong: bool [p]; quality: float [p], larger is better. Pairs of equal quality go together.
        most: the largest share that is refused.

    Returns:
        Shares refused and errors, float64 [k] each, from 0 refused on.
    """
    order = np.argsort(quality, kind="stable")
    mistakes = np.asarray(wrong)[order]
    total = len(mistakes)
    left = mistakes.sum() - np.concatenate(([0], np.cumsum(mistakes)[:-1]))
    refused = np.arange(total)
    starts = np.append(True, np.diff(quality[order]) > 0) & (refused <= most * total)
    return refused[starts] / total, left[starts] / (total - refused[starts])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    rates = list(
        dict.fromkeys(r for row in rows for r, value in row["tar_at_far"].items() if value is not None)
    )
    head = "".join(
        f"<th{' class=left' if left else ''}>{escape(text)}</th>"
        for text, left in [
            ("model", True),
            ("benchmark", True),
            ("gallery x probe", True),
            ("accuracy %", False),
            ("95 % interval", False),
            ("over folds", False),
            *((f"TAR at FAR {rate}", False) for rate in rates),
            ("EER %", False),
            ("AUC", False),
        ]
    )

    def side(row: Mapping[str, Any], which: str) -> str:
        return f"{size_name(row, which)} {row[f'{which}_losses']}".strip()

    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    body = "".join(
        f'<tr><td class="left">{escape(row["model"])}</td><td class="left">{escape(row["benchmark"])}</td>'
        f'<td class="left">{escape(side(row, "gallery"))} x {escape(side(row, "probe"))}</td>'
        f"<td><b>{row['accuracy']:.2f}</b></td>"
        f"<td>{row['accuracy_interval'][0]:.2f} to {row['accuracy_interval'][1]:.2f}</td>"
        f"<td>+- {row['accuracy_std']:.2f}</td>"
        + "".join(f"<td>{number(row['tar_at_far'].get(rate))}</td>" for rate in rates)
        + f"<td>{number(row['eer'])}</td><td>{number(row['auc'], 4)}</td></tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    body = "".join(
        f'<tr><td class="left">{escape(row["second"])}</td><td class="left">{escape(row["first"])}</td>'
        f'<td class="left">{escape(row["benchmark"])}</td>'
        f'<td class="left">{row["gallery_size"]} {escape(row["gallery_losses"])} x {row["probe_size"]} '
        f"{escape(row['probe_losses'])}</td><td>{row['difference']:+.2f}</td>"
        f"<td>{row['interval'][0]:+.2f} to {row['interval'][1]:+.2f}</td><td>{row['p_value']:.4f}</td></tr>"
        for row in comparisons
    )
    return (
        "<h2>Models compared pair by pair</h2><p class=note>Difference of accuracy in points; paired bootstrap over the "
        'same pairs, 95 %.</p><div class="scroll"><table><thead><tr><th class=left>model</th><th class=left>less</th>'
        "<th class=left>benchmark</th><th class=left>gallery x probe</th><th>difference</th><th>interval</th><th>p</th>"
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _description(pairs: Sequence[tuple[str, object]]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs) + "</dl>"
    )


def verification_page(
    evaluations: Mapping[tuple[str, str], Evaluation],
    models: Sequence[ReportModel],
    rows: Sequence[Mapping[str, Any]],
    areas: Mapping[str, Mapping[str, float]],
    comparisons: Sequence[Mapping[str, Any]] = (),
    title: str = "Verification at every resolution",
    lead: str = "",
    further: Callable[[Mapping[str, str]], Sequence[str]] = lambda short: [],
) -> str:
    """The page as text.

    Args:
        evaluations: (model, benchmark) -> what was computed.
        models: how each was prepared; every model of ``evaluations`` is among them.
        rows: all rows, with ``model``.
        areas: model -> benchmark -> area under the accuracy-resolution curve, percent.
        comparisons: see :class:`lrface.evaluation.VerificationRun`.
        lead: HTML put before the curves.
        further: gives sections that come last, as HTML; it gets the short names of models.

    Raises:
        LrfaceError: there is nothing to show.
    """
    if not evaluations:
        raise LrfaceError("a report needs at least one result")
    restart_figures()
    short = short_names([model for model, _ in evaluations] + [model.name for model in models])
    evaluations = {(short[model], name): found for (model, name), found in evaluations.items()}
    rows = [{**row, "model": short[row["model"]]} for row in rows]
    areas = {short[model]: found for model, found in areas.items()}
    comparisons = [
        {**row, "first": short[row["first"]], "second": short[row["second"]]} for row in comparisons
    ]
    names = list(dict.fromkeys(name for _, name in evaluations))
    parts = [f"<h1>{escape(title)}</h1>"]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts.append(
        f'<p class="note">lrface {escape(lrface.__version__)}, {made}. Models: '
        f"{', '.join(escape(short[model.name]) for model in models)}. Benchmarks: {', '.join(map(escape, names))}.</p>"
    )
    parts.append(lead)
    by_name = {name: {m: e for (m, n), e in evaluations.items() if n == name} for name in names}
    curves = [draw(name, by_name[name]) for name in names for draw in (_curves, _native)]
    parts.append(f'<div class="figures">{"".join(curves)}</div>')
    parts += ["<h2>Results</h2>", _table(rows)]
    lines = [
        f"{escape(model)} on {escape(name)}: {area:.2f} %"
        for model, found in areas.items()
        for name, area in found.items()
    ]
    if lines:
        parts.append(f"<p class=note>Area under the accuracy-resolution curve: {'; '.join(lines)}.</p>")
    if comparisons:
        parts.append(_comparison_table(comparisons))
    for (model, name), evaluation in evaluations.items():
        parts.append(f"<h2>{escape(model)} on {escape(name)}</h2>")
        benchmark = evaluation.benchmark
        parts.append(
            f"<p class=note>{len(benchmark)} pairs of {len(benchmark.images)} images, "
            f"{len(np.unique(benchmark.folds))} folds, {benchmark.unaligned} images without a detected face.</p>"
        )
        parts.append(_heat(evaluation))
        both = bool(benchmark.same.any()) and not bool(benchmark.same.all())
        drawn = (
            (_roc(name, evaluation) if both else "")
            + _scatter(name, evaluation)
            + _rejection(name, evaluation)
        )
        parts.append(f'<div class="figures">{drawn}{_histograms(name, evaluation)}</div>')
        parts += [
            "<h3>The worst errors</h3>",
            "<p class=note>As the model saw them, farthest from the threshold first, an equal share for each size.</p>",
            _worst(evaluation),
        ]
    parts += further(short)
    parts.append(how_measured(models, short))
    return document(title, parts)


def how_measured(models: Sequence[ReportModel], short: Mapping[str, str]) -> str:
    """The last section of a page: models, their preparation, and versions."""
    parts = ["<h2>How this was measured</h2>"]
    for described in models:
        stated = described.card.get("input", {})
        training = described.card.get("training", {})
        parts += [
            f"<h3>{escape(short[described.name])}</h3>",
            _description(
                [
                    ("file", described.name),
                    ("sha256", described.sha256),
                    ("input", ", ".join(f"{key} {value}" for key, value in stated.items())),
                    *((key, value) for key, value in described.preparation.items()),
                    *((f"training: {key}", value) for key, value in training.items()),
                ]
            ),
        ]
    parts.append(
        _description(
            [
                ("lrface", lrface.__version__),
                ("torch", torch.__version__),
                ("numpy", np.__version__),
                ("OpenCV", cv2.__version__),
                ("Python", platform.python_version()),
                ("machine", platform.platform()),
            ]
        )
    )
    return "\n".join(parts)


def document(title: str, parts: Sequence[str]) -> str:
    """The page of these parts; empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
