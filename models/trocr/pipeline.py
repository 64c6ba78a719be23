"""From images to texts with any executor, and what is shown and stored of them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence

import numpy as np
from PIL import Image

from models.chain import replacing
from models.spec import Executor, ResultWriter, Unusable
from models.trocr import tokenizer
from models.trocr.decoding import Decoded, Generation, decode
from models.trocr.images import preprocess

CACHE_STEP = 8  # cache capacities are multiples of this: few distinct shapes, aligned rows
TIMED_TOKENS = 20
TIMED_BATCHES = (1, 8, 32)
MAX_ROWS = 64  # of the largest batch that engines are built for; a beam search takes num_beams rows for each image
TUNED_ROWS = (1, 32)


@dataclass(frozen=True)
class TextResult:
    """The text of one image, its token ids (no start token, no padding; the end token is kept), a beam search's score
    (log probability / length ** length_penalty)."""

    text: str
    ids: List[int]
    score: Optional[float] = None


def cache_capacity(max_length: int, max_positions: int) -> int:
    """Positions of the K/V cache for sequences of up to `max_length` tokens."""
    return min(-(-max_length // CACHE_STEP) * CACHE_STEP, max_positions)


def results_of(decoded: Sequence[Decoded], reader: tokenizer.Tokenizer, clean_up: bool) -> List[TextResult]:
    return [TextResult(tokenizer.text_of(reader, one.ids, clean_up), one.ids, one.score) for one in decoded]


def prepare(items: Sequence[Image.Image], settings: Mapping[str, Any]) -> np.ndarray:
    return preprocess(items, settings["images"])


def run(executor: Executor, settings: Mapping[str, Any], folder: Path, pixel_values: np.ndarray) -> List[TextResult]:
    """Recognises the text in each prepared image (B, 3, H, W); `folder` holds the tokenizer."""
    reader = tokenizer.saved(folder)
    generation = Generation.from_json(settings["generation"])
    rows = generation.num_beams // generation.step_beams  # of the step, for each image
    at_once = max(1, executor.limits("step")["batch"][1] // rows)
    decoded: List[Decoded] = []
    for start in range(0, len(pixel_values), at_once):
        decoded += recognise(executor, settings, generation, pixel_values[start : start + at_once])
    return results_of(decoded, reader, settings["clean_up"])


def recognise(
    executor: Executor, settings: Mapping[str, Any], generation: Generation, pixel_values: np.ndarray
) -> List[Decoded]:
    """Token ids of pre-processed images (B, 3, H, W), at most as many as the parts take rows, beams counted."""
    capacity = cache_capacity(generation.max_length, settings["max_positions"])
    hidden = executor.run("encoder", {"pixel_values": pixel_values})["encoder_hidden"]
    return decode(executor, hidden, len(pixel_values), generation, settings["layers"], capacity)


def workloads(settings: Mapping[str, Any]) -> Dict[str, Callable[[Executor], List[Decoded]]]:
    """Decoding of a fixed number of tokens by the step, from pre-processed images to token ids; rows that end are
    padded."""
    generation = Generation.from_json(settings["generation"])
    beams = generation.step_beams
    timed = replace(generation, max_length=1 + TIMED_TOKENS, num_beams=beams, eos=(), forced_eos=())
    return {
        name: partial(recognise, settings=settings, generation=timed, pixel_values=pixel_values)
        for name, pixel_values in timed_images(settings["images"], beams).items()
    }


def timed_images(settings: Mapping[str, Any], beams: int) -> Dict[str, np.ndarray]:
    """Random pre-processed images by the name of the workload that reads them."""
    random = np.random.default_rng(0)
    search = "" if beams == 1 else f"beam {beams}, "
    return {
        f"batch {batch}, {search}{TIMED_TOKENS} tokens": random.uniform(
            -1, 1, (batch, 3, settings["height"], settings["width"])
        ).astype(np.float32)
        for batch in (*TIMED_BATCHES, MAX_ROWS)
        if batch * beams <= MAX_ROWS
    }


class TextWriter:
    """Prints `<path>TAB<text>`, and writes {"path", "text", "ids"} as a line of JSON where there is a file for it."""

    def __init__(self, lines: Optional[IO[str]]) -> None:
        self._lines = lines

    def write(self, path: Path, item: Any, result: TextResult) -> None:
        print(f"{path}\t{result.text}", flush=True)
        if self._lines:
            line = {"path": str(path), "text": result.text, "ids": result.ids}
            self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")


@contextmanager
def writer(out: Optional[Path]) -> Iterator[ResultWriter]:
    """Shows results; with a file `out` also stores them there, once all are written."""
    if out is None:
        yield TextWriter(None)
        return
    if out.is_dir():
        raise Unusable(f"{out} is a folder: -o takes the name of a file of JSON lines")
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as lines:
        yield TextWriter(lines)
