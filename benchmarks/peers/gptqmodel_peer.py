"""Quantizes with GPTQModel's GPTQ; the dequantized weights go back into the base."""

import os

# On two cores, GPTQModel starts one worker for the CPU, and then requires two.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQConfig, GPTQModel  # noqa: E402
from peer import Peer  # noqa: E402


def main() -> None:
    peer = Peer()
    model = peer.load()
    config = GPTQConfig(
        bits=4,
        group_size=peer.job["group_size"],
        sym=True,
        lm_head=True,
        offload_to_disk=False,
        **peer.settings["options"],
    )
    folder = peer.untied()
    # Its default is bfloat16, which this processor only emulates.
    quantizer = GPTQModel.load(
        str(folder), config, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float32
    )
    batches = [
        {"input_ids": ids[None], "attention_mask": ids[None] * 0 + 1} for ids in peer.sequences
    ]
    with peer.timed():
        quantizer.quantize(batches, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    # In memory the zero points are off by one, as in files of its format; loading adds the one.
    quantizer.save(str(folder / "packed"))
    packed = GPTQModel.load(str(folder / "packed"), device="cpu", backend=BACKEND.GPTQ_TORCH)
    layers = dict(packed.model.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data.copy_(layers[name].dequantize_weight().T)
    model.save_pretrained(peer.folder)
    peer.answer(linear=4.5, head=4.5)


if __name__ == "__main__":
    main()
