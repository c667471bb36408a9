"""ImageNet-C: ImageNet's validation images under 15 corruptions (and 4 extra ones) at five severities.

Source:    Zenodo record 2235448 (D. Hendrycks and T. Dietterich, ICLR 2019): blur.tar, digital.tar, noise.tar,
           weather.tar, extra.tar.
Licence:   see the Zenodo record; the photographs are ImageNet's, whose terms allow non-commercial research only.
Published: CORRUPTION/SEVERITY/WNID/*.JPEG, 50,000 images of 1,000 classes each; MD5 of the archives as below.
Prepare:   tar -xf each of them, then python data_prep/imagenet_c.py SRC [OUT]; SRC holds gaussian_noise/ ... (or noise/,
           blur/ ... that do).
Checks:    counts of classes and images for every corruption and severity; MD5 of archives that lie in SRC with --strict.
Places:    OUT/imagenet_c/CORRUPTION.
"""

import sys

from lrface.data.prepare import Preparation, count_entries, folders_in, main

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
MD5 = {
    "blur": "2d8e81fdd8e07fef67b9334fa635e45c",
    "digital": "89157860d7b10d5797849337ca2e5c03",
    "extra": "d492dfba5fc162d8ec2c3cd8ee672984",
    "noise": "e80562d7f6c3f8834afb1ecf27252745",
    "weather": "33ffea4db4d93fe4a428c40a6ce0c25d",
}


def prepare(job: Preparation) -> None:
    main_corruptions = 0
    for group, corruptions in GROUPS.items():
        for corruption in corruptions:
            places = [job.source / corruption, job.source / group / corruption]
            folder = next((place for place in places if place.is_dir()), None)
            if folder is None:
                continue
            main_corruptions += group != "extra"
            for severity in range(1, 6):
                classes = folders_in(folder / str(severity))
                job.count(f"classes in {corruption}/{severity}", len(classes), 1_000)
                images = count_entries(classes, f"{corruption}/{severity}", total=len(classes))
                job.count(f"images in {corruption}/{severity}", images, 50_000)
            job.place(folder, f"imagenet_c/{corruption}")
        job.md5(job.source / f"{group}.tar", MD5[group])
    job.count("corruptions of 15", main_corruptions, 15)
    if not main_corruptions:
        job.problem(f"{job.source}: no corruption found; gaussian_noise/1/n01440764/*.JPEG is expected")


if __name__ == "__main__":
    sys.exit(main(__doc__, prepare))
