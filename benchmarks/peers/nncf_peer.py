"""Quantizes an OpenVINO model of the base with NNCF; decompressed weights go back into the base."""

import nncf
import openvino
import torch
from peer import Peer


class Logits(torch.nn.Module):
    """The model as a function of token ids alone, which OpenVINO can trace."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(input_ids.shape[1], input_ids.shape[1])
        mask = torch.triu(ones * torch.finfo(torch.float32).min, 1)[None, None]
        return self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


def decompressed(model: openvino.Model) -> dict[str, torch.Tensor]:
    """Computes, by layer, the weights that the matrix products of linear layers read."""
    weights = {}
    for node in model.get_ops():
        if node.get_type_name() == "MatMul" and "/aten::linear" in node.get_friendly_name():
            name = node.get_friendly_name().split("/")[0].removeprefix("__module.model.")
            source = openvino.Model([node.input_value(1)], [])
            values = next(iter(openvino.compile_model(source, "CPU")([]).values()))
            weights[name] = torch.tensor(values)
    return weights


def main() -> None:
    peer = Peer()
    model = peer.load()
    example = {"input_ids": peer.sequences[:1]}
    converted = openvino.convert_model(Logits(model), example_input=example)
    batches = [{"input_ids": ids[None].numpy()} for ids in peer.sequences]
    with peer.timed():
        compressed = nncf.compress_weights(
            converted,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=peer.job["group_size"],
            ratio=1.0,
            all_layers=True,  # the head, too
            ignored_scope=nncf.IgnoredScope(patterns=[".*embed_tokens.*"]),
            dataset=nncf.Dataset(batches),
            subset_size=len(batches),
            **peer.settings["options"],
        )
    weights = decompressed(compressed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, layer in layers.items():
        layer.weight.data.copy_(weights[name])
    model.save_pretrained(peer.folder)
    peer.answer(linear=4.5, head=4.5)


if __name__ == "__main__":
    main()
