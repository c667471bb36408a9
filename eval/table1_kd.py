"""Table 1 of the QualNet paper: knowledge distillation in the place of its decoder.

The teacher is QualNet's i-RevNet of stage 1, trained once for all rows. The student is a fresh classifier that sees half
clean, half corrupted images; lambda of QualNet is 0.1. The paper's DeepCorrect and AuxTraining have no rows here.

    python eval/table1_kd.py --data DATA --images 2000
    python eval/table1_kd.py --data DATA --suite imagenet      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_1
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

DISTILLED = {"kd": "original KD", "fitnet": "FitNet", "pkt": "PKT", "vid": "VID", "sp": "SP"}


def distilled(key: str) -> tuple[str, ...]:
    """What makes QualNet's stage 2 one of distillation from the i-RevNet of its stage 1."""
    head = ", {from: head, to: teacher_head}" if key == "kd" else ""
    return (
        f"stages.quality.method={{name: distil, teacher: irevnet300, loss: {key}}}",
        f"stages.quality.load=[{{from: encoder, to: teacher}}{head}]",
    )


SUITES = {
    "cifar10": (
        Row("vanilla", "vanilla (clean images only)", "cifar10/clean"),
        Row("naive", "naive augmentation", "cifar10/corruptions"),
        *(
            Row(f"distil_{key}", label, f"cifar10/distil_{key}", paper=key)
            for key, label in DISTILLED.items()
        ),
        Row("qualnet", "QualNet", "cifar10/qualnet"),
    ),
    "imagenet": (
        Row("vanilla_resnet50", "vanilla (clean images only)", "imagenet/vanilla_resnet50"),
        Row("naive_resnet50", "naive augmentation", "imagenet/naive_resnet50", paper="naive"),
        *(
            Row(f"distil_{key}", label, "imagenet/qualnet_resnet50", distilled(key), paper=key)
            for key, label in DISTILLED.items()
        ),
        Row("qualnet_resnet50", "QualNet50", "imagenet/qualnet_resnet50", paper="qualnet"),
    ),
}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "table1_kd", SUITES)
        run_study(
            "QualNet Table 1, knowledge distillation",
            options,
            corruption_evaluation(options),
            [
                Column("clean (%)", clean_accuracy, {key: row[0] for key, row in TABLE_1.items()}),
                error_column(options, {key: row[1] for key, row in TABLE_1.items()}),
            ],
            paper=f"{SOURCE}, Table 1: ResNet-50, ImageNet-1K",
        )
