"""Table 3 of the AdA paper (003): clean error and errors on CIFAR-10-C of AdA and of its best combination, beside models of
perceptual and adversarial training, which the paper took from their authors and which are printed as they are there.

    python eval/ada_table3.py --data DATA --images 2000
    python eval/ada_table3.py --data DATA --suite cifar10_r50      # the paper's networks and schedule, on a GPU
"""

from lrface.ada_study import ada_options, corruption_table, error_on
from lrface.benchmarks.published_ada import SOURCE, TABLE_3, TABLE_3_CORRUPTIONS
from lrface.errors import errors_for_users
from lrface.study import Column, corruption_evaluation, run_study

if __name__ == "__main__":
    with errors_for_users():
        found = ada_options(__doc__, "ada_table3", ("ada", "ada_deepaugment10_augmix"))
        run_study(
            "AdA Table 3, beside perceptual adversarial training",
            found.options,
            corruption_evaluation(found.options),
            [
                Column("clean error", lambda figures: figures["clean_error"]),
                Column(
                    "mCE",
                    lambda figures: figures["mean_error"],
                    {key: row[1] for key, row in TABLE_3.items()},
                ),
                *(Column(name, error_on(name)) for name in TABLE_3_CORRUPTIONS),
            ],
            paper=f"{SOURCE}, Table 3: ResNet-50",
            notes=[] if found.start is None else [f"Each row starts from one clean network, {found.start}."],
            table=corruption_table(TABLE_3_CORRUPTIONS, TABLE_3, list(TABLE_3)[:5]),
        )
