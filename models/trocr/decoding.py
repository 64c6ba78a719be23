"""Greedy and beam search over an executor, token for token what transformers' `generate` returns.

The step part itself chooses the tokens, of one sequence or of several beams for each image, and keeps sequences,
scores, position and ends where it runs: nothing passes through the host between tokens.  What looks at more of a
sequence than its last token (n-grams that must not repeat) is done here, in numpy.

Rows are sequences being decoded: one for each image, or with a beam search on the host `num_beams` for each image,
image by image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from models.spec import Executor

# What transformers adds to a score to put it out of the running.  Not -inf: scores stay comparable in float32.
OUT = np.float32(-1e9)
MOST_CANDIDATES = 128  # that a step can choose from, see plugins/beam_choice/kernel.cuh


@dataclass(frozen=True)
class Generation:
    """The generation settings that decoding follows, under the meanings that transformers gives them.

    Lengths count the start token.  `eos` may be empty: then every row runs to `max_length`.
    """

    start: int
    eos: Tuple[int, ...]
    pad: int
    max_length: int
    min_length: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: Union[bool, str] = False
    no_repeat_ngram_size: int = 0
    forced_bos: Optional[int] = None
    forced_eos: Tuple[int, ...] = ()
    suppress: Tuple[int, ...] = ()
    begin_suppress: Tuple[int, ...] = ()

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Generation:
        fields: Dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return Generation(**fields)

    @property
    def candidates(self) -> int:
        """How many continuations of an image's beams are looked at.  Each beam can end in as many ways as there are end
        tokens: with so many candidates, `num_beams` go on in any case."""
        return max(2, 1 + len(self.eos)) * self.num_beams

    @property
    def step_beams(self) -> int:
        """The beams of each image that a step made for these settings decodes: 1 where it knows of none."""
        in_step = self.no_repeat_ngram_size == 0 and self.candidates <= MOST_CANDIDATES
        return self.num_beams if in_step else 1


@dataclass(frozen=True)
class Decoded:
    """Token ids without the start token and without padding (the end token is kept), and a beam search's score."""

    ids: List[int]
    score: Optional[float] = None


class StepLoop:
    """Runs the decoder part token by token and keeps its K/V cache, which starts out empty.

    cross     outputs of the prefill part by name, with one row for each row that is decoded, or for the beams of one
    batch     rows, or images where the step decodes their beams
    capacity  how many positions the cache holds, and a sequence may have
    """

    def __init__(self, executor: Executor, cross: Mapping[str, Any], batch: int, capacity: int, layers: int) -> None:
        self._executor = executor
        self._cross = cross
        self._shape = (batch, capacity)
        self._cache_names = [f"self_{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]
        dims = {"batch": batch, "length": capacity}
        self._cache: Dict[str, Any] = {name: executor.zeros("step", name, dims) for name in self._cache_names}

    def logits(self, tokens: np.ndarray, position: int) -> np.ndarray:
        """Feeds tokens (rows,) at `position` and returns the logits (rows, vocabulary) of the token after them."""
        sequences = np.zeros(self._shape, np.int32)  # of which a step reads one column
        sequences[:, position] = tokens
        inputs = {**self._greedy_state(sequences, position), **self._cache, **self._cross}
        outputs = self._executor.run("step", inputs)
        self._cache = {name: outputs[present(name)] for name in self._cache_names}
        return outputs["logits"]

    def greedy(self, generation: Generation) -> np.ndarray:
        """Sequences (rows, capacity) of the tokens that the step itself chooses, behind them padding."""
        sequences = np.full(self._shape, generation.pad, np.int32)
        sequences[:, 0] = generation.start
        return self._loop(generation, self._greedy_state(sequences, 0))["next_sequences"]

    def beams(self, generation: Generation) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The hypotheses (images, beams, capacity) that the step itself finds, best first, their lengths and scores
        (images, beams).  A length of 0 says that there is none."""
        images, capacity = self._shape
        sequences = np.full((images, generation.num_beams, capacity), generation.pad, np.int32)
        sequences[:, :, 0] = generation.start
        scores = np.full(sequences.shape[:2], OUT)
        scores[:, 0] = 0  # all beams start alike: only the first may branch
        state = {
            "sequences": sequences,
            "scores": scores,
            "ancestors": np.zeros_like(sequences),
            "hypotheses": sequences,
            "lengths": np.zeros(scores.shape, np.int32),
            "hypothesis_scores": np.full_like(scores, OUT),
            "position": np.zeros(1, np.int32),
            "finished": np.zeros(images, np.int32),
        }
        found = self._loop(generation, state)
        return found["next_hypotheses"], found["next_lengths"], found["next_hypothesis_scores"]

    def _greedy_state(self, sequences: np.ndarray, position: int) -> Dict[str, np.ndarray]:
        finished = np.zeros(len(sequences), np.int32)
        return {"sequences": sequences, "position": np.array([position], np.int32), "finished": finished}

    def _loop(self, generation: Generation, state: Mapping[str, np.ndarray]) -> Dict[str, Any]:
        """Steps from a first state until all have finished, or are as long as may be."""
        carried = {f"next_{name}": name for name in state}
        carried.update({present(name): name for name in self._cache_names})
        return self._executor.loop(
            "step",
            {**state, **self._cache, **self._cross},
            carried,
            times=generation.max_length - 1,
            until="next_finished" if generation.eos else None,
        )

    def reorder(self, parents: np.ndarray) -> None:
        """Row i continues what row `parents[i]` has decoded.  Both belong to one image: `cross` stays as it is."""
        if not np.array_equal(parents, np.arange(len(parents))):
            self._cache = {name: self._executor.rows(value, parents) for name, value in self._cache.items()}


def present(cache: str) -> str:
    """The output that holds what the input `cache` is to be in the next step."""
    return cache.replace("self", "present")


def restrict(scores: np.ndarray, sequences: np.ndarray, generation: Generation) -> np.ndarray:
    """A copy of scores (rows, vocabulary) in which forbidden continuations of sequences (rows, length) are -inf.

    The order is that of transformers' logits processors, and matters where a forced token is also suppressed.
    """
    scores = np.array(scores, np.float32)
    length = sequences.shape[1]
    ngram = generation.no_repeat_ngram_size
    if 0 < ngram <= length:
        windows = np.lib.stride_tricks.sliding_window_view(sequences, ngram, axis=1)  # (rows, length-ngram+1, ngram)
        suffix = sequences[:, None, length + 1 - ngram :]
        rows, places = np.nonzero((windows[..., :-1] == suffix).all(axis=-1))
        scores[rows, windows[rows, places, -1]] = -np.inf
    if length < generation.min_length:
        scores[:, generation.eos] = -np.inf
    if generation.forced_bos is not None and length == 1:
        scores = force(scores, (generation.forced_bos,))
    if generation.forced_eos and length == generation.max_length - 1:
        scores = force(scores, generation.forced_eos)
    scores[:, generation.suppress] = -np.inf
    if length == (1 if generation.forced_bos is None else 2):
        scores[:, generation.begin_suppress] = -np.inf
    return scores


def force(scores: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Scores of the same shape that leave only `tokens` possible."""
    forced = np.full_like(scores, -np.inf)
    forced[:, tokens] = 0
    return forced


def tables(generation: Generation, vocabulary: int, positions: int) -> Tuple[np.ndarray, np.ndarray]:
    """What `restrict` does without regard to n-grams, for a step that knows its position p and has p + 1 tokens:

    allowed_from (vocabulary,)  tokens may be chosen where p is no smaller
    forced (positions,)         the token that is chosen at p whatever the logits are, or -1; for beams one that is no
                                token, where none may be chosen
    """
    never = np.iinfo(np.int32).max
    allowed_from = np.zeros(vocabulary, np.int32)
    allowed_from[list(generation.eos)] = max(generation.min_length - 1, 0)
    # from the begin on: before it, if anything, the token is forced
    begin = 0 if generation.forced_bos is None else 1
    suppressed = np.zeros(vocabulary, np.int32)
    suppressed[list(generation.begin_suppress)] = begin + 1
    suppressed[list(generation.suppress)] = never

    forced = np.full(positions, -1, np.int32)

    def force_at(position: int, tokens: Sequence[int]) -> None:
        left = [token for token in tokens if suppressed[token] != never]
        if position == begin:
            left = [token for token in left if token not in generation.begin_suppress]
        # the first of equal ones; of none but -inf argmax takes the first, too, and beams end
        forced[position] = min(left, default=0 if generation.num_beams == 1 else vocabulary)

    if generation.forced_bos is not None:
        force_at(0, (generation.forced_bos,))
    if generation.forced_eos:
        force_at(generation.max_length - 2, generation.forced_eos)
    return np.maximum(allowed_from, suppressed), forced


def greedy_search(steps: StepLoop, rows: int, generation: Generation) -> List[Decoded]:
    """The most probable token at each step; each row ends by itself."""
    if generation.no_repeat_ngram_size > 0:
        return greedy_search_on_host(steps, rows, generation)
    ids = steps.greedy(generation)[:, 1 : generation.max_length].tolist()
    return [Decoded(trimmed(row, generation)) for row in ids]


def trimmed(ids: List[int], generation: Generation) -> List[int]:
    """A row's token ids up to its end token: what follows is padding for the sake of longer rows."""
    end = next((index for index, token in enumerate(ids) if token in generation.eos), len(ids))
    return ids[: end + 1]


def greedy_search_on_host(steps: StepLoop, rows: int, generation: Generation) -> List[Decoded]:
    """The same with restrictions that look at all of a sequence."""
    sequences = np.full((rows, generation.max_length), generation.pad, np.int64)
    sequences[:, 0] = generation.start
    lengths = np.ones(rows, np.int64)
    alive = np.ones(rows, bool)
    for length in range(1, generation.max_length):
        logits = steps.logits(sequences[:, length - 1], length - 1)
        tokens = restrict(logits, sequences[:, :length], generation).argmax(axis=-1)
        sequences[alive, length] = tokens[alive]
        lengths[alive] += 1
        alive &= ~np.isin(tokens, generation.eos)
        if not alive.any():
            break
    return [Decoded(row[1:length].tolist()) for row, length in zip(sequences, lengths)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices (images, count) of the highest scores (images, n), highest first."""
    found = np.argpartition(-scores, count - 1, axis=-1)[:, :count]
    order = np.argsort(-np.take_along_axis(scores, found, axis=-1), axis=-1, kind="stable")
    return np.take_along_axis(found, order, axis=-1)


def beam_search(steps: StepLoop, images: int, generation: Generation) -> List[Decoded]:
    """The best of `num_beams` hypotheses of each image.

    Finished hypotheses are ranked by log probability / generated length ** length_penalty.
    """
    if generation.step_beams == 1:
        return beam_search_on_host(steps, images, generation)
    hypotheses, lengths, scores = steps.beams(generation)
    return [
        Decoded(ids[1:length].tolist(), float(score))
        for ids, length, score in zip(hypotheses[:, 0], lengths[:, 0], scores[:, 0])
    ]


def beam_search_on_host(steps: StepLoop, images: int, generation: Generation) -> List[Decoded]:
    """The same with restrictions that look at all of a sequence."""
    g = generation
    beams, max_length, kept = g.num_beams, g.max_length, g.candidates
    image = np.arange(images)[:, None]

    running = np.full((images, beams, max_length), g.pad, np.int64)
    running[:, :, 0] = g.start
    running_scores = np.zeros((images, beams), np.float32)
    running_scores[:, 1:] = OUT  # all beams start alike: only the first may branch

    done = running.copy()
    done_lengths = np.ones((images, beams), np.int64)
    done_scores = np.full((images, beams), OUT, np.float32)
    is_done = np.zeros((images, beams), bool)
    improvable = np.ones((images, 1), bool)

    for length in range(1, max_length):
        sequences = running[:, :, :length].reshape(images * beams, length)
        log_probabilities = log_softmax(np.asarray(steps.logits(sequences[:, -1], length - 1), np.float32))
        totals = restrict(log_probabilities, sequences, g).reshape(images, beams, -1) + running_scores[:, :, None]
        vocabulary = totals.shape[-1]

        totals = totals.reshape(images, -1)
        candidates = best(totals, kept)
        scores = np.take_along_axis(totals, candidates, axis=1)
        parents, tokens = np.divmod(candidates, vocabulary)
        extended = running[image, parents]
        extended[:, :, length] = tokens
        ended = np.isin(tokens, g.eos) | (length + 1 == max_length)

        going_on: np.ndarray = scores + ended * OUT
        chosen = best(going_on, beams)
        running = extended[image, chosen]
        running_scores = np.take_along_axis(going_on, chosen, axis=1)

        # A candidate that ends competes with the hypotheses done before, if it is among the best `beams` of this step.
        ended_now = ended & (np.arange(kept) < beams)
        scores = scores / np.float32(length**g.length_penalty)
        scores += (is_done.all(axis=1, keepdims=True) & (g.early_stopping is True)) * OUT
        scores += ~improvable * OUT
        scores += ~ended_now * OUT
        merged_scores = np.concatenate([done_scores, scores], axis=1)
        ranking = best(merged_scores, beams)
        done_scores = np.take_along_axis(merged_scores, ranking, axis=1)
        done = np.concatenate([done, extended], axis=1)[image, ranking]
        new_lengths = np.full_like(candidates, length + 1)
        done_lengths = np.concatenate([done_lengths, new_lengths], axis=1)[image, ranking]
        is_done = np.concatenate([is_done, ended_now], axis=1)[image, ranking]

        reachable = max_length - 1 if g.early_stopping == "never" and g.length_penalty > 0 else length
        hoped_for = running_scores[:, :1] / np.float32(reachable**g.length_penalty)
        worst = np.where(is_done, done_scores.min(axis=1, keepdims=True), OUT)
        improvable &= (hoped_for > worst).any(axis=1, keepdims=True)
        if not improvable.any() or (is_done.all() and g.early_stopping is True):
            break
        steps.reorder((np.take_along_axis(parents, chosen, axis=1) + image * beams).ravel())

    return [Decoded(done[i, 0, 1 : done_lengths[i, 0]].tolist(), float(done_scores[i, 0])) for i in range(images)]


def decode(
    executor: Executor, encoder_hidden: Any, images: int, generation: Generation, layers: int, capacity: int
) -> List[Decoded]:
    """Decodes the encoder's output, an internal value of `images` rows, with a cache of `capacity` positions.

    generation  what the step was exported for; a search may have another max_length, and no eos: then it takes so many
                steps, ended rows are padded, and beams that have not ended by then are lost
    """
    cross = executor.run("prefill", {"encoder_hidden": encoder_hidden})
    copies = generation.num_beams // generation.step_beams  # of each image's row
    if copies > 1:
        cross = {name: executor.rows(value, np.repeat(np.arange(images), copies)) for name, value in cross.items()}
    steps = StepLoop(executor, cross, images * copies, capacity, layers)
    return (beam_search if generation.num_beams > 1 else greedy_search)(steps, images, generation)
