"""The chain's scripts as users run them, and a build folder that they have filled once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = ("restormer", "trocr")


def run_step(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `script.py ARGUMENT...` with this interpreter, in an empty current folder unless `cwd` is given."""
    script, *rest = map(str, arguments)
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest], cwd=cwd, env=environment, text=True, capture_output=True
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with both models' demo variants exported and patched in both precisions.  Not to be changed."""
    folder = tmp_path_factory.mktemp("build")
    for model in MODELS:
        for step in (
            ("export_onnx.py", model, "--weights", "demo"),
            ("surgeon.py", model, "--precision", "fp32"),
            ("surgeon.py", model, "--precision", "fp16"),
            ("compare.py", model, "--write-samples", folder / "samples" / model),
        ):
            done = run_step(*step, "--build-dir", folder)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def built_beams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with TrOCR's demo variant alone, for a search with three beams."""
    folder = tmp_path_factory.mktemp("beams")
    for step in (
        ("export_onnx.py", "trocr", "--num-beams", 3),
        ("surgeon.py", "trocr", "--precision", "fp32"),
        ("surgeon.py", "trocr", "--precision", "fp16"),
    ):
        done = run_step(*step, "--build-dir", folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "build"))


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs a step that must end with status 2 and one line on stderr, and returns that line."""

    def check(*arguments: object) -> str:
        done = run_step(*arguments, cwd=tmp_path)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith(f"{arguments[0]}: ")
        return lines[0]

    return check
