"""From ink to photographs of it: bends, blurs, tints and soils lines, many at once, on any device.

Sizes are shares of the image's height or width, so that training on squeezed lines and samples in their own
proportions look alike.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional


class Draws:
    """Random numbers, one for each image, as (batch, 1, 1, 1) on the images' device."""

    def __init__(self, batch: int, generator: Generator) -> None:
        self.batch, self.generator, self.device = batch, generator, generator.device

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.batch, 1, 1, 1, generator=self.generator, device=self.device) * (high - low) + low

    def normal(self, deviation: float) -> Tensor:
        return torch.randn(self.batch, 1, 1, 1, generator=self.generator, device=self.device) * deviation

    def happens(self, share: float) -> Tensor:
        """1 for about `share` of the images, else 0."""
        return (self.uniform(0, 1) < share).float()

    def field(self, height: int, width: int, rows: int, columns: int, channels: int = 1) -> Tensor:
        """Smooth noise (batch, channels, height, width), N(0, 1) at rows × columns points and bilinear between."""
        noise = torch.randn(self.batch, channels, rows, columns, generator=self.generator, device=self.device)
        return functional.interpolate(noise, (height, width), mode="bilinear", align_corners=False)


def photograph(ink: Tensor, generator: Generator) -> Tensor:
    """Ink (batch, height, width) uint8, 0…255, → pictures (batch, 3, height, width) float32, 0…1."""
    draws = Draws(len(ink), generator)
    x = ink.to(generator.device).unsqueeze(1).float() / 255
    x = blurred(bent(x, draws), draws)
    return soiled(coloured(x, draws), draws).clamp(0, 1)


def bent(x: Tensor, draws: Draws) -> Tensor:
    """Shift, scale, tilt, slant, bow, perspective and waves, as one resampling of x (batch, 1, height, width)."""
    _, _, height, width = x.shape
    down = torch.linspace(-1, 1, height, device=x.device).view(1, 1, -1, 1)
    along = torch.linspace(-1, 1, width, device=x.device).view(1, 1, 1, -1)
    bow = draws.normal(0.06) * draws.happens(0.4)
    perspective = draws.normal(0.06) * draws.happens(0.4)
    source_y = down * (1 + draws.normal(0.05) + perspective * along) + draws.normal(0.06)
    source_y = source_y + draws.normal(0.05) * along + bow * (along.square() - 0.4)
    source_x = along * (1 + draws.normal(0.01)) + draws.normal(0.003)
    source_x = source_x + draws.normal(0.2) * height / width * down  # slant
    source_y = source_y + draws.happens(0.3) * 0.05 * draws.field(height, width, 3, 24)
    source_x = source_x + draws.happens(0.3) * 0.05 * height / width * draws.field(height, width, 3, 24)
    grid = torch.stack([source_x.squeeze(1), source_y.squeeze(1)], dim=-1)
    return functional.grid_sample(x, grid, align_corners=True)


def blurred(x: Tensor, draws: Draws) -> Tensor:
    """Thicker or thinner strokes, uneven ink, and blur of another width along than across."""
    batch, _, height, width = x.shape
    thick = functional.max_pool2d(x, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-x, (3, 1), stride=1, padding=(1, 0))
    x = torch.lerp(x, thick, draws.uniform(0, 1) * draws.happens(0.15))
    x = torch.lerp(x, thin, draws.uniform(0, 0.6) * draws.happens(0.1))
    x = x * (1 - 0.3 * draws.happens(0.2) * draws.field(height, width, 16, 96).abs()).clamp(0, 1)

    radius = max(1, height // 16)
    offsets = torch.arange(-radius, radius + 1, device=x.device).float()
    for deviation, shape in ((draws.uniform(0, 0.035), (-1, 1)), (draws.uniform(0, 0.02), (1, -1))):
        deviation = (deviation * draws.happens(0.6) * height).clamp(min=0.1)  # pixels
        weights = torch.exp(-0.5 * (offsets / deviation.flatten(1)).square())  # (batch, 2·radius + 1)
        weights = (weights / weights.sum(dim=1, keepdim=True)).view(batch, 1, *shape)
        padding = (radius, 0) if shape == (-1, 1) else (0, radius)
        x = functional.conv2d(x.transpose(0, 1), weights, padding=padding, groups=batch).transpose(0, 1)
    return x


def coloured(x: Tensor, draws: Draws) -> Tensor:
    """Ink (batch, 1, height, width) on paper, or paper on ink: gray with a tint, unevenly lit."""
    batch, _, height, width = x.shape

    def tint(deviation: float) -> Tensor:
        return torch.randn(batch, 3, 1, 1, generator=draws.generator, device=x.device) * deviation

    contrast = draws.uniform(0.3, 1)
    dark = draws.uniform(0, 1) * (1 - contrast)
    light = dark + contrast
    inverted = draws.happens(0.12)
    paper = torch.lerp(light, dark, inverted) + tint(0.04) * draws.happens(0.5)
    letters = torch.lerp(dark, light, inverted) + tint(0.06) * draws.happens(0.5)

    angle = draws.uniform(0, 2 * math.pi)
    down = torch.linspace(-1, 1, height, device=x.device).view(1, 1, -1, 1)
    along = torch.linspace(-1, 1, width, device=x.device).view(1, 1, 1, -1)
    shade = draws.uniform(0, 0.2) * draws.happens(0.5) * (angle.cos() * along + angle.sin() * down)
    stains = 0.06 * draws.uniform(0, 1) * draws.happens(0.5) * draws.field(height, width, 4, 24)
    grain = 0.06 * draws.uniform(0, 1) * draws.happens(0.4) * draws.field(height, width, height // 3, width // 3)
    paper = paper + contrast * (stains + grain)
    return torch.lerp(paper.expand(-1, 3, height, width), letters, x) * (1 + shade)


def soiled(x: Tensor, draws: Draws) -> Tensor:
    """The camera's noise."""
    noise = torch.randn(x.shape, generator=draws.generator, device=x.device)
    return x + noise * draws.uniform(0, 0.06) * draws.happens(0.5)
