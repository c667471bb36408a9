"""Cross-Pose LFW (CPLFW): 6,000 pairs, those of one person with different poses.

Source:    the authors' page ("Cross-Pose LFW", T. Zheng and W. Deng, 2018; Beijing University of Posts and
           Telecommunications).
Licence:   unknown, see the authors' page.
Published: 11,652 photographs; 3,000 same and 3,000 different pairs in pairs_CPLFW.txt. No checksum is published.
Prepare:   unzip it, then python data_prep/cplfw.py SRC [OUT]; SRC holds pairs_CPLFW.txt (or cplfw/pairs_CPLFW.txt).
Checks:    counts, the pairs line by line, every photograph of a pair is there.
Places:    OUT/cplfw/images, OUT/cplfw/pairs_CPLFW.txt, for `lrface verify --benchmark cplfw`. The authors' own crops
           ("aligned images") are taken only where the photographs are missing: lrface aligns all benchmarks alike.
"""

import sys

import numpy as np

from lrface.benchmarks.lfw import missing_photographs
from lrface.benchmarks.protocols import read_protocol
from lrface.data.prepare import Preparation, image_files, main

FOLDERS = ("images&landmarks/images&landmarks/images", "images&landmarks/images", "images", "aligned images")


def prepare(job: Preparation) -> None:
    protocol = job.find("pairs_CPLFW.txt", "cplfw/pairs_CPLFW.txt", what="the file of pairs")
    below = protocol.parent.relative_to(job.source)
    images = job.find(*(str(below / folder) for folder in FOLDERS), what="the folder of photographs")
    job.count("photographs", sum(1 for _ in image_files(images)), 11_652)
    pairs = read_protocol(protocol)
    job.count("pairs", len(pairs), 6_000)
    job.count("same pairs", int(pairs.same.sum()), 3_000)
    job.count("folds", len(np.unique(pairs.folds)), 10)
    job.missing(missing_photographs(pairs, images), images, "photographs of pairs")
    job.place(images, "cplfw/images")
    job.place(protocol, "cplfw/pairs_CPLFW.txt")
    job.next_command = f"lrface verify --benchmark cplfw --data {job.out} --model MODEL"


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
