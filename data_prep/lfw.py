"""Labeled Faces in the Wild (LFW), View 2: 6,000 pairs in ten folds.

Source:    the authors' site (University of Massachusetts, "Labeled Faces in the Wild"): lfw-deepfunneled.tgz (or
           lfw-funneled.tgz, lfw.tgz) and pairs.txt of View 2.
Licence:   unknown, see the authors' page.
Published: 13,233 images of 5,749 people; MD5 of lfw-deepfunneled.tgz 68331da3eb755a505a502b5aacb3c201, lfw-funneled.tgz
           1b42dfed7d15c9b2dd63d5e5840c86ad, lfw.tgz a17d05bd522c52d84eca14327a23d494, pairs.txt
           9f1ba174e4e1c508ff7cdf10ac338a7d (as torchvision checks them).
Prepare:   tar -xzf lfw-deepfunneled.tgz, then python data_prep/lfw.py SRC [OUT]; SRC holds the folder and pairs.txt.
Checks:    counts, pairs.txt line by line, every photograph of a pair is there, MD5 of what is there.
Places:    OUT/lfw/images, OUT/lfw/pairs.txt, which `lrface verify --benchmark lfw` finds, aligns once and keeps.
"""

import sys

import numpy as np

from lrface.benchmarks.lfw import missing_photographs
from lrface.benchmarks.protocols import read_pairs
from lrface.data.prepare import Preparation, count_entries, folders_in, main

MD5 = {
    "lfw-deepfunneled.tgz": "68331da3eb755a505a502b5aacb3c201",
    "lfw-funneled.tgz": "1b42dfed7d15c9b2dd63d5e5840c86ad",
    "lfw.tgz": "a17d05bd522c52d84eca14327a23d494",
    "pairs.txt": "9f1ba174e4e1c508ff7cdf10ac338a7d",
}


def prepare(job: Preparation) -> None:
    images = job.find("images", "lfw-deepfunneled", "lfw_funneled", "lfw", what="the folder of photographs")
    protocol = job.find("pairs.txt", what="the pairs of View 2")
    people = folders_in(images)
    job.count("people", len(people), 5_749)
    job.count("photographs", count_entries(people, "photographs"), 13_233)
    pairs = read_pairs(protocol)
    job.count("pairs", len(pairs), 6_000)
    job.count("folds", len(np.unique(pairs.folds)), 10)
    job.missing(missing_photographs(pairs, images), images, "photographs of pairs")
    for name, expected in MD5.items():
        job.md5(job.source / name, expected)
    job.place(images, "lfw/images")
    job.place(protocol, "lfw/pairs.txt")
    job.next_command = f"lrface verify --benchmark lfw --data {job.out} --model MODEL"


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
