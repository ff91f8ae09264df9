"""finequant's stage quantize on the base itself, through the functions that the stage calls."""

import torch
from peer import Peer

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
    peer.answer(linear=4.5, head=4.5)


if __name__ == "__main__":
    main()
