"""Quantization-aware training whose trained model tests can look at."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def train_aware(monkeypatch) -> Callable[[list[str]], object]:
    """Runs `quantize/training/train.py` and returns its trainer, with the latent weights that the
    stage drops back in the model, so that it still computes."""
    from finequant.finetune import trainer as trainers
    from finequant.quantize.training.model import fake_quantized_layers
    from finequant.quantize.training.train import main

    built, latent, build = [], {}, trainers.build_trainer

    def build_trainer(*arguments):
        built.append(build(*arguments))
        layers = fake_quantized_layers(built[-1].model).values()
        latent.update({layer: layer.latent for layer in layers})
        return built[-1]

    def train(arguments: list[str]):
        main(arguments)
        for layer, weights in latent.items():
            layer.latent = weights
        return built[-1]

    monkeypatch.setattr(trainers, "build_trainer", build_trainer)
    return train
