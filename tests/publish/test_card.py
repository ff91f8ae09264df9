"""docs/model-card.md: the committed example has what every card has."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[2]
CARD = ROOT / "docs" / "model-card.md"


def test_the_example_holds_the_hubs_metadata():
    data = ModelCard.load(CARD).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.base_model_relation == "quantized"
    assert (data.license, data.language) == ("apache-2.0", ["en"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"finequant", "8da4w"} <= set(data.tags)
    assert {result.metric_type for result in data.eval_results} == {"perplexity", "json_match"}


def test_the_example_has_every_section_and_one_set_of_figures():
    text = CARD.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Measured", "Load it", "Limits", "License", "Recipe", "Made with"]
    header = next(line for line in text.splitlines() if line.startswith("|  | base | tuned |"))
    assert "| quantized |" in header
    for result in ModelCard.load(CARD).data.eval_results:
        value = result.metric_value
        shown = f"{value:.2f}" if result.metric_type == "perplexity" else f"{100 * value:.1f} ± "
        assert shown in text
    assert re.search(r"n=\d+", text)
    assert "finequant 0." in text.split("## Made with")[1]


def test_the_example_names_no_folder_of_a_machine():
    text = CARD.read_text(encoding="utf-8")
    assert not re.findall(r"(?:^|[\s\"'`(:])/(?:\w[\w.-]*/)+", text)
    assert "source: train.jsonl" in text


def test_the_examples_recipe_is_the_one_that_is_shipped():
    """The keys in the card are those of recipes/quickstart.yaml."""
    from ruamel.yaml import YAML

    from finequant.recipes.load import load_recipe, without_folders

    text = CARD.read_text(encoding="utf-8")
    shown = YAML(typ="safe").load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    shipped = without_folders(load_recipe(ROOT / "recipes" / "quickstart.yaml"))
    expected = shipped.model_dump(mode="json", exclude={"output_dir"}, exclude_defaults=True)
    shown["publish"].pop("repo_id")
    assert shown == expected
