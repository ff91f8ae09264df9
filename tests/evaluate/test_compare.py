"""evaluate/compare.py: three models are measured on the same tokens, in one report."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refused, write_jsonl

from finequant.recipes.interrupt import RESUME_HINT, Interrupted
from finequant.recipes.load import load_recipe
from finequant.recipes.stages import MEASURING_CODE


@pytest.fixture(scope="module")
def runs_before(tmp_path_factory) -> tuple[dict[tuple[str, ...], Path], Path]:
    """Finished runs by their overrides, and where to keep them: tests start from copies."""
    return {}, tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(recipe_file, runs_before, train_once):
    """Trains, quantizes and evaluates; returns the report."""
    from finequant.evaluate.compare import main as compare
    from finequant.quantize.convert import main as convert

    before, store = runs_before

    def run(*overrides: str) -> dict:
        arguments = [str(recipe_file), "train.learning_rate=1e-2", *overrides]
        folder = recipe_file.parent / "run"
        if overrides in before:
            shutil.copytree(before[overrides], folder)
            return report_of(recipe_file)
        train_once(arguments)
        convert(arguments)
        compare(arguments)
        before[overrides] = shutil.copytree(folder, store / str(len(before)))
        return report_of(recipe_file)

    return run


def report_of(recipe_file: Path) -> dict:
    """Reads the report without its recipe, as paths of a copied run are those of the original."""
    report = json.loads((recipe_file.parent / "run" / "report.json").read_text())
    del report["recipe"]
    return report


def test_the_report_has_all_three_models_on_the_same_tokens(finished, recipe_file):
    report = finished()
    assert list(report["models"]) == ["base", "tuned", "quantized"]
    for corpus in ("text", "held_out"):
        tokens = {model["perplexity"][corpus]["tokens"] for model in report["models"].values()}
        assert len(tokens) == 1
    base, tuned, quantized = report["models"].values()
    assert tuned["perplexity"]["held_out"]["token"] < base["perplexity"]["held_out"]["token"]
    assert quantized["perplexity"]["held_out"] != tuned["perplexity"]["held_out"]
    assert tuned["size_bytes"] > quantized["size_bytes"]
    for model in report["models"].values():
        assert model["tasks"]["held_out"]["exact_match"]["n"] == 8
    assert len([layer for layer in report["layers"] if layer["bits"]]) == 15
    assert [set(sample["answers"]) for sample in report["samples"]] == 5 * [set(report["models"])]
    assert 0 < report["divergence"]["kl"]["value"] < 0.1
    assert report["gate"] == {"passed": True, "checks": []}
    run = recipe_file.parent / "run"
    assert {path.name for path in (run / "plots").iterdir()} == {
        "comparison.png",
        "layers.png",
        "loss.png",
    }
    assert "| base |" in (run / "report.md").read_text()
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert [set(row["answers"]) for row in rows] == 8 * [set(report["models"])]
    right = sum(row["right"]["tuned"] for row in rows) / 8
    assert right == report["models"]["tuned"]["tasks"]["held_out"]["exact_match"]["value"]
    assert max(token["kl"] for token in report["passages"][0]) > report["divergence"]["kl"]["value"]
    assert rows[0]["prompt"] in html.unescape((run / "report.html").read_text())


def test_perplexities_are_those_of_plain_transformers(finished, recipe_file, tiny_base, tokenizer):
    """Recomputes them from the logits of each artifact, loaded the way a user would load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.data.tokens import encode
    from finequant.recipes.load import load_recipe

    report = finished("evaluate.divergence_tokens=10")  # only some rows, as in most runs
    run, recipe = recipe_file.parent / "run", load_recipe(recipe_file)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    models = {
        "base": base,
        "quantized": AutoModelForCausalLM.from_pretrained(run / "quantized"),
        "tuned": PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base), run / "adapter"
        ),
    }
    for name, model in models.items():
        total = count = 0
        for row in load_splits(recipe.data, recipe.seed).test:
            encoded = encode(row, tokenizer, recipe.data)
            labels = torch.tensor(encoded.labels)[1:]
            with torch.no_grad():
                logits = model(torch.tensor([encoded.input_ids])).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += (labels != -100).sum().item()
        expected = torch.tensor(total / count).exp().item()
        measured = report["models"][name]["perplexity"]["held_out"]
        assert measured["token"] == pytest.approx(expected, rel=1e-4)
        assert measured["tokens"] == count
    assert report["divergence"]["tokens"] < count / 2


def test_measurements_are_reused_until_their_inputs_change(finished, recipe_file, capsys):
    from finequant.evaluate.compare import main as compare

    first = finished()
    arguments = [str(recipe_file), "train.learning_rate=1e-2"]
    capsys.readouterr()
    compare(arguments)
    said = capsys.readouterr().err
    assert said.count("measured before, unchanged") == 3
    assert report_of(recipe_file) == first
    compare([*arguments, "evaluate.limit=4"])
    assert "measured before" not in capsys.readouterr().err
    assert report_of(recipe_file)["models"]["base"]["tasks"]["held_out"]["exact_match"]["n"] == 4


def test_a_signal_says_which_measurement_starts_over(finished, recipe_file, monkeypatch, capsys):
    from finequant.evaluate import compare

    finished()
    measure, arguments = compare.measure_model, [str(recipe_file), "evaluate.limit=4"]

    def stopped(name: str, *rest: object) -> object:
        if name == "tuned":
            raise Interrupted(signal.SIGTERM)
        return measure(name, *rest)

    monkeypatch.setattr(compare, "measure_model", stopped)
    with pytest.raises(SystemExit, match="143"):
        compare.main(arguments)
    assert f"{RESUME_HINT}; the measurement of tuned starts over\n" in capsys.readouterr().err
    monkeypatch.setattr(compare, "measure_model", measure)
    compare.main(arguments)
    printed = capsys.readouterr().err
    assert "base: measured before, unchanged" in printed
    assert "tuned: loading" in printed


def test_a_limit_chooses_from_all_rows_of_a_sorted_test_file(recipe_file):
    from finequant.evaluate.check import check_rows
    from finequant.finetune.data.splits import load_splits
    from finequant.recipes.load import load_recipe

    rows = [
        {"prompt": f"question {number}", "completion": f"class {number // 20}"}
        for number in range(200)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (recipe_file.parent / "test.jsonl").write_text(lines, encoding="utf-8")

    def chosen(limit: int, seed: int) -> list[int]:
        recipe = load_recipe(recipe_file, [f"evaluate.limit={limit}", f"seed={seed}"])
        held_out = check_rows(recipe, load_splits(recipe.data, recipe.seed))
        return [int(row.messages[0]["content"].removeprefix("question ")) for row in held_out]

    first = chosen(60, seed=0)
    assert len(set(first)) == 60
    assert first == sorted(first) == chosen(60, seed=0)
    assert {number // 20 for number in first} == set(range(10))
    assert first != chosen(60, seed=1)
    assert chosen(200, seed=0) == chosen(999, seed=0) == list(range(200))


@pytest.mark.parametrize("damage", ["edited", "truncated"])
def test_a_measurement_that_changed_since_it_was_written_is_refused(finished, recipe_file, damage):
    from finequant.evaluate.compare import main as compare

    first = finished()
    arguments = [str(recipe_file), "train.learning_rate=1e-2"]
    file = recipe_file.parent / "run" / "measurements" / "tuned.json"
    text = file.read_text()
    other = text.replace('"n": 8', '"n": 9') if damage == "edited" else text[:-20]
    assert other != text
    file.write_text(other)
    assert f"{file}: changed since it was written" in refused(compare, arguments)
    assert file.read_text() == other
    file.unlink()
    compare(arguments)
    assert report_of(recipe_file) == first


def test_models_measured_in_another_dtype_are_measured_again(
    finished, recipe_file, monkeypatch, capsys
):
    """A run directory may come from a machine that computes in bfloat16."""
    from finequant.evaluate import measure
    from finequant.evaluate.compare import main as compare

    report = finished()
    assert report["measuring_code"] == MEASURING_CODE
    dtype = measure.arithmetic(load_recipe(recipe_file))
    assert report["arithmetic"] == dtype["arithmetic"]
    monkeypatch.setattr(measure, "arithmetic", lambda _: {"arithmetic": "another"})
    capsys.readouterr()
    compare([str(recipe_file), "train.learning_rate=1e-2"])
    assert "measured before" not in capsys.readouterr().err


def test_a_new_quantization_measures_only_the_quantized_model(finished, recipe_file, capsys):
    finished()
    capsys.readouterr()
    from finequant.evaluate.compare import main as compare
    from finequant.quantize.convert import main as convert

    arguments = [str(recipe_file), "train.learning_rate=1e-2", "quantize.bits=8"]
    convert(arguments)
    compare(arguments)
    said = capsys.readouterr().err
    assert "evaluate: base: measured before, unchanged" in said
    assert "evaluate: quantized: answering 8 held-out rows" in said
    assert "tuned: answering" not in said


def test_a_failed_gate_exits_with_1_after_writing_the_report(finished, recipe_file, capsys):
    with pytest.raises(SystemExit) as exit_:
        finished("evaluate.gate.max_perplexity_increase=0", "quantize.bits=2")
    assert exit_.value.code == 1
    report = report_of(recipe_file)
    assert not report["gate"]["passed"]
    assert {check["limit"] for check in report["gate"]["checks"]} == {0}
    assert "FAILED" in capsys.readouterr().out


def test_a_report_is_printed_again_where_nothing_can_be_written(finished, recipe_file, capsys):
    finished()
    arguments = [str(recipe_file), "train.learning_rate=1e-2"]
    page = recipe_file.parent / "run" / "report.html"
    page.unlink()
    page.mkdir()  # root may write anywhere else
    capsys.readouterr()
    print_report(arguments)
    said = capsys.readouterr()
    assert "held_out" in said.out
    assert "report.html: cannot be written (Is a directory)" in said.err
    assert not said.err.rstrip().endswith("report.html")
    assert "out of date" not in said.err


def test_a_report_of_other_settings_says_so(finished, recipe_file, capsys):
    finished()
    capsys.readouterr()
    for where in (recipe_file, recipe_file.parent / "run"):
        print_report([str(where), "train.learning_rate=1e-2", "quantize.bits=8"])
        said = capsys.readouterr().err
        assert "report: out of date: since quantize ran, quantize.bits: 4 -> 8" in said


def test_a_report_names_the_settings_that_its_models_were_made_with(finished, recipe_file, capsys):
    """Evaluated by hand with bits=8, a report called a model of 4 bits one of 8 bits."""
    from finequant.evaluate.compare import main as compare

    finished()
    run = recipe_file.parent / "run"
    made = json.loads((run / "report.json").read_text(encoding="utf-8"))["recipe"]
    others = ["quantize.bits=8", "lora.rank=2", "train.epochs=9", "quantize.calibration.tokens=64"]
    compare([str(recipe_file), "train.learning_rate=1e-2", *others, "evaluate.samples=1"])
    assert "made with other settings: quantize.bits: 4 -> 8" in capsys.readouterr().err
    recipe = json.loads((run / "report.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe["evaluate"]["samples"] == 1
    assert all(recipe[key] == made[key] for key in ("lora", "train", "quantize"))
    assert "quantized to 4 bits in groups of" in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("interrupted", [False, True])
def test_seconds_after_an_interruption_are_no_estimate(finished, recipe_file, interrupted):
    """The seconds of quantized alone were announced as those of all three models."""
    from finequant.evaluate.compare import main as compare

    finished()
    run = recipe_file.parent / "run"
    measured = run / "measurements"
    (measured / "quantized.json").unlink()
    manifest = (run / "manifest.json").stat().st_mtime_ns
    written = manifest + (10**9 if interrupted else -(10**9))
    for name in ("base", "tuned"):
        os.utime(measured / f"{name}.json", ns=(written, written))
    compare([str(recipe_file), "train.learning_rate=1e-2"])
    recorded = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert recorded["evaluate"]["resumed"] == interrupted


def test_a_report_of_earlier_code_says_so_whoever_names_it(finished, recipe_file, capsys):
    finished()
    run = recipe_file.parent / "run"
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["evaluate"]["inputs"]["measuring_code"] = MEASURING_CODE - 1
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    for arguments in ([str(run)], [str(recipe_file), "train.learning_rate=1e-2"]):
        capsys.readouterr()
        print_report(arguments)
        said = "report: out of date: since evaluate ran, finequant has changed how it measures"
        assert said in capsys.readouterr().err
    (recipe_file.parent / "train.jsonl").unlink()  # as when only the run directory was copied
    print_report([str(run)])
    assert "out of date" not in capsys.readouterr().err


def test_a_damaged_report_is_named(finished, recipe_file):
    finished()
    report = recipe_file.parent / "run" / "report.json"
    report.write_text(report.read_text(encoding="utf-8")[:100], encoding="utf-8")
    from finequant.recipes.run import main

    for arguments in ([str(report.parent)], [str(recipe_file), "train.learning_rate=1e-2"]):
        assert "report.json: cannot be read" in refused(main, ["report", *arguments])


def test_a_report_that_is_not_there_yet_names_both_ways_to_it(recipe_file):
    from finequant.recipes.run import main

    message = refused(main, ["report", str(recipe_file)])
    ways = "run `finequant run RECIPE`, or only `finequant evaluate RECIPE`, first"
    assert message.strip().endswith(f"report.json does not exist: {ways}")


def print_report(arguments: list[str]) -> None:
    from finequant.recipes.run import main

    with pytest.raises(SystemExit) as exit_:
        main(["report", *arguments])
    assert not exit_.value.code


def test_nothing_to_measure_on_is_an_error(finished, recipe_file):
    assert "nothing to measure on" in refused(finished, "data.test=[]", "evaluate.perplexity=[]")


def test_without_held_out_rows_models_are_checked_on_training_rows(recipe_file):
    """Token 0 alone is often the padding, whose zeros give logits of zero: 0 / 0 is NaN."""
    from finequant.evaluate.inputs import prepare
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.model import load_tokenizer
    from finequant.recipes.load import load_recipe

    recipe = load_recipe(recipe_file, ["data.test=[]"])
    splits = load_splits(recipe.data, recipe.seed)
    material = prepare(recipe, splits, load_tokenizer(recipe.model))
    assert not material.prompts
    for row, probe in zip(splits.train, material.probes, strict=False):
        assert row.messages[0]["content"] in material.tokenizer.decode(probe)
    assert len(material.probes) == 2


@pytest.mark.parametrize("metrics", ["[exact_match]", "[multiple_choice]"])
def test_answers_that_are_longer_than_what_is_generated_are_counted(recipe_file, capsys, metrics):
    from finequant.evaluate.inputs import prepare
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.model import load_tokenizer
    from finequant.recipes.load import load_recipe

    def prepared(limit: int):
        settings = [f"evaluate.metrics={metrics}", "evaluate.choices=completions"]
        recipe = load_recipe(recipe_file, [*settings, f"evaluate.max_new_tokens={limit}"])
        splits = load_splits(recipe.data, recipe.seed)
        return prepare(recipe, splits, load_tokenizer(recipe.model))

    material, said = prepared(1), capsys.readouterr().err
    if metrics == "[multiple_choice]":  # it compares likelihoods
        assert not material.cut
        return
    tokens = material.tokenizer(material.references, add_special_tokens=False)["input_ids"]
    longest = max(map(len, tokens))
    assert material.cut == {"longer": 8, "n": 8, "longest": longest, "limit": 1}
    assert f"no model can give them in full; set evaluate.max_new_tokens={longest}" in said
    assert not prepared(longest).cut


@pytest.mark.slow
def test_the_report_has_multiple_choice_and_text_metrics(finished):
    report = finished(
        "evaluate.metrics=[multiple_choice, f1, rouge, bleu, chrf, json_match]",
        "evaluate.choices=completions",
        "evaluate.limit=4",
    )
    scores = report["models"]["tuned"]["tasks"]["held_out"]
    assert set(scores) == {"multiple_choice", "f1", "rouge", "bleu", "chrf", "json_match"}
    assert all(score["n"] == 4 for score in scores.values())
    changes, quantized = report["changes"]["held_out"], report["models"]["quantized"]["tasks"]
    assert set(changes) == {"multiple_choice", "f1", "rouge", "json_match"}
    for metric, change in changes.items():
        difference = quantized["held_out"][metric]["value"] - scores[metric]["value"]
        assert change["value"] == pytest.approx(difference)
        assert change["stderr"] >= 0


def test_divergence_equals_a_calculation_by_hand():
    from finequant.evaluate.metrics.divergence import Predictions, divergence

    tuned = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    quantized = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = divergence(Predictions(tuned, torch.tensor([0.25, 0.75]), {}, [1, 1]), quantized)
    by_hand = 0.5 * torch.log(torch.tensor([0.5 / 0.25, 0.5 / 0.75])).sum().item()
    assert found["tokens"] == 2
    assert found["kl"]["value"] == pytest.approx(by_hand / 2)
    assert found["top1_agreement"]["value"] == 0.5
    assert found["floor"]["value"] == 0.5
    # Two equal tokens of a sequence are no more certain than one.
    rounding = torch.tensor([0.25, 0.25, 0.75, 0.75])
    twice = Predictions(tuned.repeat_interleave(2, dim=0), rounding, {}, [2, 2])
    repeated = divergence(twice, quantized.repeat_interleave(2, dim=0))
    assert repeated["tokens"] == 4
    assert repeated["kl"] == pytest.approx(found["kl"])


def test_passages_surround_the_token_of_each_sequence_that_changed_most():
    from finequant.evaluate.metrics.divergence import passages
    from finequant.evaluate.metrics.perplexity import ScoredSequence

    length, quantized, sequences = 100, [], []
    for number in range(1, 8):  # of the third, nothing is scored; the last changed least
        is_scored = [False] + [number != 3] * (length - 1)
        sequences.append(ScoredSequence([*range(1000 * number, 1000 * number + length)], is_scored))
        probabilities = torch.full((sum(is_scored), 2), 0.5)
        if number != 3:
            probabilities[10 * number] = torch.tensor([0.05 * number, 1 - 0.05 * number])
            probabilities[80] = torch.tensor([0.45, 0.55])
        quantized.append(probabilities)
    quantized = torch.cat(quantized).log()
    tuned = torch.full_like(quantized, 0.5).log()
    found = passages(tuned, quantized, sequences, lambda ids: str(*ids))
    ends = [(int(passage[0]["text"]), int(passage[-1]["text"])) for passage in found]
    assert ends == [(1000, 1050), (2000, 2060), (4001, 4080), (5011, 5090), (6021, 6099)]
    for number, passage in zip((1, 2, 4, 5, 6), found, strict=True):
        worst = max(passage, key=lambda token: token["kl"])
        assert int(worst["text"]) == 1010 * number + 1
        by_hand = 0.5 * math.log(0.25 / (0.05 * number) / (1 - 0.05 * number))
        assert worst["kl"] == pytest.approx(by_hand, rel=1e-4)
    assert found[0][0]["kl"] == 0


def test_divergence_is_of_float32_logits_beside_the_rounding_of_shipped_ones(tiny_base):
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.metrics.divergence import predict
    from finequant.evaluate.metrics.perplexity import ScoredSequence

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).eval()
    ids = list(range(40, 70))
    sequences = [ScoredSequence(ids, [False] + [True] * 29)]
    logs, rounding, losses, counts = predict(model, {"text": sequences}, 1, "test")
    assert counts == [29]
    with torch.inference_mode():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, :-1].float()
        exact = torch.log_softmax(hidden @ model.lm_head.weight.float().T, dim=-1)
        shipped = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].float(), dim=-1)
    torch.testing.assert_close(logs, exact, rtol=0, atol=1e-5)
    expected = torch.nn.functional.kl_div(shipped, exact, log_target=True, reduction="none")
    torch.testing.assert_close(rounding.float(), expected.sum(dim=-1), rtol=1e-3, atol=1e-7)
    assert rounding.mean() > 1e-8
    assert model.lm_head.weight.dtype == torch.bfloat16
    own_loss = -shipped.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert losses == {"text": [pytest.approx(own_loss, rel=1e-5)]}
    none = predict(model.float(), {"text": sequences}, 1, "test").rounding
    assert none.abs().max() < 1e-9


def test_predictions_are_in_the_order_of_the_sequences_whatever_their_lengths(tiny_base):
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.metrics.divergence import predict
    from finequant.evaluate.metrics.perplexity import ScoredSequence

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    lengths = (5, 30, 1, 12)
    sequences = [ScoredSequence([*range(40, 41 + n)], [False] + [True] * n) for n in lengths]
    sequences.append(ScoredSequence([40, 41], [False, False]))
    together = predict(model, {"a": sequences[:1], "b": sequences[1:]}, 2, "test")
    with torch.inference_mode():
        alone = [
            model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)
            for ids, scored in sequences
            if any(scored)
        ]
    torch.testing.assert_close(together.logs, torch.cat(alone), rtol=0, atol=1e-5)
    by_hand = [
        -logs.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        for logs, (ids, _) in zip(alone, sequences, strict=False)
    ]
    assert together.losses["a"] == pytest.approx(by_hand[:1], abs=1e-4)
    assert together.losses["b"] == pytest.approx([*by_hand[1:], 0.0], abs=1e-4)


def test_sequences_for_the_comparison_are_from_all_parts_of_each_corpus():
    from finequant.evaluate.metrics.divergence import reference_sequences
    from finequant.evaluate.metrics.perplexity import ScoredSequence

    short, long = (ScoredSequence([0] * (n + 1), [False] + [True] * n) for n in (2, 9))
    corpora = {"few": ([short], []), "many": ([long] * 5, []), "empty": ([], [])}
    assert reference_sequences(corpora, 20) == {"few": [short], "many": [long] * 2, "empty": []}
    assert reference_sequences(corpora, 10**6) == {"few": [short], "many": [long] * 5, "empty": []}
    by_class = [ScoredSequence([number] * 2, [False, True]) for number in range(100)]
    chosen = reference_sequences({"rows": (by_class, [])}, 30)["rows"]
    assert chosen == reference_sequences({"rows": (by_class, [])}, 30)["rows"]
    assert {sequence.ids[0] // 25 for sequence in chosen} == {0, 1, 2, 3}
    assert len({sequence.ids[0] for sequence in chosen}) == 30


def test_each_sequence_counts_once_whichever_are_compared(recipe_file):
    from finequant.evaluate.measure import measure_model
    from finequant.evaluate.metrics.corpora import count
    from finequant.evaluate.metrics.perplexity import ScoredSequence, measure
    from finequant.finetune.model import load_base
    from finequant.recipes.load import load_recipe

    recipe = load_recipe(recipe_file, ["evaluate.divergence_tokens=8"])
    model = load_base(recipe.model, torch.float32).eval()
    ids = [[3 + number, 5, 9 + 7 * number, 11][: 2 + number % 3] for number in range(20)]
    sequences = [ScoredSequence(row, [False] + [True] * (len(row) - 1)) for row in ids]
    corpora = {"text": (sequences, [count("some words")])}
    material = SimpleNamespace(corpora=corpora, prompts=[])
    measured, _ = measure_model("base", model, recipe, material, 1)
    expected = measure(model, *corpora["text"], 4, "test")
    assert measured["scores"]["perplexity"]["text"] == pytest.approx(expected)


def test_words_and_bytes_of_truncated_rows_are_those_that_are_scored(recipe_file, tokenizer):
    from finequant.evaluate.inputs import _answers_as_corpus
    from finequant.finetune.data.row import Row
    from finequant.recipes.load import load_recipe

    def corpus(length: int, row: Row):
        recipe = load_recipe(recipe_file, [f"data.max_length={length}"])
        (sequence,), (document,) = _answers_as_corpus([row], tokenizer, recipe)
        scored = [token for token, counts in zip(*sequence, strict=True) if counts]
        return tokenizer.decode(scored, skip_special_tokens=True), document

    answer = "the red door and the blue window at 7 o'clock " * 5
    turns = ({"role": "user", "content": "open"}, {"role": "assistant", "content": answer})
    for row in (Row("test.jsonl:1", turns), Row("test.jsonl:2", text=answer)):
        _, whole = corpus(1000, row)
        assert (whole.words, whole.bytes) == (len(answer.split()) + 1, len(answer))
        text, cut = corpus(40, row)
        assert 0 < cut.bytes == len(text) < len(answer)
        assert len(text.split()) <= cut.words < whole.words
    # A prompt that fills the row: nothing is scored.
    long = ({"role": "user", "content": answer}, {"role": "assistant", "content": "ok"})
    _, nothing = corpus(12, Row("test.jsonl:3", long))
    assert (nothing.words, nothing.bytes) == (0, 0)


def test_held_out_texts_that_training_would_split_are_measured_whole(recipe_file, tokenizer):
    from finequant.evaluate.inputs import _answers_as_corpus
    from finequant.finetune.data.row import Row
    from finequant.finetune.data.tokens import encode
    from finequant.recipes.load import load_recipe

    recipe = load_recipe(recipe_file, ["data.max_length=16", "data.long_rows=split"])
    row = Row("book.txt", text="the red door and the blue window at 7 o'clock " * 5)
    sequences, (document,) = _answers_as_corpus([row], tokenizer, recipe)
    whole = encode(row, tokenizer, recipe.data, whole=True).input_ids
    assert [token for sequence in sequences for token in sequence.ids] == whole
    assert len(sequences) > 2
    assert sum(sum(sequence.scored) for sequence in sequences) == len(whole) - len(sequences)
    assert 0.8 * len(row.text) < document.bytes < len(row.text)


def test_dequantizing_once_changes_nothing_and_is_checked(finished, recipe_file):
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.dequantized import dequantize_once

    finished()
    folder = recipe_file.parent / "run" / "quantized"
    shipped = AutoModelForCausalLM.from_pretrained(folder).eval()
    measured = dequantize_once(AutoModelForCausalLM.from_pretrained(folder).eval(), [5, 6])
    ids = torch.randint(0, 300, (3, 40))
    with torch.inference_mode():
        assert torch.equal(shipped(ids).logits, measured(ids).logits)


def test_multiple_choice_of_one_answer_is_refused(recipe_file):
    from finequant.evaluate.inputs import _choices
    from finequant.finetune.data.row import Row
    from finequant.finetune.model import load_tokenizer
    from finequant.recipes.errors import UserError
    from finequant.recipes.load import load_recipe

    arguments = ["evaluate.metrics=[multiple_choice]", "evaluate.choices=completions"]
    recipe = load_recipe(recipe_file, arguments)
    asked = {"role": "user", "content": "where?"}
    rows = [Row("rows:1", (asked, {"role": "assistant", "content": word})) for word in ("a", "b")]
    tokenizer = load_tokenizer(recipe.model)
    assert _choices(recipe, rows, tokenizer, []) == ["a", "b"]
    with pytest.raises(UserError, match="all rows have the answer 'a'.*is the file sorted"):
        _choices(recipe, rows[:1], tokenizer, [])


def test_what_follows_an_end_token_in_an_answer_is_not_expected(recipe_file, tmp_path):
    """Generation stops there: with it, no model could give the answer."""
    from finequant.evaluate.inputs import prepare
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.model import load_tokenizer

    rows = [{"prompt": f"is it {n}?", "completion": f"{'ab'[n % 2]}<|im_end|>"} for n in range(8)]
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"marked-{name}.jsonl", rows[name == "test" :: 2])
    files = [f"data.{name}=marked-{name}.jsonl" for name in ("train", "test")]
    metrics = ["evaluate.metrics=[exact_match, multiple_choice]", "evaluate.choices=completions"]
    recipe = load_recipe(recipe_file, [*files, *metrics])
    material = prepare(recipe, load_splits(recipe.data, 0), load_tokenizer(recipe.model))
    assert set(material.references) == {"b"}
    assert material.choices == ["a", "b"]
