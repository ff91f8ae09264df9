"""`finequant chat`: the answers of a run's models through the command."""

from __future__ import annotations

import io
import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import Output


@pytest.fixture
def ask(here, monkeypatch):
    """Runs `finequant chat` with typed input."""

    def run(*arguments: object, typed: str = "") -> Output:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return here("chat", *map(str, arguments), "--max-new-tokens", "4")

    return run


@pytest.fixture
def quantized_run(recipe_file, train_once):
    """A run directory with adapter and quantized model."""
    from finequant.quantize.convert import main as convert

    for stage in (train_once, convert):
        stage([str(recipe_file), "train.max_steps=2", "train.learning_rate=1e-2"])
    return recipe_file.parent / "run"


@pytest.mark.slow
def test_a_prompt_shows_every_models_answer_and_no_prompt_starts_a_conversation(
    quantized_run, recipe_file, ask
):
    answers = ask(quantized_run, "--prompt", "open the red door")
    assert answers.returncode == 0, answers.stderr
    for name in ("base", "tuned", "quantized"):
        assert name in answers.stdout
    assert answers.stdout.count("tokens/s") == 3
    alone = ask(recipe_file, "--model", "base", "--prompt", "open the red door")
    assert alone.stdout.count("tokens/s") == 1
    talk = ask(quantized_run, typed="open the door\n/new\n/nwe\nclose it\n/quit\nnot read\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stderr.count("chat: a new conversation") == 1
    assert talk.stderr.count("/help shows this again") == 2  # at the start, and for /nwe
    assert talk.stderr.count("tokens/s") == 2


def test_a_streamed_answer_is_the_greedy_one(tiny_base, recipe_file):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finequant.evaluate.chat import transformers_chat_model
    from finequant.recipes.load import load_recipe

    model, tokenizer = (
        kind.from_pretrained(tiny_base) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    model.generation_config.num_beams = 2  # as in a base made for translation
    messages = [{"role": "user", "content": "paint the green lamp"}]
    written: list[str] = []
    respond = transformers_chat_model(model.eval(), tokenizer, load_recipe(recipe_file), "base")
    answer = respond(messages, 8, written.append)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=8, do_sample=False, num_beams=1)
    expected = output[0, ids["input_ids"].shape[1] :]
    assert answer.tokens == len(expected)
    assert "".join(written).strip() == answer.text
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True).strip()


def described(recipe, tokenizer):
    """Returns what `chat.describe` reads of a run without quantized/."""
    from finequant.evaluate.chat import Described
    from finequant.finetune.data.turns import generation_config
    from finequant.finetune.model import load_config

    generation = generation_config(recipe.model, recipe.data, tokenizer)
    return Described(tokenizer, load_config(recipe.model), generation)


def test_an_exports_answer_is_streamed_in_whole_letters(recipe_file, tokenizer, monkeypatch):
    """The tokenizer has no token for these: each of their bytes is one."""
    import torch

    from finequant.evaluate import chat
    from finequant.recipes.load import load_recipe

    text = " 42 \u20ac, \u65e5\u672c \U0001f389!"
    script = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert len(script) > len(text)
    recipe, spoken = load_recipe(recipe_file), iter(script)
    rows = torch.eye(len(tokenizer))
    runtime = SimpleNamespace(last_logits=lambda ids, start=0: rows[next(spoken)])
    entry = SimpleNamespace(
        name="gguf", missing_runtime=lambda: None, open_runtime=lambda folder, context: runtime
    )
    monkeypatch.setattr(chat, "exports_with_a_runtime", lambda: {"gguf": entry})
    run = SimpleNamespace(exports=recipe_file.parent, manifest=lambda: {"gguf": {}})
    written: list[str] = []
    respond = chat.load_export("gguf", recipe, run, described(recipe, tokenizer))
    answer = respond([{"role": "user", "content": "How much?"}], 64, written.append)
    assert "".join(written) == text
    assert len(list(filter(None, written))) > 1
    assert answer.text == text.strip()


def test_without_a_chat_template_a_text_is_continued(recipe_file, llama, ask):
    """A base that training on texts starts from: its tokenizer writes BOS in front of a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = llama("texts")
    (base / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    tokenizer.save_pretrained(base)
    inputs = AutoTokenizer.from_pretrained(base)("open the red", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == bos[1]
    model = AutoModelForCausalLM.from_pretrained(base)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    talk = ask(recipe_file, f"model.base={base}", "--model", "base", typed="open the red\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.strip() == expected.strip()
    assert "the base has no chat template: each line is a text that it continues" in talk.stderr


def test_files_that_a_runtime_cannot_open_are_named(recipe_file, tokenizer, monkeypatch):
    from finequant.evaluate import chat
    from finequant.quantize.formats.formats import FORMATS
    from finequant.recipes.errors import UserError
    from finequant.recipes.load import load_recipe

    monkeypatch.setattr(chat, "exports_with_a_runtime", lambda: {"onnx": FORMATS["onnx"]})
    folder = recipe_file.parent / "onnx"
    folder.mkdir()
    (folder / "model_q4.onnx").write_bytes(b"a download that broke off")
    run = SimpleNamespace(exports=recipe_file.parent, manifest=lambda: {"onnx": {}})
    recipe = load_recipe(recipe_file)
    for _ in range(2):
        with pytest.raises(UserError, match="onnx: .*onnx cannot be opened .*: run `finequant exp"):
            chat.load_export("onnx", recipe, run, described(recipe, tokenizer))
        (folder / "model_q4.onnx").unlink(missing_ok=True)


def test_a_run_whose_base_and_data_are_gone_still_chats(quantized_run, recipe_file, tmp_path, ask):
    """As where a run directory was copied to, or downloaded."""
    asked = ("--model", "quantized", "--prompt", "open the red door")
    expected = ask(quantized_run, *asked)
    assert expected.returncode == 0, expected.stderr
    moved = tmp_path / "another machine" / "[1] #run"
    moved.parent.mkdir()
    content = (quantized_run / "recipe.yaml").read_text(encoding="utf-8")
    assert "base: /" not in content  # relative to the run, so that it is nowhere here
    quantized_run.rename(moved)
    shutil.rmtree(moved / "data")
    alone, all_models = ask(moved, *asked), ask(moved, "--prompt", "open the red door")
    assert alone.returncode == 0, alone.stderr
    assert answer_in(alone) == answer_in(expected)
    assert answer_in(all_models) == answer_in(expected)
    for name in ("base", "tuned"):
        assert f"chat: {name}: skipped: model.base: " in all_models.stderr
        refused = ask(moved, "--model", name, "--prompt", "open the red door")
        assert (refused.returncode, "is not a model folder" in refused.stderr) == (2, True)
    shutil.rmtree(moved / "adapter")
    assert answer_in(ask(moved, *asked)) == answer_in(expected)


def answer_in(output: Output) -> str:
    """Returns the answer of the only model in a table."""
    assert output.stdout.count("tokens/s") == 1
    return output.stdout.splitlines()[-2].strip("│ ")


def test_a_model_that_cannot_be_used_does_not_silence_the_others(recipe_file, train_once, ask):
    train_once([str(recipe_file), "train.max_steps=1"])
    export = recipe_file.parent / "run" / "exports" / "onnx"
    export.mkdir(parents=True)
    (export / "model_q4.onnx").write_bytes(b"a download that broke off")
    asked = ask(recipe_file, "train.max_steps=1", "--prompt", "open the red door")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.count("tokens/s") == 2
    assert f"chat: onnx: skipped: {export} cannot be opened" in asked.stderr


def test_exports_answer_as_quantized_is_configured_to(quantized_run, recipe_file, monkeypatch):
    from finequant.evaluate import chat
    from finequant.evaluate.metrics import exports
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    file = quantized_run / "quantized" / "generation_config.json"
    written = {"repetition_penalty": 1.5, "eos_token_id": [7, 9]}
    file.write_text(json.dumps(written), encoding="utf-8")
    entry = SimpleNamespace(name="gguf", missing_runtime=lambda: None, open_runtime=lambda *_: None)
    monkeypatch.setattr(chat, "exports_with_a_runtime", lambda: {"gguf": entry})
    used = []
    monkeypatch.setattr(exports, "greedy_tokens", lambda *of: used.append(of[2:]) or iter(()))
    recipe, run = load_recipe(recipe_file), RunDir(quantized_run)
    monkeypatch.setattr(RunDir, "manifest", lambda _: {"gguf": {}})
    respond = chat.load_export("gguf", recipe, run, chat.describe("gguf", recipe, run))
    respond([{"role": "user", "content": "How much?"}], 64, print)
    material = SimpleNamespace(tokenizer=None, prompts=[[5]], references=["x"], groups=[0])
    material.tokenizer = chat.describe("gguf", recipe, run).tokenizer
    exports._held_out("gguf", None, recipe, run, material)
    assert used == [([7, 9], 64, 1.5), ([7, 9], 8, 1.5)]


def test_a_missing_model_names_the_command_that_makes_it(recipe_file, tmp_path, ask):
    missing = ask(recipe_file, "--model", "gguf", "--prompt", "hello")
    assert missing.returncode == 2
    assert "gguf: not exported: run `finequant export RECIPE --to gguf` first" in missing.stderr
    early = ask(recipe_file, "--prompt", "hello", "--model", "quantized")
    assert early.returncode == 2
    assert "only `finequant train RECIPE`, first" in early.stderr
    (tmp_path / "empty").mkdir()
    nowhere = ask(tmp_path / "empty")
    assert nowhere.returncode == 2
    assert "not a run directory" in nowhere.stderr


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_question_that_is_not_utf_8_is_refused(recipe_file, ask, here, monkeypatch, errors):
    """Locales differ in what Python makes of such bytes: an error, or surrogates."""
    from finequant.evaluate import chat

    monkeypatch.setattr(chat, "load_chat_model", lambda *_: None)
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), "utf-8", errors)
    monkeypatch.setattr("sys.stdin", typed)
    for arguments in ([], ["--prompt", "\udcff"]):
        asked = here("chat", str(recipe_file), "--model", "base", *arguments)
        assert asked.returncode == 2, asked.stderr
        assert asked.stderr.endswith(f"error: {chat.NOT_UTF8}\n")


def test_an_unknown_model_name_is_refused(recipe_file, tmp_path):
    from finequant.evaluate.chat import check_made
    from finequant.recipes.errors import UserError
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    recipe = load_recipe(recipe_file)
    for name in ("quantised", "compressed-tensors"):  # the latter answers as quantized does
        with pytest.raises(UserError, match=f"--model: '{name}': expected base, .*, gguf, pte"):
            check_made(name, recipe, RunDir(tmp_path))


def test_an_export_answers_within_its_cache(executorch_run, here):
    """The cache of this .pte holds 320 tokens."""
    run = executorch_run / "run"
    options = ("--model", "pte", "--max-new-tokens", "200", "--prompt")
    cut = here("chat", str(run), *options, "open " * 80)
    assert cut.returncode == 0, cut.stderr
    assert "chat: pte: the cache holds 320 tokens: the answer has at most" in cut.stderr
    full = here("chat", str(run), *options, "open " * 120)
    assert full.returncode == 2, full.stderr
    assert "tokens, but the cache holds 320, the answer included: begin a new one" in full.stderr


def test_a_model_answers_within_the_positions_of_the_base(recipe_file, here):
    """Beyond them, here 512, transformers would go on."""
    options = ("--model", "base", "--max-new-tokens", "200", "--prompt")
    cut = here("chat", str(recipe_file), *options, "open " * 160)
    assert cut.returncode == 0, cut.stderr
    assert "chat: base: the base reads at most 512 tokens: the answer has at most" in cut.stderr
    full = here("chat", str(recipe_file), *options, "open " * 260)
    assert full.returncode == 2, full.stderr
    assert "tokens, but the base reads at most 512, the answer included: begin a new" in full.stderr
