"""The report's figures equal those of programs that are not ours.

transformers and peft run in a process that cannot import finequant; scipy computes the statistics.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product

import pytest
from conftest import SENTENCES, write_jsonl
from outside import WITHOUT_FINEQUANT

from finequant.evaluate.metrics.text_metrics import mean_change
from finequant.evaluate.report.page import flips

CHILD = (
    WITHOUT_FINEQUANT
    + """
import torch
from pathlib import Path
from peft import PeftModel
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base, run, test, limit = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
rows = [json.loads(line) for line in test.read_text().splitlines()]
tokenizer = AutoTokenizer.from_pretrained(run / "quantized")
quantized = AutoModelForCausalLM.from_pretrained(run / "quantized").eval()
plain = lambda: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
models = {
    "base": plain(),
    "tuned": PeftModel.from_pretrained(plain(), run / "adapter").eval(),
    "quantized": quantized,
}
found = {name: {"nll": [], "logs": [], "answers": []} for name in models}
for row in rows:
    asked = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)
    ids = torch.tensor([prompt + answer["input_ids"]])
    for name, model in models.items():
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            asked = torch.tensor([prompt])
            new = model.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), max_new_tokens=limit,
                do_sample=False, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(prompt) :]
        found[name]["nll"].append(cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        found[name]["logs"].append(logits.log_softmax(dim=-1))
        found[name]["answers"].append(tokenizer.decode(new, skip_special_tokens=True))
logs = {name: torch.cat(figures["logs"]) for name, figures in found.items()}
tokens = len(logs["tuned"])
divergence = kl_div(logs["quantized"], logs["tuned"], log_target=True, reduction="none").sum(-1)
same = logs["quantized"].argmax(-1) == logs["tuned"].argmax(-1)
right = lambda answers: [a.strip() == row["completion"] for a, row in zip(answers, rows)]

def packed(bits):
    # By the file's header: codes at their bits, everything else but the zero points as it is.
    bytes_ = {"codes": 0, "rest": 0}
    for file in (run / "quantized").glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__")
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            if not name.endswith("zero_point"):
                bytes_["codes" if name.endswith("qdata") else "rest"] += end - start
    return bytes_["codes"] * bits / 8 + bytes_["rest"]

print(json.dumps({
    "packed": packed(bits=2),
    "perplexity": {n: (sum(f["nll"]) / tokens).exp().item() for n, f in found.items()},
    "answers": {name: figures["answers"] for name, figures in found.items()},
    "right": {name: right(figures["answers"]) for name, figures in found.items()},
    "tokens": tokens,
    "kl": divergence.double().mean().item(),
    "top1_agreement": same.double().mean().item(),
    "size": sum(file.stat().st_size for file in (run / "quantized").glob("*.safetensors")),
    "weights": sum(weight.numel() for weight in models["base"].parameters()),
}))
"""
)


@pytest.mark.slow
def test_a_reports_figures_are_those_of_plain_transformers(recipe_file, tiny_base, train_once):
    """Perplexity, divergence, answers, accuracy, size; the sweep's divergence is the same."""
    from scipy.stats import sem

    from finequant.evaluate.compare import main as compare
    from finequant.evaluate.sweep import sweep
    from finequant.quantize.convert import main as convert

    texts = SENTENCES[::8]
    rows = [{"prompt": text, "completion": "a door" if "door" in text else "no"} for text in texts]
    for number, part in enumerate(("test", "validation", "train")):
        write_jsonl(recipe_file.parent / f"{part}.jsonl", rows[number::3])
    limit = 6
    settings = [
        "train.learning_rate=1e-2",
        "train.epochs=6",
        "evaluate.metrics=[exact_match]",
        "evaluate.perplexity=[]",
        "evaluate.divergence_tokens=100000",  # all of them
        f"evaluate.max_new_tokens={limit}",
    ]
    train_once([str(recipe_file), *settings])
    run = recipe_file.parent / "run"
    quantize = ["quantize.bits=2", "quantize.method=rtn"]
    convert([str(recipe_file), *settings, *quantize])
    compare([str(recipe_file), *settings, *quantize])
    sweep(recipe_file, [*settings, *quantize], "tuned")
    test = recipe_file.parent / "test.jsonl"
    arguments = [str(tiny_base), str(run), str(test), str(limit)]
    command = [sys.executable, "-P", "-c", CHILD, *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    theirs = json.loads(process.stdout.splitlines()[-1])

    report = json.loads((run / "report.json").read_text())
    predicted = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for name, model in report["models"].items():
        held_out = model["perplexity"]["held_out"]
        assert held_out["token"] == pytest.approx(theirs["perplexity"][name], rel=1e-4)
        assert held_out["tokens"] == theirs["tokens"]
        assert [row["answers"][name] for row in predicted] == [
            text.strip() for text in theirs["answers"][name]
        ]
        right = theirs["right"][name]
        accuracy = model["tasks"]["held_out"]["exact_match"]
        error = sem(right)
        assert accuracy == pytest.approx(
            {"value": sum(right) / len(right), "stderr": error, "n": len(right)}
        )
    right = theirs["right"]
    assert 0 < sum(right["quantized"]) < len(predicted), "the rows tell nothing apart"
    differences = [
        int(after) - int(before)
        for before, after in zip(right["tuned"], right["quantized"], strict=True)
    ]
    change = report["changes"]["held_out"]["exact_match"]
    assert change["stderr"] == pytest.approx(sem(differences))
    assert report["divergence"]["tokens"] == theirs["tokens"]
    (point,) = list(json.loads((run / "sweep" / "sweep.json").read_text())["models"].values())[1:]
    for divergence in (report["divergence"], point["divergence"]):
        for key in ("kl", "top1_agreement"):
            assert divergence[key]["value"] == pytest.approx(theirs[key], rel=1e-3), key
    assert theirs["kl"] > 1e-3
    quantized = report["models"]["quantized"]
    assert quantized["size_bytes"] == theirs["size"]
    assert quantized["packed_bytes"] == theirs["packed"]
    assert quantized["bits_per_weight"] == pytest.approx(8 * theirs["size"] / theirs["weights"])


PARENT = """
import resource, subprocess, sys
child = subprocess.run([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, check=True)
print(int(child.stdout), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
ALLOCATES = """
from finequant.recipes.usage import peak_memory
passing = b"x" * 300_000_000
del passing
print(peak_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count in other units")
def test_peak_memory_is_what_the_system_tells_a_parent():
    """The parent is a small process: a child's figure begins with the memory of its parent."""
    command = [sys.executable, "-c", PARENT, ALLOCATES]
    ours, theirs = map(int, subprocess.check_output(command).split())
    assert ours == pytest.approx(theirs, rel=0.02)
    assert 3e8 < ours < 4e8


def test_mcnemars_p_value_is_that_of_scipy():
    from scipy.stats import binomtest

    for lost, gained in product(range(5), (0, 1, 4, 30)):
        pairs = [(True, False)] * lost + [(False, True)] * gained + [(True, True)] * 3
        rows = [{"right": {"tuned": tuned, "quantized": then}} for tuned, then in pairs]
        expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
        assert float(flips(rows)["p"]) == pytest.approx(expected, rel=0.05)  # two digits


def test_the_error_of_a_change_is_that_of_scipy():
    from scipy.stats import sem

    before, after = [1, 0, 1, 1, 0.5, 0], [1, 1, 0, 1, 0.25, 0]
    differences = [late - early for early, late in zip(before, after, strict=True)]
    assert mean_change(before, after)["stderr"] == pytest.approx(sem(differences))
