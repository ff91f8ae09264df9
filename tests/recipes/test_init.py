"""`finequant init` as a user types it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import write_jsonl

from finequant.finetune.data.splits import load_splits
from finequant.finetune.model import load_config
from finequant.quantize.size import machine as machines
from finequant.quantize.size.machine import this_machine
from finequant.quantize.size.resources import settings_that_fit
from finequant.recipes.commands.init import NewRecipe
from finequant.recipes.commands.preflight import check_tokens
from finequant.recipes.errors import UserError
from finequant.recipes.load import add_to_file, load_recipe
from finequant.recipes.locate import CHATML_TOOLS
from finequant.recipes.run import main
from finequant.recipes.stages import STAGES


@pytest.fixture
def init(recipe_file, tmp_path, monkeypatch, capsys):
    """Writes a recipe for forty rows of up to 1,024 tokens on a machine with this memory; returns
    what is printed."""
    base = load_recipe(recipe_file, []).model.base
    rows = tmp_path / "rows.csv"
    lines = (f"Is {n} even?,{'yes' if n % 2 == 0 else 'no'}\n" for n in range(40))
    rows.write_text("question,answer\n" + "".join(lines), encoding="utf-8")

    def run(memory: int) -> str:
        monkeypatch.setattr(machines, "total_memory", lambda: memory)
        with pytest.raises(SystemExit) as exit_:
            target = ["--to", str(tmp_path / "r.yaml"), "data.max_length=1024"]
            main(["init", "--data", str(rows), "--base", base, *target])
        assert not exit_.value.code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.fixture
def init_rows(recipe_file, tmp_path, monkeypatch, capsys):
    """Runs `init` on these rows in an empty folder; returns the exit code and what is printed."""
    base = load_recipe(recipe_file, []).model.base
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(rows: list[dict], *arguments: str) -> tuple[int, str]:
        write_jsonl(folder / "rows.jsonl", rows)
        with pytest.raises(SystemExit) as exit_:
            main(["init", "--data", "rows.jsonl", "--base", base, *arguments])
        printed = capsys.readouterr()
        return int(exit_.value.code or 0), printed.out + printed.err

    return run


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"Is {n} even?", "completion": f"It is {n} so."} for n in range(count)]


def test_metrics_that_do_not_read_the_answers_are_replaced(init_rows):
    text = "кошка спит на старом диване у окна, и никто её не будит до самого вечера " * 2
    rows = [{"prompt": f"Что {n}?", "completion": f"{text}{n}, вот и всё."} for n in range(40)]
    code, printed = init_rows(rows, "data.max_length=512")
    assert code == 0, printed
    assert "init: evaluate.metrics: chrf, because rouge cannot compare such answers" in printed
    assert load_recipe("rows.yaml", []).evaluate.metrics == ["f1", "chrf"]


def test_a_recipe_that_cannot_be_used_is_not_kept(init_rows):
    rows = [*pairs(40), {"prompt": "Is it?", "completion": ""}]
    code, printed = init_rows(rows)
    assert code == 2
    assert "rows.jsonl:41" in printed
    assert "init: wrote" not in printed
    assert not [*Path().glob("*.yaml"), *Path().glob("*.json")]
    code, printed = init_rows(rows, "data.bad_rows=drop", "data.train.0.limit=30")
    assert code == 0
    assert "init: wrote rows.yaml" in printed
    recipe = load_recipe("rows.yaml")
    assert (recipe.data.bad_rows, recipe.data.train[0].limit) == ("drop", 30)
    assert Path("recipe.schema.json").exists()


def test_a_failed_init_removes_only_what_it_made(init_rows):
    bad = [*pairs(40), {"prompt": "Is it?", "completion": ""}]
    assert init_rows(bad)[0] == 2
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
    too_long = [{"prompt": "open the red door " * 400, "completion": f"{n} a"} for n in range(9)]
    assert init_rows(too_long)[0] == 2  # once the rows are read
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
    assert init_rows(pairs(40))[0] == 0
    Path("rows.yaml").unlink()
    before = sorted(Path("runs").rglob("*"))
    assert init_rows(bad)[0] == 2
    assert sorted(Path("runs").rglob("*")) == before


def test_a_failed_init_keeps_what_a_named_run_directory_holds(init_rows):
    notes = Path("mine/data/notes.txt")
    notes.parent.mkdir(parents=True)
    notes.write_text("mine", encoding="utf-8")
    rows = [*pairs(40), {"prompt": "Is it?", "completion": ""}]
    assert init_rows(rows, "output_dir=mine")[0] == 2
    assert sorted(Path("mine").rglob("*")) == [notes.parent, notes]
    assert not [*Path().glob("*.yaml")]


def test_a_failed_init_keeps_a_recipe_that_was_edited_in_the_meantime(init_rows, monkeypatch):
    """An editor may have it open: `init` takes a while to read the rows and to load libraries."""

    def edit(*_: object) -> None:
        with Path("rows.yaml").open("a", encoding="utf-8") as file:
            file.write("# my notes\n")
        raise UserError("no room")

    monkeypatch.setattr("finequant.recipes.commands.init.check_tokens", edit)
    code, printed = init_rows(pairs(40))
    assert code == 2
    assert "init: kept rows.yaml, which was edited in the meantime\nerror: no room" in printed
    assert Path("rows.yaml").read_text(encoding="utf-8").endswith("# my notes\n")


def test_keys_that_init_adds_to_an_edited_recipe_do_not_make_it_its_own(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("name: a\n", encoding="utf-8")
    recipe = NewRecipe(file)
    recipe.add({"train.epochs": 3}, "more")
    file.write_text(file.read_text(encoding="utf-8") + "# my notes\n", encoding="utf-8")
    recipe.add({"lora.rank": 4}, "smaller")
    recipe.remove()
    assert "# my notes\n" in file.read_text(encoding="utf-8")
    NewRecipe(file).remove()
    assert not file.exists()


def test_a_recipe_that_was_removed_in_the_meantime_does_not_hide_the_error(init_rows, monkeypatch):
    def move(*_: object) -> None:
        Path("rows.yaml").rename("mine.yaml")
        raise UserError("no room")

    monkeypatch.setattr("finequant.recipes.commands.init.check_tokens", move)
    code, printed = init_rows(pairs(40))
    assert code == 2
    assert "error: no room" in printed
    assert "Traceback" not in printed
    assert Path("mine.yaml").exists()


def test_columns_are_joined_by_repeating_an_option(init_rows):
    rows = [{"a": f"in {n}", "b": f"was {n}?", "c": f"at {n}", "d": f"no {n}"} for n in range(40)]
    code, printed = init_rows(
        rows, "--prompt", "a", "--prompt", "b", "--completion", "c", "--completion", "d"
    )
    assert code == 0
    assert "prompt is '{a}\\n\\n{b}', completion is '{c}\\n\\n{d}'" in printed
    columns = {"prompt": "{a}\n\n{b}", "completion": "{c}\n\n{d}"}
    assert load_recipe("rows.yaml").data.train[0].columns == columns


@pytest.mark.parametrize(
    "names", [("my.question", "{answer}"), ("question [en]", "the answer [en]")]
)
def test_names_of_columns_may_look_like_paths_and_templates(init_rows, names):
    question, answer = names
    rows = [{question: f"ask {n}", answer: f"say {n}"} for n in range(40)]
    code, printed = init_rows(rows)
    assert code == 0
    assert f"prompt is {question!r}, completion is {answer!r}\n" in printed
    assert "assistant\nsay " in printed
    more = [{**row, "more.of it": f"{row[answer]}, too"} for row in rows]
    code, printed = init_rows(more, "--to", "other.yaml")
    assert code == 2
    assert f"prompt {question} and completion {answer} leave out more.of it. If" in printed


def test_labels_that_are_numbers_get_a_word(init_rows):
    rows = [{"text": f"it is {n}", "label": n % 2} for n in range(40)]
    message = "init: the answers are numbers"
    assert message in init_rows(rows)[1]
    floats = [{**row, "label": f"{row['label']}.0"} for row in rows]  # as pandas writes them
    assert message in init_rows(floats, "--to", "floats.yaml")[1]
    rows = [{**row, "label": "ab"[row["label"]]} for row in rows]
    assert message not in init_rows(rows, "--to", "other.yaml")[1]


def test_a_recipe_of_the_users_is_kept_as_it_is(init_rows):
    Path("rows.yaml").write_text("mine", encoding="utf-8")
    code, printed = init_rows([{"prompt": "Is it?", "completion": ""}])
    assert code == 2
    assert "rows.yaml: exists already" in printed
    assert Path("rows.yaml").read_text(encoding="utf-8") == "mine"


def test_a_wrong_key_is_refused_and_leaves_nothing(init_rows):
    code, printed = init_rows(pairs(40), "train.epoch=3")
    assert code == 2
    assert "command line: train.epoch: unknown key (value 3); did you mean train.epochs" in printed
    assert not [*Path().glob("*.yaml")]


def test_a_row_that_is_too_long_is_left_out_and_counted(init_rows):
    rows = [*pairs(40), {"prompt": "open the red door " * 400, "completion": "So."}]
    code, printed = init_rows(rows, "data.validation_fraction=0", "data.test_fraction=0.01")
    assert code == 0
    recipe = load_recipe("rows.yaml")
    assert recipe.data.max_length == load_config(recipe.model).max_position_embeddings == 512
    assert "train: 1 row longer than data.max_length=512 left out" in printed


TOOLS = [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "lamp", "arguments": "{}"}}


def tool_rows() -> list[dict]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"light {n}"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
            ],
            "tools": TOOLS,
        }
        for n in range(40)
    ]


def test_calls_are_not_compared_where_no_held_out_row_has_any(init_rows):
    words = [
        {**row, "messages": [row["messages"][0], {"role": "assistant", "content": "no"}]}
        for row in tool_rows()
    ]
    write_jsonl(Path("held_out.jsonl"), words[20:])
    code, printed = init_rows([*words[:20], tool_rows()[30]], "--test", "held_out.jsonl")
    assert code == 0, printed
    assert "init: evaluate.metrics: f1, because no held-out answer is a call" in printed
    assert load_recipe("rows.yaml").evaluate.metrics == ["f1"]


def test_a_template_that_leaves_out_tools_is_replaced_where_that_fits(init_rows):
    code, printed = init_rows(tool_rows())
    assert code == 0
    assert "leaves out tools: model.chat_template: chatml_tools.jinja, which comes" in printed
    recipe = load_recipe("rows.yaml")
    assert recipe.model.chat_template == str(CHATML_TOOLS)
    check_tokens(recipe, load_splits(recipe.data, recipe.seed))


def test_a_template_of_tools_is_not_named_for_a_base_without_its_tokens(init_rows, tiny_base):
    shutil.copytree(tiny_base, "base")
    for file in [*Path("base").glob("token*.json"), *Path("base").glob("*.jinja")]:
        text = file.read_text(encoding="utf-8")
        text = text.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|stop|>")
        file.write_text(text, encoding="utf-8")
    code, printed = init_rows(tool_rows(), "--base", "base")
    assert code == 2
    assert "never see them; set model.chat_template to one that writes them" in printed
    assert not Path("rows.yaml").exists()


def test_a_template_that_would_write_the_date_of_today_gets_another(init_rows, tiny_base):
    shutil.copytree(tiny_base, "base")
    (template,) = Path("base").glob("*.jinja")
    today = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    dated = today + "{% endif %}{{ date_string }}\n" + template.read_text(encoding="utf-8")
    template.write_text(dated, encoding="utf-8")
    code, printed = init_rows(pairs(40), "--base", "base")
    assert code == 0
    assert "26 Jul 2024" in printed
    assert "today" not in printed
    assert load_recipe("rows.yaml").data.template_arguments == {"date_string": "26 Jul 2024"}


def test_an_entry_of_a_list_may_be_given(init_rows):
    code, _ = init_rows(pairs(40), "evaluate.metrics.0=bleu")
    assert code == 0
    assert load_recipe("rows.yaml").evaluate.metrics[0] == "bleu"


def test_texts_have_no_answers_to_compare(init_rows):
    code, _ = init_rows([{"text": f"Text {n} is a text."} for n in range(40)])
    assert code == 0
    recipe = load_recipe("rows.yaml")
    assert recipe.evaluate.metrics == []
    assert recipe.evaluate.gate.max_perplexity_increase
    check_tokens(recipe, load_splits(recipe.data, recipe.seed))


def test_a_recipe_for_a_machine_with_room_has_the_defaults(init, tmp_path):
    assert "to fit into" not in init(24 * 10**9)
    assert "to fit into" not in (tmp_path / "r.yaml").read_text(encoding="utf-8")


def test_short_rows_are_not_held_for_as_long_as_the_recipe_allows(init, tmp_path):
    """Rows of 1,024 tokens would take more than this; these have about twenty."""
    init(700 * 10**6)
    recipe = load_recipe(tmp_path / "r.yaml", [])
    assert settings_that_fit(recipe, ["train"], this_machine())
    assert "micro_batch_size" not in (tmp_path / "r.yaml").read_text(encoding="utf-8")


def test_exports_that_do_not_fit_are_left_out_of_the_file(init, tmp_path, monkeypatch):
    """They take memory of the CPU, so that a GPU's does not count."""
    from finequant.quantize.size import machine

    gpu = machine.Machine("RTX 4090", 24 * 10**9, "gpu")
    monkeypatch.setattr(machine, "this_machine", lambda: gpu)
    assert "init: to fit into the 0.6 GB of this machine: quantize.exports: []\n" in init(
        55 * 10**7
    )
    assert load_recipe(tmp_path / "r.yaml", []).quantize.exports == []


def test_what_does_not_fit_is_made_smaller_in_the_file(init, tmp_path, monkeypatch):
    from finequant.recipes.commands import init as command

    monkeypatch.setattr(command, "check_tokens", lambda *_: None)  # as long as it allows
    said = init(7 * 10**8)
    assert re.search(r"init: to fit into the 0\.7 GB of this machine: train\.\w+: ", said)
    text = (tmp_path / "r.yaml").read_text(encoding="utf-8")
    assert "# to fit into the 0.7 GB of this machine\n" in text
    assert "# lower it for a base of several billion parameters\n" in text  # comments stay
    recipe = load_recipe(tmp_path / "r.yaml", [])
    stages = [stage for stage in STAGES if stage in ("train", "quantize")]
    assert settings_that_fit(recipe, stages, this_machine()) == {}


def test_keys_are_added_to_a_file_without_touching_the_rest(tmp_path):
    file = tmp_path / "recipe.yaml"
    data = "data:\n  train:\n    - source: a\n      split: b\n    # more\n    - source: c\n\n"
    before = "# mine\nname: 'a'\n\ntrain:\n  epochs: 2    # two\n\nquantize:\n  exports: [gguf]\n"
    file.write_text(data + before, encoding="utf-8")
    added = {"train.epochs": 3, "quantize.calibration.scale_steps": 0, "lora.rank": 4}
    add_to_file(file, added, "smaller")
    text = file.read_text(encoding="utf-8")
    assert text.startswith(data + "# mine\nname: 'a'\n\ntrain:\n  epochs: 3")
    assert "  exports: [gguf]\n" in text
    assert text.count("# smaller\n") == 3
    assert re.search(r"lora:\n  rank: 4 +# smaller\n", text)
    assert re.search(r"calibration:\n    scale_steps: 0 +# smaller\n", text)


def test_an_export_that_cannot_hold_the_base_is_left_out_with_a_note(init_rows, llama):
    stretched = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    base = llama("stretched", rope_parameters=stretched)
    code, printed = init_rows(pairs(40), "--base", str(base))
    assert code == 0
    assert "init: quantize.exports: [], because GGUF cannot hold this base: gguf: this" in printed
    assert load_recipe("rows.yaml").quantize.exports == []
    Path("rows.yaml").unlink()
    code, printed = init_rows(pairs(40), "--base", str(base), "quantize.exports=[gguf]")
    assert code == 2
    assert "rotary scaling 'linear', only llama3's: remove gguf from quantize.exports" in printed


def test_rows_that_run_would_refuse_leave_no_recipe(init_rows):
    rows = [{"text": f"it is {n}", "label": "lost"} for n in range(40)]
    code, printed = init_rows(rows)
    assert code == 2
    assert "all rows have the answer 'lost'" in printed
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
    assert init_rows(rows, "evaluate.metrics=[exact_match]")[0] == 0


def test_answers_are_given_the_tokens_that_the_tokenizer_takes_for_them(init_rows):
    answer = "บัตรของฉัน"  # ten characters, each of three bytes
    rows = [{"prompt": f"Where is {n}?", "completion": answer} for n in range(40)]
    options = "--task", "chat"
    code, _ = init_rows(rows, *options)
    assert code == 0
    assert load_recipe("rows.yaml").evaluate.max_new_tokens == 30
    code, printed = init_rows(rows, *options, "--to", "other.yaml", "evaluate.max_new_tokens=9")
    assert code == 0
    assert load_recipe("other.yaml").evaluate.max_new_tokens == 9
    assert "set evaluate.max_new_tokens=30" in printed


def test_answers_get_no_more_tokens_than_the_base_has_positions_for(init_rows):
    question, answer = "open the red door " * 60, "บัตรของฉัน" * 9
    rows = [
        {"prompt": f"{question} {n}", "completion": "no"}
        if n % 2
        else {"prompt": str(n), "completion": answer}
        for n in range(80)
    ]
    code, printed = init_rows(rows, "--task", "chat")
    assert code == 0, printed
    tokens = load_recipe("rows.yaml").evaluate.max_new_tokens
    assert len(answer) // 2 < tokens < 3 * len(answer)
    assert f"answers are cut after {tokens} tokens" in printed


def test_the_system_message_asks_for_lists_as_for_objects(init_rows):
    rows = [{"text": f"it is {n}", "label": [{"at": n}]} for n in range(40)]
    assert init_rows(rows, "--completion", "label", "--prompt", "text")[0] == 0
    assert load_recipe("rows.yaml").data.system == "Answer in JSON."
    objects = [{**row, "label": row["label"][0]} for row in rows]
    options = "--completion", "label", "--prompt", "text", "--to", "other.yaml"
    assert init_rows(objects, *options)[0] == 0
    assert load_recipe("other.yaml").data.system == "Answer with one JSON object."


@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_whose_weights_are_not_there_is_refused(init_rows, llama, shards):
    base = llama("pickled", max_shard_size="1GB" if shards == 1 else "100KB")
    missing = sorted(base.glob("*.safetensors"))[-1]
    missing.rename(base / "pytorch_model.bin")
    code, printed = init_rows(pairs(40), "--base", str(base))
    assert code == 2
    words = "it has no safetensors weights" if shards == 1 else f"{missing.name} is missing"
    assert words in " ".join(printed.split())
    assert not [*Path().glob("*.yaml")]


def test_a_long_row_that_is_all_of_validation_is_named_with_a_way_out(init_rows):
    rows = pairs(6)
    rows[4]["prompt"] = "open the red door " * 400  # the seed makes this one the validation row
    code, printed = init_rows(rows)
    assert code == 2
    assert "data.validation: the only row is longer than data.max_length=512" in printed
    assert "or set data.validation_fraction=0 to split none off\n  rows.jsonl:5: " in printed
