"""Trains the TrOCR demo model on lines made on the fly, on one GPU in a quarter of an hour.

Usage: python -m models.trocr.demo.train --fonts FOLDER --out FOLDER [--checkpoint FILE] [--minutes 9] [--plan 15]

Worker processes print lines (`lines.py`) into a stock that lies in GPU memory; each step draws a batch from it and
photographs it anew (`degrade.py`).  What a step draws follows from the seed and the step's number.

`--plan` is the training time in minutes that the learning rate is laid out for.  One run ends after `--minutes` at the
latest, and the next continues from the checkpoint.  Each ends with the model's folder as it is then, its scores
(`evaluate.py`) and its card.  `--smoke` goes through all of it with a tiny network on a CPU in under a minute.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    DeiTConfig,
    GenerationConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from models.chain import replacing, run_script
from models.spec import Unusable
from models.trocr import tokenizer
from models.trocr.demo.card import card
from models.trocr.demo.degrade import photograph
from models.trocr.demo.evaluate import evaluate, fitted
from models.trocr.demo.fonts import FONTS
from models.trocr.demo.lines import CHARACTERS, HEIGHT, LONGEST, WIDTH, Sources, chunk, sources

VOCABULARY = tokenizer.character_vocabulary(CHARACTERS)
START, PAD, END = (VOCABULARY[token] for token in ("<s>", "<pad>", "</s>"))
FIRST_CHARACTER = VOCABULARY[" "]
POSITIONS = 64  # of the decoder: start, LONGEST characters, end, up to a multiple of 8


@dataclass(frozen=True)
class Setup:
    """The network and its training.

    image          (height, width) in pixels that the network takes; others than (HEIGHT, WIDTH) get stretched lines
    decoder_hidden width of the decoder; that of the encoder if it is 0
    distilled      a DeiT for an encoder, with one token more, and scaled embeddings: as the published small model has
    patch          (height, width) in pixels: low ones carry more detail, one row of high ones is learned faster
    deviation      of the initial weights; with transformers' 0.02, which suits wide networks, this one starts slowly
    chunk          lines that a worker prints at a time
    first, stock   chunks that training waits for, and that the stock holds
    ctc            weight of the columns' loss
    misread        share of the decoder's inputs that are replaced, so that it looks at the image rather than guess on
    """

    image: tuple[int, int] = (HEIGHT, WIDTH)
    hidden: int = 192
    layers: int = 7
    decoder_hidden: int = 0
    decoder_layers: int = 2
    decoder_ffn: int = 512
    heads: int = 6
    decoder_heads: int = 6
    distilled: bool = False
    patch: tuple[int, int] = (32, 8)
    deviation: float = 0.05
    batch: int = 512
    chunk: int = 128
    first: int = 128
    stock: int = 1024
    peak: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: float = 0.03
    ctc: float = 0.3
    misread: float = 0.05
    printed: int = 2000
    written: int = 500


SMOKE = Setup(
    hidden=48, layers=2, decoder_layers=1, decoder_ffn=96, heads=3, decoder_heads=3, patch=(32, 16), batch=8, chunk=16,
    first=1, stock=2, printed=4, written=2,
)  # fmt: skip
# microsoft/trocr-small's sizes, with the demo's characters
SMALL = Setup(
    image=(384, 384), hidden=384, layers=12, decoder_hidden=256, decoder_layers=6, decoder_ffn=1024, decoder_heads=8,
    distilled=True, patch=(16, 16), deviation=0.02, batch=128, peak=5e-4,
)  # fmt: skip
SETUPS = {"demo": Setup(), "small": SMALL}


# ---------------------------------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------------------------------


def network(setup: Setup) -> VisionEncoderDecoderModel:
    """TrOCR in small: columns of low patches, characters for tokens.

    The pooler, which TrOCR does not use, is left out.  LayerNorm's epsilon stays above FP16's smallest number.
    """
    encoder = (DeiTConfig if setup.distilled else ViTConfig)(
        hidden_size=setup.hidden,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        intermediate_size=4 * setup.hidden,
        image_size=list(setup.image),
        patch_size=list(setup.patch),
        layer_norm_eps=1e-5,
        initializer_range=setup.deviation,
    )
    decoder = TrOCRConfig(
        vocab_size=len(VOCABULARY),
        d_model=setup.decoder_hidden or setup.hidden,
        decoder_layers=setup.decoder_layers,
        decoder_attention_heads=setup.decoder_heads,
        decoder_ffn_dim=setup.decoder_ffn,
        activation_function="relu" if setup.distilled else "gelu",
        scale_embedding=setup.distilled,
        max_position_embeddings=POSITIONS,
        init_std=setup.deviation,
        cross_attention_hidden_size=setup.hidden,
        dropout=0.0,  # lines never run out: there is nothing to overfit to
        decoder_start_token_id=START,
        tie_word_embeddings=False,
        is_decoder=True,
        add_cross_attention=True,
    )
    config = VisionEncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict(), tie_word_embeddings=False)
    model = VisionEncoderDecoderModel(config)
    model.encoder.pooler = None
    model.config.decoder_start_token_id, model.config.pad_token_id = START, PAD
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START, bos_token_id=START, eos_token_id=END, pad_token_id=PAD, max_length=POSITIONS
    )
    return model


class Learner(nn.Module):
    """The network with what only training needs: a second reading of the text, off the encoder's columns.

    Its CTC loss shows the encoder where the characters are long before the decoder has learned to look there.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.model = network(setup)
        self.rows = setup.image[0] // setup.patch[0]
        columns = setup.image[1] // setup.patch[1]
        self.readings = -(-POSITIONS // columns)  # of a column, from left to right, so that there are enough
        self.columns = nn.Linear(setup.hidden, self.readings * len(VOCABULARY))  # <pad> is CTC's blank

    def forward(self, pixel_values: Tensor, tokens: Tensor, lengths: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """pixel_values (B, 3, H, W), tokens (B, LONGEST + 2), lengths of the texts (B,) on the CPU, and the decoder's
        inputs (B, LONGEST + 1) → cross entropy for each token, CTC loss for each character."""
        hidden = self.model.encoder(pixel_values=pixel_values).last_hidden_state
        logits = self.model.decoder(input_ids=inputs, encoder_hidden_states=hidden, use_cache=False).logits
        reading = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)

        grid = hidden[:, 2 if self.setup.distilled else 1 :].unflatten(1, (self.rows, -1))  # the patches
        read = self.columns(grid.mean(dim=1)).unflatten(2, (self.readings, -1)).flatten(1, 2)
        steps = read.float().log_softmax(dim=-1).transpose(0, 1)
        counts = torch.full_like(lengths, len(steps))
        columns = functional.ctc_loss(steps, tokens[:, 1:-1], counts, lengths, blank=PAD, zero_infinity=True)
        return reading, columns


def optimizer_of(learner: Learner, setup: Setup) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases and normalisations do not."""
    matrices = [parameter for parameter in learner.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in learner.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": setup.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=setup.peak, betas=(0.9, 0.98), fused=matrices[0].is_cuda)


def learning_rate(setup: Setup, progress: float) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak; progress 0…1."""
    return setup.peak * min(1, progress / setup.warmup + 0.01) * (0.505 + 0.495 * math.cos(math.pi * min(progress, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Lines
# ---------------------------------------------------------------------------------------------------------------------


def tokens_of(texts: Sequence[str]) -> Tensor:
    """(n, LONGEST + 2) int64: start, characters, end, padding."""
    return torch.tensor(
        [[START, *(VOCABULARY[c] for c in text), END, *[PAD] * (LONGEST - len(text))] for text in texts]
    )


class Stock:
    """The last chunks that were printed, on the training device."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self.setup, self.device = setup, device
        self.origin = self.chunks = 0  # where the first chunk lies, and how many there are
        lines = setup.stock * setup.chunk
        self.ink = torch.empty(lines, HEIGHT, WIDTH, dtype=torch.uint8, device=device)
        self.tokens = torch.empty(lines, LONGEST + 2, dtype=torch.int64, device=device)
        self.lengths = torch.empty(lines, dtype=torch.int64)

    def put(self, number: int, ink: np.ndarray, texts: Sequence[str]) -> None:
        """Stores chunk `number` in the place of the oldest; the first may have any number."""
        start = number % self.setup.stock * self.setup.chunk
        self.origin = self.origin if self.chunks else start
        place = slice(start, start + self.setup.chunk)
        self.ink[place] = torch.from_numpy(ink).to(self.device)
        self.tokens[place] = tokens_of(texts).to(self.device)
        self.lengths[place] = torch.tensor([len(text) for text in texts])
        self.chunks = min(self.chunks + 1, self.setup.stock)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: ink (B, HEIGHT, WIDTH) uint8 and tokens on the device, lengths of the texts on the CPU."""
        index = torch.randint(self.chunks * self.setup.chunk, (self.setup.batch,), generator=generator)
        if self.chunks < self.setup.stock:
            index = (index + self.origin) % len(self.ink)
        on_device = index.to(self.device)
        return self.ink[on_device], self.tokens[on_device], self.lengths[index]


class Printers:
    """Prints chunks in order, in worker processes ahead of their use, or without any when asked for."""

    def __init__(self, source: Sources, setup: Setup, seed: int, workers: int, number: int) -> None:
        self.source, self.setup, self.seed, self.number = source, setup, seed, number
        self.asked = number  # the next chunk to ask the workers for
        self.ahead: deque[Future[tuple[np.ndarray, list[str]]]] = deque()
        # forks start at once, and these never touch the GPU
        context = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(workers, mp_context=context) if workers else None
        self.at_once = 3 * workers
        self.ask()

    def ask(self) -> None:
        while self.pool and len(self.ahead) < self.at_once:
            self.ahead.append(self.pool.submit(chunk, self.source, (self.seed, self.asked), self.setup.chunk))
            self.asked += 1

    def printed(self, wanted: int, at_least: int) -> Iterator[tuple[int, np.ndarray, list[str]]]:
        """Chunks with numbers below `wanted`: without workers all of them, else those that are ready, but waits for
        those below `at_least`."""
        while self.number < wanted:
            if self.pool is None:
                made = chunk(self.source, (self.seed, self.number), self.setup.chunk)
            elif self.number < at_least or self.ahead[0].done():
                made = self.ahead.popleft().result()
                self.ask()
            else:
                return
            yield (self.number, *made)
            self.number += 1

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Training:
    """Everything that a checkpoint keeps, and the lines.

    Random numbers are no part of it: each step seeds them by its number.
    """

    def __init__(
        self,
        setup: Setup,
        source: Sources,
        device: str,
        seed: int,
        workers: int,
        checkpoint: Path | None,
        compiled: bool = False,
    ) -> None:
        self.setup, self.seed, self.device = setup, seed, torch.device(device)
        self.step, self.seconds = 0, 0.0
        self.losses: tuple[float, float] = (math.nan, math.nan)
        state: dict[str, Any] = {}
        if checkpoint and checkpoint.is_file():
            state = torch.load(checkpoint, "cpu", weights_only=True)
            self.step, self.seconds = state["step"], state["seconds"]

        # one chunk more with each step; what an earlier run had in stock is printed again
        first = max(0, setup.first + self.step - setup.stock)
        self.must_have = first + setup.first
        self.printers = Printers(source, setup, seed, workers, first)
        self.stock = Stock(setup, self.device)

        torch.manual_seed(seed)
        self.learner = Learner(setup).to(self.device).train()
        self.optimizer = optimizer_of(self.learner, setup)
        if state:
            self.learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
        if compiled:
            self.learner.model.encoder.compile(dynamic=False)  # all batches have one size

    def save(self, checkpoint: Path) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(checkpoint) as temporary:
            torch.save(state, temporary)

    def advance(self, progress: float) -> tuple[Tensor, Tensor]:
        """One step; returns its two losses."""
        for printed in self.printers.printed(self.setup.first + self.step, self.must_have):
            self.stock.put(*printed)
        seed = 1000 * self.step + self.seed
        torch.manual_seed(seed)  # for what is drawn on the CPU
        generator = torch.Generator(self.device).manual_seed(seed)
        ink, tokens, lengths = self.stock.draw(torch.default_generator)
        pixel_values = fitted(photograph(ink, generator), self.setup.image) * 2 - 1
        inputs = tokens[:, :-1]
        other = torch.randint(FIRST_CHARACTER, len(VOCABULARY), inputs.shape, generator=generator, device=self.device)
        misread = torch.rand(inputs.shape, generator=generator, device=self.device) < self.setup.misread
        inputs = torch.where(misread & (inputs >= FIRST_CHARACTER), other, inputs)

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.setup, progress)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            reading, columns = self.learner(pixel_values, tokens, lengths, inputs)
        self.optimizer.zero_grad(set_to_none=True)
        (reading + self.setup.ctc * columns).backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return reading.detach(), columns.detach()

    def run(self, until: float, plan_seconds: float, plan_steps: int | None, checkpoint: Path | None) -> None:
        """Steps until the clock (time.monotonic) reads `until` or the plan is fulfilled."""
        start, before, saved = time.monotonic(), self.seconds, time.monotonic()
        with tqdm(initial=self.step, total=plan_steps, desc="training", unit="step", mininterval=10) as bar:
            while True:
                progress = self.step / plan_steps if plan_steps else self.seconds / plan_seconds
                now = time.monotonic()
                if progress >= 1 or now >= until:
                    break
                losses = self.advance(progress)
                self.seconds = before + time.monotonic() - start
                bar.update()
                if self.step % 50 == 0:
                    self.losses = (losses[0].item(), losses[1].item())
                    if not math.isfinite(sum(self.losses)):
                        raise Unusable(f"the loss is {self.losses[0]} at step {self.step}: the checkpoint is older")
                    bar.set_postfix_str(
                        f"loss {self.losses[0]:.3f}, columns {self.losses[1]:.3f}, {100 * progress:.0f} % of the plan, "
                        f"{self.stock.chunks * self.setup.chunk} lines in stock, {self.printers.number} chunks printed"
                    )
                if checkpoint and now - saved > 60:
                    self.save(checkpoint)
                    saved = now
        if checkpoint:
            self.save(checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def store(model: VisionEncoderDecoderModel, folder: Path) -> None:
    """The model in FP16 with its tokenizer and pre-processing, as transformers and this project's chain read them."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).eval().half().save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY, ensure_ascii=False), encoding="utf-8")
    tokenizer.of_characters(VOCABULARY).save(str(folder / tokenizer.FILE_NAME))
    reading = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    seeing = {
        "image_processor_type": "ViTImageProcessor",
        "processor_class": "TrOCRProcessor",
        "do_resize": True,
        "size": {"height": model.config.encoder.image_size[0], "width": model.config.encoder.image_size[1]},
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(reading, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(seeing, indent=2))


def report(training: Training, folder: Path, fonts: Path, batch: int) -> None:
    """Measures the model in `folder` and leaves the figures there, as figures.json and in the model card."""
    setup = training.setup
    found = evaluate(folder, fonts, str(training.device), setup.printed, setup.written, batch)
    packages = fonts / "packages.json"
    figures = {
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "batch": setup.batch,
        "lines printed": training.printers.number * setup.chunk,
        "last loss": round(training.losses[0], 4),
        "device": torch.cuda.get_device_name() if training.device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(parameter.numel() for parameter in training.learner.model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "setup": asdict(setup),
        "seed": training.seed,
        "fonts": {part: len(list((fonts / part).glob("*.?tf"))) for part in FONTS},
        "packages": json.loads(packages.read_text()) if packages.is_file() else {},
        "scores": found,
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    if setup != SMALL:  # which is no demo
        (folder / "README.md").write_text(card(figures), encoding="utf-8")
    print(json.dumps(found, indent=1))


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fonts", type=Path, required=True, help="what models.trocr.demo.fonts has collected")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--checkpoint", type=Path, help="continue from this file if it exists, and keep it up to date")
    parser.add_argument("--minutes", type=float, default=9, help="stop training so long after the start (9)")
    parser.add_argument("--plan", type=float, default=15, help="minutes of training in all runs together (15)")
    parser.add_argument("--steps", type=int, help="plan so many steps instead of minutes")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that print lines (all cores)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--setup", choices=SETUPS, default="demo", help="which network (demo); small: as the published one"
    )
    parser.add_argument("--compile", action="store_true", help="compile the encoder")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, six steps, no workers")
    arguments = parser.parse_args()
    setup, steps, workers = SETUPS[arguments.setup], arguments.steps, arguments.workers
    if arguments.smoke:
        setup, steps, workers = SMOKE, steps or 6, 0
    torch.set_float32_matmul_precision("high")

    source = sources(arguments.fonts, held_out=False)
    training = Training(
        setup, source, arguments.device, arguments.seed, workers, arguments.checkpoint, arguments.compile
    )
    training.run(began + 60 * arguments.minutes, 60 * arguments.plan, steps, arguments.checkpoint)
    training.printers.close()
    print(f"{training.step} steps in {training.seconds / 60:.1f} minutes; storing and evaluating")
    store(training.learner.model, arguments.out)
    report(training, arguments.out, arguments.fonts, batch=250)
    return 0


if __name__ == "__main__":
    run_script(main)
