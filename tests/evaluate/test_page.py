"""report.html, also in a browser where there is one."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from functools import reduce
from pathlib import Path

import pytest

import finequant.evaluate.report.page
from finequant.evaluate.report.advice import advice, judged_cost
from finequant.evaluate.report.page import _sizes, page, write_page
from finequant.evaluate.report.report import print_table, write_report
from finequant.recipes.errors import UserError

pytestmark = pytest.mark.plots
HOSTILE = "</script><script>document.title = 'run'</script><b>bold</b>"
NODE = shutil.which("node")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def model(accuracy: float, perplexity: float) -> dict:
    return {
        "size_bytes": 10_000,
        "bits_per_weight": 8.0,
        "perplexity": {"held_out": {"token": perplexity, "tokens": 100}},
        "tasks": {"held_out": {"exact_match": {"value": accuracy, "stderr": 0.02, "n": 100}}},
    }


def report(quantized: float = 0.8, **quantize) -> dict:
    settings = {"method": "rtn", "bits": 4, "group_size": 32, "scale_dtype": "float32"}
    return {
        "recipe": {"name": HOSTILE, "quantize": settings | quantize},
        "models": {"base": model(0, 9), "tuned": model(0.9, 2), "quantized": model(quantized, 2)},
        "changes": {"held_out": {"exact_match": {"value": quantized - 0.9, "stderr": 0.02}}},
        "layers": [{"name": "lm_head", "shape": [64, 32], "bits": 4, "group_size": 32}],
        "passages": [[{"text": HOSTILE, "kl": 0.5}, {"text": "b", "kl": 0.0}]],
        "right_by": "exact_match",
        "gate": {"passed": True, "checks": []},
    }


def rows() -> list[dict]:
    """Makes 60 rows: quantized is wrong in 5 of them, and tuned in one of these, too."""
    made = []
    for number in range(60):
        label = ("on", "off", HOSTILE)[number % 3]
        quantized = "neither" if number < 5 else label
        tuned = "nor" if number == 0 else label
        made.append(
            {
                "prompt": f"row {number} {HOSTILE}",
                "reference": label,
                "answers": {"base": "?", "tuned": tuned, "quantized": quantized},
                "right": {"base": False, "tuned": tuned == label, "quantized": quantized == label},
            }
        )
    return made


def test_texts_from_the_data_are_escaped():
    text = page(report(), rows())
    data = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert json.loads(data[1])["rows"] == rows()
    assert text.count("<script") == 2
    assert "<b>bold" not in text
    assert "http://" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.S)


def test_the_figures_of_stages_say_which_call_they_are_of():
    stages = {"train": {"seconds": 1234.5, "peak_memory_bytes": 2_500_000_000}}
    text = page(report() | {"stages": stages}, rows())
    assert "<td>train</td><td>1,234</td><td>2.50</td>" in text
    assert "interrupted and resumed, these are the figures of its last run" in text
    assert "GPU memory" not in text
    stages["evaluate"] = stages["train"] | {"peak_gpu_memory_bytes": 0}
    stages["train"] = stages["train"] | {"peak_gpu_memory_bytes": 13_100_000_000}
    text = page(report() | {"stages": stages}, rows())
    assert "<td>train</td><td>1,234</td><td>2.50</td><td>13.10</td>" in text
    assert "<td>evaluate</td><td>1,234</td><td>2.50</td><td></td>" in text


def test_flips_labels_and_sizes_are_counted():
    text = page(report(), rows())
    assert "both right in 55 rows and both wrong in 1" in text
    assert "4 went from right to wrong and 0 from wrong to right" in text
    assert "p = 0.12" in text  # 2 / 2^4
    assert "both right in 1 row and" in page(report(), rows()[5:6])
    assert "Answers by quantized that match none of these labels: 5." in text


def test_advice_quotes_the_documented_perplexities():
    """The methods as the recipe's defaults set them: a search for scales comes with both."""
    text = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| (\d+\.\d+) \|$", text, re.MULTILINE))
    figures = {
        "fast": float(rows["rtn, scale: search"]),
        "balanced": float(rows["gptq, scale: search, rotated"]),
        "best": float(rows["`effort: best`, rotated, bfloat16 scales"]),
    }
    balanced, best = advice(report(0.8))[:2]
    assert "{fast:.1f} -> {balanced:.1f}".format(**figures) in balanced
    assert "{balanced:.1f} -> {best:.1f}".format(**figures) in best


BEST = {"method": "gptq", "calibration": {"steps": 32, "scale_steps": 100}}


@pytest.mark.parametrize(
    ("quantized", "quantize", "expected"),
    [
        (0.8, {}, ["effort=balanced", "effort=best", "quantize.training"]),
        (0.8, {"method": "gptq", "rotate": True}, ["effort=best", "quantize.training"]),
        (0.8, BEST | {"calibration": {"steps": 0, "scale_steps": 100}}, ["effort=best"]),
        (0.8, BEST | {"calibration": {"steps": 32, "scale_steps": 0}}, ["effort=best"]),
        (0.89, {}, []),
    ],
)
def test_advice_is_given_where_quantization_cost_more_than_its_error(quantized, quantize, expected):
    lines = advice(report(quantized, **quantize))
    assert bool(lines) == bool(expected)
    assert all(any(key in line for line in lines) for key in expected)
    assert any("effort=balanced" in line for line in lines) == ("effort=balanced" in expected)


@pytest.mark.parametrize(
    ("quantize", "absent"),
    [
        # Rotation needs a head with a table of its own.
        (BEST | {"embedding": 8, "head": 8}, ["effort=", "rotate=true"]),
        (BEST | {"head": "float"}, ["effort=", "rotate=true"]),
        (BEST | {"rotate": True}, ["effort=", "rotate=true"]),
        (BEST, ["effort="]),
        ({"method": "gptq"}, ["effort=balanced"]),
        ({"budget": 4.5}, ["quantize.training"]),
    ],
)
def test_no_advice_undoes_a_setting_or_would_be_refused(quantize, absent):
    lines = advice(report(0.8, **quantize))
    assert lines
    assert not [line for line in lines if any(key in line for key in absent)]
    if "rotate=true" not in absent and quantize.get("method") == "gptq":
        assert any(line.startswith("quantize.rotate=true") for line in lines)


@pytest.mark.parametrize(
    ("quantized", "passed", "headline"),
    [
        (0.89, True, "Quantization cost no more than its error bars"),
        (0.8, True, "Quantization cost more than its error bars"),
        (0.89, False, "The gate failed"),
    ],
)
def test_the_verdict_is_a_sentence_with_the_figures_below(quantized, passed, headline):
    judged = report(quantized)
    judged["gate"]["passed"] = passed
    text = page(judged, rows())
    assert f'<p class="headline">{headline}' in text
    assert f"base 0.0 ± 2.0, tuned 90.0 ± 2.0, quantized {100 * quantized:.1f} ± 2.0" in text


def test_the_headline_names_the_cost_that_was_judged():
    for change, errors, perplexity, headline in (
        (0.03, 0.02, 2, "cost no more than twice its error bars"),  # the bar shows 2 points
        (0.05, 0.02, 2, "cost more than its error bars"),
        (0.008, None, 2, "cost no more than a point"),
        (0.02, None, 2, "cost more than a point"),
        (0.01, 0.02, 2.1, "raised perplexity by more than 3%"),
        (None, None, 2.1, "raised perplexity by more than 3%"),
        (None, None, 2.02, "raised perplexity by no more than 3%"),
    ):
        judged = report(0.9 - (change or 0))
        judged["changes"]["held_out"]["exact_match"]["stderr"] = errors
        judged["models"]["quantized"]["perplexity"]["held_out"]["token"] = perplexity
        for model_ in judged["models"].values():
            model_["tasks"] = model_["tasks"] if change else {}
        assert f'<p class="headline">Quantization {headline}</p>' in page(judged, [])


def test_the_headline_is_true_of_all_metrics():
    """exact_match fell by 1.5 points, within its error; bleu, whose error is unknown, by 0.2."""
    judged = report(0.885)
    for name, value in (("tuned", 40.0), ("quantized", 39.8)):
        judged["models"][name]["tasks"]["held_out"]["bleu"] = {"value": value, "n": 60}
    bars = "Quantization cost no more than its error bars, or a point where there are none"
    assert judged_cost(judged) == (False, bars)
    judged["changes"]["held_out"]["exact_match"]["stderr"] = 0.01
    assert judged_cost(judged) == (False, bars.replace("its", "twice its"))


@pytest.mark.skipif(not NODE, reason="needs Node")
def test_a_mark_never_cuts_a_character_in_two():
    script = (Path(finequant.evaluate.report.page.__file__).parent / "page.js").read_text("utf-8")
    functions = re.search(r"function element.*?\n}\n.*?function marked.*?\n}\n", script, re.S)[0]
    document = """
    const document = {createElement: () => ({
      parts: [], append(part) { this.parts.push(part.textContent ?? part); }})};
    """
    calls = "console.log(JSON.stringify(marked('a👍b', 'a👎b').parts))"
    done = subprocess.run([NODE, "-e", document + functions + calls], capture_output=True)
    assert json.loads(done.stdout) == ["a", "👍", "b"]


def test_the_page_shows_sizes_and_bars_and_says_if_tuning_gained_nothing():
    judged = report()
    judged["models"]["quantized"]["packed_bytes"] = 5_000_000
    judged["models"]["gguf"] = {"packed_bytes": 1}  # nothing but its size was measured
    text = page(judged, rows())
    assert re.search(r"total, packed\s*</td>\s*<td>5.0</td>", text)
    assert (
        '<tr><th scope="row">size in MB, packed (lower is better)</th><td data-model="base">'
        in text
    )
    assert '<figure role="img" aria-label="Perplexity and accuracy of the models">' in text
    figure = re.search(r"<svg.*?</svg>", text, re.S)[0]
    assert "quantized" in figure
    assert "gguf" not in figure
    assert "no better than base" not in text
    judged["models"]["base"]["tasks"] = judged["models"]["tuned"]["tasks"]
    text = page(judged, rows())
    assert "Tuned is no better than base" in text
    assert "target tokens with <code>finequant data</code>." in text


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
@pytest.mark.parametrize(
    "keys", [("perplexity", "held_out", "token"), ("tasks", "held_out", "exact_match", "value")]
)
def test_a_number_that_quantized_lost_is_a_cost(bad, keys):
    judged = report(0.9)
    assert not judged_cost(judged)[0]
    *path, last = ("models", "quantized", *keys)
    reduce(dict.__getitem__, path, judged)[last] = bad
    assert judged_cost(judged)[0]
    text = page(judged, rows())
    assert "Quantization cost no more than its error bars" not in text


def test_an_answer_is_a_label_if_the_metric_says_that_it_equals_one():
    """A JSON value written with other spaces was counted as none of the labels."""
    judged = [
        {
            "prompt": str(number),
            "reference": f'{{"on": {number % 2}}}',
            "answers": {"tuned": f'{{"on":{number % 2}}}', "quantized": "on" * (number < 2)},
            "right": {"tuned": True, "quantized": False},
        }
        for number in range(8)
    ]
    text = page(report() | {"right_by": "json_match"}, judged)
    assert "Answers by tuned that match none" not in text
    assert "Answers by quantized that match none of these labels: 8." in text


def test_no_answer_is_said_to_be_wrong_where_no_metric_judges_answers():
    assert "Quantized is wrong</button>" in page(report(), rows())
    unjudged = [row | {"right": {}} for row in rows()]
    assert "Quantized is wrong</button>" not in page(report() | {"right_by": None}, unjudged)


def test_no_table_of_labels_where_no_metric_calls_answers_right_or_wrong():
    assert "<h2>By label</h2>" in page(report(), rows())
    unjudged = [row | {"right": {}} for row in rows()]
    assert "<h2>By label</h2>" not in page(report(), unjudged)


def test_the_terminal_and_report_md_say_if_tuning_gained_nothing_on_the_held_out_rows(
    tmp_path, capsys
):
    judged = report(0.9)
    print_table(judged)
    assert "no better than base" not in capsys.readouterr().out
    for name, value in (("base", 0.3), ("tuned", 0.4), ("quantized", 0.4)):  # another task
        model_ = judged["models"][name]
        model_["tasks"] = {"held_out": {"exact_match": {"value": 0.0, "stderr": 0.0, "n": 100}}}
        model_["tasks"]["arc_easy"] = {"acc": {"value": value, "stderr": 0.1, "n": 20}}
    line = (
        "Tuned is no better than base by any accuracy metric on the held-out rows, though its "
        "perplexity there is lower: train longer"
    )
    print_table(judged)
    assert line in " ".join(capsys.readouterr().out.split())
    write_report(judged, tmp_path)
    assert line in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert line in page(judged, rows())


def test_bytes_add_up_to_the_packed_size_and_are_called_what_they_are():
    judged, n = report(), 1024 * 1024
    table = {"shape": [1024, 1024], "bits": 8, "group_size": 32}
    embedding, head = table | {"name": "model.embed_tokens"}, table | {"name": "lm_head"}
    down = table | {"name": "model.layers.0.mlp.down_proj", "bits": 4}
    packed = {4: n * (4 + 1) / 8, 8: n * (8 + 1) / 8}
    for layers, size, in_float in (
        ([down, head, embedding], packed[4] + 2 * packed[8], "norms, in float"),
        ([down, head, embedding], packed[4] + packed[8], "norms, in float"),  # a shared table
        (
            [down, head, embedding | {"group_size": None}],
            packed[4] + packed[8] + 2 * n,
            "embed_tokens, norms, in float",
        ),
    ):
        judged["layers"] = layers
        judged["models"]["quantized"]["packed_bytes"] = size + 200_000
        parts = {part["label"]: part["megabytes"] for part in _sizes(judged)}
        assert parts["total, packed"] == f"{(size + 200_000) / 1e6:,.1f}"
        assert in_float in parts


def test_tuned_is_not_said_to_be_no_better_where_its_perplexity_fell():
    judged = report()
    judged["models"]["base"]["tasks"] = judged["models"]["tuned"]["tasks"]
    fell = (
        "by any accuracy metric, though its perplexity on the held-out rows is lower: train longer"
    )
    assert f"Tuned is no better than base {fell}" in page(judged, rows())
    judged["models"]["base"]["perplexity"] = judged["models"]["tuned"]["perplexity"]
    assert "Tuned is no better than base by any accuracy metric: train longer" in page(
        judged, rows()
    )


@pytest.mark.parametrize("head", [8, "float"])
def test_no_advice_for_a_head_that_has_more_bits_already(head):
    assert any("lm_head" in line for line in advice(report(head="quantize")))
    assert not any("lm_head" in line for line in advice(report(head=head)))


def test_advice_is_in_the_terminal_and_in_the_report(tmp_path, capsys):
    costly = report(0.8)
    print_table(costly)
    assert "What may help:" in capsys.readouterr().out
    write_report(costly, tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in advice(costly):
        assert f"- {line}" in markdown


@pytest.mark.skipif(not BROWSER, reason="needs Chromium: apt install chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_filters_answers_and_nothing_overflows(tmp_path, width):
    probe = """
    const clicked = {};
    for (const button of document.querySelectorAll("button[data-show]")) {
      button.click();
      clicked[button.dataset.show] = document.getElementById("count").textContent;
    }
    document.getElementById("search").value = "row 59";
    document.getElementById("search").dispatchEvent(new Event("input"));
    clicked.search = document.getElementById("answers").children.length;
    clicked.wide = document.documentElement.scrollWidth > innerWidth;
    clicked.requests = performance.getEntriesByType("resource").length;
    document.body.dataset.probe = JSON.stringify([document.title, clicked]);
    """
    title, clicked = probed(page(report(), rows()), probe, tmp_path, width)
    assert title == f"{HOSTILE}: base, tuned, quantized"
    assert clicked["wrong"] == "5 of 60 rows: quantized is wrong"
    assert clicked["differ"] == "5 of 60 rows: tuned and quantized differ"
    assert clicked["all"] == "60 of 60 rows"
    assert (clicked["wide"], clicked["requests"]) == (False, 0)


@pytest.mark.skipif(not BROWSER, reason="needs Chromium: apt install chromium")
def test_the_security_policy_runs_the_pages_script_and_no_other(tmp_path):
    added = "<script>document.title = 'run'</script></body>"
    shown = rendered(page(report(), rows()).replace("</body>", added), tmp_path, 800)
    assert "5 of 60 rows" in shown
    assert "<title>run</title>" not in shown


@pytest.mark.skipif(not BROWSER, reason="needs Chromium: apt install chromium")
def test_a_print_has_all_rows_and_columns_dark_on_white(tmp_path):
    """Prints in a dark theme; 700 pixels are the text's width on A4."""
    probe = """
    document.querySelector("button[data-show=all]").click();
    dispatchEvent(new Event("beforeprint"));
    const style = getComputedStyle(document.body);
    document.body.dataset.probe = JSON.stringify({
      rows: document.getElementById("answers").children.length,
      recipe: document.querySelector("details").open,
      cut: [...document.querySelectorAll(".scroll")].some((part) =>
        getComputedStyle(part).overflowX !== "visible"
        || part.firstElementChild.offsetWidth > part.offsetWidth),
      buttons: document.querySelector(".controls").offsetHeight,
      colors: [style.color, style.backgroundColor],
    });
    """
    judged = report()
    exported = model(0.8, 2) | {"activations": "int8 in blocks of 32"}
    judged["models"] |= {"compressed-tensors": exported, "gguf": exported}
    text = page(judged, rows()).replace("@media print", "@media all")
    for other in ("@media screen", "@media (max-width: 40rem)"):
        assert other in text
        text = text.replace(other, "@media speech")
    assert probed(text, probe, tmp_path, 700) == {
        "rows": 60,
        "recipe": True,
        "cut": False,
        "buttons": 0,
        "colors": ["rgb(28, 30, 33)", "rgb(255, 255, 255)"],
    }


def probed(text: str, script: str, folder: Path, width: int):
    """Runs a script in the page, and returns the JSON that it writes to the body's `data-probe`."""
    # The page's policy allows no other script, so it is relaxed for this one.
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text)
    shown = rendered(text.replace("</body>", f"<script>{script}</script></body>"), folder, width)
    return json.loads(html.unescape(re.search(r'data-probe="(.*?)"', shown, re.S)[1]))


def rendered(text: str, folder: Path, width: int) -> str:
    """Returns the page's elements after its scripts have run."""
    (folder / "report.html").write_text(text, encoding="utf-8")
    return subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"),
            *(f"--user-data-dir={folder / 'profile'}", "--dump-dom"),
            (folder / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("content", ["{", '{"a": 1}\n{"b"\n'])
def test_a_damaged_file_is_named(tmp_path, content):
    for name in ("report.json", "manifest.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "predictions.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="predictions.jsonl: cannot be read"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    ("name", "next_step"),
    [
        ("report.json", "run `finequant evaluate RECIPE` again"),
        ("manifest.json", "delete it to rerun every stage of this run"),
        ("sweep/sweep.json", "run `finequant sweep RECIPE` again"),
    ],
)
def test_a_damaged_file_is_named_with_what_makes_it_anew(tmp_path, name, next_step):
    (tmp_path / "sweep").mkdir()
    for file in ("report.json", "manifest.json", "predictions.jsonl", "sweep/sweep.json"):
        (tmp_path / file).write_text("{" if file == name else "{}", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}: .*{next_step}$"):
        write_page(tmp_path)
