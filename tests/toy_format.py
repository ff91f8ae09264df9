"""A format in one file, like those in quantize/formats/: codes and scales as plain safetensors."""

from __future__ import annotations

import shutil

from safetensors.torch import load_file, save_file

from finequant.quantize.formats.format import Format
from finequant.quantize.rounding import Rounded
from finequant.recipes.errors import UserError

FILE = "model.safetensors"


def check_fits(contents):
    if wide := sorted(bits for bits in contents.linear_bits() if bits > 4):
        raise UserError(f"toy: layers of {wide[0]} bits; expected at most 4: set quantize.bits=4")


def write(stored, folder, recipe):
    codes = {f"{name}.codes": rounded.codes for name, rounded in stored.rounded.items()}
    scales = {f"{name}.scale": rounded.scale for name, rounded in stored.rounded.items()}
    save_file(codes | scales | stored.floats, folder / FILE)
    shutil.copy2(stored.folder / "config.json", folder)
    return {"coded_layers": len(codes)}


def read_back(folder, stored):
    tensors = load_file(folder / FILE)
    parts = ("codes", "scale")
    for name in [key.removesuffix(".codes") for key in tensors if key.endswith(".codes")]:
        yield name, Rounded(*(tensors.pop(f"{name}.{part}") for part in parts))
    yield from tensors.items()


def last_logits(folder, prompts):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = dict(read_back(folder, None))
    for name in [name for name, part in tensors.items() if isinstance(part, Rounded)]:
        codes, scale = tensors.pop(name)
        weight = codes.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]
        tensors[f"{name}.weight"] = weight.flatten(1)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).eval()
    model.load_state_dict(tensors)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[:, -1] for ids in prompts])


def snippet(repository, chat, files):
    return f"### toy\n\n`hf download {repository} {' '.join(files)}`"


FORMAT = Format(
    name="toy",
    report_key="toy",
    packages={},
    check_fits=check_fits,
    write=write,
    read_back=read_back,
    snippet=snippet,
    bytes_per_weight=8,
    last_logits=last_logits,
    activations="float",
)
