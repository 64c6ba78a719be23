"""PSNR and SSIM, the measures of the Restormer paper (section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Dict

import numpy as np


def psnr(truth: np.ndarray, image: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB for a range of 0…1; infinite for equal images."""
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(truth, image, data_range=1.0))


def ssim(truth: np.ndarray, image: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004) of (H, W, C) images, as a mean over the channels."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(truth, image, data_range=1.0, channel_axis=2))


def score(results: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> Dict[str, float]:
    """Means over the images; results are clipped to 0…1 as they are when written."""
    clipped = [result.clip(0, 1) for result in results]
    return {
        "PSNR dB": float(np.mean([psnr(truth, image) for truth, image in zip(truths, clipped)])),
        "SSIM": float(np.mean([ssim(truth, image) for truth, image in zip(truths, clipped)])),
    }


def difference(references: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> Dict[str, float]:
    """The worst image decides; NaN in a result gives NaN here."""
    return {
        "PSNR dB against reference": float(np.min([psnr(*pair) for pair in zip(references, results)])),
        "max abs error of the image": float(np.max([np.abs(a - b).max() for a, b in zip(references, results)])),
    }
