"""Images of text lines: reading them, and making them the encoder's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

from models.images import opened
from models.spec import Unusable


def read(path: Path, settings: Mapping[str, Any]) -> Image.Image:
    """The image in the file `path`, upright and in RGB; raises Unusable with the file's name."""
    try:
        with opened(path) as image:
            image.load()  # a truncated file shows only here
            return rgb(ImageOps.exif_transpose(image))
    except Exception as problem:  # Pillow's decoders raise SyntaxError, struct.error and others on damaged files
        raise Unusable(f"{path} cannot be read as an image: {problem}") from problem


def rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit RGB: 16-bit gray is scaled rather than clipped, transparency lies on white."""
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def preprocess(images: Sequence[Image.Image], settings: Mapping[str, Any]) -> np.ndarray:
    """PIL images → pixel_values (batch, 3, height, width) float32, equal to the transformers image processor's.

    `settings`: height, width, resample (Pillow's number), scale, mean and std of the three channels.
    """
    size = (settings["width"], settings["height"])
    mean, std = np.asarray(settings["mean"], np.float32), np.asarray(settings["std"], np.float32)
    values = ((np.arange(256) * settings["scale"]).astype(np.float32)[:, None] - mean) / std  # (256, 3), of all pixels
    batch = np.empty((len(images), 3, size[1], size[0]), np.float32)
    for pixels, image in zip(batch, images):
        resized = np.asarray(rgb(image).resize(size, settings["resample"]))  # (height, width, 3)
        for channel, plane in enumerate(pixels):
            np.take(values[:, channel], resized[:, :, channel], out=plane, mode="clip")  # "raise" would copy
    return batch
