"""Labels files: which image of a data set belongs to which truth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Tuple

from models.spec import Unusable


def read_labels(file: Path, truth: str) -> Iterator[Tuple[str, str, str]]:
    """(place for messages, image, truth) of each line that is not blank.

    A line is `image<TAB>truth` or a JSON object with "image" (or "path", as infer_trt.py writes it) and `truth`.
    Raises Unusable naming the file and the line that does not fit.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise Unusable(f"labels file {file} cannot be read: {problem}") from problem
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        if line.startswith("{"):
            try:
                entry = json.loads(line)
                image, value = entry["image" if "image" in entry else "path"], entry[truth]
            except (ValueError, KeyError, TypeError) as problem:
                raise Unusable(f'{where}: not a JSON object with "image" and "{truth}"') from problem
        else:
            image, tab, value = line.partition("\t")
            if not tab:
                raise Unusable(f"{where}: no tab between image and {truth}")
        if not (isinstance(image, str) and isinstance(value, str) and image.strip() and value.strip()):
            raise Unusable(f"{where}: image or {truth} is empty or no string")
        yield where, image, value


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What cannot be used inside the block is said to stand at that place of the labels file."""
    try:
        yield
    except Unusable as problem:
        raise Unusable(f"{where}: {problem}") from problem
