"""The contract between a model and the chain.

A model is a folder in `models/` whose `__init__.py` defines `SPEC`, a `ModelSpec`.  Nothing else lists the models.
Importing a model folder imports no PyTorch; only `ModelSpec.load` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Protocol, Tuple, Union

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn


class Unusable(Exception):
    """What the user gave, or what a step before left, cannot be used.

    The message is one line that says what is wrong and, where there is one, the command that mends it.
    """


# ---------------------------------------------------------------------------------------------------------------------
# Parts: what is exported, patched, built and executed as one graph
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dim:
    """A named dynamic dimension: the range that engines are built for, and the sizes that they are tuned for, one
    optimisation profile each."""

    name: str
    minimum: int
    optima: Tuple[int, ...]
    maximum: int
    multiple_of: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a part.

    `shape` holds sizes and names of dims.  An `internal` tensor passes from part to part and never reaches the user:
    it takes the precision of the graph (a K/V cache in FP16), while all others keep `dtype`.  A `chosen` one follows
    from choices, as integers do: another value is no error of rounding; it is computed with in its own `dtype`.
    """

    name: str
    dtype: str
    shape: Tuple[Union[int, str], ...]
    internal: bool = False
    chosen: bool = False

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    @property
    def is_approximate(self) -> bool:
        """Whether its error tells how precisely a part computes."""
        return self.is_float and not self.chosen

    def sizes(self, dims: Mapping[str, int]) -> Tuple[int, ...]:
        """The shape with every name replaced by its size in `dims`."""
        return tuple(dims[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class Part:
    """One graph of a model.

    plugins   how often each plugin's pattern occurs in it: surgery asserts these counts
    time_at   what it is timed at: sizes of the dims, and values of the integer inputs
    """

    name: str
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    dims: Tuple[Dim, ...]
    plugins: Mapping[str, int] = field(default_factory=dict)
    time_at: Tuple[Mapping[str, int], ...] = ()

    def profiles(self) -> List[Dict[str, int]]:
        """The sizes of the dims that engines are tuned for; a dim with fewer optima than others repeats its last."""
        count = max((len(dim.optima) for dim in self.dims), default=1)
        return [{dim.name: dim.optima[min(index, len(dim.optima) - 1)] for dim in self.dims} for index in range(count)]

    @property
    def chosen(self) -> List[str]:
        """The names of the tensors that follow from choices."""
        return [tensor.name for tensor in (*self.inputs, *self.outputs) if tensor.chosen]

    def limits(self) -> Dict[str, Tuple[int, int]]:
        """The smallest and the largest size of each dim."""
        return {dim.name: (dim.minimum, dim.maximum) for dim in self.dims}

    def sizes_of(self, shapes: Mapping[str, Sequence[int]]) -> Dict[str, int]:
        """The sizes of the dims, read off the shapes of the inputs."""
        return {
            size: actual
            for tensor in self.inputs
            for size, actual in zip(tensor.shape, shapes[tensor.name])
            if isinstance(size, str)
        }

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Part:
        def tensors(key: str) -> Tuple[TensorSpec, ...]:
            return tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in data[key])

        dims = tuple(Dim(**{**dim, "optima": tuple(dim["optima"])}) for dim in data["dims"])
        return Part(
            data["name"], tensors("inputs"), tensors("outputs"), dims, dict(data["plugins"]), tuple(data["time_at"])
        )


@dataclass(frozen=True)
class ExportablePart:
    """A part together with the PyTorch module that computes it.

    module    forward(*inputs) → tuple of outputs, both in the order of `part`
    example   (dims, random generator) → valid random inputs by name
    trace_at  sizes of the dims for the example that the exporter sees; 0 and 1 are special to it: avoid them
    check_at  sizes at which the exported graph is compared with the module
    """

    part: Part
    module: nn.Module
    example: Callable[[Mapping[str, int], np.random.Generator], Dict[str, np.ndarray]]
    trace_at: Mapping[str, int]
    check_at: Sequence[Mapping[str, int]]


# ---------------------------------------------------------------------------------------------------------------------
# Execution
# ---------------------------------------------------------------------------------------------------------------------


class Executor(Protocol):
    """Runs the parts of one model.

    Outputs that are not internal are numpy arrays.  Internal ones are opaque: they stay wherever the executor keeps
    them and are only handed back to it.  They, and what `zeros` and `rows` return, may be overwritten when the same is
    asked for again.
    """

    def run(self, part: str, inputs: Mapping[str, Any]) -> Dict[str, Any]:
        """Runs `part` on inputs by name and returns its outputs by name.  Internal ones may still be in the making."""

    def synchronize(self) -> None:
        """Waits for all that runs."""

    def loop(
        self, part: str, inputs: Mapping[str, Any], carried: Mapping[str, str], times: int, until: Optional[str] = None
    ) -> Dict[str, Any]:
        """Runs `part` again and again, and returns the `carried` outputs of its last run.

        carried  output → the input that it is in the next run
        times    of runs, at least one; fewer where `until`, a carried output, is nonzero everywhere.  An executor may
                 see that some runs late: those must not change what the caller looks at
        """

    def limits(self, part: str) -> Mapping[str, Tuple[int, int]]:
        """The smallest and the largest size of each dim of `part`."""

    def latencies(self, part: str, inputs: Mapping[str, Any], repeats: int) -> List[float]:
        """Latencies in ms of `repeats` runs of `part` alone, with inputs and outputs where it computes."""

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> Any:
        """A zero-filled value for the internal input `name` of `part`."""

    def rows(self, value: Any, indices: np.ndarray) -> Any:
        """An internal value whose row i is `value`'s row `indices[i]` (axis 0)."""


def loop_of_runs(
    executor: Executor,
    part: str,
    inputs: Mapping[str, Any],
    carried: Mapping[str, str],
    times: int,
    until: Optional[str] = None,
) -> Dict[str, Any]:
    """`Executor.loop` of an executor that has nothing to gain but by running the part."""
    given = dict(inputs)
    for _ in range(times):
        outputs = executor.run(part, given)
        given.update((source, outputs[output]) for output, source in carried.items())
        if until is not None and np.all(outputs[until]):
            break
    return {output: outputs[output] for output in carried}


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, in PyTorch: on the CPU in FP32, until it is moved.

    weights      one line for every report: where the weights come from, variant, parameter count, seed if random
    settings     all that pre- and post-processing need, as JSON: it travels in the manifest
    original     items → results with the model as its authors run it; None where that is `ModelSpec.run` on the parts
    workloads    `ModelSpec.workloads` as the authors' code does them, by name
    save_assets  writes further files that execution needs (a tokenizer) into the build folder
    """

    weights: str
    parts: Sequence[ExportablePart]
    settings: Dict[str, Any]
    original: Optional[Callable[[Sequence[Any]], List[Any]]] = None
    workloads: Callable[[], Mapping[str, Callable[[], Any]]] = dict
    save_assets: Callable[[Path], None] = lambda folder: None

    def to(self, device: str, dtype: torch.dtype) -> None:
        """Moves the parts, and `original` with them."""
        for exportable in self.parts:
            exportable.module.to(device, dtype)


@dataclass(frozen=True)
class Sample:
    """One input of a comparison; `truth` is what the ideal result would be (an image, a text), None if nobody knows."""

    name: str
    item: Any
    truth: Any


@dataclass(frozen=True)
class StoredSample:
    """A sample of a data set: read from its files each time it is asked for, so that a data set of any length passes
    through memory piece by piece.  It can be pickled."""

    name: str
    read_item: Callable[[], Any]
    read_truth: Optional[Callable[[], Any]] = None

    @property
    def item(self) -> Any:
        return self.read_item()

    @property
    def truth(self) -> Any:
        return self.read_truth() if self.read_truth else None


AnySample = Union[Sample, StoredSample]


@dataclass(frozen=True)
class Metric:
    """Compares results with what is expected of them: the truth, or another executor's results.

    one    numbers of one pair
    total  numbers of many pairs → metrics in the users' units, for example {"PSNR dB": 31.2}
    """

    one: Callable[[Any, Any], Dict[str, float]]
    total: Callable[[Sequence[Mapping[str, float]]], Dict[str, float]]

    def __call__(self, left: Sequence[Any], right: Sequence[Any]) -> Dict[str, float]:
        return self.total([self.one(*pair) for pair in zip(left, right)])


class ResultWriter(Protocol):
    def write(self, path: Path, item: Any, result: Any) -> None:
        """Shows or stores the result for the input file `path`."""


@dataclass(frozen=True)
class Bar:
    """A limit that `compare.py` enforces on a metric."""

    metric: str
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """NaN never meets a bar."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class ModelSpec:
    """What the chain needs to know of a model.

    load        (weights argument, load_options) → LoadedModel (see `export_onnx.py --help`); the only function that
                imports PyTorch
    load_options  what `load` takes by name: further arguments of export_onnx.py
    workloads   settings → what is timed as a whole, by name: (executor) → anything
    is_input    (file in an input folder, settings) → whether it is one, rather than a companion of another
    read        (file, settings) → item; raises Unusable with the file's name
    prepare     (items, settings) → a batch as `run` takes it: what needs no executor, and is done while one is busy
    run         (executor, settings, build folder, batch) → results
    batch_size  how many items a batch should have
    writer      (-o argument or None) → context manager giving a ResultWriter; nothing half-written remains on failure
    samples     settings → the built-in samples
    write_samples  (settings, folder) → stores the samples as files, with a labels.tsv that `labelled` reads
    labelled    (settings, image folder, labels file) → samples from the user's own data, all of which can be read
    score       (result, truth)
    difference  (reference result, result) of one executor and another; its "differing outputs" counts the results that
                users would notice
    badness     `score`'s metrics of one sample → larger, the worse
    describe    result or truth → itself in a line of text
    bars        precision → limits on "part max abs" (largest absolute error of any part) and on `difference`'s metrics
    untouched   item → the result that is the input itself, whose score shows the model's gain; None where there is none
    picture     (result or truth, PNG file) → stores it; None where its description shows it
    """

    name: str
    title: str
    load: Callable[..., LoadedModel]
    read: Callable[[Path, Mapping[str, Any]], Any]
    run: Callable[[Executor, Mapping[str, Any], Path, Any], List[Any]]
    batch_size: int
    writer: Callable[[Optional[Path]], AbstractContextManager[ResultWriter]]
    samples: Callable[[Mapping[str, Any]], List[Sample]]
    write_samples: Callable[[Mapping[str, Any], Path], None]
    labelled: Callable[[Mapping[str, Any], Path, Path], List[StoredSample]]
    score: Metric
    difference: Metric
    badness: Callable[[Mapping[str, float]], float]
    describe: Callable[[Any], str]
    bars: Mapping[str, Sequence[Bar]]
    prepare: Callable[[Sequence[Any], Mapping[str, Any]], Any] = lambda items, settings: items
    untouched: Optional[Callable[[Any], Any]] = None
    picture: Optional[Callable[[Any, Path], None]] = None
    load_options: Sequence[str] = ()
    workloads: Callable[[Mapping[str, Any]], Mapping[str, Callable[[Executor], Any]]] = lambda settings: {}
    is_input: Callable[[Path, Mapping[str, Any]], bool] = lambda path, settings: True

    def results(self, executor: Executor, settings: Mapping[str, Any], folder: Path, items: Sequence[Any]) -> List[Any]:
        """What the model makes of items, in one batch."""
        return self.run(executor, settings, folder, self.prepare(items, settings))


def model_names() -> List[str]:
    """The names of the model folders."""
    return sorted(folder.name for folder in Path(__file__).parent.iterdir() if (folder / "__init__.py").is_file())


def find_model(name: str) -> ModelSpec:
    """The spec of the model `name`; raises Unusable if there is none."""
    if name not in model_names():
        raise Unusable(f"unknown model {name!r}: choose one of {', '.join(model_names())}")
    return importlib.import_module(f"models.{name}").SPEC
