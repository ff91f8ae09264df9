"""Quantizes with llm-compressor's GPTQ, as compressed-tensors, which plain transformers loads."""

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from peer import Peer
from torch.utils.data import DataLoader


def main() -> None:
    peer = Peer()
    model = peer.load()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": peer.job["group_size"], "observer": peer.settings["observer"]}
    tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights}
    if peer.settings["activations"] == "int8":
        group["input_activations"] = tokens
    batches = [
        {"input_ids": ids[None], "attention_mask": ids[None] * 0 + 1} for ids in peer.sequences
    ]
    with peer.timed():
        oneshot(
            model=model,
            dataset=DataLoader(batches, batch_size=None),
            recipe=GPTQModifier(config_groups={"group": group}),
            num_calibration_samples=len(batches),
            max_seq_length=peer.sequences.shape[1],
        )
    model.save_pretrained(peer.folder, save_compressed=True)
    peer.answer(linear=4.5, head=4.5)


if __name__ == "__main__":
    main()
