"""Merging and quantizing in pieces equals whole models, writes files that load, and resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finequant.quantize import write
from finequant.quantize.checkpoint import reading as tensors
from finequant.quantize.checkpoint import writing
from finequant.quantize.checkpoint.reading import TensorFile, header, row_slices
from finequant.quantize.checkpoint.writing import (
    Checkpoint,
    quantized_model,
    stored_shapes,
)
from finequant.quantize.merge.adapter import Adapter, Base, merged_weights, open_base
from finequant.quantize.merge.check import check_merge
from finequant.quantize.methods.apply import round_model
from finequant.quantize.methods.sequences import sequences_of
from finequant.quantize.methods.transforms import transform_model, transformed
from finequant.quantize.rounding import round_to_nearest
from finequant.quantize.scheme import LayerScheme, layer_plan, untie_head, unties_head
from finequant.quantize.write import write_float, write_quantized
from finequant.recipes import rundir
from finequant.recipes.artifact import verify
from finequant.recipes.errors import UserError
from finequant.recipes.freshness import JOURNAL
from finequant.recipes.interrupt import Interrupted
from finequant.recipes.load import load_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Model, Quantize

SEQUENCES = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small_pieces(monkeypatch):
    """Splits every layer into several pieces."""
    monkeypatch.setattr(tensors, "PIECE_WEIGHTS", 32 * 64)


@pytest.fixture
def opened(tmp_path):
    """Makes a random adapter of a base in `adapter/`, and opens both: opened(folder, **LoraConfig)
    -> Base, Adapter."""

    def make(folder: Path, **changes) -> tuple[Base, Adapter]:
        adapter = make_adapter(folder, tmp_path / "adapter", **changes)
        base = open_base(Model(base=str(folder)))
        return base, Adapter(adapter, base, str(folder))

    return make


def theirs(base: Path, adapter: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("kind", ["whole", "shards", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 3}},
        {"use_dora": True, "target_modules": ["v_proj", "down_proj"]},
    ],
    ids=["lora", "patterns", "dora"],
)
@pytest.mark.usefixtures("small_pieces")
def test_merged_weights_are_pefts_to_the_bit(llama, opened, tmp_path, kind, settings):
    base = llama("base", max_shard_size="60KB" if kind == "shards" else "1GB")
    if kind == "bfloat16":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model.save_pretrained(base)
    source, adapter = opened(base, **settings)
    expected = theirs(base, tmp_path / "adapter").state_dict()
    weights = merged_weights(source, adapter)
    assert list(source.shapes) == list(expected)
    for name, tensor in expected.items():
        found = torch.cat([weights(name, rows) for rows in row_slices(tensor.shape)])
        assert torch.equal(found, tensor), name
    assert check_merge(source, adapter, tmp_path / "adapter", [[5, 6, 7, 8], [9]])[0] < 1e-5
    (tmp_path / "merged").mkdir()
    write_float(tmp_path / "merged", source, weights, torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(merged.state_dict()[name], t) for name, t in expected.items())


PIECES = (
    "quantize.scale=search",
    "quantize.scale_dtype=bfloat16",
    "quantize.layers={'*.1.*.up_proj': float}",
    "quantize.embedding=8",
    "quantize.calibration={tokens: 512, length: 32}",
)
SCALE_STEPS = "quantize.calibration.scale_steps=2"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "overrides",
    [
        ["quantize.method=rtn"],
        ["quantize.method=rtn", "quantize.rotate=true"],
        ["quantize.method=hqq", SCALE_STEPS],
        ["quantize.method=gptq"],
        ["quantize.method=gptq", "quantize.rotate=true", SCALE_STEPS],
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_pieces_are_what_a_whole_model_gives(
    llama, opened, recipe_file, tokenizer, tmp_path, monkeypatch, overrides, tied
):
    """Codes and scales are the same in any number of files, and `from_pretrained` reads them."""
    recipe = load_recipe(recipe_file, [*PIECES, *overrides])
    quantize = recipe.quantize
    base = llama("base", tie_word_embeddings=tied)
    source, adapter = opened(base)
    plan, model = layer_plan(quantize, source.config), theirs(base, tmp_path / "adapter")
    if unties_head(plan):
        untie_head(model)
    transform_model(model, quantize)
    sequences = sequences_of(recipe, tokenizer)
    expected = round_model(model, recipe, tokenizer, torch.bfloat16)
    whole = quantized_model(model, expected, plan, torch.bfloat16)
    shapes = stored_shapes(source.shapes, source.config, plan)
    weights = transformed(merged_weights(source, adapter), source.config, quantize)
    out = tmp_path / "out"
    out.mkdir()
    written = write_quantized(out, source, weights, quantize, torch.bfloat16, sequences)
    for name, rounded in expected.items():
        found = written.rounded(f"{name}.weight", slice(None))
        assert torch.equal(found.codes, rounded.codes), name
        assert torch.equal(found.scale, rounded.scale), name
    monkeypatch.setattr(writing, "SHARD_BYTES", 40_000)
    several = Checkpoint(tmp_path, shapes, plan, torch.bfloat16)
    for name in shapes:
        rounded = expected.get(name.removesuffix(".weight"))
        several.write(name, slice(None), weights(name, slice(None)), rounded)
    shutil.copy(out / "config.json", tmp_path)
    written.finish()
    several.finish()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    with torch.no_grad():
        logits = whole(SEQUENCES).logits
        for folder in (out, tmp_path):
            reloaded = AutoModelForCausalLM.from_pretrained(folder)
            assert torch.equal(reloaded(SEQUENCES).logits, logits)


def test_layers_that_rounding_does_not_change_have_no_ratio(tmp_path):
    plan = {"zero": LayerScheme(4, 32, "search", torch.bfloat16)}
    checkpoint = Checkpoint(tmp_path, {"zero.weight": (8, 64)}, plan, torch.bfloat16)
    weight = torch.zeros(8, 64)
    checkpoint.write("zero.weight", slice(None), weight, round_to_nearest(weight, *plan["zero"]))
    assert checkpoint.snr_db("zero.weight") is None


def test_the_header_is_the_one_safetensors_writes(tmp_path):
    tensors_ = {
        "b": torch.randn(3, 5),
        "a": torch.ones(7, dtype=torch.int8),
        "é": torch.randn(2, 2).bfloat16(),
        "c": torch.randn(4).half(),
        "a.b": torch.randn(9),
    }
    save_file(tensors_, tmp_path / "theirs.safetensors", {"format": "pt"})
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors_.items()}
    start, entries = header(described, {"format": "pt"})
    assert (tmp_path / "theirs.safetensors").read_bytes().startswith(start)
    file = TensorFile(tmp_path / "theirs.safetensors")
    assert file.entries == entries
    for name, tensor in tensors_.items():
        assert torch.equal(file.read(name), tensor)
        assert torch.equal(file.read(name, slice(1, 3)), tensor[1:3])


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, b"\x02" + bytes(7) + b"[]"])
def test_a_damaged_file_gives_a_message(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="x.safetensors: damaged"):
        TensorFile(tmp_path / "x.safetensors")


def test_a_file_that_ends_early_gives_a_message(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(64, 8)}, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(UserError, match="ends in the middle of a"):
        TensorFile(path).read("a")


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (33, 4096), (1000, 4096), (1050, 14336)])
def test_slices_cover_all_and_none_is_thin(rows, columns):
    slices = list(row_slices((rows, columns)))
    assert [one.start for one in slices] == [0, *(one.stop for one in slices[:-1])]
    assert slices[-1].stop == rows
    assert all(one.stop - one.start >= min(32, rows) for one in slices)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_anything_but_lora_of_linear_layers_is_refused_by_name(tiny_base, opened, settings, named):
    with pytest.raises(UserError, match=f"cannot be merged: it has .*{named}"):
        opened(tiny_base, **settings)


@pytest.mark.parametrize("size", [1e-3, 1, 1e3])
def test_a_wrong_merge_is_noticed(llama, opened, tmp_path, monkeypatch, size):
    """Whether logits are large or small."""
    base = llama("base", tie_word_embeddings=False)
    head = load_file(base / "model.safetensors")
    head["lm_head.weight"] *= size
    save_file(head, base / "model.safetensors", {"format": "pt"})
    source, adapter = opened(base)
    assert check_merge(source, adapter, tmp_path / "adapter", [[5, 6, 7]])[0] < 1e-5
    monkeypatch.setattr(adapter, "_scaling", dict.fromkeys(adapter.layers, 2.1))
    with pytest.raises(UserError, match="merged logits differ from base \\+ adapter"):
        check_merge(source, adapter, tmp_path / "adapter", [[5, 6, 7]])


@pytest.mark.usefixtures("small_pieces")
def test_written_pieces_are_kept_unless_they_are_damaged(tiny_base, opened, tmp_path):
    source, adapter = opened(tiny_base)
    weights, out = merged_weights(source, adapter), tmp_path / "out"
    out.mkdir()
    quantize, asked = Quantize.model_validate({"effort": "fast"}), []

    def counted(name: str, rows: slice) -> torch.Tensor:
        asked.append((name, rows.start))
        return weights(name, rows)

    def convert() -> bytes:
        asked.clear()
        write_quantized(out, source, counted, quantize, torch.float32)
        return (out / "model.safetensors").read_bytes()

    whole = convert()
    every = set(asked)
    assert convert() == whole
    assert not asked
    journal = [line for line in (out / JOURNAL).read_text().splitlines() if line]
    assert len(journal) == len(every)
    (out / JOURNAL).write_text("\n".join(journal[:20]) + "\n" + journal[20][:9])  # cut off
    assert convert() == whole
    assert len(asked) == len(every) - 20
    entry = TensorFile(out / "model.safetensors").entries[
        "model.layers.1.mlp.up_proj._weight_qdata"
    ]
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(entry.start + 70)
        file.write(b"\x55")
    assert convert() == whole
    assert set(asked) == {("model.layers.1.mlp.up_proj.weight", 0)}
    (out / "model.safetensors").unlink()
    assert convert() == whole
    assert set(asked) == every


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("steps", [0, 1])
def test_pieces_of_other_bits_are_not_kept(tiny_base, opened, tmp_path, steps):
    """A budget that is measured again may choose other bits, for which a file is as large."""
    source, adapter = opened(tiny_base)
    weights, sequences = merged_weights(source, adapter), torch.arange(64).view(2, 32)
    calibration = {"scale_steps": steps, "tokens": 64, "length": 32}
    settings = {"effort": "fast", "calibration": calibration}
    fewer, more = (
        Quantize.model_validate(settings | {"layers": {"*.0.*": {"bits": bits}}}) for bits in (3, 5)
    )

    def convert(folder: Path, quantize: Quantize) -> bytes:
        folder.mkdir(exist_ok=True)
        write_quantized(folder, source, weights, quantize, torch.float32, sequences)
        return (folder / "model.safetensors").read_bytes()

    expected = convert(tmp_path / "undisturbed", more)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    if steps:  # as a kill leaves it between the training of the scales and the end
        write.codes_with_trained_scales(
            resumed / "start", source, weights, fewer, torch.float32, sequences
        )
        shutil.copytree(resumed / "start", tmp_path / "start")
    convert(resumed, fewer)
    if steps:
        shutil.copytree(tmp_path / "start", resumed / "start")
    assert convert(resumed, more) == expected


@pytest.mark.parametrize(
    ("quantize", "dtype", "reason"),
    [
        (
            Quantize(method="rtn", scale_dtype="float16"),
            torch.float32,
            "quantize.scale_dtype: a scale of",
        ),
        (
            Quantize(method="rtn", layers={"*up_proj": "float"}),
            torch.float16,
            "quantize.dtype: model.layers.0",
        ),
    ],
)
def test_numbers_beyond_half_precision_are_refused(
    tiny_base, opened, tmp_path, quantize, dtype, reason
):
    """The message names the layer, and the dtype that helps."""
    source, adapter = opened(tiny_base)
    weights = merged_weights(source, adapter)

    def large(name: str, rows: slice) -> torch.Tensor:
        return weights(name, rows) * (1e9 if name.endswith("0.mlp.up_proj.weight") else 1)

    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"{reason}.*up_proj.*float16.*bfloat16"):
        write_quantized(tmp_path / "out", source, large, quantize, dtype)


# argv: a recipe and overrides. Converts, and kills itself in the middle of a layer's rows.
KILLED = """
import os, signal, sys
from finequant.quantize.checkpoint import writing
from finequant.quantize.convert import main

calls, write_rows = [], writing.write_rows
def write_or_die(*arguments):
    calls.append(None)
    if len(calls) == 60:
        os.kill(os.getpid(), signal.SIGKILL)
    write_rows(*arguments)

writing.write_rows = write_or_die
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_killed_conversion_resumes_to_the_same_bytes(recipe_file, llama, train_once, method):
    """The process is killed while it writes; the next call gives what an undisturbed one gives."""
    from finequant.quantize.convert import main as convert

    base = llama("deep", num_hidden_layers=6)
    arguments = [
        str(recipe_file),
        f"model.base={base}",
        "train.max_steps=1",
        f"quantize.method={method}",
        "quantize.calibration={tokens: 256, length: 64}",
    ]
    train_once(arguments)
    run = recipe_file.parent / "run"
    convert(arguments)
    expected = {path.name: path.read_bytes() for path in (run / "quantized").iterdir()}
    shutil.rmtree(run / "quantized")
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    kept = (run / "quantized.partial" / JOURNAL).read_text().splitlines()
    assert len(kept) > 20
    assert not (run / "quantized").exists()
    convert(arguments)
    found = {path.name: path.read_bytes() for path in (run / "quantized").iterdir()}
    assert found == expected


@pytest.mark.parametrize("function", ["seal", "content_hash"])
def test_a_signal_while_the_result_is_hashed_loses_nothing(
    recipe_file, train_once, monkeypatch, function
):
    """To read a large model back, and the one that it replaces, takes minutes."""
    from finequant.quantize.convert import main as convert

    arguments = [str(recipe_file), "train.max_steps=1"]
    train_once(arguments)
    run, hashing = recipe_file.parent / "run", getattr(rundir, function)
    (run / "quantized").mkdir()

    def stopped(folder: Path, *rest: object, **options: object) -> str | None:
        if folder.name.startswith("quantized"):
            raise Interrupted(signal.SIGTERM)
        return hashing(folder, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(rundir, function, stopped)
        convert(arguments)
    assert not list((run / "quantized").iterdir())
    written = []
    monkeypatch.setattr(Checkpoint, "write", lambda *of: written.append(of))
    convert(arguments)
    assert not written
    assert json.loads((run / "manifest.json").read_text())["quantize"]["resumed"]
    verify(run / "quantized", again="")
    names = {path.name for path in (run / "quantized").iterdir()}
    assert {"model.safetensors", "config.json"} < names
    assert not names & {JOURNAL, "inputs.json"}


@pytest.mark.parametrize(
    "at", ["inputs.json", "journal.jsonl", "quantized", "quantized.partial", ""]
)
def test_a_kill_until_the_result_is_recorded_loses_nothing(
    recipe_file, train_once, monkeypatch, at
):
    """It comes while one of these is renamed, or when all are, before the manifest is written."""
    from finequant.quantize.convert import main as convert

    arguments = [str(recipe_file), "train.max_steps=1"]
    train_once(arguments)
    run = recipe_file.parent / "run"
    convert([*arguments, "quantize.bits=3"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        for name in ("rename", "replace"):
            patch.setattr(Path, name, dies_at(at, getattr(Path, name)))
        if not at:
            patch.setattr(RunDir, "record", dies_at("run", RunDir.record))
        convert(arguments)
    written = []
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", lambda *of: written.append(of))
        convert(arguments)
    assert not written
    resumed = {path.name: path.read_bytes() for path in (run / "quantized").iterdir()}
    assert json.loads((run / "manifest.json").read_text())["quantize"]["resumed"]
    assert {path.name for path in run.iterdir()} <= {*LEFT_IN_RUN}
    shutil.rmtree(run / "quantized")
    convert(arguments)
    assert {path.name: path.read_bytes() for path in (run / "quantized").iterdir()} == resumed


LEFT_IN_RUN = (
    ".lock",
    "adapter",
    "checkpoints",
    "data",
    "manifest.json",
    "quantized",
    "recipe.yaml",
)


def dies_at(name: str, method: Callable) -> Callable:
    """Returns a method of paths, or of run directories, that a signal stops at one of this name."""

    def stopped(self, *arguments: object, **options: object) -> object:
        if (self.root if isinstance(self, RunDir) else self).name == name:
            raise Interrupted(signal.SIGTERM)
        return method(self, *arguments, **options)

    return stopped


def test_a_folder_that_was_edited_before_it_was_recorded_is_kept(
    recipe_file, train_once, monkeypatch
):
    from finequant.quantize.convert import main as convert

    arguments = [str(recipe_file), "train.max_steps=1"]
    train_once(arguments)
    run = recipe_file.parent / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunDir, "record", dies_at("run", RunDir.record))
        convert(arguments)
    (run / "quantized" / "notes.txt").write_text("mine", encoding="utf-8")
    convert(arguments)
    kept = run / "previous" / "quantized-1" / "notes.txt"
    assert kept.read_text(encoding="utf-8") == "mine"
    verify(run / "quantized", again="")


def test_other_inputs_start_over(recipe_file, train_once):
    """Pieces that were written for 4 bits are not reused for 3."""
    from finequant.quantize.convert import main as convert

    arguments = [str(recipe_file), "train.max_steps=1"]
    train_once(arguments)
    convert([*arguments, "quantize.bits=3"])
    run = recipe_file.parent / "run"
    expected = load_file(run / "quantized" / "model.safetensors")
    partial = run / "quantized.partial"
    shutil.copytree(run / "quantized", partial)
    record = {"inputs": {"quantize.bits": 4}, "versions": {}}
    (partial / "inputs.json").write_text(json.dumps(record))
    (partial / "stale.safetensors").write_bytes(b"")
    convert([*arguments, "quantize.bits=3"])
    found = load_file(run / "quantized" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (run / "quantized" / "stale.safetensors").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """One model has eight times the layers of the other; the peak is that of one layer."""
    script = tmp_path / "convert.py"
    script.write_text(
        """
import sys, torch
from pathlib import Path
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from finequant.quantize.write import write_float, write_quantized
from finequant.quantize.merge.adapter import Base, open_base
from finequant.recipes.usage import peak_memory
from finequant.recipes.schema import Model, Quantize
for layers in (1, 9):
    folder = Path(sys.argv[1], str(layers))
    config = LlamaConfig(vocab_size=512, hidden_size=768, intermediate_size=3072,
        num_hidden_layers=layers, num_attention_heads=8, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    def weights(name, rows):
        first, last, _ = rows.indices(shapes[name][0])
        return torch.full((last - first, *shapes[name][1:]), 0.01)
    for name in ("base", "out"):
        (folder / name).mkdir(parents=True)
    base = Base(config, GenerationConfig(), shapes, weights)
    write_float(folder / "base", base, weights, torch.bfloat16)
    base = open_base(Model(base=str(folder / "base")))
    write_quantized(folder / "out", base, lambda *of: base.weights(*of).float(),
        Quantize(method="rtn"), torch.bfloat16)
    print(peak_memory())
"""
    )
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    weights = 8 * (4 * 768**2 + 3 * 3072 * 768)
    assert peaks[1] - peaks[0] < 0.25 * weights  # in bfloat16 they take twice their number
