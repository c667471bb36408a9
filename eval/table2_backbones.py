"""Table 2 of the QualNet paper: QualNet on several networks, beside training on clean images and naive augmentation.

QualNet* is tuned from a classifier that was trained on clean images against the same frozen decoder. lambda is 0.1.

    python eval/table2_backbones.py --data DATA --images 2000
    python eval/table2_backbones.py --data DATA --suite imagenet      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_2
from lrface.errors import errors_for_users
from lrface.study import (
    Column,
    Row,
    clean_accuracy,
    corruption_evaluation,
    error_column,
    run_study,
    study_options,
)

METHODS = {
    "vanilla": ("vanilla", "clean"),
    "naive": ("naive augmentation", "corruptions"),
    "qualnet": ("QualNet", "qualnet"),
    "qualnet_finetuned": ("QualNet*", "qualnet_finetuned"),
}
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "resnext101_32x8d": "ResNeXt-101"}
SUITES = {
    "cifar10": tuple(
        Row(key, f"ResNet-18, slim: {label}", f"cifar10/{recipe}", paper=f"resnet18 {key}")
        for key, (label, recipe) in METHODS.items()
    ),
    "imagenet": tuple(
        Row(
            f"{key}_{network}",
            f"{label}: {METHODS[key][0]}",
            f"imagenet/{key}_resnet50",
            () if network == "resnet50" else (f"backbone.name={network}",),
            paper=f"{network} {key}",
        )
        for network, label in NETWORKS.items()
        for key in TABLE_2[network]
    ),
}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "table2_backbones", SUITES)
        paper = {f"{network} {key}": row for network, rows in TABLE_2.items() for key, row in rows.items()}
        run_study(
            "QualNet Table 2, networks",
            options,
            corruption_evaluation(options),
            [
                Column("clean (%)", clean_accuracy, {key: row[0] for key, row in paper.items()}),
                error_column(options, {key: row[1] for key, row in paper.items()}),
            ],
            paper=f"{SOURCE}, Table 2: ImageNet-1K",
        )
