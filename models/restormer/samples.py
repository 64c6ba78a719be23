"""Photographs that scikit-image ships, degraded by a known motion blur and noise; and labelled folders of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, List

import numpy as np
from tqdm import tqdm

from models.chain import replacing
from models.labels import naming, read_labels
from models.restormer.images import Picture, encode, read, read_file
from models.spec import Sample, StoredSample, Unusable

# name, (top, left) and (height, width) of the crop; the last two sizes are no multiples of 8
CROPS = (
    ("astronaut", (0, 120), (192, 192)),
    ("chelsea", (60, 100), (180, 240)),
    ("coffee", (90, 200), (187, 229)),
)
BLUR_LENGTH, BLUR_ANGLE = 9, 30  # pixels and degrees of a straight motion
NOISE = 4 / 255  # standard deviation


def samples(settings: Mapping[str, Any]) -> List[Sample]:
    """Degraded crops and the clean ones they came from: gray for a one-channel network, pairs for a dual-pixel one."""
    from skimage import data

    random = np.random.default_rng(0)
    made = []
    for name, (top, left), (height, width) in CROPS:
        clean = getattr(data, name)()[top : top + height, left : left + width].astype(np.float32) / 255
        if settings["in_channels"] == 1:
            clean = clean @ np.array([[0.299], [0.587], [0.114]], np.float32)
        if settings["dual_pixel"]:
            # Each half of the lens sees the scene shifted by its half of the blur.
            halves = [degrade(clean, half, random) for half in halves_of(motion_kernel())]
            degraded = np.concatenate(halves, axis=2)
        else:
            degraded = degrade(clean, motion_kernel(), random)
        made.append(Sample(name, Picture(degraded), clean))
    return made


def motion_kernel(length: int = BLUR_LENGTH, angle: float = BLUR_ANGLE) -> np.ndarray:
    """A straight motion of `length` pixels at `angle` degrees: (length, length), sum 1."""
    kernel = np.zeros((length, length))
    centre = (length - 1) / 2
    for step in np.linspace(-centre, centre, 8 * length):
        x = centre + step * np.cos(np.radians(angle))
        y = centre - step * np.sin(np.radians(angle))
        kernel[round(y), round(x)] += 1
    return kernel / kernel.sum()


def halves_of(kernel: np.ndarray) -> list[np.ndarray]:
    """The kernel's left and its right half, each with sum 1."""
    middle = kernel.shape[1] // 2
    halves = [kernel.copy(), kernel.copy()]
    halves[0][:, middle + 1 :] = 0
    halves[1][:, :middle] = 0
    return [half / half.sum() for half in halves]


def degrade(clean: np.ndarray, kernel: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(H, W, C) blurred with `kernel`, with Gaussian noise, rounded to 8 bits as a camera would."""
    from scipy.ndimage import convolve

    blurred = convolve(clean, kernel[:, :, None], mode="reflect")
    noisy = blurred + random.normal(0, NOISE, clean.shape)
    return np.rint(noisy.clip(0, 1) * 255).astype(np.float32) / 255


def labelled(settings: Mapping[str, Any], folder: Path, labels: Path) -> List[StoredSample]:
    """The pairs that a labels file lists, by file names relative to `folder`; all have been read once.

    Its lines are `degraded<TAB>clean` or {"image": degraded, "clean": clean}.  Raises Unusable naming the first line
    that does not fit, or whose pictures cannot be read.
    """
    made = []
    lines = list(read_labels(labels, "clean"))
    for where, name, clean in tqdm(lines, desc="reading", unit="image", disable=None, leave=False):
        sample = StoredSample(name, partial(read, folder / name, settings), partial(read_clean, folder / clean))
        with naming(where):
            if untouched(sample.item).shape != sample.truth.shape:
                raise Unusable(f"{name} and {clean} differ in size or number of colours")
        made.append(sample)
    if not made:
        raise Unusable(f"{labels} lists no pictures")
    return made


def read_clean(path: Path) -> np.ndarray:
    """(H, W, C) in 0…1."""
    return read_file(path).pixels


def untouched(picture: Picture) -> np.ndarray:
    """The picture as if it were a result: of a dual-pixel pair, the mean of its views."""
    height, width, channels = picture.pixels.shape
    return picture.pixels.reshape(height, width, -1, min(channels, 3)).mean(axis=2)


def write_picture(image: np.ndarray, path: Path) -> None:
    """Stores (H, W, C) in 0…1 as PNG with 8 bits."""
    with replacing(path) as temporary:
        encode(Picture(image), image, temporary)


def write_samples(settings: Mapping[str, Any], folder: Path) -> None:
    """Stores the samples as a user's own data set would look: pictures, clean/, and the labels that pair them."""
    rows = []
    for sample in samples(settings):
        views = np.split(sample.item.pixels, 2, axis=2) if settings["dual_pixel"] else [sample.item.pixels]
        names = [f"{sample.name}_l", f"{sample.name}_r"] if settings["dual_pixel"] else [sample.name]
        for path, pixels in (
            *((folder / f"{name}.png", view) for name, view in zip(names, views)),
            (folder / "clean" / f"{sample.name}.png", sample.truth),
        ):
            with replacing(path) as temporary:
                encode(sample.item, pixels, temporary)
        rows.append(f"{names[0]}.png\tclean/{sample.name}.png\n")
    with replacing(folder / "labels.tsv") as temporary:
        temporary.write_text("".join(rows), encoding="utf-8")
