"""Table C.1 of the QualNet paper's supplement: quality losses. lambda is 0.6.

The perceptual loss needs VGG16's weights: torchvision's file in its own cache, or --set
stages.quality.method.quality.weights=FILE with --rows qualnet_perceptual.

    python eval/tableC1_losses.py --data DATA --images 2000 --rows qualnet_0.6 qualnet_l2 qualnet_likelihood
    python eval/tableC1_losses.py --data DATA --suite imagenet200      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_C1
from lrface.errors import errors_for_users
from lrface.study import Row, accuracy_columns, corruption_evaluation, run_study, study_options

LAMBDA = "stages.quality.method.quality_weight=0.6"
LABELS = {
    "l1": "L1",
    "l2": "L2",
    "likelihood": "likelihood",
    "adversarial": "adversarial",
    "perceptual": "perceptual",
}


def rows(recipe: str) -> tuple[Row, ...]:
    """QualNet by quality loss; L1 is the run of Table 6."""
    return (
        Row("qualnet_0.6", "L1", recipe, (LAMBDA,), paper="l1"),
        *(
            Row(f"qualnet_{key}", label, recipe, (LAMBDA, f"stages.quality.method.quality={key}"), paper=key)
            for key, label in LABELS.items()
            if key != "l1"
        ),
    )


SUITES = {"cifar10": rows("cifar10/qualnet"), "imagenet200": rows("imagenet200/qualnet")}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "tableC1_losses", SUITES)
        run_study(
            "QualNet Table C.1, quality losses",
            options,
            corruption_evaluation(options),
            accuracy_columns(TABLE_C1),
            paper=f"{SOURCE}, supplement, Table C.1: ResNet-50, ImageNet-200",
        )
