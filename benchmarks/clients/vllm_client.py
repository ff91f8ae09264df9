"""Runs a compressed-tensors export in vLLM: FOLDER JOB

Names the schemes that vLLM picks for the layers and, if it has kernels for this processor, answers.
"""

import contextlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

with contextlib.redirect_stdout(sys.stderr):
    import client
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.llama import LlamaForCausalLM

KINDS = {
    "self_attn.qkv_proj": linear.QKVParallelLinear,
    "self_attn.o_proj": linear.RowParallelLinear,
    "mlp.gate_up_proj": linear.MergedColumnParallelLinear,
    "mlp.down_proj": linear.RowParallelLinear,
}


def schemes(folder: Path) -> Counter[str]:
    """Counts the schemes that vLLM's own code picks for the layers, from the real config.json."""
    config = json.loads((folder / "config.json").read_text())
    quantization = compressed_tensors.CompressedTensorsConfig.from_config(
        config["quantization_config"]
    )
    quantization.packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
    layers = {
        f"model.layers.{number}.{name}": kind
        for number in range(config["num_hidden_layers"])
        for name, kind in KINDS.items()
    } | {"lm_head": ParallelLMHead}
    counts = Counter()
    for name, kind in layers.items():
        layer = kind.__new__(kind)  # without weights: only its kind and name matter
        quantization.get_quant_method(layer, name)
        scheme = getattr(layer, "scheme", None)
        counts[f"{type(scheme).__name__}, {getattr(scheme, 'num_bits', '-')} bits"] += 1
    return counts


def answers(folder: Path, job: dict) -> dict:
    """Returns token ids and greedy answers, with their time and memory."""
    longest = max(map(len, job["prompts"])) + job["max_new_tokens"]
    model = LLM(str(folder), max_model_len=longest, max_num_seqs=1, enforce_eager=True)
    tokenizer = model.get_tokenizer()
    greedy = SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
    started = time.perf_counter()
    outputs = [
        model.generate(TokensPrompt(prompt_token_ids=prompt), greedy, use_tqdm=False)[0]
        for prompt in job["prompts"]
    ]
    return {
        "texts": [tokenizer.encode(text, add_special_tokens=False) for text in job["texts"]],
        "prompts": [
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            for messages in job["messages"]
        ],
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "decoding_seconds": time.perf_counter() - started,
        "peak_memory_bytes": client.peak_memory(),
    }


folder, job = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
counts = schemes(folder)
listed = "; ".join(f"{scheme}: {count} layers" for scheme, count in counts.items())
results = {"note": f"picks {listed}, including the head"}
with contextlib.redirect_stdout(sys.stderr):
    try:
        results |= answers(folder, job)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if "http" not in line]
        message = " ".join(filter(None, lines))[:400]
        results["note"] += f"; does not generate here: `{type(error).__name__}: {message}`"
print(json.dumps(results))
