"""The report: the gate's arithmetic, and that no number is lost on the way to the reader."""

import json
import math
import re

import pytest

from finequant.evaluate.answers import most_frequent
from finequant.evaluate.inputs import cut_line
from finequant.evaluate.report.gate import gate, verdict_lines
from finequant.evaluate.report.report import print_table, write_report
from finequant.evaluate.report.table import comparison_rows
from finequant.recipes.schema import Gate

PLOTS = {"comparison.png", "layers.png", "loss.png"}


def model(perplexity=20.0, accuracy=0.7, bleu=40.0, size=269_060_552, bits=16.0) -> dict:
    return {
        "size_bytes": size,
        "bits_per_weight": bits,
        "perplexity": {
            "text": {"token": perplexity, "word": 61.25, "byte": 1.875, "tokens": 8192},
        },
        "tasks": {
            "held_out": {
                "json_match": {"value": accuracy, "stderr": 0.018, "n": 300},
                "bleu": {"value": bleu, "stderr": 1.1, "n": 300},
            }
        },
    }


@pytest.fixture
def report() -> dict:
    models = {
        "base": model(perplexity=29.61, accuracy=0.0, bleu=3.25),
        "tuned": model(perplexity=18.9, accuracy=0.712, bleu=61.25),
        "quantized": model(23.1, 0.682, 59.75, size=139_060_552, bits=4.78),
    }
    names = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    layers = [
        {
            "name": f"model.layers.{i}.{name}",
            "bits": 4,
            "group_size": 32,
            "snr_db": 18.0 + i + j / 8,
        }
        for i in range(4)
        for j, name in enumerate(names)
    ]
    return {
        "recipe": {
            "name": "tiny",
            "seed": 7,
            "model": {"base": "org/base"},
            "quantize": {"bits": 4, "group_size": 32},
        },
        "versions": {"torch": "2.13.0"},
        "models": models,
        "divergence": {
            "kl": {"value": 0.0812, "stderr": 0.0031},
            "top1_agreement": {"value": 0.871, "stderr": 0.005},
            "tokens": 4096,
        },
        "layers": [*layers, {"name": "lm_head", "bits": 4, "group_size": 32, "snr_db": 17.5}],
        "samples": [{"prompt": "hi", "reference": "yo", "answers": dict.fromkeys(models, "so")}],
        "training": [{"step": 10, "loss": 2.1}, {"step": 20, "eval_loss": 1.9}, {"step": 20}],
        "gate": gate(models, Gate(max_perplexity_increase=0.3, max_accuracy_drop=0.02)),
    }


def test_a_model_that_was_only_sized_has_no_row_of_perplexities(report, tmp_path):
    report["models"]["gguf"] = {"size_bytes": 93_000_000, "bits_per_weight": 4.5}
    write_report(report, tmp_path)
    lines = table_lines((tmp_path / "report.md").read_text(encoding="utf-8"), "perplexity |")
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| text, base", "| text, tuned", "| text, quantized"
    ]  # fmt: skip
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| prompt | reference | base | tuned | quantized |\n" in markdown


def test_no_heading_stands_above_nothing(report, tmp_path):
    del report["divergence"], report["gate"]
    write_report(report, tmp_path)
    assert "## What quantization changed" not in (tmp_path / "report.md").read_text("utf-8")


def table_lines(markdown: str, first_header: str) -> list[str]:
    """Returns the table whose header starts with `first_header`, up to the next empty line."""
    start = markdown.index(f"| {first_header}")
    return markdown[start:].split("\n\n")[0].strip().split("\n")


def test_the_arithmetic_is_that_of_the_models_which_transformers_runs(report, tmp_path):
    report["arithmetic"] = "float32"
    for export, sentence in (
        ({}, "on the same inputs, in float32 arithmetic. "),
        ({"size_bytes": 1}, "on the same inputs, in float32 arithmetic. "),
        ({"speed": {"prompt": 9}}, "float32 arithmetic (exports: as the programs that run them"),
    ):
        report["models"]["gguf"] = export
        write_report(report, tmp_path)
        assert sentence in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("quantized", "passed"), [(20.9, True), (21.0, True), (21.1, False), (19.0, True)]
)
def test_gate_on_perplexity(quantized, passed):
    models = {"tuned": model(), "quantized": model(perplexity=quantized)}
    result = gate(models, Gate(max_perplexity_increase=0.05))
    (check,) = result["checks"]
    assert check["name"] == "perplexity text"
    assert check["limit"] == 0.05
    assert check["value"] == pytest.approx(quantized / 20 - 1)
    assert check["passed"] is result["passed"] is passed


@pytest.mark.parametrize(
    ("accuracy", "bleu", "passed"),
    [
        (0.69, 39.0, [True, True]),
        (0.68, 38.0, [True, True]),  # at the limit
        (0.679, 40.0, [False, True]),
        (0.7, 37.9, [True, False]),
        (0.9, 60.0, [True, True]),
    ],
)
def test_gate_on_accuracy(accuracy, bleu, passed):
    models = {"tuned": model(), "quantized": model(accuracy=accuracy, bleu=bleu)}
    result = gate(models, Gate(max_accuracy_drop=0.02))
    names = ["accuracy held_out json_match", "accuracy held_out bleu"]
    assert [check["name"] for check in result["checks"]] == names
    assert [check["passed"] for check in result["checks"]] == passed
    assert result["checks"][1]["value"] == pytest.approx((40 - bleu) / 100)
    assert result["passed"] is all(passed)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("which", ["tuned", "quantized"])
def test_gate_fails_on_missing_infinite_and_nan_values(which, bad):
    models = {"tuned": model(), "quantized": model()}
    models[which] = model(perplexity=bad, accuracy=bad)
    result = gate(models, Gate(max_perplexity_increase=1e9, max_accuracy_drop=1e9))
    assert [check["passed"] for check in result["checks"]] == [False, False, True]
    assert not result["passed"]


def test_gate_fails_on_metrics_that_were_not_measured():
    unmeasured = model() | {"perplexity": {}, "tasks": {}}
    limits = Gate(max_perplexity_increase=1.0, max_accuracy_drop=1.0)
    for models in ({"tuned": model(), "quantized": unmeasured}, {"tuned": unmeasured}):
        result = gate({"quantized": model()} | models, limits)
        assert [check["passed"] for check in result["checks"]] == [False, False, False]


def test_gate_without_limits_passes():
    assert gate({"tuned": model(), "quantized": model()}, Gate()) == {"passed": True, "checks": []}


@pytest.mark.parametrize(
    ("limits", "quantized", "ending"),
    [
        ({"max_perplexity_increase": 0.05}, {"perplexity": 20.9}, "increase 4.50%, limit 5.00%"),
        ({"max_perplexity_increase": 0.05}, {"perplexity": 21.0}, "increase 5.00%, limit 5.00%"),
        ({"max_perplexity_increase": 0.05}, {"perplexity": 21.0005}, "5.002%, limit 5.000%"),
        (
            {"max_perplexity_increase": 0.05},
            {"perplexity": 19},
            "no increase (a decrease of 5.00%), limit 5.00%",
        ),
        (
            {"max_accuracy_drop": 0.05},
            {"accuracy": 0.72},
            "json_match, no drop (a gain of 2.00 points), limit 5.00 points",
        ),
        ({"max_accuracy_drop": 0.05}, {"accuracy": 0.7}, "drop 0.00 points, limit 5.00 points"),
        ({"max_accuracy_drop": 0.05}, {"accuracy": math.nan}, "drop –, limit 5.00 points"),
    ],
)
def test_the_verdict_tells_value_and_limit_apart(limits, quantized, ending):
    models = {"tuned": model(), "quantized": model(**quantized)}
    (line, *_) = verdict_lines({"models": models, "gate": gate(models, Gate(**limits))})
    assert line.endswith(ending)
    assert ("FAILED" in line) == (ending.startswith("5.002") or "–" in ending)


def test_the_gate_counts_answers_of_exports_that_differ(report):
    models = report["models"]
    models["gguf"] = {"parity": {"same_answers": 0.98, "n": 100}}
    models["pte"] = {}  # its runtime was not installed
    checks = gate(models, Gate(min_same_answers=0.98))["checks"]
    assert [check["name"] for check in checks] == [
        "answers that differ, gguf",
        "answers that differ, pte",
    ]
    assert [check["passed"] for check in checks] == [True, False]
    report["gate"] = {"checks": checks}
    assert verdict_lines(report)[0].endswith("answers that differ, gguf, share 2.00%, limit 2.00%")
    row = next(row for row in comparison_rows(report)[1] if row[0].startswith("same answers"))
    assert row[1:] == ["–", "–", "–", "98.0", "–", "–"]


def test_files_that_are_not_packed_have_a_line_of_their_own(report):
    """Sizes of a base that is already quantized, and of torchao's bytes per code, would mislead."""
    base, tuned, quantized = report["models"].values()
    floats = {"packed_bytes": 269_060_552, "packed_bits_per_weight": 16.0}
    base |= floats | {"size_bytes": 98_400_000, "bits_per_weight": 5.85, "activations": "float"}
    tuned |= floats
    quantized |= {"packed_bytes": 132_300_000, "packed_bits_per_weight": 7.87}
    quantized |= {"size_bytes": 204_000_000, "bits_per_weight": 12.13, "activations": "int8"}
    assert comparison_rows(report)[1][:4] == [
        ["size in MB, packed (lower is better)", "269.1", "269.1", "132.3", "-50.8%"],
        ["bits per weight, packed (lower is smaller)", "16.00", "16.00", "7.87", "-50.8%"],
        ["file in MB (torchao's format takes a byte per code)", "98.4", "–", "204.0", "–"],
        ["inputs of linear layers", "float", "–", "int8", "–"],
    ]
    quantized["size_bytes"] = quantized["packed_bytes"]  # at 8 bits, only the base differs
    assert comparison_rows(report)[1][2][0] == "file in MB"


def test_comparison_rows_have_values_and_changes(report):
    header, rows = comparison_rows(report)
    assert header == ["", "base", "tuned", "quantized", "quantized vs tuned"]
    assert rows == [
        ["size in MB, packed (lower is better)", "269.1", "269.1", "139.1", "-48.3%"],
        ["bits per weight, packed (lower is smaller)", "16.00", "16.00", "4.78", "-70.1%"],
        ["perplexity per token, text (lower is better)", "29.61", "18.90", "23.10", "+22.2%"],
        ["held_out, json_match in % (higher is better, n=300)"]
        + ["0.0 ± 1.8", "71.2 ± 1.8", "68.2 ± 1.8", "-3.0 points"],
        ["held_out, bleu out of 100 (higher is better, n=300)"]
        + ["3.2 ± 1.1", "61.2 ± 1.1", "59.8 ± 1.1", "-1.5 points"],
    ]


def test_a_paired_change_has_its_own_error(report):
    report["changes"] = {"held_out": {"json_match": {"value": -0.03, "stderr": 0.0071, "n": 300}}}
    _, rows = comparison_rows(report)
    assert [row[-1] for row in rows[-2:]] == ["-3.0 ± 0.7 points", "-1.5 points"]


def test_no_score_is_called_exact_because_all_rows_are_alike(report, tmp_path, capsys):
    """0 of n right was shown as `0.0 ± 0.0`."""
    base = report["models"]["base"]["tasks"]["held_out"]["json_match"]
    base |= {"stderr": 0.0, "n": 100}
    report["changes"] = {"held_out": {"json_match": {"value": 0.0, "stderr": 0.0, "n": 300}}}
    row = comparison_rows(report)[1][-2]
    assert (row[1], row[2], row[-1]) == ("0.0", "71.2 ± 1.8", "-3.0 points")
    line = (
        "Where all rows have the same value, no ± is shown, because they have no spread: the true "
        "value may still be 3.0 points away (95% limit for 100 independent rows)."
    )
    shown = _everywhere(report, tmp_path, capsys)
    assert [line in text for text in shown] == [True, True, True]
    assert not [text for text in shown if "± 0.0 " in text]
    base["stderr"] = report["changes"]["held_out"]["json_match"]["stderr"] = 0.01
    assert not [text for text in _everywhere(report, tmp_path, capsys) if "no ± is shown" in text]


def test_the_limit_for_rows_that_are_all_alike_is_that_of_scipy(report):
    """Clopper and Pearson's, one-sided, of which the rule of three is an approximation."""
    from scipy.stats import binomtest

    from finequant.evaluate.report.report import baseline_lines

    for rows in (2, 20, 300):
        score = {"value": 1.0, "stderr": 0.0, "n": rows}
        report["models"]["tuned"]["tasks"]["held_out"]["json_match"] = score
        low = binomtest(rows, rows, alternative="greater").proportion_ci(0.95).low
        assert f"may still be {100 * (1 - low):.1f} points away" in baseline_lines(report)[-1]


def test_the_limit_for_rows_that_are_all_alike_counts_independent_ones(report):
    """Three answers of each of 12 conversations, all wrong, were taken for 36 independent rows."""
    from finequant.evaluate.metrics.text_metrics import score_answers
    from finequant.evaluate.report.report import baseline_lines

    groups = [number // 3 for number in range(36)]
    scores = score_answers(["no"] * 36, ["yes"] * 36, ["exact_match"], groups)
    report["models"]["base"]["tasks"]["held_out"] = scores
    limit = "may still be 22.1 points away (95% limit for 12 independent rows)."
    assert baseline_lines(report)[-1].endswith(limit)


def _everywhere(report: dict, folder, capsys) -> list[str]:
    """Returns what the terminal, report.md and the page say."""
    from finequant.evaluate.report.page import page

    print_table(report)
    write_report(report, folder)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    return [capsys.readouterr().out, markdown, page(report, [])]


def test_comparison_rows_allow_gaps_and_further_models(report):
    report["models"]["gguf"] = {"size_bytes": 93_000_000}
    report["models"]["quantized"] = model(perplexity=2e8) | {"bits_per_weight": None, "tasks": {}}
    report["models"]["base"]["tasks"]["held_out"]["bleu"]["stderr"] = None
    header, rows = comparison_rows(report)
    assert header[1:-1] == ["base", "tuned", "quantized", "gguf"]
    assert rows[0][-2:] == ["93.0", "+0.0%"]
    assert rows[1][3:] == ["–", "–", "–"]
    assert rows[2][3:] == ["2e+08", "–", "×1.06e+07"]
    assert rows[4][1:] == ["3.2", "61.2 ± 1.1", "–", "–", "–"]


def test_report_json_keeps_every_finite_value(report, tmp_path):
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert text.startswith('{\n  "recipe"')
    report["models"]["base"]["perplexity"]["text"]["token"] = math.inf
    report["samples"][0]["prompt"] = "größer"
    write_report(report, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text)["models"]["base"]["perplexity"]["text"]["token"] is None
    assert "größer" in text


def test_markdown_holds_every_number(report, tmp_path):
    write_report(report, tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    header, rows = comparison_rows(report)
    for row in [header, *rows]:
        assert f"| {' | '.join(row)} |" in markdown
    for number in ("8,192", "61.2500", "1.8750", "0.0812 ± 0.0031", "87.1 ± 0.5", "seed 7"):
        assert number in markdown
    assert "Gate passed: perplexity text, increase 22.22%, limit 30.00%" in markdown
    assert "FAILED: accuracy held_out json_match, drop 3.00 points, limit 2.00 points" in markdown
    assert "`finequant run recipe.yaml`" in markdown
    assert "torch 2.13.0" in markdown
    worst = table_lines(markdown, "layers that lost most")[2:]
    assert [line.split(" | ")[-1] for line in worst] == [
        "17.5 |", "18.0 |", "18.1 |", "18.2 |", "19.0 |"
    ]  # fmt: skip


@pytest.mark.plots
def test_plots_are_written_and_linked(report, tmp_path):
    write_report(report, tmp_path)
    assert {path.name for path in (tmp_path / "plots").iterdir()} == PLOTS
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(plots/(.*?)\)", markdown)) == PLOTS
    for name in PLOTS:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.plots
def test_plots_without_data_are_neither_written_nor_linked(report, tmp_path):
    write_report(report, tmp_path)
    report["training"] = [{"step": 10, "loss": math.nan}]
    report["layers"] = [{"name": "lm_head", "bits": 4, "group_size": 32, "snr_db": None}]
    report["models"] = {"base": model(math.nan) | {"tasks": {}}}
    write_report(report, tmp_path)
    assert not list((tmp_path / "plots").iterdir())
    assert "plots/" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_report_needs_nothing_but_models(report, tmp_path, capsys):
    models = {"base": {"size_bytes": 1, "bits_per_weight": 4.0, "perplexity": {}, "tasks": {}}}
    write_report({"models": models}, tmp_path)
    print_table({"models": models})
    assert "Gate" not in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}


@pytest.mark.parametrize("extreme", [1e-3, 1e9, math.inf, math.nan, None])
def test_extreme_numbers_are_drawn_and_printed(report, tmp_path, capsys, extreme):
    report["models"]["quantized"] = model(perplexity=extreme, accuracy=extreme)
    report["divergence"]["kl"] = {"value": extreme, "stderr": None}
    report["gate"] = gate(report["models"], Gate(max_perplexity_increase=0.1))
    write_report(report, tmp_path)
    print_table(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))
    assert "Gate" in capsys.readouterr().out


@pytest.mark.parametrize(("tokens", "lines"), [(4096, 1), (0, 0)])
def test_a_divergence_over_no_tokens_is_not_shown(report, capsys, tokens, lines):
    report["divergence"]["tokens"] = tokens
    print_table(report)
    assert capsys.readouterr().out.count("KL divergence") == lines


@pytest.mark.parametrize(
    ("references", "metrics", "expected"),
    [
        (["yes", "no", "yes ", "maybe", "yes", "no"], ["exact_match"], {"share": 0.5, "n": 6}),
        (["yes", "no", "yes", "no"], ["f1", "multiple_choice"], {"share": 0.5, "n": 4}),
        (["yes", "no", "yes", "no"], ["f1"], None),
        (["a", "b", "c", "a"], ["exact_match"], None),  # no labels: almost all differ
        ([], ["exact_match"], None),
    ],
)
def test_a_model_that_always_answers_alike_is_scored(references, metrics, expected):
    assert most_frequent(references, metrics) == expected


@pytest.mark.parametrize(("share", "times"), [(0.552, 1), (0.013, 0)])
def test_the_report_says_what_always_answering_alike_scores(report, tmp_path, capsys, share, times):
    report["most_frequent"] = {"share": share, "n": 500}
    write_report(report, tmp_path)
    print_table(report)
    line = f"most frequent reference answer is right in {100 * share:.1f}% of the 500 held-out rows"
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count(line) == times
    assert capsys.readouterr().out.count(line) == times


def test_the_report_says_how_many_answers_are_longer_than_what_is_generated(
    report, tmp_path, capsys
):
    report["cut_answers"] = {"longer": 1, "n": 500, "longest": 30, "limit": 24}
    write_report(report, tmp_path)
    print_table(report)
    line = "Answers are cut after 24 tokens, but 1 of the 500 reference answers has 30 tokens:"
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count(line) == 1
    assert capsys.readouterr().out.count(line) == 1


def test_samples_cannot_break_the_table(report, tmp_path):
    nasty = [
        "a | b",
        "`x` ``y``",
        "one\ntwo\r\n\nthree",
        "<b>&amp;",
        "\\| **c** [d](e) ![f](g) $h$",
    ]
    report["samples"] = [
        {"prompt": text, "reference": text, "answers": {"base": "", "tuned": text}}
        for text in [*nasty, "x" * 5000]
    ]
    write_report(report, tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    lines = table_lines(markdown, "prompt")
    assert len(lines) == 2 + len(nasty) + 1
    for line in lines[2:]:
        cells = re.split(r"(?<!\\)\|", line)
        assert len(cells) == 7  # five, between the outer two
        assert cells[3:6:2] == [" *(empty)* ", " – "]
        assert not set("`*_[]~$\\") & set(cells[1])
    assert "<code>one<br>two<br><br>three</code>" in lines[4]
    assert len(lines[-1]) < 5000


def test_a_table_too_wide_for_the_terminal_is_a_list(report, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stdout for a terminal
    monkeypatch.setenv("COLUMNS", "60")
    print_table(report)
    out = capsys.readouterr().out
    header, rows = comparison_rows(report)
    assert max(map(len, out.splitlines())) <= 60
    assert not set("│┃") & set(out)
    for label, *cells in rows:
        assert f"{label}\n  " in out
        for name, cell in zip(header[1:], cells, strict=True):
            assert f"{name} {cell}" in out


@pytest.mark.parametrize("further", [(), ("pte", "gguf")])
def test_terminal_table_has_all_numbers(report, capsys, monkeypatch, further):
    monkeypatch.setenv("COLUMNS", "80")
    report["models"] |= dict.fromkeys(further, report["models"]["quantized"])
    print_table(report)
    out = capsys.readouterr().out
    _, rows = comparison_rows(report)
    for row in rows:
        assert any(all(cell in line for cell in row[1:]) for line in out.splitlines())
    table = [line for line in out.splitlines() if line.startswith(("│", "┃"))]
    assert further or {len(line) for line in table} == {80}
    for number in ("0.0812 ± 0.0031", "87.1 ± 0.5", "22.22", "30.00", "3.00", "2.00"):
        assert number in out


def test_a_failed_write_leaves_the_old_report(report, tmp_path):
    write_report(report, tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    report["versions"]["torch"] = object()
    with pytest.raises(TypeError):
        write_report(report, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("quantize", "text"),
    [
        ({}, "to 4 bits in groups of 32. "),
        ({"bits": 1, "head": "quantize"}, "to 1 bit in groups of 32. "),
        ({"head": 8}, "to 4 bits in groups of 32, and the head to 8 bits. "),
        ({"bits": 8, "head": 8}, "to 8 bits in groups of 32. "),
        (
            {"head": "float"},
            "to 4 bits in groups of 32, except for the head, which stays",
        ),
        ({"budget": 4.5}, "according to the layer plan in quantized/quantization.json. "),
    ],
)
def test_report_md_says_to_how_many_bits_layers_are_quantized(report, tmp_path, quantize, text):
    report["recipe"]["quantize"] |= quantize
    write_report(report, tmp_path)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"linear layers are quantized {text}" in markdown


def test_one_answer_that_is_cut_is_it():
    cut = {"longer": 1, "n": 5, "longest": 30, "limit": 1}
    assert cut_line(cut).startswith("answers are cut after 1 token, but 1 of the 5")
    assert cut_line(cut).endswith("no model can give it in full")
    assert cut_line(cut | {"longer": 2}).endswith("no model can give them in full")
    assert "but all 5 reference answers are longer" in cut_line(cut | {"longer": 5})
    assert "but both reference answers are longer" in cut_line(cut | {"longer": 2, "n": 2})
    assert "but the only reference answer has 30 tokens: no" in cut_line(cut | {"n": 1})


def test_no_error_is_rounded_to_zero(report, capsys):
    """A KL of 0.00022 ± 0.00001 was shown as `0.0002 ± 0.0000`, as if it were exact."""
    report["models"]["tuned"]["tasks"]["held_out"]["json_match"] = {
        "value": 0.7123,
        "stderr": 0.0003,
        "n": 2_000_000,
    }
    report["changes"] = {"held_out": {"json_match": {"value": -0.03, "stderr": 0.00004}}}
    report["divergence"] = {
        "kl": {"value": 0.0002249, "stderr": 0.0000132},
        "floor": {"value": 0.0000121, "stderr": 0.0000004},
        "top1_agreement": {"value": 0.9, "stderr": 0.01},
        "tokens": 479,
    }
    row = next(row for row in comparison_rows(report)[1] if "json_match" in row[0])
    assert row[2] == "71.23 ± 0.03"
    assert row[4] == "-3.030 ± 0.004 points"
    print_table(report)
    text = " ".join(capsys.readouterr().out.split())
    assert "KL divergence 0.00022 ± 0.00001 nats per token (rounding" in text
    assert "alone gives 0.0000121 ± 0.0000004); the most likely token is the same at" in text


def test_no_rounding_of_logits_is_stated_that_did_not_happen(report, tmp_path, capsys):
    """In float32, logits of a model that ships in bfloat16 are not rounded: the report said that
    rounding them to the shipped dtype gives a divergence of 0.0000."""
    report["divergence"]["floor"] = {"value": 0.0, "stderr": 0.0}
    for text in _everywhere(report, tmp_path, capsys):
        assert "0.0812 ± 0.0031 nats per token; the most likely" in " ".join(text.split())


@pytest.mark.parametrize(
    ("base", "tuned", "is_told"), [(1, 1, False), (1, 0.9, True), (0, 0, True)]
)
def test_tuning_cannot_raise_what_is_full_marks(report, capsys, base, tuned, is_told):
    for name, value in (("base", base), ("tuned", tuned), ("quantized", tuned)):
        report["models"][name]["tasks"] = {"mini": {"acc": {"value": value, "n": 6}}}
    print_table(report)
    assert ("Tuned is no better than base" in capsys.readouterr().out) == is_told
