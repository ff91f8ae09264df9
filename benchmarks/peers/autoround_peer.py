"""Quantizes with AutoRound, which trains each block's rounding to reproduce its float outputs."""

from auto_round import AutoRound
from peer import Peer
from transformers import AutoTokenizer


def main() -> None:
    peer = Peer()
    model, settings = peer.load(), peer.settings
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(peer.job["base"]),
        scheme="W4A16",
        group_size=peer.job["group_size"],
        sym=True,
        quant_lm_head=True,
        dataset=list(peer.sequences.split(1)),
        nsamples=len(peer.sequences),
        seqlen=peer.sequences.shape[1],
        iters=settings["iterations"],
        batch_size=settings["batch_size"],
        device_map="cpu",
        enable_torch_compile=False,
    )
    with peer.timed():
        model, _ = rounding.quantize()
    model.save_pretrained(peer.folder)
    peer.answer(linear=4.5, head=4.5)


if __name__ == "__main__":
    main()
