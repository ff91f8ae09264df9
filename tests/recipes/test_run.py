"""The `finequant` command: the scripts in turn, and nothing that is already done."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finequant.recipes.rundir import content_hash

ROOT = Path(__file__).parents[2]


def finequant(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "finequant.recipes.run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=600,
    )


def script(path: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): content_hash(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "training_log.json"
    }


@pytest.mark.slow
def test_scripts_and_command_give_the_same_files_and_a_second_run_does_nothing(
    recipe_file, tmp_path
):
    ran = finequant("run", str(recipe_file))
    assert ran.returncode == 0, ran.stderr
    for path in ("finetune/train.py", "quantize/convert.py", "evaluate/compare.py"):
        alone = script(path, str(recipe_file), f"output_dir={tmp_path / 'alone'}")
        assert alone.returncode == 0, alone.stderr
    for artefact in ("adapter", "quantized"):
        assert files(tmp_path / "run" / artefact) == files(tmp_path / "alone" / artefact)
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("run", "alone")]
    for report in reports:
        del report["training"]  # its seconds differ
    assert reports[0] == reports[1]

    before, started = files(tmp_path / "run"), time.monotonic()
    again = finequant("run", str(recipe_file))
    assert time.monotonic() - started < 10
    assert "nothing to do" in again.stderr
    assert files(tmp_path / "run") == before

    changed = finequant("run", str(recipe_file), "quantize.group_size=64", "data.max_length=128")
    assert changed.returncode == 2  # 160 input features of down_proj
    assert "does not divide the input features of mlp.down_proj (160)" in changed.stderr
    changed = finequant("run", str(recipe_file), "quantize.bits=8")
    assert changed.returncode == 0, changed.stderr
    assert "train: up to date" in changed.stderr
    assert "because quantize.bits: 4 -> 8" in changed.stderr


@pytest.mark.parametrize("command", [[], ["run"], ["train"], ["publish"], ["chat"], ["plan"]])
def test_help_answers_in_under_a_second(command):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert finequant(*command, "--help").returncode == 0
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1


SHIPPED = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("benchmarks/*.yaml")])


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(recipe):
    from finequant.recipes.errors import UserError
    from finequant.recipes.load import load_recipe

    try:
        load_recipe(recipe)
    except UserError as error:
        if "shared/data" not in str(error):
            raise
        pytest.skip("the public data it measures on is not here")


def test_validate_and_schema(recipe_file):
    valid = finequant("validate", str(recipe_file))
    assert (valid.returncode, valid.stderr) == (0, "")
    wrong = finequant("validate", str(recipe_file), "lora.rnk=8", "train.epochs=often")
    assert wrong.returncode == 2
    assert "did you mean lora.rank?" in wrong.stderr
    assert "train.epochs" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    schema = json.loads(finequant("schema").stdout)
    assert set(schema["properties"]) >= {"name", "seed", "model", "data", "lora", "train"}


@pytest.mark.parametrize(
    "entry",
    [
        "train",
        "quantize",
        "evaluate",
        "run",
        "sweep",
        "publish",
        "chat",
        "data",
        "validate",
        "plan",
    ],
)
def test_every_entry_reports_a_missing_recipe(entry):
    result = finequant(entry, "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere.yaml: cannot read the recipe")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_evaluate_is_still_hugging_faces(tmp_path):
    """Our folder of that name must not shadow the package that lm-eval imports."""
    code = "import evaluate; print(evaluate.__file__); import lm_eval.api.metrics"
    for folder in (ROOT, tmp_path):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
        )
        assert "site-packages" in result.stdout, result.stderr


def test_readme_names_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n\n```\n(.*?)```", text, re.DOTALL)[1]
    folder = ""
    for line in tree.splitlines():
        names = re.findall(r"(?:^|\s{2,})([\w.]+(?:\.py|\.yaml|/))(?=\s|$)", line)
        if not line.startswith(" "):
            folder = names[0]
        for name in names:
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
    for path in re.findall(r"[\w/]+/\w+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_readme_commands_run(tmp_path):
    """Every command of the README's bash blocks, shortened, on the real model."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    commands = [line for line in blocks.splitlines() if "recipes/" in line]
    assert len(commands) >= 9
    rows = "{{source: data/quickstart/{0}.jsonl, limit: {1}}}"
    few = [f"data.{split}={rows.format(split, 4)}" for split in ("validation", "test")]
    few += [f"data.train={rows.format('train', 16)}"]
    few += ["evaluate.max_new_tokens=2", "evaluate.divergence_tokens=64"]
    commands = list(dict.fromkeys(commands))
    for command in commands:
        words = shlex.split(command)
        if words[1] == "chat":
            words += ["--max-new-tokens", "8"]
        if words[0] != "finequant" or words[1] in ("run", "sweep", "export", "publish", "chat"):
            steps = [] if "max_steps" in command else ["train.max_steps=1"]
            steps += ["quantize.training=null"]
            output = [] if "output_dir" in command else [f"output_dir={tmp_path / 'r'}"]
            words += few + steps + output
            words = [word for word in words if not word.startswith("quantize.method=")]
            words += ["quantize.method=rtn"]  # gptq takes a minute each time
        words = [re.sub(r"^output_dir=", f"output_dir={tmp_path}/", word) for word in words]
        words = [word.replace(f"{tmp_path}/{tmp_path}", str(tmp_path)) for word in words]
        binary = Path(sys.executable).parent / words[0]
        result = subprocess.run(
            [str(binary), *words[1:]],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
            timeout=600,
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    answered = subprocess.run(
        [sys.executable, "-c", code.replace("runs/quickstart", str(tmp_path / "r"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


def test_a_full_disk_is_one_message(capsys):
    """/dev/full is a disk without space."""
    from finequant.recipes.errors import report_user_errors

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        Path("/dev/full").write_text("weights", encoding="utf-8")
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("error: no space left on the disk")
