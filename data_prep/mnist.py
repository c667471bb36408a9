"""MNIST: 70,000 handwritten digits of 28 x 28 grey pixels.

Source:    the authors' page (Y. LeCun, C. Cortes, C. Burges) or one of its mirrors: train-images-idx3-ubyte.gz,
           train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz.
Licence:   unknown, see the authors' page (mirrors say CC BY-SA 3.0).
Published: 60,000 images for training, 10,000 for testing, labels 0 to 9; MD5 of the four files below, as torchvision
           checks them.
Prepare:   python data_prep/mnist.py SRC [OUT]; SRC holds the four files, gzipped or not.
Checks:    counts, sizes, labels; MD5 of the gzipped files.
Places:    OUT/mnist/train and OUT/mnist/test, which the recipes mnist/* and `lrface perturbation` read.
"""

import sys

import numpy as np

from lrface.data.idx import read_idx
from lrface.data.prepare import Preparation, main

MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}


def prepare(job: Preparation) -> None:
    for split, folder, expected in (("train", "train", 60_000), ("t10k", "test", 10_000)):
        counts = []
        for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
            name = f"{split}-{kind}-ubyte"
            file = job.find(f"{name}.gz", name, what=name)
            found = read_idx(file, dimensions)
            counts.append(len(found))
            if dimensions == 3 and found.shape[1:] != (28, 28):
                job.problem(
                    f"{file}: images have {found.shape[1]} x {found.shape[2]} pixels, MNIST's 28 x 28"
                )
            if dimensions == 1 and not np.isin(found, range(10)).all():
                job.problem(f"{file}: labels are 0 to 9, found up to {found.max()}")
            job.md5(job.source / f"{name}.gz", MD5[name])
            job.place(file, f"mnist/{folder}/{file.name}")
        job.count(f"images of {folder}", counts[0], expected)
        if counts[0] != counts[1]:
            job.problem(f"{split}: {counts[0]} images and {counts[1]} labels")
    job.next_command = f"lrface train mnist/clean --data {job.out}"


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
