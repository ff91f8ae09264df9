"""The tuned model in memory: peft's merge, cast, with no weight in memory twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_adapter
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finequant.quantize.merge.model import merged_model
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir

PROMPTS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_merged_model_is_pefts_in_the_shipped_dtype(llama, recipe_file, tied, kind):
    """Weights, logits and settings equal plain transformers and peft, to the bit."""
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "rope_theta": 5e5}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    base = llama("base", tie_word_embeddings=tied, attention_bias=True, rope_parameters=scaled)
    run = recipe_file.parent / "run"
    make_adapter(base, run / "adapter", use_dora=kind == "dora")
    recipe = load_recipe(recipe_file, [f"model.base={base}"])
    for dtype in (torch.bfloat16, torch.float32):
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(theirs, run / "adapter").merge_and_unload()
        theirs.save_pretrained(run / "theirs")
        theirs = AutoModelForCausalLM.from_pretrained(run / "theirs", dtype=dtype)
        ours = merged_model(recipe, RunDir(run), dtype)
        assert [name for name, _ in ours.named_parameters()] == [
            name for name, _ in theirs.named_parameters()
        ]
        for kept in ("named_parameters", "named_buffers"):
            for (name, mine), (_, other) in zip(
                getattr(ours, kept)(), getattr(theirs, kept)(), strict=True
            ):
                assert mine.dtype == other.dtype, name
                assert torch.equal(mine, other), name
        with torch.inference_mode():
            assert torch.equal(ours(PROMPTS).logits, theirs(PROMPTS).logits)
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
        assert ours.config._attn_implementation == theirs.config._attn_implementation
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
        assert ours.dtype == ours.config.dtype == dtype
        assert not ours.training


def test_a_merge_that_is_not_pefts_is_refused_on_prompts(llama, recipe_file, monkeypatch):
    from finequant.quantize.merge import adapter

    base, run = llama("base"), recipe_file.parent / "run"
    make_adapter(base, run / "adapter")
    recipe = load_recipe(recipe_file, [f"model.base={base}"])
    merged_model(recipe, RunDir(run), torch.float32, PROMPTS.tolist())
    monkeypatch.setattr(adapter, "_scaling", lambda config, layer: 1.0)
    with pytest.raises(UserError, match="merged logits differ from base"):
        merged_model(recipe, RunDir(run), torch.float32, PROMPTS.tolist())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_no_weight_is_in_memory_twice(llama, recipe_file):
    """Measures the peak of a process that loads 100 MB of bfloat16, above its memory before."""
    tiny, wide = recipe_file.parent / "tiny", recipe_file.parent / "wide"
    make_adapter(llama("tiny/base"), tiny / "adapter")
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    base = llama("wide/base", vocab_size=8192, num_hidden_layers=11, **shape)
    make_adapter(base, wide / "adapter")
    program = """
import re, sys
from pathlib import Path
import torch
from finequant.quantize.merge.model import merged_model
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir

def resident(what):
    return int(re.search(rf"{what}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def load(folder):
    recipe = load_recipe(sys.argv[1], [f"model.base={folder}/base"])
    return merged_model(recipe, RunDir(Path(folder)), torch.bfloat16)

load(sys.argv[2])  # libraries, once
Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
before = resident("VmRSS")
model = load(sys.argv[3])
print(sum(w.nbytes for w in model.parameters()), resident("VmHWM") - before)
"""
    arguments = [sys.executable, "-c", program, str(recipe_file), str(tiny), str(wide)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    assert weights > 80e6
    assert 0.9 * weights < peak < 1.15 * weights
