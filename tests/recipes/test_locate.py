"""A recipe is given by its file, by a run directory or, if it comes with finequant, by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finequant.recipes.commands.parameters import known_recipes
from finequant.recipes.errors import UserError
from finequant.recipes.load import load_recipe, write_recipe
from finequant.recipes.locate import (
    CHATML_TOOLS,
    SHIPPED,
    locate_launch,
    locate_recipe,
    shipped_recipes,
)
from finequant.recipes.run import main
from finequant.recipes.rundir import RunDir


def test_a_shipped_recipe_has_a_name_and_a_file_of_the_users_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "assistant", "chat"} <= set(shipped_recipes())
    assert load_recipe("quickstart").name == "quickstart"
    (tmp_path / "quickstart").mkdir()  # such as a folder of rows
    assert locate_recipe(Path("quickstart")) == SHIPPED / "quickstart.yaml"
    shutil.copy(SHIPPED / "chat.yaml", "quickstart.yaml")
    assert locate_recipe(Path("quickstart")) == Path("quickstart.yaml")
    assert load_recipe("quickstart").name == "chat"


def test_the_shipped_template_has_a_name_and_a_file_of_the_users_comes_first(recipe_file, tmp_path):
    named = f"model.chat_template={CHATML_TOOLS.name}"
    recipe = load_recipe(recipe_file, [named])
    assert recipe.model.chat_template == str(CHATML_TOOLS)
    write_recipe(recipe, tmp_path / "resolved.yaml")
    assert f"chat_template: {CHATML_TOOLS.name}\n" in (tmp_path / "resolved.yaml").read_text()
    mine = recipe_file.parent / CHATML_TOOLS.name
    mine.write_text("mine", encoding="utf-8")
    assert load_recipe(recipe_file, [named]).model.chat_template == str(mine)


def test_a_run_directory_resumes_in_itself(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["lora.rank=2", f"output_dir={tmp_path / 'elsewhere'}"])
    run = RunDir.of(recipe)
    run.root.mkdir()
    write_recipe(recipe, run.root / "recipe.yaml")
    with pytest.raises(UserError, match="not a run directory"):
        load_recipe(run.root)
    run.manifest_file.write_text("{}", encoding="utf-8")
    moved = run.root.rename(tmp_path / "moved")
    again = load_recipe(moved, ["lora.alpha=4"])
    assert (again.lora.rank, again.lora.alpha) == (2, 4)
    assert RunDir.of(again).root == moved
    assert again.data == recipe.data


@pytest.mark.parametrize("name", [".", "..", "rows", "rows/", "/"])
def test_a_folder_without_a_recipe_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    with pytest.raises(UserError, match="a folder, but not a run directory"):
        load_recipe(name)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"quikstart: cannot read .* did you mean quickstart\?"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match="--launch: two_gpus: no such file; .* several_gpus"):
        locate_launch(Path("two_gpus"))
    assert locate_launch(Path("fsdp")).name == "fsdp.yaml"


def test_the_shell_completes_recipes_and_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    for name in ("recipe.yaml", "manifest.json"):
        (run / name).write_text("{}", encoding="utf-8")
    (tmp_path / "intents.yaml").write_text("name: intents", encoding="utf-8")
    assert {"intents.yaml", "runs/mine", "quickstart"} <= set(known_recipes(""))
    assert known_recipes("run") == ["runs/mine"]


def test_a_finished_run_says_what_to_do_next(recipe_file, monkeypatch, capsys):
    from finequant.recipes.commands import pipeline

    steps = []
    monkeypatch.setattr(pipeline, "_start", lambda *arguments: steps.append(arguments[:2]) or 0)
    monkeypatch.setattr(pipeline, "refuse_early", lambda *_: None)
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(recipe_file), "quantize.exports=[gguf, onnx]"])
    *_, opened, chatted, taken = capsys.readouterr().err.splitlines()
    run = RunDir.of(load_recipe(recipe_file)).root
    names = (["train"], ["quantize"], ["gguf", "onnx"], ["evaluate"])  # exports share a process
    assert steps == [(step, f'["{number}/4", []]') for number, step in enumerate(names, 1)]
    assert opened == f"  finequant report {run} --open"
    assert chatted == f"  finequant chat {run}"
    assert taken.startswith(f"  finequant publish {run} --dry-run publish.repo_id=")
    spaced = f"{run} of today"  # as a shell takes it
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(recipe_file), f"output_dir={spaced}"])
    assert capsys.readouterr().err.endswith(f"  finequant export '{spaced}' --to gguf\n")
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(recipe_file), "output_dir=-x"])
    assert capsys.readouterr().err.endswith("  finequant export ./-x --to gguf\n")


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "Llama-tiny"),
        ("meta-llama/Meta-Llama-3-8B", "Llama-3-tiny"),
        ("meta-llama/Meta-Llama-3.1-8B", "Llama-tiny"),
        ("meta-llama/Llama-2-7b-hf", "tiny"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tiny"),
    ],
)
def test_the_repository_that_a_run_suggests_has_a_name_that_the_license_allows(
    recipe_file, monkeypatch, capsys, base, name
):
    from finequant.recipes.commands import pipeline

    monkeypatch.setattr(pipeline, "_start", lambda *_: 0)
    monkeypatch.setattr(pipeline, "refuse_early", lambda *_: None)
    with pytest.raises(SystemExit, match="0"):
        main(["run", str(recipe_file), "quantize.exports=[gguf]", f"publish.base_model={base}"])
    assert capsys.readouterr().err.endswith(f"publish.repo_id=YOUR-NAME/{name}\n")
