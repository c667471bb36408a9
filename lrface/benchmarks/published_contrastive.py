"""Figures that the paper on contrastive inversion prints, to stand beside measured ones.

Source: S. Ravula et al., Inverse Problems Leveraging Pre-trained Contrastive Representations, NeurIPS 2021 (paper
002): CLIP's ResNet-101, ImageNet-100, means over 10 draws of the degraded validation images. Accuracies in percent.
"""

SOURCE = "Ravula et al., Inverse Problems Leveraging Pre-trained Contrastive Representations, NeurIPS 2021"

OPERATORS = ("mask50", "mask75", "mask90", "noise10", "noise30", "noise50", "blur21", "blur37")
"""Missing pixels 50, 75, 90 %; noise of deviation 0.1, 0.3, 0.5; blur (21, 5), (37, 9): the order of what follows."""

TABLE_1 = {
    "supervised": (77.53, 75.68, 74.12, 82.23, 75.78, 71.43, 76.40, 68.94),
    "contrastive": (85.87, 83.99, 82.96, 84.46, 81.30, 76.23, 83.24, 77.80),
    "contrastive, 10 % of the labels": (82.19, 80.36, 79.87, 80.99, 78.16, 73.14, 80.94, 74.84),
}
TABLE_4 = {
    "supervised": (93.86, 93.19, 92.12, 95.49, 93.00, 90.45, 93.38, 89.42),
    "contrastive": (97.60, 96.83, 96.34, 97.39, 95.59, 93.18, 96.34, 93.94),
    "contrastive, 10 % of the labels": (96.57, 95.53, 95.20, 96.11, 93.95, 91.14, 95.26, 91.88),
}
"""As Table 1, top-5."""

TABLE_7 = (73.49, 56.47, 27.64)
"""Non-Local Means, then a classifier of clean images; noise of deviation 0.1, 0.3, 0.5."""
TABLE_8 = (23.38, 21.89, 20.39)
"""Deep Decoder, then a classifier of clean images; 50, 75, 90 % of the pixels missing."""
TABLE_9 = (80.1, 76.4, 78.1, 77.2, 75.7, 70.5, 78.3, 73.1)
"""The linear classifier of the clean teacher on the student."""
TABLE_13 = (41.30, 24.00, 14.50, 75.20, 25.10, 7.70, 51.20, 22.30)
"""The untouched teacher, its classifier fitted to degraded images."""

TABLE_2: dict[str, dict[str, float]] = {
    "supervised-mask_range": {
        "cifar10": 79.83,
        "cifar100": 55.10,
        "stl10": 81.09,
        "imagenet100b": 67.45,
        "covid": 82.07,
    },
    "contrastive-mask_range": {
        "cifar10": 80.93,
        "cifar100": 58.55,
        "stl10": 89.44,
        "imagenet100b": 80.09,
        "covid": 84.01,
    },
    "supervised-noise_range": {
        "cifar10": 76.52,
        "cifar100": 52.00,
        "stl10": 82.28,
        "imagenet100b": 69.49,
        "covid": 83.54,
    },
    "contrastive-noise_range": {
        "cifar10": 76.19,
        "cifar100": 52.51,
        "stl10": 86.30,
        "imagenet100b": 78.66,
        "covid": 79.74,
    },
}
"""Transfer of networks trained with 50 to 95 % of the pixels missing, and with noise of deviation 0.1 to 0.3."""
TABLE_5: dict[str, dict[str, float]] = {
    "supervised-mask_range": {"cifar10": 98.92, "cifar100": 84.09, "stl10": 99.38, "imagenet100b": 88.35},
    "contrastive-mask_range": {"cifar10": 99.23, "cifar100": 86.26, "stl10": 99.72, "imagenet100b": 95.40},
    "supervised-noise_range": {"cifar10": 98.76, "cifar100": 81.37, "stl10": 99.41, "imagenet100b": 89.81},
    "contrastive-noise_range": {"cifar10": 98.72, "cifar100": 81.50, "stl10": 99.48, "imagenet100b": 94.74},
}
"""As Table 2, top-5."""
TABLE_6: dict[str, dict[str, float]] = {
    "supervised-mask_range": {"covid": 0.918},
    "contrastive-mask_range": {"covid": 0.918},
    "supervised-noise_range": {"covid": 0.927},
    "contrastive-noise_range": {"covid": 0.896},
}
"""As Table 2, area under the ROC curve: X-rays of healthy lungs against those with pneumonia."""

TABLE_12 = {
    "pixel_mask": {0.96: 56.80, 0.97: 39.28, 0.98: 11.01, 0.99: 2.03},
    "gaussian_noise": {0.35: 72.34, 0.4: 69.10, 0.45: 65.62, 0.5: 61.13},
}
"""The end-to-end baseline of Figure 4, whose students are in the picture alone."""

TABLE_14: dict[str, tuple[float, float]] = {
    "defocus_blur": (61.76, 56.88),
    "glass_blur": (49.15, 50.52),
    "motion_blur": (59.38, 44.37),
    "zoom_blur": (59.00, 50.69),
    "contrast": (58.61, 43.69),
    "elastic_transform": (67.85, 60.40),
    "jpeg_compression": (77.75, 61.08),
    "pixelate": (73.06, 75.65),
    "gaussian_noise": (55.83, 56.81),
    "impulse_noise": (51.05, 54.11),
    "shot_noise": (53.76, 56.74),
    "brightness": (86.01, 72.57),
    "fog": (67.56, 54.20),
    "frost": (59.58, 51.70),
    "snow": (53.97, 39.80),
    "gaussian_blur": (64.31, 62.66),
    "saturate": (82.16, 65.95),
    "spatter": (71.9, 59.52),
    "speckle_noise": (62.65, 66.28),
}
"""ImageNet-100-C: a classifier of clean images, and a student of blur and noise; means over the five severities."""
