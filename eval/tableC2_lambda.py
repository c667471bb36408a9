"""Table C.2 of the QualNet paper's supplement: lambda, the weight of the quality loss.

lambda 0 is naive augmentation, as in the paper. On CIFAR-10 two further ones: that of Tables 1 to 3, and ten times that
of the ablations, because the quality loss's gradient is a few hundredths as long as the softmax loss's there.

    python eval/tableC2_lambda.py --data DATA --images 2000 --rows naive qualnet_0.2 qualnet_0.6 qualnet_1.0
    python eval/tableC2_lambda.py --data DATA --suite imagenet200      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_C2
from lrface.errors import errors_for_users
from lrface.study import Row, accuracy_columns, corruption_evaluation, run_study, study_options


def rows(naive: str, qualnet: str, *further: Row) -> tuple[Row, ...]:
    """Naive augmentation and QualNet with each lambda of the table, and further ones."""
    return (
        Row("naive", "0 (naive augmentation)", naive, paper="0.0"),
        *(
            Row(
                f"qualnet_{weight}",
                f"{weight}",
                qualnet,
                (f"stages.quality.method.quality_weight={weight}",),
                paper=f"{weight}",
            )
            for weight in TABLE_C2
            if weight
        ),
        *further,
    )


SUITES = {
    "cifar10": rows(
        "cifar10/corruptions",
        "cifar10/qualnet",
        Row("qualnet", "0.1, as in Tables 1 to 3", "cifar10/qualnet"),
        Row("qualnet_6.0", "6.0", "cifar10/qualnet", ("stages.quality.method.quality_weight=6.0",)),
    ),
    "imagenet200": rows("imagenet200/naive", "imagenet200/qualnet"),
}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "tableC2_lambda", SUITES)
        run_study(
            "QualNet Table C.2, lambda",
            options,
            corruption_evaluation(options),
            accuracy_columns({f"{weight}": row for weight, row in TABLE_C2.items()}),
            paper=f"{SOURCE}, supplement, Table C.2: ResNet-50, ImageNet-200",
        )
