"""Models and rows from the Hub: real clients, in separate processes, against a local server."""

import json
import shutil
import subprocess

import pyarrow
import pytest
from conftest import write_jsonl
from pyarrow import parquet
from ruamel.yaml import YAML

TOKEN = "hf_PlantedTokenThatMustNotBeShown"

# argv: base, revision, dataset, revision. Prints a digest of what was loaded.
LOADS = """
import hashlib, json, sys
import torch
from finequant.finetune.data.splits import load_splits
from finequant.finetune.model import load_base, load_config, load_tokenizer
from finequant.recipes.schema import Data, Model

base, revision, dataset, rows_revision = sys.argv[1:]
model = Model(base=base, revision=revision)
config, tokenizer = load_config(model), load_tokenizer(model)
llama = load_base(model, torch.float32)
source = {"source": dataset, "revision": rows_revision}
splits = load_splits(Data(train=[source], validation_fraction=0.25), seed=0)
with torch.inference_mode():
    logits = llama(torch.arange(100).unsqueeze(0)).logits
print(json.dumps({
    "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
    "vocabulary": [config.vocab_size, len(tokenizer)],
    "prompts": sorted(row.messages[0]["content"] for part in splits[:2] for row in part),
}))
"""


@pytest.fixture
def repositories(hub, llama, tmp_path):
    """Adds a sharded acme/tiny-llama and the dataset acme/rows; their commits, the rows' folder."""
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(8)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (rows / "train.jsonl").write_text(text, encoding="utf-8")
    base = llama("base", max_shard_size="50KB")
    return base, hub.add("acme/tiny-llama", base), hub.add("acme/rows", rows, "datasets")


@pytest.mark.slow
def test_pinned_revisions_load_and_load_again_offline(hub, on_hub, repositories):
    base, commit, rows_commit = repositories
    arguments = ("-c", LOADS, "acme/tiny-llama", commit, "acme/rows", rows_commit)
    online = on_hub(*arguments, HF_TOKEN=TOKEN)
    assert online.returncode == 0, online.stderr
    asked = {path for _, path, _ in hub.requests}
    for shard in base.glob("*.safetensors"):
        assert f"/acme/tiny-llama/resolve/{commit}/{shard.name}" in asked
    assert not any("main" in path for path in asked)
    assert {token for *_, token in hub.requests} == {TOKEN}

    hub.close()
    hub.requests.clear()
    offline = on_hub(*arguments, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert hub.requests == []
    assert offline.stdout == online.stdout
    loaded = json.loads(offline.stdout)
    assert loaded["prompts"] == [f"Say {n}." for n in range(8)]
    local = on_hub("-c", LOADS, str(base), commit, "acme/rows", rows_commit, HF_HUB_OFFLINE="1")
    assert json.loads(local.stdout)["logits"] == loaded["logits"]
    for output in (online, offline):
        assert TOKEN not in output.stdout + output.stderr


# argv: dataset, and keys of sources as JSON. Prints where each one's rows are, or why it has none.
ROWS = """
import json, sys
from finequant.finetune.data.readers import read_source
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Source

for keys in sys.argv[2:]:
    try:
        source = {"source": sys.argv[1], "streaming": True} | json.loads(keys)
        rows = read_source(Source(**source))
        print([f"{where} {row['completion']}" for where, row in rows])
    except UserError as error:
        print(error)
"""


def test_a_streamed_dataset_gives_its_first_rows_and_leaves_no_copy(
    hub, on_hub, repositories, tmp_path
):
    keys = (json.dumps({"limit": 3, "revision": repositories[2]}), '{"split": "x"}')
    streamed = on_hub("-c", ROWS, "acme/rows", *keys, HF_TOKEN=TOKEN)
    assert streamed.returncode == 0, streamed.stderr
    rows, refusal = streamed.stdout.splitlines()
    assert rows == str([f"acme/rows[{n}] {n}" for n in range(3)])
    assert refusal.startswith("data: cannot load the dataset acme/rows, split x: ")
    assert f"/datasets/acme/rows/resolve/{repositories[2]}/train.jsonl" in {
        path for _, path, _ in hub.requests
    }
    assert not [*(tmp_path / "hf").rglob("*.arrow"), *(tmp_path / "hf").rglob("*.jsonl")]


LABELED = """---
dataset_info:
  features:
  - name: prompt
    dtype: string
  - name: completion
    dtype:
      class_label:
        names:
          '0': card lost
          '1': card late
---
"""


def test_class_labels_of_a_hub_dataset_are_read_as_their_names(hub, on_hub, tmp_path):
    """The numbers are in the rows' file, the names in the dataset's card."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "README.md").write_text(LABELED, encoding="utf-8")
    table = pyarrow.table({"prompt": ["Where is it?", "Lost!"], "completion": [1, 0]})
    parquet.write_table(table, tmp_path / "rows" / "train-00000-of-00001.parquet")
    hub.add("acme/labeled", tmp_path / "rows", "datasets")
    read = on_hub("-c", ROWS, "acme/labeled", '{"streaming": true}', '{"streaming": false}')
    assert read.returncode == 0, read.stderr
    rows = str(["acme/labeled[0] card late", "acme/labeled[1] card lost"])
    assert read.stdout.splitlines() == [rows, rows]


SUBSETS = """---
configs:
- config_name: sums
  data_files:
  - {split: train, path: sums/train.jsonl}
  - {split: test, path: sums/test.jsonl}
- config_name: words
  data_files:
  - {split: train, path: words.jsonl}
---
"""


@pytest.mark.slow
def test_init_writes_a_recipe_for_a_dataset_of_the_hub(hub, on_hub, repositories, tmp_path):
    folder = tmp_path / "quiz"
    (folder / "sums").mkdir(parents=True)
    (folder / "README.md").write_text(SUBSETS, encoding="utf-8")
    for name in ("sums/train.jsonl", "sums/test.jsonl", "words.jsonl"):
        rows = [{"question": f"{name} {n}?", "answer": f"It is {n}"} for n in range(20)]
        write_jsonl(folder / name, rows)
    hub.add("acme/quiz", folder, "datasets")
    init = ("-m", "finequant.recipes.run", "init", "--base", "acme/tiny-llama", "--to", "r.yaml")
    refused = on_hub(*init, "--data", "acme/quiz")
    assert refused.returncode == 2
    assert "['sums', 'words']" in refused.stderr
    assert "--subset" in refused.stderr
    done = on_hub(*init, "--data", "acme/quiz", "--subset", "sums")
    assert done.returncode == 0, done.stderr
    source = {"source": "acme/quiz", "name": "sums"}
    columns = {"columns": {"prompt": "question", "completion": "answer"}}
    data = YAML(typ="safe").load(tmp_path / "r.yaml")["data"]
    assert data["train"] == [source | columns]
    assert data["test"] == [source | {"split": "test"} | columns]


# argv: bases, each as id@revision. Prints a line for each: why it is refused.
REFUSALS = """
import sys
from finequant.finetune.model import load_base, load_tokenizer
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Model

for name in sys.argv[1:]:
    base, _, revision = name.partition("@")
    for load in (load_tokenizer, lambda model: load_base(model, "auto")):
        try:
            load(Model(base=base, revision=revision or None))
            print("loaded")
        except UserError as error:
            print(error)
"""

MODEL_REFUSED = {
    "acme/nothing": ["the Hub shows you no such model", "gated", "`hf auth login`"],
    "acme/closed": ["the Hub shows you no such model", "gated", "`hf auth login`"],
    "acme/rows": ["the Hub shows you no such model"],  # a dataset
    "acme/tiny-llama@v9": ["no such branch, tag or commit"],
}


@pytest.fixture
def pickled(hub, repositories, tmp_path) -> str:
    """A repository without safetensors."""
    folder = shutil.copytree(repositories[0], tmp_path / "pickled")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    hub.add("acme/pickled", folder)
    return "acme/pickled"


@pytest.mark.slow
def test_refusals_name_the_repository_and_the_next_step(hub, on_hub, repositories, pickled):
    """Pickled weights are neither read nor converted by a bot."""
    hub.add("acme/closed", repositories[0])
    hub.gated.add("acme/closed")
    refused = on_hub("-c", REFUSALS, *MODEL_REFUSED, pickled, HF_TOKEN=TOKEN)
    assert refused.returncode == 0, refused.stderr
    *lines, tokenizer, weights = refused.stdout.splitlines()
    assert tokenizer == "loaded"
    assert "acme/pickled (revision main): it has no safetensors weights" in weights
    asked = {path for _, path, _ in hub.requests}
    assert not any("pytorch_model" in path or "discussions" in path for path in asked)
    assert len(lines) == 2 * len(MODEL_REFUSED)
    for number, (name, words) in enumerate(MODEL_REFUSED.items()):
        repository, _, revision = name.partition("@")
        for line in lines[2 * number : 2 * number + 2]:
            named = f"cannot load {repository} (revision {revision or 'main'}): "
            assert line.startswith(f"model.base: {named}")
            assert all(word in line for word in words)
    assert TOKEN not in refused.stdout + refused.stderr


@pytest.mark.slow
def test_the_command_refuses_in_two_lines_and_exits_with_2(on_hub, repositories, tmp_path):
    model = "{base: acme/nothing, revision: v1}"
    (tmp_path / "recipe.yaml").write_text(
        f"name: hub\nmodel: {model}\ndata: {{train: rows/train.jsonl}}\n", encoding="utf-8"
    )
    command = ("-m", "finequant.recipes.run", "train", "recipe.yaml")
    refused = on_hub(*command, HF_TOKEN=TOKEN)
    assert refused.returncode == 2
    *notes, message = refused.stderr.splitlines()
    assert message.startswith("error: model.base: cannot load acme/")
    for word in ("acme/nothing (revision v1)", "no such model", "gated", "`hf auth login`"):
        assert word in message
    assert all(note.startswith(("data: ", "train: ")) for note in notes)
    assert TOKEN not in refused.stdout + refused.stderr


# argv: recipe. Prints the commits that a first and a later stage take, and training's inputs.
PINS = """
import json, sys
from finequant.recipes.command_line import read_command_line
from finequant.recipes.artifact import replace_text

argv = sys.argv[1:]
recipe, run = read_command_line("", argv, first_stage=True)
print(json.dumps([recipe.model.revision, recipe.data.train[0].revision,
    recipe.evaluate.perplexity[0].revision, run.inputs(recipe, "train")["model.base"],
    (run.what_changed(recipe, "train") or [])[:1]]))
if not run.adapter.exists():
    run.adapter.mkdir(parents=True)
    run.record(recipe, "train", run.inputs(recipe, "train"))
later, _ = read_command_line("", argv)
print(json.dumps([later.model.revision, later.data.train[0].revision]))
"""


@pytest.mark.slow
def test_a_moved_branch_is_a_change_and_later_stages_take_the_commit_of_training(
    hub, on_hub, repositories, tmp_path
):
    base, commit, rows_commit = repositories
    (tmp_path / "recipe.yaml").write_text(
        "name: hub\nmodel: {base: acme/tiny-llama}\ndata: {train: acme/rows}\n"
        "evaluate: {perplexity: [{name: text, source: acme/rows, split: train}]}\n",
        encoding="utf-8",
    )

    def pins(**environment: str) -> tuple[list, list]:
        done = on_hub("-c", PINS, "recipe.yaml", **environment)
        assert done.returncode == 0, done.stderr
        first, later = map(json.loads, done.stdout.splitlines()[-2:])
        return first, later

    name = "acme/tiny-llama@"
    first, later = pins()
    assert first == [commit, rows_commit, rows_commit, name + commit, []]
    assert later == [commit, rows_commit]

    moved, moved_rows = hub.add("acme/tiny-llama", base), hub.add("acme/rows", base, "datasets")
    assert moved != commit
    first, later = pins()
    change = f"data.train.0.revision: {rows_commit} -> {moved_rows}"
    assert first == [moved, moved_rows, moved_rows, name + moved, [change]]
    assert later == [commit, rows_commit]  # what was trained on is what is quantized and measured

    hub.close()
    first, _ = pins(HF_HUB_OFFLINE="1")
    assert first[0] == moved  # the last commit that was seen


RECIPE = """
name: hub
model: {base: acme/tiny-llama}
data: {train: acme/rows, validation_fraction: 0.25, test_fraction: 0.2}
train: {max_steps: 1, batch_size: 4}
quantize: {effort: fast}
evaluate: {metrics: [exact_match], max_new_tokens: 1}
publish: {license: apache-2.0, repo_id: acme/published}
"""

# argv: commands, each as JSON. Runs them all in this process, and prints each one's exit code.
COMMANDS = """
import json, sys
from finequant.recipes.run import main

for command in map(json.loads, sys.argv[1:]):
    code = 0
    try:
        main(command)
    except SystemExit as end:
        code = end.code or 0
    print(command[0], "ends with", code)
"""


@pytest.mark.slow
def test_commands_on_a_recipe_know_the_commits_of_its_branches(hub, on_hub, repositories, tmp_path):
    """A report is not out of date, and a model can be published; new rows are shown."""
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def commands(*commands: list[str]) -> subprocess.CompletedProcess[str]:
        done = on_hub("-c", COMMANDS, *map(json.dumps, commands), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        codes = [f"{command[0]} ends with 0" for command in commands]
        assert [line for line in done.stdout.splitlines() if "ends with" in line] == codes, done
        return done

    stages = [[stage, "recipe.yaml"] for stage in ("train", "quantize", "evaluate")]
    after = [["report", "recipe.yaml"], ["publish", "recipe.yaml", "--dry-run"]]
    before = commands(["data", "recipe.yaml"], *stages, *after)
    assert "Say 9." not in before.stdout
    assert "report: out of date" not in before.stderr

    more = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(9, 18)]
    (tmp_path / "more").mkdir()
    write_jsonl(tmp_path / "more" / "train.jsonl", more)
    hub.add("acme/rows", tmp_path / "more", "datasets")
    moved = commands(["data", "recipe.yaml", "--rows", "9"], *after)
    assert "Say 17." in moved.stdout
    assert "report: out of date" not in moved.stderr


# Prints why a base and a dataset that are not in the cache cannot be loaded.
ASKS = """
from finequant.finetune.data.readers import read_source
from finequant.finetune.model import load_config
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Model, Source

for load in (
    lambda: load_config(Model(base="acme/misspelled")),
    lambda: next(read_source(Source(source="acme/misspelled"))),
):
    try:
        load()
    except UserError as error:
        print(error)
"""


def test_a_hub_that_cannot_be_reached_is_not_asked_for_each_file(hub, on_hub):
    hub.close()
    result = on_hub("-c", ASKS)
    base, rows = result.stdout.splitlines()
    assert "not in the cache, and the Hub cannot be reached ([Errno" in base
    assert "check its id, name, split and revision, the network ([Errno" in rows
    assert "Retrying" not in result.stderr
