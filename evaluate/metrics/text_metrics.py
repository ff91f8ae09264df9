"""Scores answers against references: text metrics, without torch.

A score is `{"value": float, "stderr": float | None, "n": int}`. Higher is always better; values
are fractions from 0 to 1, except bleu and chrf, which are sacrebleu's 0 to 100.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from finequant.recipes.errors import UserError

Score = dict[str, float | int | None]

OUT_OF_100 = ("bleu", "chrf")
"""Metrics from 0 to 100; all others are fractions of 1."""

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A number; a hyphen after a digit or word is no sign: 8-3, GPT-4."""


def score_answers(
    answers: list[str], references: list[str], metrics: list[str]
) -> dict[str, Score]:
    """Scores answers with each of `metrics` that is a key of METRICS: {metric: score}.

    Raises:
        UserError: for json_match if a reference is not JSON.
    """
    return {metric: METRICS[metric](answers, references) for metric in metrics if metric in METRICS}


def paired_changes(
    before: list[str], after: list[str], references: list[str], metrics: list[str]
) -> dict[str, Score]:
    """Computes how much metrics change between two models' answers, row by row: {metric: score}.

    The standard error is that of the mean difference: rows that both models answer alike add
    nothing to it. Metrics that are not means over rows of answers are left out.
    """
    rows = list(zip(before, after, references, strict=True))
    return {
        metric: mean(
            [
                METRICS[metric]([later], [reference])["value"]
                - METRICS[metric]([earlier], [reference])["value"]
                for earlier, later, reference in rows
            ]
        )
        for metric in metrics
        if metric in METRICS and metric not in (*OUT_OF_100, "tool_call_recall")
    }


def exact_match(answers: list[str], references: list[str]) -> Score:
    """Counts answers that equal the reference after stripping whitespace at both ends."""
    return mean([a.strip() == r.strip() for a, r in zip(answers, references, strict=True)])


def json_match(answers: list[str], references: list[str]) -> Score:
    """Counts answers with equal JSON values: key order, whitespace, and 1 or 1.0 do not matter."""
    expected = [canonical_json(reference) for reference in references]
    if None in expected:
        row = expected.index(None)
        raise UserError(
            f"held-out row {row + 1}: the reference is not JSON: {references[row][:80]!r}\n"
            "json_match needs JSON in every row; correct it or remove json_match from "
            "evaluate.metrics."
        )
    pairs = zip(answers, expected, strict=True)
    return mean([canonical_json(answer) == value for answer, value in pairs])


def number_match(answers: list[str], references: list[str]) -> Score:
    """Counts answers whose last number equals the reference's, as a solution ends in its result:
    1,000 and 1000.0 are equal. If the reference has no number, the answer must have none either."""
    pairs = zip(answers, references, strict=True)
    return mean([_last_number(a) == _last_number(r) for a, r in pairs])


def tool_call_match(answers: list[str], references: list[str]) -> Score:
    """Counts answers that make exactly the reference's calls, in any order: same names, and equal
    arguments. If the reference makes no call, the answer must make none either."""
    pairs = zip(answers, references, strict=True)
    return mean([Counter(calls_in(a)) == Counter(calls_in(r)) for a, r in pairs])


def tool_call_recall(answers: list[str], references: list[str]) -> Score:
    """Computes the share of the references' calls that the answers make; there is at least one."""
    made: list[bool] = []
    for answer, reference in zip(answers, references, strict=True):
        unmatched = Counter(calls_in(answer))
        for call in calls_in(reference):
            made.append(unmatched[call] > 0)
            unmatched[call] -= 1
    return mean(made)


def f1(answers: list[str], references: list[str]) -> Score:
    """Computes the token F1 of SQuAD's evaluation script (version 2: two empty texts agree)."""

    def score(answer: str, reference: str) -> float:
        ours, theirs = _squad_tokens(answer), _squad_tokens(reference)
        if not ours or not theirs:
            return ours == theirs
        return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))

    return mean([score(a, r) for a, r in zip(answers, references, strict=True)])


def rouge(answers: list[str], references: list[str]) -> Score:
    """Computes ROUGE-L F1 without stemming. rouge_score ignores all but a-z and 0-9."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(answers, references, strict=True)
    return mean([scorer.score(reference, answer)["rougeL"].fmeasure for answer, reference in pairs])


def bleu(answers: list[str], references: list[str]) -> Score:
    """Computes sacrebleu's corpus BLEU, 0 to 100."""
    from sacrebleu import BLEU

    return _sacrebleu(BLEU(force=True), answers, references)


def chrf(answers: list[str], references: list[str]) -> Score:
    """Computes sacrebleu's corpus chrF2, 0 to 100."""
    from sacrebleu import CHRF

    return _sacrebleu(CHRF(), answers, references)


METRICS: dict[str, Callable[[list[str], list[str]], Score]] = {
    metric.__name__: metric
    for metric in (
        exact_match,
        json_match,
        number_match,
        f1,
        tool_call_match,
        tool_call_recall,
        rouge,
        bleu,
        chrf,
    )
}


def mean(values: list[float]) -> Score:
    """Computes the mean and its standard error, the sample standard deviation / sqrt(n)."""
    n = len(values)
    return {"value": fmean(values), "stderr": stdev(values) / n**0.5 if n > 1 else None, "n": n}


def _sacrebleu(metric: Any, answers: list[str], references: list[str]) -> Score:
    """Computes a corpus score; the standard error is from sacrebleu's seeded bootstrap (1,000)."""
    n = len(answers)
    score = metric.corpus_score(answers, [references], n_bootstrap=1000 if n > 1 else 1)
    # _ci is half the width of the 95% interval: 1.96 standard errors of a normal distribution.
    stderr = float(score._ci) / 1.96 if n > 1 else None
    return {"value": float(score.score), "stderr": stderr, "n": n}


def canonical_json(text: str) -> str | None:
    """Returns the same string for equal JSON values; None if the text is not JSON."""

    def number(digits: str) -> int | float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_float=number, parse_constant=refuse)
        # Compared as strings, because True == 1 in Python but not in JSON.
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _squad_tokens(text: str) -> list[str]:
    """Lowercases and removes punctuation and articles, as SQuAD's script normalizes answers."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def calls_in(text: str) -> list[str]:
    """Finds the function calls in a text; equal calls give the same string.

    A call is a JSON object with a `name` and an object under `arguments` or `parameters`, anywhere
    in the text: chat templates write calls as such objects, and differ in what surrounds them.
    """
    decoder, calls, at = json.JSONDecoder(), [], text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        call = canonical_call(value)
        if call is not None:
            calls.append(call)
        at = text.find("{", end if call is not None else at + 1)
    return calls


def canonical_call(value: Any) -> str | None:
    """Returns the same string for calls with equal names and arguments; None if it is no call."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments)
    if not isinstance(arguments, str) or not arguments.lstrip().startswith("{"):
        return None
    arguments = canonical_json(arguments)
    return arguments and f"{value['name']} {arguments}"
