"""Table 1 of the AdA paper (003): errors on CIFAR-10-C by corruption, of networks trained with nothing, AugMix, DeepAugment,
AdA and their combinations.

The paper's mCE is the mean error over the 15 corruptions and their severities. Every row of the small suite shows its
classifier the same number of images.

    python eval/ada_table1.py --data DATA --images 2000
    python eval/ada_table1.py --data DATA --start runs/clean --steps 500    # each tuned from one clean network
    python eval/ada_table1.py --data DATA --suite cifar10_r50               # the paper's networks and schedule, on a GPU
"""

from lrface.ada_study import ada_options, corruption_table, error_on
from lrface.benchmarks.published_ada import NAMES, SOURCE, TABLE_1, TABLE_3_CORRUPTIONS
from lrface.errors import errors_for_users
from lrface.study import Column, corruption_evaluation, run_study

if __name__ == "__main__":
    with errors_for_users():
        found = ada_options(__doc__, "ada_table1", list(NAMES))
        paper = {key: (None, mce, errors) for key, (mce, errors) in TABLE_1.items()}
        run_study(
            "AdA Table 1, errors on CIFAR-10-C",
            found.options,
            corruption_evaluation(found.options),
            [
                Column("clean error", lambda figures: figures["clean_error"]),
                Column(
                    "mCE",
                    lambda figures: figures["mean_error"],
                    {key: row[0] for key, row in TABLE_1.items()},
                ),
                *(Column(name, error_on(name)) for name in TABLE_3_CORRUPTIONS),
            ],
            paper=f"{SOURCE}, Table 1: pre-activation ResNet-50, 300 epochs, CIFAR-10",
            notes=[] if found.start is None else [f"Each row starts from one clean network, {found.start}."],
            table=corruption_table(TABLE_3_CORRUPTIONS, paper),
        )
