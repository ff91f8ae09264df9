"""YAML + key.sub=value -> Recipe, with every error at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from finequant.recipes.errors import UserError, listed
from finequant.recipes.schema import Recipe
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".raw")
Location = tuple[str | int, ...]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies `key.sub=value` overrides and checks all of it.

    Local paths, written relative to the recipe's folder, come back absolute.

    Raises:
        UserError: naming every problem with file, line, key, value and what was expected.
    """
    path = Path(path)
    document, origins = _read_yaml(path)
    for override in overrides:
        _apply_override(document, origins, override)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems = _describe(error, document, origins)
        raise UserError(_summary(path, problems)) from None
    return _with_absolute_paths(recipe, path, origins)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe; local paths are relative to where it is written.

    `output_dir` is left out: an artefact does not depend on the folder it was made in.
    """
    content = recipe.model_dump(mode="json", exclude={"output_dir"})
    for holder, key in _path_fields(content):
        if Path(holder[key]).is_absolute():
            holder[key] = os.path.relpath(holder[key], path.parent)
    yaml = YAML()
    yaml.default_flow_style = False
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(content, file)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, str]]:
    """The document as plain Python, and `file:line` for every key in it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start}: save it as UTF-8") from None
    try:
        tree = YAML(typ="rt").load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {what}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}: a recipe is a mapping of sections (name, model, data, ...)")
    origins: dict[Location, str] = {(): str(path)}
    return _plain(tree, (), str(path), origins), origins


def _plain(node: Any, at: Location, file: str, origins: dict[Location, str]) -> Any:
    if isinstance(node, CommentedMap):
        for key in node:
            origins[(*at, key)] = f"{file}:{node.lc.key(key)[0] + 1}"
        return {str(key): _plain(node[key], (*at, key), file, origins) for key in node}
    if isinstance(node, CommentedSeq):
        for index in range(len(node)):
            origins[(*at, index)] = f"{file}:{node.lc.item(index)[0] + 1}"
        return [_plain(item, (*at, index), file, origins) for index, item in enumerate(node)]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    if node is None:
        return None
    raise UserError(
        f"{_origin(origins, at)}: {_dotted(at)}: a {type(node).__name__} is no plain YAML value; "
        "write a number, true, false, or text in quotes"
    )


def _apply_override(document: dict[str, Any], origins: dict[Location, str], override: str) -> None:
    key, equals, text = override.partition("=")
    where = f"command line: {override}"
    if not equals or not key:
        raise UserError(f"{where}: expected key.sub=value, such as train.max_steps=5")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except YAMLError:
        value = text
    at: Location = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    holder: Any = document
    for depth, part in enumerate(at[:-1]):
        if isinstance(holder, dict) and holder.get(part) is None:
            holder[part] = {}
        try:
            holder = holder[part]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{where}: the recipe has no {_dotted(at[: depth + 1])}") from None
    try:
        holder[at[-1]] = value
    except (IndexError, TypeError):
        raise UserError(f"{where}: the recipe has no {_dotted(at)}") from None
    origins[at] = "command line"


def _describe(error: ValidationError, document: Any, origins: dict[Location, str]) -> list[str]:
    """One line for each key at fault, in the order of the file."""
    problems: dict[Location, list[str]] = {}
    for item in error.errors(include_url=False):
        missing = item["type"] == "missing"
        at = tuple(item["loc"]) if missing else _in_document(tuple(item["loc"]), document)
        if item["type"] == "extra_forbidden":
            message = f"unknown key (value {item['input']!r}){_did_you_mean(at)}"
        elif missing:
            message = "this key is required"
        else:
            what = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            shown = "" if isinstance(item["input"], dict) else f" (value {item['input']!r})"
            message = what + shown
        problems.setdefault(at, []).append(message)
    return [
        f"{_origin(origins, at)}: {_dotted(at) or 'recipe'}: {'; or '.join(messages)}"
        for at, messages in problems.items()
    ]


def _summary(path: Path, problems: list[str]) -> str:
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {path}; `finequant schema` lists every key\n  {listed(problems, most=50)}"


def _in_document(at: Location, document: Any) -> Location:
    """The part of pydantic's location that names a key: it also names members of unions."""
    node = document
    for depth, part in enumerate(at):
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return at[:depth]
    return at


def _origin(origins: dict[Location, str], at: Location) -> str:
    while at not in origins:
        at = at[:-1]
    return origins[at]


def _dotted(at: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in at)


def _did_you_mean(at: Location) -> str:
    """The nearest key beside the unknown one, else the nearest anywhere in a recipe."""
    keys = sorted(_all_keys(Recipe))
    named = [part for part in at if isinstance(part, str)]
    beside = [key for key in keys if key.split(".")[:-1] == named[:-1]]
    by_leaf = {key.split(".")[-1]: key for key in reversed(keys)}
    for wanted, candidates in (
        (".".join(named), beside),
        (named[-1], list(by_leaf)),
        (".".join(named), keys),
    ):
        near = difflib.get_close_matches(wanted, candidates, n=1, cutoff=0.75)
        if near:
            return f"; did you mean {by_leaf.get(near[0], near[0])}?"
    return f"; expected one of {', '.join(key.split('.')[-1] for key in beside)}" if beside else ""


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _all_keys(kind, f"{prefix}{name}.")


def _path_fields(content: dict[str, Any]) -> Iterable[tuple[dict[str, Any], str]]:
    """Every place of a dumped recipe that may hold a local path."""
    model, data, evaluate = content["model"], content["data"], content["evaluate"]
    yield model, "base"
    if (model["chat_template"] or "").endswith(".jinja"):
        yield model, "chat_template"
    for part in ("train", "validation", "test"):
        yield from ((source, "source") for source in data[part])
    yield from ((corpus, "source") for corpus in evaluate["perplexity"])
    if evaluate["task_folder"]:
        yield evaluate, "task_folder"


def _with_absolute_paths(recipe: Recipe, file: Path, origins: dict[Location, str]) -> Recipe:
    content = recipe.model_dump()
    problems = []
    for holder, key in _path_fields(content):
        value = holder[key]
        local = (file.parent / Path(value).expanduser()).resolve()
        expected_local = value.endswith((*DATA_SUFFIXES, ".jinja")) or value.startswith(
            (".", "/", "~")
        )
        if value.startswith("package:"):
            continue
        if local.exists():
            holder[key] = str(local)
        elif expected_local or key == "task_folder":
            at = next((at for at in origins if _value_at(recipe, at) == value), ())
            problems.append(
                f"{_origin(origins, at)}: {_dotted(at)}: no such file or folder: {value} "
                f"(paths start at the recipe's folder, {file.parent})"
            )
    if problems:
        raise UserError(_summary(file, problems))
    return Recipe.model_validate(content)


def _value_at(recipe: Recipe, at: Location) -> Any:
    node: Any = recipe
    for part in at:
        try:
            node = node[part] if isinstance(part, int) else getattr(node, str(part))
        except (AttributeError, IndexError, KeyError, TypeError):
            return None
    return node
