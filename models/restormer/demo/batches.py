"""Training pairs made on the device: crops of pictures kept there, and the degradation of models/restormer/samples.py.

Images are (B, 3, H, W) in 0…1, kernels (B, KERNEL, KERNEL) with sum 1.  All randomness comes from one generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

KERNEL = 17  # pixels of each side of a blur kernel, and of the longest motion
MARGIN = KERNEL // 2
SHORTEST = 3  # pixels of motion
MOST_NOISE = 8 / 255  # standard deviation


class Pictures:
    """Pictures of any sizes in one buffer on the device, as bytes.

    pictures  (H, W, 3) uint8 each
    weights   how often each is cropped, relative to the others
    """

    def __init__(self, pictures: Sequence[np.ndarray], weights: Sequence[float], device: torch.device) -> None:
        self.device = device
        self.pixels = torch.from_numpy(np.concatenate([picture.reshape(-1, 3) for picture in pictures])).to(device)
        self.heights, self.widths = torch.tensor([picture.shape[:2] for picture in pictures], device=device).T
        self.starts = torch.cumsum(self.heights * self.widths, 0) - self.heights * self.widths
        self.weights = torch.tensor(weights, dtype=torch.float32, device=device)

    def crops(self, count: int, side: int, random: Generator) -> Tensor:
        """(count, 3, side, side): random places of random pictures, each mirrored and turned in one of eight ways."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=random)
        mirrored = torch.randint(2, (3, count, 1), generator=random, device=self.device).bool()
        along = []
        for axis, lengths in enumerate((self.heights, self.widths)):
            free = lengths[which, None] - side + 1
            first = (torch.rand(count, 1, generator=random, device=self.device) * free).long()
            steps = torch.arange(side, device=self.device).expand(count, side)
            along.append(first + torch.where(mirrored[axis], side - 1 - steps, steps))
        rows, columns = along
        indices = self.starts[which, None, None] + rows[:, :, None] * self.widths[which, None, None] + columns[:, None]
        indices = torch.where(mirrored[2, :, :, None], indices.transpose(1, 2), indices)
        return self.pixels[indices].permute(0, 3, 1, 2).float() / 255


def training_pair(pictures: Pictures, count: int, side: int, random: Generator) -> tuple[Tensor, Tensor]:
    """(degraded, clean), both (count, 3, side, side): random crops, colours, motions and noise."""
    clean = vary_colours(pictures.crops(count, side + 2 * MARGIN, random), random)
    kernels = random_kernels(count, random)
    sigma = MOST_NOISE * torch.rand(count, 1, 1, 1, generator=random, device=random.device)
    degraded = degrade(clean, kernels, sigma, random)
    # What the blur has mirrored lies in the margins.  Pictures have such borders, so a batch may keep part of them.
    # Indices instead of a slice: whoever reads a number on the device waits for it.
    for axis in (2, 3):
        first = torch.randint(2 * MARGIN + 1, (1,), generator=random, device=random.device)
        positions = first + torch.arange(side, device=random.device)
        degraded, clean = degraded.index_select(axis, positions), clean.index_select(axis, positions)
    return degraded, clean


def vary_colours(images: Tensor, random: Generator) -> Tensor:
    """Random exposure, white balance and contrast."""

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        values = torch.rand(len(images), channels, 1, 1, generator=random, device=random.device)
        return low + (high - low) * values

    gain = uniform(0.7, 1.1) * uniform(0.9, 1.1, channels=3)
    return (images ** uniform(0.75, 1.35) * gain).clamp(0, 1)


def random_kernels(count: int, random: Generator) -> Tensor:
    """Motions of random length and direction, every other one of them curved."""
    length, angle, bend, curved = torch.rand(4, count, generator=random, device=random.device)
    lengths = SHORTEST + (KERNEL - SHORTEST) * length
    return motion_kernels(lengths, 360 * angle, torch.where(curved < 0.5, 0, 0.8 * bend - 0.4))


def motion_kernels(lengths: Tensor, angles: Tensor, bends: Tensor) -> Tensor:
    """As samples.motion_kernel for each of (B,) lengths in pixels and angles in degrees, along arcs.

    An arc with bend b rises by b of its length; b = 0 is straight.  The mean of each motion is in the kernel's centre.
    """
    time = torch.linspace(-0.5, 0.5, 8 * KERNEL, device=lengths.device)
    reach = (lengths - 1)[:, None]
    along, across = reach * time, reach * bends[:, None] * (1 / 3 - 4 * time.square())
    cosine, sine = torch.cos(torch.deg2rad(angles))[:, None], torch.sin(torch.deg2rad(angles))[:, None]
    x, y = along * cosine - across * sine, along * sine + across * cosine
    columns, rows = (F.one_hot((MARGIN + p.round().long()).clamp(0, KERNEL - 1), KERNEL).float() for p in (x, -y))
    return rows.transpose(1, 2) @ columns / len(time)


def degrade(clean: Tensor, kernels: Tensor, sigma: Tensor, random: Generator) -> Tensor:
    """As samples.degrade: blurred, with Gaussian noise of deviation `sigma`, rounded to 8 bits."""
    noise = torch.randn(clean.shape, generator=random, device=clean.device)
    return ((blur(clean, kernels) + sigma * noise).clamp(0, 1) * 255).round() / 255


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolves each image with its own kernel, mirrored at the borders so that the outermost pixels occur twice."""
    batch, channels, *sides = images.shape
    for axis, length in enumerate(sides, start=2):
        positions = torch.arange(-MARGIN, length + MARGIN, device=images.device)
        positions = torch.where(positions < 0, -1 - positions, positions)
        positions = torch.where(positions >= length, 2 * length - 1 - positions, positions)
        images = images.index_select(axis, positions)
    weights = kernels.flip(-1, -2).repeat_interleave(channels, dim=0)[:, None]  # conv2d correlates
    return F.conv2d(images.reshape(1, batch * channels, *images.shape[2:]), weights, groups=batch * channels).reshape(
        batch, channels, *sides
    )
