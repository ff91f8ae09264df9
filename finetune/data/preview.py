"""Shows rows as the model sees them: target tokens in color, lengths, truncation, duplicates."""

from __future__ import annotations

from collections import defaultdict
from statistics import quantiles
from typing import TYPE_CHECKING

from finequant.finetune.data.rows import Row
from finequant.finetune.data.splits import load_splits
from finequant.finetune.data.tokens import IGNORED, Encoded, check_template, encode, to_dataset
from finequant.finetune.data.turns import answer_end, end_tokens
from finequant.finetune.model import load_tokenizer
from finequant.recipes.schema import Recipe

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

FIGURES = ("rows", "repeated", "tokens", "learned", "median", "95%", "longest")


def preview(recipe: Recipe, count: int) -> None:
    """Prints the first `count` training rows and statistics of every split.

    Raises:
        UserError: for whatever training would refuse in the data.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    tokenizer = load_tokenizer(recipe.model)
    splits = load_splits(recipe.data, recipe.seed)
    for note in splits.notes:
        console.print(note, markup=False, highlight=False)
    if noisy := _prompts_with_several_answers(splits.train):
        console.print(f"train: {noisy} prompts have several answers", highlight=False)
    for rows in splits[:3]:
        check_template(rows, tokenizer, recipe.data)
    for row in splits.train[:count]:
        console.rule(Text(row.where))
        console.print(_colored(encode(row, tokenizer, recipe.data), tokenizer), soft_wrap=True)
    console.rule()
    console.print(_statistics(recipe, tokenizer, splits._asdict()))
    for line in _ends(recipe, tokenizer, splits.train):
        console.print(line, markup=False, highlight=False)
    console.print("target tokens are green and bold; the loss mask leaves out the others")
    for rows in (splits.train, splits.validation):
        if rows:
            to_dataset(rows, tokenizer, recipe.data)


def _ends(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[str]:
    """Describes which token ends an answer or a text, and where generation stops."""

    def shown(end: int | None) -> str:
        return "no token" if end is None else f"{tokenizer.decode([end])} ({end})"

    lines = []
    if any(row.messages for row in rows):
        lines.append(f"answers end in {shown(answer_end(tokenizer, recipe.data).id)}")
    if not all(row.messages for row in rows):
        lines.append(f"texts end in {shown(tokenizer.eos_token_id)}")
    stops = map(shown, end_tokens(recipe.model, recipe.data, tokenizer))
    return [*lines, f"generation stops at {', '.join(stops) or 'no token'}"]


def _prompts_with_several_answers(rows: list[Row]) -> int:
    answers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.messages:
            answers[row.prompt_key].add(row.key)
    return sum(len(keys) > 1 for keys in answers.values())


def _colored(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Text:
    from rich.text import Text

    text = Text()
    run: list[int] = []
    is_target = False
    # A token alone need not be a whole character, so runs of tokens are decoded together.
    for token, label in [*zip(encoded.input_ids, encoded.labels, strict=True), (None, None)]:
        if run and (token is None or (label != IGNORED) != is_target):
            shown = tokenizer.decode(run, clean_up_tokenization_spaces=False)
            text.append(shown, style="bold green" if is_target else "dim")
            run = []
        is_target = label != IGNORED
        run.append(token)
    return text


def _statistics(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, splits: dict):
    from rich.table import Table

    limit = recipe.data.max_length
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("split")
    for heading in (*FIGURES, f"over {limit}"):
        table.add_column(heading, justify="right", overflow="fold")
    for name in ("train", "validation", "test"):
        rows: list[Row] = splits[name]
        if not rows:
            continue
        encoded = [encode(row, tokenizer, recipe.data) for row in rows]
        lengths = [item.full_length for item in encoded]
        cuts = quantiles(lengths if len(rows) > 1 else lengths * 2, n=20, method="inclusive")
        # A row with a weight of 2 is there twice, but from one place.
        repeated = len({row.where for row in rows}) - len({row.prompt_key for row in rows})
        labels = [label for item in encoded for label in item.labels]
        learned = sum(label != IGNORED for label in labels) / len(labels)
        figures = [len(rows), repeated, sum(lengths), f"{learned:.0%}", round(cuts[9])]
        figures += [round(cuts[18]), max(lengths), sum(length > limit for length in lengths)]
        table.add_row(name, *map(str, figures))
    return table
