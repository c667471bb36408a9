"""Fits and tests the estimator of effective resolution (lrface/embed/resolution.py).

    LRFACE_BENCH_LFW=PACKED python eval/fit_resolution.py --data DATA          # the table of errors
    LRFACE_BENCH_LFW=PACKED python eval/fit_resolution.py --data DATA --fit    # fits first: lrface's constants change

Faces are aligned LFW (a folder that `lrface align` made) and celeba300_112. People are split: two thirds to fit, one
third to test; sharp photographs of other things (imagenet_sample) and drawn faces join the fit. An image is shrunk and
enlarged by lrface's own kernels, in a quarter of the cases turned and zoomed afterwards as alignment does, then left in
floating point, rounded, made noisy or compressed. Some minutes on one core.
"""

import argparse
import base64
import os
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from lrface.data.packed import PackedSource
from lrface.data.synthetic import draw_face
from lrface.degrade.resolution import resample
from lrface.embed.resolution import CANDIDATES, MEASURES, SIDE, effective_resolutions, measures
from lrface.errors import UsageError, errors_for_users
from lrface.files import write_json, write_text
from lrface.recipes import find_data
from lrface.study import about_the_run

ROOT = Path(__file__).resolve().parents[1]
CONSTANTS = ROOT / "lrface" / "embed" / "resolution_constants.py"
RESULTS = ROOT / "eval" / "results" / "effective_resolution.json"
SIZES = (10, 14, 20, 28, 40, 56, 80, 96, 112)
CHOSEN = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 112)
DOWN, UP = ("nearest", "area"), ("nearest", "bilinear", "bicubic")
HIDDEN = 48
# Seed, groups of eight images degraded alike, and whether others than faces are among them.
DRAWS = ((20, 4000, False), (31, 2000, True), (32, 2000, True))
STEPS, RATE = 3200, 1e-2


def faces(lfw: Path, celeba: Path, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Green float32 [n, 112, 112] in 0 to 255 of people to fit on and of others to test on."""
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    packed = PackedSource(lfw)
    for index in np.linspace(0, len(packed) - 1, each).astype(int):
        parts[int(packed.labels[index]) % 3 == 0].append(packed.image(int(index))[:, :, 1])
    folders = sorted(path for path in celeba.iterdir() if path.is_dir())
    for number, folder in enumerate(folders):
        for path in sorted(folder.iterdir())[: -(-each // len(folders))]:
            parts[number % 3 == 0].append(cv2.imread(str(path))[:, :, 1])
    return np.array(parts[0], np.float32), np.array(parts[1], np.float32)


def degraded(grey: np.ndarray, size: int, down: str, up: str) -> np.ndarray:
    """Grey [n, 112, 112] in 0 to 255, shrunk to ``size`` and enlarged again."""
    return (resample(torch.from_numpy(grey)[:, None] / 255, size, down, up)[:, 0] * 255).numpy()


def turned(grey: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """The images turned and zoomed as alignment does, and by how much they are larger."""
    angle, zoom = generator.uniform(-25, 25), float(np.exp(generator.uniform(-0.25, 0.25)))
    shift = generator.uniform(-0.5, 0.5, 2)
    matrix = cv2.getRotationMatrix2D((55.5, 55.5), angle, zoom)
    matrix[:, 2] += shift
    out = [
        cv2.warpAffine(each, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        for each in grey
    ]
    return np.array(out), zoom


def finished(grey: np.ndarray, finish: str, generator: np.random.Generator) -> np.ndarray:
    """``float``, ``uint8``, ``noise`` with a standard deviation of 1 to 6 levels, or ``jpeg`` of quality 50 to 95."""
    if finish == "float":
        return grey
    if finish == "noise":
        grey = grey + generator.normal(0, generator.uniform(1, 6), grey.shape)
    levels = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    if finish == "jpeg":
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(generator.integers(50, 96))]
        levels = np.array([cv2.imdecode(cv2.imencode(".jpg", each, quality)[1], 0) for each in levels])
    return levels.astype(np.float32)


def others(photographs: Path, each: int) -> np.ndarray:
    """Sharp pictures, so that detail which faces of LFW lack is not taken for a trace: green float32 [n, 112, 112] of
    procedural faces and of photographs with a short side of 256 pixels, shrunk."""
    pictures = [draw_face(7, identity, 0)[:, :, 1] for identity in range(each // 3)]
    for path in sorted(photographs.glob("*.jpg"))[:each]:
        image = cv2.imread(str(path))[:, :, 1]
        top, left = (image.shape[0] - 224) // 2, (image.shape[1] - 224) // 2
        square = image[max(top, 0) :, max(left, 0) :][:224, :224]
        pictures.append(cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
    return np.array(pictures, np.float32)


def textured(grey: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """With grain or sharpened, as cameras do before anything is shrunk."""
    if generator.random() < 0.5:
        return np.clip(grey + generator.normal(0, generator.uniform(3, 30), grey.shape), 0, 255).astype(
            np.float32
        )
    strength = generator.uniform(0.5, 2)
    soft = np.array([cv2.GaussianBlur(each, (0, 0), 1.0) for each in grey])
    return np.clip(grey + strength * (grey - soft), 0, 255)


def drawn(
    grey: np.ndarray, groups: int, seed: int, more: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Measures [n, 113] of images degraded in ways drawn from ``seed``, and log2 of their true resolutions; with ``more``
    half of the groups are taken from there, and half are textured."""
    generator = np.random.default_rng(seed)
    inputs, targets = [], []
    for _ in range(groups):
        source = grey if more is None or generator.random() < 0.5 else more
        images = source[generator.integers(0, len(source), 8)]
        if more is not None and generator.random() < 0.5:
            images = textured(images, generator)
        size = int(round(float(np.exp(generator.uniform(np.log(7.5), np.log(125))))))
        # Sizes that people choose, among them whole parts of 112, which leave traces of their own.
        size = int(generator.choice(CHOSEN)) if generator.random() < 0.35 else min(size, SIDE)
        images = degraded(
            images,
            size,
            str(generator.choice(["nearest", "nearest", "area", "bilinear"])),
            str(generator.choice(UP)),
        )
        true = float(size)
        if generator.random() < 0.25:
            images, zoom = turned(images, generator)
            true = min(SIDE, true / zoom)
        finish = str(generator.choice(["float", "uint8", "noise", "jpeg"], p=[0.2, 0.5, 0.1, 0.2]))
        if finish != "jpeg" and generator.random() < 0.5:
            images = images[:, :, ::-1]
        inputs.append(measures(np.ascontiguousarray(finished(images, finish, generator), np.float32)))
        targets += [np.log2(true)] * len(images)
    return np.concatenate(inputs), np.array(targets, np.float32)


def fitted(inputs: np.ndarray, targets: np.ndarray, steps: int) -> list[np.ndarray]:
    """Weights and biases of the two layers, by AdamW on the cross entropy of the candidates next to the true size."""
    torch.manual_seed(0)
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-3
    places = torch.from_numpy(np.log2(CANDIDATES)).float()
    x = torch.from_numpy((inputs - mean) / deviation)
    y = torch.from_numpy(targets).clamp(float(places[0]), float(places[-1]))
    network = torch.nn.Sequential(
        torch.nn.Linear(MEASURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, len(CANDIDATES))
    )
    optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (512,))
        wanted = (1 - (places - y[rows, None]).abs() / (places[1] - places[0])).clamp(min=0)
        loss = -(wanted * torch.log_softmax(network(x[rows]), dim=1)).sum(dim=1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    first, bias, second, last = (parameter.detach().double().numpy() for parameter in network.parameters())
    # The measures' mean and deviation go into the first layer.
    scaled = first / deviation
    return [scaled.T, bias - scaled @ mean, second.T, last]


def write_constants(parts: list[np.ndarray], path: Path) -> None:
    """The module of constants: half precision, in lines of text."""
    text = base64.b85encode(np.concatenate([part.ravel() for part in parts]).astype("<f2").tobytes()).decode()
    lines = "\n".join(text[start : start + 104] for start in range(0, len(text), 104))
    write_text(
        path,
        '"""What eval/fit_resolution.py fitted for lrface/embed/resolution.py; not to be edited."""\n\n'
        f"HIDDEN = {HIDDEN}\n"
        "# Float16, little endian, base 85: weights and bias of the first layer, then of the second.\n"
        f'CONSTANTS = r"""\n{lines}\n"""\n',
    )


def errors(grey: np.ndarray, finish: str, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Errors of :func:`effective_resolutions` for every size and kernel, of faces that span 112 pixels."""
    rows = []
    for size in SIZES:
        for down in DOWN:
            for up in UP:
                if size == SIDE and (down, up) != (DOWN[0], UP[0]):
                    continue
                images = finished(degraded(grey, size, down, up), finish, generator)
                crops = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1) / 255
                found = effective_resolutions(crops, np.full(len(images), SIDE, np.float32))
                error = np.abs(found / size - 1)
                rows.append(
                    {
                        "size": size,
                        "down": "none" if size == SIDE else down,
                        "up": "none" if size == SIDE else up,
                        "finish": finish,
                        "median": round(float(np.median(found)), 1),
                        "median_error": round(float(np.median(error)), 4),
                        "error_95": round(float(np.percentile(error, 95)), 4),
                        "within_quarter": round(float(np.mean(error <= 0.25)), 4),
                        "faces": len(images),
                    }
                )
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the data sets; else $LRFACE_DATA")
    parser.add_argument("--fit", action="store_true", help="fit, and replace lrface's constants")
    parser.add_argument("--faces", type=int, default=3000, help="of each of the two sets")
    parser.add_argument("--test-faces", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    started = time.time()
    lfw = os.environ.get("LRFACE_BENCH_LFW")
    if not lfw:
        raise UsageError("set LRFACE_BENCH_LFW to a folder that `lrface align` made of LFW's photographs")
    fit, test = faces(Path(lfw), find_data("celeba300_112", options.data), options.faces)
    if options.fit:
        more = others(find_data("imagenet_sample", options.data), 900)
        parts = [drawn(fit, groups, seed, more if mixed else None) for seed, groups, mixed in DRAWS]
        inputs, targets = (np.concatenate(each) for each in zip(*parts, strict=True))
        write_constants(fitted(inputs, targets, STEPS), CONSTANTS)
        print(f"{CONSTANTS} written; now run without --fit", file=sys.stderr)
        return 0
    chosen = test[np.linspace(0, len(test) - 1, min(options.test_faces, len(test))).astype(int)]
    rows = []
    for finish in ("uint8", "jpeg", "noise"):
        rows += errors(chosen, finish, np.random.default_rng(0))
        part = [row for row in rows if row["finish"] == finish]
        print(
            f"{finish}: within a quarter {np.mean([row['within_quarter'] for row in part]):.4f}",
            file=sys.stderr,
        )
    for row in rows:
        print(*row.values(), sep="\t", file=sys.stderr)
    write_json(
        options.out,
        {
            "table": "effective resolution estimated from 112-pixel crops: errors on people not fitted on",
            "command": "LRFACE_BENCH_LFW=PACKED python eval/fit_resolution.py --data DATA "
            f"--faces {options.faces} --test-faces {options.test_faces}",
            "data": "aligned LFW and celeba300_112, a third of the people",
            "seeds": [0],
            "rows": rows,
            **about_the_run(started),
        },
    )
    return 0


if __name__ == "__main__":
    with errors_for_users():
        sys.exit(main())
