"""Figures that the AdA paper prints, to stand beside measured ones.

Source: D. Calian et al., Defending Against Image Corruptions Through Adversarial Augmentations, ICLR 2022 (paper 003): a
pre-activation ResNet-50 trained on CIFAR-10 for 300 epochs. Errors and accuracies in percent. What the paper calls mCE is
the mean error over corruptions and severities, nothing divided by AlexNet's: ``mean_error`` of `lrface robustness`.
"""

SOURCE = "Calian et al., Defending Against Image Corruptions Through Adversarial Augmentations, ICLR 2022"

NAMES = {
    "nominal": "nominal",
    "augmix": "AugMix",
    "deepaugment": "DeepAugment",
    "deepaugment_augmix": "DeepAugment + AugMix",
    "deepaugment10": "DeepAugment (10x)",
    "deepaugment10_augmix": "DeepAugment (10x) + AugMix",
    "ada": "AdA",
    "ada_augmix": "AdA + AugMix",
    "ada_deepaugment_augmix": "AdA + DeepAugment + AugMix",
    "ada_deepaugment10_augmix": "AdA + DeepAugment (10x) + AugMix",
}

TABLE_1_CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
)
TABLE_1: dict[str, tuple[float, tuple[float, ...]]] = {
    "ada_deepaugment10_augmix": (7.83, (8.3, 7.8, 11.2, 5.3, 10.3, 7.3, 6.3, 8.5, 6.7, 8.7, 5.3, 6.2)),
    "ada_deepaugment_augmix": (8.58, (9.3, 8.7, 12.4, 6.1, 11.6, 8.9, 6.8, 9.4, 7.3, 8.8, 5.1, 6.6)),
    "ada_augmix": (8.80, (16.4, 12.3, 14.4, 5.7, 10.8, 7.3, 6.3, 7.7, 6.7, 6.8, 3.3, 4.7)),
    "ada": (12.49, (25.8, 19.8, 29.9, 9.3, 15.8, 10.9, 9.8, 9.3, 8.1, 8.8, 4.1, 11.0)),
    "deepaugment": (11.67, (12.1, 10.2, 15.2, 7.1, 20.3, 12.2, 8.4, 12.3, 9.8, 9.3, 6.7, 13.1)),
    "deepaugment_augmix": (10.15, (10.9, 9.4, 10.8, 7.0, 18.2, 10.4, 7.7, 10.6, 8.7, 9.3, 6.3, 8.6)),
    "deepaugment10": (8.30, (9.0, 7.6, 11.5, 5.4, 14.0, 7.9, 6.1, 8.6, 6.6, 7.1, 5.0, 7.3)),
    "deepaugment10_augmix": (8.11, (8.4, 7.7, 8.6, 5.7, 14.4, 7.9, 6.2, 8.4, 6.7, 7.3, 5.1, 6.5)),
    "augmix": (13.13, (26.2, 18.3, 10.6, 7.2, 32.8, 10.4, 9.0, 10.3, 10.1, 6.3, 4.7, 6.3)),
    "nominal": (25.17, (58.3, 44.6, 49.1, 15.4, 44.7, 19.7, 19.4, 15.6, 17.9, 10.0, 5.3, 17.2)),
}
"""mCE, and errors by corruption in the order of TABLE_1_CORRUPTIONS, means over the severities.

The copy of the table at hand has twelve numbers a row under twelve headings, zoom blur not among them. Beside Table 3, which
has all fifteen of two of its rows, they are the first twelve in the benchmark's order: elastic transform, pixelate and JPEG
are the ones that are missing."""

TABLE_2_COLUMNS = ("clean", "cifar10_1", "l2 0.5", "l2 1", "linf 1/255", "linf 2/255", "linf 4/255")
TABLE_2: dict[str, tuple[float, ...]] = {
    "ada_deepaugment10_augmix": (94.93, 87.35, 18.63, 0.99, 77.72, 49.95, 13.88),
    "ada_deepaugment_augmix": (94.72, 88.20, 13.25, 0.30, 75.23, 44.78, 9.68),
    "ada_augmix": (96.26, 91.05, 2.26, 0.00, 68.32, 26.45, 0.99),
    "ada": (96.18, 90.50, 8.61, 0.03, 77.78, 44.39, 5.89),
    "deepaugment": (94.27, 87.10, 0.55, 0.00, 55.18, 14.43, 0.28),
    "deepaugment_augmix": (94.25, 87.60, 0.56, 0.00, 49.63, 12.86, 0.15),
    "deepaugment10": (95.57, 88.75, 1.56, 0.00, 64.72, 21.35, 0.70),
    "deepaugment10_augmix": (95.21, 89.35, 1.16, 0.00, 55.58, 17.07, 0.49),
    "augmix": (96.05, 90.40, 0.00, 0.00, 28.48, 1.53, 0.00),
    "nominal": (95.77, 89.65, 0.00, 0.00, 24.23, 0.85, 0.00),
}
"""Accuracies in the order of TABLE_2_COLUMNS: clean, CIFAR-10.1, then under AutoAttack and MultiTargeted."""

TABLE_3_CORRUPTIONS = (*TABLE_1_CORRUPTIONS, "elastic_transform", "pixelate", "jpeg_compression")
TABLE_3: dict[str, tuple[float, float, tuple[float, ...]]] = {
    "pat_nominal": (
        *(5.20, 25.80),
        (54.0, 42.3, 38.8, 16.3, 50.9, 21.9, 21.1, 18.3, 24.0, 10.3, 6.1, 16.0, 17.6, 28.2, 20.7),
    ),
    "adversarial_linf": (
        *(13.20, 20.71),
        (18.3, 17.0, 22.5, 16.9, 19.8, 20.4, 17.5, 17.0, 18.2, 32.9, 13.7, 47.9, 18.1, 15.0, 15.3),
    ),
    "adversarial_l2": (
        *(15.00, 21.83),
        (18.4, 17.5, 21.4, 18.3, 20.2, 21.0, 18.7, 19.2, 20.5, 35.9, 16.0, 47.1, 20.0, 16.6, 16.5),
    ),
    "pat_self": (
        *(17.60, 23.54),
        (22.5, 21.1, 25.7, 20.0, 22.5, 22.3, 20.3, 23.7, 23.6, 33.3, 19.8, 38.8, 21.1, 18.7, 19.1),
    ),
    "pat_alexnet": (
        *(28.40, 34.25),
        (33.2, 31.9, 36.3, 30.9, 34.3, 33.0, 32.0, 33.9, 35.0, 43.7, 30.3, 46.3, 32.6, 29.9, 29.8),
    ),
    "ada": (
        *(3.82, 12.49),
        (25.8, 19.8, 29.9, 9.3, 15.6, 10.9, 9.6, 9.3, 8.1, 8.8, 4.3, 11.0, 9.3, 6.7, 9.2),
    ),
    "ada_deepaugment10_augmix": (
        *(5.07, 7.83),
        (8.8, 7.8, 11.2, 5.9, 10.7, 7.3, 6.5, 8.5, 6.7, 8.7, 5.2, 6.2, 8.5, 7.7, 7.8),
    ),
}
"""Clean error, mCE, errors by corruption in the order of TABLE_3_CORRUPTIONS. The first five are models of Laidlaw et al.,
"Perceptual Adversarial Robustness", ICLR 2021; their headings "salt" and "pepper" in the copy at hand are shot and impulse
noise."""

TABLE_3_NAMES = {
    "pat_nominal": "nominal (Laidlaw et al.)",
    "adversarial_linf": "adversarial training, linf (Laidlaw et al.)",
    "adversarial_l2": "adversarial training, l2 (Laidlaw et al.)",
    "pat_self": "PAT-self (Laidlaw et al.)",
    "pat_alexnet": "PAT-AlexNet (Laidlaw et al.)",
    "ada": "AdA",
    "ada_deepaugment10_augmix": "AdA + DeepAugment (10x) + AugMix",
}
