"""Table B.1 of the QualNet paper's supplement: accuracy on each type of corruption.

The runs are those of Table 1 and are taken from there.

    python eval/tableB1_types.py --data DATA --images 2000
    python eval/tableB1_types.py --data DATA --suite imagenet      # the paper's networks, on a GPU
"""

from lrface.benchmarks.published import SOURCE, TABLE_B1, TABLE_B1_COLUMNS
from lrface.errors import errors_for_users
from lrface.study import (
    VANILLA_NAIVE_QUALNET,
    Column,
    accuracy_on,
    clean_accuracy,
    corruption_accuracy,
    corruption_evaluation,
    run_study,
    study_options,
)

SUITES = VANILLA_NAIVE_QUALNET

if __name__ == "__main__":
    with errors_for_users():
        options = study_options(__doc__, "tableB1_types", SUITES)
        figures = {"clean": clean_accuracy, "average": corruption_accuracy}
        run_study(
            "QualNet Table B.1, types of corruption",
            options,
            corruption_evaluation(options),
            [
                Column(
                    name.replace("_", " "),
                    figures.get(name) or accuracy_on(name),
                    {key: row[number] for key, row in TABLE_B1.items()},
                )
                for number, name in enumerate(TABLE_B1_COLUMNS)
            ],
            paper=f"{SOURCE}, supplement, Table B.1: ResNeXt-101 32x8d, ImageNet-1K",
        )
