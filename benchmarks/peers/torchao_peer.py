"""Rounds to nearest with torchao, as torchtune and Unsloth convert a model after training."""

import torch
from peer import Peer
from torchao.quantization import Int8DynamicActivationIntxWeightConfig
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, TorchAoConfig


def main() -> None:
    peer = Peer()
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(peer.job["group_size"])
    )
    # Without this list, transformers would leave the head in float.
    settings = TorchAoConfig(config, modules_to_not_convert=[])
    untied = peer.untied()
    with peer.timed():
        model = AutoModelForCausalLM.from_pretrained(
            untied, quantization_config=settings, dtype=torch.float32
        )
    model.save_pretrained(peer.folder)
    peer.answer(linear=4.5, head=4.5)


if __name__ == "__main__":
    main()
