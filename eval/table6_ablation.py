"""Table 6 of the QualNet paper: what a decoder, two stages and the inverse each bring.

Four networks: naive augmentation; a classifier and a decoder trained together; a decoder trained with clean images
first, then frozen; QualNet, whose decoder is the inverse of an i-RevNet. lambda is 0.6, as in the paper's ablations.
Every stage has the whole schedule, which is the paper's accounting; the images of each stage are in the table.

    python eval/table6_ablation.py --data DATA --seeds 0 1 --images 2000
    python eval/table6_ablation.py --data DATA --suite imagenet200       # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_6
from lrface.errors import errors_for_users
from lrface.study import Row, accuracy_columns, corruption_evaluation, run_study, study_options

LAMBDA = "stages.quality.method.quality_weight=0.6"
SUITES = {
    "cifar10": (
        Row("naive", "naive augmentation", "cifar10/corruptions"),
        Row("end_to_end", "with decoder", "cifar10/end_to_end"),
        Row("two_stages", "with decoder, two stages", "cifar10/two_stages"),
        Row(
            "qualnet_0.6",
            "with inverse as decoder, two stages (QualNet)",
            "cifar10/qualnet",
            (LAMBDA,),
            paper="qualnet",
        ),
        Row(
            "naive_double",
            "control: naive augmentation, as many images as both stages",
            "cifar10/corruptions",
            length=2,
        ),
    ),
    "imagenet200": (
        Row("naive", "naive augmentation", "imagenet200/naive"),
        Row("end_to_end", "with decoder", "imagenet200/end_to_end"),
        Row("two_stages", "with decoder, two stages", "imagenet200/two_stages"),
        Row(
            "qualnet_0.6",
            "with inverse as decoder, two stages (QualNet)",
            "imagenet200/qualnet",
            (LAMBDA,),
            paper="qualnet",
        ),
    ),
}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "table6_ablation", SUITES)
        run_study(
            "QualNet Table 6, ablation of its modules",
            options,
            corruption_evaluation(options),
            accuracy_columns(TABLE_6),
            paper=f"{SOURCE}, Table 6: ResNet-50, ImageNet-200",
        )
