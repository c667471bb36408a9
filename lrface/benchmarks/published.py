"""Figures that the QualNet paper prints, to stand beside measured ones.

Source: I. Kim et al., Quality-Agnostic Image Recognition via Invertible Decoder, CVPR 2021, Tables 4 and 5: LResNet50A-IR
trained on CASIA-WebFace. Accuracies and rates in percent.
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
