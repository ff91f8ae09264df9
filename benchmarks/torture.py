"""Kills real runs at random moments, and checks that the same command ends as if none had happened.

python benchmarks/torture.py                    # 50 kills, 1,000 damaged inputs of each kind, disks
python benchmarks/torture.py --kills 5 --seed 3 --only kills
python benchmarks/torture.py --assistant --only kills    # the embedded model; an hour or two
Writes the results into docs/reliability.md; with --only, just that part of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

from finequant.finetune.model import load_base, load_tokenizer
from finequant.recipes.artifact import content_hash
from finequant.recipes.command_line import quiet_libraries
from finequant.recipes.errors import report_user_errors
from finequant.recipes.load import load_recipe
from finequant.recipes.stages import STAGES
from finequant.recipes.terminal import say

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TITLE = "# Reliability\n\nWritten by benchmarks/torture.py; `make torture` runs it with 50 kills."
TINY, EMBEDDED = "a tiny random Llama", "the shortened assistant"
TESTS = "Damaged input, full and read-only disks"
LONGEST = 600
"""Seconds that a run may take."""

# Two trainings with a checkpoint at every second step.
SHORT = (
    "train.max_steps=8",
    "train.save_steps=2",
    "lora.dropout=0.0",
    "quantize.training={steps: 4}",
)
# The assistant with all stages, a few rows, and nothing that only takes time.
SHORTENED = (
    "train.max_steps=4",
    "train.save_steps=2",
    "train.batch_size=2",
    "train.micro_batch_size=2",
    "quantize.training={steps: 4, distillation: 1.0}",
    "quantize.method=rtn",
    "quantize.scale=max",
    "data.validation=[{source: data/assistant/validation.jsonl, limit: 4}]",
    "data.test=[{source: data/assistant/test.jsonl, limit: 4}]",
    "evaluate.max_new_tokens=8",
)
HALF_MADE = (".partial", ".replaced", ".removed")


@dataclass(frozen=True)
class Kill:
    """One run that was killed, and how it ended."""

    moment: str
    stage: str
    same: bool
    problem: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = read_arguments(argv)
    quiet_libraries()
    kills, tests = [], []
    if arguments.only != "tests":
        with report_user_errors(), tempfile.TemporaryDirectory() as folder:
            kills, seconds = kill_runs(arguments, Path(folder))
        model = EMBEDDED if arguments.assistant else TINY
        write_section(f"Killed runs: {model}", kills_section(arguments, kills, seconds))
    if arguments.only != "kills":
        tests = torture_tests(arguments.examples)
        write_section(TESTS, tests_section(arguments.examples, tests))
    failed = [kill for kill in kills if not kill.same]
    sys.exit(bool(failed or any(outcome == "failed" for _, outcome in tests)))


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=1000, help="damaged inputs of each kind")
    parser.add_argument("--only", choices=["kills", "tests"])
    parser.add_argument("--assistant", action="store_true", help=f"{EMBEDDED}, not {TINY}")
    return parser.parse_args(argv)


def kill_runs(arguments: argparse.Namespace, folder: Path) -> tuple[list[Kill], float]:
    """Runs once undisturbed, then kills one run after the other.

    Returns:
        The kills, and the seconds of the undisturbed run.
    """
    command = run_command(arguments, folder)
    log = folder / "log"
    first = folder / "undisturbed"
    started = time.monotonic()
    events = run_to_its_end(command, first, log)
    seconds = time.monotonic() - started
    expected = fingerprint(first)
    say(f"undisturbed: {seconds:.0f} s, {len(events)} changes on the disk; seed {arguments.seed}")
    pick, kills = random.Random(arguments.seed), []
    while (number := len(kills) + 1) <= arguments.kills:
        run = folder / f"run-{number}"
        kill = kill_once(command, run, log, pick, seconds, events)
        hashes, left = fingerprint(run), half_made(run)
        shutil.rmtree(run)
        if kill is None:
            continue
        problem = differing(expected, hashes) or ", ".join(left)
        kills.append(Kill(*kill, not problem, problem))
        say(f"{number}/{arguments.kills} {kill[1]}, {kill[0]}: {problem or 'the same hashes'}")
    return kills, seconds


def run_command(arguments: argparse.Namespace, folder: Path) -> list[str]:
    if arguments.assistant:
        recipe = ROOT / "recipes" / "assistant.yaml"
        overrides = [*SHORTENED, f"model.base={embedded_base(recipe, folder / 'base')}"]
    else:
        recipe, overrides = tiny_recipe(folder), SHORT
    return [sys.executable, "-m", "finequant.recipes.run", "run", str(recipe), *overrides]


def embedded_base(recipe: Path, folder: Path) -> Path:
    """Saves the assistant's base as safetensors: half of a short run would be reading its GGUF."""
    import torch

    model = load_recipe(recipe).model
    load_base(model, torch.bfloat16).save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def tiny_recipe(folder: Path) -> Path:
    """Writes a recipe for the random two-layer Llama that the tests use."""
    sys.path.append(str(ROOT / "tests"))
    import conftest as fixtures

    return fixtures.make_recipe(folder, fixtures.make_llama(folder / "base"))


def kill_once(
    command: list[str],
    run: Path,
    log: Path,
    pick: random.Random,
    seconds: float,
    events: list[str],
) -> tuple[str, str] | None:
    """Kills a run with all its processes, starts it again, and waits for its end.

    Half of the kills, chosen at random, follow soon after a change on the disk, when most is at
    stake.

    Returns:
        The moment of the kill, and the stage that was killed; None if the run had already ended.
    """
    process = start(command, run, log)
    if pick.random() < 0.5:
        moment = pick.uniform(0, seconds)
        watch(process, run, None, moment)
        when = f"{moment:.2f} s"
    else:
        number, delay = pick.randrange(len(events)), pick.uniform(0, 0.05)
        watch(process, run, number)
        time.sleep(delay)
        when = f"{1000 * delay:.0f} ms after change {number + 1} ({events[number]})"
    if process.poll() is not None:
        return None
    stage = next((stage for stage in STAGES if stage not in finished(run)), "done")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run_to_its_end(command, run, log)
    return when, stage


def run_to_its_end(command: list[str], run: Path, log: Path) -> list[str]:
    """Runs the command; returns the names that appeared in the run directory, in order.

    A run that takes longer than LONGEST is killed, and so differs from the undisturbed one.
    """
    process = start(command, run, log)
    names = watch(process, run, None)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return names


def start(command: list[str], run: Path, log: Path) -> subprocess.Popen:
    """Starts the command in a new process group."""
    with log.open("a", encoding="utf-8") as file:
        return subprocess.Popen(
            [*command, f"output_dir={run}"],
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )


def watch(
    process: subprocess.Popen, run: Path, change: int | None, seconds: float = LONGEST
) -> list[str]:
    """Waits until the process ends, the run directory has changed more than `change` times, or
    `seconds` have passed.

    Returns the names that appeared in the run directory, in order.
    """
    seen: dict[str, None] = {}
    end = time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < end:
            with suppress(OSError):  # a folder vanished while it was being listed
                paths = sorted(run.rglob("*"))
                seen |= dict.fromkeys(path.relative_to(run).as_posix() for path in paths)
            if change is not None and len(seen) > change:
                break
            time.sleep(0.005)
    except BaseException:  # a signal: leave no process behind
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return list(seen)


def finished(run: Path) -> dict:
    try:
        return json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def fingerprint(run: Path) -> dict[str, str]:
    """Returns hashes of the artifacts, and the report, both without the log of training, which has
    the seconds of each call."""
    hashes = {
        path.relative_to(run).as_posix(): content_hash(path)
        for artifact in ("adapter", "quantized")
        for path in sorted((run / artifact).rglob("*"))
        if path.is_file() and path.name != "training_log.json"
    }
    if (run / "report.json").exists():
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
        del report["training"]
        hashes["report.json"] = json.dumps(report)
    return hashes


def differing(expected: dict[str, str], actual: dict[str, str]) -> str:
    names = [name for name in {*expected, *actual} if expected.get(name) != actual.get(name)]
    return f"other hashes: {', '.join(sorted(names))}" if names else ""


def half_made(run: Path) -> list[str]:
    return [path.name for path in run.rglob("*") if path.name.endswith(HALF_MADE)]


def torture_tests(examples: int) -> list[tuple[str, str]]:
    """Runs tests/torture, and returns the name and outcome of each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "", "tests/torture"]
            + [f"--junitxml={report}"],
            cwd=ROOT,
            env=os.environ | {"FINEQUANT_EXAMPLES": str(examples), "OMP_NUM_THREADS": "1"},
            stdout=sys.stderr,
        )
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [(case.get("name"), _outcome(case)) for case in cases]


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"


def kills_section(arguments: argparse.Namespace, kills: list[Kill], seconds: float) -> str:
    """Says in which stages runs were killed, how they ended, and which kills changed a result."""
    same = sum(kill.same for kill in kills)
    made, good = (
        Counter(kill.stage for kill in kills),
        Counter(kill.stage for kill in kills if kill.same),
    )
    changes = SHORTENED if arguments.assistant else SHORT
    base = " The base was saved as safetensors first: its GGUF file takes longer to read."
    lines = [
        f"{same} of {len(kills)} killed runs ended with the same hashes as an undisturbed run.",
        "",
        f"All stages of `finequant run` with {', '.join(f'`{change}`' for change in changes)} took "
        f"{seconds:.0f} s undisturbed. Each run was killed at a random moment, by SIGKILL to its "
        "whole process group, and then restarted with the same command. Afterwards, all files of "
        "adapter/ and quantized/ were compared, and report.json, without the log of training. "
        f"Seed {arguments.seed}, on {date.today():%B %d, %Y}."
        f"{base if arguments.assistant else ''}",
        "",
        "| killed in | runs | same hashes |",
        "|---|---:|---:|",
    ]
    stages = [stage for stage in (*STAGES, "done") if made[stage]]
    lines += [f"| {stage} | {made[stage]} | {good[stage]} |" for stage in stages]
    if same < len(kills):
        lines += ["", "| moment | stage | result |", "|---|---|---|"]
    lines += [
        f"| {kill.moment} | {kill.stage} | {kill.problem} |" for kill in kills if not kill.same
    ]
    return "\n".join(lines)


def tests_section(examples: int, tests: list[tuple[str, str]]) -> str:
    lines = [
        f"{examples} examples of each kind of input. Each had to end with exit code 0 or 2, "
        "without a traceback, and without changing a file. On a disk that is full or read-only, "
        "the command had to end with one message, and to succeed once there was room.",
        "",
        "| test | outcome |",
        "|---|---|",
    ]
    cases = Counter((name.partition("[")[0], outcome) for name, outcome in tests)
    for (name, outcome), count in cases.items():
        times = f" ({count} cases)" if count > 1 else ""
        lines.append(f"| {name.removeprefix('test_').replace('_', ' ')}{times} | {outcome} |")
    return "\n".join(lines)


def write_section(heading: str, text: str) -> None:
    """Writes a section into the page, in place of an earlier one under this heading."""
    sections = {}
    if PAGE.exists():
        _, *parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.M)
        sections = dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
    sections[heading] = _wrapped(text)
    body = "".join(f"\n## {name}\n\n{section}\n" for name, section in sections.items())
    PAGE.write_text(f"{TITLE}\n{body}", encoding="utf-8")
    print(f"## {heading}\n\n{text}")
    say(f"{PAGE} written")


def _wrapped(text: str) -> str:
    """Wraps the lines of Markdown that are not rows of a table."""
    return "\n".join(
        line if line.startswith("|") else textwrap.fill(line, 120, break_on_hyphens=False)
        for line in text.splitlines()
    )


if __name__ == "__main__":
    main()
