"""Restormer's weights: the authors' checkpoints, random ones, and the part that is exported."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.restormer.network import Architecture, GatedFeedForward, Restormer
from models.spec import Dim, ExportablePart, LoadedModel, Part, TensorSpec, Unusable

PUBLISHED = Architecture()
TASKS = {
    "motion-deblurring": PUBLISHED,
    "deraining": PUBLISHED,
    "defocus-deblurring": PUBLISHED,
    "dual-pixel-defocus-deblurring": replace(PUBLISHED, in_channels=6, dual_pixel=True),
    "gaussian-color-denoising": replace(PUBLISHED, norm_bias=False),
    "gaussian-gray-denoising": replace(PUBLISHED, in_channels=1, out_channels=1, norm_bias=False),
    "real-denoising": replace(PUBLISHED, norm_bias=False),
}
DEMO = Path(__file__).parent / "demo/restormer.safetensors"
SEED = 0


def load(weights: str) -> LoadedModel:
    """`demo`, `random`, `random:TASK` or a checkpoint file; raises Unusable for anything else."""
    kind, _, variant = weights.partition(":")
    if weights == "demo":
        network = read_checkpoint(DEMO)
        origin = "demo weights, trained by this project against camera shake and noise"
    elif kind == "random":
        task = variant or "motion-deblurring"
        if task not in TASKS:
            raise Unusable(f"unknown Restormer task {task!r}: choose one of {', '.join(TASKS)}")
        network = random_network(TASKS[task])
        origin = f"random weights, seed {SEED}, published architecture for {task}"
    else:
        network = read_checkpoint(Path(weights))
        origin = f"checkpoint {Path(weights).name}"
    network.eval()
    parameters = f"{sum(parameter.numel() for parameter in network.parameters()):,}".replace(",", " ")
    exportable = exportable_part(with_whole_packs(network))
    settings = {
        "in_channels": network.architecture.in_channels,
        "out_channels": network.architecture.out_channels,
        "dual_pixel": network.architecture.dual_pixel,
    }

    return LoadedModel(f"{origin}, {parameters} parameters", (exportable,), settings)


def random_network(architecture: Architecture) -> Restormer:
    """PyTorch's usual initialisation, with norms and temperatures moved off their neutral values."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        network = Restormer(architecture)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if ".norm" in name:
                    parameter += 0.1 * torch.randn_like(parameter)
                elif name.endswith("temperature"):
                    parameter *= 0.5 + torch.rand_like(parameter)
    return network


def read_checkpoint(path: Path) -> Restormer:
    """A network with the weights of a checkpoint; its variant is read off the tensors.

    Accepts {"params": …}, {"params_ema": …}, {"state_dict": …}, a bare state dict, or safetensors.
    """
    if not path.is_file():
        raise Unusable(f"no checkpoint {path}: give a file, `random`, `random:TASK` or `demo`")
    tensors = read_tensors(path)
    architecture = architecture_of(tensors, path)
    try:
        with torch.device("meta"):
            network = Restormer(architecture)
    except RuntimeError as problem:
        raise Unusable(f"{path} is no Restormer checkpoint: {problem}") from problem
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": [name for name in expected if name in found and found[name] != expected[name]],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} tensors {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for what, names in problems.items()
            if names
        )
        raise Unusable(f"{path} does not fit Restormer: {listed}")
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return network


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # each format fails in its own way; none of them loads
        raise Unusable(f"{path} cannot be read as a checkpoint of tensors ({type(problem).__name__})") from problem
    for key in ("params_ema", "params", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise Unusable(f"{path} holds no state dict: expected tensors by name, or such a dict under `params`")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def architecture_of(tensors: Mapping[str, Tensor], path: Path) -> Architecture:
    """Reads the variant off the names and shapes of a state dict."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise Unusable(f"{path} does not fit Restormer: tensor {name} is missing")
        return tuple(tensors[name].shape)

    def depth(level: str) -> int:
        return len({name.split(".")[1] for name in tensors if name.startswith(f"{level}.")})

    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    dim, in_channels = shape("patch_embed.proj.weight")[:2]
    hidden = [shape(f"{level}.0.ffn.project_out.weight")[1] for level in levels]
    # hidden = ⌊width · expansion⌋ at every level, so the expansion lies in an interval: take its middle
    lower = max(size / (dim << level) for level, size in enumerate(hidden))
    upper = min((size + 1) / (dim << level) for level, size in enumerate(hidden))
    first, second, third, fourth = levels
    return Architecture(
        in_channels=in_channels,
        out_channels=shape("output.weight")[0],
        dim=dim,
        num_blocks=(depth(first), depth(second), depth(third), depth(fourth)),
        num_refinement_blocks=depth("refinement"),
        heads=tuple(shape(f"{level}.0.attn.temperature")[0] for level in levels),  # type: ignore[arg-type]
        ffn_expansion=(lower + upper) / 2,
        bias="patch_embed.proj.bias" in tensors,
        norm_bias="encoder_level1.0.norm1.body.bias" in tensors,
        dual_pixel="skip_conv.weight" in tensors,
    )


def with_whole_packs(network: Restormer) -> Restormer:
    """The same function with hidden widths rounded up to multiples of 8, by channels whose weights are zero.

    Restormer's 127, 255, 510 and 1021 leave no row of pixels on a boundary that tensor cores and 16-byte loads want.
    """
    network = copy.deepcopy(network)
    for feed_forward in [module for module in network.modules() if isinstance(module, GatedFeedForward)]:
        hidden = feed_forward.project_out.in_channels
        missing = -hidden % 8

        def padded(halves: Tensor, missing: int = missing) -> nn.Parameter:
            """(2·hidden, …): zeros behind the gate's half and behind the value's."""
            return nn.Parameter(
                torch.cat([F.pad(half, [0, 0] * (half.ndim - 1) + [0, missing]) for half in halves.chunk(2)])
            )

        for convolution in (feed_forward.project_in, feed_forward.dwconv):
            convolution.out_channels = 2 * (hidden + missing)
            convolution.weight = padded(convolution.weight)
            if convolution.bias is not None:
                convolution.bias = padded(convolution.bias)
        feed_forward.dwconv.in_channels = feed_forward.dwconv.groups = 2 * (hidden + missing)
        feed_forward.project_out.in_channels = hidden + missing
        feed_forward.project_out.weight = nn.Parameter(F.pad(feed_forward.project_out.weight, [0, 0, 0, 0, 0, missing]))
    return network


def exportable_part(network: Restormer) -> ExportablePart:
    architecture = network.architecture
    blocks = architecture.total_blocks
    part = Part(
        name="network",
        inputs=(TensorSpec("image", "float32", ("batch", architecture.in_channels, "height", "width")),),
        outputs=(TensorSpec("restored", "float32", ("batch", architecture.out_channels, "height", "width")),),
        dims=(
            Dim("batch", 1, (1,), 8),
            Dim("height", 64, (256,), 720, multiple_of=8),
            Dim("width", 64, (256,), 1280, multiple_of=8),
        ),
        plugins={
            "channel_layer_norm": 2 * blocks,
            "norm_pointwise_conv": 2 * blocks,
            "pointwise_conv_residual": 2 * blocks + architecture.dual_pixel,  # the skip around the whole network
            "transposed_attention": blocks,
            "transposed_attention_block": blocks,
            "transposed_attention_residual": blocks,
            "depthwise_conv": blocks,
            "gated_depthwise_conv": blocks,
            "gated_feed_forward": blocks,
            "pixel_unshuffle": 3,
            "pixel_shuffle": 3,
        },
        time_at=tuple(
            dict(batch=batch, height=height, width=width)
            for batch, height, width in ((1, 256, 256), (8, 256, 256), (1, 720, 1280))
        ),
    )

    def example(dims: Mapping[str, int], random: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": random.random(part.inputs[0].sizes(dims), dtype=np.float32)}

    return ExportablePart(
        part,
        network,
        example,
        trace_at={"batch": 2, "height": 32, "width": 40},
        check_at=({"batch": 1, "height": 64, "width": 72}, {"batch": 3, "height": 24, "width": 16}),
    )
