"""Figures that the QualNet paper prints, to stand beside measured ones.

Source: I. Kim et al., Quality-Agnostic Image Recognition via Invertible Decoder, CVPR 2021. Tables 4 and 5: LResNet50A-IR
trained on CASIA-WebFace. Tables 1, 2, 3, B.1 and C.3: ImageNet-1K, its validation set and ImageNet-C. Tables 6, C.1 and C.2:
ResNet-50 on 200 classes of them. Accuracies, rates and mCE in percent.
"""

SOURCE = "Kim et al., Quality-Agnostic Image Recognition via Invertible Decoder, CVPR 2021"

NAMES = {
    "specialised": "specialised network of each size",
    "naive": "naive augmentation",
    "qualnet_lm": "QualNet50-LM",
}

TABLE_4_BENCHMARKS = ("agedb30", "cfp_fp")
TABLE_4: dict[str, dict[int, tuple[float, float]]] = {
    "specialised": {112: (92.37, 95.71), 56: (91.25, 95.34), 28: (86.00, 92.67), 14: (74.20, 84.80)},
    "naive": {112: (90.32, 95.09), 56: (89.82, 94.99), 28: (85.85, 92.49), 14: (72.48, 84.64)},
    "qualnet_lm": {112: (92.22, 96.24), 56: (91.27, 95.81), 28: (87.05, 93.03), 14: (73.20, 84.51)},
}
"""Verification accuracy by size of both images: AgeDB-30, CFP-FP. Each specialised network was trained and tested at one
size."""

TABLE_5: dict[str, dict[int, float]] = {
    "specialised": {1: 24.46, 5: 32.64, 10: 36.48},
    "naive": {1: 32.97, 5: 40.91, 10: 44.31},
    "qualnet_lm": {1: 35.54, 5: 44.45, 10: 47.42},
}
"""TinyFace: rank -> share of probes. The specialised network is that of 112 x 112 pixels. The paper names neither its
alignment nor its metric."""

TABLE_1: dict[str, tuple[float, float]] = {
    "naive": (74.88, 52.35),
    "kd": (73.92, 56.73),
    "fitnet": (74.75, 52.73),
    "pkt": (75.29, 53.33),
    "vid": (74.85, 51.29),
    "sp": (74.93, 53.34),
    "qualnet": (75.30, 50.60),
}
"""ResNet-50: clean accuracy, mCE."""

TABLE_2: dict[str, dict[str, tuple[float, float]]] = {
    "resnet18": {
        "vanilla": (70.33, 87.10),
        "naive": (67.88, 63.66),
        "qualnet": (68.42, 61.66),
        "qualnet_finetuned": (69.91, 60.31),
    },
    "resnet50": {
        "vanilla": (76.28, 78.20),
        "naive": (74.88, 52.35),
        "qualnet": (75.30, 50.60),
        "qualnet_finetuned": (76.74, 51.33),
    },
    "resnext101_32x8d": {"vanilla": (79.64, 69.84), "naive": (79.55, 43.38), "qualnet": (79.84, 42.50)},
}
"""Clean accuracy, mCE by network."""

TABLE_3_CORRUPTIONS = ("spatter", "saturate", "speckle_noise", "gaussian_blur")
TABLE_3: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "resnext101_32x8d": {
        "vanilla": (58.11, 65.92, 44.88, 44.75),
        "naive": (61.28, 68.15, 63.13, 55.73),
        "qualnet": (62.48, 69.19, 64.21, 57.24),
    },
    "resnet50": {
        "augmix": (53.27, 61.48, 50.61, 47.22),
        "ant": (52.41, 61.30, 58.15, 43.10),
        "qualnet": (54.04, 62.28, 63.13, 50.54),
    },
}
"""Accuracy on corruptions that training had not seen, in the order of TABLE_3_CORRUPTIONS."""

TABLE_6: dict[str, tuple[float, float]] = {
    "naive": (80.45, 70.82),
    "end_to_end": (78.68, 69.91),
    "two_stages": (81.81, 71.64),
    "qualnet": (82.33, 72.30),
}
"""Clean accuracy, mean accuracy on the 15 corruptions; lambda 0.6."""

TABLE_B1_COLUMNS = (
    "clean",
    "average",
    "motion_blur",
    "glass_blur",
    "zoom_blur",
    "defocus_blur",
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
    "snow",
    "frost",
    "fog",
    "brightness",
)
TABLE_B1: dict[str, tuple[float, ...]] = {
    "vanilla": (
        *(79.64, 44.64, 44.59, 28.29, 42.17, 42.87, 39.12, 36.61, 34.80),
        *(41.97, 48.64, 53.98, 59.68, 36.49, 41.82, 48.87, 69.66),
    ),
    "naive": (
        *(79.54, 65.93, 68.86, 56.21, 69.32, 59.88, 60.05, 59.39, 60.09),
        *(66.08, 69.47, 71.82, 68.16, 69.08, 66.29, 69.42, 74.90),
    ),
    "qualnet": (
        *(79.84, 66.62, 69.65, 58.61, 69.93, 60.21, 61.18, 60.06, 60.92),
        *(67.41, 70.23, 72.62, 68.18, 68.38, 66.63, 69.62, 75.71),
    ),
}
"""ResNeXt-101 32x8d: accuracies in the order of TABLE_B1_COLUMNS, means over five severities."""

TABLE_C1: dict[str, tuple[float, float]] = {
    "l1": (82.33, 72.30),
    "l2": (81.05, 71.32),
    "likelihood": (81.28, 71.37),
    "adversarial": (81.26, 71.87),
    "perceptual": (80.61, 70.57),
}
"""Clean accuracy, mean accuracy on the 15 corruptions, by quality loss."""

TABLE_C2: dict[float, tuple[float, float]] = {
    0.0: (80.45, 70.82),
    0.2: (82.33, 71.96),
    0.4: (82.37, 72.17),
    0.6: (82.33, 72.30),
    0.8: (81.83, 71.78),
    1.0: (81.44, 71.80),
}
"""Clean accuracy, mean accuracy on the 15 corruptions, by lambda; 0 is naive augmentation."""

TABLE_C3: dict[int, float] = {0: 52.35, 45: 52.86, 78: 52.86, 150: 52.40, 300: 50.60, 450: 49.48}
"""mCE by layers of the i-RevNet whose inverse is the decoder; 0 is naive augmentation. ImageNet-1K."""

# ------------------------------------------------------------------------------------------------ noise training

NOISE_SOURCE = (
    "Rusak et al., A simple way to make neural networks robust against diverse image corruptions, 2020"
)
"""ResNet-50 tuned on ImageNet, where nothing else is said; accuracies in percent."""

NOISE_TABLE_3: dict[str, tuple[float, float, float, float]] = {
    "vanilla": (76.1, 39.0, 39.1, 15.7),
    "gnt": (75.9, 74.8, 74.9, 31.8),
    "ant1x1": (76.0, 136.7, 137.0, 95.4),
}
"""Clean accuracy; median perturbation size for Gaussian, uniform and adversarial noise (the mean of four generators, whose
deviations are 0.6, 3.9 and 5.7). Table 2 is the first row with 16.2 for adversarial noise."""

NOISE_TABLE_2_ADVERSARIAL = 16.2

NOISE_TABLE_4: dict[str, tuple[float, float, float, float, float]] = {
    "vanilla": (76.1, 39.2, 59.3, 42.3, 63.2),
    "gnt_set": (76.1, 49.2, 70.2, 45.2, 66.2),
    "gnt": (75.9, 49.4, 70.6, 47.1, 68.3),
    "ant1x1": (76.0, 51.1, 72.2, 47.7, 68.8),
    "ant1x1_stylised": (74.9, 52.2, 73.6, 49.2, 70.6),
    "ant1x1_without_replay": (75.7, 48.9, 70.2, 46.5, 67.7),
    "ant3x3": (76.1, 50.4, 71.5, 47.0, 68.1),
    "ant3x3_stylised": (74.1, 52.6, 74.4, 50.6, 72.5),
}
"""Clean accuracy; top-1 and top-5 on ImageNet-C; top-1 and top-5 without its noise corruptions."""

NOISE_SPECKLE_TOP1 = 46.4
"""Speckle noise training on ImageNet-C (section 4.5); Table 4 as printed has no row of it."""

NOISE_TABLE_5: dict[str, tuple[float, float, float]] = {
    "vanilla": (75.2, 41.1, 18.1),
    "gnt": (75.3, 49.0, 28.1),
    "ant1x1": (75.7, 50.1, 28.6),
}
"""Clean accuracy; under DDN (L2 0.12 in the caption, 0.125 in appendix F) and PGD (maximum norm 0.001)."""

NOISE_TABLE_11: dict[str, tuple[float, ...]] = {
    "vanilla": (99.1, 86.9, 98, 96, 96, 94, 98, 95, 92, 88, 57, 88, 50, 97, 96, 86, 72),
    "gnt": (99.3, 92.4, 99, 99, 98, 97, 98, 95, 93, 98, 56, 91, 91, 99, 99, 96, 78),
    "ant1x1": (99.4, 92.4, 99, 99, 98, 97, 98, 95, 93, 98, 55, 89, 91, 99, 99, 96, 80),
}
"""MNIST: clean accuracy, mean on MNIST-C, then its 15 corruptions in the order of :data:`NOISE_TABLE_11_CORRUPTIONS`."""

NOISE_TABLE_11_CORRUPTIONS = (
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "shear",
    "scale",
    "rotate",
    "brightness",
    "translate",
    "stripe",
    "fog",
    "spatter",
    "dotted_line",
    "zigzag",
    "canny_edges",
)

NOISE_TABLE_12: dict[str, tuple[float, float, float]] = {
    "vanilla": (99.1, 73.2, 55.8),
    "gnt": (99.3, 89.2, 73.6),
    "ant1x1": (99.4, 90.4, 76.3),
}
"""MNIST: clean accuracy; under DDN (L2 1.5) and PGD (maximum norm 0.1)."""

NOISE_TABLE_15: dict[str, tuple[float, float, float, float, float]] = {
    "vanilla": (76.1, 39.2, 59.3, 42.3, 63.2),
    "ant1x1": (76.0, 51.1, 72.2, 47.7, 68.8),
    "vanilla_other": (74.4, 42.1, 63.4, 44.0, 65.5),
    "ant1x1_other": (74.3, 50.3, 71.6, 46.8, 68.3),
}
"""As Table 4; the other network is DenseNet-121."""

NOISE_TABLE_16: dict[str, tuple[float, float, float]] = {
    "vanilla": (76.1, 39.2, 42.3),
    "ant1x1_depth1": (75.1, 49.5, 46.6),
    "ant1x1_depth2": (75.5, 50.8, 47.2),
    "ant1x1_depth3": (75.3, 50.7, 47.2),
    "ant1x1": (76.0, 51.1, 47.7),
    "ant1x1_depth5": (74.0, 50.7, 47.0),
}
"""Clean accuracy, ImageNet-C, ImageNet-C without noise, by the generator's depth (4 is the standard)."""
