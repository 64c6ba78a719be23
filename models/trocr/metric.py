"""How good recognised texts are: character error rate (CER) and exact matches."""

from __future__ import annotations

from typing import Dict, Sequence

from models.trocr.pipeline import TextResult


def cer_percent(truths: Sequence[str], texts: Sequence[str]) -> float:
    """Edits per character of the truths, in percent; every character of a text whose truth is empty is one edit."""
    import jiwer

    edits = length = 0
    for truth, text in zip(truths, texts):
        if truth.strip():
            counts = jiwer.process_characters(truth, text)
            edits += counts.substitutions + counts.deletions + counts.insertions
            length += counts.substitutions + counts.deletions + counts.hits
        else:  # jiwer takes no empty truth
            edits += len(text.strip())
    return 100 * edits / max(length, 1)


def score(results: Sequence[TextResult], truths: Sequence[str]) -> Dict[str, float]:
    """{"CER %", "exact match %"} of results against the true texts."""
    texts = [result.text for result in results]
    matches = sum(text.strip() == truth.strip() for text, truth in zip(texts, truths))
    return {"CER %": cer_percent(truths, texts), "exact match %": 100 * matches / max(len(texts), 1)}


def difference(reference: Sequence[TextResult], results: Sequence[TextResult]) -> Dict[str, float]:
    """{"differing outputs" (in any token), "CER % against reference"} of results against another executor's."""
    return {
        "differing outputs": sum(one.ids != other.ids for one, other in zip(reference, results)),
        "CER % against reference": cer_percent([r.text for r in reference], [r.text for r in results]),
    }
