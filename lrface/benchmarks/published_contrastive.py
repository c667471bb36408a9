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
