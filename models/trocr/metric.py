"""How good recognised texts are: character error rate (CER) and exact matches."""

from __future__ import annotations

from typing import Dict, Mapping, Sequence, Union

from models.spec import Metric
from models.trocr.pipeline import TextResult


def edits(truth: str, text: str) -> Dict[str, float]:
    """{"edits", "characters"} (of the truth); every character of a text whose truth is empty is one edit."""
    import jiwer

    if not truth.strip():  # jiwer takes no empty truth
        return {"edits": len(text.strip()), "characters": 0}
    counts = jiwer.process_characters(truth, text)
    replaced = counts.substitutions + counts.deletions
    return {"edits": replaced + counts.insertions, "characters": replaced + counts.hits}


def cer(counts: Sequence[Mapping[str, float]]) -> float:
    """Edits per character of the truths, in percent."""
    return 100 * sum(one["edits"] for one in counts) / max(sum(one["characters"] for one in counts), 1)


def cer_percent(truths: Sequence[str], texts: Sequence[str]) -> float:
    """The CER of texts, in percent."""
    return cer([edits(truth, text) for truth, text in zip(truths, texts)])


def scored(result: TextResult, truth: str) -> Dict[str, float]:
    return {**edits(truth, result.text), "exact": result.text.strip() == truth.strip()}


def total_score(scores: Sequence[Mapping[str, float]]) -> Dict[str, float]:
    exact = sum(one["exact"] for one in scores)
    return {"CER %": cer(scores), "exact match %": 100 * exact / max(len(scores), 1)}


def badness(scores: Mapping[str, float]) -> float:
    return scores["CER %"]


def differences(reference: TextResult, result: TextResult) -> Dict[str, float]:
    """They differ if any token does."""
    return {**edits(reference.text, result.text), "differs": reference.ids != result.ids}


def total_difference(found: Sequence[Mapping[str, float]]) -> Dict[str, float]:
    return {"differing outputs": sum(one["differs"] for one in found), "CER % against reference": cer(found)}


score = Metric(scored, total_score)
difference = Metric(differences, total_difference)


def describe(text: Union[TextResult, str]) -> str:
    return text if isinstance(text, str) else text.text
