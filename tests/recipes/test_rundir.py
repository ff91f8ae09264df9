"""The run directory: what is done, what is stale and why; and writing never loses anything."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finequant.recipes import rundir
from finequant.recipes.artifact import replace_text
from finequant.recipes.command_line import open_run
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import content_hash
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe

STAGES = ("train", "quantize", "evaluate")

RECIPE = """\
name: tiny
output_dir: run
model: {base: base, chat_template: chat.jinja}
data:
  train: [rows.jsonl, {source: acme/rows, weight: 0.5}]
  test: test.jsonl
lora: {rank: 4}
quantize: {effort: fast}
evaluate:
  task_folder: tasks
  perplexity: [{name: text, source: text.txt}]
"""
FILES = {
    "base/config.json": "{}",
    "base/model.safetensors": "weights",
    "chat.jinja": "{{ messages }}",
    "rows.jsonl": "{}\n",
    "test.jsonl": "{}\n",
    "tasks/own.yaml": "task: own",
    "text.txt": "words",
    "recipe.yaml": RECIPE,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A recipe and all that it names, in the current folder, where its run directory will be."""
    home = tmp_path / "home"
    for name, content in FILES.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    monkeypatch.chdir(home)
    return home


def load(folder: Path, *overrides: str) -> tuple[Recipe, RunDir]:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    return recipe, RunDir.of(recipe)


def finish(recipe: Recipe, run: RunDir, *stages: str) -> None:
    """Does what a stage does to the run directory, with artifacts of one file."""
    for stage in stages or STAGES:
        inputs = run.inputs(recipe, stage)
        for path in run.outputs(stage):
            if path.suffix:
                path.write_text(f"of {stage}", encoding="utf-8")
            else:
                with run.writing(path, recipe) as partial:
                    (partial / "weights").write_text(f"of {stage}", encoding="utf-8")
        run.record(recipe, stage, inputs, seconds=1.0)


def changes(folder: Path, *overrides: str) -> dict[str, list[str] | None]:
    recipe, run = load(folder, *overrides)
    return {stage: run.what_changed(recipe, stage) for stage in STAGES}


# Hashes of content


def test_content_hash_of_folders(tmp_path):
    def fill(name: str, **files: str) -> str:
        (tmp_path / name / "inside").mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name / "inside" / file).write_text(content, encoding="utf-8")
        return content_hash(tmp_path / name)

    first = fill("first", a="1", b="2")
    assert fill("second", b="2", a="1") == first
    others = [
        fill("content", a="1", b="3"),
        fill("names", a="1", c="2"),
        fill("swapped", a="2", b="1"),
        fill("fewer", a="1"),
        fill("more", a="1", b="2", c=""),
    ]
    assert len({first, *others}) == 6
    (tmp_path / "first" / "inside").rename(tmp_path / "first" / "elsewhere")
    assert content_hash(tmp_path / "first") != first


def test_content_hash_sees_no_time_and_no_training_log(tmp_path):
    file = tmp_path / "weights"
    file.write_text("1", encoding="utf-8")
    before = content_hash(file), content_hash(tmp_path)
    os.utime(file, (0, 0))
    (tmp_path / "training_log.json").write_text("[]", encoding="utf-8")
    assert (content_hash(file), content_hash(tmp_path)) == before


# What is done and what is stale


def test_stages_are_new_then_up_to_date(folder):
    assert changes(folder) == dict.fromkeys(STAGES)
    finish(*load(folder))
    assert changes(folder) == {stage: [] for stage in STAGES}


# (override, stage -> what it says; the others are up to date)
OVERRIDES = [
    ("lora.rank=8", {"train": ["lora.rank: 4 -> 8"]}),
    ("train.learning_rate=1e-3", {"train": ["train.learning_rate: 0.0002 -> 0.001"]}),
    ("quantize.group_size=64", {"quantize": ["quantize.group_size: 32 -> 64"]}),
    ("quantize.rotate=true", {"quantize": ["quantize.rotate: false -> true"]}),
    ("quantize.head=float", {"quantize": ["quantize.head: quantize -> float"]}),
    ("evaluate.samples=1", {"evaluate": ["evaluate.samples: 5 -> 1"]}),
    ("evaluate.gate.max_accuracy_drop=0.1", {
        "evaluate": ["evaluate.gate.max_accuracy_drop: null -> 0.1"]
    }),
    ("seed=3", {"train": ["seed: 0 -> 3"], "evaluate": ["seed: 0 -> 3"]}),
    ("data.max_length=64", {
        "train": ["data.max_length: 1024 -> 64"],
        "evaluate": ["data.max_length: 1024 -> 64"],
    }),
    ("data.train.1.weight=2.0", {
        "train": ["data.train.1.weight: 0.5 -> 2.0"],
        "evaluate": ["data.train.1.weight: 0.5 -> 2.0"],
    }),
    ("quantize.dtype=bfloat16", {
        "quantize": ["quantize.dtype: auto -> bfloat16"],
        "evaluate": ["quantize.dtype: auto -> bfloat16"],
    }),
    ("name=other", {}),
    ("publish.private=false", {}),
]  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[key for key, _ in OVERRIDES])
def test_a_changed_key_is_named_by_the_stages_it_affects(folder, override, expected):
    finish(*load(folder))
    assert changes(folder, override) == {stage: expected.get(stage, []) for stage in STAGES}
    assert changes(folder) == {stage: [] for stage in STAGES}


CHANGED_FILES = {
    "rows.jsonl": ("data.train.0.source", {"train", "evaluate"}),
    "test.jsonl": ("data.test.0.source", {"train", "evaluate"}),
    "text.txt": ("evaluate.perplexity.0.source", {"evaluate"}),
    "tasks/own.yaml": ("evaluate.task_folder", {"evaluate"}),
    "chat.jinja": ("model.chat_template", set(STAGES)),
    "base/model.safetensors": ("model.base", set(STAGES)),
}


@pytest.mark.parametrize("name", CHANGED_FILES)
def test_a_changed_file_is_named_by_the_stages_it_affects(folder, name):
    finish(*load(folder))
    (folder / name).write_text("other", encoding="utf-8")
    key, stages = CHANGED_FILES[name]
    named = folder / Path(name).parent if "/" in name else folder / name
    for stage, said in changes(folder).items():
        assert said == ([f"{key}: the content of {named} changed"] if stage in stages else [])


@pytest.mark.parametrize(
    "data",
    [
        "dataset_path: json\ndataset_kwargs: {data_files: {test: rows/test.jsonl}}",
        "dataset_path: json\ndataset_kwargs: {data_files: [HERE/rows/t*.jsonl]}",
        "dataset_path: csv\ndataset_kwargs: {data_dir: rows}\ndoc_to_text: !function own.text",
        "dataset_path: HERE/rows",
        "dataset_path: rows",
    ],
)
def test_data_of_a_task_are_an_input_wherever_they_are(folder, data):
    rows = folder / "rows" / "test.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}", encoding="utf-8")
    task = f"task: own\n{data}\n".replace("HERE", str(folder))
    (folder / "tasks" / "own.yaml").write_text(task, encoding="utf-8")
    (folder / "tasks" / "broken.yaml").write_text("task: [", encoding="utf-8")
    finish(*load(folder))
    assert changes(folder)["evaluate"] == []
    rows.write_text('{"a": 1}', encoding="utf-8")
    named = f"evaluate.task_folder: the content of {folder / 'tasks'} changed"
    assert changes(folder) == {"train": [], "quantize": [], "evaluate": [named]}


ROWS = "dataset_path: json\ndataset_kwargs: {data_files: rows/test.jsonl}\n"
INLINE_ROWS = "dataset_path: json, dataset_kwargs: {data_files: rows/test.jsonl}"


@pytest.mark.parametrize(
    ("shared", "own", "changed"),
    [
        (f"{ROWS}metric_list: []", "include: ../shared/_template", "shared/_template"),
        (ROWS, "include: [../shared/_template]", "rows/test.jsonl"),
        ("", f"group: all\ntask: [{{task: one, {INLINE_ROWS}}}]", "rows/test.jsonl"),
    ],
)
def test_what_a_task_includes_or_a_group_defines_is_an_input(folder, shared, own, changed):
    """By convention, the files that lm-eval's tasks include have no suffix."""
    files = {"shared/_template": shared, "tasks/own.yaml": own, "rows/test.jsonl": "{}"}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    finish(*load(folder))
    assert changes(folder)["evaluate"] == []
    (folder / changed).write_text('{"a": 1}', encoding="utf-8")
    assert len(changes(folder)["evaluate"]) == 1


@pytest.mark.parametrize(
    "name", ["base/LICENSE.txt", "base/.DS_Store", "base/.git/HEAD", "tasks/README.md"]
)
def test_what_no_stage_reads_is_no_change(folder, name):
    finish(*load(folder))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("new", encoding="utf-8")
    assert changes(folder) == {stage: [] for stage in STAGES}


def test_of_a_folder_of_rows_only_its_own_tables_count(folder):
    """It may also hold the recipe and its runs."""
    rows, keys = folder / "many", ["data.train=[many]", "data.test=[]", "data.test_fraction=0.1"]
    (rows / "run").mkdir(parents=True)
    (rows / "a.jsonl").write_text("{}\n", encoding="utf-8")
    finish(*load(folder, *keys))
    for name in ("run/predictions.jsonl", "recipe.yaml"):
        (rows / name).write_text("{}\n", encoding="utf-8")
    assert changes(folder, *keys) == {stage: [] for stage in STAGES}
    (rows / "b.jsonl").write_text("{}\n", encoding="utf-8")
    (changed,) = changes(folder, *keys)["train"]
    assert changed.startswith("data.train.0.source: the content of ")


def test_a_new_base_and_another_export_are_named_in_words(folder):
    recipe, run = load(folder, "quantize.exports=[gguf]")
    finish(recipe, run, "train", "quantize", "gguf", "evaluate")
    assert changes(folder)["evaluate"] == ["exports/gguf/ is no longer used"]
    (said,) = changes(folder, "model.base=org/name", "quantize.exports=[gguf]")["quantize"]
    assert said == "model.base: a file or folder -> org/name@main"


def test_a_new_source_is_a_change(folder):
    finish(*load(folder))
    said = changes(folder, "data.validation=test.jsonl")["train"]
    assert "data.validation: [] -> absent" in said
    assert any(line.startswith("data.validation.0.source: absent -> sha256:") for line in said)
    assert any(line.endswith(f" ({folder / 'test.jsonl'})") for line in said)


def test_a_key_new_in_an_upgrade_is_a_change_only_where_it_is_set(folder):
    recipe, run = load(folder)
    finish(recipe, run)
    manifest = run.manifest()
    for key in ("lora.use_rslora", "train.max_grad_norm"):
        del manifest["train"]["inputs"][key]
    run.manifest_file.write_text(json.dumps(manifest), encoding="utf-8")
    assert changes(folder)["train"] == []
    assert changes(folder, "train.max_grad_norm=0.5")["train"] == [
        "train.max_grad_norm: absent -> 0.5"
    ]


def test_an_artifact_edited_by_hand_is_noticed_downstream(folder):
    finish(*load(folder))
    (folder / "run/quantized/weights").write_text("mine", encoding="utf-8")
    assert changes(folder) == {
        "train": [],
        "quantize": ["quantized: changed since quantize wrote it (weights: altered)"],
        "evaluate": ["the content of quantized/ changed"],
    }


def test_another_adapter_reaches_quantize_and_evaluate(folder):
    recipe, run = load(folder)
    finish(recipe, run)
    with run.writing(run.adapter, recipe) as partial:
        (partial / "weights").write_text("trained again", encoding="utf-8")
    run.record(recipe, "train", run.inputs(recipe, "train"), seconds=1.0)
    stale = ["the content of adapter/ changed"]
    assert changes(folder) == {"train": [], "quantize": stale, "evaluate": stale}


@pytest.mark.parametrize("key", ["data.train.0=moved/rows.jsonl", "train.logging_steps=3"])
def test_the_same_adapter_made_again_from_a_recipe_that_differs_elsewhere_is_no_change(folder, key):
    finish(*load(folder))
    (folder / "moved").mkdir()
    (folder / "moved" / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    finish(*load(folder, key), "train")
    assert changes(folder, key) == {stage: [] for stage in STAGES}


def test_stages_called_by_hand_refuse_what_was_made_from_an_earlier_artifact(folder):
    recipe, run = load(folder, "quantize.exports=[gguf]")
    finish(recipe, run, "train", "quantize", "gguf", "evaluate")
    for stage in ("quantize", "gguf", "evaluate"):
        run.require_for(stage, recipe)
    with run.writing(run.adapter, recipe) as partial:
        (partial / "weights").write_text("trained again", encoding="utf-8")
    run.record(recipe, "train", run.inputs(recipe, "train"), seconds=1.0)
    run.require_for("quantize", recipe)
    for stage in ("gguf", "evaluate"):
        with pytest.raises(UserError) as caught:
            run.require_for(stage, recipe)
        assert str(caught.value) == (  # no values of the recipe would help
            "run/quantized: not made from the present inputs: the content of adapter/ changed: "
            "run `finequant quantize RECIPE` again"
        )
    finish(recipe, run, "quantize")
    run.require_for("gguf", recipe)
    with run.writing(run.quantized, recipe) as partial:
        (partial / "weights").write_text("other codes", encoding="utf-8")
    run.record(recipe, "quantize", run.inputs(recipe, "quantize"), seconds=1.0)
    with pytest.raises(UserError, match="run `finequant export RECIPE --to gguf` again"):
        run.require_for("evaluate", recipe)
    moved = load(folder, "quantize.exports=[gguf]", "model.base=org/name")[0]
    values = r"again, or use the values in run/adapter/recipe.yaml$"
    with pytest.raises(UserError, match=values):
        run.require_for("quantize", moved)
    run.require("train", moved, any_base=True)
    shutil.rmtree(run.adapter)  # an export needs quantized/ only
    run.require_for("gguf", recipe)


def test_other_settings_are_named_and_used(folder, capsys):
    finish(*load(folder))
    recipe, run = load(folder, "quantize.bits=8")
    run.require_for("evaluate", recipe)
    assert capsys.readouterr().err == (
        "run/quantized: made with other settings: quantize.bits: 4 -> 8\n"
    )


def test_a_tilde_in_output_dir_is_the_home(folder, monkeypatch):
    """A shell expands it only at the start of a word, so not after `output_dir=`."""
    monkeypatch.setenv("HOME", str(folder))
    assert load(folder, "output_dir=~/here")[1].root == folder / "here"
    with pytest.raises(UserError, match="output_dir: no such user: .*whole path .value '~no-body"):
        load(folder, "output_dir=~no-body/here")


@pytest.mark.parametrize(("stage", "name"), [("train", "adapter"), ("evaluate", "report.md")])
def test_a_deleted_output_is_made_again(folder, stage, name):
    finish(*load(folder))
    path = folder / "run" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert changes(folder)[stage] is None


def test_a_copy_in_another_folder_has_equal_inputs(folder, tmp_path, monkeypatch):
    finish(*load(folder))
    copy = tmp_path / "another" / "machine"
    shutil.copytree(folder, copy)
    here, there = load(folder), load(copy)
    for stage in STAGES:
        inputs = here[1].inputs(here[0], stage)
        assert inputs == there[1].inputs(there[0], stage)
        assert str(folder) not in json.dumps(inputs)
    monkeypatch.chdir(copy)
    assert changes(copy) == {stage: [] for stage in STAGES}


def test_a_stage_needs_what_the_one_before_made(folder):
    recipe, run = load(folder)
    with pytest.raises(
        UserError, match=r"run.adapter does not exist: run .*only `finequant train REC"
    ):
        run.require("train", recipe)
    finish(recipe, run, "train")
    run.require("train", recipe)


def test_the_default_run_directory_is_runs_name(folder):
    recipe, _ = load(folder, "output_dir=null")
    assert RunDir.of(recipe).root == Path("runs/tiny")


# Writing


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_artifact(folder, error):
    recipe, run = load(folder)
    finish(recipe, run)
    with pytest.raises(error), run.writing(run.adapter, recipe) as partial:
        (partial / "weights").write_text("half", encoding="utf-8")
        raise error
    assert (run.adapter / "weights").read_text(encoding="utf-8") == "of train"
    assert not (run.root / "previous").exists()
    assert changes(folder) == {stage: [] for stage in STAGES}
    with run.writing(run.adapter, recipe) as partial:
        assert list(partial.iterdir()) == []


def test_earlier_adapters_are_kept_and_other_artifacts_replaced(folder, capsys):
    recipe, run = load(folder)
    previous = run.root / "previous"

    def write(target: Path, content: str) -> None:
        with run.writing(target, recipe) as partial:
            (partial / "weights").write_text(content, encoding="utf-8")

    for content in ("one", "two", "three"):
        write(run.adapter, content)
        write(run.quantized, content)
    assert "kept the earlier adapter as run/previous/adapter-1" in capsys.readouterr().err
    kept = {path.name: (path / "weights").read_text("utf-8") for path in previous.iterdir()}
    assert kept == {"adapter-1": "one", "adapter-2": "two"}
    for artifact in (run.adapter, run.quantized):
        assert (artifact / "weights").read_text(encoding="utf-8") == "three"
    shutil.rmtree(previous / "adapter-1")
    write(run.adapter, "four")
    kept = {(path / "weights").read_text(encoding="utf-8") for path in previous.iterdir()}
    assert kept == {"two", "three"}
    assert not list(run.root.glob("*.partial"))


def test_the_recipe_beside_each_artifact_is_the_recipe(folder, monkeypatch):
    recipe, run = load(folder, "train.learning_rate=1e-3", "data.system='a\nb: {c}'")
    finish(recipe, run)
    expected = recipe.model_copy(update={"output_dir": None})
    monkeypatch.chdir("/")
    for place in ("run", "run/adapter", "run/quantized"):
        assert load_recipe(folder / place / "recipe.yaml") == expected


# The manifest


def test_the_manifest_records_inputs_outputs_and_cost(folder):
    recipe, run = load(folder, "seed=5")
    finish(recipe, run, "train")
    entry = json.loads((folder / "run/manifest.json").read_text(encoding="utf-8"))["train"]
    assert entry["inputs"] == run.inputs(recipe, "train")
    assert entry["outputs"] == {"adapter": content_hash(run.adapter)}
    assert entry["seed"] == 5
    assert entry["seconds"] == 1.0
    assert entry["peak_memory_bytes"] > 2**20
    assert entry["versions"].keys() >= {"python", "torch", "transformers", "peft", "torchao"}


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"train": 1}', '{"train": {}}'])
def test_a_damaged_manifest_is_named_with_the_next_step(folder, content):
    recipe, run = load(folder)
    finish(recipe, run)
    run.manifest_file.write_text(content, encoding="utf-8")
    for use in (run.manifest, lambda: run.what_changed(recipe, "train")):
        with pytest.raises(UserError) as caught:
            use()
        message = str(caught.value)
        assert message.startswith("run/manifest.json: damaged")
        assert message.endswith("delete it to rerun every stage of this run")


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(folder, monkeypatch):
    recipe, run = load(folder)
    finish(recipe, run, "train")
    before = run.manifest()

    def full_disk(self: Path, *arguments: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        run.record(recipe, "train", {}, seconds=2.0)
    assert run.manifest() == before


def test_a_half_written_text_is_removed(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "manifest.json", "half\ud800")
    assert not list(tmp_path.iterdir())


def test_a_record_cut_off_by_a_kill_is_not_kept_as_checkpoints(folder, capsys):
    recipe, run = load(folder)
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "inputs.json.partial").write_text('{"inp', encoding="utf-8")
    run.continuing(run.checkpoints, "train", run.inputs(recipe, "train"))
    assert [path.name for path in run.checkpoints.iterdir()] == ["inputs.json"]
    assert not (run.root / "previous").exists()
    assert capsys.readouterr().err == ""


def test_peak_memory_is_not_that_of_the_parent_process():
    child = "from finequant.recipes.usage import peak_memory; print(peak_memory())"
    parent = f"""
import subprocess, sys
large = bytes(range(256)) * (2 << 20)
sys.exit(subprocess.run([sys.executable, "-c", {child!r}]).returncode)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    )
    assert 10**7 < int(done.stdout) < 256 * (2 << 20)


def test_peak_memory_is_known_where_the_kernel_does_not_count_it(tmp_path, monkeypatch):
    """As in a container of gVisor, which writes the file without this line."""
    from finequant.recipes import usage

    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmSize:\t2048 kB\nVmRSS:\t1024 kB\n")
    monkeypatch.setattr(usage, "LINUX_STATUS", status)
    assert usage.peak_memory() > 10**7


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps little")
def test_freed_memory_that_the_c_library_keeps_can_be_returned():
    """What is allocated last pins the memory below it."""
    code = """
import psutil
from finequant.recipes.usage import return_freed_memory

def resident():
    return psutil.Process().memory_info().rss

start = resident()
blocks = [b"x" * 4000 + bytes([number % 256]) for number in range(50_000)]
last = bytes(4001)
blocks.clear()
kept = resident() - start
return_freed_memory()
print(kept, resident() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 150 * 10**6
    assert left < 50 * 10**6


def test_a_report_is_out_of_date_once_the_measuring_code_gives_other_figures(folder, monkeypatch):
    recipe, run = load(folder)
    finish(recipe, run)
    code = rundir.MEASURING_CODE
    monkeypatch.setattr(rundir, "MEASURING_CODE", code + 1)
    why = "finequant has changed how it measures (measuring_code {} -> {})"
    again = {"train": [], "quantize": [], "evaluate": [why.format(code, code + 1)]}
    assert changes(folder) == again
    manifest = run.manifest()
    del manifest["evaluate"]["inputs"]["measuring_code"]  # as before there was a number
    run.manifest_file.write_text(json.dumps(manifest), encoding="utf-8")
    assert changes(folder)["evaluate"] == [why.format("absent", code + 1)]


@pytest.mark.parametrize(
    "name",
    ["measurements/base", "measurements/tuned", "measurements/quantized", "measurements/gguf"]
    + ["sweep/base", "sweep/tuned"],
)
def test_no_measurement_of_earlier_measuring_code_is_used_again(folder, monkeypatch, name):
    recipe, run = load(folder)
    for artifact in ("adapter", "quantized", "exports/gguf"):
        (run.root / artifact).mkdir(parents=True)
    run.memo(recipe, name).keep({"perplexity": 2.5})
    assert run.memo(recipe, name).value() == {"perplexity": 2.5}
    monkeypatch.setattr(rundir, "MEASURING_CODE", rundir.MEASURING_CODE + 1)
    assert run.memo(recipe, name).value() is None


def test_settings_of_memory_and_logging_do_not_change_the_adapter(folder):
    recipe, run = load(folder)
    finish(recipe, run, "train")
    shown = ["train.logging_steps=1", "train.report_to=[tensorboard]", "train.save_total_limit=9"]
    memory = ["train.micro_batch_size=1", "train.gradient_checkpointing=true"]
    assert run.what_changed(load(folder, *memory, *shown)[0], "train") == []
    for other in ("train.batch_size=8", "train.precision=fp32", "train.warmup=0.5"):
        (change,) = run.what_changed(load(folder, other)[0], "train")
        assert change.startswith(other.partition("=")[0])


def test_a_run_is_opened_at_the_commits_of_its_stages(tmp_path, monkeypatch):
    """A text to measure on may have been added after training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finequant.recipes.hub._resolved", lambda *_: "0" * 40)
    Path("recipe.yaml").write_text(
        "name: r\nmodel: {base: acme/llama}\ndata: {train: acme/rows}\n"
        "evaluate: {perplexity: [{name: text, source: acme/text}]}\n",
        encoding="utf-8",
    )
    base, text = "models/acme/llama@main", "datasets/acme/text@main"
    commits = {
        "train": {base: "a" * 40},
        "evaluate": {base: "b" * 40, text: "c" * 40},
    }
    manifest = {
        stage: {"inputs": {}, "outputs": {}, "commits": commits[stage]} for stage in commits
    }
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    recipe, _ = open_run(Path("recipe.yaml"), [])
    assert recipe.model.revision == "a" * 40
    assert recipe.evaluate.perplexity[0].revision == "c" * 40
    assert recipe.data.train[0].revision == "0" * 40
