"""Trains a Restormer that removes camera shake and noise.

python -m models.restormer.demo.photographs build/photos build/photos-held-out
python -m models.restormer.demo.train --photos build/photos --held-out build/photos-held-out --compile

Training takes --total-minutes on one GPU and may be split into runs of --minutes: each continues from the state that
the one before left in the folder --out, and each writes restormer.safetensors and, measured, its model card README.md.
The learning rate falls over the total, so the weights are finished when the last run is.  The runs may differ in
--batch and --crop.

--initial begins with the weights that an earlier training has exported, whose runs the card then names, too.
--smoke takes a few steps, in less than a minute on a CPU.  --benchmark times the ways of computing a step, then ends.
--architecture published trains the full size of 26 million parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from models.chain import replacing, run_script
from models.restormer import checkpoint, samples
from models.restormer.demo.batches import MARGIN, Pictures, training_pair
from models.restormer.demo.drawings import draw
from models.restormer.demo.evaluate import NOTES, by_package, picture_files, read_notes, write_card
from models.restormer.network import Architecture, ChannelLayerNorm, Restormer, TransformerBlock
from models.spec import Unusable

ARCHITECTURES = {
    # Channels, also those of the feed-forward networks, are multiples of 8 at every level: tensor cores want that.
    "demo": Architecture(dim=16, num_blocks=(2, 3, 4, 2), num_refinement_blocks=2, ffn_expansion=2.5),
    "published": checkpoint.PUBLISHED,
}
BATCH = {"demo": 32, "published": 16}
LEARNING_RATE = {"demo": 1e-3, "published": 3e-4}
WARM_UP_STEPS = 300
LAST_LEARNING_RATE = 0.01  # as a share of the highest
AVERAGE_DECAY = 0.999  # of the running average of the weights, which is what is exported
LARGEST_GRADIENT = 1.0  # norm over all parameters
DRAWN_SHARE = 0.2  # of the crops


@dataclass(frozen=True)
class Plan:
    """The settings of one run; the total is counted in steps if `steps` is given, and in minutes if not."""

    architecture: str
    total_minutes: float
    steps: Optional[int]
    batch: int
    crop: int
    learning_rate: float
    seed: int
    compile: bool
    channels_last: bool


class Training:
    """The network and all that changes while it learns; one run's state continues in the next."""

    def __init__(self, plan: Plan, pictures: Pictures) -> None:
        self.plan, self.pictures, self.device = plan, pictures, pictures.device
        torch.manual_seed(plan.seed)
        self.network = Restormer(ARCHITECTURES[plan.architecture]).to(self.device)
        if plan.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.average = deepcopy(self.network).requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, ChannelLayerNorm):
                module.register_forward_pre_hook(to_single_precision)
            if plan.compile and isinstance(module, TransformerBlock):
                module.compile(dynamic=False)  # blocks of one size share their code: far fewer than all to compile
        self.optimiser = torch.optim.AdamW(self.network.parameters(), weight_decay=1e-4, fused=self.on_gpu)
        self.random = torch.Generator(self.device).manual_seed(plan.seed)
        self.step, self.seconds = 0, 0.0
        self.runs: list[dict[str, Any]] = []

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def progress(self) -> float:
        """The finished share of the total, at most 1."""
        plan = self.plan
        return min(1.0, self.step / plan.steps if plan.steps else self.seconds / (60 * plan.total_minutes))

    @property
    def learning_rate(self) -> float:
        """Rises over the first steps, then falls as a cosine."""
        share = LAST_LEARNING_RATE + (1 - LAST_LEARNING_RATE) * (1 + math.cos(math.pi * self.progress)) / 2
        return self.plan.learning_rate * share * min(1.0, (self.step + 1) / WARM_UP_STEPS)

    def train_step(self) -> Tensor:
        """One step; returns its loss without waiting for the device."""
        degraded, clean = training_pair(self.pictures, self.plan.batch, self.plan.crop, self.random)
        if self.plan.channels_last:
            degraded = degraded.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            restored = self.network(degraded)
        loss = charbonnier(restored, clean)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.optimiser.step()
        self.step += 1
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))  # soon forgets the initial weights
        update = get_ema_multi_avg_fn(decay)
        update(list(self.average.parameters()), list(self.network.parameters()), self.step)
        return loss.detach()

    def run(self, deadline: float) -> None:
        """Trains until the total or the deadline, in terms of time.monotonic, is reached."""
        first_step, first_seconds = self.step, self.seconds
        losses: list[Tensor] = []
        with tqdm(unit="step", initial=first_step, total=self.plan.steps, mininterval=1) as bar:
            before = time.monotonic()
            while self.progress < 1 and before < deadline:
                losses.append(self.train_step())
                if len(losses) == 50:  # to read a loss is to wait for the device
                    loss = torch.stack(losses).mean().item()
                    if not math.isfinite(loss):
                        raise Unusable(f"the loss is {loss} at step {self.step}: choose a smaller --learning-rate")
                    bar.set_postfix_str(f"loss {loss:.4f}, {self.progress:.1%} of the total")
                    losses.clear()
                bar.update()
                after = time.monotonic()
                if self.step > first_step + 1:  # the first step compiles: its time says nothing of the progress
                    self.seconds += after - before
                before = after
        if self.step > first_step:
            self.runs.append(
                {
                    **asdict(self.plan),
                    "device": torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU",
                    "torch": str(torch.__version__),
                    "steps": self.step - first_step,
                    "minutes": (self.seconds - first_seconds) / 60,
                }
            )

    def save(self, path: Path) -> None:
        state = {
            "plan": asdict(self.plan),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": self.random.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "runs": self.runs,
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Continues from a saved state; raises Unusable if it is of another network."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["plan"]
        if (saved["architecture"], saved["seed"]) != (self.plan.architecture, self.plan.seed):
            raise Unusable(f"{path} is of {saved['architecture']}, seed {saved['seed']}: choose another --out")
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.random.set_state(state["random"])
        self.step, self.seconds, self.runs = state["step"], state["seconds"], state["runs"]

    def begin_with(self, path: Path) -> None:
        """Begins with exported weights, whose training goes on; raises Unusable if they are of another network."""
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        try:
            self.network.load_state_dict(tensors)
        except RuntimeError as problem:
            raise Unusable(f"{path} holds no weights of {self.plan.architecture}") from problem
        self.average.load_state_dict(tensors)
        self.runs = read_notes(path)["runs"]

    def export(self, path: Path, photographs: dict[str, int], drawings: int) -> None:
        """Stores the averaged weights in FP16, with notes on their training for the model card."""
        notes = {
            "runs": self.runs,
            "step": sum(run["steps"] for run in self.runs),
            "progress": self.progress,
            "precision": "BF16 with norms in FP32" if self.on_gpu else "FP32",
            "photographs": photographs,
            "drawings": drawings,
            "drawn_share": DRAWN_SHARE if any(photographs.values()) else 1.0,
        }
        tensors = self.average.state_dict()
        half = {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
        with replacing(path) as temporary:
            save_file(half, temporary, {NOTES: json.dumps(notes)})


def to_single_precision(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """A pre-hook for norms, whose means and squares autocast would leave in BF16."""
    return (inputs[0].float(),)


def charbonnier(restored: Tensor, clean: Tensor) -> Tensor:
    """The mean absolute error, made smooth around zero."""
    return ((restored - clean).square() + 1e-6).sqrt().mean()


def load_pictures(photos: list[Path], drawings: int, seed: int, crop: int, device: torch.device) -> Pictures:
    """The photographs at full and at half size, cropped as often as their areas demand, and drawings."""
    least = crop + 2 * MARGIN
    pictures, weights = [], []
    for path in photos:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for sized in (image, image.reduce(2)):
            if min(sized.size) >= least:
                pictures.append(np.asarray(sized))
                weights.append(float(sized.width * sized.height))
    weights += [DRAWN_SHARE / (1 - DRAWN_SHARE) * (sum(weights) or 1.0) / drawings] * drawings
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(draw, range(seed, seed + drawings))
        pictures += tqdm(drawn, total=drawings, desc="drawings", leave=False)
    return Pictures(pictures, weights, device)


def refuse_held_out(photos: list[Path], held_out: list[Path]) -> None:
    """Raises Unusable if a picture of the evaluation is among those of the training, by its name."""
    evaluated = {path.name for path in held_out}
    crops = {name for name, *_ in samples.CROPS}
    for path in photos:
        if path.name in evaluated or crops & set(path.stem.split("-")):
            raise Unusable(f"{path} is for the evaluation: take it out of the training photographs")


def benchmark(plan: Plan, pictures: Pictures) -> None:
    """Prints how fast each way of computing a step is, and the memory it takes."""
    for compiled in (False, True):
        for channels_last in (False, True):
            torch.compiler.reset()
            training = Training(replace(plan, compile=compiled, channels_last=channels_last), pictures)
            for _ in range(5):
                training.train_step().item()
            if training.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            torch.stack([training.train_step() for _ in range(30)]).sum().item()
            rate = 30 / (time.monotonic() - started)
            memory = torch.cuda.max_memory_allocated() / 1e9 if training.on_gpu else math.nan
            flags = f"{'--compile ' * compiled}{'--channels-last' * channels_last}" or "neither"
            print(f"{flags:25} {rate:6.2f} steps/s, {memory:.1f} GB", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--photos", type=Path, metavar="FOLDER", help="training photographs; without them, drawings alone")
    add("--held-out", type=Path, metavar="FOLDER", help="photographs to measure on, besides the built-in samples")
    add("--out", type=Path, metavar="FOLDER", default=Path("build/restormer-demo"), help="for state, weights and card")
    add("--minutes", type=float, default=9, help="end this run so many minutes after its start (9)")
    add("--total-minutes", type=float, default=15, help="training time of all runs together (15)")
    add("--steps", type=int, help="count the total in steps instead: on a CPU, equal seeds then give equal weights")
    add("--architecture", choices=ARCHITECTURES, default="demo", help="(demo)")
    add("--batch", type=int, help=f"crops a step ({BATCH['demo']}; published: {BATCH['published']})")
    add("--crop", type=int, default=128, help="side of a crop in pixels, a multiple of 8 (128)")
    add("--learning-rate", type=float, help="the highest ({demo:g}; published: {published:g})".format(**LEARNING_RATE))
    add("--drawings", type=int, default=192, help="how many random drawings to make (192)")
    add("--seed", type=int, default=0)
    add("--compile", action="store_true", help="compile the transformer blocks")
    add("--channels-last", action="store_true", help="keep channels innermost in memory")
    add("--initial", type=Path, metavar="FILE", help="exported weights to begin with")
    add("--smoke", action="store_true", help="3 steps on small crops of 2 drawings")
    add("--benchmark", action="store_true", help="time the four ways of computing a step, then end")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.batch, arguments.crop, arguments.drawings = 3, 2, 32, 2
    if arguments.crop < 8 or arguments.crop % 8 or arguments.drawings < 1:
        parser.error("--crop must be a positive multiple of 8, and --drawings positive")
    arguments.batch = arguments.batch or BATCH[arguments.architecture]
    arguments.learning_rate = arguments.learning_rate or LEARNING_RATE[arguments.architecture]
    return arguments


def main() -> int:
    started = time.monotonic()
    arguments = parse()
    plan = Plan(**{field.name: getattr(arguments, field.name) for field in fields(Plan)})
    photos = picture_files(arguments.photos) if arguments.photos else []
    refuse_held_out(photos, picture_files(arguments.held_out) if arguments.held_out else [])
    torch.backends.cudnn.benchmark = True  # all steps have the same sizes
    torch._dynamo.config.recompile_limit = 64  # one for each size and memory layout of a block
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = load_pictures(photos, arguments.drawings, arguments.seed, arguments.crop, device)
    if arguments.benchmark:
        benchmark(plan, pictures)
        return 0

    training = Training(plan, pictures)
    state, weights = arguments.out / "state.pt", arguments.out / "restormer.safetensors"
    if state.is_file():
        training.load(state)
        print(f"{state}: continuing at step {training.step}, {training.progress:.1%} of the total")
    elif arguments.initial:
        training.begin_with(arguments.initial)
    training.run(started + 60 * arguments.minutes)
    training.save(state)
    training.export(weights, by_package(photos), arguments.drawings)
    print(f"{training.progress:.1%} of the total after {training.step} steps → {weights}")
    print(write_card(weights, arguments.held_out, device))
    return 0


if __name__ == "__main__":
    run_script(main)
