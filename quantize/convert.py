"""Merge the adapter into its base and quantize the result: adapter/ -> quantized/

python quantize/convert.py recipes/quickstart.yaml
python quantize/convert.py recipes/chat.yaml quantize.group_size=64
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.recipes.command_line import quiet_libraries, read_command_line, say
from finequant.recipes.errors import UserError, told_to_the_user
from finequant.recipes.rundir import ROUNDED, RunDir, Stopwatch
from finequant.recipes.schema import Quantize, Recipe

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finequant.quantize.rounding import Rounded
    from finequant.quantize.scheme import Plan

PROMPTS = 8
"""Prompts of the recipe's own rows on which merging and reloading are checked."""

METHODS = {"rtn": "round to nearest", "hqq": "half-quadratic (HQQ)", "gptq": "calibrated (GPTQ)"}

# Runs where finequant was never imported: what a user who downloads the model will do.
RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, prompts, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.inference_mode():
    rows = {
        name: model(ids[None]).logits[0, -1].float().clone()
        for name, ids in load_file(prompts).items()
    }
save_file(rows, logits)
"""


def main(argv: Sequence[str] | None = None) -> None:
    with told_to_the_user():
        recipe, run = read_command_line(__doc__, argv)
        quiet_libraries()
        quantize(recipe, run)


def quantize(recipe: Recipe, run: RunDir) -> None:
    """Writes `quantized/`, which plain `from_pretrained` loads, and `merged/` if asked for.

    Raises:
        UserError: for a layer plan that does not fit the model, an adapter of another base, or a
            checkpoint that does not give the same logits once reloaded.
    """
    from finequant.finetune.model import load_config, load_tokenizer
    from finequant.quantize.budget import within_budget
    from finequant.quantize.merge import merge
    from finequant.quantize.methods import round_model
    from finequant.quantize.scheme import (
        cast_weights,
        layer_plan,
        parameter_count,
        shipped_dtype,
        untie_head,
        unties_head,
    )

    watch = Stopwatch()
    config = load_config(recipe.model)
    layer_plan(recipe.quantize, config)  # refuses what does not fit before anything is loaded
    run.require("train")
    inputs = run.inputs(recipe, "quantize")
    trained = trained_codes(recipe, run)
    tokenizer = load_tokenizer(recipe.model)
    prompts = _prompts(recipe, tokenizer)
    say("quantize: merging")
    merged, difference = merge(recipe, run, prompts)
    say(f"quantize: merged = base + adapter within {difference:.1e} of the largest logit")
    dtype = shipped_dtype(recipe.quantize, config)
    if recipe.quantize.keep_merged:
        with run.writing(run.merged, recipe) as folder:
            cast_weights(deepcopy(merged), dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    planned = within_budget(recipe, merged, tokenizer, dtype)
    plan = layer_plan(planned.quantize, config)
    record = describe(planned.quantize, plan, config, bool(trained))
    say(f"quantize: {record['summary']}; {record['method']}")
    if unties_head(plan):
        untie_head(merged)
    rounded = trained or round_model(merged, planned, tokenizer, dtype)
    record["layers"] = layer_table(merged, rounded, plan)
    with run.writing(run.quantized, recipe) as folder:
        quantized = quantized_model(merged, rounded, plan, dtype)
        save(quantized, folder)
        tokenizer.save_pretrained(folder)
        text = json.dumps(record, indent=1)
        (folder / "quantization.json").write_text(text, encoding="utf-8")
        check_reload(quantized, folder, prompts)
        size = weight_bytes(folder)
    bits = 8 * size / parameter_count(config)
    say("quantize: reloaded in a fresh process, the logits are the same, bit for bit")
    say(f"quantize: {size / 1e6:.1f} MB on disk, {bits:.2f} bits for each weight of the base")
    run.record(
        recipe,
        "quantize",
        inputs,
        seconds=watch.seconds,
        merge_difference=difference,
        size_bytes=size,
        bits_per_weight=bits,
    )
    say(f"quantize: {run.quantized} written in {watch.seconds} s")


def trained_codes(recipe: Recipe, run: RunDir) -> dict[str, Rounded] | None:
    """The codes of quantization-aware training; None where the adapter was trained without.

    Raises:
        UserError: where they were trained for another scheme than the recipe's.
    """
    from safetensors import SafetensorError

    from finequant.quantize.rounding import load_rounded
    from finequant.quantize.scheme import PLAN_KEYS
    from finequant.recipes.load import read_section

    file = run.adapter / ROUNDED
    if not file.exists():
        return None
    trained = read_section(run.adapter / "recipe.yaml", "quantize", Quantize)
    then, today = trained.model_dump(), recipe.quantize.model_dump()
    for key in (*PLAN_KEYS, "dtype"):
        was, now = then[key], today[key]
        if str(was) != str(now):  # as text: the order of patterns counts
            what = f"{was}, not {now}: set quantize.{key}={was}"
            if key == "layers":
                what = "others: copy those of its recipe.yaml"
            raise UserError(
                f"quantize.{key}: the adapter in {run.adapter} was trained for {what}, "
                "or train again"
            )
    try:
        return load_rounded(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}): train again, or copy it again") from None


def describe(quantize: Quantize, plan: Plan, config: LlamaConfig, trained: bool) -> dict[str, Any]:
    """What is done to the model, for the record that ships with it."""
    from finequant.quantize.scheme import (
        EMBEDDING,
        HEAD,
        as_layers,
        bits_per_weight,
        unties_head,
    )

    linear = [scheme for name, scheme in plan.items() if scheme and name != EMBEDDING]
    bits = sorted({scheme.bits for scheme in linear})
    sizes = sorted({scheme.group_size for scheme in linear})
    head = f"int{plan[HEAD].bits}" if plan[HEAD] else "float"
    if config.tie_word_embeddings:
        head += f", {'untied from' if unties_head(plan) else 'tied to'} the embedding"
    embedding = f"int{plan[EMBEDDING].bits}, weight-only" if plan[EMBEDDING] else "float"
    return {
        "summary": f"{', '.join(f'int{number}' for number in bits)} symmetric weights in groups of "
        f"{', '.join(map(str, sizes))}, int8 asymmetric activations per token; head: {head}; "
        f"embedding: {embedding}",
        "bits": bits[0] if len(bits) == 1 else None,
        "group_size": sizes[0] if len(sizes) == 1 else None,
        "scale_dtype": quantize.scale_dtype,
        "head": head,
        "embedding": embedding,
        "bits_per_rounded_weight": round(bits_per_weight(plan, config), 4),
        "method": METHODS[quantize.method] + (", then trained" if trained else ""),
        "plan": as_layers(plan),
    }


def check_reload(quantized: LlamaForCausalLM, folder: Path, prompts: list[list[int]]) -> None:
    """Loads the folder in a process without finequant and compares logits, exactly.

    Raises:
        UserError: if loading fails or any logit differs.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from finequant.quantize.merge import last_logits

    expected = last_logits(quantized, prompts)
    exchange = folder / "reload"
    exchange.mkdir()
    rows = {f"{index:03}": torch.tensor(prompt) for index, prompt in enumerate(prompts)}
    save_file(rows, exchange / "prompts.safetensors")
    files = [str(exchange / name) for name in ("prompts.safetensors", "logits.safetensors")]
    process = subprocess.run(
        [sys.executable, "-P", "-c", RELOAD, str(folder), *files], capture_output=True, text=True
    )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{folder}: from_pretrained fails in a fresh process: {reason}")
    reloaded = load_file(files[1])
    actual = torch.stack([reloaded[name] for name in sorted(reloaded)])
    shutil.rmtree(exchange)
    if not torch.equal(actual, expected):
        worst = (actual - expected).abs().max().item()
        raise UserError(f"{folder}: reloaded logits differ by {worst}: the checkpoint is not kept")


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _prompts(recipe: Recipe, tokenizer) -> list[list[int]]:
    from finequant.finetune.data import load_splits
    from finequant.finetune.tokens import encode

    splits = load_splits(recipe.data, recipe.seed)
    rows = (splits.validation or splits.train)[:PROMPTS]
    return [encode(row, tokenizer, recipe.data).input_ids for row in rows]


def quantized_model(
    merged: LlamaForCausalLM, rounded: dict[str, Rounded], plan: Plan, dtype: torch.dtype
) -> LlamaForCausalLM:
    """The merged model with torchao's tensors in place of rounded weights; changed in place."""
    import torch
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    from finequant.quantize.scheme import EMBEDDING, cast_weights, quantization_config

    model = cast_weights(merged, dtype)
    for name, (codes, scale) in rounded.items():
        weight = IntxUnpackedToInt8Tensor(
            qdata=codes,
            scale=scale,
            zero_point=torch.zeros_like(scale, dtype=torch.int8),
            target_dtype=getattr(torch, f"int{plan[name].bits}"),
            block_size=(1, plan[name].group_size),
            dtype=dtype,
            activation_quantization=None if name == EMBEDDING else "int8_asym_per_token",
        )
        model.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    # Without a quantizer save_pretrained does not know how to write these tensors.
    config = quantization_config(plan)
    model.config.quantization_config = config
    model.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=True)
    return model.eval()


def save(quantized: LlamaForCausalLM, folder: Path) -> None:
    """Writes the checkpoint; equal models give equal files."""
    quantized.config.name_or_path = ""  # it may be a path of this machine
    quantized.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """safetensors writes the metadata in another order in each process: equal runs, equal files."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # As safetensors writes it: no spaces but at the end, non-ASCII as it is.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(text.ljust(length))


def layer_table(
    merged: LlamaForCausalLM, rounded: dict[str, Rounded], plan: Plan
) -> list[dict[str, Any]]:
    """Bits, group size and signal-to-noise ratio in dB of each layer's weights; None in float."""
    import torch

    table = []
    for name, scheme in plan.items():
        weight, ratio = merged.get_submodule(name).weight.detach(), None
        if scheme:
            ratio = snr_db(weight, rounded[name].dequantize(torch.float32))
        table.append(
            {
                "name": name,
                "shape": list(weight.shape),
                "bits": scheme and scheme.bits,
                "group_size": scheme and scheme.group_size,
                "snr_db": ratio,
            }
        )
    return table


def snr_db(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """Power of the signal over the power of the error, in decibels."""
    signal, error = signal.double(), signal.double() - approximation.double()
    power, noise = signal.square().sum().item(), error.square().sum().item()
    return round(10 * math.log10(power / noise), 2) if noise else math.inf


if __name__ == "__main__":
    main()
