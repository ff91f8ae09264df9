"""Exports are measured in their own runtimes, on the tokens of the other models."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from conftest import EXECUTORCH, refused

from finequant.evaluate.metrics.exports import greedy_answer, nll, speed
from finequant.evaluate.metrics.perplexity import ScoredSequence
from finequant.quantize.formats.compressed_tensors import Transformers
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def test_token_by_token_gives_the_likelihood_of_one_forward(tiny_base):
    from transformers import AutoModelForCausalLM

    ids = [5, 6, 7, 200, 9, 10, 300, 12]
    scored = [False, False, False, True, True, False, True, True]
    logits = AutoModelForCausalLM.from_pretrained(tiny_base)(torch.tensor([ids])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    expected = losses[torch.tensor(scored[1:])].sum().item()
    runtime = Transformers(tiny_base)
    assert nll(runtime, ScoredSequence(ids, scored)) == pytest.approx(expected, rel=1e-5)
    assert nll(runtime, ScoredSequence(ids, scored)) == pytest.approx(expected, rel=1e-5)


def test_answers_are_those_of_generate(tiny_base, tokenizer):
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.metrics.held_out import answer

    prompt = tokenizer("open the red door")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    expected = answer(model, tokenizer, [prompt], 12, 1, "test")
    ends = [tokenizer.eos_token_id]
    assert [greedy_answer(Transformers(tiny_base), tokenizer, prompt, ends, 12)] == expected


def test_answers_have_the_repetition_penalty_of_the_base(tiny_base, tokenizer):
    from transformers import AutoModelForCausalLM

    from finequant.evaluate.metrics.held_out import answer

    prompt, ends = tokenizer("open the red door")["input_ids"], [tokenizer.eos_token_id]
    model = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    model.generation_config.repetition_penalty = 3.0
    expected = answer(model, tokenizer, [prompt], 12, 1, "test")
    runtime = Transformers(tiny_base)
    for penalty in (3.0, 3):  # JSON may hold an integer
        assert [greedy_answer(runtime, tokenizer, prompt, ends, 12, penalty)] == expected
    assert [greedy_answer(runtime, tokenizer, prompt, ends, 12)] != expected


def test_an_export_is_compared_with_quantized_row_by_row():
    """One that was not run has no answers; it takes part in nothing."""
    from finequant.evaluate.answers import parities, predictions
    from finequant.finetune.data.row import Row
    from finequant.recipes.schema import Evaluate

    measured = {
        "tuned": {"answers": ["a", "b", "c"]},
        "quantized": {"answers": ["a", "b", "x"]},
        "gguf": {"answers": ["a", "y", "x"], "parity": {"kl": 0.5}},
        "onnx": {"answers": []},
        "mlx": {"answers": [], "parity": {"kl": 0.25}},
    }
    found = parities(measured)
    assert found == {
        "gguf": {"kl": 0.5, "same_answers": pytest.approx(2 / 3), "n": 3},
        "mlx": {"kl": 0.25},
    }
    assert measured["gguf"]["parity"] == {"kl": 0.5}
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": ""})
    material = SimpleNamespace(rows=[Row("row 1", messages)] * 3, references=["a", "b", "c"])
    recipe = SimpleNamespace(evaluate=Evaluate(metrics=["exact_match"]))
    last = predictions(recipe, material, measured)[-1]
    assert last["answers"] == {"tuned": "c", "quantized": "x", "gguf": "x"}
    assert last["right"] == {"tuned": True, "quantized": False, "gguf": False}
    assert (last["prompt"], last["reference"]) == ("?", "c")


def test_prompts_and_predictions_of_an_export_are_compared(tokenizer):
    from finequant.evaluate.metrics.divergence import Predictions
    from finequant.evaluate.metrics.parity import Reference, compared
    from finequant.finetune.data.row import Row
    from finequant.finetune.data.tokens import encode_prompt
    from finequant.recipes.schema import Data

    data = Data(train=["unused"])
    rows = [
        Row(text, ({"role": "user", "content": text}, {"role": "assistant", "content": "b"}))
        for text in ("open", "close", "paint")
    ]
    prompts = [encode_prompt(row, tokenizer, data) for row in rows]
    entry = SimpleNamespace(  # puts a token in front of one of the prompts
        token_ids=lambda _, texts: [
            [1] * ("paint" in text) + tokenizer(text)["input_ids"] for text in texts
        ]
    )
    material = SimpleNamespace(rows=rows, prompts=prompts, tokenizer=tokenizer)
    exact, logs = (torch.randn(4, 7).log_softmax(-1) for _ in range(2))
    reference = Reference({}, Predictions(exact, torch.zeros(4), {}, [4]))
    found = compared(entry, None, SimpleNamespace(data=data), material, reference, logs)
    expected = torch.nn.functional.kl_div(logs, exact, log_target=True, reduction="batchmean")
    assert found == {"kl": pytest.approx(expected.item()), "same_prompts": pytest.approx(2 / 3)}


def test_a_checkpoint_is_measured_in_the_arithmetic_of_the_other_models(
    recipe_file, train_once, monkeypatch
):
    from finequant.evaluate import measure
    from finequant.evaluate.metrics.exports import measure_export
    from finequant.evaluate.metrics.parity import Reference
    from finequant.finetune import device
    from finequant.quantize.convert import main as convert
    from finequant.quantize.export import main as export

    arguments = [str(recipe_file), "train.max_steps=2", "quantize.dtype=bfloat16"]
    arguments.append("quantize.exports=compressed-tensors")
    train_once(arguments)
    convert(arguments)
    export(arguments)

    class MeasuredError(Exception):
        pass

    def record(name: str, model: PreTrainedModel, *_: object) -> None:
        raise MeasuredError(model.dtype)

    monkeypatch.setattr(measure, "measure_model", record)
    recipe, nothing = load_recipe(recipe_file, arguments[1:]), Reference({}, None)
    for native, dtype in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(device, "_bf16", lambda native=native: (native, "this CPU"))
        with pytest.raises(MeasuredError, match=dtype):
            measure_export("compressed-tensors", recipe, RunDir.of(recipe), None, lambda: nothing)


def test_a_killed_timing_is_not_explained_by_a_warning(monkeypatch, tmp_path):
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "W1128 this is deprecated\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(UserError, match="timed: it was killed, perhaps out of memory"):
        speed("gguf", tmp_path, 2048)


@pytest.mark.parametrize(("positions", "longest"), [(64, 64), (300, 300), (320, 320), (2048, 320)])
def test_timing_stays_within_the_positions_of_the_base(monkeypatch, positions, longest):
    """Tables of rotations end there, and so do caches of a sliding window: timing failed after
    everything else was measured."""
    from finequant.evaluate.metrics import exports

    ends = []
    runtime = SimpleNamespace(last_logits=lambda ids, start=0: ends.append(start + len(ids)))
    monkeypatch.setitem(exports.FORMATS, "gguf", SimpleNamespace(open_runtime=lambda _: runtime))
    monkeypatch.setattr(exports.time, "perf_counter", iter([0, 1, 3]).__next__)
    timed = exports._time("gguf", Path(), positions)
    assert max(ends) == longest
    assert timed["prompt"] + 2 * timed["decoding"] == longest


def test_an_export_is_measured_where_lm_evals_tasks_are_all_that_is_measured(recipe_file, tmp_path):
    """There are no tokens to compare it on, and stacking none of them was a traceback."""
    from finequant.evaluate.metrics.divergence import Predictions
    from finequant.evaluate.metrics.exports import _measure_in_runtime
    from finequant.evaluate.metrics.parity import Reference, compared

    recipe, material = load_recipe(recipe_file), SimpleNamespace(corpora={}, prompts=[])
    entry = SimpleNamespace(name="toy", open_runtime=lambda folder, context: None)
    run, none = RunDir.of(recipe), torch.empty(0, 9)
    reference = Reference({}, Predictions(none, torch.empty(0), {}, []))
    scores, answers, logs = _measure_in_runtime(entry, run, recipe, material, {})
    assert (scores, answers) == ({"perplexity": {}, "tasks": {}}, [])
    for theirs in (logs, none):  # a runtime's, a checkpoint's
        assert compared(entry, tmp_path, recipe, material, reference, theirs) == {}


def test_an_export_is_measured_once_its_runtime_is_installed(recipe_file, monkeypatch, capsys):
    """Where it was missing, only the size was measured."""
    from finequant.evaluate import compare
    from finequant.evaluate.metrics import exports
    from finequant.quantize.formats import format

    recipe = load_recipe(recipe_file, ["quantize.exports=[gguf]"])
    run, calls = RunDir.of(recipe), []
    (run.exports / "gguf").mkdir(parents=True)
    monkeypatch.setattr(exports, "measure_export", lambda *_: {"calls": calls.append(1)})
    for installed in ({}, {"llama_cpp": ["torch"]}):
        monkeypatch.setattr(format, "packages_distributions", lambda now=installed: now)
        compare.measure_exports(recipe, run, None)
        compare.measure_exports(recipe, run, None)
    assert len(calls) == 2
    assert capsys.readouterr().err.count("gguf: measured before, unchanged") == 2


def test_a_missing_runtime_is_named_with_the_command_that_then_measures(
    recipe_file, monkeypatch, capsys
):
    """`finequant run` would say that nothing has changed."""
    from finequant.evaluate.metrics.exports import measure_export
    from finequant.quantize.formats import format

    recipe = load_recipe(recipe_file)
    monkeypatch.setattr(format, "find_spec", lambda module: None)
    measure_export("gguf", recipe, RunDir.of(recipe), None, None)
    then = "pip install llama-cpp-python, then `finequant evaluate RECIPE`"
    assert f"gguf: only its size is measured: {then}" in capsys.readouterr().err


@pytest.fixture
def arguments(recipe_file, executorch_run, train_once, name) -> list[str]:
    """The arguments for a run with the export: its recipe, and overrides."""
    from finequant.evaluate.compare import main as compare
    from finequant.quantize.convert import main as convert
    from finequant.quantize.export import main as export

    if name == "executorch":
        shutil.copytree(executorch_run / "run", recipe_file.parent / "run")
        return [str(recipe_file), *EXECUTORCH]
    arguments = [str(recipe_file), "train.max_steps=2", f"quantize.exports=[torchao,{name}]"]
    train_once(arguments)
    convert(arguments)
    assert f"only `finequant export RECIPE --to {name}`, first" in refused(compare, arguments)
    export(arguments)
    return arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "files"),
    [("compressed-tensors", "compressed-tensors", "*.safetensors"), ("executorch", "pte", "*.pte")],
)
def test_the_report_has_a_column_for_every_export(arguments, capsys, name, key, files):
    from finequant.evaluate.compare import main as compare

    compare(arguments)
    run = Path(arguments[0]).parent / "run"
    models = json.loads((run / "report.json").read_text())["models"]
    assert list(models) == ["base", "tuned", "quantized", key]
    for corpus in ("text", "held_out"):
        ours, reference = (models[name]["perplexity"][corpus] for name in (key, "quantized"))
        assert ours["token"] == pytest.approx(reference["token"], rel=0.01)
        assert ours["tokens"] == reference["tokens"]
    assert models[key]["tasks"]["held_out"]["exact_match"]["n"] == 8
    assert models[key]["speed"]["decoding"] > 0
    assert models[key]["parity"]["n"] == 8
    assert models[key]["parity"]["same_answers"] >= 0.5
    assert models[key]["parity"]["same_prompts"] == 1
    assert 0 < models[key]["parity"]["kl"] < 1e-3
    assert "same answers as quantized in %" in (run / "report.md").read_text()
    assert models[key]["speed"]["peak_memory_bytes"] > 1e8
    size = sum(file.stat().st_size for file in (run / "exports" / name).glob(files))
    assert models[key]["size_bytes"] == size
    assert "decoding, tokens/s" in (run / "report.md").read_text()
    compare(arguments)
    assert f"evaluate: {name}: measured before, unchanged" in capsys.readouterr().err
    compare([*arguments, "evaluate.exports=false"])
    models = json.loads((run / "report.json").read_text())["models"]
    assert models[key] == {
        "size_bytes": size,
        "bits_per_weight": models[key]["bits_per_weight"],
        "activations": {"compressed-tensors": "float", "executorch": "int8"}[name],
        "perplexity": {},
        "tasks": {},
    }
