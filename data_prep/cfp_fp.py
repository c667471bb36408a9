"""Celebrities in Frontal-Profile (CFP): 7,000 pairs frontal against profile (FP), 7,000 frontal against frontal (FF).

Source:    the authors' page ("Celebrities in Frontal-Profile in the Wild", S. Sengupta et al., WACV 2016):
           cfp-dataset.zip with Data, Protocol and Readme.txt.
Licence:   unknown, see the authors' page.
Published: 500 people with 10 frontal and 4 profile photographs each; each split 10 folds of 350 same and 350
           different pairs (Readme.txt). No checksum is published.
Prepare:   unzip it, then python data_prep/cfp_fp.py SRC [OUT]; SRC holds Data and Protocol (or cfp-dataset).
Checks:    counts, every line of both splits (the two lists of photographs, same and different people as the file's
           name says), every photograph of a pair is there.
Places:    OUT/cfp/Data/Images, OUT/cfp/Protocol, for `lrface verify --benchmark cfp_fp` and cfp_ff.
"""

import sys

import numpy as np

from lrface.benchmarks.lfw import missing_photographs
from lrface.benchmarks.protocols import read_cfp
from lrface.data.prepare import Preparation, folders_in, image_files, main


def prepare(job: Preparation) -> None:
    images = job.find("Data/Images", "cfp-dataset/Data/Images", what="the folder of photographs")
    protocol = job.find("Protocol", "cfp-dataset/Protocol", what="the folder of the protocol")
    job.count("people", len(folders_in(images)), 500)
    job.count("frontal photographs", sum(1 for _ in image_files(images, "*/frontal/*")), 5_000)
    job.count("profile photographs", sum(1 for _ in image_files(images, "*/profile/*")), 2_000)
    for split in ("FP", "FF"):
        pairs = read_cfp(protocol / "Split" / split)
        job.count(f"pairs {split}", len(pairs), 7_000)
        job.count(f"folds {split}", len(np.unique(pairs.folds)), 10)
        job.missing(missing_photographs(pairs, images), images, f"photographs of pairs {split}")
    job.place(images, "cfp/Data/Images")
    job.place(protocol, "cfp/Protocol")
    job.next_command = f"lrface verify --benchmark cfp_fp --benchmark cfp_ff --data {job.out} --model MODEL"


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
