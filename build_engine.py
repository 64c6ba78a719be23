"""Step 3: build TensorRT engines from the patched graphs.

    python build_engine.py restormer
    python build_engine.py trocr --precision fp16
    python build_engine.py restormer --compute-capability 8.6 8.9
    python build_engine.py restormer --largest batch=1 height=512 width=512     for GPUs with little memory

Reads build/<model>/<part>.<precision>.onnx and leaves build/<model>/<part>.<precision>.engine.  With `tensorrt` and a
GPU the engine is built for that GPU; on a machine without one, TensorRT-RTX (`pip install tensorrt-rtx`) builds for the
compute capabilities asked for.  Kernel timings are kept in build/*.timings, and make a second build quicker.

Plugin nodes run the kernels of build/plugins/libtrt_graft.so where that library is built (plugins/CMakeLists.txt says
how); else they are built from their ONNX functions, and the engine needs no library.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import time
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple

import plugins
from models.chain import PRECISIONS, BuildFolder, parser, replacing, run_script
from models.spec import Dim, Part, TensorSpec, Unusable

COMPUTE_CAPABILITIES = ("8.9", "12.0")  # what TensorRT-RTX builds for unless asked otherwise


@dataclass(frozen=True)
class TensorRT:
    """The TensorRT of this interpreter.  Everything that depends on its version is a capability asked for here."""

    module: ModuleType
    name: str
    builds_without_gpu: bool

    @property
    def version(self) -> str:
        return self.module.__version__

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def network_flags(self) -> int:
        """Explicit batch where it is still a choice, strong typing where it exists."""
        flags = self.module.NetworkDefinitionCreationFlag
        chosen = [getattr(flags, name) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name)]
        return sum(1 << int(flag) for flag in chosen)

    @property
    def strongly_typed(self) -> bool:
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    def started(self, kind: str, logger: Any) -> Any:
        """The module's Builder or Runtime; raises Unusable where CUDA does not let it begin."""
        try:
            made = getattr(self.module, kind)(logger)
        except TypeError:  # what pybind11 makes of a null pointer
            made = None
        if made is None:
            raise Unusable(f"{self} cannot start here: is a GPU there, and its driver new enough?")
        return made

    def scratch_bytes(self, engine: Any) -> int:
        """Device memory for intermediate results, enough for any shapes that the engine takes."""
        return engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size

    def context(self, engine: Any, scratch: int, size: int) -> Any:
        """An execution context that keeps intermediate results at the address `scratch`."""
        if hasattr(self.module, "ExecutionContextAllocationStrategy"):
            context = engine.create_execution_context(self.module.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.set_device_memory(scratch, size)
        else:
            context = engine.create_execution_context_without_device_memory()
            context.device_memory = scratch
        return context

    def compute_capabilities(self, wanted: Sequence[str]) -> List[Any]:
        """The module's constants for versions such as "8.9"; raises Unusable for one that it cannot build for."""
        known = self.module.ComputeCapability
        names = {f"{name[2:-1]}.{name[-1]}": name for name in dir(known) if name.startswith("SM")}
        for version in wanted:
            if version not in names:
                choices = ", ".join(sorted(names, key=float))
                raise Unusable(f"{self} cannot build for compute capability {version}: choose from {choices}")
        return [getattr(known, names[version]) for version in wanted]


def find_tensorrt() -> TensorRT:
    """TensorRT where a GPU is there to build on, else TensorRT-RTX."""
    if gpu_name() is not None:
        try:
            return TensorRT(importlib.import_module("tensorrt"), "TensorRT", builds_without_gpu=False)
        except ImportError:
            pass
    try:
        return TensorRT(importlib.import_module("tensorrt_rtx"), "TensorRT-RTX", builds_without_gpu=True)
    except ImportError as problem:
        raise Unusable(
            "no TensorRT that can build here: use the container (./start.sh) on a machine with a GPU, "
            "or `pip install tensorrt-rtx` on any"
        ) from problem


def gpu_name() -> Optional[str]:
    """The first device that the CUDA driver sees, or None."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    name = ctypes.create_string_buffer(256)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetName(name, len(name), 0) != 0:
        return None
    return name.value.decode()


def identity(tensorrt: TensorRT) -> Dict[str, Optional[str]]:
    """What an engine depends on: TensorRT's version, the GPU, and the plugin library, by its hash."""
    library = None if tensorrt.builds_without_gpu else plugins.library_path()
    return {
        "tensorrt": str(tensorrt),
        "gpu": None if tensorrt.builds_without_gpu else gpu_name(),
        "plugins": hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library else None,
    }


def build(
    tensorrt: TensorRT,
    part: Part,
    source: Path,
    precision: str,
    capabilities: Sequence[str],
    timings: Path,
    isolated: bool = False,
) -> bytes:
    """Parses a patched graph and builds its engine; raises Unusable with the nodes that TensorRT refuses.

    timings   a file with the kernel timings of earlier builds, which is brought up to date
    isolated  a single node's graph, of static shapes: images in FP16 may be channel-last at its ends where TensorRT is
              quicker so, as they are between the layers of a network
    """
    trt = tensorrt.module
    logger = trt.Logger(trt.Logger.ERROR)
    builder = tensorrt.started("Builder", logger)
    network = builder.create_network(tensorrt.network_flags)
    onnx_parser = trt.OnnxParser(network, logger)
    with_plugins = not tensorrt.builds_without_gpu and plugins.load_library() is not None
    if not onnx_parser.parse(graph_for_parser(source, with_plugins)):
        errors = [describe(onnx_parser.get_error(index)) for index in range(onnx_parser.num_errors)]
        raise Unusable(f"{tensorrt} cannot parse {source}: {'; '.join(errors)}")

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if precision == "fp16" and not tensorrt.strongly_typed:
        config.set_flag(trt.BuilderFlag.FP16)
    if isolated:
        for tensor in ends_of(network):
            if len(tensor.shape) == 4 and tensor.dtype == trt.float16:
                tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR) | 1 << int(trt.TensorFormat.HWC8)
    for sizes in [] if isolated else part.profiles():
        profile = builder.create_optimization_profile()
        for tensor in part.inputs:
            profile.set_shape(tensor.name, *profile_shapes(part, tensor, sizes))
        config.add_optimization_profile(profile)
    if tensorrt.builds_without_gpu:
        for_compute_capabilities(config, tensorrt.compute_capabilities(capabilities))
    else:
        for_this_gpu(trt, config)
        config.set_timing_cache(config.create_timing_cache(timings.read_bytes() if timings.is_file() else b""), False)

    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise Unusable(f"{tensorrt} failed to build {source}; its log above says why")
    if not tensorrt.builds_without_gpu:
        with replacing(timings) as temporary:
            temporary.write_bytes(config.get_timing_cache().serialize())
    return bytes(engine)


def ends_of(network: Any) -> List[Any]:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    return inputs + [network.get_output(index) for index in range(network.num_outputs)]


def for_compute_capabilities(config: Any, chosen: Sequence[Any]) -> None:
    config.num_compute_capabilities = len(chosen)
    for index, capability in enumerate(chosen):
        config.set_compute_capability(capability, index)


def for_this_gpu(trt: ModuleType, config: Any) -> None:
    """Settings that newer TensorRT lines have by default: no kernels of other libraries, and several execution contexts
    for one optimisation profile."""
    sources = config.get_tactic_sources()
    for name in ("CUBLAS", "CUBLAS_LT", "CUDNN"):
        if hasattr(trt.TacticSource, name):
            sources &= ~(1 << int(getattr(trt.TacticSource, name)))
    config.set_tactic_sources(sources)
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def graph_for_parser(source: Path, with_plugins: bool) -> bytes:
    """The graph without functions: some parsers would take them in place of plugins, others know none.

    Without plugins the functions are written out in place of their nodes.
    """
    try:
        import onnx.inliner
    except ImportError:  # as may be in the Python 3.9 that TensorRT 8.6 wants, whose parser passes over functions
        return source.read_bytes()
    model = onnx.load(source)
    if with_plugins:
        del model.functions[:]
    else:
        model = onnx.inliner.inline_local_functions(model)
    return model.SerializeToString()


def profile_shapes(part: Part, tensor: TensorSpec, sizes: Mapping[str, int]) -> List[Sequence[int]]:
    """The smallest shape of an input, the one at the sizes that a profile is tuned for, and the largest."""
    return [
        tensor.sizes({dim.name: dim.minimum for dim in part.dims}),
        tensor.sizes(sizes),
        tensor.sizes({dim.name: dim.maximum for dim in part.dims}),
    ]


def size(text: str) -> Tuple[str, int]:
    """`batch=1` as a pair; what argparse expects of a type."""
    name, _, value = text.partition("=")
    if not value.isdigit() or int(value) < 1:
        raise ArgumentTypeError(f"{text!r} is not DIM=SIZE")
    return name, int(value)


def capped(part: Part, largest: Mapping[str, int]) -> Part:
    """The part with no dim larger than it is in `largest`, nor tuned for larger sizes."""

    def cap(dim: Dim) -> Dim:
        limit = min(dim.maximum, largest.get(dim.name, dim.maximum))
        if limit < dim.minimum:
            raise Unusable(f"--largest: {dim.name} begins at {dim.minimum}")
        return replace(dim, optima=tuple(dict.fromkeys(min(tuned, limit) for tuned in dim.optima)), maximum=limit)

    return replace(part, dims=tuple(cap(dim) for dim in part.dims))


def describe(error: Any) -> str:
    """A parser error with the node it is about, where this TensorRT tells it."""
    node = error.node_name() if hasattr(error, "node_name") else f"node {error.node()}"
    return f"{node}: {error.desc()}"


def trtexec_line(tensorrt: TensorRT, part: Part, engine: Path) -> str:
    """The command that times the engine, at the shapes of its first profile, with NVIDIA's own tool."""
    tool = "tensorrt_rtx" if tensorrt.builds_without_gpu else "trtexec"
    sizes = part.profiles()[0]
    shapes = ",".join(f"{tensor.name}:{'x'.join(map(str, tensor.sizes(sizes)))}" for tensor in part.inputs)
    library = None if tensorrt.builds_without_gpu else plugins.library_path()
    return f"{tool} --loadEngine={engine} --shapes={shapes}" + (f" --staticPlugins={library}" if library else "")


def has_plugins(manifest: Mapping[str, Any], precision: str) -> bool:
    """Whether surgery has left any plugin in a precision's graphs."""
    parts = manifest.get("patched", {}).get(precision, {}).values()
    return any(set(plugins.names()) - set(part.get("without", ())) for part in parts)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--precision", choices=PRECISIONS, default="fp32", help="which patched graph (fp32)")
    arguments.add_argument(
        "--compute-capability",
        nargs="+",
        default=list(COMPUTE_CAPABILITIES),
        metavar="X.Y",
        help=f"what TensorRT-RTX builds for ({' '.join(COMPUTE_CAPABILITIES)})",
    )
    arguments.add_argument(
        "--largest",
        nargs="+",
        type=size,
        default=[],
        metavar="DIM=SIZE",
        help="largest sizes that the engine takes, for less GPU memory: batch=1 height=512",
    )
    options = arguments.parse_args()
    folder = BuildFolder(options.build_dir, options.model)
    manifest = folder.manifest()
    parts = [capped(part, dict(options.largest)) for part in folder.parts()]
    sources = {
        part.name: folder.require(
            folder.onnx(part.name, options.precision), "surgeon.py", "--precision", options.precision
        )
        for part in parts
    }
    unknown = set(dict(options.largest)) - {dim.name for part in parts for dim in part.dims}
    if unknown:
        known = sorted({dim.name for part in parts for dim in part.dims})
        raise Unusable(f"--largest: no dim is called {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    tensorrt = find_tensorrt()
    target = (
        f"compute capability {', '.join(options.compute_capability)}" if tensorrt.builds_without_gpu else "this GPU"
    )
    library = identity(tensorrt)["plugins"]
    print(f"building with {tensorrt} for {target}, {'with' if library else 'without'} the plugin library")
    if not library and options.precision == "fp16" and has_plugins(manifest, options.precision):
        plain = folder.command("surgeon.py", "--precision", "fp16", "--without", "all")
        print(f"  plugins are built from ONNX functions, which compute in FP32: `{plain}` leaves FP16 layers instead")
    engines: Dict[str, Any] = {}
    timings = options.build_dir / f"{tensorrt.version}-{gpu_name()}.timings".replace(" ", "-")
    for part in parts:
        started = time.perf_counter()
        engine = build(tensorrt, part, sources[part.name], options.precision, options.compute_capability, timings)
        path = folder.engine(part.name, options.precision)
        with replacing(path) as temporary:
            temporary.write_bytes(engine)
        seconds = time.perf_counter() - started
        engines[part.name] = {**identity(tensorrt), "built_for": target, "build_s": round(seconds, 1)}
        print(f"{path}: {len(engine) / 1e6:.1f} MB in {seconds:.1f} s\n  {trtexec_line(tensorrt, part, path)}")
    manifest.setdefault("engines", {})[options.precision] = engines
    folder.write_manifest(manifest)
    return 0


if __name__ == "__main__":
    run_script(main)
