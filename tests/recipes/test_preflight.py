"""What a later stage would refuse is refused before the first one starts, with its true cause."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_rows, refused, write_jsonl

from finequant.recipes import run
from finequant.recipes.commands import pipeline, preflight
from finequant.recipes.errors import UserError, refuse_all
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir


@pytest.fixture
def refused_run(recipe_file, monkeypatch):
    """Returns the message of `finequant run` on a recipe that it refuses before the first stage."""

    def start(step: list[str], *_) -> None:
        raise AssertionError(f"{step} was started")

    monkeypatch.setattr(pipeline, "_start", start)

    def message(*overrides: str) -> str:
        text = refused(run.main, ["run", str(recipe_file), *overrides])
        left = {path.name for path in (recipe_file.parent / "run").glob("*")}
        assert left <= {"data"}  # the rows, for the next attempt
        return text.partition("error: ")[2]

    return message


@pytest.fixture
def prose(tmp_path) -> str:
    """An override with held-out answers that are not JSON."""
    rows = [{"prompt": row["prompt"], "completion": row["prompt"]} for row in make_rows(range(3))]
    write_jsonl(tmp_path / "prose.jsonl", [*rows, {"prompt": "a", "completion": "NaN"}])
    return "data.test=prose.jsonl"


NO_TEXT = ["data.test=[]", "evaluate.perplexity=[]"]
IN_SECONDS = {
    "nothing to measure": (NO_TEXT, "evaluate: nothing to measure on; set data.test"),
    "a gate on accuracy without any": (
        ["data.test=[]", "evaluate.gate.max_accuracy_drop=0.1"],
        "evaluate.gate.max_accuracy_drop: no accuracy is measured",
    ),
    "a gate on perplexity without any": (
        [*NO_TEXT, "evaluate.tasks=[arc_easy]", "evaluate.gate.max_perplexity_increase=0.1"],
        "evaluate.gate.max_perplexity_increase: no perplexity is measured",
    ),
    "a gate on exports without any": (
        ["evaluate.gate.min_same_answers=0.9", "quantize.exports=[torchao]"],
        "evaluate.gate.min_same_answers: no answers of exports are measured",
    ),
    "metrics without answers": (
        ["data.test=[]", "evaluate.metrics=[f1]"],
        "evaluate.metrics: f1: no held-out row has an answer: set data.test",
    ),
    "choices": (
        ["evaluate.metrics=[multiple_choice]", "evaluate.choices=[red, blue]"],
        "evaluate.choices: in 8 held-out rows, the answer is none of 'red', 'blue': add it",
    ),
    "an empty choice": (
        ["evaluate.metrics=[multiple_choice]", "evaluate.choices=[red, '']"],
        "evaluate.choices: an empty choice has no likelihood",
    ),
    "a column": (
        ["evaluate.perplexity=[{name: c, source: test.jsonl, column: txt}]"],
        "perplexity corpus c: test.jsonl:1: no text in column 'txt': it has prompt, completion",
    ),
    "a task twice": (["evaluate.tasks=[arc_easy, arc_easy]"], "each task once; repeated: arc_easy"),
    "an output below a file": (["output_dir=/dev/null/run"], "cannot be written (Not a directory)"),
    "an output that nobody can make": (["output_dir=/proc/run"], "/proc/run: cannot be written ("),
    "a license": (["publish.repo_id=a/b"], "does not state its license: give the license of"),
    "a repository": (
        ["publish.repo_id=a/b--c", "publish.license=mit"],
        "publish.repo_id: ",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), IN_SECONDS.values(), ids=IN_SECONDS)
def test_cheap_checks_refuse_in_seconds(refused_run, monkeypatch, overrides, message):
    monkeypatch.setattr(preflight, "check_tokens", None)  # not reached
    assert message in refused_run(*overrides)


def test_a_gate_on_an_export_that_cannot_run_here_is_refused(refused_run, monkeypatch):
    """It would fail after everything else is done."""
    from finequant.quantize.formats.format import Format

    monkeypatch.setattr(Format, "missing_runtime", lambda _: "pip install llama-cpp-python")
    message = refused_run("evaluate.gate.min_same_answers=0.9", "quantize.exports=[gguf]")
    assert "min_same_answers: gguf cannot run here: pip install llama-cpp-python, or" in message


def test_an_unknown_task_is_refused_after_cheaper_checks(refused_run, monkeypatch):
    """lm-eval's index of tasks takes seconds to read, minutes from a slow disk."""
    from finequant.evaluate.metrics import tasks

    read = []

    def index(folder):
        read.append(folder)
        return SimpleNamespace(task_index={"arc_easy": None})

    monkeypatch.setattr(tasks, "_task_manager", index)
    unknown = "evaluate.tasks=[arc_esy]"
    assert "no task 'arc_esy'" not in refused_run(unknown, *NO_TEXT, "publish.repo_id=a/b")
    assert "nothing is left to learn" in refused_run(unknown, "data.max_length=3")
    assert read == []
    assert "lm-eval has no task 'arc_esy'; did you mean arc_easy?" in refused_run(unknown)
    assert len(read) == 1
    several = refused_run("evaluate.tasks=arc_easy,hellaswag")
    assert "no task 'arc_easy,hellaswag'; write a list in brackets: [arc_easy," in several


def test_short_rows_run_where_rows_of_the_maximum_length_would_not_fit(recipe_file, monkeypatch):
    from finequant.finetune.model import load_config
    from finequant.quantize.size import machine as machines
    from finequant.quantize.size.estimate import memory_of
    from finequant.quantize.size.resources import refuse_what_cannot_finish

    overrides = ["train.micro_batch_size=8", "data.max_length=100000"]
    recipe, started = load_recipe(recipe_file, overrides), []
    small = machines.Machine("a small machine", 0, "cpu")
    needed = sum(memory_of("train", recipe, load_config(recipe.model), small).values())
    small = small._replace(memory=needed - 1)
    monkeypatch.setattr(machines, "this_machine", lambda: small)
    monkeypatch.setattr(pipeline, "_start", lambda step, *_: started.extend(step) or 0)
    monkeypatch.setattr(pipeline, "_show_report", lambda _: True)
    with pytest.raises(SystemExit) as exit_:
        run.main(["run", str(recipe_file), *overrides])
    assert (exit_.value.code, started[0]) == (0, "train")
    with pytest.raises(UserError, match="a small machine has"):
        refuse_what_cannot_finish(recipe, RunDir.of(recipe), ["train"], small)


def test_answers_that_are_not_json_are_listed_with_all_other_problems(refused_run, prose, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine\ndoc_to_text: [a\nx: y\n")
    (tmp_path / "tasks" / "words.yaml").write_text("only words")
    (tmp_path / "tasks" / "good.yaml").write_text("task: good\nf: !function utils.f\n")
    said = refused_run(
        prose,
        "data.overlap=drop",
        "evaluate.metrics=[json_match]",
        "evaluate.task_folder=tasks",
        "output_dir=/dev/null/run",
    )
    assert "json_match needs JSON, but the answer is not JSON in 4 held-out rows: " in said
    assert 'prose.jsonl:1: "open the red door' in said
    assert "prose.jsonl:4: 'NaN'" in said
    assert "mine.yaml:3: not valid YAML: expected ',' or ']'" in said
    assert "words.yaml: expected a mapping with the key `task`" in said
    assert "good.yaml" not in said
    assert "cannot be written" in said


def test_a_misspelled_column_is_reported_without_torch(recipe_file):
    """Torch takes seconds to import, and a tokenizer more to read."""
    code = (
        "import sys\nfrom finequant.recipes.run import main\n"
        "try: main()\nfinally: assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    column = "evaluate.perplexity=[{name: c, source: test.jsonl, column: txt}]"
    command = [sys.executable, "-c", code, "run", str(recipe_file), column]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "no text in column 'txt'" in done.stderr) == (2, True), done.stderr


WITH_A_TOKENIZER = {
    "six bits": (
        ["quantize.bits=6", "quantize.exports=[compressed-tensors, gguf]"],
        "compressed-tensors: layers of 6 bits; expected 4 or 8",
    ),
    "a budget": (
        ["quantize.budget=5", "quantize.exports=[compressed-tensors]"],
        "compressed-tensors: a budget chooses from 2 to 8 bits; expected 4 or 8",
    ),
    "a layer of eight bits": (
        ["quantize.layers={'*.v_proj': {bits: 8}}", "quantize.exports=[executorch]"],
        "executorch: linear layers of 8 bits; XNNPACK's kernels for groups take 4",
    ),
    "a cache": (
        ["quantize.cache_length=300", "quantize.exports=[executorch]"],
        "quantize.cache_length: 300 tokens are too few to measure the executorch export: the "
        "longest window, or prompt and answer, takes 320: set quantize.cache_length=320",
    ),
    "rotary tables": (
        ["quantize.cache_length=300", "quantize.exports=[onnx, executorch, gguf]"],
        "quantize.cache_length: 300 tokens are too few to measure the onnx export: the longest "
        "window, or prompt and answer, takes 320: set quantize.cache_length=320, set "
        "evaluate.exports=false, or remove onnx, executorch from quantize.exports",
    ),
    "an answer beyond the positions": (
        ["evaluate.max_new_tokens=500"],
        "8 held-out prompts too long for the 512 positions of the base with an answer of up to "
        "evaluate.max_new_tokens=500: set evaluate.max_new_tokens=4",
    ),
    "rows without an answer": (
        ["data.max_length=3"],
        "nothing is left to learn in 48 rows: within data.max_length=3 tokens there is no answer; "
        "raise data.max_length\n",  # the only hint: dropping them would leave no rows
    ),
    "the head": (
        ["lora.target_modules=[q_proj, lm_head]"],
        "lora.target_modules: lm_head, the head, takes no LoRA here",
    ),
    "a layer that is not there": (["lora.target_modules=[q_prj]"], "no linear layer q_prj"),
    "a rank": (
        ["lora.init_lora_weights=olora", "lora.rank=64"],
        "lora.rank: 64 is too large for lora.init_lora_weights=olora",
    ),
    "calibration rows": (
        ["quantize={method: gptq, calibration: {data: {source: a.csv, columns: {text: page}}}}"],
        "a.csv:2: no column page; the columns are text",
    ),
    "calibration beyond the positions": (
        ["quantize={method: gptq, calibration: {length: 513}}"],
        "quantize.calibration.length: 513 tokens are more than the 512 positions of ",
    ),
    "a layer plan": (["quantize.group_size=64"], "does not divide the input features of mlp.down"),
    "training of layers in float": (
        [
            "lora.target_modules=[q_proj]",
            "quantize={layers: {'*.q_proj': float}, training: {steps: 2}}",
        ],
        "quantize.training: no layer that is quantized is among lora.target_modules (['q_proj'])",
    ),
    "training of the head alone": (
        ["quantize={layers: {'model.*': float}, training: {steps: 2}}"],
        "quantize.training: no layer that is quantized is among lora.target_modules (all-linear)",
    ),
    "stopping by rows that are dropped": (
        [
            "data={train: train.jsonl, validation: test.jsonl, test: test.jsonl, overlap: drop, "
            "validation_fraction: 0}",
            "train.early_stopping_patience=1",
        ],
        "train.early_stopping_patience: no validation rows are left to measure the loss on",
    ),
    "stopping by rows of no weight": (
        [
            "data.validation={source: validation.jsonl, weight: 0.01}",
            "data.validation_fraction=0.0",
            "train.early_stopping_patience=1",
        ],
        "validation.jsonl: 8 rows, format prompt_completion, weight 0.01",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), WITH_A_TOKENIZER.values(), ids=WITH_A_TOKENIZER)
def test_later_stages_refusals_come_before_the_first_stage(
    refused_run, tmp_path, overrides, message
):
    (tmp_path / "a.csv").write_text("text\nopen the door\n")
    assert message in refused_run(*overrides)


def test_held_out_answers_that_are_all_cut_off_are_refused(refused_run, tmp_path):
    """Nothing was scored, which `evaluate` noticed once everything else was done."""
    rows = [{"prompt": row["prompt"] * 20, "completion": "{}"} for row in make_rows(range(90, 92))]
    write_jsonl(tmp_path / "long.jsonl", rows)
    said = refused_run("data.test=long.jsonl", "evaluate.perplexity=[]")
    assert "no held-out row has an answer within data.max_length=128 tokens" in said


def test_a_prompt_beyond_the_positions_names_its_row(refused_run, tmp_path):
    row = {"prompt": "open the red door " * 200, "completion": "{}"}
    write_jsonl(tmp_path / "long.jsonl", [*make_rows(range(90, 92)), row])
    said = refused_run("data.test=long.jsonl")
    assert "1 held-out prompt too long" in said
    assert "remove rows with longer prompts from data.test" in said
    assert "long.jsonl:3: " in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_beyond_the_positions_is_named_or_cut(refused_run, recipe_file, split):
    """It was trained on and measured, at positions that the base never saw."""
    write_jsonl(recipe_file.parent / "long.jsonl", [{"text": "open the red door " * 200}])
    overrides = [f"data.{split}=long.jsonl", "data.overlap=drop", "evaluate.metrics=[]"]
    said = refused_run(*overrides, "data.max_length=1024")
    assert " than the 512 positions of the base" in said
    assert "set data.max_length=512" in said
    if split == "train":
        assert said.startswith("data.train: 1 row longer than the 512 positions of the base")
        assert "long.jsonl:1: " in said
    recipe = load_recipe(recipe_file, [*overrides, "data.max_length=512"])
    lengths = preflight.preflight(recipe, RunDir.of(recipe))
    assert max(*lengths.training, lengths.scored) in (511, 512)


def test_a_good_recipe_passes_and_its_lengths_are_known(recipe_file, capsys):
    recipe = load_recipe(recipe_file, ["quantize.exports=[compressed-tensors, gguf, executorch]"])
    lengths = preflight.preflight(recipe, RunDir.of(recipe))
    assert len(lengths.training) == 48
    assert 20 < max(lengths.training) < 100
    assert 10 < lengths.prompt < max(lengths.training)
    assert lengths.scored == 64  # the windows of the corpus
    run.validate(recipe_file, deep=True)
    assert " is a valid recipe: tiny" in capsys.readouterr().out
    assert [path.name for path in Path(recipe.output_dir).iterdir()] == ["data"]


def test_a_short_cache_is_no_problem_if_exports_are_only_sized(recipe_file):
    short = ["quantize.cache_length=300", "quantize.exports=[onnx]", "evaluate.exports=false"]
    recipe = load_recipe(recipe_file, short)
    assert preflight.preflight(recipe, RunDir.of(recipe)).scored == 64


def test_keys_without_an_effect_are_named(recipe_file, capsys):
    (recipe_file.parent / "tasks").mkdir()
    keys = ["evaluate.choices=[a]", "evaluate.task_folder=tasks"]
    keys += ["quantize.calibration={steps: 2, data: validation.jsonl}", "data.overlap=drop"]
    keys += ["evaluate.perplexity.0.max_length=600"]
    recipe = load_recipe(recipe_file, keys)
    preflight.preflight(recipe, RunDir.of(recipe))
    said = capsys.readouterr().err
    assert "text: windows of 512 tokens, all that the base attends to, instead of 600" in said
    assert "evaluate.choices has no effect without multiple_choice in evaluate.metrics" in said
    assert "evaluate.task_folder has no effect without names of tasks in evaluate.tasks" in said
    for key in ("steps", "data"):
        assert f"quantize.calibration.{key} has no effect with quantize.method=rtn" in said
    read = ["quantize.method=gptq", "evaluate.choices=null", "evaluate.task_folder=null"]
    recipe = load_recipe(recipe_file, [*keys, *read])
    preflight.preflight(recipe, RunDir.of(recipe))
    assert "has no effect" not in capsys.readouterr().err


def test_every_problem_is_listed_once():
    def fails(message: str):
        def check() -> None:
            raise UserError(message)

        return check

    assert refuse_all([lambda: 1, lambda: 2]) == [1, 2]
    with pytest.raises(UserError, match="^first\nsecond$"):
        refuse_all([fails("first"), lambda: 1, fails("second"), fails("first")])
