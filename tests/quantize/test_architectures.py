"""Qwen3, Mistral and Qwen2 through every stage, compared with transformers and peft alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import BASES, mistral, qwen3
from conftest import difference, make_recipe, refused
from outside import WITHOUT_FINEQUANT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from finequant.finetune.architecture import ARCHITECTURES, anatomy, layer_shapes, parameter_count
from finequant.finetune.model import load_config, load_tokenizer
from finequant.quantize.checkpoint.reload import shipped_logits
from finequant.quantize.checkpoint.stored import read_checkpoint
from finequant.quantize.logits import last_logits
from finequant.quantize.merge.adapter import Adapter, merged_weights, open_base
from finequant.quantize.merge.model import float_model
from finequant.quantize.methods.apply import round_model
from finequant.quantize.methods.budget import within_budget
from finequant.quantize.methods.sequences import calibration_sequences
from finequant.quantize.methods.transforms import transform_model
from finequant.quantize.scheme import layer_plan, untie_head
from finequant.quantize.write import write_quantized
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.schema import Model, Quantize

PROMPTS = [list(range(20, 60)), [5, 6, 7], [9]]
TRAIN = ("train.max_steps=3", "train.learning_rate=1e-2")
EVALUATE = ("evaluate.limit=2", "evaluate.max_new_tokens=4", "evaluate.exports=false")
CALIBRATED = "quantize.calibration={tokens: 512, length: 64%s}"
METHODS = {
    "hqq": ["quantize.method=hqq", "quantize.embedding=8"],
    "gptq": ["quantize.method=gptq", CALIBRATED % ""],
    "steps": ["quantize.method=gptq", "quantize.scale=search", CALIBRATED % ", steps: 4"],
    "budget": ["quantize.budget=6", CALIBRATED % ""],
}

CHILD = (
    WITHOUT_FINEQUANT
    + """
import torch
from pathlib import Path
from gguf import GGUFReader
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

prompts = json.loads(sys.argv[1])

@torch.inference_mode()
def logits(model):
    rows = [model.eval()(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]
    return torch.stack(rows)

for folder in map(Path, sys.argv[2:]):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    run = folder / "run"
    found = {"tuned": logits(PeftModel.from_pretrained(base, run / "adapter"))}
    for name in ("quantized", "exports/compressed-tensors"):
        model, info = AutoModelForCausalLM.from_pretrained(run / name, output_loading_info=True)
        assert not any(info.values()), (name, info)
        found[name] = logits(model)
    (file,) = (run / "exports" / "gguf").glob("*.gguf")
    reader = GGUFReader(file)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    kind = reader.fields["general.architecture"].contents()
    # transformers 5.24 does not read it of a Qwen3
    config.head_dim = reader.fields[f"{kind}.attention.key_length"].contents()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32
    )
    found["gguf"] = logits(model)
    save_file(found, folder / "logits.safetensors")
    fields = {key: field.contents() for key, field in reader.fields.items()
              if not key.startswith("tokenizer.ggml.") or key.endswith(("_id", "_token", ".pre"))}
    names = sorted(tensor.name for tensor in reader.tensors)
    (folder / "gguf.json").write_text(json.dumps([fields, names], default=str))
"""
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Maps architectures to folders with a base and a run through all stages."""
    from finequant.evaluate.compare import main as compare
    from finequant.finetune.train import main as train
    from finequant.quantize.convert import main as convert
    from finequant.quantize.export import main as export

    root, folders = tmp_path_factory.mktemp("architectures"), {}
    for name, make in BASES.items():
        folder = folders[name] = root / name
        folder.mkdir()
        arguments = [str(make_recipe(folder, make(folder / "base"))), *TRAIN, *EVALUATE]
        arguments += ["quantize.bits=8", "quantize.rotate=true"]
        train(arguments)
        convert(arguments)
        export([*arguments, "--to", "gguf", "--to", "compressed-tensors"])
        if name != "Qwen2ForCausalLM":
            compare(arguments)
    command = [sys.executable, "-P", "-c", CHILD, json.dumps(PROMPTS), *map(str, folders.values())]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return folders


@pytest.fixture(params=BASES)
def run(runs, request) -> Path:
    return runs[request.param]


@pytest.mark.slow
def test_shipped_logits_equal_those_of_transformers_and_peft(run):
    logits = load_file(run / "logits.safetensors")
    assert difference(logits["quantized"], logits["tuned"]) < 0.05  # eight bits
    assert difference(logits["exports/compressed-tensors"], logits["tuned"]) < 0.05
    assert difference(logits["gguf"], logits["tuned"]) < 0.05
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    with torch.no_grad():
        untrained = base(torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert difference(untrained, logits["tuned"][0]) > 0.05
    config = json.loads((run / "run" / "quantized" / "config.json").read_text())
    assert config["architectures"] == [run.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "MistralForCausalLM"])
def test_evaluation_ranks_base_tuned_and_quantized(runs, name):
    report = json.loads((runs[name] / "run" / "report.json").read_text())
    base, tuned, quantized = report["models"].values()
    assert tuned["perplexity"]["held_out"]["token"] < base["perplexity"]["held_out"]["token"]
    near = tuned["perplexity"]["text"]["token"]
    assert quantized["perplexity"]["text"]["token"] == pytest.approx(near, rel=0.05)


@pytest.mark.slow
def test_gguf_is_named_and_laid_out_as_llama_cpp_reads_it(run):
    fields, names = json.loads((run / "gguf.json").read_text())
    kind = {"Qwen3": "qwen3", "Qwen2": "qwen2", "Mistral": "llama"}[run.name[:-11]]
    assert fields["general.architecture"] == kind
    assert fields[f"{kind}.attention.key_length"] == (32 if kind == "qwen3" else 16)
    assert ("blk.0.attn_q_norm.weight" in names) == (kind == "qwen3")
    assert ("blk.1.attn_v.bias" in names) == (kind == "qwen2")
    ends = "</s>" if kind == "llama" else "<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(run / "run" / "quantized")
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.convert_tokens_to_ids(ends)
    assert fields["tokenizer.ggml.pre"] == ("gpt-2" if kind == "llama" else "qwen2")


@pytest.mark.slow
def test_answers_end_as_the_tokenizer_says_and_prompts_begin_so(run):
    from finequant.finetune.data.splits import load_splits
    from finequant.finetune.data.tokens import encode

    recipe = load_recipe(run / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model)
    row = encode(load_splits(recipe.data, 0).train[0], tokenizer, recipe.data)
    text = tokenizer.decode(row.input_ids)
    is_mistral = run.name.startswith("Mistral")
    assert text.startswith("<s>[INST]" if is_mistral else "<|im_start|>user")
    target = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    assert tokenizer.decode(target).rstrip().endswith("</s>" if is_mistral else "<|im_end|>")
    stops = json.loads((run / "run" / "quantized" / "generation_config.json").read_text())
    ends = stops["eos_token_id"]
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_codes_in_memory_and_reloads(run, method, tmp_path):
    recipe = load_recipe(run / "recipe.yaml", METHODS[method])
    tokenizer, base = load_tokenizer(recipe.model), open_base(recipe.model)
    weights = merged_weights(base, Adapter(run / "run" / "adapter", base, "base"))
    recipe = within_budget(recipe, weights, base.config, tokenizer, torch.float32)
    quantize, plan = recipe.quantize, layer_plan(recipe.quantize, base.config)
    sequences = calibration_sequences(recipe, tokenizer, 512)
    written = write_quantized(tmp_path, base, weights, quantize, torch.float32, sequences)
    model = float_model(base, weights, torch.float32)
    exact = last_logits(model, PROMPTS)
    untie_head(model)
    for name, rounded in round_model(model, recipe, tokenizer, torch.float32).items():
        on_disk = written.rounded(f"{name}.weight", slice(None))
        assert torch.equal(on_disk.codes, rounded.codes), name
        assert torch.equal(on_disk.scale, rounded.scale), name
    expected = shipped_logits(base.config, plan, written.weights(), torch.float32, PROMPTS, 2)
    written.finish()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(last_logits(reloaded, PROMPTS), expected)
    assert difference(expected, exact) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("learns", ["adapter", "scales"])
@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "MistralForCausalLM"])
def test_training_forward_converted_and_reloaded_are_equal(
    runs, name, learns, tmp_path, train_aware
):
    from finequant.quantize.convert import main as convert

    shutil.copytree(runs[name] / "run" / "adapter", tmp_path / "adapter")
    shutil.copy(runs[name] / "run" / "manifest.json", tmp_path)
    training = f"quantize.training={{steps: 2, learns: {learns}, distillation: 0.5}}"
    arguments = [str(runs[name] / "recipe.yaml"), *TRAIN, training, f"output_dir={tmp_path}"]
    trainer = train_aware(arguments)
    trainer.model.set_attn_implementation("sdpa")  # that of from_pretrained, to the last bit
    with torch.no_grad(), trainer.compute_loss_context_manager():
        trained = trainer.model.eval()(torch.tensor(PROMPTS[:1])).logits
    convert(arguments)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        assert torch.equal(reloaded(torch.tensor(PROMPTS[:1])).logits, trained)


@pytest.mark.parametrize("make", BASES.values())
def test_the_rotated_model_computes_the_same(tmp_path, make):
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path))
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        before = model(ids).logits
        transform_model(model, Quantize(rotate=True))
        after = model(ids).logits
    assert torch.allclose(after, before, atol=1e-4 * before.abs().max())
    kept = [weight for name, weight in model.named_parameters() if name.endswith("q_norm.weight")]
    assert all((weight != 1).all() for weight in kept)
    assert len(kept) == (2 if make is qwen3 else 0)


def test_a_window_shorter_than_the_rows_is_refused(tmp_path):
    from finequant.finetune.train import main as train

    recipe = make_recipe(tmp_path, mistral(tmp_path / "base"))
    message = refused(train, [str(recipe), "data.max_length=129"])
    assert "data.max_length: 129 tokens" in message
    assert "the sliding window" in message and "128" in message


@pytest.mark.slow
def test_exports_without_a_window_end_where_it_does(runs, tmp_path):
    """Their attention sees all tokens; beyond the window, logits were off by 45%."""
    from gguf import GGUFReader

    from finequant.quantize.formats import gguf, mlx, onnx

    run = runs["MistralForCausalLM"]
    stored, recipe = read_checkpoint(run / "run/quantized"), load_recipe(run / "recipe.yaml")
    assert stored.config.max_position_embeddings > stored.config.sliding_window == 128
    for entry in (gguf, mlx, onnx):
        (tmp_path / entry.FORMAT.name).mkdir()
        entry.write(stored, tmp_path / entry.FORMAT.name, recipe)
    fields = GGUFReader(gguf.file_in(tmp_path / "gguf")).fields
    assert fields["llama.context_length"].contents() == 128
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    assert config["max_position_embeddings"] == 128
    config = json.loads((tmp_path / "onnx/genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == 128
    prompt = list(range(5, 133))
    exact = last_logits(AutoModelForCausalLM.from_pretrained(stored.folder).eval(), [prompt])[0]
    runtime = onnx.OnnxRuntime(tmp_path / "onnx")
    assert difference(runtime.last_logits(prompt), exact) < 0.05
    with pytest.raises(Exception, match="cos_cache"):
        runtime.last_logits([*prompt, 5])


@pytest.mark.slow
def test_executorch_refuses_qwen3_and_names_its_norms(runs):
    from finequant.quantize.formats.executorch import check_fits

    contents = {name: read_checkpoint(run / "run/quantized").contents for name, run in runs.items()}
    check_fits(contents["MistralForCausalLM"]._replace(bits={}))
    with pytest.raises(
        UserError, match="Qwen3ForCausalLM has self_attn.q_norm and self_attn.k_norm"
    ):
        check_fits(contents["Qwen3ForCausalLM"])


def test_an_unknown_architecture_is_refused_with_what_is_missing(tmp_path):
    Gemma2Config(architectures=["Gemma2ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a Gemma2ForCausalLM \(gemma2\).*needs an entry in"):
        load_config(Model(base=str(tmp_path)))


@pytest.mark.slow
def test_the_skeleton_has_the_models_shapes_and_counts(runs):
    """They are those of the models themselves, biases included."""
    assert set(ARCHITECTURES) == {"LlamaForCausalLM", *BASES}
    for folder in runs.values():
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
        for name, shape in layer_shapes(model.config).items():
            assert model.get_submodule(name).weight.shape == shape
    biased = LlamaConfig(hidden_size=64, num_attention_heads=4, attention_bias=True)
    ours = anatomy(biased).inputs
    assert [shared.norm for shared in ours] == [
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    ]
    assert ours[0].layers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
