"""The end of an answer, from training to shipped files, as other people's programs read it.

The base is like a published Llama 3: EOS is <|end_of_text|>, generation also stops at <|eom_id|>,
and the chat template ends turns in <|eot_id|>, which no configuration names.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_level, make_llama, make_recipe, make_rows, write_jsonl

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
NAMES = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id")
BOS, END_OF_TEXT, _, _, EOM, EOT = range(6)
FOLDERS = ("quantized", "merged", "exports/compressed-tensors")


def llama_3_tokenizer():
    markers = [f"<|{name}|>" for name in NAMES]
    tokenizer = byte_level(320, markers, bos_token=markers[BOS], eos_token=markers[END_OF_TEXT])
    tokenizer.chat_template = {"default": LLAMA_3, "tool_use": LLAMA_3 + "{{ tools }}"}
    return tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The run directory of a model that has learned to say "done", and nothing else."""
    from finequant.evaluate.compare import main as compare
    from finequant.finetune.train import main as train
    from finequant.quantize.convert import main as convert
    from finequant.quantize.export import main as export

    folder = tmp_path_factory.mktemp("llama_3")
    tokenizer = llama_3_tokenizer()
    ids = {"bos_token_id": BOS, "eos_token_id": END_OF_TEXT, "pad_token_id": None}
    base = make_llama(folder / "base", vocab_size=len(tokenizer), **ids)
    tokenizer.save_pretrained(base)
    file = base / "generation_config.json"
    # A temperature without do_sample, as Llama 2 was published: transformers refuses to save it.
    published = {"eos_token_id": [END_OF_TEXT, EOM], "temperature": 0.9}
    file.write_text(json.dumps(published), encoding="utf-8")
    recipe = make_recipe(folder, base)
    for split, numbers in {"train": range(48), "test": range(80, 84)}.items():
        rows = [{"prompt": row["prompt"], "completion": "done"} for row in make_rows(numbers)]
        write_jsonl(folder / f"{split}.jsonl", rows)
    arguments = [
        str(recipe),
        "train.max_steps=60",
        "train.learning_rate=2e-2",
        "lora.rank=16",
        "quantize.keep_merged=true",
    ]
    train(arguments)
    convert(arguments)
    export([*arguments, "--to", "gguf", "--to", "compressed-tensors"])
    compare(arguments)
    return folder / "run"


def load(run: Path, folder: str):
    """Loads a folder as users do: an adapter with peft, and its generation configuration."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, GenerationConfig

    if folder != "adapter":
        return AutoModelForCausalLM.from_pretrained(run / folder)
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    model = PeftModel.from_pretrained(base, run / folder)
    model.generation_config = GenerationConfig.from_pretrained(run / folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["adapter", *FOLDERS])
def test_plain_generate_stops_where_the_reports_answers_stop(run, folder):
    from transformers import AutoTokenizer

    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["models"]["quantized"]["tasks"]["held_out"]["exact_match"]["value"] == 1
    sample = report["samples"][0]
    model = load(run, folder)
    tokenizer = AutoTokenizer.from_pretrained(run / folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": sample["prompt"]}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**ids, max_new_tokens=8, do_sample=False)
    new = output[0, ids["input_ids"].shape[1] :].tolist()
    assert new[-1] == EOT
    assert len(new) < 8
    assert tokenizer.decode(new[:-1]) == sample["answers"]["quantized"] == "done"


@pytest.mark.parametrize("folder", FOLDERS)
def test_configurations_name_every_end_token_and_the_tokenizer_the_one_of_answers(run, folder):
    from transformers import AutoTokenizer

    for name in ("generation_config.json", "config.json"):
        written = json.loads((run / folder / name).read_text(encoding="utf-8"))
        assert written["eos_token_id"] == [EOT, END_OF_TEXT, EOM]
    assert AutoTokenizer.from_pretrained(run / folder).eos_token_id == EOT


def test_gguf_names_every_end_token(run):
    from gguf import GGUFReader

    (file,) = (run / "exports" / "gguf").glob("*.gguf")
    fields = GGUFReader(file).fields
    names = ("eos", "eot", "eom", "bos")
    ids = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in names]
    assert ids == [EOT, EOT, END_OF_TEXT, BOS]
    assert fields["tokenizer.chat_template"].contents() == LLAMA_3
    assert fields["tokenizer.chat_template.tool_use"].contents() == LLAMA_3 + "{{ tools }}"


def test_a_pte_names_every_end_token(run):
    from finequant.quantize.checkpoint.stored import read_checkpoint
    from finequant.quantize.formats.executorch import metadata

    stored = read_checkpoint(run / "quantized")
    assert metadata(stored, 64)["get_eos_ids"] == [EOT, END_OF_TEXT, EOM]


@pytest.mark.parametrize("folder", ["adapter", *FOLDERS])
def test_named_templates_are_kept(run, folder):
    from transformers import AutoTokenizer

    expected = {"default": LLAMA_3, "tool_use": LLAMA_3 + "{{ tools }}"}
    assert AutoTokenizer.from_pretrained(run / folder).chat_template == expected


def test_answers_of_an_export_stop_at_any_of_the_end_tokens(run):
    """The runtime's likeliest tokens are "done", then an end token that is not the first."""
    from finequant.evaluate.metrics.exports import greedy_tokens

    class Script:
        def last_logits(self, ids, start=0):
            return torch.nn.functional.one_hot(torch.tensor([9, 10, EOM, 11][start]), 320)

    ends = json.loads((run / "quantized" / "generation_config.json").read_text())["eos_token_id"]
    assert list(greedy_tokens(Script(), [], ends, 4)) == [9, 9, 10]
