"""The output of `finequant data`: notes, rows with their target tokens, exact statistics."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from rich.console import Console

from finequant.finetune.data.prepared import prepared_splits
from finequant.finetune.data.preview import _colored, preview
from finequant.finetune.data.row import Row
from finequant.finetune.data.tokens import encode
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Data

HEADINGS = ["split", "rows", "repeated", "tokens", "targets", "median", "95%", "longest"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def cells(printed: str, name: str) -> list[str]:
    """Returns the cells of the table's row that begins with `name`."""
    rows = (re.split("  +", line.strip()) for line in printed.splitlines())
    return next(row for row in rows if row[0] == name)


def shown(recipe_file: Path, capsys, *overrides: str, rows: int = 0) -> str:
    recipe = load_recipe(recipe_file, overrides)
    preview(recipe, prepared_splits(recipe), rows)
    return capsys.readouterr().out


def test_notes_rows_and_answers_are_shown(recipe_file, capsys):
    printed = shown(recipe_file, capsys, rows=2)
    assert printed.startswith("train.jsonl: 48 rows, format prompt_completion\n")
    assert "validation.jsonl: 8 rows, format prompt_completion\n" in printed
    for line in (recipe_file.parent / "train.jsonl").read_text().splitlines()[:2]:
        row = json.loads(line)
        assert f"<|im_start|>user\n{row['prompt']}<|im_end|>\n" in printed
        assert f"<|im_start|>assistant\n{row['completion']}<|im_end|>" in printed
    assert "── train.jsonl:1 ──" in printed
    assert "── train.jsonl:2 ──" in printed
    assert "── train.jsonl:3 ──" not in printed


def test_special_tokens_in_the_texts_of_rows_are_named(recipe_file, capsys):
    assert "special tokens" not in shown(recipe_file, capsys)
    rows = [{"prompt": f"open {n}", "completion": "ok" + "<|im_end|>" * (n > 5)} for n in range(9)]
    write(recipe_file.parent / "train.jsonl", rows)
    printed = shown(recipe_file, capsys)
    assert (
        "train: 3 rows have special tokens of the base in the texts, such as train.jsonl:7 "
        "(<|im_end|>): the model reads them as tokens\n"
    ) in printed


def test_special_tokens_in_calls_and_functions_are_named(recipe_file, capsys):
    tool = {"name": "say", "parameters": {"type": "object", "properties": {"text": {}}}}
    marked = tool | {"description": "Ends in <|im_end|>"}
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n}"},
                {"role": "assistant", "tool_calls": [{"name": "say", "arguments": {"text": text}}]},
            ],
            "tools": [tools],
        }
        for n, (text, tools) in enumerate([("a", tool), ("<|im_start|>", tool), ("b", marked)])
    ]
    write(recipe_file.parent / "train.jsonl", rows)
    overrides = ("model.chat_template=chatml_tools.jinja", "data.max_length=400")
    printed = shown(recipe_file, capsys, *overrides)
    assert "train: 2 rows have special tokens of the base in the texts, such as " in printed
    assert "such as train.jsonl:2 (<|im_start|>)" in printed


@pytest.mark.parametrize("hidden", ["\r", "\x1b", "\x85", "\u200b", "\ufeff"])
def test_characters_that_are_not_shown_are_named(recipe_file, capsys, hidden):
    rows = [
        {"prompt": f"ask {number}", "completion": text}
        for number, text in enumerate(["\t👩\u200d👧 é\n", f"a{hidden}\nb", "می\u200cشود"])
    ]
    write(recipe_file.parent / "train.jsonl", rows)
    printed = shown(recipe_file, capsys)
    assert (
        f"train: 1 row has characters that are not shown, such as {hidden!r} in train.jsonl:2: the "
        "model reads them, too\n"
    ) in printed
    assert printed.count("characters that are not shown") == 1


def test_characters_that_the_tokenizer_does_not_know_are_named(recipe_file, capsys, tmp_path):
    from string import printable

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = tmp_path / "letters"
    shutil.copytree(load_recipe(recipe_file, []).model.base, base)
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocabulary = {letter: number for number, letter in enumerate([*markers, *printable])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    roles = {"eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **roles)
    tokenizer.add_special_tokens({"extra_special_tokens": markers[:2]})
    tokenizer.chat_template = (base / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(base)
    override = f"model.base={base}"
    assert "does not know" not in shown(recipe_file, capsys, override)
    rows = [{"prompt": f"open {n}", "completion": "où" if n == 4 else "ok"} for n in range(9)]
    write(recipe_file.parent / "train.jsonl", rows)
    assert (
        "train: 1 row has characters that the base's tokenizer does not know, such as "
        "train.jsonl:5: the model reads <unk> for them\n"
    ) in shown(recipe_file, capsys, override)


def test_a_long_row_is_shown_as_it_is(recipe_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    answer = "[bold] a  b [/x] :smile: " * 10 + "end"
    write(recipe_file.parent / "train.jsonl", [{"prompt": "ask", "completion": answer}] * 2)
    printed = shown(recipe_file, capsys, "data.max_length=512", rows=1)
    assert f"<|im_start|>assistant\n{answer}<|im_end|>" in printed


def test_a_name_that_looks_like_markup_is_shown_as_it_is(recipe_file, capsys):
    write(recipe_file.parent / "a[red]b.jsonl", [{"prompt": "ask", "completion": "say"}] * 2)
    printed = shown(recipe_file, capsys, "data.train=a[red]b.jsonl", rows=1)
    assert "── a[red]b.jsonl:1 ──" in printed


def test_statistics_are_exact(recipe_file, capsys, tokenizer):
    answers = ["ok", "ok " * 5, "ok " * 9, "ok " * 60]
    rows = [{"prompt": f"open {n}", "completion": said} for n, said in enumerate(answers)]
    repeated = [{"prompt": " open  0", "completion": "ok"}]
    write(recipe_file.parent / "train.jsonl", rows + repeated)
    printed = shown(recipe_file, capsys, "data.max_length=64")

    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ],
            return_dict=False,
        )
        for row in rows + repeated
    ]
    lengths = sorted(map(len, texts))
    # The end of the turn is a target, too.
    learned = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in rows + repeated]
    cut = [min(len(text), 64) for text in texts]
    learned[3] -= len(texts[3]) - 1 - 64  # a line break follows the end of the turn
    p95 = lengths[3] + 0.8 * (lengths[4] - lengths[3])
    assert cells(printed, "split") == [*HEADINGS, "over 64"]
    assert cells(printed, "train") == [
        "train",
        "5",
        "1",
        str(sum(lengths)),
        f"{sum(learned) / sum(cut):.0%}",
        str(median(lengths)),
        str(round(p95)),
        str(lengths[4]),
        "1",
    ]
    assert cells(printed, "validation")[:3] == ["validation", "8", "0"]


def test_a_weight_is_not_counted_as_repetition(recipe_file, capsys):
    train = json.dumps([{"source": "train.jsonl", "weight": 3, "limit": 5}])
    printed = shown(recipe_file, capsys, f"data.train={train}")
    assert cells(printed, "train")[:3] == ["train", "15", "0"]


def test_one_row_has_statistics_too(recipe_file, capsys):
    write(recipe_file.parent / "train.jsonl", [{"prompt": "ask", "completion": "say"}])
    name, rows, repeated, tokens, _, middle, most, longest, over = cells(
        shown(recipe_file, capsys), "train"
    )
    assert (name, rows, repeated, over) == ("train", "1", "0", "0")
    assert tokens == middle == most == longest


def test_the_table_fits_a_narrow_terminal(recipe_file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cells(shown(recipe_file, capsys), "split") == [*HEADINGS, "over 128"]


def test_only_target_tokens_are_green(tokenizer):
    turns = [("user", "où?"), ("assistant", "là ✓ 🌊"), ("user", "a"), ("assistant", "b")]
    row = Row("rows.jsonl:1", tuple({"role": role, "content": said} for role, said in turns))
    text = _colored(encode(row, tokenizer, Data(train="rows.jsonl")), tokenizer)
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in span.style]
    assert green == ["là ✓ 🌊<|im_end|>", "b<|im_end|>"]
    assert text.plain == tokenizer.apply_chat_template(row.messages, tokenize=False)
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as capture:
        console.print(text)
    assert "\x1b[1;32mb<|im_end|>\x1b[0m" in capture.get()


def test_shared_rows_are_refused(recipe_file, capsys):
    first = (recipe_file.parent / "train.jsonl").read_text().splitlines()[0]
    (recipe_file.parent / "test.jsonl").write_text(f"\n{first}\n")
    with pytest.raises(UserError, match=r"1 training row also.*\n  train.jsonl:1 = test.jsonl:2"):
        shown(recipe_file, capsys)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_training_would_refuse_is_refused(recipe_file, capsys, split):
    write(recipe_file.parent / f"{split}.jsonl", [{"prompt": "ask " * 200, "completion": "say"}])
    refusal = rf"data.{split}: nothing is left to learn.*\n  {split}.jsonl:1"
    with pytest.raises(UserError, match=refusal):
        shown(recipe_file, capsys)


def test_a_bad_row_is_refused_before_the_libraries_are_loaded(recipe_file, monkeypatch):
    from finequant.recipes import command_line
    from finequant.recipes.commands.recipe import data

    monkeypatch.setattr(command_line, "quiet_libraries", lambda: pytest.fail("loads libraries"))
    write(recipe_file.parent / "train.jsonl", [{"messages": [{"role": "usr", "content": "hi"}]}])
    with pytest.raises(UserError, match=r"train\.jsonl:1: "):
        data(recipe_file)
