"""The house: which folder may import which, and words that the field does not use."""

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from finequant.recipes.schema import Recipe

ROOT = Path(__file__).parents[1]
ORDER = ("recipes", "finetune", "quantize", "evaluate", "publish")
"""A folder imports from itself and from those before it."""

KNOWS_ALL = ("recipes/run.py", "recipes/commands/")

SOURCES = [
    path.relative_to(ROOT)
    for folder in (*ORDER, "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.parent != ROOT / "recipes" / "data"
]
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in SOURCES}

# Names that say nothing, or that only this project understood -> what to use instead.
OLD_NAMES = {
    "places": "latent weights, positions, offsets, spans",
    "place": "position, offset",
    "turned": "rotated",
    "not_rounded": "fake_quant_disabled",
    "growth": "scale delta",
    "leaders": "layers that share an input",
    "LEADERS": "SHARED_INPUTS",
    "rises": "loss increases, sensitivity",
    "alone": "data-free",
    "round_alone": "round_data_free",
    "write_alone": "write_data_free",
    "seed_model": "base",
    "told_to_the_user": "report_user_errors",
    "told_by_the_hub": "report_hub_errors",
    "put_off": "deferred_signals",
    "Wish": "StopRequest",
    "wish": "the setting that it is",
    "Speaker": "ChatModel",
    "GOES_ON": "RESUME_HINT",
    "AGAIN": "RESUME_HINT",
    "FEWEST": "MIN_ROWS",
    "ROOM": "MAX_CONTINUATION_TOKENS",
    "INSIDE": "MAX_DISTANCE",
    "ONE": "DEBOUNCE_SECONDS",
    "BEAT": "a name that says what it holds",
    "Stored": "QuantizedCheckpoint",
    "Written": "PieceRecord",
    "found": "result, or what it is",
    "said": "message, or what it is",
    "one": "what it is",
    "other": "what it is",
    "own": "what it is",
    "some": "what it is",
}


def test_imports_go_one_way():
    wrong = [
        f"{path}:{line}: imports {module}"
        for path, tree in TREES.items()
        if path.parts[0] in ORDER and not path.as_posix().startswith(KNOWS_ALL)
        for line, module in imports(tree)
        if module.startswith("finequant.")
        and ORDER.index(module.split(".")[1]) > ORDER.index(path.parts[0])
    ]
    assert not wrong


def test_every_folder_is_checked():
    assert {path.parts[0] for path in SOURCES} == {*ORDER, "benchmarks"}
    assert len(SOURCES) > 70


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from finequant.evaluate.compare import main", True),
        ("def f():\n    import finequant.publish.card", True),
        ("from finequant.finetune.model import load_base", False),
    ],
)
def test_an_import_against_the_order_is_noticed(source, wrong):
    ((_, module),) = imports(ast.parse(source))
    assert (ORDER.index(module.split(".")[1]) > ORDER.index("quantize")) == wrong


def test_no_script_hides_a_module():
    """`python evaluate/compare.py` looks for modules in evaluate/ first."""
    elsewhere = [path for path in sys.path if ROOT not in [Path(path), *Path(path).parents]]
    elsewhere += [path for path in sys.path if "site-packages" in path]
    names = {path.stem for folder in ORDER for path in (ROOT / folder).glob("*.py")}
    assert {"run", "train", "compare"} < names
    assert not names & sys.stdlib_module_names
    assert not [name for name in names if PathFinder.find_spec(name, elsewhere)]


def test_docstrings_are_sentences_with_a_verb():
    starts = ("Of ", "That of ", "Those ")
    wrong = [
        f"{path}:{node.lineno}: {node.value.value[:60]!r}"
        for path in (*SOURCES, *(ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).startswith(starts)
    ]
    assert not wrong


def test_names_are_those_of_the_field():
    wrong = [
        f"{path}:{line}: {name}; rather: {OLD_NAMES[name]}"
        for path, tree in TREES.items()
        for line, name in names(tree)
        if name in OLD_NAMES
    ]
    assert not wrong


def test_every_key_of_a_recipe_is_described():
    schema = Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    keys = {
        f"{section}.{key}": value
        for section, content in sections.items()
        for key, value in content.get("properties", {}).items()
    }
    assert len(keys) > 100
    assert not [key for key, value in keys.items() if not value.get("description")]


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Returns line and module of every import, also inside functions."""
    return [
        (node.lineno, module)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for module in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    ]


def names(tree: ast.AST) -> list[tuple[int, str]]:
    """Returns line and name of everything that is assigned, passed or defined."""
    defined = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.append((node.lineno, node.id))
        elif isinstance(node, ast.arg):
            defined.append((node.lineno, node.arg))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.append((node.lineno, node.name))
    return defined
