"""What the five scripts share: their command line, their exit status, and the build folder with its manifest.

build/<model>/manifest.json                 weights, parts, settings, and what each later step did
build/<model>/<part>.onnx                   export_onnx.py
build/<model>/<part>.check.npz              valid random inputs, which later steps check their graphs with
build/<model>/<part>.<precision>.onnx       surgeon.py
build/<model>/<part>.<precision>.engine     build_engine.py
build/<model>/report.*, report/, ablation.*, drift.md, keep-fp32.txt     compare.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np

from models.spec import ModelSpec, Part, Unusable, find_model, model_names

PRECISIONS = ("fp32", "fp16")
UMASK = threading.Lock()  # it belongs to all threads, and is read by setting it


def parser(script_doc: str) -> argparse.ArgumentParser:
    """An argument parser with the arguments that every script takes."""
    made = argparse.ArgumentParser(description=script_doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", metavar="MODEL", help=" or ".join(model_names()))
    made.add_argument("--build-dir", type=Path, default=Path("build"), help="where the steps leave their files (build)")
    return made


def run_script(main: Callable[[], int]) -> None:
    """Runs a script's main and exits with its status; an unusable input is one line on stderr and status 2."""
    try:
        sys.exit(main())
    except Unusable as problem:
        message = " ".join(str(problem).split())
    except OSError as problem:
        message = f"{problem.filename}: {problem.strerror}" if problem.filename else str(problem)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it becomes `path` when the block succeeds, and vanishes when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with UMASK:
            umask = os.umask(0)
            os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class BuildFolder:
    """The folder `build/<model>` and its manifest."""

    def __init__(self, build_dir: Path, model: str) -> None:
        self.spec: ModelSpec = find_model(model)
        self.path = build_dir / model

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    def onnx(self, part: str, precision: str = "") -> Path:
        """The exported graph, or the patched one of a precision."""
        return self.path / (f"{part}.{precision}.onnx" if precision else f"{part}.onnx")

    def engine(self, part: str, precision: str) -> Path:
        return self.path / f"{part}.{precision}.engine"

    def command(self, script: str, *arguments: str) -> str:
        """The command line that runs another step on this folder."""
        build_dir = [] if self.path.parent == Path("build") else ["--build-dir", str(self.path.parent)]
        return " ".join(["python", script, self.spec.name, *arguments, *build_dir])

    def require(self, path: Path, script: str, *arguments: str) -> Path:
        """`path`, if the step that makes it has run; else raises Unusable naming that step's command."""
        if not path.is_file():
            raise Unusable(f"{path} is missing: run `{self.command(script, *arguments)}` first")
        return path

    def manifest(self) -> Dict[str, Any]:
        path = self.require(self.manifest_path, "export_onnx.py")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise Unusable(f"{path} is damaged: run `{self.command('export_onnx.py')}` again") from problem

    def write_manifest(self, manifest: Dict[str, Any]) -> None:
        with replacing(self.manifest_path) as temporary:
            temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def clear(self) -> None:
        """Removes what all steps have left: it belongs to other weights than those about to be exported."""
        self.manifest_path.unlink(missing_ok=True)
        if self.path.is_dir():
            for path in self.path.iterdir():
                if path.suffix in (".onnx", ".npz", ".engine"):
                    path.unlink()

    def parts(self) -> List[Part]:
        return [Part.from_json(part) for part in self.manifest()["parts"]]

    def write_check_inputs(self, part: Part, sets: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Keeps input sets of different sizes for the steps that have no PyTorch model to make them."""
        with replacing(self.path / f"{part.name}.check.npz") as temporary:
            named: Dict[str, Any] = {
                f"{n}/{key}": values for n, inputs in enumerate(sets) for key, values in inputs.items()
            }
            np.savez(temporary, **named)

    def check_inputs(self, part: Part) -> List[Dict[str, np.ndarray]]:
        path = self.require(self.path / f"{part.name}.check.npz", "export_onnx.py")
        sets: Dict[str, Dict[str, np.ndarray]] = {}
        with np.load(path) as stored:
            for key in stored.files:
                number, name = key.split("/", 1)
                sets.setdefault(number, {})[name] = stored[key]
        return list(sets.values())
