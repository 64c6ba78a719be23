"""How well the demo reads what it has not been trained on: other fonts, other scans of digits, a photographed page.

Usage: python -m models.trocr.demo.evaluate --fonts FOLDER [--model FOLDER] [--samples FOLDER] [--write-lines FOLDER]

prints the figures of the model as it is stored, and ends with status 1 if it misses a bar.  Instead, `--samples` writes
sample images of held-out fonts and digits, with their labels.tsv: with them the demo runs where no fonts are.  And
`--write-lines` writes the 2000 printed and 500 handwritten lines that the figures come from, as a data set:

    python compare.py trocr --images FOLDER --labels FOLDER/labels.tsv
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import VisionEncoderDecoderModel

from models.chain import run_script
from models.trocr import tokenizer
from models.trocr.demo.degrade import photograph
from models.trocr.demo.lines import (
    CHINESE,
    HEIGHT,
    WIDTH,
    Sources,
    chunk,
    digit_line,
    font_of,
    printed,
    sources,
)
from models.trocr.metric import cer_percent

PRINTED, WRITTEN = 2000, 500  # lines
BARS = {"held-out fonts": 2.0, "held-out handwritten digits": 3.0}  # CER %
SEED = 20_000_000  # far from training's, so that no line repeats one of training's by its seed

# The whole lines of skimage.data.page(), read off the image.
PAGE = (
    "Region-based segmentation",
    "Let us first determine markers of the coins and the",
    "background. These markers are pixels that we can label",
    "unambiguously as either object or background. Here,",
    "the markers are found at the two extreme parts of the",
    "histogram of grey values:",
)

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "Invoice No. 2024-0817",
    "for (int i = 0; i < n; ++i)",
    "Please reply by 14 March.",
    "CHAPTER TWELVE",
    "It was the best of times, it was the worst of times,",
    "with kind regards, Eleanor",
    "Total: $1,234.56",
    "今天的天气非常好，我们出去走走。",
    "老师和学生都在看书",
    "2024年8月17日",
)
DIGIT_SAMPLES = 3


@dataclass(frozen=True)
class Lines:
    """pictures (n, 3, HEIGHT, WIDTH) uint8 and their texts."""

    pictures: Tensor
    texts: Sequence[str]

    def only(self, chosen: Sequence[int]) -> Lines:
        return Lines(self.pictures[list(chosen)], [self.texts[index] for index in chosen])


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


def photographed(ink: np.ndarray, seed: int) -> Tensor:
    """Ink (n, height, width) uint8 → pictures (n, 3, height, width) uint8.

    On the CPU, whose random numbers are the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    made = [photograph(part, generator) for part in torch.from_numpy(ink.copy()).split(64)]
    return (torch.cat(made) * 255).round().byte()


def made_lines(source: Sources, count: int, written_share: float) -> Lines:
    """`count` lines, of which about `written_share` are handwritten digits."""
    ink, texts = chunk(source, (SEED, round(100 * written_share)), count, written_share)
    return Lines(photographed(ink, SEED), texts)


def page_lines() -> Lines:
    """The lines of skimage.data.page(), cut where rows hold much ink."""
    import skimage.data
    from skimage.filters import threshold_local

    page = skimage.data.page()
    ink = page < threshold_local(page, 35, offset=12)
    dense = np.concatenate([[False], ink.mean(axis=1) > 0.065, [False]])
    starts, ends = np.flatnonzero(np.diff(dense.astype(int))).reshape(-1, 2).T
    whole = (ends - starts > 6) & (ends < len(page))  # rules are thinner; the last line is cut by the page's edge
    pictures = []
    for start, end in zip(starts[whole] - 5, ends[whole] + 4):
        columns = np.flatnonzero(ink[start:end].sum(axis=0) > 1)
        crop = page[start:end, max(columns[0] - 4, 0) : columns[-1] + 5]
        line = Image.fromarray(crop).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        pictures.append(torch.from_numpy(np.array(line)).permute(2, 0, 1))
    return Lines(torch.stack(pictures), PAGE)


def samples(source: Sources) -> Iterator[tuple[str, Image.Image, str]]:
    """(name, picture, text) of the sample images, in their own proportions and in 32 grays, which keeps files small."""
    for number, text in enumerate(SAMPLES):
        random = np.random.default_rng((SEED, number))
        fonts = source.chinese if set(text) & set(CHINESE) else source.latin
        font = font_of(fonts[number * 2 % len(fonts)], 28)
        yield f"printed-{number + 1}", grayed(printed(random, text, font), number), text
    for number in range(DIGIT_SAMPLES):
        ink, text = digit_line(np.random.default_rng((SEED, len(SAMPLES) + number)), source)
        ink = ink.resize((ink.width * 2 // 3, ink.height * 2 // 3), Image.Resampling.BILINEAR)
        yield f"digits-{number + 1}", grayed(ink, len(SAMPLES) + number), text


def write_lines(source: Sources, folder: Path) -> None:
    """Stores the lines of `evaluate` as a data set: PNG files of (WIDTH, HEIGHT) and a labels.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = []
    for name, count, written_share in (("printed", PRINTED, 0), ("digits", WRITTEN, 1)):
        lines = made_lines(source, count, written_share)
        for number, (picture, text) in enumerate(zip(lines.pictures, lines.texts), 1):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{name}-{number:04}.png")
            labels.append(f"{name}-{number:04}.png\t{text}\n")
    (folder / "labels.tsv").write_text("".join(labels), encoding="utf-8")


def grayed(ink: Image.Image, seed: int) -> Image.Image:
    picture = photographed(np.asarray(ink)[None], SEED + seed)[0].permute(1, 2, 0).numpy()
    return Image.fromarray(picture).convert("L").quantize(32)


def write_samples(source: Sources, folder: Path) -> None:
    """Stores the sample images and a labels.tsv with lines of `file<TAB>text`."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = []
    for name, picture, text in samples(source):
        picture.save(folder / f"{name}.png", optimize=True)
        labels.append(f"{name}.png\t{text}\n")
    (folder / "labels.tsv").write_text("".join(labels), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def fitted(pictures: Tensor, size: Sequence[int]) -> Tensor:
    """Pictures (n, 3, height, width), stretched to (height, width) `size`."""
    if pictures.shape[2:] == tuple(size):
        return pictures
    return torch.nn.functional.interpolate(pictures, tuple(size), mode="bilinear", antialias=True)


def read(model: VisionEncoderDecoderModel, reader: tokenizer.Tokenizer, lines: Lines, batch: int) -> list[str]:
    """The texts that `generate` finds, greedily."""
    texts = []
    for pictures in tqdm(lines.pictures.split(batch), desc="reading", unit="batch", leave=False):
        pixel_values = fitted(pictures.to(model.device).float(), model.config.encoder.image_size) / 127.5 - 1
        for ids in model.generate(pixel_values.to(model.dtype)).tolist():
            texts.append(tokenizer.text_of(reader, ids, clean_up=False))
    return texts


def scores(truths: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    exact = sum(truth == text for truth, text in zip(truths, texts))
    return {
        "lines": len(truths),
        "CER %": round(cer_percent(truths, texts), 2),
        "exact match %": round(100 * exact / len(truths), 1),
    }


def evaluate(
    folder: Path, fonts: Path, device: str, printed_count: int = PRINTED, written_count: int = WRITTEN, batch: int = 250
) -> dict[str, dict[str, float]]:
    """The scores of the model stored in `folder`, by name of the data."""
    # loaded in FP16 as stored; computed in FP32 unless the name says otherwise
    model = VisionEncoderDecoderModel.from_pretrained(folder).eval().to(device).float()
    reader = tokenizer.of_folder(folder)[0]
    source = sources(fonts, held_out=True)

    lines = made_lines(source, printed_count, written_share=0)
    texts = read(model, reader, lines, batch)
    found = {"held-out fonts": scores(lines.texts, texts)}
    chinese = [bool(set(text) & set(CHINESE)) for text in lines.texts]
    for name, wanted in (("held-out fonts, Latin", False), ("held-out fonts, Chinese", True)):
        chosen = [index for index, value in enumerate(chinese) if value == wanted]
        if chosen:
            found[name] = scores(lines.only(chosen).texts, [texts[index] for index in chosen])
    for name, other in (
        ("held-out handwritten digits", made_lines(source, written_count, written_share=1)),
        ("photographed page", page_lines()),
    ):
        found[name] = scores(other.texts, read(model, reader, other, batch))
    if device.startswith("cuda"):
        found["held-out fonts, computed in FP16"] = scores(lines.texts, read(model.half(), reader, lines, batch))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, required=True, help="what models.trocr.demo.fonts has collected")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the model's folder (this one)")
    parser.add_argument("--samples", type=Path, help="write sample images into this folder instead")
    parser.add_argument("--write-lines", type=Path, metavar="FOLDER", help="write the measured lines instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for folder, write in ((arguments.samples, write_samples), (arguments.write_lines, write_lines)):
        if folder:
            write(sources(arguments.fonts, held_out=True), folder)
            return 0
    found = evaluate(arguments.model, arguments.fonts, arguments.device)
    print(json.dumps(found, indent=1))
    missed = [name for name, limit in BARS.items() if found[name]["CER %"] > limit]
    for name in missed:
        print(f"missed: {name}, CER above {BARS[name]} %", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    run_script(main)
