"""TinyFace: identification of faces that are small by themselves, against 153,428 distractors.

Source:    the authors' page ("Low-Resolution Face Recognition", Z. Cheng, X. Zhu and S. Gong, ACCV 2018; QMUL-TinyFace,
           Queen Mary University of London): tinyface.zip.
Licence:   unknown, see the authors' page.
Published: Testing_Set 3,728 probes, 4,443 gallery images and 153,428 distractors; Training_Set 7,804 images of 2,570
           people; 169,403 images in all. No checksum is published by the authors.
Prepare:   unzip it, then python data_prep/tinyface.py SRC [OUT]; SRC holds Testing_Set (or tinyface/Testing_Set).
Checks:    both MATLAB lists, every image that they name is there, every probe has somebody in the gallery, counts.
Places:    OUT/tinyface/Testing_Set and, where there is one, OUT/tinyface/Training_Set (identity folders).
"""

import sys

from lrface.benchmarks.tinyface import OFFICIAL_COUNTS, read_tinyface
from lrface.data.prepare import Preparation, count_entries, folders_in, main


def prepare(job: Preparation) -> None:
    testing = job.find("Testing_Set", "tinyface/Testing_Set", what="the folder Testing_Set")
    found = read_tinyface(testing)
    for part, count in found.counts().items():
        job.count(f"images in {part}", count, OFFICIAL_COUNTS[part])
    job.count("images of Probe and Gallery_Match in no list", found.unlisted, 0)
    job.count("probes of nobody in the gallery", found.unmatched, 0)
    job.place(testing, "tinyface/Testing_Set")
    training = testing.parent / "Training_Set"
    if training.is_dir():
        people = folders_in(training)
        job.count("people in Training_Set", len(people), 2_570)
        job.count("images in Training_Set", count_entries(people, "Training_Set"), 7_804)
        job.place(training, "tinyface/Training_Set")


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
