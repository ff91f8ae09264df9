"""The comparison with other people's tools, as far as it runs without the tools."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def peers(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("peers")


def test_each_script_is_listed_and_pins_what_it_installs(peers):
    assert {path.name for path in peers.SCRIPTS.glob("*_peer.py")} == {
        tool.script for tool in peers.TOOLS.values()
    }
    assert {row.tool for row in peers.ROWS.values()} == {*peers.TOOLS}
    installed = [
        p for tool in peers.TOOLS.values() for p in (*tool.packages, *tool.without_dependencies)
    ]
    assert not [package for package in installed if "==" not in package]


def test_an_environment_is_filled_again_if_its_packages_change(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    install = import_module("environments").install
    for version in ("1", "1", "2"):
        code = f"print({version}, file=open('log', 'a'))"
        install(tmp_path, [sys.executable, "-c", code])
    assert (tmp_path / "log").read_text().split() == ["1", "2"]
    with pytest.raises(subprocess.CalledProcessError):
        install(tmp_path, [sys.executable, "-c", "raise SystemExit(1)"])
    assert not (tmp_path / "installed").exists()


def test_the_measuring_script_does_not_import_finequant():
    for name in ("measure.py", "peer.py"):
        source = (ROOT / "benchmarks" / "peers" / name).read_text(encoding="utf-8")
        imported = [
            node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)
        ]
        assert not [node.module for node in imported if node.module.startswith("finequant")]


def test_a_model_measured_against_itself_shows_no_difference(
    peers, monkeypatch, tiny_base, tmp_path, capsys
):
    monkeypatch.syspath_prepend(peers.SCRIPTS)
    job = {"base": str(tiny_base), "windows": [[1, 5, 7, 9], [9, 4, 3, 2]], "words": 3}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["measure.py", str(tmp_path / "job.json"), str(tiny_base)])
    import_module("measure").main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["token"] == figures["float_token"] > 1
    assert figures["word"] == pytest.approx(figures["token"] ** 2)  # six tokens
    assert (figures["kl"], figures["agreement"]) == (pytest.approx(0, abs=1e-6), 1)


def test_an_untied_head_counts_beside_the_embedding(peers):
    counts = {"linear": 100, "embedding": 50, "norm": 0, "head": 50}
    figures = {"token": 11.0, "float_token": 10.0, "word": 20.0, "kl": 0.1, "agreement": 0.9}
    figures |= {"seconds": 7.0, "peak_bytes": 2e9, "linear": 4.5, "embedding": 16, "head": 4.5}
    row = peers.cells(figures, counts)
    assert row == ["11.00", "1.100", "20.00", "0.100", "90.0", "9.83", "7", "2.0"]
    assert len(peers.HEADER) == 3 + len(row)
    assert peers.cells({"note": "failed: no"}, counts)[0] == "failed: no"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print('warning'); print('{\"seconds\": 1}')", {"seconds": 1}),
        ("raise OSError('no')", None),
    ],
)
def test_a_program_answers_with_its_last_line_or_its_error_is_kept(
    peers, tmp_path, program, expected
):
    import environments

    command = [sys.executable, "-c", program]
    if expected:
        assert environments.answer(command, tmp_path) == expected
        return
    with pytest.raises(environments.FAILURES) as error:
        environments.answer(command, tmp_path)
    assert environments.reason(error.value, tmp_path) == "OSError: no"
