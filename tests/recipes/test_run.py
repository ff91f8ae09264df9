"""The `finequant` command runs the scripts in turn, and skips what is already done."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from finequant.recipes.freshness import content_hash

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


@pytest.fixture
def script(monkeypatch):
    """Runs a script as `python PATH ...` does, in this process."""

    def run(path: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(str(ROOT / path), run_name="__main__")  # a refusal would be a SystemExit

    return run


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): content_hash(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "training_log.json"
    }


def test_a_stage_whose_process_does_not_start_is_one_line(monkeypatch):
    from finequant.recipes.commands import pipeline
    from finequant.recipes.errors import OutsideError

    def killed(_):
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(pipeline.processes().Process, "start", killed)
    with pytest.raises(OutsideError, match=r"train: its process did not start \(unexpected EOF\)"):
        pipeline._start(["train"], '["1/1", []]', [], [])


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs lines of Python, with arguments, as a stage of the command in the stage's process."""
    from finequant.recipes.commands import pipeline

    def run(*lines: str, arguments: list[str]) -> int:
        body = "".join(f"    {line}\n" for line in lines)
        imports = "import os, pathlib, signal, sys, time\n"
        (tmp_path / "stage.py").write_text(f"{imports}def main(arguments):\n{body}")
        return pipeline._start(["train"], '["1/1", []]', arguments, [])

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pipeline, "LIBRARIES", "json")
    monkeypatch.setattr(pipeline, "module_of", lambda stage: "stage")
    return run


def test_a_fork_server_that_is_killed_ends_the_stage_with_a_line(tmp_path, stage, capsys):
    code = stage(
        "pathlib.Path(arguments[0]).write_text(str(os.getpid()))",
        "os.kill(os.getppid(), signal.SIGKILL)",
        "time.sleep(60)",
        arguments=[str(tmp_path / "pid")],
    )
    assert code == 137
    assert capsys.readouterr().err.startswith("train was killed")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGILL"])
def test_a_stage_that_crashes_in_a_library_is_named_in_a_line(stage, capsys, name):
    code = stage(f"os.kill(os.getpid(), signal.{name})", arguments=[])
    assert code == 128 + signal.Signals[name]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train ")
    assert line.endswith(f"({name}): run the same command again to continue from here")


def test_on_an_accelerator_a_stage_starts_before_any_library_is_imported(
    tmp_path, stage, monkeypatch
):
    """Libraries look for CUDA on import, and CUDA does not work in forks of such a process."""
    from finequant.finetune import device
    from finequant.recipes.commands import pipeline

    assert pipeline.processes().get_start_method() == "forkserver"
    monkeypatch.setattr(device, "trains_on_cpu", lambda: False)
    write = "pathlib.Path(arguments[0]).write_text(str('torch' in sys.modules))"
    assert stage(write, arguments=[str(tmp_path / "imported")]) == 0
    assert (tmp_path / "imported").read_text() == "False"


def test_a_signal_that_also_reaches_the_fork_server_is_not_called_lack_of_memory(stage, capsys):
    code = stage(
        "forwarded = []",
        "signal.signal(signal.SIGTERM, lambda *_: forwarded.append(True))",
        "os.kill(int(arguments[0]), signal.SIGTERM)",
        "while not forwarded: time.sleep(0.01)",
        "os.kill(os.getppid(), signal.SIGKILL)",
        arguments=[str(os.getpid())],
    )
    assert code == 143
    assert "killed" not in capsys.readouterr().err


def test_a_signal_that_came_too_late_for_a_stage_stops_the_run_after_it(stage):
    from finequant.recipes.interrupt import Interrupted

    with pytest.raises(Interrupted) as stopped:
        stage(
            "forwarded = []",
            "signal.signal(signal.SIGTERM, lambda *_: forwarded.append(True))",
            "os.kill(int(arguments[0]), signal.SIGTERM)",
            "while not forwarded: time.sleep(0.01)",
            arguments=[str(os.getpid())],
        )
    assert stopped.value.code == 143


def test_the_time_left_is_not_that_of_a_call_that_finished_what_another_had_begun(tmp_path):
    from finequant.recipes.commands.pipeline import _seconds
    from finequant.recipes.rundir import RunDir

    run = RunDir(tmp_path)

    def record(resumed: bool) -> None:
        whole = {"inputs": {}, "outputs": {}, "seconds": 7.0, "resumed": False}
        manifest = {"train": whole, "quantize": whole | {"resumed": resumed}}
        run.manifest_file.write_text(json.dumps(manifest))

    record(False)
    assert _seconds(run, [["train"], ["quantize"]]) == [7, 7]
    record(True)
    assert _seconds(run, [["train"], ["quantize"]]) == []
    assert _seconds(run, [["train"]]) == [7]


@pytest.mark.slow
def test_scripts_and_command_give_the_same_files_and_a_second_run_does_nothing(
    recipe_file, tmp_path, here, script, monkeypatch
):
    """The command starts each stage in a separate process."""
    ran = finequant("run", str(recipe_file))
    assert ran.returncode == 0, ran.stderr
    for path in ("finetune/train.py", "quantize/convert.py", "evaluate/compare.py"):
        script(path, str(recipe_file), f"output_dir={tmp_path / 'alone'}")
    for artifact in ("adapter", "quantized"):
        assert files(tmp_path / "run" / artifact) == files(tmp_path / "alone" / artifact)
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("run", "alone")]
    for report in reports:
        del report["training"]  # its seconds differ
    assert reports[0] == reports[1]

    before = files(tmp_path / "run")
    again = here("run", str(recipe_file))
    assert "nothing to do" in again.stderr
    assert files(tmp_path / "run") == before

    changed = here("run", str(recipe_file), "quantize.group_size=64", "data.max_length=128")
    assert changed.returncode == 2  # 160 input features of down_proj
    assert "does not divide the input features of mlp.down_proj (160)" in changed.stderr
    started = []
    monkeypatch.setattr(
        "finequant.recipes.commands.pipeline._start", lambda step, *_: started.extend(step) or 0
    )
    changed = here("run", str(recipe_file), "quantize.bits=8")
    assert changed.returncode == 0, changed.stderr
    assert started[0] == "quantize"
    assert "train: up to date" in changed.stderr
    assert "because quantize.bits: 4 -> 8" in changed.stderr


def test_help_loads_no_heavy_library():
    """Help must appear at once."""
    code = """
import sys
from finequant.recipes.run import main
for command in ([], ["run"], ["train"], ["publish"], ["chat"], ["plan"]):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert not end.code, end.code
print(*{"torch", "transformers", "datasets", "lm_eval", "matplotlib"} & set(sys.modules), "loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1].split() == ["loaded"], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["run", "r.yaml", "--lora.rank=8"],
            "--lora.rank: a key of the recipe has no dashes: write",
        ),
        (["plan", "r.yaml", "--gpuz", "4090"], "No such option: --gpuz"),
        (["run"], "Missing argument 'RECIPE'; `finequant run --help` shows its usage"),
        (
            ["runn"],
            "No such command 'runn'. Did you mean 'run'? `finequant --help` shows its usage",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_next_step(capsys, arguments, says):
    from finequant.recipes.run import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert line.startswith("error: ")
    assert says in line


SHIPPED = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("benchmarks/*.yaml")])


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(recipe):
    from finequant.recipes.errors import UserError
    from finequant.recipes.load import load_recipe

    try:
        load_recipe(recipe)
    except UserError as error:  # the public data that it measures on may not be here
        _, *problems = str(error).splitlines()
        for problem in problems or [str(error)]:
            assert re.search(r"no such file or folder: \S*shared/data/", problem)


def test_every_shipped_recipe_runs_with_what_a_plain_install_brings():
    """As the README and the Dockerfile install it, without the extras of pyproject.toml."""
    from finequant.quantize.formats.formats import FORMATS
    from finequant.recipes.load import load_recipe

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.split("[>=]", requirement)[0] for requirement in project["dependencies"]}
    for file in ROOT.glob("recipes/*.yaml"):
        recipe = load_recipe(file)
        exports = [name for name in recipe.quantize.exports if name != "torchao"]
        needed = {wheel for name in exports for wheel in FORMATS[name].packages.values()}
        assert needed | set(recipe.train.report_to) <= installed, file
        assert recipe.model.load == "float", file


def test_validate_checks_a_recipe_and_schema_prints_json(recipe_file, here):
    valid = finequant("validate", str(recipe_file))
    assert (valid.returncode, valid.stderr) == (0, "")
    wrong = here("validate", str(recipe_file), "lora.rnk=8", "train.epochs=often")
    assert wrong.returncode == 2
    assert "did you mean lora.rank?" in wrong.stderr
    assert "train.epochs" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    schema = json.loads(here("schema").stdout)
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
def test_every_entry_reports_a_missing_recipe(entry, here):
    result = here(entry, "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere.yaml: cannot read the recipe")
    assert "Traceback" not in result.stderr


def test_evaluate_is_still_hugging_faces(tmp_path):
    """Our folder `evaluate` must not shadow the package that lm-eval imports."""
    code = "from importlib.util import find_spec; print(find_spec('evaluate').origin)"
    for folder in (ROOT, tmp_path):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
        )
        assert "site-packages" in result.stdout, result.stderr


def test_the_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n\n```\n(.*?)```", text, re.DOTALL)[1]
    folder = ""
    for line in tree.splitlines():
        names = re.findall(r"(?:^|\s{2,})([\w.]+(?:\.py|\.yaml|/))(?=\s|$)", line)
        if not line.startswith(" "):
            folder = names[0]
        for name in names:
            assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name
    for path in re.findall(r"(?<![:/\w])[\w/]+/\w+\.(?:py|yaml)", text):
        assert (ROOT / path).exists(), path


# The quickstart with a few rows, and nothing that only takes time.
SHORT = [
    *(
        f"data.{split}={{source: data/quickstart/{split}.jsonl, limit: {limit}}}"
        for split, limit in (("train", 16), ("validation", 4), ("test", 4))
    ),
    "train.max_steps=1",
    "quantize.calibration={tokens: 256, length: 64}",
    "evaluate.max_new_tokens=2",
    "evaluate.divergence_tokens=64",
]


def test_a_page_that_an_evaluation_could_not_write_is_written_by_the_next_run(
    recipe_file, tmp_path, here, stages_here
):
    """The page comes after the manifest, which it shows: a full disk or a kill may part them."""
    arguments = [str(recipe_file), "train.max_steps=1", "evaluate.divergence_tokens=64"]
    page = tmp_path / "run" / "report.html"
    blocked = page.with_name("report.html.partial")
    blocked.mkdir(parents=True)
    assert here("run", *arguments).returncode != 0
    assert (tmp_path / "run" / "report.json").exists() and not page.exists()
    blocked.rmdir()
    assert "nothing to do" in here("run", *arguments).stderr
    whole = page.read_bytes()

    page.write_text("of an earlier evaluation", encoding="utf-8")
    os.utime(page, ns=(0, 0))
    assert "nothing to do" in here("run", *arguments).stderr
    assert page.read_bytes() == whole


@pytest.mark.slow
def test_the_quickstart_runs_and_its_result_loads(tmp_path, here, stages_here, capfd):
    """Runs all stages on the real model, shortened (the gate fails); then the README's Python."""
    run = tmp_path / "quickstart"
    # Calibration takes minutes; it and the exports are tested elsewhere.
    short = [*SHORT, "quantize.method=rtn", "quantize.rotate=false"]
    short += ["quantize.exports=[gguf]", "evaluate.exports=false"]
    short += ["evaluate.gate.max_perplexity_increase=0"]
    done = here("run", str(ROOT / "recipes/quickstart.yaml"), *short, f"output_dir={run}")
    assert done.returncode == 1, done.stderr
    assert f"finequant chat {run}" in done.stderr
    assert "publish" not in done.stderr
    models = json.loads((run / "report.json").read_text())["models"]
    assert list(models) == ["base", "tuned", "quantized", "gguf"]
    assert any((run / "exports").glob("gguf/SmolLM2-*-Q4_0.gguf"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(code.replace("runs/quickstart", str(run)), {})
    assert capfd.readouterr().out.strip()


@pytest.mark.slow
def test_readme_commands_run(tmp_path, tiny_base, here, script, stages_here, monkeypatch):
    """Runs every command in bash blocks of README and docs, and the notebook, on the tiny Llama.

    All run in this process: a launcher's arguments are parsed, and its script runs here.
    """
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    blocks = blocks.replace("\\\n", " ")  # lines that continue
    # What the pages do with the reader's recipe is done with the quickstart's.
    blocks = re.sub(r"\btrain\.yaml", "recipes/quickstart.yaml", blocks)
    shell, python = notebook_cells()
    named = re.compile(r"recipes/|^finequant \w+ quickstart")
    lines = [line for line in [*blocks.splitlines(), *shell] if named.search(line)]
    commands = dict.fromkeys(lines)
    assert len(commands) >= 9
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("webbrowser.open", lambda page: page)
    tiny = [*SHORT[:3], *SHORT[4:], f"model.base={tiny_base}", "quantize.method=rtn"]
    # Its tokens are short; `finequant export` comes by itself, after the evaluation.
    tiny += ["data.max_length=256", "quantize.exports=[]"]
    for command in commands:
        program, *words = shlex.split(command)
        words = [re.sub("^output_dir=", f"output_dir={tmp_path}/", word) for word in words]
        if words[0] == "chat":
            words += ["--max-new-tokens", "8"]
        output = [] if "output_dir" in command else [f"output_dir={tmp_path / 'r'}"]
        steps = [] if "max_steps" in command else ["train.max_steps=1"]
        if "chat.yaml" not in command:
            given = [word for word in words if not word.startswith("quantize.method=")]
            words = [*given, *tiny, *steps, *output, "publish.license=apache-2.0"]
        if program == "finequant":
            done = here(*words)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        else:
            script(*launched(program, words))
    names: dict[str, object] = {}
    for source in python:
        exec(source.replace("runs/quickstart", str(tmp_path / "r")), names)


def launched(program: str, words: list[str]) -> list[str]:
    """Returns what the command starts: a script, and its arguments."""
    if program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        parsed = launch_command_parser().parse_args(words[1:])
    elif program == "torchrun":
        from torch.distributed.run import parse_args

        parsed = parse_args(words)
    else:
        assert program == "python"
        return words
    return [parsed.training_script, *parsed.training_script_args]


def notebook_cells() -> tuple[list[str], list[str]]:
    """Returns commands and Python of docs/quickstart.ipynb."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shell = [source.removeprefix("!") for source in code if source.startswith("!")]
    return shell, [source for source in code if not source.startswith("!")]


def test_a_full_disk_is_one_message(capsys):
    """/dev/full behaves like a disk without space."""
    from finequant.recipes.errors import report_user_errors

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(SystemExit) as exit_, report_user_errors():
        Path("/dev/full").write_text("weights", encoding="utf-8")
    assert exit_.value.code == 1
    assert capsys.readouterr().err.startswith("error: no space left on the disk")
