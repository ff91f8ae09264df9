"""LoRA's fused product equals peft's."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finequant.finetune.lora import FusedLora, fuse


def lora_model(folder, **changes):
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def fused_layers(model):
    return [module for module in model.modules() if isinstance(module, FusedLora)]


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_logits_and_gradients_are_those_of_peft(tiny_base, rank_stabilized):
    usual = lora_model(tiny_base, use_rslora=rank_stabilized)
    fused = copy.deepcopy(usual)
    fuse(fused)
    assert len(fused_layers(fused)) == 14
    ids = torch.arange(40).view(2, 20)
    logits = [model(ids).logits for model in (usual, fused)]
    torch.testing.assert_close(*logits)
    for some in logits:
        some.square().sum().backward()
    for one, other in zip(usual.parameters(), fused.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad.abs().max() > 0
            # The order of the sums depends on the number of threads.
            torch.testing.assert_close(
                other.grad, one.grad, rtol=1e-5, atol=1e-5 * one.grad.abs().max().item()
            )
    with fused.disable_adapter(), usual.disable_adapter():
        assert torch.equal(fused(ids).logits, usual(ids).logits)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_layers_beyond_the_fused_product_stay_pefts(tiny_base, changes):
    model = lora_model(tiny_base, **changes)
    fuse(model)
    assert not fused_layers(model)
