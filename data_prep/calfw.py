"""Cross-Age LFW (CALFW): 6,000 pairs, those of one person with an age gap.

Source:    the authors' page ("Cross-Age LFW", T. Zheng, W. Deng and J. Hu, 2017; Beijing University of Posts and
           Telecommunications).
Licence:   unknown, see the authors' page.
Published: 3,000 same pairs (300 a fold, marked 1 to 10) and 3,000 different ones (marked 0), in pairs_CALFW.txt. No
           checksum is published.
Prepare:   unzip it, then python data_prep/calfw.py SRC [OUT]; SRC holds pairs_CALFW.txt (or calfw/pairs_CALFW.txt).
Checks:    counts, the pairs line by line, every photograph of a pair is there.
Places:    OUT/calfw/images, OUT/calfw/pairs_CALFW.txt, for `lrface verify --benchmark calfw`. The authors' own crops
           ("aligned images") are taken only where the photographs are missing: lrface aligns all benchmarks alike.
"""

import sys

import numpy as np

from lrface.benchmarks.lfw import missing_photographs
from lrface.benchmarks.protocols import read_protocol
from lrface.data.prepare import Preparation, image_files, main

FOLDERS = ("images&landmarks/images&landmarks/images", "images&landmarks/images", "images", "aligned images")


def prepare(job: Preparation) -> None:
    protocol = job.find("pairs_CALFW.txt", "calfw/pairs_CALFW.txt", what="the file of pairs")
    below = protocol.parent.relative_to(job.source)
    images = job.find(*(str(below / folder) for folder in FOLDERS), what="the folder of photographs")
    job.count("photographs", sum(1 for _ in image_files(images)))
    pairs = read_protocol(protocol)
    job.count("pairs", len(pairs), 6_000)
    job.count("same pairs", int(pairs.same.sum()), 3_000)
    job.count("folds", len(np.unique(pairs.folds)), 10)
    job.missing(missing_photographs(pairs, images), images, "photographs of pairs")
    job.place(images, "calfw/images")
    job.place(protocol, "calfw/pairs_CALFW.txt")
    job.next_command = f"lrface verify --benchmark calfw --data {job.out} --model MODEL"


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
