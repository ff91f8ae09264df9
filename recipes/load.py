"""Loads a recipe from YAML and `key.sub=value` overrides, and reports every error at once."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from functools import reduce
from io import StringIO
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarbool import ScalarBoolean

from finequant.recipes.artifact import replace_text
from finequant.recipes.errors import UserError, listed, shown
from finequant.recipes.locate import CHATML_TOOLS, is_run, locate_recipe
from finequant.recipes.schema import EFFORTS, HUB_ID, LANGUAGE, LICENSE, NAME, Recipe, Section
from finequant.recipes.sources import COMPRESSIONS, TABLES, is_pattern, matching_files

LOCAL_SUFFIXES = (*TABLES, *COMPRESSIONS, ".txt", ".raw", ".jinja")
FOLDERS = ("task_folder", "license_folder")
OTHER_NAME = {("lora", "r"): "rank", ("lora", "rank"): "r"}
FORMS = {
    NAME: "expected letters, digits, - _ and .",
    HUB_ID: "expected a Hub repository: your-name/model-name",
    LANGUAGE: "expected a code of two or three letters such as en, or code, or multilingual",
    LICENSE: "expected a license as the Hub names it, such as apache-2.0",
}
"""The patterns of the schema, in words."""
MARKS = "\"'|>&*!"
"""Characters with which a text in YAML begins that is not written as it is."""
MOST_ENTRIES = 100_000
"""Keys and list entries in a recipe: with aliases of aliases, a few lines stand for billions."""
COMMAND_LINE = "command line"
"""Where a key that is overridden comes from."""
Location = tuple[str | int, ...]
SectionType = TypeVar("SectionType", bound=Section)


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), missing_ok: bool = False
) -> Recipe:
    """Reads a recipe, applies `key.sub=value` overrides, and validates the result.

    path: a file, a run directory, which then becomes output_dir, or the name of a shipped recipe.
    Local paths are relative to the recipe's folder in the file, and absolute in the result.
    missing_ok: whether files that it names may be missing, as when a run was copied; those of
        overrides may not.

    Raises:
        UserError: naming every problem with its file, line, key, value, and what was expected.
    """
    given, path = Path(path), locate_recipe(Path(path))
    document, origins = _read_yaml(path)
    if is_run(given):
        document["output_dir"] = str(given)
    if any(override.startswith("quantize.effort=") for override in overrides):
        _leave_out_what_effort_decides(document)
    for override in overrides:
        _apply_override(document, origins, override)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems = _describe(error, document, origins)
        raise UserError(_summary(path, problems)) from None
    return _with_absolute_paths(recipe, path, document, origins, missing_ok)


def read_section(path: Path, name: str, section: type[SectionType]) -> SectionType:
    """Reads one section of a resolved recipe; files that other sections name need not exist.

    Raises:
        UserError: if it cannot be read.
    """
    document, origins = _read_yaml(path)
    try:
        return section.model_validate(document.get(name))
    except ValidationError as error:
        problems = _describe(error, {name: document.get(name)}, origins)
        raise UserError(_summary(path, problems)) from None


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe, with local paths relative to the file's folder.

    `output_dir` is left out: an artifact does not depend on the folder it was made in.
    """
    content = recipe.model_dump(mode="json", exclude={"output_dir"})
    for at in path_fields(content):
        holder = reduce(getitem, at[:-1], content)
        if holder[at[-1]] == str(CHATML_TOOLS):
            holder[at[-1]] = CHATML_TOOLS.name
        elif Path(holder[at[-1]]).is_absolute():
            holder[at[-1]] = os.path.relpath(holder[at[-1]], path.parent.resolve())
    replace_text(path, as_yaml(content))


def as_yaml(content: dict[str, Any]) -> str:
    """Writes plain Python objects as YAML, in the order of their keys."""
    text = StringIO()
    YAML().dump(content, text)
    return text.getvalue()


def values_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Parses `key.sub=value` overrides, which `load_recipe` has accepted, for `add_to_file`."""
    pairs = (override.partition("=")[::2] for override in overrides)
    return {key: _override_value(text, tuple(key.split(".")), key) for key, text in pairs}


def add_to_file(path: Path, values: dict[str, Any], comment: str) -> None:
    """Sets keys such as `lora.rank` in a recipe's file; keeps everything else, comments included.

    comment: written beside each of the keys, but not of entries of lists.
    """
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, sys.maxsize
    yaml.indent(sequence=4, offset=2)  # as `init` writes lists
    document = yaml.load(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        *sections, name = key.split(".")
        section = document
        for part in sections:
            if isinstance(section, list):
                section = section[int(part)]
            else:
                section = section.setdefault(part, CommentedMap())
        if isinstance(section, list):  # an entry has no room for a comment
            section[int(name)] = value
        else:
            section.pop(name, None)
            section.insert(0, name, value, comment)
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)


def without_folders(recipe: Recipe) -> Recipe:
    """Replaces each local path by its file name, as if the file were next to the recipe; a second
    file of the same name gets a number.

    The result can be published: it reveals nothing about the machine it was made on.
    """
    content = recipe.model_dump() | {"output_dir": None}
    paths: dict[str, str] = {}
    for at in path_fields(content):
        holder = reduce(getitem, at[:-1], content)
        path = Path(holder[at[-1]])
        if not path.is_absolute():
            continue
        head, dot, rest = path.name.partition(".")
        name, number = path.name, 1
        while paths.setdefault(name, str(path)) != str(path):
            number += 1
            name = f"{head}-{number}{dot}{rest}"
        holder[at[-1]] = name
    return Recipe.model_validate(content)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, str]]:
    """Returns the document as plain Python objects, and `file:line` for every key in it."""
    if path.exists() and not path.is_file() and not path.is_dir():  # such as /dev/stdin
        raise UserError(
            f"{path}: not a file: each stage reads the recipe again, and paths start at its "
            "folder: write the recipe into a file"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: save it as UTF-8") from None
    try:
        tree = YAML().load(text)
    except Exception as error:  # not only YAMLError: ValueError for month 13, RecursionError
        raise UserError(f"{path}{_yaml_problem(error, text)}") from None
    if not isinstance(tree, CommentedMap):
        raise UserError(
            f"{path}: expected a mapping of sections (name, model, data, ...), "
            f"found {shown(tree) if tree is not None else 'nothing'}"
        )
    origins: dict[Location, str] = {(): str(path)}
    return _plain(tree, (), str(path), origins), origins


def _yaml_problem(error: Exception, text: str) -> str:
    mark, position = getattr(error, "problem_mark", None), getattr(error, "position", None)
    line = mark.line if mark else position and text.count("\n", 0, position)
    where = "" if line is None else f":{line + 1}"
    what = str(getattr(error, "problem", None) or error or type(error).__name__).splitlines()[0]
    advice = ": indent with spaces, not with tabs" if "'\\t'" in what else ""
    return f"{where}: not valid YAML: {what}{advice}"


def _plain(node: Any, at: Location, file: str, origins: dict[Location, str]) -> Any:
    """Converts ruamel's types to Python's, and records the line of each key in `origins`.

    `train: {epochs: 2}` on line 3 gives {"train": {"epochs": 2}}, and origins[("train", "epochs")]
    is "recipe.yaml:3".
    """
    where = f"{_origin(origins, at)}: {_dotted(at[:3])}..."
    if len(at) > 50:
        raise UserError(f"{where}: nested too deeply, or inside itself")
    if len(origins) > MOST_ENTRIES:
        raise UserError(
            f"{where}: more than {MOST_ENTRIES:,} keys and entries, counted again where an alias "
            "(*name) repeats them: shorten the recipe"
        )
    if isinstance(node, (CommentedMap, CommentedSeq)) and node.tag.value is None:
        items = node.items() if isinstance(node, CommentedMap) else enumerate(node)
        plain = {}
        for key, value in items:
            name = key if isinstance(node, CommentedSeq) else str(key)
            if key in (node.lc.data or {}):  # keys merged in by `<<` have no line
                origins[(*at, name)] = f"{file}:{node.lc.data[key][0] + 1}"
            plain[name] = _plain(value, (*at, name), file, origins)
        return plain if isinstance(node, CommentedMap) else list(plain.values())
    if isinstance(node, ScalarBoolean):  # a bool with an anchor; a subclass of int
        return bool(node)
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    if node is None:
        return None
    tag = getattr(getattr(node, "tag", None), "value", None) or type(node).__name__
    raise UserError(
        f"{_origin(origins, at)}: {_dotted(at)}: {tag.replace('tag:yaml.org,2002:', '!!')} is not "
        f"understood (value {shown(str(node))}): write a number, true, false or text in quotes"
    )


def _leave_out_what_effort_decides(document: dict[str, Any]) -> None:
    """Drops the file's own values of the keys that `quantize.effort` decides: an effort on the
    command line would not change them, least of all in a run's recipe, which has every key."""
    section = document.get("quantize")
    for decided in EFFORTS.values() if isinstance(section, dict) else ():
        for key, value in decided.items():
            inner = section.get(key)
            if isinstance(value, dict) and isinstance(inner, dict):
                section[key] = {name: inner[name] for name in inner if name not in value}
            else:
                section.pop(key, None)


def _apply_override(document: dict[str, Any], origins: dict[Location, str], override: str) -> None:
    key, equals, text = override.partition("=")
    where = f"command line: {override}"
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{where}: expected key.sub=value, such as train.max_steps=5")
    value = _override_value(text, tuple(parts), where)
    at: Location = ()
    holder: Any = document
    try:
        for part in parts[:-1]:
            at = (*at, _index(holder, part))
            # `true` for a section means the section with its defaults.
            if isinstance(holder, dict) and (holder.get(part) is None or holder[part] is True):
                holder[part] = {}
                origins[at] = COMMAND_LINE
            holder = holder[at[-1]]
        at = (*at, _index(holder, parts[-1]))
        holder[at[-1]] = value
    except (IndexError, TypeError):
        raise UserError(f"{where}: the recipe has no {_dotted(at)}{_instead(holder, at)}") from None
    if at in OTHER_NAME:
        holder.pop(OTHER_NAME[at], None)
    for stale in [known for known in origins if known[: len(at)] == at]:
        del origins[stale]
    origins[at] = COMMAND_LINE


def _override_value(text: str, at: Location, where: str) -> Any:
    try:
        tree = YAML().load(text) if text.strip() else None
    except Exception:  # not YAML, so plain text
        return text
    # In text without quotes, YAML would drop what follows ` #`, and line breaks.
    is_text = isinstance(tree, str) and text.lstrip()[0] not in MARKS
    if is_text or (tree is None and text.lstrip().startswith("#")):
        tree = text.strip()
    return _plain(tree, at, where, {(): where})


def _instead(holder: Any, at: Location) -> str:
    """Says what stands where an override expects a section, and how to set a key there."""
    parent = _dotted(at[:-1])
    if isinstance(holder, list):
        return f": {parent} is a list of {len(holder)}, whose first entry is {parent}.0"
    where = f": {parent} is {shown(holder)}"
    if at[0] == "data" and at[1] in ("train", "validation", "test"):  # a source without its keys
        return f"{where}: write '{parent}={{source: {holder}, ...}}'"
    return where


def _index(holder: Any, part: str) -> str | int:
    return int(part) if isinstance(holder, list) and part.isdecimal() else part


def _describe(error: ValidationError, document: Any, origins: dict[Location, str]) -> list[str]:
    """Writes one line for each invalid key, in the order of the schema."""
    problems: dict[Location, list[str]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":  # its default depends on an invalid key
            continue
        missing = item["type"] == "missing"
        at = tuple(item["loc"]) if missing else _in_document(tuple(item["loc"]), document)
        if item["type"] == "extra_forbidden":
            message = f"unknown key (value {shown(item['input'])}){_did_you_mean(at)}"
        elif missing:
            message = "this key is required"
        else:
            message = _expectation(item["msg"])
            if item["type"] != "value_error" or not isinstance(item["input"], dict):
                message += f" (value {shown(item['input'])}){_other_spelling(item)}"
        problems.setdefault(at, []).append(message)
    return [
        f"{_origin(origins, at)}{_overridden_in(origins, at)}: {_dotted(at) or 'recipe'}: "
        f"{'; or '.join(messages)}"
        for at, messages in problems.items()
    ]


def _expectation(message: str) -> str:
    """Rephrases pydantic's message in terms of a recipe."""
    for theirs, ours in (
        *(
            (re.escape(f"String should match pattern '{form}'"), what)
            for form, what in FORMS.items()
        ),
        ("^Value error, ", ""),
        ("^Input should be", "expected"),
        ("^(String|List) should", "expected to"),
        ("a valid boolean.*", "true or false"),
        (r"a valid dictionary( or instance of \w+)?", "a mapping of keys to values"),
    ):
        message = re.sub(theirs, ours, message)
    return message


def _other_spelling(item: ErrorDetails) -> str:
    """Says how to write a number that is in quotes, or a list that has no brackets."""
    if item["type"] == "literal_error" and "," in str(item["input"]):
        return f"; write a list in brackets: [{item['input']}]"
    try:
        float(item["input"] if isinstance(item["input"], str) else "")
    except ValueError:
        return ""
    return "; write it without quotes" if item["type"] in ("int_type", "float_type") else ""


def _summary(path: Path, problems: list[str]) -> str:
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {path}; `finequant schema` lists every key\n  {listed(problems, most=50)}"


def _in_document(at: Location, document: Any) -> Location:
    """Keeps the keys of pydantic's location, which also names members of unions.

    ("quantize", "layers", "*.down_proj", "mapping", "bits") becomes
    ("quantize", "layers", "*.down_proj", "bits").
    """
    node, keys = document, ()
    for part in at:
        if part == 0 and not isinstance(node, list):  # a single source, written without a list
            continue
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            continue
        keys = (*keys, part)
    return keys


def _origin(origins: dict[Location, str], at: Location) -> str:
    while at not in origins:
        at = at[:-1]
    return origins[at]


def _overridden_in(origins: dict[Location, str], at: Location) -> str:
    """Names the keys that the command line set in a section of the file, which is refused because
    some of its keys do not go together; nothing for a single key."""
    if _origin(origins, at) == COMMAND_LINE:
        return ""
    under = [key for key in origins if origins[key] == COMMAND_LINE and key[: len(at)] == at]
    made = {key[:length] for key in under for length in range(len(key))}  # sections on the way
    keys = ", ".join(_dotted(key) for key in under if key not in made)
    return f" with {keys} of the command line" if keys else ""


def _dotted(at: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in at)


def _did_you_mean(at: Location) -> str:
    """Suggests the closest key in the same section, or else anywhere in a recipe."""
    *parents, name = [part for part in at if isinstance(part, str)]
    keys = sorted(_all_keys(Recipe), key=lambda key: -key.count("."))
    siblings = [key for key in keys if key.split(".")[:-1] == parents]
    for candidates in (siblings, keys):
        by_leaf = {key.split(".")[-1]: key for key in candidates}
        near = difflib.get_close_matches(name.lower(), by_leaf, n=1, cutoff=0.75)
        if near:
            return f"; did you mean {by_leaf[near[0]]}?"
    expected = ", ".join(key.split(".")[-1] for key in siblings)
    return f"; expected one of {expected}" if siblings else ""


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _all_keys(kind, f"{prefix}{name}.")


def path_fields(content: dict[str, Any]) -> Iterable[Location]:
    """Yields the location of every value in a dumped recipe that may be a local path."""
    yield "model", "base"
    if (content["model"]["chat_template"] or "").endswith(".jinja"):
        yield "model", "chat_template"
    for part in ("train", "validation", "test"):
        yield from (("data", part, index, "source") for index in range(len(content["data"][part])))
    calibration = content["quantize"]["calibration"]["data"]
    yield from (
        ("quantize", "calibration", "data", index, "source") for index in range(len(calibration))
    )
    corpora = content["evaluate"]["perplexity"]
    yield from (("evaluate", "perplexity", index, "source") for index in range(len(corpora)))
    if content["evaluate"]["task_folder"]:
        yield "evaluate", "task_folder"
    if content["publish"]["license_folder"]:
        yield "publish", "license_folder"


def _with_absolute_paths(
    recipe: Recipe, file: Path, document: Any, origins: dict[Location, str], missing_ok: bool
) -> Recipe:
    content = recipe.model_dump()
    problems = []
    for at in path_fields(content):
        holder = reduce(getitem, at[:-1], content)
        value = holder[at[-1]]
        if value.startswith("package:"):
            continue
        local = _existing(file.parent, value)
        if local is None and value == CHATML_TOOLS.name:
            local = CHATML_TOOLS
        if local is not None:
            holder[at[-1]] = str(local)
            continue
        key = _in_document(at, document)
        if missing_ok and is_local(value) and _origin(origins, key) != COMMAND_LINE:
            holder[at[-1]] = str((file.parent / value).resolve())
        elif is_local(value) or at[-1] in FOLDERS:
            name, folder = _dotted(key), file.parent.resolve()
            hint = f"paths start at the recipe's folder, {folder}"
            if is_run(file.parent) and _origin(origins, key) != COMMAND_LINE:
                copied = (folder / value).resolve()
                hint = f"if the run was copied here, copy this to {copied}, or set {name}=PATH"
            problems.append(
                f"{_origin(origins, key)}: {name}: no such file or folder: {value} ({hint})"
            )
    if problems:
        raise UserError(_summary(file, problems))
    return Recipe.model_validate(content)


def is_local(name: str) -> bool:
    """Says whether a name can only be that of a file or folder, and not of anything on the Hub."""
    return name.endswith(LOCAL_SUFFIXES) or name[0] in "./~"


def _existing(folder: Path, value: str) -> Path | None:
    try:
        path = (folder / Path(value).expanduser()).resolve()
        if path.exists() or (is_pattern(path) and matching_files(path)):
            return path
        return None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
        return None
