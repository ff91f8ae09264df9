"""Names of exported files, and metadata about the model: base, fine-tune, size, license.

Both follow llama.cpp's converter and GGUF's naming convention
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#gguf-naming-convention); the gguf package
takes names apart and puts them together.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finequant.finetune.architecture import parameter_count
from finequant.recipes.base import locate_base
from finequant.recipes.errors import one_line
from finequant.recipes.schema import Model, Recipe
from finequant.recipes.terminal import say

if TYPE_CHECKING:
    from gguf import Metadata

    from finequant.finetune.architecture import DecoderConfig


def file_stem(recipe: Recipe, config: DecoderConfig, label: str | None = None) -> str:
    """Names a file after base, fine-tune and quantization: Llama-3.2-1B-support-Q4_0."""
    from gguf.utility import naming_convention

    about = metadata(recipe, config)
    return naming_convention(
        about.name, about.basename, about.finetune, about.version, about.size_label, label
    )


def metadata(recipe: Recipe, config: DecoderConfig) -> Metadata:
    """Collects the values of GGUF's general.* keys for a fine-tuned model."""
    from gguf import Metadata
    from gguf.utility import size_label

    publish, base = recipe.publish, base_name(recipe)
    parts = Metadata.get_model_id_components(base)
    full, organization, basename, finetune, version, size = parts
    finetune = "-".join(filter(None, (finetune, recipe.name.removeprefix(f"{full}-"))))
    license = base_license(recipe.model)
    about = Metadata(
        name=Metadata.id_to_title(f"{full}-{recipe.name.removeprefix(f'{full}-')}"),
        basename=basename or full,
        finetune=finetune,
        version=version,
        size_label=size or size_label(parameter_count(config), 0, 0, 0),
        description=publish.description,
        license=publish.license or license.get("license"),
        license_name=publish.license_name or license.get("license_name"),
        license_link=publish.license_link or license.get("license_link"),
        languages=publish.language or None,
        tags=["text-generation", *publish.tags],
    )
    about.base_models = [{"name": Metadata.id_to_title(full)}]
    if organization:
        about.base_models[0] |= {
            "organization": Metadata.id_to_title(organization),
            "repo_url": f"https://huggingface.co/{base}",
        }
    return about


def base_name(recipe: Recipe) -> str:
    """Returns the base's Hub id, or the name of its folder or file without the quantization."""
    if recipe.publish.base_model:
        return recipe.publish.base_model
    folder, file = locate_base(recipe.model)
    if file:
        return re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", file.removesuffix(".gguf"))
    return folder.name if folder else recipe.model.base


def base_license(model: Model) -> dict[str, str | None]:
    """Reads the license of a base that is on this machine; {} for a Hub id."""
    folder, file = locate_base(model)
    if folder and file:
        return {"license": _gguf_license(folder / file)}
    return license_on_card(folder) if folder else {}


def license_on_card(folder: Path) -> dict[str, str | None]:
    """Reads license, license_name, and license_link from the model card in a folder; {} without a
    card, or if its metadata cannot be read. Of several licenses, it returns none."""
    card = folder / "README.md"
    return dict(_on_card(card)) if card.exists() else {}


@cache  # so that it is said once
def _on_card(card: Path) -> dict[str, str | None]:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (ValueError, YAMLError) as error:
        say(f"{card}: neither its metadata nor its license can be read: {one_line(error)}")
        return {}
    stated = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return {key: _single(value) for key, value in stated.items()}


def _single(value: Any) -> str | None:
    """Returns a value as text, that of a list with one entry, or None."""
    values = value if isinstance(value, list) else [value]
    return None if values[1:] or values[:1] in ([], [None]) else str(values[0])


@cache  # the reader takes seconds, because it looks at every token
def _gguf_license(file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    return field.contents() if field else None
