"""Restores pictures of any size with a network that takes sides within a range and multiples of 8.

Small pictures are padded by reflection; large ones are cut into overlapping tiles of equal size, whose results are
blended with linear ramps, so that no seam shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, List

import numpy as np

from models.restormer.images import Picture
from models.spec import Executor

MULTIPLE = 8
OVERLAP = 64  # pixels that neighbouring tiles share


def run(executor: Executor, settings: Mapping[str, Any], folder: Path, items: Sequence[Picture]) -> List[np.ndarray]:
    """Restores each picture; results are (H, W, channels of the picture), float32, not yet clipped to 0…1."""
    return [restore(executor, settings, picture.pixels) for picture in items]


def restore(executor: Executor, settings: Mapping[str, Any], pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) → (H, W, C) for a network of any channel count.

    A gray picture goes through a colour network three times over and comes back as the mean of the channels; a colour
    picture goes through a gray network channel by channel.  A dual-pixel pair (H, W, 6) gives (H, W, 3).
    """
    planes = pixels.transpose(2, 0, 1)  # (C, H, W)
    channels, wanted = planes.shape[0], settings["in_channels"]
    sizes = executor.limits("network")
    limits = sizes["height"], sizes["width"]

    def network(image: np.ndarray) -> np.ndarray:
        return executor.run("network", {"image": np.ascontiguousarray(image)})["restored"]

    if channels == wanted:
        restored = restore_tiled(network, planes[None], limits)[0]
    elif channels == 1:
        restored = restore_tiled(network, np.repeat(planes[None], wanted, axis=1), limits)[0].mean(
            axis=0, keepdims=True
        )
    else:
        restored = np.concatenate([restore_tiled(network, plane[None, None], limits)[0] for plane in planes])
    return restored.transpose(1, 2, 0)


def restore_tiled(network: Any, image: np.ndarray, limits: Sequence[Sequence[int]]) -> np.ndarray:
    """(1, C, H, W) → (1, C', H, W) with `network`, whose sides lie within `limits` ((min, max) of H and of W)."""
    height, width = image.shape[2:]
    padding = [(0, 0), (0, 0)]
    for side, (minimum, _) in zip((height, width), limits):
        padding.append((0, max(minimum, -(-side // MULTIPLE) * MULTIPLE) - side))
    padded = np.pad(image, padding, mode="reflect")
    rows = tiles(padded.shape[2], limits[0][1])
    columns = tiles(padded.shape[3], limits[1][1])
    if len(rows) == len(columns) == 1:
        return network(padded)[:, :, :height, :width]

    results = [
        (row, column, np.outer(row_ramp, column_ramp), network(padded[:, :, row, column]))
        for row, row_ramp in rows
        for column, column_ramp in columns
    ]
    blended = np.zeros((1, results[0][3].shape[1], *padded.shape[2:]), np.float32)
    weight = np.zeros(padded.shape[2:], np.float32)
    for row, column, ramp, tile in results:
        blended[:, :, row, column] += tile * ramp
        weight[row, column] += ramp
    return (blended / weight)[:, :, :height, :width]


def tiles(length: int, limit: int) -> list[tuple[slice, np.ndarray]]:
    """Covers `length` pixels with equal tiles of at most `limit`, multiples of 8.  They overlap by at least OVERLAP, or
    by half a tile where tiles are small.

    Each tile comes with its blending weights, which fall towards the sides it shares with a neighbour.
    """
    if length <= limit:
        return [(slice(0, length), np.ones(length, np.float32))]
    limit -= limit % MULTIPLE
    overlap = min(OVERLAP, limit // 2)
    count = -(-(length - overlap) // (limit - overlap))
    size = -(-(length + (count - 1) * overlap) // (count * MULTIPLE)) * MULTIPLE
    starts = [round(index * (length - size) / (count - 1)) for index in range(count)]
    made = []
    for index, start in enumerate(starts):
        ramp = np.ones(size, np.float32)
        if index > 0:
            shared = starts[index - 1] + size - start
            ramp[:shared] = np.arange(1, shared + 1) / (shared + 1)
        if index < count - 1:
            shared = start + size - starts[index + 1]
            ramp[-shared:] = np.minimum(ramp[-shared:], np.arange(shared, 0, -1) / (shared + 1))
        made.append((slice(start, start + size), ramp))
    return made
