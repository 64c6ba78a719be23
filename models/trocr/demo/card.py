"""The demo's model card, filled in with what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.trocr.demo.lines import CHINESE, HEIGHT, LONGEST, WIDTH

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-to-text
language: [en, zh]
---

# TrOCR demo

A TrOCR of {parameters} parameters ({megabytes} MB in FP16), trained from random weights by this project so that its
conversion chain can be tried on a trained model after a mere `git clone`. Images of {height}×{width} pixels, tokens of
single characters: printable ASCII and the {chinese} most frequent Chinese characters, up to {longest} a line.

    python export_onnx.py trocr --weights models/trocr/demo
    VisionEncoderDecoderModel.from_pretrained("models/trocr/demo"), TrOCRProcessor.from_pretrained("models/trocr/demo")

## Accuracy

Greedy decoding of the stored weights. CER: edits per character of the truth.

| data, none of it trained on | lines | CER % | exact match % |
|---|---|---|---|
{scores}

The page is `skimage.data.page()`, cut into lines automatically; its whole lines make too small a set to conclude much.
All else is synthetic and drawn as the training's lines are, only from other fonts and other scans: on real photographs
and real handwriting it will be worse.

**What it is not:** a useful text recogniser. It knows no other characters, no letters with accents, no handwriting but
digits, no vertical text and no pages; it reads one line, squeezed to {height}×{width}.

## Training

{steps} steps of {batch} lines in {minutes} minutes on one {device}
(PyTorch {torch}, transformers {transformers}; seed {seed}). {printed} lines were printed
meanwhile; each is bent, blurred, coloured and soiled anew whenever it is drawn.
`figures.json` holds the setup and all figures.

    python -m models.trocr.demo.fonts FONTS
    python -m models.trocr.demo.train --fonts FONTS --out models/trocr/demo --checkpoint FILE
    python -m models.trocr.demo.evaluate --fonts FONTS
    python -m models.trocr.demo.evaluate --fonts FONTS --samples models/trocr/demo/samples

Training and evaluation need scikit-learn beside the project's requirements, for the digits.

## Data

No text was taken from anywhere: sentences of common and of made-up words, templates of dates, amounts, addresses and
code, random characters, random Chinese. They are printed in fonts out of Debian's packages, all freely licensed (their
copyright files lie in FONTS/licences), of which none is part of this repository: {latin} Latin and {chinese_fonts}
Chinese ones for training, {held_latin} and {held_chinese} of other families held out, by package:

{packages}

The handwritten digits are scikit-learn's `load_digits`, part of the Optical Recognition of Handwritten Digits data set
(E. Alpaydin, C. Kaynak, 1998; CC BY 4.0). Every fifth is held out, by scan and not by writer: the data do not name the
writers.

Licence of the weights and of `samples/`: Apache 2.0; the digits in `samples/` are CC BY 4.0.
"""


def card(figures: Mapping[str, Any]) -> str:
    """The card as Markdown; `figures` is what `train.report` measured."""
    scores = (
        f"| {name} | {found['lines']} | {found['CER %']} | {found['exact match %']} |"
        for name, found in figures["scores"].items()
    )
    packages = (
        f"- {part.replace('_', ' ')}: " + ", ".join(f"{name} ({known})" for name, known in versions.items())
        for part, versions in figures["packages"].items()
    )
    return CARD.format(
        parameters=f"{figures['parameters']:,}".replace(",", " "),
        megabytes=f"{figures['bytes'] / 1e6:.1f}",
        height=HEIGHT,
        width=WIDTH,
        chinese=len(CHINESE),
        longest=LONGEST,
        scores="\n".join(scores),
        steps=figures["steps"],
        batch=figures["batch"],
        minutes=figures["minutes"],
        device=figures["device"],
        seed=figures["seed"],
        printed=f"{figures['lines printed']:,}".replace(",", " "),
        latin=figures["fonts"]["train/latin"],
        chinese_fonts=figures["fonts"]["train/chinese"],
        held_latin=figures["fonts"]["held_out/latin"],
        held_chinese=figures["fonts"]["held_out/chinese"],
        packages="\n".join(packages),
        **figures["versions"],
    )
