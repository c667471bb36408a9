"""Table 3 of the QualNet paper: accuracy on the four held-out corruptions, which training has not seen.

The paper's upper three rows are ResNeXt-101, AugMix and ANT are ResNet-50 as their authors released them.

    python eval/table3_unseen.py --data DATA --images 2000
    python eval/table3_unseen.py --data DATA --suite imagenet      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_3, TABLE_3_CORRUPTIONS
from lrface.errors import errors_for_users
from lrface.study import (
    VANILLA_NAIVE_QUALNET,
    Column,
    Row,
    accuracy_on,
    corruption_evaluation,
    run_study,
    study_options,
)

SUITES = {
    "cifar10": (*VANILLA_NAIVE_QUALNET["cifar10"], Row("augmix", "AugMix", "cifar10/augmix")),
    "imagenet": (
        *VANILLA_NAIVE_QUALNET["imagenet"],
        Row("qualnet_resnet50", "ResNet-50: QualNet", "imagenet/qualnet_resnet50", paper="qualnet_resnet50"),
    ),
}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "table3_unseen", SUITES)
        small = {
            "qualnet_resnet50" if key == "qualnet" else key: row for key, row in TABLE_3["resnet50"].items()
        }
        paper = small | TABLE_3["resnext101_32x8d"]
        run_study(
            "QualNet Table 3, corruptions that training has not seen",
            options,
            corruption_evaluation(options, held_out=True),
            [
                Column(
                    name.replace("_", " "),
                    accuracy_on(name),
                    {key: row[number] for key, row in paper.items()},
                )
                for number, name in enumerate(TABLE_3_CORRUPTIONS)
            ],
            paper=f"{SOURCE}, Table 3: ResNeXt-101 32x8d, AugMix ResNet-50; ImageNet-1K",
        )
