"""`finequant sweep`: each point equals quantize and evaluate, and none is measured twice."""

from __future__ import annotations

import json
import math
import re
import signal

import pytest

from finequant.evaluate.report.sweep_report import (
    groupwise_tables,
    mean_accuracy,
    print_sweep,
    sweep_rows,
    write_sweep,
)
from finequant.evaluate.sweep import sweep
from finequant.evaluate.sweep_points import read_points, split_values
from finequant.recipes.errors import UserError
from finequant.recipes.interrupt import Interrupted

TRAINED = ("train.max_steps=2", "train.learning_rate=1e-2")


@pytest.fixture
def swept(recipe_file):
    """Sweeps the tiny model, by default the base, and returns sweep.json."""

    def run(*overrides: str, model: str = "base") -> dict:
        sweep(recipe_file, [*TRAINED, *overrides], model)
        return json.loads((recipe_file.parent / "run" / "sweep" / "sweep.json").read_text())

    return run


@pytest.fixture
def measured(monkeypatch):
    """The names of the models, added as they are measured."""
    from finequant.evaluate import measure

    names, measure_model = [], measure.measure_model

    def counted(name, *arguments):
        names.append(name)
        return measure_model(name, *arguments)

    monkeypatch.setattr(measure, "measure_model", counted)
    return names


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8", ["8"]),
        ("8,4, 3", ["8", "4", "3"]),
        ("rtn,gptq", ["rtn", "gptq"]),
        ("", []),
        ("[8, 4]", ["[8, 4]"]),
        ("{tokens: 8, length: 4}", ["{tokens: 8, length: 4}"]),
        ("{tokens: 8, length: 4},{tokens: 16}", ["{tokens: 8, length: 4}", "{tokens: 16}"]),
        ("'a, b',c", ["'a, b'", "c"]),
        ("no] yaml, [at all", ["no] yaml, [at all"]),
    ],
)
def test_commas_at_top_level_split(text, values):
    assert split_values(text) == values


def test_points_are_all_combinations(recipe_file):
    points = read_points(
        recipe_file, ["seed=3", "quantize.bits=8,4", "quantize.method=rtn,gptq", "seed=5"]
    )
    schemes = [(p.recipe.quantize.bits, p.recipe.quantize.method) for p in points]
    assert schemes == [(8, "rtn"), (8, "gptq"), (4, "rtn"), (4, "gptq")]
    assert {point.recipe.seed for point in points} == {5}
    assert points[0].name == "rtn, 8 bits, groups of 32"
    (point,) = read_points(recipe_file, ["quantize.bits=4,4"])
    assert point.settings == {"method": "rtn", "bits": 4, "group_size": 32}


def test_further_swept_keys_are_settings(recipe_file):
    overrides = ["quantize.scale=max,search", "quantize.calibration.tokens=512"]
    points = read_points(recipe_file, overrides)
    assert [point.settings["scale"] for point in points] == ["max", "search"]
    assert points[1].name == "rtn, 4 bits, groups of 32, scale search"
    assert all("calibration.tokens" not in point.settings for point in points)


def test_a_budget_stands_for_its_bits(swept, recipe_file):
    report = swept("quantize.budget=4.5,6.5", "quantize.layers={'*.down_proj': {bits: 8}}")
    floating, *points = report["models"].values()
    assert [point["settings"]["bits"] for point in points] == ["budget 4.5", "budget 6.5"]
    few, many = (point["packed_bits_per_weight"] for point in points)
    assert few < many < floating["packed_bits_per_weight"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=1,2", "only keys of the quantize section can be swept"),
        ("data.system=Hello, you", "in quotes: 'data.system=\"Hello, you\"'"),
        ("quantize.dtype=float32,bfloat16", "one float model"),
        ("quantize.training=null,{steps: 2}", "cannot be swept"),
        ("quantize.training.steps=2,3", "cannot be swept"),
        ("quantize.exports=[],[gguf]", "nothing that a sweep measures"),
        ("quantize.bits=4,9", "quantize.bits: expected"),
        ("quantize.bitss=4,3", "did you mean quantize.bits?"),
        ("quantize.group_size=32,48", "48 does not divide the input features"),
        ("quantize.layers={'*.down': float},{lm_head: float}", "'*.down' matches no layer"),
        ("bits", "expected key.sub=value"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_is_loaded(recipe_file, override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sweep(recipe_file, ["quantize.method=rtn,gptq", override], "base")
    assert not (recipe_file.parent / "run").exists()


def test_a_task_without_data_is_refused_before_a_model_is_measured(
    recipe_file, tmp_path, monkeypatch
):
    from lm_eval.tasks import TaskManager

    from finequant.evaluate import sweep as module
    from finequant.evaluate.metrics import tasks

    folder = tmp_path / "own"
    folder.mkdir()
    text = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n"
    (folder / "mine.yaml").write_text(f"{text}test_split: test\n")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(tasks, "_task_manager", lambda _: manager)
    monkeypatch.setattr(module, "_float_model", None)  # not reached
    own = f"evaluate.task_folder={folder}"
    with pytest.raises(UserError, match="cannot load lm-eval task 'mine'"):
        sweep(recipe_file, ["quantize.method=rtn", own, "evaluate.tasks=[mine]"], "base")


def test_the_tuned_model_needs_an_adapter(recipe_file):
    with pytest.raises(UserError, match="only `finequant train RECIPE`, first"):
        sweep(recipe_file, ["quantize.bits=8,4"], "tuned")


def test_the_base_is_swept_without_an_adapter(swept, recipe_file, tokenizer, capsys):
    report = swept("quantize.bits=8,2", "quantize.method=rtn,gptq", "quantize.head=float")
    float_, *points = report["models"].values()
    assert [list(point["settings"].values()) for point in points] == [
        ["rtn", 8, 32],
        ["gptq", 8, 32],
        ["rtn", 2, 32],
        ["gptq", 2, 32],
    ]
    assert float_["bits_per_weight"] == float_["packed_bits_per_weight"] == 32
    exact = float_["perplexity"]["text"]["token"]
    eight, _, two, _ = (point["perplexity"]["text"]["token"] for point in points)
    assert abs(eight / exact - 1) < 0.01 < abs(two / exact - 1)
    # The linear layers of two blocks; the embedding, which is also the head, and five norms.
    quantized = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160)
    rest = len(tokenizer) * 64 + 5 * 64
    bits = (quantized * (8 + 32 / 32) + 32 * rest) / (quantized + rest)
    assert points[0]["packed_bits_per_weight"] == pytest.approx(bits)
    assert points[0]["bits_per_weight"] == pytest.approx(points[2]["bits_per_weight"], rel=0.01)
    folder = recipe_file.parent / "run"
    assert not (folder / "adapter").exists()
    assert (folder / "sweep" / "plots" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list((folder / "sweep").glob("*.partial"))
    markdown, printed = (folder / "sweep" / "sweep.md").read_text(), capsys.readouterr().out
    for row in sweep_rows(report)[1]:
        assert f"| {' | '.join(row)} |" in markdown
        assert any(all(cell in line for cell in row) for line in printed.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_point_is_what_quantize_and_evaluate_give(swept, recipe_file, train_once, method):
    from finequant.evaluate.compare import main as compare
    from finequant.quantize.convert import main as convert

    arguments = [str(recipe_file), *TRAINED, f"quantize.method={method}", "quantize.bits=3"]
    train_once(arguments)
    sweeps = swept("quantize.bits=8,3", f"quantize.method={method}", model="tuned")
    convert(arguments)
    compare(arguments)
    run = recipe_file.parent / "run"
    compared = json.loads((run / "report.json").read_text())
    report = compared["models"]
    manifest = json.loads((run / "manifest.json").read_text())
    point = sweeps["models"][f"{method}, 3 bits, groups of 32"]
    for key, value in report["quantized"].items():
        assert point[key] == value, key
    assert point["divergence"] == compared["divergence"]
    assert sweeps["models"][f"{method}, 8 bits, groups of 32"]["divergence"]["kl"]["value"] > 0
    assert point["bits_per_weight"] == manifest["quantize"]["bits_per_weight"]
    assert sweeps["adapter"] == manifest["train"]["outputs"]["adapter"]
    float_ = sweeps["models"]["float"]
    assert float_["perplexity"] == report["tuned"]["perplexity"]
    assert float_["tasks"] == report["tuned"]["tasks"]


def test_nothing_is_measured_twice(swept, measured, capsys):
    first = swept("quantize.bits=8,4")
    assert measured == ["base", "rtn, 8 bits, groups of 32", "rtn, 4 bits, groups of 32"]
    printed = capsys.readouterr()
    assert "sweep: [2/3] rtn, 8 bits, groups of 32\n" in printed.err
    last = r"sweep: \[3/3\] rtn, 4 bits, groups of 32, about [\d.]+ min to go\n"
    assert re.search(last, printed.err)
    assert swept("quantize.bits=8,4") == first
    again = capsys.readouterr()
    assert len(measured) == 3
    assert again.out == printed.out
    assert "sweep: 3 of 3 measured before" in again.err
    assert "loading" not in again.err
    extended = swept("quantize.bits=8,4,2")["models"]
    assert measured[3:] == ["rtn, 2 bits, groups of 32"]
    assert {name: extended[name] for name in first["models"]} == first["models"]
    swept("quantize.bits=8", "evaluate.limit=4")
    assert measured[4:] == ["base", "rtn, 8 bits, groups of 32"]


def test_an_interrupted_sweep_goes_on(swept, measured, monkeypatch):
    from finequant.quantize.methods import apply as methods

    round_model = methods.round_model

    def interrupted(model, recipe, *others):
        if recipe.quantize.bits == 3:
            raise Interrupted(signal.SIGTERM)
        return round_model(model, recipe, *others)

    point = "the measurement of rtn, 3 bits, groups of 32 starts over"
    with monkeypatch.context() as patched, pytest.raises(Interrupted, match=point):
        patched.setattr(methods, "round_model", interrupted)
        swept("quantize.bits=4,3,2")
    assert measured == ["base", "rtn, 4 bits, groups of 32"]
    report = swept("quantize.bits=4,3,2")
    assert [name.split(",")[1] for name in measured[2:]] == [" 3 bits", " 2 bits"]
    assert len(report["models"]) == 4


def scored(perplexity: float, accuracy: float | None = None, **settings) -> dict:
    score = {"value": accuracy, "stderr": 0.02, "n": 50}
    tasks = {} if accuracy is None else {"arc": {"acc": score, "acc_norm": score}}
    return {
        "settings": settings,
        "dtype": "bfloat16",
        "bits_per_weight": 12.63,
        "packed_bits_per_weight": settings.get("bits", 16) + 1.0,
        "perplexity": {"text": {"token": perplexity, "word": perplexity**2}},
        "tasks": tasks,
    }


def report_of(*points: dict, documents: str = "file") -> dict:
    corpus = {"name": "text", "documents": documents}
    return {
        "recipe": {
            "name": "tiny",
            "seed": 7,
            "model": {"base": "org/Tiny-1B"},
            "evaluate": {"perplexity": [corpus]},
        },
        "versions": {"torch": "2.13.0"},
        "swept": "base",
        "models": {str(index): point for index, point in enumerate(points)},
    }


@pytest.mark.plots
@pytest.mark.parametrize("extreme", [1e12, math.inf, math.nan])
@pytest.mark.parametrize("accuracy", [0.5, math.nan, None])
def test_infinite_and_nan_scores_are_drawn_and_printed(tmp_path, capsys, extreme, accuracy):
    report = report_of(
        scored(29.6, 0.7),
        scored(36.0, 0.6, method="rtn", bits=4, group_size=32),
        scored(extreme, accuracy, method="rtn", bits=2, group_size=32),
    )
    write_sweep(report, tmp_path)
    print_sweep(report)
    assert f"{extreme:.3g}" in capsys.readouterr().out
    assert (tmp_path / "plots" / "sweep.png").exists()
    point = json.loads((tmp_path / "sweep.json").read_text())["models"]["2"]
    kept = extreme if math.isfinite(extreme) else None
    assert point["perplexity"]["text"]["token"] == kept


@pytest.mark.plots
def test_a_sweep_of_another_model_or_other_rows_is_not_on_the_page(tmp_path):
    from finequant.evaluate.report.page import write_page

    models = {"base": scored(9.0), "tuned": scored(5.0), "quantized": scored(6.0)}
    report = report_of(scored(5.0), scored(6.0, method="rtn", bits=4, group_size=32))
    recipe = report["recipe"] | {"model": {"base": "a"}, "data": {"test": ["a"]}}
    files = {
        "report.json": {"models": models, "measuring_code": 2, "recipe": recipe},
        "manifest.json": {"train": {"inputs": {}, "outputs": {"adapter": "now"}}},
        "predictions.jsonl": {"prompt": "a", "reference": "b", "answers": {}, "right": {}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    base = {"swept": "base", "adapter": None, "measuring_code": 2, "recipe": recipe}
    for made_from, is_shown in (
        ({}, True),
        ({"swept": "tuned", "adapter": "now"}, True),
        ({"swept": "tuned", "adapter": "before"}, False),
        ({"measuring_code": 1}, False),
        ({"recipe": recipe | {"model": {"base": "another"}}}, False),
        ({"recipe": recipe | {"data": {"test": ["others"]}}}, False),
    ):
        (tmp_path / "sweep").mkdir(exist_ok=True)
        write_sweep(report | base | made_from, tmp_path / "sweep")
        write_page(tmp_path)
        shown = (
            (tmp_path / "report.html").read_text(encoding="utf-8").partition("<h2>Sweep</h2>")[2]
        )
        assert shown.lstrip().startswith("<figure ") == is_shown
        assert ("The last sweep measured an earlier adapter" in shown) != is_shown


def test_empty_panels_are_left_out():
    from finequant.evaluate.report.sweep_report import draw_sweep

    point = {"method": "rtn", "bits": 4, "group_size": 32}
    panels = {
        2: report_of(scored(29.6, 0.7), scored(36.0, 0.6, **point)),
        1: report_of(scored(29.6), scored(36.0, **point)),
    }
    for count, report in panels.items():
        assert len(draw_sweep(report).axes) == count
    assert draw_sweep(report_of(scored(math.nan), scored(math.inf, **point))) is None


def test_group_sizes_are_in_a_table_like_executorchs():
    points = [
        scored(10 * size / bits, method=method, bits=bits, group_size=size)
        for method in ("rtn", "gptq")
        for bits in (8, 4)
        for size in (64, 32)
    ]
    (table,) = groupwise_tables(report_of(scored(29.6), *points[:-1]))
    sizes = "groupwise 4-bit (32) | groupwise 4-bit (64)"
    assert table.splitlines() == [
        f"| perplexity per token, text | baseline (bfloat16) | {sizes} |",
        "| :--- | ---: | ---: | ---: |",
        "| Tiny-1B, rtn | 29.60 | 80.00 | 160.00 |",
        "| Tiny-1B, gptq | 29.60 | – | 160.00 |",
    ]
    assert groupwise_tables(report_of(scored(29.6), points[0], points[2])) == []
    by_words = report_of(scored(29.6), *points, documents="wikitext")
    assert "| perplexity per word, text | base" in groupwise_tables(by_words)[0]
    assert "| Tiny-1B, rtn | 876.16 | 6,400.00 | 25,600.00 |" in groupwise_tables(by_words)[0]


def test_mean_accuracy_takes_one_metric_per_task():
    def score(value):
        return {"value": value, "stderr": None, "n": 4}

    tasks = {"arc": {"acc": score(0.5), "acc_norm": score(0.9)}, "held_out": {"chrf": score(30.0)}}
    assert mean_accuracy({"tasks": tasks}) == pytest.approx(40)
    assert math.isnan(mean_accuracy({"tasks": {}}))
