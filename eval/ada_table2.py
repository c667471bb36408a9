"""Table 2 of the AdA paper (003): accuracy on CIFAR-10, CIFAR-10.1, and under AutoAttack and MultiTargeted in l2 and linf.

CIFAR-10.1 is taken from cifar10.1/ below the data root, where it is there. AutoAttack needs `pip install lrface[attack]`.

    python eval/ada_table2.py --data DATA --attacked 1000
    python eval/ada_table2.py --data DATA --attacked 100 --attack-steps 20 --restarts 1    # an upper bound, in minutes
    python eval/ada_table2.py --data DATA --suite cifar10_r50                              # the paper's, on a GPU
"""

from lrface.ada_study import ada_options, attack_evaluation
from lrface.benchmarks.published_ada import NAMES, SOURCE, TABLE_2
from lrface.errors import errors_for_users
from lrface.study import Column, run_study

ATTACKS = {
    "l2 0.5": "l2 0.5",
    "l2 1.0": "l2 1",
    "linf 1/255": "linf 0.00392157",
    "linf 2/255": "linf 0.00784314",
    "linf 4/255": "linf 0.0156863",
}

if __name__ == "__main__":
    with errors_for_users():
        found = ada_options(__doc__, "ada_table2", list(NAMES))
        columns = [
            Column(
                "clean (%)",
                lambda figures: figures["clean_accuracy"],
                {key: row[0] for key, row in TABLE_2.items()},
            ),
            Column(
                "CIFAR-10.1",
                lambda figures: figures["cifar10_1"],
                {key: row[1] for key, row in TABLE_2.items()},
            ),
        ]
        for number, (title, key) in enumerate(ATTACKS.items(), start=2):
            columns.append(
                Column(
                    title,
                    lambda figures, key=key: figures["attacks"][key],
                    {row: values[number] for row, values in TABLE_2.items()},
                )
            )
        run_study(
            "AdA Table 2, accuracy under attack and on CIFAR-10.1",
            found.options,
            attack_evaluation(found),
            columns,
            paper=f"{SOURCE}, Table 2: pre-activation ResNet-50, 300 epochs, AutoAttack and MultiTargeted",
            notes=[f"{found.attacked} test images are attacked; the clean column is of all."],
        )
