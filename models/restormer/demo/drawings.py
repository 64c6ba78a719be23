"""Pictures drawn by chance: sharp edges, textures and letters without end, without noise, and free of any licence.

Shapes whose sizes follow a power law hide one another ("dead leaves": Lee, Mumford & Huang, IJCV 2001), which gives
the statistics of natural pictures: edges of every contrast and direction at every scale.
"""

from __future__ import annotations

import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 512  # pixels of each side
OVERSAMPLING = 2  # drawn so much larger and averaged: edges fall between pixels, as in photographs
SHEETS = 8  # textures of one picture
SHAPES = 2000
RADII = (10, 500)  # smallest and largest shape, in pixels of the large drawing
LETTERS = string.ascii_letters + string.digits + ".,:;!?-+()&%"


def draw(seed: int) -> np.ndarray:
    """The picture that belongs to a seed: (SIZE, SIZE, 3) uint8."""
    random = np.random.default_rng(seed)
    side = SIZE * OVERSAMPLING
    sheets = [texture(random, side) for _ in range(SHEETS)]
    canvas = sheets[0].copy()
    words = random.integers(0, 40)
    for index in range(SHAPES):
        mask = word(random) if index >= SHAPES - words else shape(random)
        sheet = sheets[random.integers(SHEETS)]
        left, top = (int(random.integers(-mask.width // 2, side - mask.width // 2)) for _ in range(2))
        x, y = int(random.integers(side - mask.width)), int(random.integers(side - mask.height))
        patch = sheet.crop((x, y, x + mask.width, y + mask.height))
        if random.random() < 0.7:  # a tint of its own, or eight textures would make all of a picture's colours
            tint = Image.new("RGB", patch.size, colour(random))
            patch = Image.blend(patch, tint, random.uniform(0.2, 0.9))
        canvas.paste(patch, (left, top), mask)
    return np.asarray(canvas.reduce(OVERSAMPLING))


def colour(random: np.random.Generator) -> tuple[int, int, int]:
    """Gray as often as not: photographs are less colourful than chance."""
    gray, saturation = random.uniform(0, 255), random.choice([0.1, 0.5, 1.0])
    red, green, blue = (gray + saturation * (random.uniform(0, 255, 3) - gray)).astype(int).tolist()
    return red, green, blue


def texture(random: np.random.Generator, side: int) -> Image.Image:
    """(side, side): two colours, mixed by a gradient, by stripes, by checks or by 1/f noise."""
    rows, columns = np.indices((side, side), np.float32) / side - 0.5
    angle = random.uniform(0, np.pi)
    along, across = columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)
    kind = random.choice(["gradient", "stripes", "checks", "noise"], p=[0.2, 0.15, 0.15, 0.5])
    if kind == "gradient":
        mixture = along + 0.5
    elif kind == "noise":
        mixture = power_law_noise(random, side)
    else:
        period = random.uniform(4, 60) * OVERSAMPLING / side
        waves = np.sin(2 * np.pi * along / period)
        if kind == "checks":
            waves = waves * np.sin(2 * np.pi * across / period)
        mixture = waves * random.choice([0.5, 20.0]) + 0.5  # soft or hard
    first, second = np.array([colour(random), colour(random)], np.float32)
    mixed = first + (second - first) * mixture.clip(0, 1)[:, :, None]
    return Image.fromarray(mixed.astype(np.uint8))


def power_law_noise(random: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) noise around 0.5 whose amplitude falls with a power of the frequency, as that of many surfaces."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(random.standard_normal((side, side))) / frequency ** random.uniform(0.5, 1.6)
    noise = np.fft.irfft2(spectrum, (side, side))
    return (0.5 + random.uniform(0.1, 0.4) * noise / noise.std()).astype(np.float32)


def shape(random: np.random.Generator) -> Image.Image:
    """The mask of an ellipse, a polygon or a bar, with a radius drawn with density r⁻³."""
    smallest, largest = RADII
    radius = smallest / np.sqrt(1 - random.random() * (1 - (smallest / largest) ** 2))
    kind = random.choice(["ellipse", "polygon", "bar"])
    if kind == "polygon":
        corners = int(random.integers(3, 9))
        angles = np.sort(random.uniform(0, 2 * np.pi, corners))
        radii = radius * random.uniform(0.3, 1, corners)
    else:
        angles = np.linspace(0, 2 * np.pi, 64)
        flatness = random.uniform(0.05, 0.3) if kind == "bar" else random.uniform(0.4, 1)
        radii = radius / np.hypot(np.cos(angles), np.sin(angles) / flatness)
        angles = angles + random.uniform(0, 2 * np.pi)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + radius
    mask = Image.new("L", (int(2 * radius) + 1,) * 2)
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in points.tolist()], fill=255)
    return mask


def word(random: np.random.Generator) -> Image.Image:
    """The mask of a word of random letters, turned by any angle or not at all."""
    text = "".join(random.choice(list(LETTERS), int(random.integers(2, 10))))
    font = ImageFont.load_default(int(random.integers(10, 50)) * OVERSAMPLING)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    mask = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font)
    turn = float(random.choice([0.0, random.uniform(0, 360)]))
    return mask.rotate(turn, expand=True, resample=Image.Resampling.BILINEAR)
