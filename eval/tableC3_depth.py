"""Table C.3 of the QualNet paper's supplement: layers of the i-RevNet whose inverse is the decoder.

On CIFAR-10 the small recipe's 36 layers stand for the paper's 300, the others in proportion; three stages have at least 9
layers, 78 in the paper's. 45 and 450 have no row there.

    python eval/tableC3_depth.py --data DATA --images 2000
    python eval/tableC3_depth.py --data DATA --suite imagenet      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_C3
from lrface.errors import errors_for_users
from lrface.study import (
    Row,
    corruption_evaluation,
    error_column,
    run_study,
    study_options,
)


def small(blocks: int) -> tuple[str, ...]:
    """Overrides for an i-RevNet of three stages with so many blocks, three layers each."""
    network = f"blocks=[{blocks},{blocks},{blocks}]"
    return f"stages.invertible.backbone.{network}", f"decoder.network.{network}"


SUITES = {
    "cifar10": (
        Row("naive", "none (naive augmentation)", "cifar10/corruptions", paper="0"),
        Row("qualnet_9_layers", "9 layers", "cifar10/qualnet", small(1), paper="78"),
        Row("qualnet_18_layers", "18 layers", "cifar10/qualnet", small(2), paper="150"),
        Row("qualnet", "36 layers", "cifar10/qualnet", paper="300"),
    ),
    "imagenet": (
        Row("naive_resnet50", "none (naive augmentation)", "imagenet/naive_resnet50", paper="0"),
        *(
            Row(
                "qualnet_resnet50" if layers == 300 else f"qualnet_resnet50_{layers}_layers",
                f"{layers} layers",
                "imagenet/qualnet_resnet50",
                ()
                if layers == 300
                else (f"stages.invertible.backbone=irevnet{layers}", f"decoder.network=irevnet{layers}"),
                paper=f"{layers}",
            )
            for layers in TABLE_C3
            if layers
        ),
    ),
}

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "tableC3_depth", SUITES)
        run_study(
            "QualNet Table C.3, layers of the invertible decoder",
            options,
            corruption_evaluation(options),
            [error_column(options, {f"{layers}": error for layers, error in TABLE_C3.items()})],
            paper=f"{SOURCE}, supplement, Table C.3: ResNet-50, ImageNet-1K",
        )
