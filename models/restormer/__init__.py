"""Restormer: image restoration (deblurring, deraining, denoising)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.restormer import images, metric, samples, tiling
from models.spec import Bar, ModelSpec

if TYPE_CHECKING:
    from models.spec import LoadedModel


def load(weights: str) -> LoadedModel:
    from models.restormer import checkpoint  # brings PyTorch

    return checkpoint.load(weights)


SPEC = ModelSpec(
    name="restormer",
    title="Restormer",
    load=load,
    read=images.read,
    run=tiling.run,
    batch_size=1,
    writer=images.writer,
    samples=samples.samples,
    write_samples=samples.write_samples,
    labelled=samples.labelled,
    score=metric.score,
    difference=metric.difference,
    badness=metric.badness,
    describe=metric.describe,
    bars={
        "fp32": [Bar("part max abs", 1e-4), Bar("PSNR dB against reference", 80, at_least=True)],
        "fp16": [Bar("PSNR dB against reference", 55, at_least=True)],
    },
    is_input=images.is_input,
    untouched=samples.untouched,
    picture=samples.write_picture,
)
