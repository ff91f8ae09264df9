"""Measures a folder with plain transformers, beside the float base: `python measure.py JOB MODEL`

Prints perplexity, the KL divergence of the float model's predictions from the folder's in nats per
token, and the share of positions at which both have the same most likely token.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (job["base"], sys.argv[2])
    ]
    losses, divergence, agreement, tokens = [0.0, 0.0], 0.0, 0, 0
    for window in job["windows"]:
        ids = torch.tensor([window])
        exact, approximate = (model(ids[:, :-1]).logits[0].log_softmax(-1) for model in models)
        targets = ids[0, 1:, None]
        for index, predicted in enumerate((exact, approximate)):
            losses[index] -= predicted.gather(1, targets).double().sum().item()
        divergence += (exact.exp() * (exact - approximate)).sum().item()
        agreement += (exact.argmax(-1) == approximate.argmax(-1)).sum().item()
        tokens += len(targets)
    figures = {
        "float_token": math.exp(losses[0] / tokens),
        "float_word": math.exp(losses[0] / job["words"]),
        "token": math.exp(losses[1] / tokens),
        "word": math.exp(losses[1] / job["words"]),
        "kl": divergence / tokens,
        "agreement": agreement / tokens,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
