"""CIFAR-10-C: CIFAR-10's test images under 19 corruptions at five severities.

Source:    Zenodo record 2535967 (D. Hendrycks and T. Dietterich, ICLR 2019): CIFAR-10-C.tar.
Licence:   Creative Commons Attribution 4.0, as the Zenodo record says.
Published: 19 arrays uint8 [50000, 32, 32, 3] (10,000 images a severity, severities 1 to 5 in order) and labels.npy; MD5
           of CIFAR-10-C.tar 56bf5dcef84df0e2308c6dcbcbbd8499 (Zenodo); those of the files below, as torch-uncertainty
           checks them.
Prepare:   tar -xf CIFAR-10-C.tar, then python data_prep/cifar10_c.py SRC [OUT]; SRC holds the .npy files (or CIFAR-10-C/).
Checks:    every file is there, shapes and types (nothing is unpickled), labels 0 to 9; MD5 of all with --strict.
Places:    OUT/cifar10_c.
"""

import sys

import numpy as np

from lrface.data.prepare import Preparation, main

ARCHIVE_MD5 = "56bf5dcef84df0e2308c6dcbcbbd8499"
LABELS_MD5 = "c439b113295ed5254878798ffe28fd54"
MD5 = {
    "brightness": "0a81ef75e0b523c3383219c330a85d48",
    "contrast": "3c8262171c51307f916c30a3308235a8",
    "defocus_blur": "7d1322666342a0702b1957e92f6254bc",
    "elastic_transform": "9421657c6cd452429cf6ce96cc412b5f",
    "fog": "7b397314b5670f825465fbcd1f6e9ccd",
    "frost": "31f6ab3bce1d9934abfb0cc13656f141",
    "gaussian_blur": "c33370155bc9b055fb4a89113d3c559d",
    "gaussian_noise": "ecaf8b9a2399ffeda7680934c33405fd",
    "glass_blur": "7361fb4019269e02dbf6925f083e8629",
    "impulse_noise": "2090e01c83519ec51427e65116af6b1a",
    "jpeg_compression": "2b9cc4c864e0193bb64db8d7728f8187",
    "motion_blur": "fffa5f852ff7ad299cfe8a7643f090f4",
    "pixelate": "0f14f7e2db14288304e1de10df16832f",
    "saturate": "1cfae0964219c5102abbb883e538cc56",
    "shot_noise": "3a7239bb118894f013d9bf1984be7f11",
    "snow": "bb238de8555123da9c282dea23bd6e55",
    "spatter": "8a5a3903a7f8f65b59501a6093b4311e",
    "speckle_noise": "ef00b87611792b00df09c0b0237a1e30",
    "zoom_blur": "6ea8e63f1c5cdee1517533840641641b",
}


def prepare(job: Preparation) -> None:
    folder = job.find("labels.npy", "CIFAR-10-C/labels.npy", what="labels.npy").parent
    labels = job.array(folder / "labels.npy", (50_000,))
    if labels is not None and not np.isin(labels, range(10)).all():
        job.problem(f"{folder / 'labels.npy'}: labels are 0 to 9, found {labels.min()} to {labels.max()}")
    good = [
        name for name in MD5 if job.array(folder / f"{name}.npy", (50_000, 32, 32, 3), np.uint8) is not None
    ]
    job.count("corruptions", len(good), len(MD5))
    job.md5(job.source / "CIFAR-10-C.tar", ARCHIVE_MD5)
    job.md5(folder / "labels.npy", LABELS_MD5)
    for name in good:
        job.md5(folder / f"{name}.npy", MD5[name])
    job.place(folder, "cifar10_c")


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
