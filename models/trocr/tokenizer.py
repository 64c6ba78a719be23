"""Text from token ids, by a `tokenizer.json` in the build folder; and the making of that file."""

from __future__ import annotations

import json
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from models.spec import Unusable

FILE_NAME = "tokenizer.json"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# What transformers' clean_up_tokenization replaces, in this order.
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def text_of(tokenizer: Tokenizer, ids: Sequence[int], clean_up: bool) -> str:
    """The text of token ids, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    for spaced, joined in CLEAN_UP if clean_up else ():
        text = text.replace(spaced, joined)
    return text


def saved(folder: Path) -> Tokenizer:
    """The tokenizer in a build folder; raises Unusable if it is missing or damaged."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise Unusable(f"{path} is missing: run `python export_onnx.py trocr` first")
    return _parsed(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _parsed(path: Path, modified: int) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as problem:  # the library raises bare Exceptions
        raise Unusable(f"{path} is damaged: run `python export_onnx.py trocr` again") from problem


def brief(problem: Exception) -> str:
    """An exception of a library, some of which explain at length, in one short line."""
    return textwrap.shorten(str(problem), 160, placeholder=" …") or type(problem).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Making tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def of_characters(vocabulary: Mapping[str, int]) -> Tokenizer:
    """A tokenizer whose tokens are single characters, and the special tokens among `vocabulary`."""
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL if token in vocabulary])
    return tokenizer


def character_vocabulary(characters: str) -> Dict[str, int]:
    """trocr-chinese's layout of vocab.json: the special tokens, then the characters."""
    return {token: index for index, token in enumerate((*SPECIAL, *characters))}


def of_numbers(vocab_size: int) -> Tokenizer:
    """A tokenizer for random weights, which have no vocabulary: each id reads as its decimal number."""
    vocabulary = {SPECIAL[i] if i < len(SPECIAL) else str(i): i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def character_vocabulary_of(folder: Path, vocab_size: int) -> Optional[Dict[str, int]]:
    """The folder's vocab.json if it is trocr-chinese's: single characters, as many as the model has outputs."""
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(vocabulary, dict) or sorted(map(str, vocabulary.values())) != sorted(map(str, range(vocab_size))):
        return None
    fits = "<s>" in vocabulary and "</s>" in vocabulary and all(len(t) == 1 for t in vocabulary if t not in SPECIAL)
    return vocabulary if fits else None


def of_folder(folder: Path) -> Tuple[Tokenizer, bool]:
    """The tokenizer of a transformers folder, and whether its texts are cleaned up; needs transformers."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except Exception as problem:  # whatever the many tokenizer classes raise on files that do not fit
        raise Unusable(f"{folder}: its tokenizer cannot be loaded ({brief(problem)})") from problem
    return backend, _cleans_up(tokenizer)


def _cleans_up(tokenizer: Any) -> bool:
    # As transformers' decode: clean-up strips wanted spaces from BPE texts, so those are spared unless it is forced.
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    spared = isinstance(tokenizer.backend_tokenizer.model, models.BPE) and not forced
    return bool(tokenizer.clean_up_tokenization_spaces) and not spared
