"""Measures the demo weights on pictures that they were not trained with, and writes their model card.

python -m models.restormer.demo.photographs build/photos build/photos-held-out
python -m models.restormer.demo.evaluate models/restormer/demo/restormer.safetensors --held-out build/photos-held-out

The card, README.md beside the weights, is made of what is measured here and of what train.py noted in the weights file.
`--write-pairs FOLDER` writes the degraded photographs and the clean ones instead, as a data set:

    python compare.py restormer --images FOLDER --labels FOLDER/labels.tsv
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from models.chain import replacing, run_script
from models.restormer import checkpoint, metric, samples, tiling
from models.restormer.demo.batches import KERNEL, MOST_NOISE, SHORTEST
from models.restormer.demo.photographs import SOURCES
from models.restormer.images import read_file
from models.spec import Unusable

NOTES = "training"  # key of the JSON text that train.py stores in the weights file
MOTIONS = ((5, 120), (samples.BLUR_LENGTH, samples.BLUR_ANGLE), (15, 75))  # pixels and degrees

CARD = """\
# Restormer for camera shake and noise

`{file}`: a Restormer of {parameters} parameters, {megabytes:.2f} MB in FP16, trained by this project from nothing.
Licence: Apache 2.0. `models/restormer/demo/evaluate.py` writes this page; all its figures are counted or measured.

It takes pictures in which the camera moved along a straight or curved path of {shortest} to {longest} pixels, the same
everywhere, with Gaussian noise of a standard deviation up to {noise:.0f}/255, rounded to 8 bits; it returns sharp ones.

    python export_onnx.py restormer --weights demo

## Accuracy

PSNR and SSIM are scikit-image's, in RGB; the FP16 weights compute in FP32.

The samples of `models/restormer/samples.py`, crops of photographs that training never saw, moved by {length} px at
{angle}°, noise {sample_noise:.0f}/255:

{crops}

{motions}

## Training

{runs}

In all {steps} steps{unfinished} of AdamW on the Charbonnier loss, architecture `{architecture}` of `train.py`,
seed {seed}, highest learning rate {learning_rate:g}, {precision}.

Each step takes random crops, {drawn_share:.0%} of them from {drawings} random drawings (`drawings.py`), the others
from the photographs that `photographs.py` collects:

{photographs}

## What it is not

- It is a demonstration: a small network, trained for minutes on few pictures. It replaces none of the
  authors' checkpoints.
- It knows one blur for the whole picture. Moving objects, rotation, depth, defocus, JPEG artefacts and low light
  are none of its business, and it has not been measured on GoPro or any other benchmark.
- It invents no detail: what the motion has wiped out stays lost.
"""


@dataclass(frozen=True)
class Row:
    """Accuracy on one picture, or the mean over several, before and after restoration: {"PSNR dB": …, "SSIM": …}."""

    name: str
    before: Mapping[str, float]
    after: Mapping[str, float]


class Restorer:
    """Restores pictures with a weights file: an executor (models/spec.py) in PyTorch, in FP32 on the device."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        loaded = checkpoint.load(str(weights))
        self.settings, self.part, self.device = loaded.settings, loaded.parts[0].part, device
        self.network = checkpoint.read_checkpoint(weights).eval().to(device)

    def run(self, part: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return {"restored": self.network(torch.from_numpy(inputs["image"]).to(self.device)).cpu().numpy()}

    def limits(self, part: str) -> Mapping[str, tuple[int, int]]:
        return self.part.limits()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return tiling.restore(self, self.settings, pixels)  # type: ignore[arg-type]  # an executor without caches


def on_crops(restorer: Restorer) -> list[Row]:
    """Accuracy on each of the samples that compare.py uses."""
    rows = []
    for sample in samples.samples(restorer.settings):
        degraded, truths = sample.item.pixels, [sample.truth]
        rows.append(Row(sample.name, metric.score([degraded], truths), metric.score([restorer(degraded)], truths)))
    return rows


def degraded_by(length: int, angle: float, truths: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures moved by `length` pixels at `angle` degrees, degraded as the samples are."""
    random = np.random.default_rng(0)
    kernel = samples.motion_kernel(length, angle)
    return [samples.degrade(truth, kernel, random) for truth in truths]


def write_pairs(files: list[Path], folder: Path) -> None:
    """Stores the photographs, degraded by each of MOTIONS, with clean/ and the labels.tsv that pairs them."""
    truths = [read_file(path).pixels for path in files]
    rows = []
    for file, truth in zip(files, truths):
        samples.write_picture(truth, folder / "clean" / f"{file.stem}.png")
    for length, angle in MOTIONS:
        for file, picture in zip(files, degraded_by(length, angle, truths)):
            name = f"{file.stem}-{length}px.png"
            samples.write_picture(picture, folder / name)
            rows.append(f"{name}\tclean/{file.stem}.png\n")
    with replacing(folder / "labels.tsv") as temporary:
        temporary.write_text("".join(rows), encoding="utf-8")


def on_photographs(restorer: Restorer, files: list[Path]) -> list[Row]:
    """Mean accuracy over whole photographs for each of MOTIONS, degraded as the samples are."""
    truths = [read_file(path).pixels for path in files]
    rows = []
    for length, angle in MOTIONS:
        degraded = degraded_by(length, angle, truths)
        restored = [restorer(pixels) for pixels in tqdm(degraded, desc=f"{length} px", leave=False)]
        rows.append(Row(f"{length} px at {angle}°", metric.score(degraded, truths), metric.score(restored, truths)))
    return rows


def table(first: str, rows: list[Row]) -> str:
    lines = [f"| {first} | PSNR, dB | gain, dB | SSIM |", "|---|---|---|---|"]
    for row in rows:
        (psnr_before, ssim_before), (psnr, ssim) = row.before.values(), row.after.values()
        gain = f"{psnr - psnr_before:+.2f}"
        lines.append(f"| {row.name} | {psnr_before:.2f} → {psnr:.2f} | {gain} | {ssim_before:.3f} → {ssim:.3f} |")
    return "\n".join(lines)


def grouped(number: int) -> str:
    """Digits in groups of three."""
    return f"{number:,}".replace(",", " ")


def picture_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png")) if folder.is_dir() else []
    if not files:
        raise Unusable(f"{folder} holds no photographs: run `python -m models.restormer.demo.photographs`")
    return files


def by_package(files: list[Path]) -> dict[str, int]:
    """How many of the files photographs.py has made from each package, and how many come from elsewhere ("")."""
    counts = {source.package: sum(file.name.startswith(f"{source.package}-") for file in files) for source in SOURCES}
    return {**counts, "": len(files) - sum(counts.values())}


def packages_table(counts: Mapping[str, int]) -> str:
    lines = ["| package | photographs | licence |", "|---|---|---|"]
    for source in SOURCES:
        if counts.get(source.package):
            lines.append(f"| {source.package} {source.version} | {counts[source.package]} | {source.licence} |")
    if counts[""]:
        lines.append(f"| not of `photographs.py` | {counts['']} | unknown |")
    return "\n".join(lines)


def read_notes(weights: Path) -> dict[str, Any]:
    """What train.py noted in the weights file."""
    try:
        with safe_open(weights, "pt") as file:
            return json.loads((file.metadata() or {})[NOTES])
    except Exception as problem:  # safetensors has an exception class of its own
        raise Unusable(f"{weights} is no weights file of models.restormer.demo.train") from problem


def write_card(weights: Path, held_out: Optional[Path], device: torch.device) -> str:
    """Measures the weights, writes README.md beside them and returns the accuracy tables."""
    notes = read_notes(weights)
    restorer = Restorer(weights, device)
    crops = table("crop", on_crops(restorer))
    motions = "There were no further photographs to measure on."
    if held_out is not None:
        files = picture_files(held_out)
        motions = (
            f"Means over {len(files)} whole photographs from packages that served no training, the same noise:\n\n"
            f"{table('motion', on_photographs(restorer, files))}\n\n{packages_table(by_package(files))}"
        )
    runs = ["| device | PyTorch | minutes | steps | batch | crop | `torch.compile` |", "|---|---|---|---|---|---|---|"]
    for run in notes["runs"]:
        runs.append(
            f"| {run['device']} | {run['torch']} | {run['minutes']:.1f} | {grouped(run['steps'])} | {run['batch']} "
            f"| {run['crop']}×{run['crop']} | {'yes' if run['compile'] else 'no'} |"
        )
    last = notes["runs"][-1]
    unfinished = "" if notes["progress"] >= 1 else f" (**unfinished**: {notes['progress']:.0%} of what was planned)"
    card = CARD.format(
        file=weights.name,
        parameters=grouped(sum(parameter.numel() for parameter in restorer.network.parameters())),
        megabytes=weights.stat().st_size / 1e6,
        shortest=SHORTEST,
        longest=KERNEL,
        noise=255 * MOST_NOISE,
        length=samples.BLUR_LENGTH,
        angle=samples.BLUR_ANGLE,
        sample_noise=255 * samples.NOISE,
        crops=crops,
        motions=motions,
        runs="\n".join(runs),
        steps=grouped(notes["step"]),
        unfinished=unfinished,
        architecture=last["architecture"],
        seed=last["seed"],
        learning_rate=last["learning_rate"],
        precision=notes["precision"],
        drawings=notes["drawings"],
        drawn_share=notes["drawn_share"],
        photographs=packages_table(notes["photographs"]),
    )
    with replacing(weights.with_name("README.md")) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return f"{crops}\n\n{motions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="?", help="the weights file that train.py has written")
    parser.add_argument("--held-out", type=Path, metavar="FOLDER", help="photographs to measure on besides the samples")
    parser.add_argument("--write-pairs", type=Path, metavar="FOLDER", help="write the measured photographs instead")
    arguments = parser.parse_args()
    if arguments.write_pairs and arguments.held_out:
        write_pairs(picture_files(arguments.held_out), arguments.write_pairs)
        return 0
    if arguments.weights is None or arguments.write_pairs:
        parser.error("name a weights file, or --held-out and --write-pairs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_card(arguments.weights, arguments.held_out, device))
    return 0


if __name__ == "__main__":
    run_script(main)
