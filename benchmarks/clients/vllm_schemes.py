"""Which scheme vLLM's own configuration code picks for every layer of an export: FOLDER JOB"""

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path

with contextlib.redirect_stdout(sys.stderr):
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

config = json.loads((Path(sys.argv[1]) / "config.json").read_text())
quantization = compressed_tensors.CompressedTensorsConfig.from_config(config["quantization_config"])
quantization.packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
layers = {
    f"model.layers.{number}.{name}": kind
    for number in range(config["num_hidden_layers"])
    for name, kind in KINDS.items()
} | {"lm_head": ParallelLMHead}
schemes = Counter()
for name, kind in layers.items():
    layer = kind.__new__(kind)  # without weights: only its kind and name count
    quantization.get_quant_method(layer, name)
    scheme = getattr(layer, "scheme", None)
    schemes[f"{type(scheme).__name__}, {getattr(scheme, 'num_bits', '-')} bits"] += 1
note = "; ".join(f"{scheme}: {count} layers" for scheme, count in schemes.items())
print(json.dumps({"note": f"picks {note}, the head among them. It generates on a CPU with AVX512"}))
