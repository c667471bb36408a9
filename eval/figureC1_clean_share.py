"""Figure C.1 of the QualNet paper's supplement: the share of clean images in a batch. lambda is 0.6.

The paper prints curves without numbers: with more clean images clean accuracy mostly rises and accuracy on corruptions
falls; 50 % serves both.

    python eval/figureC1_clean_share.py --data DATA --images 2000
    python eval/figureC1_clean_share.py --data DATA --suite imagenet200      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE
from lrface.errors import errors_for_users
from lrface.study import Row, accuracy_columns, corruption_evaluation, run_study, study_options

LAMBDA = "stages.quality.method.quality_weight=0.6"


def rows(recipe: str) -> tuple[Row, ...]:
    """QualNet with each share; 50 % is the run of Table 6."""
    return tuple(
        Row("qualnet_0.6", "50 %", recipe, (LAMBDA,))
        if share == 50
        else Row(
            f"qualnet_clean_{share}",
            f"{share} %",
            recipe,
            (LAMBDA, f"stages.quality.degrade.clean_share={share / 100}"),
        )
        for share in (0, 25, 50, 75, 100)
    )


SUITES = {"cifar10": rows("cifar10/qualnet"), "imagenet200": rows("imagenet200/qualnet")}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "figureC1_clean_share", SUITES)
        run_study(
            "QualNet Figure C.1, share of clean images in a batch",
            options,
            corruption_evaluation(options),
            accuracy_columns(),
            paper=f"{SOURCE}, supplement, Figure C.1: ResNet-50, ImageNet-200",
        )
