"""Figures 3 to 6 of the paper on contrastive inversion (paper 002), and with --what top5 its Figures 7 to 10, on CIFAR-10: a
picture, and the numbers in it as JSON and as a table beside it.

    python eval/contrastive_figures.py --figure 3 --data DATA     # accuracy by the share of the labels
    python eval/contrastive_figures.py --figure 4 --data DATA     # stronger degradations than those of training
    python eval/contrastive_figures.py --figure 5 --data DATA     # label shift: classes that no network has seen
    python eval/contrastive_figures.py --figure 6 --data DATA     # the five losses
    python eval/contrastive_figures.py --figure 3 --operator noise50 blur37 --finished --set stages.1.epochs=3

Runs are those of eval/contrastive_tables.py; what is there is not trained again. Figure 5 has runs of its own: teachers,
students and end-to-end networks of seven classes of CIFAR-10, judged on cats, deer and trucks, which are to be taken for
dogs, horses and cars. The paper prints no numbers of these figures but the baseline of Figure 4 (its Table 12).
"""

import argparse

from lrface.benchmarks.published_contrastive import SOURCE
from lrface.contrastive_figures import UNITS, draw, panels
from lrface.contrastive_study import OPERATORS, figure_evaluation, figure_rows, of_seven_classes
from lrface.errors import LrfaceError, errors_for_users
from lrface.files import write_json
from lrface.study import Column, Figures, run_study, study_options

TITLES = {
    "3": "Accuracy by the share of the labels",
    "4": "Degradations stronger than those of training",
    "5": "Classes that no network has seen",
    "6": "Five losses",
}


def mean_of_student(figures: Figures) -> float | None:
    """Top-1 of the student with all the labels it has, mean over the levels that it is judged at."""
    own = [result for result in figures["results"] if result["name"] == "student"]
    shares = [result["labels"] for result in own if result["labels"] is not None]
    found = [
        result["top1"]["mean"] for result in own if not shares or result["labels"] in (None, max(shares))
    ]
    return sum(found) / len(found) if found else None


if __name__ == "__main__":
    with errors_for_users():
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--figure", choices=list(TITLES), default="3")
        parser.add_argument("--draws", type=int, default=10)
        parser.add_argument("--operator", choices=OPERATORS, nargs="+", default=[], metavar="OPERATOR")
        parser.add_argument("--what", choices=list(UNITS), default="top1")
        own, arguments = parser.parse_known_args()
        name = f"contrastive_figure{own.figure}"
        options = study_options(
            __doc__,
            name,
            {"cifar10": figure_rows(own.figure, own.operator)},
            arguments,
            family="contrastive",
        )
        if own.figure == "5":
            options = of_seven_classes(options)
        document = run_study(
            f"Contrastive inversion, Figure {own.figure}",
            options,
            figure_evaluation(options, own.figure, own.draws),
            (Column("top-1, mean over what is drawn (%)", mean_of_student),),
            paper=f"{SOURCE}, Figure {own.figure}",
        )
        if not document:
            raise LrfaceError(
                f"--finished: no run of {', '.join(row.key for row in options.rows)} is finished below {options.runs} with "
                "these settings (--set, --epochs, --steps)"
            )
        made = {what: panels(own.figure, document["rows"], what) for what in UNITS}
        curves = {what: [panel.plain() for panel in found] for what, found in made.items()}
        write_json(options.results / f"{name}.json", {**document, "panels": curves})
        picture = options.results / f"{name}{'' if own.what == 'top1' else f'_{own.what}'}.png"
        draw(picture, made[own.what], TITLES[own.figure], own.what)
        print(picture)
