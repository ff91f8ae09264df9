"""Answers, metrics, multiple choice and lm-eval tasks equal plain computations."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import put_bos_in_front

from finequant.evaluate import check
from finequant.evaluate.answers import right_by
from finequant.evaluate.check import check_chat_template
from finequant.evaluate.metrics import held_out, tasks
from finequant.evaluate.metrics.held_out import answer, multiple_choice
from finequant.evaluate.metrics.shared_context import Likelihood
from finequant.evaluate.metrics.tasks import check_tasks, lm_eval_tasks
from finequant.evaluate.metrics.text_metrics import (
    is_right,
    mean,
    paired_changes,
    score_answers,
)
from finequant.finetune.data.splits import load_splits
from finequant.finetune.data.tokens import answer_text, encode_prompt
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Data, Evaluate

TEXTS = [
    "open the red door at 1 o'clock",
    "close",
    "paint the green lamp at 11 o'clock and move the blue box",
    "move the grey window",
    "the the the the",
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{request}}}} colour:"
doc_to_target: label
doc_to_choice: [red, green, blue, grey]
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


POSITIONS = 2048


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A folder with two tasks, one of which names data that do not exist."""
    folder = tmp_path_factory.mktemp("lm_eval_tasks")
    rows = [{"request": TEXTS[row % 4], "label": row % 4} for row in range(11)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, data in (("colour_of_thing", "rows.jsonl"), ("no_data", "missing.jsonl")):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=folder / data))
    return str(folder)


def test_batched_answers_equal_single_ones_in_order(model, tokenizer, prompts):
    def alone(prompt):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            with torch.no_grad():
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()

    expected = [alone(prompt) for prompt in prompts]
    assert len(set(expected)) > 1
    assert answer(model, tokenizer, prompts, 12, 2, "answers") == expected
    assert answer(model, tokenizer, [], 12, 2, "answers") == []


def test_equal_prompts_are_answered_once(model, tokenizer, prompts, monkeypatch):
    expected, asked = answer(model, tokenizer, prompts, 4, 2, "answers"), []

    def generate(*, input_ids, **settings):
        asked.append(len(input_ids))
        return type(model).generate(model, input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", generate)
    found = answer(model, tokenizer, prompts + prompts[::-1], 4, 2, "answers")
    assert found == expected + expected[::-1]
    assert sum(asked) == len(prompts)


def test_answers_stop_before_either_end_token(model, tokenizer, prompts):
    """An end token that is not special is no part of the answer, either."""
    whole = answer(model, tokenizer, prompts[:1], 6, 1, "answers")[0]
    with torch.no_grad():
        first = int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*prompts[0], first]])).logits[0, -1].argmax())
    assert first != second
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [before, second]
        model.generation_config.temperature, model.generation_config.do_sample = 0.6, True
        stopped = answer(model, tokenizer, prompts[:1], 6, 1, "answers")[0]
    finally:
        model.generation_config.eos_token_id = before
        model.generation_config.temperature, model.generation_config.do_sample = None, None
    assert stopped == tokenizer.decode([first]).strip()
    assert len(whole) > len(stopped)


def test_exact_match_and_its_standard_error():
    score = score_answers([" a", "b\n", "c", "D"], ["a", "b", "x", "d"], ["exact_match"])
    # Two of four: sample variance 1/3, standard error sqrt(1/3/4).
    expected = {"value": 0.5, "stderr": pytest.approx(math.sqrt(1 / 12)), "n": 4}
    assert score == {"exact_match": expected}
    assert score_answers(["a"], ["a"], ["exact_match"])["exact_match"]["stderr"] is None


@pytest.mark.parametrize("metric", ["exact_match", "f1", "rouge", "tool_call_recall"])
def test_repeating_rows_makes_no_score_more_certain(metric):
    """So the error of scores against several references is that of so many distinct prompts."""
    call = '{{"name": "{}", "arguments": {{}}}}'.format
    answers, references = [call("a"), call("b"), call("x"), ""], [*map(call, "abcd")]
    once = score_answers(answers, references, [metric])[metric]
    assert once["stderr"] > 0
    thrice = (answers * 3, references * 3, [metric])
    grouped = score_answers(*thrice, groups=[0, 1, 2, 3] * 3)[metric]
    same = {"value": once["value"], "stderr": pytest.approx(once["stderr"])}
    assert grouped == same | {"n": 12, "groups": 4}
    assert "groups" not in once
    assert score_answers(*thrice)[metric]["stderr"] < 0.6 * once["stderr"]
    assert score_answers(*thrice, groups=[0] * 12)[metric]["stderr"] is None


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_repeating_rows_makes_no_corpus_score_more_certain(metric):
    """The bootstrap drew rows, whether or not they answered the same prompt."""
    references = [f"open the {colour} door now please" for colour in ("red", "green", "blue")]
    answers = ["open the red door now", references[1], "please open the blue door"]
    once = score_answers(answers, references, [metric])[metric]
    assert once["stderr"] > 0
    thrice = (answers * 3, references * 3, [metric])
    grouped = score_answers(*thrice, groups=[0, 1, 2] * 3)[metric]
    assert grouped == {
        "value": pytest.approx(once["value"]),
        "stderr": pytest.approx(once["stderr"], rel=1e-4),
        "n": 9,
    }
    assert score_answers(*thrice)[metric]["stderr"] < 0.8 * once["stderr"]
    assert score_answers(*thrice, groups=[0] * 9)[metric]["stderr"] is None


def test_errors_of_groups_of_different_sizes_equal_those_of_statsmodels():
    """statsmodels 0.15: OLS(values, ones).fit(cov_type="cluster", cov_kwds={"groups": groups})."""
    values, groups = [1, 0, 0, 1, 1, 0.5], [5, 5, 3, 3, 3, 9]
    assert mean(values, groups)["stderr"] == pytest.approx(0.06364688465216443)


def test_f1_normalizes_as_squad_does():
    answers = ["The red, red door!", "lamp", "a", ""]
    references = ["a red door", "box", "the", "lamp"]
    # Row 1: red red door / red door: 2 shared, precision 2/3, recall 1.
    score = score_answers(answers, references, ["f1"])["f1"]
    assert score["value"] == pytest.approx((0.8 + 0 + 1 + 0) / 4)


def test_json_match_compares_values():
    references = ['{"a": 1, "b": [true, "x"]}'] * 8
    answers = [
        ' {"b":[true,"x"],\n"a":1.0} ',  # order, whitespace, number format: equal
        '{"a": 1, "b": ["x", true]}',
        '{"a": true, "b": [1, "x"]}',
        '{"a": 1, "b": [true, "x"]',
        "",
        "[" * 100_000,
        "NaN",
        'Here it is: {"a": 1, "b": [true, "x"]}',
    ]
    score = score_answers(answers, references, ["json_match"])["json_match"]
    assert (score["value"], score["n"]) == (1 / 8, 8)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("So 3 + 69 = 72.", "48/2 = 24\n#### 72", True),
        ("It costs $1,000.00", "#### 1000", True),
        ("x = -5", "#### -5", True),
        ("x = -5", "#### 5", False),
        ("8-3", "3", True),  # no sign
        (".5", "0.5", True),
        ("72 or 73", "#### 72", False),
        ("I do not know", "#### 0", False),
        ("none", "no number", True),
        ("one: 1", "no number", False),
        ("1 000 €", "1000", True),
        ("1 000", "2 000", False),
        ("1\u202f234\u202f567.", "1,234,567", True),
        ("1’234.50", "1'234.5", True),
        ("100 2000", "2000", True),  # two numbers
        ("1.000,5", "1,000.5", True),
        ("1,5", "2,5", False),
        ("1,5", "#### 1.5", True),
        ("1.000.000", "1,000,000", True),
        ("1,00,000", "100000", True),
        ("0,125", "0.125", True),
        ("1e3", "1000", True),
        ("1.5 × 10^3", "1500", True),
        (r"1.5 \times 10^{-3}", "0.0015", True),
        ("3/4", "0.75", True),
        ("3/4", "1/4", False),
        (r"$\boxed{-\frac{3}{4}}$.", "-0.75", True),
        (r"1\frac{1}{2}", "1.5", True),
        ("2 1/2", "1 1/2", False),
        (r"\boxed{10{,}000}", "10000", True),
        ("1/0", "1", True),  # such a divisor is left out
        ("−5", "-5", True),
        ("-$5", "$-5", True),
        ("- 5", "5", True),  # a list
        ("25 cm^2", "25", True),
        (r"36 \text{ cm}^{2}", "25", False),
        ("50%", "50", True),
        ("12345678901234567", "12345678901234568", False),
        ("9" * 400, "9" * 401, False),
        ("1" * 5000, "1" * 5000, True),
        ("-12345678901234567890123456789012", "-12345678901234567890123456789013", False),
        ("½", "0.5", True),
        ("-1½ cups", "-1.5", True),
        ("1 ¾", "1.75", True),
        ("1⁄4", "0.25", True),
        ("25 m2", "25", True),
        ("9.8 m/s2.", "9.8", True),
        ("12 km3 a year", "12", True),
        ("2 500 kg/m3", "2500", True),
        ("2 500 kg/m3", "2 400 kg/m3", False),
        ("5 mol / dm3", "5", True),
        ("7 kg·m2", "7", True),
        ("9.8 N/kg, or 2", "2", True),
        ("١٬٢٠٠", "1200", True),
        ("١٬٢٠٠", "٩٬٢٠٠", False),
        ("١٫٢٥", "1.25", True),
        ("१ २००", "1,200", True),
        ("1\u2007200", "1,200", True),
        ("room 25 m", "25", True),
        ("12 kg CO2", "12", True),
        ("15 kg CO2", "12 kg CO2", False),
        ("12 kg of H2O, and no NO2.", "12", True),
        ("7 µg/m3 of PM2.5", "7", True),
        (r"12 \text{ kg CO}_{2}", "12", True),
        ("room B12", "room B6", False),  # where there is no other number
        ("3x4", "4", True),
        ("USD1,200.50", "1200.5", True),
        ("it costs 3 times USD100", "100", True),
        ("14h30", "14h45", False),
        (r"3\times4", "4", True),
        ("共5个", "5", True),
        ("$1,200.50", "1.200,50", True),
        ("three", "3", False),
    ],
)
def test_number_match_compares_the_last_number(answer, reference, right):
    score = score_answers([answer], [reference], ["number_match"])["number_match"]
    assert score["value"] == right
    assert right_by(["f1", "number_match"]) == "number_match"


def test_metrics_compare_what_follows_the_thoughts():
    """The prompt may have opened the thoughts, as those of R1 do: the answer lacks the tag then."""
    reference = '<think>\nwhy 7?\n</think>\n\n{"a": 1}'
    answers = ['hm\n</think>\n{"a": 1}', '<think>hm 3</think>{"a": 1}', '{"a": 2}', '{"a": 1} hm']
    metrics = ["exact_match", "json_match", "f1", "chrf"]
    scores = score_answers(answers, [reference] * 4, metrics)
    assert [scores[metric]["value"] for metric in metrics[:2]] == [0.5, 0.5]
    assert scores == score_answers(answers, ['{"a": 1}'] * 4, metrics)
    change = paired_changes(answers[2:], answers[:2], [reference] * 2, ["exact_match"])
    assert change["exact_match"]["value"] == 1
    right = [is_right("json_match", answer, reference) for answer in answers]
    assert right == [True, True, False, False]


def test_number_match_agrees_with_the_flexible_match_of_lm_eval_on_gsm8k():
    """It differs only where lm-eval compares the writing, 18.00 and 18, or reads 25-7 as -7."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    extract = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
    endings = ["{}", "The answer is {}.", "${}", "x = -{}", "{}%", "**{}**", "{}km", "3+1={}", "?"]
    answers = [ending.format(n) for ending in endings for n in ("7", "25", "1,250", "1250", "2.5")]
    for reference in ("9 - 2 = <<9-2=7>>7\n#### 7", "#### 1250", "#### 2.5", "#### -25"):
        ours = [score_answers([a], [reference], ["number_match"]) for a in answers]
        (found,) = extract.apply([answers], [{}])
        theirs = [
            exact_match_hf_evaluate([text], [reference], ignored)["exact_match"] for text in found
        ]
        assert [score["number_match"]["value"] for score in ours] == theirs
        assert 0 < sum(theirs) < len(theirs)


def test_json_match_names_the_row_of_a_broken_reference():
    with pytest.raises(UserError, match=r"row 2: .*'\{broken'"):
        score_answers(["1", "2"], ["1", "{broken"], ["json_match"])
    with pytest.raises(UserError, match="row 1: .*'NaN'"):
        score_answers(["NaN"], ["NaN"], ["json_match"])


def test_rouge_bleu_and_chrf_are_scored():
    answers = ["open the red door now please", "close it"]
    references = ["open the red door now please", "close the lamp"]
    scores = score_answers(answers, references, ["rouge", "bleu", "chrf"])
    # Row 2: one shared word, precision 1/2, recall 1/3.
    assert scores["rouge"]["value"] == pytest.approx((1 + 0.4) / 2)
    # 7 of 8 words, 5 of 6 pairs, 4 of 4, 3 of 3; one word short of the reference's 9.
    bleu = 100 * math.exp(1 - 9 / 8) * (7 / 8 * 5 / 6) ** 0.25
    assert scores["bleu"]["value"] == pytest.approx(bleu)
    assert 50 < scores["chrf"]["value"] < 100
    perfect = score_answers(references, references, ["bleu", "chrf"])
    assert [score["value"] for score in perfect.values()] == pytest.approx([100, 100])
    assert all(score["stderr"] > 0 and score["n"] == 2 for score in scores.values())


def test_chrf_is_scored_if_some_answers_share_nothing_with_theirs():
    """Some of the bootstrap's samples then score 0, a float beside the others' float32."""
    answers, references = ["", "", "close it"], ["open", "paint", "close the lamp"]
    score = score_answers(answers, references, ["chrf"])["chrf"]
    assert 0 < score["value"] < 50 and score["stderr"] > 0
    assert score_answers(["", ""], references[:2], ["chrf"])["chrf"]["value"] == 0


def test_changes_are_paired_by_row():
    references = ["red", "green", "blue", "grey"]
    before, after = ["red", "green", "", "grey"], ["red", "", "blue", ""]
    found = paired_changes(before, after, references, ["exact_match", "bleu", "f1"])
    assert list(found) == ["exact_match", "f1"]  # bleu is not a mean over rows
    # 0, -1, +1, -1: their mean, and their sample standard deviation over the square root of 4
    assert found["exact_match"] == {"value": -0.25, "stderr": pytest.approx(0.478714), "n": 4}
    grouped = paired_changes(
        before * 2, after * 2, references * 2, ["exact_match"], [0, 1, 2, 3] * 2
    )
    assert grouped["exact_match"]["stderr"] == pytest.approx(0.478714)
    same = paired_changes(before, before, references, ["exact_match"])["exact_match"]
    assert same == {"value": 0, "stderr": 0, "n": 4}


def test_multiple_choice_equals_a_plain_computation(model, tokenizer, prompts):
    choices = ["red", "green door", "o'clock", "at"]

    def likelihood(prompt, choice):
        ending = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ending])).logits[0]
        at = torch.arange(len(prompt) - 1, len(prompt) + len(ending) - 1)
        return float(logits.log_softmax(-1)[at, torch.tensor(ending)].sum())

    picks = [max(choices, key=lambda c: likelihood(p, c)) for p in prompts]  # noqa: B023
    wrong = choices[(choices.index(picks[3]) + 1) % 4]
    references = [*picks[:3], wrong, picks[4]]
    right = multiple_choice(model, tokenizer, prompts, references, choices, 3, "choices")
    assert mean(right) == {"value": 0.8, "stderr": pytest.approx(0.2), "n": 5}


def test_a_choice_tokenized_alone_does_not_begin_with_bos(tokenizer):
    """After a final space, "at" would take that space from the prompt."""
    adding = deepcopy(tokenizer)
    put_bos_in_front(adding)
    prompt = [*ids_of(tokenizer, "it is"), *ids_of(tokenizer, " ")]
    assert ids_of(tokenizer, "it is at")[: len(prompt)] != prompt
    (item,) = held_out.continuations(adding, prompt, ["at"])
    assert item == (prompt, ids_of(tokenizer, "at"))


def test_a_choice_that_begins_another_does_not_always_win(model, tokenizer, prompts, monkeypatch):
    """Every further token lowers a likelihood: without an end, "at" would beat "at the" always."""
    at, end, asked = ids_of(tokenizer, "at"), tokenizer.eos_token_id, []

    def unlikely_to_end_after_at(_: object, these: list, *__: object) -> list[Likelihood]:
        asked[:] = [item.ids for item in these]
        return [Likelihood(-len(ids) - 9.0 * (ids == [*at, end]), False) for ids in asked]

    monkeypatch.setattr(held_out, "log_likelihoods", unlikely_to_end_after_at)
    for references, choices, value in (
        (["at the"], ["red", "at the", "at"], 0.0),  # "red" is shorter
        (["at the"], ["at", "at the"], 1.0),
        (["at"], ["at", "the"], 1.0),
    ):
        ends = (end, end + 1)
        arguments = (prompts[:1], references, choices, 1, "", ends)
        assert multiple_choice(model, tokenizer, *arguments) == [value]
        begins = "at the" in choices
        assert asked == [ids_of(tokenizer, text) + [end] * begins for text in choices]


def test_bleu_is_refused_where_right_answers_would_score_0():
    evaluate = Evaluate(metrics=["exact_match", "bleu"])
    short, long = ("a.jsonl:1", "on fire, now"), ("a.jsonl:2", "the red door, please")
    assert score_answers([short[1][:7]], [short[1][:7]], ["bleu"])["bleu"]["value"] == 0
    with pytest.raises(UserError, match="rows has more than 2, so even the right ones"):
        check._check_lengths_for_bleu(evaluate, [("a.jsonl:1", short[1][:7])])
    for answers in ([short], [short, long], []):
        check._check_lengths_for_bleu(evaluate, answers)
    check._check_lengths_for_bleu(Evaluate(), [("a.jsonl:1", "on")])


def test_rouge_is_refused_where_right_answers_would_score_0():
    evaluate = Evaluate(metrics=["f1", "rouge"])
    for text, is_refused in (
        ("Кошка спит, 12", True),
        ("猫在睡觉", True),
        ("Die Straße führt über die Brücke", False),
        ("12.5", False),
    ):
        answers = [("a.jsonl:1", text)]
        if not is_refused:
            check._check_letters_for_rouge(evaluate, answers)
            continue
        assert score_answers([text], [text[:4]], ["rouge"])["rouge"]["value"] == 0
        with pytest.raises(UserError, match="most letters of the held-out answers are others"):
            check._check_letters_for_rouge(evaluate, answers)
        check._check_letters_for_rouge(Evaluate(), answers)


def test_number_match_is_refused_where_answers_without_a_number_would_be_right():
    evaluate = Evaluate(metrics=["number_match"])
    words, digits = ("a.jsonl:1", "three"), ("a.jsonl:2", "3")
    with pytest.raises(UserError, match="number_match: no answer of the held-out rows has a num"):
        check._check_some_numbers(evaluate, [words])
    for answers in ([words, digits], []):
        check._check_some_numbers(evaluate, answers)
    check._check_some_numbers(Evaluate(), [words])


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_choices_are_tokenized_as_lm_eval_does(tokenizer):
    """With the prompt, by a tokenizer that joins words, and by one that puts spaces in front."""
    from lm_eval.api.model import TemplateLM
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = dict.fromkeys(["<unk>", *"\u2581abcdenor", "\u2581a", "re", "red"])
    vocabulary = {token: index for index, token in enumerate(letters)}
    spaces = Tokenizer(BPE(vocabulary, [("\u2581", "a"), ("r", "e"), ("re", "d")]))
    spaces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    spaces.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    like_llama_2 = PreTrainedTokenizerFast(tokenizer_object=spaces, unk_token="<unk>")
    cases = [
        (like_llama_2, "a code", ["red", " a"]),
        (tokenizer, "open\nred", [" door", "at", "\n"]),
    ]
    for tokens, text, choices in cases:
        encode = partial(ids_of, tokens)
        theirs = SimpleNamespace(backend="causal", tok_encode=encode)
        expected = [TemplateLM._encode_pair(theirs, text, choice) for choice in choices]
        prompt = encode(text)
        found = [tuple(item) for item in held_out.continuations(tokens, prompt, choices)]
        assert found == expected
    prompt = like_llama_2("a code")["input_ids"]
    (red,) = held_out.continuations(like_llama_2, prompt, ["red"])
    assert len(red.ids) < len(like_llama_2("red")["input_ids"])


def test_a_tie_goes_to_the_first_choice(model, tokenizer, prompts, monkeypatch):
    found = [Likelihood(log, False) for log in (-2.0, -1.0, -1.0)]
    monkeypatch.setattr(held_out, "log_likelihoods", lambda *_: found)
    right = multiple_choice(model, tokenizer, prompts[:1], ["at"], ["red", "at", "the"], 1, "")
    assert right == [1]


def test_a_reference_outside_the_choices_is_named(model, tokenizer, prompts):
    with pytest.raises(UserError, match="row 2: the answer 'pink'"):
        multiple_choice(model, tokenizer, prompts[:2], ["red", "pink"], ["red", "blue"], 1, "")


GENERATION = """\
task: repeat
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
output_type: generate_until
test_split: test
fewshot_split: train
num_fewshot: 2
doc_to_text: "{{{{request}}}}"
doc_to_target: "{{{{label}}}}"
generation_kwargs: {{until: ["\\n\\n"], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


@pytest.mark.slow
def test_a_task_through_the_chat_template_asks_what_lm_eval_asks(
    model, tokenizer, task_folder, tmp_path, monkeypatch
):
    """Examples are earlier turns; without the key they are plain text."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    (tmp_path / "repeat.yaml").write_text(GENERATION.format(data=f"{task_folder}/rows.jsonl"))
    asked = []

    def keep(self, requests, **_):
        asked.append([request.args[0] for request in requests])
        return ["red"] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", keep)
    for through in (False, True):
        task = {"task": "repeat", "limit": 3, "apply_chat_template": through}
        lm_eval_tasks(model, tokenizer, Evaluate(tasks=[task], task_folder=str(tmp_path)), seed=3)
        simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            tasks=["repeat"],
            limit=3,
            task_manager=small_task_manager(str(tmp_path)),
            apply_chat_template=through,
            fewshot_random_seed=3,
        )
        ours, theirs = asked[-2:]
        assert ours == theirs
        assert ours[0].count("<|im_start|>user") == (3 if through else 0)


def small_task_manager(folder: str):
    """Makes a task manager without lm-eval's own index, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=False)


def test_a_task_that_needs_a_missing_chat_template_is_refused(tokenizer):
    task = {"task": "mine", "apply_chat_template": True}
    check_chat_template(Evaluate(tasks=[task]), tokenizer)
    check_chat_template(Evaluate(tasks=["mine"]), SimpleNamespace(chat_template=None))
    with pytest.raises(UserError, match="mine: apply_chat_template is set, but this base"):
        check_chat_template(Evaluate(tasks=[task]), SimpleNamespace(chat_template=None))


GOLD = """\
task: gold
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def test_the_right_one_of_a_rows_choices_is_that_of_lm_eval(model, tokenizer, tmp_path):
    """Every row has the same choices in another order, and the number of the right one."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = ["red", "green", "blue", "grey"]
    rows = [
        {"query": f"{TEXTS[n % 4]} {n}", "choices": names[n % 4 :] + names[: n % 4], "gold": gold}
        for n, gold in enumerate([0, 3, 1, 2, 2, 0, 3, 1, 1, 2, 0, 3])
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gold.yaml").write_text(GOLD.format(data=file))
    columns = {"prompt": "query", "completion": "choices[gold]"}
    data = Data.model_validate(
        {"train": [{"source": str(file), "columns": columns}], "validation_fraction": 0}
    )
    read = load_splits(data, 0).train
    prompts = [encode_prompt(row, tokenizer, data) for row in read]
    references = [answer_text(row, tokenizer, data) for row in read]
    right = multiple_choice(model, tokenizer, prompts, references, names, 4, "")
    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["gold"],
        task_manager=small_task_manager(str(tmp_path)),
        apply_chat_template=True,
    )["results"]["gold"]
    assert 0 < theirs["acc,none"] < 1
    expected = {"value": theirs["acc,none"], "stderr": theirs["acc_stderr,none"], "n": 12}
    assert mean(right) == pytest.approx(expected)
    # Another entry of the lists would be right in other rows.
    off = [row["choices"][row["gold"] - 1] for row in rows]
    assert mean(multiple_choice(model, tokenizer, prompts, off, names, 4, "")) != mean(right)


@pytest.mark.slow
def test_a_users_task_scores_as_in_lm_eval_itself(model, tokenizer, task_folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    evaluate = Evaluate(tasks=["colour_of_thing"], task_folder=task_folder, batch_size=4)
    ours, by_item = lm_eval_tasks(model, tokenizer, evaluate, seed=3)
    output = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
        tasks=["colour_of_thing"],
        task_manager=tasks._task_manager(task_folder),
    )
    theirs = output["results"]["colour_of_thing"]
    assert set(ours["colour_of_thing"]) == {"acc", "acc_norm"}
    for metric, score in ours["colour_of_thing"].items():
        stderr = theirs[f"{metric}_stderr,none"]
        assert score == {"value": theirs[f"{metric},none"], "stderr": stderr, "n": 11}
        samples = {row["doc_id"]: row[metric] for row in output["samples"]["colour_of_thing"]}
        assert by_item["colour_of_thing"][metric] == [samples[index] for index in range(11)]
    limited = Evaluate(tasks=[{"task": "colour_of_thing", "limit": 1}], task_folder=task_folder)
    acc = lm_eval_tasks(model, tokenizer, limited, seed=3)[0]["colour_of_thing"]["acc"]
    assert (acc["stderr"], acc["n"]) == (None, 1)


def test_a_log_has_no_progress_bars_of_lm_eval(model, tokenizer, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"request": text, "label": 0}) + "\n" for text in TEXTS))
    chosen = TASK.format(name="chosen", data=rows)
    said = chosen.replace("multiple_choice", "generate_until").replace("task: chosen", "task: said")
    said = said.replace(
        "doc_to_target: label\ndoc_to_choice: [red, green, blue, grey]", "doc_to_target: x"
    )
    said = said.partition("metric_list:")[0] + (
        "generation_kwargs: {until: ['.'], max_gen_toks: 2, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    for name, text in (("chosen", chosen), ("said", said)):
        (tmp_path / f"{name}.yaml").write_text(text)
    evaluate = Evaluate(tasks=["chosen", "said"], task_folder=str(tmp_path), batch_size=4)
    lm_eval_tasks(model, tokenizer, evaluate, seed=3)
    logged = capsys.readouterr().err
    assert "evaluate: lm-eval task said\n" in logged
    assert "Tokenizing inputs" not in logged
    assert "Running generate_until" not in logged


def test_all_processes_of_a_machine_get_through_a_task(model, tokenizer, task_folder, monkeypatch):
    """lm-eval returns the results to the first one only, by the launcher's LOCAL_RANK."""
    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    evaluate = Evaluate(tasks=["colour_of_thing"], task_folder=task_folder)
    for rank, names in (("0", ["colour_of_thing"]), ("1", [])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        scores, by_item = lm_eval_tasks(model, tokenizer, evaluate, seed=3)
        assert list(scores) == list(by_item) == names


def test_a_score_counts_the_documents_that_have_it(
    model, tokenizer, task_folder, tmp_path, monkeypatch
):
    """In a group, lm-eval counts the documents of all tasks, even of those without the metric."""
    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    data, acc = f"{task_folder}/rows.jsonl", "metric_list: [{metric: acc}]\n"
    files = {
        "colour": TASK.format(name="colour", data=data),
        "shade": f"include: colour.yaml\ntask: shade\n{acc}",
        "both": "group: both\ntask: [colour, shade]\naggregate_metric_list: "
        "[{metric: acc, weight_by_size: true}, {metric: acc_norm, weight_by_size: true}]\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    evaluate = Evaluate(tasks=["both"], task_folder=str(tmp_path))
    scores, by_item = lm_eval_tasks(model, tokenizer, evaluate, seed=3)
    assert {metric: score["n"] for metric, score in scores["both"].items()} == {
        "acc": 22,
        "acc_norm": 11,
    }
    assert {metric: len(values) for metric, values in by_item["both"].items()} == {"acc": 22}


def test_scores_that_a_task_counts_out_of_100_become_fractions(
    model, tokenizer, task_folder, tmp_path, monkeypatch
):
    """lm-eval's truthfulqa_gen reports percentages beside fractions; sacrebleu's are left alone."""
    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    text = TASK.format(name="colour", data=f"{task_folder}/rows.jsonl").partition("metric_list")[0]
    metrics = ", ".join(
        f"{{metric: {name}, aggregation: mean, higher_is_better: true}}"
        for name in ("rouge1_max", "rouge1_acc", "chrf")
    )
    code = "process_results: !function code.scores\n"
    (tmp_path / "colour.yaml").write_text(f"{text}metric_list: [{metrics}]\n{code}")
    (tmp_path / "code.py").write_text(
        "def scores(doc, results):\n"
        "    return {'rouge1_max': 40.0, 'rouge1_acc': 1, 'chrf': 40.0}\n"
    )
    evaluate = Evaluate(tasks=["colour"], task_folder=str(tmp_path))
    scores, by_item = lm_eval_tasks(model, tokenizer, evaluate, seed=3)
    tasks.turn_into_fractions([{"scores": {"tasks": scores}, "by_item": by_item}])
    values = {metric: score["value"] for metric, score in scores["colour"].items()}
    assert values == pytest.approx({"rouge1_max": 0.4, "rouge1_acc": 1, "chrf": 40})
    assert by_item["colour"]["rouge1_max"] == pytest.approx([0.4] * 11)


def test_models_that_are_compared_are_scored_on_one_scale():
    """A base whose every value out of 100 is below 1 was taken for one that scores fractions."""

    def measured(*values: float) -> dict:
        score = {"value": sum(values) / 2, "stderr": 0.1, "n": 2}
        scores = {"acc": {"value": 0.5, "stderr": None, "n": 2}, "rouge1_max": score}
        return {
            "scores": {"tasks": {"colour": scores}},
            "by_item": {"colour": {"rouge1_max": [*values]}},
        }

    base, tuned = measured(0.4, 0.8), measured(0.6, 40.0)
    sized = {"scores": {"perplexity": {}, "tasks": {}}, "answers": []}
    tasks.turn_into_fractions([base, tuned, sized])
    for model, values in ((base, [0.004, 0.008]), (tuned, [0.006, 0.4])):
        acc, rouge = model["scores"]["tasks"]["colour"].values()
        assert acc == {"value": 0.5, "stderr": None, "n": 2}
        assert rouge == pytest.approx({"value": sum(values) / 2, "stderr": 0.001, "n": 2})
        assert model["by_item"]["colour"]["rouge1_max"] == pytest.approx(values)


def test_squadv2_counts_out_of_100_even_below_1():
    scores = {name: {"value": 0.5, "stderr": None, "n": 9} for name in ("exact", "best_exact")}
    tasks.turn_into_fractions([{"scores": {"tasks": {"squadv2": scores}}, "by_item": {}}])
    assert scores["exact"]["value"] == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mine", "shade"], "'mine' and 'shade' both report 'shade'"),
        (["apart", "mine"], "'apart' and 'mine' both report 'shade'"),
        (["held_out"], "'held_out' is the name of the held-out rows"),
    ],
)
def test_scores_that_would_replace_others_are_refused(
    task_folder, tmp_path, monkeypatch, names, message
):
    """The limit of one entry and the answers of another would be in one line of the report."""
    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    files = {
        "colour": TASK.format(name="colour", data=f"{task_folder}/rows.jsonl"),
        "shade": "include: colour.yaml\ntask: shade\ntag: mine\n",
        "held_out": "include: colour.yaml\ntask: held_out\n",
        "apart": "group: apart\ntask: [colour, shade]\n",
        "both": "group: both\ntask: [colour, shade]\naggregate_metric_list: [{metric: acc}]\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        tasks.load_tasks(Evaluate(tasks=names, task_folder=str(tmp_path)), POSITIONS)
    tasks.load_tasks(Evaluate(tasks=["both", "shade"], task_folder=str(tmp_path)), POSITIONS)


def test_more_examples_than_there_are_rows_are_refused(task_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    colour = TASK.format(name="colour", data=f"{task_folder}/rows.jsonl")
    (tmp_path / "colour.yaml").write_text(f"{colour}fewshot_split: test\n")
    for shots, is_refused in ((10, False), (11, True)):
        task = {"task": "colour", "num_fewshot": shots}
        evaluate = Evaluate(tasks=[task], task_folder=str(tmp_path))
        if not is_refused:
            tasks.load_tasks(evaluate, POSITIONS)
            continue
        with pytest.raises(UserError, match="'colour' has 10 rows for examples, .* is 11: set"):
            tasks.load_tasks(evaluate, POSITIONS)


def test_answers_beyond_the_positions_of_the_base_are_refused(task_folder, tmp_path, monkeypatch):
    """lm-eval's assertion fails only when the first model is asked."""
    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    text = TASK.format(name="long", data=f"{task_folder}/rows.jsonl").replace(
        "output_type: multiple_choice",
        "output_type: generate_until\ngeneration_kwargs: {max_gen_toks: 2048, until: []}",
    )
    (tmp_path / "long.yaml").write_text(text)
    evaluate = Evaluate(tasks=["long"], task_folder=str(tmp_path))
    tasks.load_tasks(evaluate, 2049)
    with pytest.raises(UserError, match="'long' generates up to 2048 tokens, .* 2048 positions"):
        tasks.load_tasks(evaluate, 2048)


@pytest.mark.parametrize(
    ("splits", "is_shown"),
    [
        ("", True),
        ("fewshot_split: test\n", False),  # the row that is asked is left out
        ("training_split: train\n", False),
        ("training_split: train\nfewshot_split: test\n", False),
        ("validation_split: train\n", False),
        ("fewshot_config: {samples: [{request: a, label: 0}]}\n", False),
    ],
)
def test_examples_among_the_rows_that_are_asked_are_told(
    task_folder, tmp_path, monkeypatch, capsys, splits, is_shown
):
    """lm-eval warns of this, among much else that is silenced."""
    monkeypatch.setattr(tasks, "_task_manager", small_task_manager)
    tasks._say_that_the_answer_may_be_shown.cache_clear()
    rows = f"{task_folder}/rows.jsonl"
    text = TASK.format(name="colour", data=f"{rows}, train: {rows}")
    (tmp_path / "colour.yaml").write_text(f"{text}num_fewshot: 1\n{splits}")
    evaluate = Evaluate(tasks=["colour"], task_folder=str(tmp_path))
    for _ in range(2):
        tasks.load_tasks(evaluate, POSITIONS)
    assert capsys.readouterr().err.count("a prompt may show its own answer") == is_shown


def test_scores_name_filters_and_leave_out_losses():
    row = {
        "alias": "x",
        "sample_len": 5,
        "exact_match,strict-match": 0.4,
        "exact_match_stderr,strict-match": 0.1,
        "acc,none": 0.2,
        "acc_stderr,none": "N/A",
        "perplexity,none": 9.0,
        "perplexity_stderr,none": 1.0,
    }
    assert tasks._scores(row, {"acc": True, "perplexity": False}) == {
        "exact_match (strict-match)": {"value": 0.4, "stderr": 0.1, "n": 5},
        "acc": {"value": 0.2, "stderr": None, "n": 5},
    }


def sample(document, filtered_by, **values):
    return {"doc_id": document, "filter": filtered_by, **values}


def test_only_values_whose_mean_is_the_score_are_kept_by_document():
    output = {
        "group_subtasks": {"group": ["part"], "part": ["one", "other"]},
        "samples": {
            "one": [sample(1, "none", acc=1.0, f1=(0, 1)), sample(0, "none", acc=0.0, f1=(1, 1))],
            "other": [sample(0, "none", acc=1, f1=(0, 0))],
            "filtered": [
                sample(document, filtered_by, exact_match=value)
                for filtered_by, value in (("strict", 0), ("flexible", 1))
                for document in (0, 1)
            ],
        },
    }
    scores = {"acc": {"value": 2 / 3}, "f1": {"value": 0.5}}
    assert tasks._by_document("group", scores, output) == {"acc": [0, 1, 1]}
    scores["acc"]["value"] = 3 / 4  # the mean over the two tasks, not over the documents
    assert tasks._by_document("group", scores, output) == {}
    scores = {"exact_match (strict)": {"value": 0}, "exact_match (flexible)": {"value": 1}}
    assert tasks._by_document("filtered", scores, output) == {
        "exact_match (strict)": [0, 0],
        "exact_match (flexible)": [1, 1],
    }


@pytest.mark.slow  # lm-eval reads 10,000 files
def test_unknown_tasks_are_named_with_a_suggestion(task_folder):
    evaluate = Evaluate(tasks=["colour_of_thin", "arc_esay"], task_folder=task_folder)
    with pytest.raises(UserError) as error:
        check_tasks(evaluate)
    message = str(error.value)
    assert "'colour_of_thin'; did you mean colour_of_thing" in message
    assert "'arc_esay'; did you mean arc_easy" in message
    assert "evaluate.task_folder" in message
    check_tasks(Evaluate(tasks=["colour_of_thing", "arc_easy"], task_folder=task_folder))


def test_missing_data_names_the_task_and_the_cause(model, tokenizer, task_folder):
    evaluate = Evaluate(tasks=["no_data"], task_folder=task_folder)
    check_tasks(evaluate)
    with pytest.raises(UserError, match=r"(?s)'no_data'.*missing\.jsonl"):
        lm_eval_tasks(model, tokenizer, evaluate, seed=0)


def test_a_missing_task_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        check_tasks(Evaluate(task_folder=str(tmp_path / "nowhere")))
