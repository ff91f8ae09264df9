"""Reading recipes: refusals and their messages, and the meaning of keys and values."""

import json
import os
import random
from pathlib import Path

import pytest

from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe, without_folders, write_recipe
from finequant.recipes.schema import Calibration, Recipe

RECIPE = """\
name: tiny
model:
  base: base
data:
  train: rows.jsonl
"""


@pytest.fixture
def write(tmp_path):
    """Writes `text` as a recipe beside the files that it names."""
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text("words\n", encoding="utf-8")

    def to_file(text: str | bytes = RECIPE) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return to_file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# (what follows RECIPE, from line 6 on; the line; the key; what the message says)
WRONG = {
    "unknown section": ("trian: {epochs: 1}", 6, "trian", "did you mean train?"),
    "unknown key": ("lora:\n  rnak: 8", 7, "lora.rnak", "(value 8); did you mean lora.rank?"),
    "unknown key far from any": ("lora:\n  zzz: 8", 7, "lora.zzz", "expected one of rank, alpha,"),
    "key without its section": (
        "learning_rate: 1e-4",
        6,
        "learning_rate",
        "(value 0.0001); did you mean train.learning_rate?",
    ),
    "unknown key in a nested section": (
        "evaluate:\n  gate:\n    max_perplexity: 0.1",
        8,
        "evaluate.gate.max_perplexity",
        "(value 0.1); did you mean evaluate.gate.max_perplexity_increase?",
    ),
    "unknown key in a list": (
        "evaluate:\n  perplexity:\n    - name: a\n      source: text.txt\n      colum: x",
        10,
        "evaluate.perplexity.0.colum",
        "(value 'x'); did you mean evaluate.perplexity.column?",
    ),
    "unknown key in a single source": (
        "  test:\n    source: rows.jsonl\n    splt: x",
        8,
        "data.test.splt",
        "(value 'x'); did you mean data.test.split?",
    ),
    "unknown key in a single corpus": (
        "evaluate:\n  perplexity:\n    name: a\n    source: rows.jsonl\n    colum: x",
        10,
        "evaluate.perplexity.colum",
        "(value 'x'); did you mean evaluate.perplexity.column?",
    ),
    "missing single corpus": (
        "evaluate:\n  perplexity:\n    name: a\n    source: no.txt",
        9,
        "evaluate.perplexity.source",
        "no such file or folder: no.txt",
    ),
    "wrong single choice": (
        "evaluate: {metrics: bleurt}",
        6,
        "evaluate.metrics",
        "'rouge', 'bleu' or 'chrf' (value 'bleurt')",
    ),
    "number as a key": ("1: 2", 6, "1", "unknown key (value 2)"),
    "text for a number": (
        'lora: {rank: "8"}',
        6,
        "lora.rank",
        "valid integer (value '8'); write it without quotes",
    ),
    "fraction for a count": ("lora: {rank: 1.5}", 6, "lora.rank", "valid integer (value 1.5)"),
    "bool for a number": ("lora: {rank: true}", 6, "lora.rank", "valid integer (value True)"),
    "number for a text": ("  system: 3", 6, "data.system", "valid string (value 3)"),
    "no for a bool": ("  packing: no", 6, "data.packing", "expected true or false (value 'no')"),
    "section without keys": ("lora:", 6, "lora", "a mapping of keys to values (value None)"),
    "list for a section": ("lora: [8]", 6, "lora", "a mapping of keys to values (value [8])"),
    "mapping for a text": ("  system: {a: b}", 6, "data.system", "string (value {'a': 'b'})"),
    "negative number": ("lora: {rank: -1}", 6, "lora.rank", "greater than 0 (value -1)"),
    "negative alias": ("lora: {r: -1}", 6, "lora.r", "greater than 0 (value -1)"),
    "both names": ("lora:\n  r: 8\n  rank: 4", 6, "lora", "r is another name for rank"),
    "fraction of one": (
        "  validation_fraction: 1.0",
        6,
        "data.validation_fraction",
        "less than 1 (value 1.0)",
    ),
    "negative fraction": (
        "lora: {dropout: -0.1}",
        6,
        "lora.dropout",
        "greater than or equal to 0 (value -0.1)",
    ),
    "infinity": (
        "train: {learning_rate: .inf}",
        6,
        "train.learning_rate",
        "finite number (value i",
    ),
    "not a number": ("train: {epochs: .nan}", 6, "train.epochs", "finite number (value nan)"),
    "overflow": ("lora: {alpha: 1e999}", 6, "lora.alpha", "finite number (value inf)"),
    "group size": ("quantize:\n  group_size: 16", 7, "quantize.group_size", "32 (value 16)"),
    "bits": ("quantize: {bits: 9}", 6, "quantize.bits", "less than or equal to 8 (value 9)"),
    "British license": (
        "publish: {licence: mit}",
        6,
        "publish.licence",
        "did you mean publish.license?",
    ),
    "license without its name": (
        "publish: {license: other, license_name: mine}",
        6,
        "publish",
        "license: other needs license_name and license_link, which no other",
    ),
    "language in words": ("publish: {language: English}", 6, "publish.language", "'English'"),
    "no license folder": (
        "publish: {license_folder: papers}",
        6,
        "publish.license_folder",
        "no such file or folder: papers",
    ),
    "wrong choice": (
        "  loss_on: asistant",
        6,
        "data.loss_on",
        "expected 'assistant' or 'all' (value 'asistant')",
    ),
    "wrong choice in a list": (
        "evaluate: {metrics: [f1, bleurt]}",
        6,
        "evaluate.metrics.1",
        "'rouge', 'bleu' or 'chrf' (value 'bleurt')",
    ),
    "wrong member of a union": (
        "lora: {target_modules: all_linear}",
        6,
        "lora.target_modules",
        "expected 'all-linear' (value 'all_linear'); or expected a valid list",
    ),
    "bare text for corpora": (
        "evaluate: {perplexity: text.txt}",
        6,
        "evaluate.perplexity",
        "a mapping of keys to values (value 'text.txt')",
    ),
    "same corpus twice": (
        "evaluate:\n  perplexity:\n    - {name: a, source: text.txt}\n"
        "    - {name: a, source: text.txt}",
        6,
        "evaluate",
        "a unique name other than held_out; found a, a",
    ),
    "micro batches": (
        "train: {batch_size: 6, micro_batch_size: 4}",
        6,
        "train",
        "batch_size 6 must be a multiple of micro_batch_size 4",
    ),
    "early stopping": ("train: {early_stopping_patience: 2, eval_steps: 5}", 6, "train", "(None)"),
    "dora with pissa": (
        "lora: {use_dora: true, init_lora_weights: pissa}",
        6,
        "lora",
        "use_dora cannot be combined with init_lora_weights 'pissa'",
    ),
    "loftq": (
        "lora: {init_lora_weights: loftq}",
        6,
        "lora.init_lora_weights",
        "'loftq' is not supported: it needs a base that is quantized before training",
    ),
    "odd orthogonal": ("lora: {r: 3, init_lora_weights: orthogonal}", 6, "lora", "not 3"),
    "choices": ("evaluate: {metrics: [multiple_choice]}", 6, "evaluate", "needs `choices`"),
    "half a row": (
        "  test: {source: rows.jsonl, columns: {prompt: q}}",
        6,
        "data.test",
        "both prompt and completion",
    ),
    "columns of two layouts": (
        "  test: {source: rows.jsonl, columns: {text: a, prompt: b, completion: c}}",
        6,
        "data.test",
        "columns must map messages, text, or both prompt and completion",
    ),
    "columns beside a text": (
        "  test: {source: rows.jsonl, columns: {text: a, system: b}}",
        6,
        "data.test",
        "a text has no system message or tools",
    ),
    "columns of another format": (
        "  test: {source: rows.jsonl, format: text, columns: {messages: a}}",
        6,
        "data.test",
        "columns map the layout messages, so format is not text",
    ),
    "empty source": ('  test: ""', 6, "data.test", "at least 1 character (value '')"),
    "missing data": (
        "  test: [rows.jsonl, {source: no.jsonl}]",
        6,
        "data.test.1.source",
        "no such file or folder: no.jsonl",
    ),
    "missing bare data": ("  test: no.csv", 6, "data.test", "no such file or folder: no.csv"),
    "missing home": ("  test: ~nobody0/x", 6, "data.test", "no such file or folder: ~nobody0/x"),
    "missing task folder": (
        "evaluate: {task_folder: tasks}",
        6,
        "evaluate.task_folder",
        "no such file or folder: tasks",
    ),
    "repository": ("publish: {repo_id: me}", 6, "publish.repo_id", "(value 'me')"),
    "python object": ("lora: !!python/object:os.system {}", 6, "lora", "!!python/object:os.system"),
    "python name": ("lora:\n  rank: !!python/name:os.system", 7, "lora.rank", "!!python/name:os."),
    "tagged list": ("lora:\n  target_modules: !x [q]", 7, "lora.target_modules", "!x is not under"),
    "date": ("  system: 2024-05-01", 6, "data.system", "text in quotes"),
    "syntax": ("lora: [8", 7, "", "not valid YAML: expected ',' or ']', but got '<stream end>'"),
    "tab": ("lora:\n\trank: 8", 7, "", "not valid YAML: found character '\\t' that cannot start"),
    "key twice": (
        "lora:\n  rank: 8\n  rank: 4",
        8,
        "",
        'not valid YAML: found duplicate key "rank"',
    ),
    "two documents": ("---\nname: b", 6, "", "not valid YAML: but found another document"),
    "control character": ("lora: \x07", 6, "", "not valid YAML: unacceptable character #x0007"),
    "name of a corpus": (
        "evaluate: {perplexity: {name: a b, source: rows.jsonl}}",
        6,
        "evaluate.perplexity.name",
        "expected letters, digits, - _ and .",
    ),
    "undefined anchor": ("lora: *a", 6, "", "not valid YAML: found undefined alias 'a'"),
}


@pytest.mark.parametrize(("added", "line", "key", "says"), WRONG.values(), ids=list(WRONG))
def test_wrong_recipe_is_refused_with_line_key_and_expectation(write, added, line, key, says):
    path = write(f"{RECIPE}{added}\n")
    message = refusal(path)
    where = f"{path}:{line}: {key}:" if key else f"{path}:{line}:"
    assert where in message
    assert says in message


WHOLE_FILES = {
    "empty": ("", "found nothing"),
    "only a comment": ("# name: tiny\n", "found nothing"),
    "list": ("- name\n- model\n", "expected a mapping of sections (name, model, data, ...)"),
    "text": ("hello\n", "found 'hello'"),
    "not UTF-8": (b"name: a\nmodel: \xff\xfe\n", "recipe.yaml:2: not UTF-8 text"),
    "UTF-16": (RECIPE.encode("utf-16"), "recipe.yaml:1: not UTF-8 text"),
    "no data": ("name: a\nmodel: {base: base}\n", "recipe.yaml: data: this key is required"),
    "no base": (RECIPE.replace("base: base", "revision: v1"), "model.base: this key is required"),
    "slash in name": (
        RECIPE.replace("tiny", "a/b"),
        "recipe.yaml:1: name: expected letters, digits",
    ),
    "name upwards": (RECIPE.replace("tiny", ".."), "(value '..')"),
    "name with a newline": (RECIPE.replace("tiny", '"a\\n"'), "(value 'a\\n')"),
    "no sources": (RECIPE.replace("rows.jsonl", "[]"), "recipe.yaml:5: data.train: expected to"),
    "missing base": (RECIPE.replace("base: base", "base: ./no"), "recipe.yaml:3: model.base: no s"),
    "tabs": (
        "name: a\nmodel:\n\tbase: b\n",
        "recipe.yaml:3: not valid YAML: found character '\\t' that "
        "cannot start any token: indent with spaces, not with tabs",
    ),
    "13th month": (RECIPE + "x: 2024-13-01\n", "not valid YAML: month must be in 1..12"),
    "too many digits": (RECIPE + f"seed: {'9' * 5000}\n", "not valid YAML: Exceeds the limit"),
    "too deep": (RECIPE + "lora: " + "[" * 3000 + "]" * 3000, "not valid YAML: maximum recursion"),
    "aliases of aliases": (
        RECIPE
        + "  template_arguments:\n    l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        # 1 + 9 lines, and ten billion entries
        + "".join(f"    l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, 10)),
        "data.template_arguments.l4...: more than 100,000 keys and entries, counted again where",
    ),
    "inside itself": ("&a\nname: *a\n", "recipe.yaml:2: name.name.name...: nested too deeply"),
    "stopping without validation": (
        RECIPE + "  validation_fraction: 0.0\ntrain: {early_stopping_patience: 1}\n",
        "train.early_stopping_patience needs validation rows",
    ),
}


@pytest.mark.parametrize(("text", "says"), WHOLE_FILES.values(), ids=list(WHOLE_FILES))
def test_wrong_file_is_refused(write, text, says):
    assert says in refusal(write(text))


def test_a_missing_file_or_folder_is_refused(tmp_path):
    assert f"{tmp_path / 'no.yaml'}: cannot read the recipe: No such" in refusal(
        tmp_path / "no.yaml"
    )
    assert f"{tmp_path}: a folder, but not a run directory" in refusal(tmp_path)


def test_all_errors_are_listed_at_once(write):
    message = refusal(
        write(f"{RECIPE}  paking: true\nlora: {{rank: 0}}\nquantize: {{bits: 9, head: both}}\n"),
        "train.epochs=-1",
        "model.bse=x",
    )
    assert message.startswith("6 problems in ")
    for part in (
        "recipe.yaml:6: data.paking: unknown key (value True); did you mean data.packing?",
        "recipe.yaml:7: lora.rank:",
        "recipe.yaml:8: quantize.bits:",
        "recipe.yaml:8: quantize.head: expected 'quantize', 'float' or 8 (value 'both')",
        "command line: train.epochs: expected greater than 0 (value -1)",
        "command line: model.bse: unknown key (value 'x'); did you mean model.base?",
    ):
        assert part in message


def test_what_can_be_read_only_once_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "stdin")
    with pytest.raises(UserError, match="stdin: not a file: each stage reads the recipe again"):
        load_recipe(tmp_path / "stdin")


def test_missing_files_are_listed_at_once_and_long_values_are_cut(write):
    message = refusal(write(f"{RECIPE}  test: a.csv\n  validation: [b.csv, c.csv]\n"))
    assert message.startswith("3 problems in ")
    assert len(refusal(write(f"{RECIPE}lora: {{rank: {'x' * 9000}}}\n"))) < 600


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora.rnak=8", "command line: lora.rnak: unknown key (value 8); did you mean lora.rank?"),
        ("lor.rank=8", "command line: lor: unknown key (value {'rank': 8}); did you mean lora?"),
        ("lora.0=8", "command line: lora.0: unknown key (value 8)"),
        ("lora.rank", "command line: lora.rank: expected key.sub=value"),
        ("=8", "command line: =8: expected key.sub=value"),
        ("lora..rank=8", "command line: lora..rank=8: expected key.sub=value"),
        ("lora.rank=", "command line: lora.rank: expected a valid integer (value None)"),
        ("lora.rank=[", "command line: lora.rank: expected a valid integer (value '[')"),
        ("lora.rank=&a [*a]", "nested too deeply, or inside itself"),
        ("lora.rank=!!python/object:os.system {}", "!!python/object:os.system is not understood"),
        ("name=2024-05-01", "date is not understood (value '2024-05-01')"),
        (f"name={'a' * 101}", "name: expected to have at most 100 characters (value 'aaa"),
        ("name.first=a", "command line: name.first=a: the recipe has no name.first"),
        ("publish.repo_id=me", "publish.repo_id: expected a Hub repository: your-name/"),
        ("publish.license_name=mine", ": license: other needs license_name and license_link, whic"),
        ("publish.license=MIT", "publish.license: expected a license as the Hub names it"),
        ("publish.language=[English]", "expected a code of two or three letters such as en"),
        ("evaluate.metrics=f1,rouge", "; write a list in brackets: [f1,rouge]"),
        ("data.train.limit=5", "data.train is 'rows.jsonl': write 'data.train={source: rows.jsonl"),
        ("data.test.limit=5", "data.test is a list of 1, whose first entry is data.test.0"),
        ("data.test.2.limit=5", "command line: data.test.2.limit=5: the recipe has no data.test.2"),
        ("data.test.-1.limit=5", "the recipe has no data.test.-1"),
        ("data.test.0.limt=5", "command line: data.test.0.limt: unknown key (value 5)"),
        ("data.test.0.limit=0", "command line: data.test.0.limit: expected greater than 0"),
        ("data.test=[rows.jsonl, no.csv]", "command line: data.test.1: no such file or folder"),
    ],
)
def test_wrong_override_is_refused(write, override, says):
    path = write(f"{RECIPE}  test:\n    - {{source: rows.jsonl}}\n")
    assert says in refusal(path, override)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["train.micro_batch_size=3"],
            ":8 with train.micro_batch_size of the command line: train: batch_size 16 must be a",
        ),
        (
            ["data.test.0.columns.prompt=a", "train.epochs=2"],
            ":7 with data.test.0.columns.prompt of the command line: data.test.0: columns must map",
        ),
        (
            ["quantize.training.steps=5", "quantize.budget=3.5"],
            ".yaml with quantize.training.steps, quantize.budget of the command line: recipe: quan",
        ),
        (
            ["train={batch_size: 5, micro_batch_size: 2}"],
            "  command line: train: batch_size 5 must",
        ),
        (["data.max_length=9", "train.epochs=0"], "  command line: train.epochs: expected greater"),
    ],
)
def test_a_section_that_an_override_spoils_is_refused_with_its_name(write, overrides, says):
    """It was said to be at the line of the file, where nothing is wrong."""
    path = write(f"{RECIPE}  test:\n    - {{source: rows.jsonl}}\ntrain: {{epochs: 1}}\n")
    assert says in refusal(path, *overrides)


def test_a_section_of_the_file_is_refused_at_its_line(write):
    path = write(f"{RECIPE}train: {{micro_batch_size: 3}}\n")
    assert "recipe.yaml:6: train: batch_size 16 must be" in refusal(path, "data.max_length=9")


def test_only_a_source_is_said_to_take_keys(write):
    message = refusal(write(f"{RECIPE}  system: Be brief.\n"), "data.system.limit=5")
    assert message.endswith("the recipe has no data.system.limit: data.system is 'Be brief.'")


def test_defaults_then_file_then_command_line(write):
    path = write(f"{RECIPE}train: {{max_steps: 5, epochs: 2}}\n")
    recipe = load_recipe(path, ["train.max_steps=7", "train.max_steps=9", "lora.rank=4"])
    assert recipe.train.max_steps == 9
    assert recipe.train.epochs == 2
    assert recipe.lora.rank == 4
    assert recipe.lora.alpha == 32


def test_an_effort_on_the_command_line_replaces_what_the_file_says_of_its_keys(write, tmp_path):
    """A run's own recipe has every key: `quantize.effort=best` would change nothing there."""
    calibration = "calibration: {tokens: 512, length: 64, steps: 5}"
    path = write(f"{RECIPE}quantize: {{method: rtn, rotate: false, scale: max, {calibration}}}\n")
    assert load_recipe(path).quantize.method == "rtn"
    written = tmp_path / "resolved.yaml"
    write_recipe(load_recipe(path), written)
    for file in (path, written):
        best = load_recipe(file, ["quantize.effort=best", "quantize.calibration.steps=7"]).quantize
        assert (best.method, best.rotate, best.scale) == ("gptq", True, "max")
        assert best.calibration == Calibration(tokens=32768, length=64, steps=7, scale_steps=100)
        fast = load_recipe(file, ["quantize.method=hqq", "quantize.effort=fast"]).quantize
        assert (fast.method, fast.rotate, fast.calibration.steps) == ("hqq", False, 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer #1 is the best", "Answer #1 is the best"),
        ("#1", "#1"),
        ("two\nlines", "two\nlines"),
        (" trimmed ", "trimmed"),
        ("'in quotes' # a comment", "in quotes"),
        ("null # a comment", None),
    ],
)
def test_text_in_an_override_is_not_cut(write, text, value):
    """`output_dir=runs/#1 #2` once became another folder: for YAML, a comment begins there."""
    path = write(f"{RECIPE}  test: rows.jsonl\n")
    assert load_recipe(path, [f"data.system={text}"]).data.system == value


def test_overrides_are_yaml_values(write):
    path = write(f"{RECIPE}  test:\n    - {{source: rows.jsonl}}\n    - rows.jsonl\n")
    recipe = load_recipe(
        path,
        [
            "train.learning_rate=2e-4",
            "data.packing=true",
            "data.system=no",
            "data.test.0.limit=5",
            "lora.target_modules=[q_proj, v_proj]",
            "evaluate.gate.max_accuracy_drop=0.02",
            "evaluate.tasks=piqa",
            "train.max_steps=null",
            "model.chat_template={% if a = b %}",
        ],
    )
    assert recipe.train.learning_rate == 0.0002
    assert recipe.data.packing is True
    assert recipe.data.system == "no"
    assert [source.limit for source in recipe.data.test] == [5, None]
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.evaluate.gate.max_accuracy_drop == 0.02
    assert recipe.evaluate.tasks[0].task == "piqa"
    assert recipe.train.max_steps is None
    assert recipe.model.chat_template == "{% if a = b %}"


def test_a_chat_template_in_a_file_of_another_name_is_refused(write, tmp_path):
    """Its path would be rendered, in place of every row."""
    (tmp_path / "chat.txt").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"model.chat_template: expected a Jinja template, with .*"):
        load_recipe(write(RECIPE), ["model.chat_template=chat.txt"])


def test_recipes_are_yaml_1_2(write):
    recipe = load_recipe(
        write(f"{RECIPE}  system: no\n  packing: &yes true\ntrain: {{learning_rate: 2e-4}}\n")
    )
    assert recipe.train.learning_rate == 2e-4
    assert recipe.data.system == "no"
    assert recipe.data.packing is True


def test_yaml_merge_keys_work(write):
    text = f"{RECIPE}lora:\n  <<: {{rank: 4, alpha: 2}}\n  alpha: 3\n"
    assert (load_recipe(write(text)).lora.rank, load_recipe(write(text)).lora.alpha) == (4, 3)
    assert "recipe.yaml:6: lora.rnk: unknown key" in refusal(write(text.replace("rank", "rnk")))


@pytest.mark.parametrize("written", ["rank", "r"])
@pytest.mark.parametrize("override", ["rank", "r"])
def test_r_is_rank(write, written, override):
    path = write(f"{RECIPE}lora: {{{written}: 8}}\n")
    assert load_recipe(path).lora.rank == 8
    assert load_recipe(path, [f"lora.{override}=4"]).lora.rank == 4


@pytest.mark.parametrize(
    ("batch_size", "rows"), [(2, 2), (7, 7), (11, 1), (12, 6), (16, 8), (20, 5), (64, 8)]
)
def test_a_batch_size_alone_is_enough(write, batch_size, rows):
    """The micro-batch is its largest divisor up to 8, unless the recipe says another."""
    alone = load_recipe(write(f"{RECIPE}train: {{batch_size: {batch_size}}}"))
    assert alone.train.micro_batch_size == rows
    one = load_recipe(
        write(RECIPE + "train: {micro_batch_size: 1}"), [f"train.batch_size={batch_size}"]
    )
    assert one.train.micro_batch_size == 1


def test_paths_start_at_the_recipe(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(f"{RECIPE}  test: [org/dataset]\n")
    for given in (path, Path("..") / "recipe.yaml"):
        recipe = load_recipe(given)
        assert recipe.model.base == str(tmp_path / "base")
        assert recipe.data.train[0].source == str(tmp_path / "rows.jsonl")
        assert recipe.data.test[0].source == "org/dataset"
    recipe = load_recipe(path, ["model.base=package:module/file.gguf"])
    assert recipe.model.base == "package:module/file.gguf"


@pytest.mark.parametrize("linked", [False, True])
def test_written_recipe_is_the_same_from_another_folder(recipe_file, tmp_path, linked):
    recipe = load_recipe(
        recipe_file,
        ["train.learning_rate=1e-05", "evaluate.gate.max_perplexity_increase=0.05"]
        + ["data.system='no'", 'model.chat_template="{{ a }}\\n  \\t\\x85 2e-4: #"'],
    )
    folder = tmp_path / "deep" / "er" / "run"
    folder.mkdir(parents=True)
    if linked:
        (tmp_path / "link").symlink_to(folder, target_is_directory=True)
        folder = tmp_path / "link"
    write_recipe(recipe, folder / "recipe.yaml")
    assert load_recipe(folder / "recipe.yaml") == recipe.model_copy(update={"output_dir": None})
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert "source: ../../../train.jsonl" in text


def test_a_written_recipe_is_replaced_as_a_whole(write, tmp_path):
    """In a run directory that was copied here, it is the only one: a kill must not halve it."""
    copy, other_name = tmp_path / "copy.yaml", tmp_path / "before.yaml"
    write_recipe(load_recipe(write()), copy)
    before = copy.read_bytes()
    other_name.hardlink_to(copy)
    write_recipe(load_recipe(write(), ["seed=5"]), copy)
    assert load_recipe(copy).seed == 5
    assert other_name.read_bytes() == before


@pytest.mark.parametrize("text", ["no", "~", "", "2e-4", "a: b", "- x", " pad ", "ü\u2028\n\n x\n"])
def test_any_text_survives_writing(write, tmp_path, text):
    recipe = load_recipe(write(), [f"data.system={json.dumps(text)}"])
    assert recipe.data.system == text
    write_recipe(recipe, tmp_path / "copy.yaml")
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_schema_is_json_with_descriptions(write):
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    assert schema["required"] == ["name", "model", "data"]
    assert schema["additionalProperties"] is False
    assert all(section["description"] for section in [schema, *schema["$defs"].values()])
    assert schema["$defs"]["Quantize"]["properties"]["group_size"]["description"]
    assert "rank" in schema["$defs"]["Lora"]["properties"]
    kinds = schema["$defs"]["Data"]["properties"]["train"]["anyOf"]
    assert {"type": "string"} in kinds  # `train: rows.jsonl` is no error in an editor


def test_a_list_of_one_needs_no_brackets(write):
    sections = Recipe.model_json_schema()["$defs"].values()
    keys = [item for section in sections for item in section["properties"].items()]
    assert [name for name, key in keys if key.get("type") == "array"] == []
    corpus = "{name: a, source: rows.jsonl}"
    values = (
        ("evaluate.perplexity", corpus),
        ("evaluate.metrics", "f1"),
        ("quantize.exports", "gguf"),
    )
    path = write()
    single = load_recipe(path, [f"{key}={value}" for key, value in values])
    assert single == load_recipe(path, [f"{key}=[{value}]" for key, value in values])


def test_damaged_recipes_give_a_recipe_or_a_user_error(recipe_file):
    whole = recipe_file.read_text(encoding="utf-8")
    rng = random.Random(0)
    outcomes = set()
    for _ in range(200):
        text = list(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            if rng.random() < 0.5:
                del text[at : at + rng.randint(1, 5)]
            else:
                text.insert(at, rng.choice("az09 \t\n:-#&*!|>'\"%@`{}[],.?~<\\\0\x85é😀"))
        recipe_file.write_text("".join(text), encoding="utf-8")
        try:
            outcomes.add(type(load_recipe(recipe_file)))
        except UserError as error:
            outcomes.add(type(error))
    assert outcomes == {Recipe, UserError}


def test_without_folders_names_no_path_of_this_machine(recipe_file, tmp_path, tiny_base):
    shown = without_folders(load_recipe(recipe_file))
    write_recipe(shown, tmp_path / "shown.yaml")
    text = (tmp_path / "shown.yaml").read_text(encoding="utf-8")
    assert "/" not in text
    assert shown.data.train[0].source == "train.jsonl"
    assert shown.model.base == tiny_base.name
    assert shown.output_dir is None


def test_without_folders_tells_files_of_one_name_apart(write, tmp_path):
    """Otherwise, a published recipe would train on its held-out rows."""
    path = write()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl.gz").write_bytes(b"")
    sources = ["data.train=[a/rows.jsonl.gz, rows.jsonl]", "data.test=[b/rows.jsonl.gz]"]
    data = without_folders(load_recipe(path, [*sources, "data.validation=a/rows.jsonl.gz"])).data
    assert [source.source for source in data.train] == ["rows.jsonl.gz", "rows.jsonl"]
    assert data.validation[0].source == "rows.jsonl.gz"
    assert data.test[0].source == "rows-2.jsonl.gz"
