"""AgeDB-30: 6,000 pairs of photographs 30 years apart, ten folds.

Source:    the authors (AgeDB, S. Moschoglou et al., CVPRW 2017; iBUG, Imperial College London), on request:
           03_Protocol_Images and 04_FINAL_protocol_30_years.mat.
Licence:   given out on request; see the authors' page for its terms.
Published: ten folds of 300 same and 300 different pairs. The whole of AgeDB has 16,488 photographs of 568 people,
           named ID_NAME_AGE_GENDER.jpg; the protocol names those of 03_Protocol_Images, which are called otherwise
           (ID_NAME_NUMBER_A_AGE.jpg). No checksum is published.
Prepare:   unpack it, then python data_prep/agedb30.py SRC [OUT]; SRC holds both.
Checks:    counts, every pair of the protocol, every photograph of a pair is there.
Places:    OUT/agedb30/03_Protocol_Images and the protocol, for `lrface verify --benchmark agedb30`.
"""

import sys

import numpy as np

from lrface.benchmarks.lfw import missing_photographs
from lrface.benchmarks.protocols import agedb_name, read_agedb
from lrface.data.prepare import Preparation, image_files, main

PROTOCOL = "04_FINAL_protocol_30_years.mat"
FOLDERS = ("03_Protocol_Images/03_Protocol_Images", "03_Protocol_Images", "AgeDB/03_Protocol_Images")
EVERYTHING = ("01_Images", "AgeDB", "images", ".")


def prepare(job: Preparation) -> None:
    protocol = job.find(PROTOCOL, f"AgeDB_protocols/{PROTOCOL}", f"AgeDB/{PROTOCOL}", what="the protocol")
    images = job.find(*FOLDERS, *EVERYTHING, what="the folder of photographs")
    names = [path.stem for path in image_files(images)]
    known = [name for name in map(agedb_name, names) if name is not None]
    if known:
        job.count("photographs named ID_NAME_AGE_GENDER", len(known), 16_488)
        job.count("people in them", len({number for number, *_ in known}), 568)
    job.count("photographs", len(names))
    pairs = read_agedb(protocol)
    job.count("pairs", len(pairs), 6_000)
    job.count("same pairs", int(pairs.same.sum()), 3_000)
    job.count("folds", len(np.unique(pairs.folds)), 10)
    job.missing(missing_photographs(pairs, images), images, "photographs of pairs")
    job.place(images, "agedb30/03_Protocol_Images")
    job.place(protocol, f"agedb30/{PROTOCOL}")
    job.next_command = f"lrface verify --benchmark agedb30 --data {job.out} --model MODEL"


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
