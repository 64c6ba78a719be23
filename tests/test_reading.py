"""infer_trt.py's reading ahead: order, errors, how far it goes, and what the summary says of it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infer_trt import READ_AHEAD, Batch, Stopwatch, read_ahead
from models.images import opened
from models.restormer import SPEC as RESTORMER
from models.spec import Unusable
from models.trocr import SPEC as TROCR
from tests.conftest import MODELS, ROOT, run_step

SIZE = 3  # of a batch


class Files:
    """Numbered files that take a while to read, the later the less; `broken` ones cannot be read."""

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.read_so_far: list[int] = []
        self.spec = replace(TROCR, read=self.read, prepare=self.prepare, batch_size=SIZE)

    def read(self, path: Path, settings: dict[str, Any]) -> int:
        number = int(path.name)
        self.read_so_far.append(number)
        if number in self.broken:
            raise Unusable(f"{path} is broken")
        time.sleep(0.002 * (number % 4 == 0))
        return 10 * number

    def prepare(self, items: list[int], settings: dict[str, Any]) -> int:
        return sum(items)

    def batches(self, count: int) -> Iterator[Batch]:
        return read_ahead(self.spec, {}, [Path(str(number)) for number in range(count)])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 3 * (READ_AHEAD + 1), 100])
def test_every_image_comes_once_and_in_order(count: int) -> None:
    batches = list(Files().batches(count))
    assert [len(batch.paths) for batch in batches[:-1]] == [SIZE] * (len(batches) - 1)
    assert [int(path.name) for batch in batches for path in batch.paths] == list(range(count))
    assert [item for batch in batches for item in batch.items] == list(range(0, 10 * count, 10))
    assert [batch.prepared for batch in batches] == [sum(batch.items) for batch in batches]
    assert all(batch.reading_s >= 0 for batch in batches)


def test_only_so_many_are_read_ahead() -> None:
    files = Files()
    batches = files.batches(100)
    assert files.read_so_far == []
    next(batches)
    time.sleep(0.05)
    assert sorted(files.read_so_far) == list(range(SIZE))  # the model is loaded now, whose time is not the images'
    for turn in range(1, 4):
        next(batches)
        expected = SIZE * (1 + turn + READ_AHEAD)
        while len(files.read_so_far) < expected:
            time.sleep(0.001)
        time.sleep(0.05)
        assert sorted(files.read_so_far) == list(range(expected))
    batches.close()
    assert len(files.read_so_far) <= SIZE * (4 + READ_AHEAD)


@pytest.mark.parametrize("broken", [0, 2, 3, 7, 11])
def test_error_comes_in_its_batchs_turn(broken: int) -> None:
    batches = Files((broken, broken + 1, 30)).batches(40)
    before = [next(batches) for _ in range(broken // SIZE)]
    assert [int(path.name) for batch in before for path in batch.paths] == list(range(broken // SIZE * SIZE))
    with pytest.raises(Unusable, match=f"^{broken} is broken"):
        next(batches)
    assert next(batches, None) is None


def test_reading_does_not_wait_for_who_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one batch is in use, the next ones come to be."""
    monkeypatch.setattr("infer_trt.READERS", 4)
    files = Files()
    files.spec = replace(files.spec, read=lambda path, settings: time.sleep(0.03) or 0)
    started = time.perf_counter()
    for _ in files.batches(12 * SIZE):
        time.sleep(0.05)
    assert time.perf_counter() - started < 12 * 0.05 + 12 * SIZE * 0.03 / 2


@pytest.mark.parametrize("spec", [TROCR, RESTORMER], ids=lambda spec: spec.name)
def test_images_too_large_to_be_true_are_refused_in_every_thread(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters of warnings are common to all threads: one that ends must not take another's with it."""
    settings = {"in_channels": 3, "dual_pixel": False}
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((60, 50, 3), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    filters = list(warnings.filters)

    def read(number: int) -> bool:
        name = "large.png" if number % 3 else "small.png"
        try:
            spec.read(tmp_path / name, settings)
        except Unusable:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(300))) == [number % 3 == 0 for number in range(300)]
    assert warnings.filters == filters
    with opened(tmp_path / "small.png") as image:
        assert image.size == (50, 30)


def test_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is no part of it; what no one watched is writing."""
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch()
    for what, seconds in (("waiting for images", 0.25), ("loading the model", 7), ("execution", 4), ("execution", 5)):
        with watch.on(what):
            now += seconds
    now += 0.75
    assert watch.summary(2000, 4.0) == (
        "2000 images in 10.0 s, 200 a second: waiting for images 0.2 s (2 %), execution 9.0 s (90 %), writing 0.8 s"
        " (8 %); meanwhile threads computed 4.0 s (40 %) to read and prepare them; loading the model took 7.0 s before"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(built: Path, tmp_path: Path) -> list[Path]:
    """A folder's images, more than two batches of them."""
    (tmp_path / "lines").mkdir()
    samples = sorted((built / "samples" / "trocr").glob("*.png"))
    count = 2 * TROCR.batch_size + 5
    return [
        Path(shutil.copy(samples[number % len(samples)], tmp_path / "lines" / f"{number:03}.png"))
        for number in range(count)
    ]


def test_folder_of_several_batches_ends_with_a_summary(built: Path, lines: list[Path]) -> None:
    done = run_step("infer_trt.py", "trocr", lines[0].parent, "--executor", "onnxruntime", "--build-dir", built)
    assert done.returncode == 0, done.stderr
    paths, texts = zip(*(line.split("\t") for line in done.stdout.splitlines()))
    assert list(paths) == [str(path) for path in lines]
    samples = len(list((built / "samples" / "trocr").glob("*.png")))
    assert texts[samples : 2 * samples] == texts[:samples]
    last = done.stderr.splitlines()[-1]
    assert re.match(rf"{len(lines)} images in [\d.]+ s, [\d.]+ a second: waiting for images ", last)


@pytest.mark.parametrize("model", MODELS)
def test_one_image_goes_without_a_summary(built: Path, tmp_path: Path, model: str) -> None:
    image = next((built / "samples" / model).glob("*.png"))
    out = tmp_path / "out"
    done = run_step("infer_trt.py", model, image, "-o", out, "--executor", "onnxruntime", "--build-dir", built)
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_image_in_a_later_batch(built: Path, lines: list[Path], tmp_path: Path) -> None:
    """What comes before its batch is shown; no file is left, not even a part of one."""
    bad, out = lines[TROCR.batch_size + 2], tmp_path / "out.jsonl"
    bad.write_bytes(bad.read_bytes()[:200])
    done = run_step(
        "infer_trt.py", "trocr", lines[0].parent, "-o", out, "--executor", "onnxruntime", "--build-dir", built
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"infer_trt.py: {bad} cannot be read")
    assert "Traceback" not in done.stderr and "images in" not in done.stderr
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [
        str(path) for path in lines[: TROCR.batch_size]
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]


def test_interrupted(built: Path, lines: list[Path], tmp_path: Path) -> None:
    for number in range(4 * TROCR.batch_size):  # so that it is not done before the signal comes
        shutil.copy(lines[0], lines[0].with_name(f"more-{number:03}.png"))
    command = ["infer_trt.py", "trocr", lines[0].parent, "-o", tmp_path / "out.jsonl", "--executor", "onnxruntime"]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--build-dir", str(built)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith(str(lines[0]))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]
