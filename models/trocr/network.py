"""TrOCR in PyTorch: transformers' VisionEncoderDecoderModel, and the three modules that are exported from it."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    DeiTConfig,
    GenerationConfig,
    PreTrainedConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from models.spec import Dim, ExportablePart, LoadedModel, Part, TensorSpec, Unusable
from models.trocr import tokenizer as tokenizers
from models.trocr.decoding import OUT, Decoded, Generation, tables, trimmed
from models.trocr.images import preprocess
from models.trocr.pipeline import (
    CACHE_STEP,
    MAX_ROWS,
    TIMED_BATCHES,
    TIMED_TOKENS,
    TUNED_ROWS,
    TextResult,
    results_of,
    timed_images,
)
from models.trocr.tokenizer import brief

MAX_POSITIONS = 512  # the longest cache that engines are built for
SEED = 0
DEMO = Path(__file__).parent / "demo"

# ---------------------------------------------------------------------------------------------------------------------
# What is exported
# ---------------------------------------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, future: Tensor | None = None) -> Tensor:
    """query (B, heads, queries, head_dim), key and value (B, heads, length, head_dim) → (B·queries, 1, dim).

    `future` (length,) marks positions that are not decoded yet.
    """
    scores = query @ key.transpose(2, 3)  # (B, heads, queries, length)
    if future is not None:
        scores = torch.where(future, torch.finfo(scores.dtype).min, scores)
    context = scores.softmax(dim=-1) @ value
    if query.shape[2] > 1:
        context = context.transpose(1, 2)
    return context.reshape(-1, 1, value.shape[1] * value.shape[3])


class Encoder(nn.Module):
    """pixel_values (B, 3, H, W) → encoder_hidden (B, tokens, dim), projected where the model projects it."""

    def __init__(self, model: VisionEncoderDecoderModel) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.project = getattr(model, "enc_to_dec_proj", nn.Identity())

    def forward(self, pixel_values: Tensor) -> tuple[Tensor]:
        # an own loop, since the model's puts a mask of zeros into the exported graph
        x = self.encoder.embeddings(pixel_values)
        for layer in self.encoder.layers:
            x = layer(x)
        return (self.project(self.encoder.layernorm(x)),)


class Prefill(nn.Module):
    """encoder_hidden (B, tokens, dim) → key and value of each layer's cross-attention (B, heads, tokens, head_dim)."""

    def __init__(self, model: VisionEncoderDecoderModel) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(layer.encoder_attn for layer in decoder_of(model).layers)

    def forward(self, encoder_hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            projection(encoder_hidden).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for attention in self.attentions
            for projection in (attention.k_proj, attention.v_proj)
        )


class Choice(nn.Module):
    """What the settings allow and force, and the tokens that end a sequence."""

    def __init__(self, generation: Generation, vocab_size: int, positions: int) -> None:
        super().__init__()
        allowed_from, forced = map(torch.from_numpy, tables(generation, vocab_size, positions))
        self.register_buffer("allowed_from", allowed_from if allowed_from.any() else None)
        self.register_buffer("forced", forced if (forced >= 0).any() else None)
        self.register_buffer("ends", torch.tensor(generation.eos or (-1,), dtype=torch.int32))

    def allowed(self, scores: Tensor, position: Tensor) -> Tensor:
        """Scores (…, vocabulary) with -inf for tokens that may not be chosen behind `position`."""
        if self.allowed_from is None:
            return scores
        return torch.where(position < self.allowed_from, -torch.inf, scores)


class GreedyChoice(Choice):
    """The most probable token behind `position` that the settings allow; the first of those that are equally so.

    forward(logits (B, vocabulary), sequences (B, length), position (1,), finished (B,)) → sequences with the token at
    position + 1, position + 1, and finished, which is 1 from a row's end token on.  Finished rows get padding.
    """

    def __init__(self, generation: Generation, vocab_size: int, positions: int) -> None:
        super().__init__(generation, vocab_size, positions)
        self.pad = generation.pad

    def forward(
        self, logits: Tensor, sequences: Tensor, position: Tensor, finished: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        token = self.allowed(logits, position).argmax(dim=-1).to(torch.int32)
        if self.forced is not None:
            forced = self.forced.index_select(0, position)
            token = torch.where(forced >= 0, forced, token)
        token = torch.where(finished > 0, self.pad, token).unsqueeze(1)
        after = position + 1
        slots = torch.arange(sequences.shape[1], dtype=torch.int32, device=sequences.device)
        ended = (token == self.ends).to(torch.int32).amax(dim=1)
        return torch.where(slots == after, token, sequences), after, torch.maximum(finished, ended)


class BeamChoice(Choice):
    """One step of beam search, as transformers does it, over the beams of each image.

    forward(logits (B, beams, vocabulary), then the state:
        sequences (B, beams, length) and scores (B, beams), their log probabilities, of the beams that go on;
        ancestors (B, beams, length): the beam of the same image in whose cache the key and value of a position are;
        hypotheses (B, beams, length) that have ended, best first, their lengths, 0 where there is none, and their
        scores: log probability / generated length ** length_penalty;
        position (1,); finished (B,), 1 from where an image's hypotheses stay as they are
    ) → the state behind the choice of the next tokens.
    """

    def __init__(self, generation: Generation, vocab_size: int, positions: int) -> None:
        super().__init__(generation, vocab_size, positions)
        penalty, max_length = generation.length_penalty, generation.max_length
        self.candidates, self.max_length = generation.candidates, max_length
        self.stop_when_full = generation.early_stopping is True
        # What is generated behind position p counts p + 1 tokens; beams hope for the best length that they may reach.
        lengths = range(1, positions + 1)
        reachable = [max_length - 1 if generation.early_stopping == "never" and penalty > 0 else n for n in lengths]
        # no buffers, which would become FP16 with the module
        self.penalties = torch.tensor([float(n) ** penalty for n in lengths])
        self.hopes = torch.tensor([float(n) ** penalty for n in reachable])
        self.register_buffer("tokens", torch.arange(vocab_size, dtype=torch.int32))
        self.register_buffer("starts", torch.arange(1, generation.num_beams) * vocab_size)

    def forward(
        self,
        logits: Tensor,
        sequences: Tensor,
        scores: Tensor,
        ancestors: Tensor,
        hypotheses: Tensor,
        lengths: Tensor,
        hypothesis_scores: Tensor,
        position: Tensor,
        finished: Tensor,
    ) -> tuple[Tensor, ...]:
        beams, vocab_size = logits.shape[1:]
        after = position + 1
        slots = torch.arange(sequences.shape[2], dtype=torch.int32, device=sequences.device)

        gains = self.allowed(logits.float().log_softmax(dim=-1), position)
        if self.forced is not None:
            forced = self.forced.index_select(0, position)
            gains = torch.where(forced < 0, gains, torch.where(self.tokens == forced, 0.0, -torch.inf))
        totals, places = (gains + scores.unsqueeze(2)).flatten(1).topk(self.candidates)  # (B, candidates)
        parents = (places.unsqueeze(2) >= self.starts).sum(dim=2)  # places // vocab_size, in fewer nodes
        tokens = (places - parents * vocab_size).to(torch.int32)
        ended = (tokens.unsqueeze(2) == self.ends).any(dim=2) | (after + 1 >= self.max_length)
        extended = torch.where(slots == after, tokens.unsqueeze(2), rows_of(sequences, parents))

        going_on, chosen = torch.where(ended, totals + OUT, totals).topk(beams)
        origins = parents.gather(1, chosen)
        inherited = rows_of(ancestors, origins)
        next_ancestors = torch.where(slots == position, origins.to(torch.int32).unsqueeze(2), inherited)

        # A candidate that ends competes with the hypotheses so far, if it is among the best `beams` of this step.
        ends_well = ended & (torch.arange(self.candidates, device=logits.device) < beams)
        rated = totals / self.penalties.to(logits.device).index_select(0, position)
        rated = torch.cat([hypothesis_scores, torch.where(ends_well, rated, rated + OUT)], dim=1)
        ratings, ranking = rated.topk(beams)
        new_lengths = torch.cat([lengths, torch.where(ends_well, after + 1, 0)], dim=1).gather(1, ranking)
        new_hypotheses = rows_of(torch.cat([hypotheses, extended], dim=1), ranking)
        open_ = finished.unsqueeze(1) == 0
        next_scores = torch.where(open_, ratings, hypothesis_scores)
        next_lengths = torch.where(open_, new_lengths, lengths)
        next_hypotheses = torch.where(open_.unsqueeze(2), new_hypotheses, hypotheses)

        full = next_lengths.amin(dim=1) > 0
        hoped_for = going_on[:, 0] / self.hopes.to(logits.device).index_select(0, position)
        over = hoped_for <= torch.where(full, next_scores.amin(dim=1), OUT)
        if self.stop_when_full:
            over = over | full
        return (
            rows_of(extended, chosen),
            going_on,
            next_ancestors,
            next_hypotheses,
            next_lengths,
            next_scores,
            after,
            torch.maximum(finished, over.to(torch.int32)),
        )


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """table (B, n, length), rows (B, k) → (B, k, length)."""
    return table.gather(1, rows.unsqueeze(2).expand(-1, -1, table.shape[2]))


class Step(nn.Module):
    """One token for each row, all at the same position, with the K/V cache as plain tensors, and the choice of the next
    ones.

    What comes out of a step, but for the logits, is what goes in at the next one.
    """

    def __init__(self, model: VisionEncoderDecoderModel, generation: Generation) -> None:
        super().__init__()
        self.decoder = decoder_of(model)
        self.output_projection = model.decoder.output_projection
        config = model.config.decoder
        self.learned = config.use_learned_position_embeddings
        self.padding = config.pad_token_id
        positions = self.decoder.embed_positions
        table = positions.weight[positions.offset :] if self.learned else positions.weights[self.padding + 1 :]
        self.register_buffer("positions", table.detach()[: config.max_position_embeddings].clone())
        self.beams = generation.step_beams
        choice = GreedyChoice if self.beams == 1 else BeamChoice
        self.choice = choice(generation, config.vocab_size, positions_of(model.config))

    def embed(self, input_ids: Tensor, position: Tensor) -> Tensor:
        tokens = nn.functional.embedding(input_ids, self.decoder.embed_tokens.weight)
        if self.decoder.embed_tokens.embed_scale != 1:
            tokens = tokens * self.decoder.embed_tokens.embed_scale
        placed = tokens + nn.functional.embedding(position, self.positions)
        if not self.learned:  # sinusoidal: a padding token has no position, even where the model itself decodes it
            placed = torch.where((input_ids == self.padding).unsqueeze(-1), tokens, placed)
        return placed if self.decoder.layernorm_embedding is None else self.decoder.layernorm_embedding(placed)

    def decode(
        self, input_ids: Tensor, position: Tensor, tensors: Sequence[Tensor], owners: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids (rows, 1) → logits (rows, vocabulary) and present caches.

        owners  (B, beams, length): the beam in whose cache each beam finds a position
        """
        count = len(self.decoder.layers)
        self_cache, cross = tensors[: 2 * count], tensors[2 * count :]
        slots = torch.arange(self_cache[0].shape[2], dtype=torch.int32, device=position.device)
        here = (slots == position).unsqueeze(-1)  # (length, 1)
        future = slots > position  # (length,)

        x = self.embed(input_ids, position)  # (rows, 1, dim)
        present: list[Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            attention = layer.self_attn
            heads, head_dim = attention.num_heads, attention.head_dim
            shape = (-1, self.beams * heads, 1, head_dim)
            key = torch.where(here, attention.k_proj(x).reshape(shape), self_cache[2 * index])
            value = torch.where(here, attention.v_proj(x).reshape(shape), self_cache[2 * index + 1])
            present += [key, value]
            if owners is not None:
                key, value = owned(key, owners, heads), owned(value, owners, heads)
            query = (attention.q_proj(x) * attention.scaling).reshape(-1, heads, 1, head_dim)
            x = layer.self_attn_layer_norm(x + attention.out_proj(attend(query, key, value, future)))

            attention = layer.encoder_attn
            query = attention.q_proj(x) * attention.scaling
            if self.beams == 1:
                query = query.reshape(-1, heads, 1, head_dim)
            else:  # an image's keys and values serve all of its beams
                query = query.reshape(-1, self.beams, heads, head_dim).transpose(1, 2)
            context = attend(query, cross[2 * index], cross[2 * index + 1])
            x = layer.encoder_attn_layer_norm(x + attention.out_proj(context))

            x = layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))
        return self.output_projection(x).squeeze(1), present


class GreedyStep(Step):
    """One token for each row.

    forward(sequences (B, length), position (1,), finished (B,), then for each layer self_key, self_value (B, heads,
    length, head_dim), then for each layer cross_key, cross_value (B, heads, tokens, head_dim)) → logits (B, vocabulary)
    behind the token at `position`, then sequences, position and finished after the choice of the next token, then for
    each layer the cache with this token's key and value at index `position`.

    Searches on the host look at the logits, and give sequences of their own choice.
    """

    def forward(self, sequences: Tensor, position: Tensor, finished: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        logits, present = self.decode(sequences.index_select(1, position), position, tensors)
        return (logits, *self.choice(logits, sequences, position, finished), *present)


class BeamStep(Step):
    """One token for each of the beams of each image.

    forward(the state of `BeamChoice`, then for each layer self_key, self_value (B, beams·heads, length, head_dim), then
    for each layer cross_key, cross_value (B, heads, tokens, head_dim)) → logits (B, beams, vocabulary), the state, and
    for each layer the cache with this token's key and value at index `position`.

    Beams change places, their caches do not: `ancestors` tells where a beam's past is.
    """

    def forward(
        self,
        sequences: Tensor,
        scores: Tensor,
        ancestors: Tensor,
        hypotheses: Tensor,
        lengths: Tensor,
        hypothesis_scores: Tensor,
        position: Tensor,
        finished: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        slots = torch.arange(sequences.shape[2], dtype=torch.int32, device=sequences.device)
        beams = torch.arange(self.beams, dtype=torch.int32, device=sequences.device).unsqueeze(1)
        owners = torch.where(slots == position, beams, ancestors)
        input_ids = sequences.index_select(2, position).reshape(-1, 1)
        logits, present = self.decode(input_ids, position, tensors, owners)
        logits = logits.unflatten(0, (-1, self.beams))
        state = (sequences, scores, ancestors, hypotheses, lengths, hypothesis_scores, position, finished)
        return (logits, *self.choice(logits, *state), *present)


def owned(cache: Tensor, owners: Tensor, heads: int) -> Tensor:
    """cache (B, beams·heads, length, head_dim), owners (B, beams, length) → (B·beams, heads, length, head_dim)."""
    of_beams = cache.unflatten(1, (-1, heads))
    indices = owners.to(torch.int64)[:, :, None, :, None].expand(-1, -1, heads, -1, cache.shape[3])
    return of_beams.gather(1, indices).flatten(0, 1)


def decoder_of(model: VisionEncoderDecoderModel) -> nn.Module:
    return model.decoder.model.decoder


def parts_of(model: VisionEncoderDecoderModel, generation: Generation) -> list[ExportablePart]:
    """The three parts with their tensors, dims, examples and plugin counts."""
    config = model.config
    height, width = image_size(config)
    layers, heads = config.decoder.decoder_layers, config.decoder.decoder_attention_heads
    head_dim = config.decoder.d_model // heads
    vocab_size, max_positions = config.decoder.vocab_size, positions_of(config)
    tokens = model.encoder.embeddings.position_embeddings.shape[1]
    hidden = decoder_of(model).layers[0].encoder_attn.kdim

    beams = generation.step_beams
    largest = MAX_ROWS // beams
    batch = Dim("batch", 1, tuple(dict.fromkeys(max(1, rows // beams) for rows in TUNED_ROWS)), largest)
    length = Dim("length", min(CACHE_STEP, max_positions), (min(64, max_positions),), max_positions)
    timed = [rows for rows in TIMED_BATCHES if rows <= largest]

    def keys_and_values(name: str, heads: int, length: int | str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{name}_{kind}_{layer}", "float32", ("batch", heads, length, head_dim), internal=True)
            for layer in range(layers)
            for kind in ("key", "value")
        )

    image = TensorSpec("pixel_values", "float32", ("batch", 3, height, width))
    encoded = TensorSpec("encoder_hidden", "float32", ("batch", tokens, hidden), internal=True)
    cross = keys_and_values("cross", heads, tokens)
    each = ("batch",) if beams == 1 else ("batch", beams)  # of what is decoded
    sequences = TensorSpec("sequences", "int32", (*each, "length"))
    scores = TensorSpec("scores", "float32", each, chosen=True)
    position = TensorSpec("position", "int32", (1,))
    finished = TensorSpec("finished", "int32", ("batch",))
    state: tuple[TensorSpec, ...]
    if beams == 1:
        state = (sequences, position, finished)
    else:
        ancestors, hypotheses = replace(sequences, name="ancestors"), replace(sequences, name="hypotheses")
        lengths, hypothesis_scores = TensorSpec("lengths", "int32", each), replace(scores, name="hypothesis_scores")
        state = (sequences, scores, ancestors, hypotheses, lengths, hypothesis_scores, position, finished)
    logits = TensorSpec("logits", "float32", (*each, vocab_size))

    # layers whose input no LayerNorm made: the first, where the embedding has none
    unnormalised = int(decoder_of(model).layernorm_embedding is None)
    encoder_layers = config.encoder.num_hidden_layers
    encoder = Part(
        "encoder",
        (image,),
        (encoded,),
        (batch,),
        {
            "residual_layer_norm": 2 * encoder_layers,
            "encoder_attention": encoder_layers,
            "linear": 6 * encoder_layers + int(hasattr(model, "enc_to_dec_proj")),
        },
        tuple({"batch": rows} for rows in timed),
    )
    prefill = Part(
        "prefill", (encoded,), cross, (batch,), {"linear": 2 * layers, "split_heads": 2 * layers}, encoder.time_at
    )
    integers = {tensor.name: 0 for tensor in state if not tensor.is_float}
    step = Part(
        "step",
        (*state, *keys_and_values("self", beams * heads, "length"), *cross),
        (
            logits,
            *(replace(tensor, name=f"next_{tensor.name}") for tensor in state),
            *keys_and_values("present", beams * heads, "length"),
        ),
        (batch, length),
        {
            "token_embedding": int(config.decoder.use_learned_position_embeddings),
            "residual_layer_norm": 3 * layers,
            "cached_self_attention" if beams == 1 else "beam_self_attention": layers,
            "cross_attention": layers,
            "layer_norm_linear": 2 * layers + 1,
            "layer_norm_qkv": layers - unnormalised,
            "linear_residual": 3 * layers,
            "greedy_choice" if beams == 1 else "beam_choice": 1,
        },
        tuple(
            {"batch": rows, "length": slots, **integers, "position": slots - 1, "sequences": 5}
            for rows, slots in (*((rows, min(24, max_positions)) for rows in timed), (1, max_positions))
        ),
    )

    def example_of(part: Part) -> Callable[[Mapping[str, int], np.random.Generator], dict[str, np.ndarray]]:
        def example(dims: Mapping[str, int], random: np.random.Generator) -> dict[str, np.ndarray]:
            made = {}
            # Before the last step: behind it all beams have ended, and which is first no longer matters.
            longest = max(1, min(dims.get("length", 1), generation.max_length - 2))
            bounds = {"position": longest, "lengths": longest, "finished": 2, "ancestors": beams}
            for tensor in part.inputs:
                shape = tensor.sizes(dims)
                if tensor.name in integers:
                    made[tensor.name] = random.integers(0, bounds.get(tensor.name, vocab_size), shape, np.int32)
                elif tensor is image:
                    made[tensor.name] = random.uniform(-1, 1, shape).astype(np.float32)
                else:
                    made[tensor.name] = random.standard_normal(shape, np.float32)
            return made

        return example

    def exportable(part: Part, module: nn.Module, trace_length: int, *checks: tuple[int, int]) -> ExportablePart:
        names = [dim.name for dim in part.dims]
        trace_at = dict(zip(names, (2, trace_length)))
        return ExportablePart(
            part, module.eval(), example_of(part), trace_at, [dict(zip(names, sizes)) for sizes in checks]
        )

    stepping = (GreedyStep if beams == 1 else BeamStep)(model, generation)
    short, long = length.minimum, min(40, max_positions)
    return [
        exportable(encoder, Encoder(model), 0, (1, 0), (3, 0)),
        exportable(prefill, Prefill(model), 0, (1, 0), (3, 0)),
        exportable(step, stepping, min(16, max_positions), (1, long), (3, short)),
    ]


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """(height, width) that the encoder takes."""
    size = config.encoder.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def positions_of(config: PreTrainedConfig) -> int:
    return min(config.decoder.max_position_embeddings, MAX_POSITIONS)


# ---------------------------------------------------------------------------------------------------------------------
# Generation settings
# ---------------------------------------------------------------------------------------------------------------------

# Settings that change what `generate` returns and that models.trocr.decoding does not know, with the values (besides
# None) at which they do nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "repetition_penalty": (1.0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "num_return_sequences": (1,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "prompt_lookup_num_tokens": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "low_memory": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
    **dict.fromkeys(
        ("bad_words_ids", "constraints", "dola_layers", "exponential_decay_length_penalty", "force_words_ids"), ()
    ),
    **dict.fromkeys(("max_time", "sequence_bias", "stop_strings", "watermarking_config"), ()),
}


def generation_of(config: GenerationConfig, model_config: PreTrainedConfig, source: str) -> Generation:
    """The settings that decoding follows, with the defaults of `generate`.

    Raises Unusable naming a setting that is missing, out of range or not supported.
    """
    for name, neutral in UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            raise Unusable(f"{source}: the generation setting {name}={value!r} is not supported")

    def ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
        return () if value is None else (value,) if isinstance(value, int) else tuple(value)

    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if not isinstance(start, int):
        raise Unusable(f"{source}: the generation settings name no single decoder_start_token_id")
    eos = ids(config.eos_token_id)
    if config.max_new_tokens is not None:
        max_length = config.max_new_tokens + 1
    else:
        max_length = 21 if config.max_length is None else config.max_length  # 21: generate's default, 20 new tokens
    if not 2 <= max_length <= positions_of(model_config):
        raise Unusable(
            f"{source}: the generation setting max_length={max_length} is not in 2…{positions_of(model_config)}"
        )
    num_beams = 1 if config.num_beams is None else config.num_beams
    if not 1 <= num_beams <= MAX_ROWS:
        raise Unusable(f"{source}: the generation setting num_beams={num_beams} is not in 1…{MAX_ROWS}")
    made = Generation(
        start=start,
        eos=eos,
        pad=next((token for token in (*ids(config.pad_token_id), *eos)), 0),
        max_length=max_length,
        min_length=(config.min_length or 0) if config.min_new_tokens is None else config.min_new_tokens + 1,
        num_beams=num_beams,
        length_penalty=1.0 if config.length_penalty is None else float(config.length_penalty),
        early_stopping=config.early_stopping or False,
        no_repeat_ngram_size=config.no_repeat_ngram_size or 0,
        forced_bos=config.forced_bos_token_id,
        forced_eos=ids(config.forced_eos_token_id),
        suppress=ids(config.suppress_tokens),
        begin_suppress=ids(config.begin_suppress_tokens),
    )
    forced = () if made.forced_bos is None else (made.forced_bos,)
    vocab_size = model_config.decoder.vocab_size
    for token in (start, made.pad, *eos, *forced, *made.forced_eos, *made.suppress, *made.begin_suppress):
        if not 0 <= token < vocab_size:
            raise Unusable(f"{source}: the generation settings name token {token}, but the vocabulary has {vocab_size}")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load(weights: str, num_beams: int | None = None) -> LoadedModel:
    """The model that `weights` names: demo, random[:small|base|large|chinese], a transformers folder or a hub id; with
    `num_beams`, if given, instead of those of its generation settings.

    Raises Unusable, in one line, for anything that is none of these or does not fit.
    """
    if weights == "demo":
        return demo_model(num_beams)
    kind, _, variant = weights.partition(":")
    if kind == "random":
        return random_model(variant or "base", num_beams)
    folder = Path(weights)
    if folder.is_dir():
        return folder_model(folder, weights, num_beams)
    if folder.exists():
        raise Unusable(f"{weights} is a file: TrOCR weights are a transformers folder, a hub id, demo or random")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights):
        raise Unusable(f"{weights} does not exist")
    try:
        wanted = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"]
        downloaded = snapshot_download(weights, allow_patterns=wanted, ignore_patterns=["*/*", "training_args.bin"])
    except Exception as problem:  # no network, no such repository, no permission: each has its own exception tree
        raise Unusable(f"{weights} is no folder and cannot be downloaded from the hub ({brief(problem)})") from problem
    return folder_model(Path(downloaded), weights, num_beams)


def loaded(
    model: VisionEncoderDecoderModel,
    weights: str,
    generation_config: GenerationConfig,
    image_settings: Mapping[str, Any],
    reader: Tokenizer,
    num_beams: int | None,
    clean_up: bool = False,
) -> LoadedModel:
    """What the chain needs of a model whose weights are in place."""
    model.eval().requires_grad_(False)
    generation_config = copy.deepcopy(generation_config)
    if num_beams is not None:
        generation_config.num_beams = num_beams
    generation = generation_of(generation_config, model.config, weights)
    decoder = model.config.decoder
    settings = {
        "images": dict(image_settings),
        "generation": asdict(generation),
        "layers": decoder.decoder_layers,
        "heads": decoder.decoder_attention_heads,
        "head_dim": decoder.d_model // decoder.decoder_attention_heads,
        "vocab_size": decoder.vocab_size,
        "max_positions": positions_of(model.config),
        "tokenizer": tokenizers.FILE_NAME,
        "clean_up": clean_up,
    }
    asked = copy.deepcopy(generation_config)
    asked.return_dict_in_generate = True
    asked.max_length, asked.max_new_tokens = (
        generation.max_length,
        None,
    )  # spelled out, or generate warns of its default
    asked.output_scores = generation.num_beams > 1  # without it there are no sequences_scores
    model.generation_config = asked  # generate fills what is unset from here, not only from its argument

    @torch.inference_mode()
    def generate(pixel_values: np.ndarray, how: GenerationConfig) -> Any:
        weight = next(model.parameters())
        return model.generate(torch.from_numpy(pixel_values).to(weight.device, weight.dtype), generation_config=how)

    def original(items: Sequence[Image.Image]) -> list[TextResult]:
        output = generate(preprocess(items, image_settings), asked)
        scores = [None] * len(items) if generation.num_beams == 1 else output.sequences_scores.tolist()
        rows = [trimmed(row, generation) for row in output.sequences[:, 1:].tolist()]
        return results_of([Decoded(row, score) for row, score in zip(rows, scores)], reader, clean_up)

    def workloads() -> dict[str, Callable[[], Any]]:
        how = copy.deepcopy(asked)
        how.max_length, how.num_beams, how.output_scores = 1 + TIMED_TOKENS, generation.step_beams, False
        how.eos_token_id = how.forced_eos_token_id = None
        model.set_attn_implementation("sdpa")  # generate's default; what is exported is plainer
        timed = timed_images(image_settings, generation.step_beams)
        return {name: partial(generate, images, how) for name, images in timed.items()}

    def save_assets(folder: Path) -> None:
        reader.save(str(folder / tokenizers.FILE_NAME))

    parameters = f"{sum(tensor.numel() for tensor in model.parameters()):,}".replace(",", " ")
    line = f"{weights}, {parameters} parameters"
    return LoadedModel(
        line, parts_of(model, generation), json.loads(json.dumps(settings)), original, workloads, save_assets
    )


def built(config: VisionEncoderDecoderConfig, source: str) -> VisionEncoderDecoderModel:
    """The model on the meta device: no memory, no time for initial values.  The unused pooler is left out."""
    try:
        config._attn_implementation = "eager"
        with torch.device("meta"):
            model = VisionEncoderDecoderModel(config)
    except (ValueError, TypeError, KeyError) as problem:
        raise Unusable(f"{source}: config.json describes no model ({brief(problem)})") from problem
    model.encoder.pooler = None
    return model


def filled(model: VisionEncoderDecoderModel, state: Mapping[str, Tensor], source: str) -> VisionEncoderDecoderModel:
    """The model of `built` with the tensors of a state dict; raises Unusable naming those missing or left over."""
    state = {current_name(name): tensor.float() for name, tensor in state.items() if not OBSOLETE.search(name)}
    output, embedding = "decoder.output_projection.weight", "decoder.model.decoder.embed_tokens.weight"
    if model.config.decoder.tie_word_embeddings and embedding in state:
        state.setdefault(output, state[embedding])
    expected = dict(model.named_parameters(remove_duplicate=False))
    for what, names in (("lacks", expected.keys() - state.keys()), ("has left over", state.keys() - expected.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise Unusable(f"{source}: the checkpoint {what} {len(names)} tensors: {listed}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(state[name].shape)}, the configuration says {tuple(tensor.shape)}"
            raise Unusable(f"{source}: the checkpoint's {name} is {shapes}")
    model.load_state_dict(state, assign=True)
    positions = decoder_of(model).embed_positions
    if not model.config.decoder.use_learned_position_embeddings:
        # A plain attribute, no buffer: from_pretrained leaves it on the meta device, and fails.
        count, dim = positions.weights.shape
        positions.weights = positions.get_embedding(count, dim, positions.padding_idx)
    return model


# Tensors that older checkpoints carry: the pooler, which TrOCR does not use, and constants.
OBSOLETE = re.compile(r"^encoder\.pooler\.|embed_positions\.(_float_tensor|weights)$|decoder\.version$|position_ids$")

# Names of ViT's and DeiT's tensors before transformers 5, as the checkpoints on the hub have them.
RENAMED = (
    (re.compile(r"^encoder\.encoder\.layer\."), "encoder.layers."),
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), lambda found: f".attention.{found[1][0]}_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"\.output\.dense\."), ".mlp.fc2."),
)


def current_name(name: str) -> str:
    """The name that transformers 5 gives a tensor of a checkpoint of any age."""
    if name.startswith("encoder."):
        for pattern, replacement in RENAMED:
            name = pattern.sub(replacement, name)
    return name


def folder_model(folder: Path, source: str, num_beams: int | None) -> LoadedModel:
    """A folder as `save_pretrained` writes it, or trocr-chinese's."""
    if not (folder / "config.json").is_file():
        raise Unusable(f"{source} holds no config.json: it is no transformers folder")
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as problem:  # damaged JSON, unknown model type, failed validation
        raise Unusable(f"{source}: config.json cannot be used ({brief(problem)})") from problem
    if config.model_type != "vision-encoder-decoder":
        raise Unusable(f"{source} is a {config.model_type} model, not a vision-encoder-decoder with a TrOCR decoder")
    encoder, decoder = config.encoder, config.decoder
    if encoder.model_type not in ("vit", "deit") or decoder.model_type != "trocr":
        found = f"{encoder.model_type} encoder and a {decoder.model_type} decoder"
        raise Unusable(f"{source} has a {found}: TrOCR has a vit or deit encoder and a trocr decoder")

    vocabulary = tokenizers.character_vocabulary_of(folder, decoder.vocab_size)
    if vocabulary is None:
        reader, clean_up = tokenizers.of_folder(folder)
        generation_config = folder_generation(folder, source)
    else:
        reader, clean_up = tokenizers.of_characters(vocabulary), False
        generation_config = chinese_generation(vocabulary, config)
    image_settings = folder_images(folder, source, config)
    model = filled(built(config, source), checkpoint(folder, source), source)
    return loaded(model, source, generation_config, image_settings, reader, num_beams, clean_up)


def folder_generation(folder: Path, source: str) -> GenerationConfig:
    """As from_pretrained: generation_config.json, or what an old config.json says of generation."""
    try:
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
    except Exception as problem:
        raise Unusable(f"{source}: its generation settings cannot be used ({brief(problem)})") from problem


def chinese_generation(vocabulary: Mapping[str, int], config: PreTrainedConfig) -> GenerationConfig:
    """trocr-chinese's published inference: greedy, from <s>, up to 100 tokens."""
    end = vocabulary["</s>"]
    return GenerationConfig(
        decoder_start_token_id=vocabulary["<s>"],
        eos_token_id=end,
        pad_token_id=vocabulary.get("<pad>", end),
        max_length=min(101, positions_of(config)),
    )


def folder_images(folder: Path, source: str, config: PreTrainedConfig) -> dict[str, Any]:
    """The pre-processing that the folder asks for; TrOCR's own where it says nothing."""
    height, width = image_size(config)
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return trocr_images(height, width)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        size = (processor.size["height"], processor.size["width"])
    except Exception as problem:
        raise Unusable(f"{source}: its image pre-processing cannot be used ({brief(problem)})") from problem
    if not processor.do_resize or getattr(processor, "do_center_crop", False) or size != (height, width):
        raise Unusable(f"{source}: its pre-processing must resize to the encoder's {height}×{width} without cropping")
    if not processor.do_normalize:
        mean, std = [0.0] * 3, [1.0] * 3
    else:
        mean, std = list(processor.image_mean), list(processor.image_std)
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    return dict(height=height, width=width, resample=int(processor.resample), scale=scale, mean=mean, std=std)


def trocr_images(height: int, width: int) -> dict[str, Any]:
    """Bilinear, and the range -1…1."""
    resample = int(Image.Resampling.BILINEAR)
    return dict(height=height, width=width, resample=resample, scale=1 / 255, mean=[0.5] * 3, std=[0.5] * 3)


def checkpoint(folder: Path, source: str) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or several."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        try:
            if (folder / single).is_file():
                files = [folder / single]
            elif index.is_file():
                files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            else:
                continue
            state: dict[str, Tensor] = {}
            for file in files:
                safe = file.suffix == ".safetensors"
                state |= load_file(file) if safe else torch.load(file, "cpu", weights_only=True)
            if not all(isinstance(tensor, Tensor) for tensor in state.values()):
                raise ValueError("it holds other things than tensors")
            return state
        except Exception as problem:  # damaged files raise what their parsers please
            raise Unusable(f"{source}: {single} cannot be loaded ({brief(problem)})") from problem
    raise Unusable(f"{source} holds no weights: neither model.safetensors nor pytorch_model.bin")


# ---------------------------------------------------------------------------------------------------------------------
# Random weights
# ---------------------------------------------------------------------------------------------------------------------


def configs(variant: str, vocab_size: int | None = None) -> VisionEncoderDecoderConfig:
    """The architecture of microsoft/trocr-{small,base}-handwritten and -large-printed.

    The output projection is not tied to the embeddings, as it is in the published base model: tied random weights
    repeat the token they are given.
    """
    decoder: dict[str, Any]
    encoder: PreTrainedConfig
    if variant == "small":
        encoder = DeiTConfig(
            hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=384, pooler_act="tanh"
        )
        decoder = dict(vocab_size=64044, d_model=256, decoder_layers=6, decoder_attention_heads=8, decoder_ffn_dim=1024)
        decoder |= dict(activation_function="relu", scale_embedding=True, cross_attention_hidden_size=384)
    elif variant == "base":
        encoder = ViTConfig(image_size=384, qkv_bias=False)
        decoder = dict(cross_attention_hidden_size=768)
    elif variant == "large":
        large: dict[str, Any] = dict(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        )
        encoder = ViTConfig(**large, image_size=384, qkv_bias=False)
        decoder = dict(activation_function="relu", max_position_embeddings=1024, cross_attention_hidden_size=1024)
        decoder |= dict(use_learned_position_embeddings=False, layernorm_embedding=False, scale_embedding=True)
    if vocab_size:
        decoder["vocab_size"] = vocab_size
    return VisionEncoderDecoderConfig(
        encoder=encoder.to_dict(), decoder=TrOCRConfig(**decoder, tie_word_embeddings=False).to_dict()
    )


def random_weights(config: VisionEncoderDecoderConfig) -> VisionEncoderDecoderModel:
    """A model with seeded weights under which the tokens depend on the image, on the position and on each other.

    Matrices are N(0, 1.5/√inputs), which keeps attention from being flat.  Two things would still make a decoder repeat
    one token: attention sums, nearly the same at each step, and the positive mean of the feed-forward activations.  So
    its attentions' output matrices are narrower, 0.3/√inputs, and each row of a second feed-forward matrix sums to 0.
    The output projection is N(0, 3/√inputs), for logits of the size that trained models have; embeddings come out as
    N(0, 1), biases are N(0, 0.02), normalisations the identity.
    """
    model = built(config, "random weights")
    generator = torch.Generator().manual_seed(SEED)
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inputs = math.prod(parameter.shape[1:])
        if re.search(r"norm\w*\.weight$", name):
            state[name] = torch.ones(parameter.shape)
            continue
        if name.endswith("bias"):
            deviation = 0.02
        elif name.endswith("embed_tokens.weight"):
            deviation = 1 / decoder_of(model).embed_tokens.embed_scale
        elif re.search(r"embed_positions\.|_embeddings$|_token$", name):
            deviation = 1.0
        elif name.endswith("output_projection.weight"):
            deviation = 3 / math.sqrt(inputs)
        else:
            deviation = (0.3 if name.endswith("out_proj.weight") else 1.5) / math.sqrt(inputs)
        state[name] = torch.randn(parameter.shape, generator=generator) * deviation
        if name.endswith("fc2.weight"):
            state[name] -= state[name].mean(dim=1, keepdim=True)
    return filled(model, state, "random weights")


def random_model(variant: str, num_beams: int | None) -> LoadedModel:
    if variant not in ("small", "base", "large", "chinese"):
        raise Unusable(f"unknown weights random:{variant}: choose random:small, :base, :large or :chinese")
    images = trocr_images(384, 384)
    if variant == "chinese":
        vocabulary = tokenizers.character_vocabulary(gb2312())
        model = random_weights(configs("base", len(vocabulary)))
        reader, generation = tokenizers.of_characters(vocabulary), chinese_generation(vocabulary, model.config)
    else:
        model = random_weights(configs(variant))
        reader = tokenizers.of_numbers(model.config.decoder.vocab_size)
        generation = GenerationConfig(decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)
    return loaded(model, f"random weights (TrOCR {variant}, seed {SEED})", generation, images, reader, num_beams)


def demo_model(num_beams: int | None) -> LoadedModel:
    """The model in demo/, which this project has trained; its samples come on top of the usual ones."""
    found = folder_model(DEMO, "demo weights, trained by this project on rendered lines", num_beams)
    return replace(found, settings={**found.settings, "demo": True})


def gb2312() -> str:
    """Printable ASCII and the characters of GB 2312."""
    rows = (bytes([high, low]) for high in range(0xA1, 0xF8) for low in range(0xA1, 0xFF))
    return "".join(map(chr, range(0x20, 0x7F))) + "".join(row.decode("gb2312", errors="ignore") for row in rows)
