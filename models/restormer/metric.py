"""PSNR and SSIM, the measures of the Restormer paper (section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Dict

import numpy as np

from models.spec import Metric

PSNR, LARGEST = "PSNR dB against reference", "max abs error of the image"
VISIBLE = 1 / 255  # a step of an 8-bit picture


def psnr(truth: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB for a range of 0…1; infinite for equal images."""
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(truth, image, data_range=1.0))


def ssim(truth: np.ndarray, image: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of (H, W, C) images, as a mean over the channels."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(truth, image, data_range=1.0, channel_axis=2))


def scored(result: np.ndarray, truth: np.ndarray) -> Dict[str, float]:
    """One result, clipped to 0…1 as it is when written."""
    image = result.clip(0, 1)
    return {"PSNR dB": psnr(truth, image), "SSIM": ssim(truth, image)}


def means(scores: Sequence[Mapping[str, float]]) -> Dict[str, float]:
    return {name: float(np.mean([one[name] for one in scores])) for name in ("PSNR dB", "SSIM")}


def badness(scores: Mapping[str, float]) -> float:
    return -scores["PSNR dB"]


def differences(reference: np.ndarray, result: np.ndarray) -> Dict[str, float]:
    return {PSNR: psnr(reference, result), LARGEST: float(np.abs(reference - result).max())}


def worst(found: Sequence[Mapping[str, float]]) -> Dict[str, float]:
    """The worst image decides; NaN in a result gives NaN here."""
    return {
        "differing outputs": sum(not one[LARGEST] <= VISIBLE for one in found),
        PSNR: float(np.min([one[PSNR] for one in found])),
        LARGEST: float(np.max([one[LARGEST] for one in found])),
    }


score = Metric(scored, means)
difference = Metric(differences, worst)


def describe(image: np.ndarray) -> str:
    """The range of its values: black, blown out and NaN pictures show."""
    return f"{image.min():.3f} to {image.max():.3f}, mean {image.mean():.4f}"
