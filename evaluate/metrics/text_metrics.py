"""Scores answers against references: text metrics, without torch.

A score is `{"value": float, "stderr": float | None, "n": int}`, with the number of independent
groups, if it is smaller than n, as "groups". Higher is always better; values are fractions from 0
to 1, except bleu and chrf, which are sacrebleu's 0 to 100.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from decimal import MAX_PREC, Context, Decimal
from functools import cache
from statistics import fmean
from typing import Any

from finequant.recipes.errors import UserError

Score = dict[str, float | int | None]

OUT_OF_100 = ("bleu", "chrf", "chrf++")
"""sacrebleu's metrics, from 0 to 100; all others are fractions of 1. chrf++ is only lm-eval's."""

GROUPED = r"[1-9]\d{0,2}(?:[ '’_\u00a0\u2007\u2009\u202f]\d{3})+(?!\d)"
"""Digits in groups of three, with one of several characters between them: 1 200 and 1'000'000."""
WRITTEN = rf"(?:(?:{GROUPED}|\d+)(?:[.,]\d+)*|\.\d+)"
"""Digits with commas and points, which may group them or precede decimals: 1,200.50 and .5."""
NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)])[-−–])?             # no sign after a digit, word or bracket: 8-3, GPT-4
    (?:\\?[$€£¥₹])?
    (?<![A-Za-z}}]\^)(?<![A-Za-z}}]\^\{{)    # no exponent of a unit: cm^2
    (?:(?P<mixed>\d+)[ ](?=\d+/\d))?       # the 1 of 1 3/4
    (?P<number>{WRITTEN})
    (?:[eE](?P<exponent>[-−+]?\d{{1,3}})(?!\w))?
    (?:[ ]?/[ ]?(?P<divisor>{WRITTEN}))?
    """,
    re.VERBOSE,
)
"""A number."""
THOUSANDS = re.compile(r"\d+|[1-9]\d{0,2}(?:(?:,\d{2,3})*,\d{3}|(?:\.\d{3}){2,})")
"""Digits whose commas or points, if any, group thousands: 1,000, 1,00,000 and 1.000.000."""
FORMULAS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\\[,!]"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d) *(?=\\[dt]?frac)"), " "),
    (re.compile(r"\\[dt]?frac *\{([^{}]*)\} *\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"(?<=\d) ?(?:[×·*x]|\\times|\\cdot) ?10 ?(?:\^|\*\*) ?\{?([-−+]?\d+)\}?"), r"e\1"),
    (re.compile(r"(?<=\d) *(?=[¼-¾⅐-⅞])"), " "),
    (re.compile(r"[¼-¾⅐-⅞]"), lambda fraction: unicodedata.normalize("NFKC", fraction[0])),
    (re.compile("⁄"), "/"),
    (re.compile("(?![0-9])\\d"), lambda digit: str(int(digit[0]))),
    (re.compile("٬"), ","),
    (re.compile("٫"), "."),
    (re.compile(r"(?<=\d)( ?(?:[^\W\d]+ ?[/·] ?)*(?:[cdhkmnµμ]?m|in|ft|yd|mi|s))[23]\b"), r"\1"),
)
"""What formulas write -> what NUMBER reads: LaTeX's spaces, commas and fractions, powers of ten,
fractions that are one character, digits, comma and point of other scripts, and units: neither the
2 of 25 m2 nor the 3 of 5 kg/m3 is a number."""
NAMES = re.compile(
    r"(?<![A-Za-z\d\\])(?!(?:AUD|CAD|CHF|CNY|EUR|GBP|INR|JPY|Rs|USD)\d)"
    r"[A-Za-z]+\d[A-Za-z\d]*(?:[.,]\d+)*"
    r"|(?<=[A-Za-z}])_(?:\d+|\{\d+\})"
)
"""Words in which digits follow a letter, and the digits of subscripts: CO2, H2O, PM2.5, x_1; not
3x4, 5h30, USD100 and LaTeX's \\times4."""
EXACT = Context(prec=MAX_PREC)
"""The usual context rounds to 28 digits, which numbers of more digits need not share."""


def is_out_of_100(metric: str) -> bool:
    """Says whether a metric counts from 0 to 100. lm-eval's can have a filter: "bleu (first)"."""
    return metric.partition(" (")[0] in OUT_OF_100


def score_answers(
    answers: list[str],
    references: list[str],
    metrics: list[str],
    groups: Sequence[int] | None = None,
) -> dict[str, Score]:
    """Scores answers with each of `metrics` that is defined here: {metric: score}.

    groups: a number for each row, as for `mean`.

    Raises:
        UserError: for json_match if a reference is not JSON.
    """
    answers, references = map(_without_thoughts, (answers, references))
    if "json_match" in metrics:
        _check_json(references)
    scores = {}
    for metric in metrics:
        if metric in CORPUS_METRICS:
            scores[metric] = CORPUS_METRICS[metric](answers, references, groups)
        elif metric in MEANS:
            scores[metric] = mean(*_by_item(metric, answers, references, groups))
    return scores


def paired_changes(
    before: list[str],
    after: list[str],
    references: list[str],
    metrics: list[str],
    groups: Sequence[int] | None = None,
) -> dict[str, Score]:
    """Computes how much metrics change between two models' answers, row by row: {metric: score}.

    Metrics that are not means over rows or calls are left out.

    groups: a number for each row, as for `mean`.
    """
    before, after, references = map(_without_thoughts, (before, after, references))
    changes = {}
    for metric in metrics:
        if metric in MEANS:
            earlier, _ = _by_item(metric, before, references, groups)
            later, clusters = _by_item(metric, after, references, groups)
            changes[metric] = mean_change(earlier, later, clusters)
    return changes


def mean_change(
    before: Sequence[float], after: Sequence[float], groups: Sequence[int] | None = None
) -> Score:
    """Computes the mean of the differences between two models' values for the same items.

    The standard error is that of this mean: items with equal values add nothing to it.

    groups: a number for each item, as for `mean`.
    """
    return mean([later - earlier for earlier, later in zip(before, after, strict=True)], groups)


def is_right(metric: str, answer: str, reference: str) -> bool:
    """Says whether an answer has the full score of a metric in ROW_METRICS."""
    return ROW_METRICS[metric](after_thoughts(answer), after_thoughts(reference)) == 1


def after_thoughts(text: str) -> str:
    """Returns what follows the thoughts of a reasoning model, which end in </think>; a text without
    thoughts is returned as it is. <think> may be in the prompt."""
    return text.rpartition("</think>")[2]


def _without_thoughts(texts: list[str]) -> list[str]:
    return list(map(after_thoughts, texts))


def _by_item(
    metric: str, answers: list[str], references: list[str], groups: Sequence[int] | None
) -> tuple[list[float], Sequence[int] | None]:
    """Returns the values whose mean a metric is, and a number for each, as for `mean`."""
    if metric == "tool_call_recall":
        return _by_call(answers, references, groups)
    score = ROW_METRICS[metric]
    return [float(score(a, r)) for a, r in zip(answers, references, strict=True)], groups


def _check_json(references: list[str]) -> None:
    for row, reference in enumerate(references, 1):
        if canonical_json(reference) is None:
            raise UserError(
                f"held-out row {row}: the reference is not JSON: {reference[:80]!r}\n"
                "json_match needs JSON in every row; correct it or remove json_match from "
                "evaluate.metrics."
            )


def exact_match(answer: str, reference: str) -> bool:
    """Says whether an answer equals the reference after stripping whitespace at both ends."""
    return answer.strip() == reference.strip()


def json_match(answer: str, reference: str) -> bool:
    """Says whether JSON values are equal: key order, whitespace, and 1 or 1.0 do not matter."""
    return canonical_json(answer) == canonical_json(reference)


def number_match(answer: str, reference: str) -> bool:
    """Says whether an answer's last number equals the reference's, as a solution ends in its
    result. 1,000 and 1 000.0 are equal, as are 3/4, ¾, 0.75 and 0,75; currency, percent signs
    and units are ignored, and numbers in words are not read. The digits of a name, such as CO2,
    only count where there is no other number. If the reference has no number, the answer must have
    none either."""
    return last_number(answer) == last_number(reference)


def tool_call_match(answer: str, reference: str) -> bool:
    """Says whether an answer makes exactly the reference's calls, in any order: same names, and
    equal arguments. If the reference makes no call, the answer must make none either."""
    return Counter(calls_in(answer)) == Counter(calls_in(reference))


def f1(answer: str, reference: str) -> float:
    """Computes the token F1 of SQuAD's evaluation script (version 2: two empty texts agree)."""
    ours, theirs = _squad_tokens(answer), _squad_tokens(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


def rouge(answer: str, reference: str) -> float:
    """Computes ROUGE-L F1 without stemming. rouge_score ignores all but a-z and 0-9."""
    return _rouge_scorer().score(reference, answer)["rougeL"].fmeasure


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


ROW_METRICS: dict[str, Callable[[str, str], float]] = {
    metric.__name__: metric
    for metric in (exact_match, json_match, number_match, f1, tool_call_match, rouge)
}
"""Metrics that are means over rows: each scores an answer against its reference."""


MEANS = (*ROW_METRICS, "tool_call_recall")
"""Metrics that are means over rows or, tool_call_recall, over the references' calls."""


def _by_call(
    answers: list[str], references: list[str], groups: Sequence[int] | None
) -> tuple[list[float], list[int]]:
    """Says of each of the references' calls whether the answer makes it (1.0 or 0.0); all calls of
    a row have the row's number."""
    groups = groups or range(len(references))
    made: list[float] = []
    group_of_call: list[int] = []
    for answer, reference, group in zip(answers, references, groups, strict=True):
        unmatched = Counter(calls_in(answer))
        for call in calls_in(reference):
            made.append(float(unmatched[call] > 0))
            group_of_call.append(group)
            unmatched[call] -= 1
    return made, group_of_call


def bleu(answers: list[str], references: list[str], groups: Sequence[int] | None = None) -> Score:
    """Computes sacrebleu's corpus BLEU, 0 to 100."""
    from sacrebleu import BLEU

    class Bleu(BLEU):
        """BLEU whose bootstrap draws groups."""

        def _extract_corpus_statistics(self, *texts: Any) -> list[list[int]]:
            return _sums_by_group(super()._extract_corpus_statistics(*texts), groups)

    return _sacrebleu(Bleu(force=True), answers, references, groups)


def chrf(answers: list[str], references: list[str], groups: Sequence[int] | None = None) -> Score:
    """Computes sacrebleu's corpus chrF2, 0 to 100."""
    from numpy import float32
    from sacrebleu import CHRF

    class ChrF(CHRF):
        """chrF2 whose bootstrap draws groups. In sacrebleu 2.6, its scores are float32, except for
        a 0.0, to which Python's `mean` cannot add them; `_compute_f_score` is to be removed once
        sacrebleu's scores have one type."""

        def _extract_corpus_statistics(self, *texts: Any) -> list[list[int]]:
            return _sums_by_group(super()._extract_corpus_statistics(*texts), groups)

        def _compute_f_score(self, statistics: list[int]) -> float:
            return super()._compute_f_score(statistics) or float32(0)

    return _sacrebleu(ChrF(), answers, references, groups)


CORPUS_METRICS: dict[str, Callable[..., Score]] = {"bleu": bleu, "chrf": chrf}


def mean(values: Sequence[float], groups: Sequence[int] | None = None) -> Score:
    """Computes the mean and its standard error, clustered as in arXiv:2411.00640.

    groups: a number for each value. Values with the same number, such as the scores of an answer
        against three references, are not independent of each other. None: all values are, and the
        error is the sample standard deviation / sqrt(n).
    """
    n, average = len(values), fmean(values)
    sums: dict[int, float] = defaultdict(float)
    for value, group in zip(values, groups or range(n), strict=True):
        sums[group] += value - average
    stderr = None
    if len(sums) > 1:
        stderr = (len(sums) / (len(sums) - 1) * sum(total**2 for total in sums.values())) ** 0.5 / n
    fewer = {"groups": len(sums)} if len(sums) < n else {}
    return {"value": average, "stderr": stderr, "n": n} | fewer


def _sacrebleu(
    metric: Any, answers: list[str], references: list[str], groups: Sequence[int] | None
) -> Score:
    """Computes a corpus score; the standard error is from sacrebleu's seeded bootstrap (1,000)."""
    n = len(answers)
    several = len(set(groups or range(n))) > 1
    score = metric.corpus_score(answers, [references], n_bootstrap=1000 if several else 1)
    # _ci is half the width of the 95% interval: 1.96 standard errors of a normal distribution.
    stderr = float(score._ci) / 1.96 if several else None
    return {"value": float(score.score), "stderr": stderr, "n": n}


def _sums_by_group(rows: list[list[int]], groups: Sequence[int] | None) -> list[list[int]]:
    """Adds up the n-gram counts of the rows of each group, all of which the bootstrap then draws
    together; a corpus score, which is computed from the sum of all, stays the same."""
    by_group: dict[int, list[list[int]]] = defaultdict(list)
    for row, group in zip(rows, groups or range(len(rows)), strict=True):
        by_group[group].append(row)
    return [[sum(counts) for counts in zip(*members, strict=True)] for members in by_group.values()]


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


def last_number(text: str) -> Decimal | None:
    """Returns the last number in a text, without its unit; None if there is none in digits."""
    for formula, plain in FORMULAS:
        text = formula.sub(plain, text)
    *_, last = [None, *(list(NUMBER.finditer(NAMES.sub("", text))) or NUMBER.finditer(text))]
    if last is None:
        return None
    value = _decimal(last["number"])
    if exponent := last["exponent"]:
        value = value.scaleb(int(exponent.replace("−", "-")), EXACT)
    if last["divisor"] and (divisor := _decimal(last["divisor"])):
        value = value / divisor + Decimal(last["mixed"] or 0)
    return value.copy_negate() if last["sign"] else value


def _decimal(written: str) -> Decimal:
    """Reads digits; the last comma or point that does not group thousands precedes decimals."""
    digits = re.sub(r"[^\d.,]", "", written)
    if THOUSANDS.fullmatch(digits):
        return Decimal(re.sub("[.,]", "", digits))
    whole, _, decimals = digits.rpartition(max(".,", key=digits.rfind))
    return Decimal(f"{re.sub('[.,]', '', whole)}.{decimals}")


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
