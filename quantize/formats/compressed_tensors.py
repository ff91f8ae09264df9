"""quantized/ -> compressed-tensors: 4 bits a weight on disk, laid out as vLLM and transformers read
it, with activations in float (https://github.com/vllm-project/compressed-tensors, pack-quantized).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finequant.finetune.architecture import EMBEDDING, HEAD
from finequant.quantize.checkpoint.stored import QuantizedCheckpoint, copy_beside, write_config
from finequant.quantize.formats.contents import Contents, check_block
from finequant.quantize.formats.format import Format
from finequant.quantize.formats.snippet import fenced, pip_install, transformers_code
from finequant.quantize.rounding import Rounded
from finequant.recipes.artifact import files_in
from finequant.recipes.errors import UserError
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import without_bars

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

LAYOUT = "pack-quantized"
BITS = (4, 8)
"""Bits per code that divide 32; every version packs these alike."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM computes as one, with one scheme."""


def check_fits(contents: Contents) -> None:
    """Refuses what the format, or vLLM, cannot hold.

    Raises:
        UserError: for bits other than 4 and 8, a budget, which chooses from 2 to 8, layers that
            differ although vLLM fuses them, or blocks that vLLM does not compute.
    """
    check_block("compressed-tensors", "vLLM", contents.config)
    if None in contents.bits.values():
        raise UserError(
            "compressed-tensors: a budget chooses from 2 to 8 bits; expected 4 or 8: set the bits "
            "of each layer in quantize.layers, without quantize.budget, or export to gguf"
        )
    if others := sorted(contents.linear_bits() - set(BITS)):
        raise UserError(
            f"compressed-tensors: layers of {', '.join(map(str, others))} bits; expected 4 or 8: "
            "change quantize.bits, quantize.layers or quantize.budget"
        )
    for block in dict.fromkeys(name.rpartition(".")[0] for name in contents.bits):
        for fused in FUSED:
            schemes = {contents.scheme(f"{block}.{kind}") for kind in fused}
            if len(schemes) > 1:
                raise UserError(
                    f"compressed-tensors: {', '.join(fused)} of {block} differ in bits or group "
                    "size, and vLLM computes them as one: give them the same in quantize.layers"
                )


def write(stored: QuantizedCheckpoint, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Writes weights, configuration and tokenizer; returns figures for the manifest.

    Scales go into the dtype of the model, into which readers would round them anyway.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from huggingface_hub import save_torch_state_dict

    packed: dict[str, torch.Tensor] = {}
    for name, bits in _linear(stored).items():
        codes, scale = stored.rounded[name]
        packed[f"{name}.weight_packed"] = pack_to_int32(codes, bits)
        packed[f"{name}.weight_scale"] = _rounded_scale(scale, stored.dtype)
        packed[f"{name}.weight_shape"] = torch.tensor(codes.shape)
    floats = dict(stored.floats)
    if EMBEDDING in stored.rounded:  # embeddings cannot be packed: it gets the same values in float
        floats[f"{EMBEDDING}.weight"] = stored.rounded[EMBEDDING].dequantize(stored.dtype)
    save_torch_state_dict(packed | floats, folder)
    write_config(stored, folder, {"quantization_config": quantization_config(stored)})
    copy_beside(stored, folder)
    weights = sum(stored.rounded[name].codes.numel() for name in _linear(stored))
    return {"bits_per_rounded_weight": 8 * sum(t.nbytes for t in packed.values()) / weights}


def _rounded_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds the scales as `from_pretrained` and vLLM will; float32 holds them as they are."""
    return scale.contiguous() if dtype == torch.float32 else scale.to(dtype)


def quantization_config(stored: QuantizedCheckpoint) -> dict[str, Any]:
    """Makes the entry of config.json: one scheme for all linear layers, or schemes with lists of
    layers.

    Activations stay in float, because vLLM has no scheme for 4-bit groups with the asymmetric int8
    activations of quantized/. The head is listed by name, because its class in vLLM is not Linear.
    """
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    schemes: dict[tuple[int, int], list[str]] = {}
    linear = _linear(stored)
    for name, bits in linear.items():
        schemes.setdefault((bits, stored.group_size(name)), []).append(name)
    ignored = [HEAD] if HEAD not in linear else []
    ignored += [
        name.removesuffix(".weight") for name in stored.floats if name.endswith("_proj.weight")
    ]
    groups = {}
    for number, ((bits, group_size), names) in enumerate(schemes.items()):
        layers = [name for name in names if name != HEAD] if len(schemes) > 1 else ["Linear"]
        groups[f"group_{number}"] = QuantizationScheme(
            targets=["re:.*lm_head"] * (HEAD in names) + layers,
            weights=_weights(bits, group_size),
            format=LAYOUT,  # else compressed-tensors infers a different one from the scheme
        )
    config = QuantizationConfig(
        config_groups=groups, format=LAYOUT, quantization_status="compressed", ignore=ignored
    )
    return config.model_dump(mode="json")


def _weights(bits: int, group_size: int) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group_size
    )


def read_back(
    folder: Path, stored: QuantizedCheckpoint
) -> Iterator[tuple[str, Rounded | torch.Tensor]]:
    """Yields codes and scales, unpacked by the format's own package, and tensors in float.

    A quantized embedding is in float in the file; it gets the codes of `stored` if it equals them.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}  # mapped, not read
    for file in files_in(folder, "*.safetensors"):
        tensors |= load_file(file)
    end = ".weight_packed"
    for name in [key.removesuffix(end) for key in tensors if key.endswith(end)]:
        words, shape, scale = (
            tensors.pop(f"{name}.weight_{part}") for part in ("packed", "shape", "scale")
        )
        bits = 32 * words.shape[1] // int(shape[1])
        yield name, Rounded(unpack_from_int32(words, bits, shape), scale)
    for name, tensor in tensors.items():
        embedding = stored.rounded.get(EMBEDDING) if name == f"{EMBEDDING}.weight" else None
        if embedding and tensor.equal(embedding.dequantize(stored.dtype)):
            yield EMBEDDING, embedding
        else:
            yield name, tensor


class Transformers:
    """A checkpoint that plain from_pretrained loads, with a cache of one sequence."""

    @without_bars()
    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._cache = DynamicCache(config=self._model.config)

    @without_bars()  # the first call unpacks the codes
    @torch.inference_mode()
    def last_logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        if beyond := self._cache.get_seq_length() - start:
            self._cache.crop(-beyond)
        # By position: transformers 5.24 renamed the argument, and 5.40 drops the earlier name.
        output = self._model(
            torch.tensor([ids]), None, None, self._cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1].float()


def snippet(repository: str, chat: str, files: list[str]) -> str:
    """Writes how to load the export with transformers, and how to serve it with vLLM."""
    model = 'AutoModelForCausalLM.from_pretrained(\n    "{}", subfolder="compressed-tensors"\n)'
    code = fenced("python", transformers_code(repository, chat, model))
    return (
        "### compressed-tensors, packed\n\n"
        f"`{pip_install('transformers', 'compressed-tensors')}`\n\n{code}\n\n"
        "Activations stay in float there (vLLM calls this W4A16, or W8A16 for layers of 8 bits). "
        "With vLLM, 0.32 or newer:\n\n"
        + fenced(
            "bash",
            f'hf download {repository} --include "compressed-tensors/*" --local-dir model\n'
            "vllm serve model/compressed-tensors",
        )
        + "\n\nBy default, vLLM samples: for greedy answers, as above, send requests with "
        '`"temperature": 0`.'
    )


def _linear(stored: QuantizedCheckpoint) -> dict[str, int]:
    return {name: bits for name, bits in stored.bits.items() if name != EMBEDDING}


FORMAT = Format(
    name="compressed-tensors",
    report_key="compressed-tensors",
    packages={"compressed_tensors": "compressed-tensors"},
    check_fits=check_fits,
    write=write,
    read_back=read_back,
    snippet=snippet,
    bytes_per_weight=3.0,
    runtime=lambda folder, context: Transformers(folder),
    weights="*.safetensors",
    runtime_packages={"compressed_tensors": "compressed-tensors"},
    activations="float",
    is_checkpoint=True,
)
