"""Quantizes with finequant, by the functions that its stage quantize calls, without an adapter."""

from pathlib import Path

import torch
from peer import Peer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finequant.quantize.merge.adapter import open_base
from finequant.quantize.methods.transforms import transformed
from finequant.quantize.write import write_quantized
from finequant.recipes.load import load_recipe


def main() -> None:
    peer = Peer()
    keys = ["scale_dtype=bfloat16", "dtype=float32", *peer.settings["keys"]]
    overrides = [f"model.base={peer.job['base']}", *(f"quantize.{key}" for key in keys)]
    recipe = load_recipe(peer.job["recipe"], overrides)
    base, quantize = open_base(recipe.model), recipe.quantize
    with peer.timed():
        weights = transformed(base.weights, base.config, quantize)
        peer.folder.mkdir()
        write_quantized(
            peer.folder, base, weights, quantize, torch.float32, peer.sequences
        ).finish()
    round_floats(peer.folder / "model.safetensors")
    peer.answer(linear=4.5, head=4.5)


def round_floats(file: Path) -> None:
    """Rounds embedding and norms to bfloat16, in which they ship.

    With `dtype=bfloat16` the stage would do so itself, but also calibrate for arithmetic in
    bfloat16, which this processor only emulates: all tools' results are measured in float32.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "norm" in name or "embed_tokens" in name:
            tensors[name] = tensor.bfloat16().float()
    save_file(tensors, file, metadata)


if __name__ == "__main__":
    main()
