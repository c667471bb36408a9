"""CASIA-WebFace, the photographs: 494,414 of 10,575 people, for training.

Source:    its authors (D. Yi et al., "Learning Face Representation from Scratch", 2014; Institute of Automation,
           Chinese Academy of Sciences). InsightFace's faces_webface_112x112, already aligned, needs no script:
           lrface reads its train.rec.
Licence:   was given out on a signed agreement for research; ask the authors for its terms.
Published: 494,414 images of 10,575 people. No checksum is published.
Prepare:   unpack it, then python data_prep/casia_webface.py SRC [OUT]; SRC holds the folders 0000045/ ... of people (or
           CASIA-WebFace/ that does). Then align it with the command that the script prints.
Checks:    counts, people without an image, files beside the folders.
Places:    OUT/casia_webface/photographs.
"""

import sys

from lrface.data.prepare import Preparation, count_entries, folders_in, image_files, main


def prepare(job: Preparation) -> None:
    nested = job.source / "CASIA-WebFace"
    photographs = nested if nested.is_dir() else job.source
    people = folders_in(photographs)
    job.count("people", len(people), 10_575)
    job.count("images", count_entries(people, "photographs", total=len(people)), 494_414)
    empty = [folder.name for folder in people if next(image_files(folder), None) is None]
    job.count("people without an image", len(empty), 0)
    job.count("images outside of a person's folder", sum(1 for _ in image_files(photographs)), 0)
    if len(people) == len(empty):
        job.problem(f"{photographs}: no image in any folder; {photographs}/0000045/001.jpg is expected")
    job.place(photographs, "casia_webface/photographs")
    job.next_command = f"lrface align {job.out}/casia_webface/photographs {job.out}/casia_webface/aligned"


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
