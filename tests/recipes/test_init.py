"""`finequant init` as a user types it."""

from __future__ import annotations

import re

import pytest

from finequant.quantize.size import machine as machines
from finequant.quantize.size.machine import this_machine
from finequant.quantize.size.resources import settings_that_fit
from finequant.recipes.load import add_to_file, load_recipe
from finequant.recipes.run import main
from finequant.recipes.stages import STAGES


@pytest.fixture
def init(recipe_file, tmp_path, monkeypatch, capsys):
    """Writes a recipe for forty rows on a machine with this memory; returns what is printed."""
    base = load_recipe(recipe_file, []).model.base
    rows = tmp_path / "rows.csv"
    lines = (f"Is {n} even?,{'yes' if n % 2 == 0 else 'no'}\n" for n in range(40))
    rows.write_text("question,answer\n" + "".join(lines), encoding="utf-8")

    def run(memory: int) -> str:
        monkeypatch.setattr(machines, "total_memory", lambda: memory)
        with pytest.raises(SystemExit) as exit_:
            main(["init", "--data", str(rows), "--base", base, "--to", str(tmp_path / "r.yaml")])
        assert not exit_.value.code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def test_a_recipe_for_a_machine_with_room_has_the_defaults(init, tmp_path):
    assert "to fit into" not in init(24 * 10**9)
    assert "to fit into" not in (tmp_path / "r.yaml").read_text(encoding="utf-8")


def test_short_rows_are_not_held_for_as_long_as_the_recipe_allows(init, tmp_path):
    """Rows of 1,024 tokens would take more than this; these have about twenty."""
    init(700 * 10**6)
    recipe = load_recipe(tmp_path / "r.yaml", [])
    assert settings_that_fit(recipe, ["train"], this_machine())
    assert "micro_batch_size" not in (tmp_path / "r.yaml").read_text(encoding="utf-8")


def test_what_does_not_fit_is_made_smaller_in_the_file(init, tmp_path, monkeypatch):
    from finequant.recipes.commands import recipe as commands

    monkeypatch.setattr(commands, "check_tokens", lambda *_: None)  # as long as it allows
    assert re.search(
        r"init: to fit into the 0\.7 GB of this machine: train\.\w+: ", init(7 * 10**8)
    )
    text = (tmp_path / "r.yaml").read_text(encoding="utf-8")
    assert "# to fit into the 0.7 GB of this machine\n" in text
    assert "# lower it for a base of several billion parameters\n" in text  # comments stay
    recipe = load_recipe(tmp_path / "r.yaml", [])
    stages = [stage for stage in STAGES if stage in ("train", "quantize")]
    assert settings_that_fit(recipe, stages, this_machine()) == {}


def test_keys_are_added_to_a_file_without_touching_the_rest(tmp_path):
    file = tmp_path / "recipe.yaml"
    before = "# mine\nname: 'a'\n\ntrain:\n  epochs: 2    # two\n\nquantize:\n  exports: [gguf]\n"
    file.write_text(before, encoding="utf-8")
    added = {"train.epochs": 3, "quantize.calibration.scale_steps": 0, "lora.rank": 4}
    add_to_file(file, added, "smaller")
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# mine\nname: 'a'\n\ntrain:\n  epochs: 3")
    assert "  exports: [gguf]\n" in text
    assert text.count("# smaller\n") == 3
    assert re.search(r"lora:\n  rank: 4 +# smaller\n", text)
    assert re.search(r"calibration:\n    scale_steps: 0 +# smaller\n", text)
