"""Rounding to nearest by torchao, as what torchtune and Unsloth convert to after training."""

import torch
from peer import Peer
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import TorchAoConfig


def main() -> None:
    peer = Peer()
    model = peer.load()
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(peer.job["group_size"])
    )
    with peer.timed():
        quantize_(model, config)
    settings = TorchAoConfig(config, include_input_output_embeddings=True)
    model.config.quantization_config = settings
    model.save_pretrained(peer.folder)
    peer.answer(linear=4.5, head=4.5)


if __name__ == "__main__":
    main()
