"""publish/publish.py: the real client against a Hub on loopback, in processes where they matter."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import refused

from finequant.publish.license import license_of
from finequant.publish.loading import TEMPLATE
from finequant.recipes.load import load_recipe, write_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.stages import MISSING

WRITE, READ = "hf_PlantedTokenThatMayWrite", "hf_PlantedTokenThatMayOnlyRead"
REPOSITORY = "alice/tiny"
COMMAND = ("-m", "finequant.publish.publish")

LICENSE = """\
LLAMA 3.2 COMMUNITY LICENSE AGREEMENT
iii. You must retain in all copies the following attribution notice within a “Notice” text file:
“Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc.
All Rights Reserved.”
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base, train_once) -> Path:
    """A folder with recipe.yaml and its finished run/, over the tiny Llama. Shared: copy it."""
    from finequant.evaluate.compare import main as compare
    from finequant.quantize.convert import main as convert

    folder = tmp_path_factory.mktemp("finished")
    for name, start, count in (("train", 0, 16), ("test", 100, 4)):
        rows = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(start, start + count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "recipe.yaml").write_text(
        f"""\
name: tiny
output_dir: {folder / "run"}
model: {{base: {tiny_base}}}
data: {{train: train.jsonl, test: test.jsonl, validation_fraction: 0, max_length: 64}}
train: {{max_steps: 12, batch_size: 4, micro_batch_size: 4, learning_rate: 1e-2, precision: fp32}}
quantize: {{bits: 2}}
evaluate: {{max_new_tokens: 2, gate: {{max_perplexity_increase: 9}}}}
publish: {{repo_id: {REPOSITORY}, license: apache-2.0, language: en, tags: [test]}}
""",
        encoding="utf-8",
    )
    for stage in (train_once, convert, compare):
        stage([str(folder / "recipe.yaml")])
    return folder


@pytest.fixture
def recipe(finished, tmp_path) -> Path:
    """The test's own copy of a recipe whose run is finished, with an export beside it."""
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy" / "recipe.yaml"
    text = path.read_text(encoding="utf-8").replace(str(finished), str(path.parent))
    path.write_text(text, encoding="utf-8")
    export = path.parent / "run" / "exports" / "gguf"
    export.mkdir(parents=True)
    (export / "model.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 40)
    loaded = load_recipe(path)
    run = RunDir.of(loaded)
    run.record(loaded, "gguf", run.inputs(loaded, "gguf"))
    return path


@pytest.fixture
def publish(here, hub, recipe, tmp_path, monkeypatch):
    """Runs `finequant publish` against the Hub, without asking, in this process."""

    def run(*arguments: str, token: str = WRITE, where: Path = recipe, **changes: object):
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_CACHE": str(tmp_path / "hf"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }
        for name, value in (settings | changes).items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        return here("publish", str(where), "--yes", *arguments)

    return run


def in_process(*arguments: object) -> None:
    from finequant.publish.publish import main

    main([str(argument) for argument in arguments])


def dry_run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as exit_:  # typer ends every command so
        in_process(*arguments, "--dry-run")
    assert exit_.value.code in (0, None)


def folder_of(recipe: Path) -> Path:
    return recipe.parent / "run" / "publish"


def card_of(recipe: Path):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder_of(recipe) / "README.md")


def everything_under(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# argv: a repository, a folder, and the card's code. Both give the same logits, and the code runs.
LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
repository, folder, code = sys.argv[1:]
ids = torch.arange(100).unsqueeze(0)
with torch.inference_mode():
    there, here = (
        AutoModelForCausalLM.from_pretrained(name)(ids).logits for name in (repository, folder)
    )
print(torch.equal(there, here))
exec(code)
"""


@pytest.mark.slow
def test_what_is_published_is_private_whole_and_loads_with_the_same_logits(
    hub, on_hub, recipe, tmp_path
):
    done = on_hub(*COMMAND, str(recipe), "--yes", HF_TOKEN=WRITE)
    assert done.returncode == 0, done.stderr
    assert "alice: the repository will be created" in done.stderr
    repository = hub.repositories[REPOSITORY]
    assert repository.private
    assert len(repository.commits) == 2  # nobody sees a partial upload
    there = {name: blob.content for name, blob in repository.files.items()}
    del there[".gitattributes"]
    folder = folder_of(recipe)
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    assert there == {name: path.read_bytes() for name, path in here.items() if path.is_file()}
    sums = there["SHA256SUMS"].decode().splitlines()
    assert {*sums} == {
        f"{hashlib.sha256(there[name]).hexdigest()}  {name}" for name in {*there} - {"SHA256SUMS"}
    }
    assert {"model.safetensors", "gguf/model.gguf", "README.md", "recipe.yaml"} <= set(there)
    assert (
        there["model.safetensors"]
        == (recipe.parent / "run" / "quantized" / "model.safetensors").read_bytes()
    )

    code = re.search(r"```python\n(.*?)```", there["README.md"].decode(), re.DOTALL)[1]
    quantized = str(recipe.parent / "run" / "quantized")
    loaded = on_hub("-c", LOADS, REPOSITORY, quantized, code, HF_TOKEN=WRITE)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("True\n")

    for output in (done, loaded):
        assert "hf_Planted" not in output.stdout + output.stderr
    assert b"hf_Planted" not in everything_under(tmp_path)


@pytest.mark.slow
def test_publishing_again_sends_only_changes_and_removes_deleted_files(hub, publish, recipe):
    assert publish().returncode == 0
    assert len(hub.received) == 2
    first = hub.repositories[REPOSITORY].head
    again = publish()
    assert again.returncode == 0, again.stderr
    assert hub.repositories[REPOSITORY].head == first
    shutil.rmtree(recipe.parent / "run" / "exports")
    smaller = publish("publish.description=For tests.")
    assert smaller.returncode == 0, smaller.stderr
    assert "removed, not in this publication: gguf/model.gguf; earlier commits" in smaller.stderr
    files = hub.repositories[REPOSITORY].files
    assert "gguf/model.gguf" not in files
    assert b"\nFor tests.\n" in files["README.md"].content
    assert len(hub.received) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_upload_resumes(hub, hub_environment, publish, recipe, how, code):
    hub.stall_at = 2
    command = [sys.executable, *COMMAND, str(recipe), "--yes"]
    client = subprocess.Popen(
        command, env=hub_environment | {"HF_TOKEN": WRITE}, stderr=subprocess.PIPE, text=True
    )
    assert hub.stalled.wait(60)
    client.send_signal(how)
    said = client.communicate(timeout=60)[1]
    assert client.returncode == code, said
    assert "Traceback" not in said
    assert len(hub.received) == 1
    assert len(hub.repositories[REPOSITORY].commits) == 1  # nothing is visible yet
    resumed = publish()
    assert resumed.returncode == 0, resumed.stderr
    assert "the repository exists and is empty" in resumed.stderr
    assert len(hub.received) == len(set(hub.received)) == 2


def test_a_lost_connection_is_tried_again(hub, publish):
    hub.drop = 1
    done = publish()
    assert done.returncode == 0, done.stderr
    assert hub.uploads == 3


def test_files_that_arrive_altered_are_named(hub, publish):
    hub.damage = "quantization.json"
    done = publish()
    assert done.returncode == 1
    assert "error: publish: the Hub differs from what is here in 1 file" in done.stderr
    assert "quantization.json: differs" in done.stderr


@pytest.mark.parametrize(
    ("token", "changes", "code", "words"),
    [
        ("hf_PlantedTokenOfNobody", {}, 2, "does not accept this token: run `hf auth login`"),
        (READ, {}, 2, f"this token may not write to {REPOSITORY}"),
        ("", {}, 2, "no token for the Hub: run `hf auth login`"),
        (WRITE, {"HF_HUB_OFFLINE": True}, 2, "HF_HUB_OFFLINE is set"),
        (WRITE, {"ENDPOINT": "http://127.0.0.1:9"}, 1, "the Hub cannot be reached"),
    ],
)
def test_a_wrong_token_or_no_network_gives_one_message(
    hub, publish, recipe, token, changes, code, words
):
    stopped = publish(token=token, **changes)
    assert stopped.returncode == code, stopped.stderr
    *notes, message = stopped.stderr.strip().splitlines()
    assert message.startswith("error: publish: ")
    assert words in message
    assert hub.repositories == {}
    assert "hf_Planted" not in stopped.stdout + stopped.stderr
    assert b"hf_Planted" not in everything_under(recipe.parent)


def test_another_namespace_is_refused(hub, publish):
    stopped = publish("publish.repo_id=somebody/tiny")
    assert stopped.returncode == 2
    assert "this token may not write to somebody/tiny" in stopped.stderr


def test_a_repository_with_other_files_is_refused_without_into_existing(hub, publish):
    repository = make_repository(hub, {"model.bin": b"precious", "config.json": b"{}"})
    stopped = publish()
    assert stopped.returncode == 2
    assert "alice/tiny exists, with 2 files that this recipe did not publish" in stopped.stderr
    assert "--into-existing" in stopped.stderr
    assert len(repository.commits) == 1
    for arguments in (["--into-existing"], ["publish.description=Again."]):
        told = publish(*arguments)
        assert told.returncode == 0, told.stderr
        assert "model.bin" in repository.files


def make_repository(hub, files: dict[str, bytes], private: bool = True):
    kind, blob = type(hub).repository, type(hub).blob
    hub.repositories[REPOSITORY] = kind(private)
    hub.repositories[REPOSITORY].commits[hub.repositories[REPOSITORY].head].update(
        {name: blob(content, False) for name, content in files.items()}
    )
    return hub.repositories[REPOSITORY]


def test_an_existing_repository_keeps_its_visibility(hub, publish):
    make_repository(hub, {}, private=False)
    stopped = publish()
    assert stopped.returncode == 2
    assert "the recipe says private, but alice/tiny is public" in stopped.stderr
    assert publish("publish.private=false").returncode == 0


@pytest.mark.slow
def test_publishing_asks_for_confirmation(hub, hub_environment, recipe):
    command = [sys.executable, *COMMAND, str(recipe)]
    environment = hub_environment | {"HF_TOKEN": WRITE}
    nobody = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert nobody.returncode == 2
    assert "add --yes" in nobody.stderr
    ours, theirs = pty.openpty()
    os.write(ours, b"n\n")
    no = subprocess.run(command, env=environment, stdin=theirs, capture_output=True, text=True)
    assert no.returncode == 1
    assert "model.safetensors" in no.stdout
    assert "nothing was sent" in no.stderr
    assert hub.repositories == {}


def test_a_dry_run_writes_the_folder_without_paths_of_this_machine(recipe, tiny_base, capsys):
    dry_run(recipe)
    assert "nothing was sent" in capsys.readouterr().err
    folder = folder_of(recipe)
    assert (folder / "README.md").exists()
    assert (folder / "gguf" / "model.gguf").exists()
    for part in (str(recipe.parent), str(tiny_base.parent), "/tmp/", str(Path.home()) + "/"):
        assert part.encode() not in everything_under(folder)
    card = folder / "README.md"
    card.write_text("my own words", encoding="utf-8")
    dry_run(recipe)
    kept = recipe.parent / "run" / "previous" / "publish-1"
    assert (kept / "README.md").read_text(encoding="utf-8") == "my own words"
    dry_run(recipe)  # the same card again: nothing to keep
    assert len(list(kept.parent.iterdir())) == 1


@pytest.mark.parametrize("rows", ["false", "true"])
def test_held_out_rows_are_quoted_only_if_the_recipe_says_so(recipe, rows):
    dry_run(recipe, f"publish.rows={rows}")
    published = [
        b"Say %d." % number in everything_under(folder_of(recipe)) for number in range(100, 104)
    ]
    assert any(published) == (rows == "true")
    assert ("Hello!" in card_of(recipe).text) == (rows == "false")


def test_the_cards_metadata_and_figures_are_those_of_the_report(recipe):
    dry_run(recipe, "publish.base_model=org/base")
    report = json.loads((recipe.parent / "run" / "report.json").read_text(encoding="utf-8"))
    card, data = card_of(recipe), card_of(recipe).data
    assert (data.base_model, data.base_model_relation) == ("org/base", "quantized")
    assert (data.license, data.language, data.library_name) == (
        "apache-2.0",
        ["en"],
        "transformers",
    )
    assert {"finequant", "8da2w", "test"} <= set(data.tags)
    assert data.pipeline_tag == "text-generation"
    quantized = report["models"]["quantized"]
    assert {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results} == {
        ("held_out", "perplexity"): quantized["perplexity"]["held_out"]["token"],
        ("held_out", "exact_match"): quantized["tasks"]["held_out"]["exact_match"]["value"],
    }
    for model in report["models"].values():
        assert f"{model['perplexity']['held_out']['token']:,.2f}" in card.text
        assert f"{model['bits_per_weight']:.2f}" in card.text
    assert "export gguf is not in the table" in card.text
    assert f"on the same inputs, in {report['arithmetic']} arithmetic" in card.text


def test_a_stale_altered_or_missing_artifact_is_refused(recipe):
    run = recipe.parent / "run"
    changed = refused(in_process, recipe, "--dry-run", "quantize.bits=8")
    assert "quantize.bits: 2 -> 8" in changed
    assert "run `finequant run RECIPE` first" in changed
    record = run / "quantized" / "quantization.json"
    record.write_text(record.read_text(encoding="utf-8") + " ", encoding="utf-8")
    altered = refused(in_process, recipe, "--dry-run")
    assert "quantized: changed since it was written" in altered and "quantization.json" in altered
    shutil.rmtree(run / "quantized")
    assert "quantized does not exist" in refused(in_process, recipe, "--dry-run")
    assert not folder_of(recipe).exists()


def test_an_export_of_another_quantization_is_refused(recipe):
    manifest = recipe.parent / "run" / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    entries["gguf"]["inputs"]["quantized/"] = "sha256:another"
    manifest.write_text(json.dumps(entries), encoding="utf-8")
    message = refused(in_process, recipe, "--dry-run")
    assert "gguf: not made from the present inputs: the content of quantized/ changed" in message
    assert "finequant export RECIPE --to gguf" in message
    assert f"or delete {manifest.parent / 'exports' / 'gguf'}, which is then not pub" in message
    del entries["gguf"]
    manifest.write_text(json.dumps(entries), encoding="utf-8")
    message = refused(in_process, recipe, "--dry-run")
    assert "gguf: nothing says that it was made from this quantized/" in message
    shutil.rmtree(manifest.parent / "exports" / "gguf")
    dry_run(recipe)
    assert (folder_of(recipe) / "README.md").is_file()


def test_an_adapter_that_came_without_its_manifest_is_refused(recipe):
    manifest = recipe.parent / "run" / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    del entries["train"]
    manifest.write_text(json.dumps(entries), encoding="utf-8")
    message = refused(in_process, recipe, "--dry-run")
    assert "manifest.json does not say that train finished" in message
    assert "copy the whole run directory from the machine where it did" in message


@pytest.fixture
def elsewhere(recipe, tmp_path) -> Path:
    """The finished run alone, copied as to another machine: without its base and its rows."""
    base = recipe.parent / "base"
    text = recipe.read_text(encoding="utf-8")
    shutil.copytree(load_recipe(recipe).model.base, base)
    text = re.sub("base: [^}]*", f"base: {base}", text)
    recipe.write_text(text, encoding="utf-8")
    write_recipe(load_recipe(recipe), recipe.parent / "run" / "recipe.yaml")
    shutil.move(recipe.parent / "run", tmp_path / "run")
    shutil.rmtree(recipe.parent)
    return tmp_path / "run"


def test_publishing_needs_only_the_run_directory(hub, publish, elsewhere, here):
    """It refused to without the rows of training and test, of which it reads none."""
    done = publish(where=elsewhere)
    assert done.returncode == 0, done.stderr
    where = "base is not on this machine: publish.license, apache-2.0, was not compared with the "
    assert where in done.stderr
    files = hub.repositories[REPOSITORY].files
    assert {"model.safetensors", "gguf/model.gguf", "README.md"} <= files.keys()
    card = files["README.md"].content.decode()
    assert "on `train.jsonl` (the author's rows)" in card
    message = publish("publish.license=null", where=elsewhere).stderr
    assert "publish.license: /" in message and "base is not on this machine: give the" in message
    message = publish("data.train.0.source=other.jsonl", where=elsewhere).stderr
    assert "command line: data.train.0.source: no such file or folder: other.jsonl" in message
    message = here("evaluate", str(elsewhere)).stderr
    rows = elsewhere.parent / "test.jsonl"
    assert f"(if the run was copied here, copy this to {rows}, or set data.test.0" in message


def test_publishing_needs_no_package_of_the_base(recipe, monkeypatch, tmp_path):
    """As after `pip uninstall`, or on a machine that only publishes."""
    package = tmp_path / "site" / "some_base"
    package.mkdir(parents=True)
    (package / "m.gguf").write_bytes(b"GGUF of the base")
    monkeypatch.syspath_prepend(package.parent)
    loaded = load_recipe(recipe, ["model.base=package:some_base/m.gguf"])
    run = RunDir.of(loaded)
    before = run.inputs(loaded, "train")
    shutil.rmtree(package)
    importlib.invalidate_caches()
    assert run.inputs(loaded, "train")["model.base"] == MISSING != before["model.base"]
    assert license_of(loaded).id == "apache-2.0"


def test_what_a_killed_export_leaves_is_not_published(tmp_path):
    """A kill while an earlier export is being removed leaves a part of that one."""
    from finequant.publish.publish import exports
    from finequant.recipes.rundir import RunDir

    for name in ("gguf.partial", "gguf.replaced", "gguf.unrecorded"):
        (tmp_path / "exports" / name).mkdir(parents=True)
    (tmp_path / "exports" / ".DS_Store").touch()  # a file browser leaves it
    assert exports(None, RunDir(tmp_path)) == []


def test_a_failed_gate_blocks_until_it_is_overruled_by_name(recipe):
    from finequant.evaluate.compare import main as compare

    strict = [str(recipe), "evaluate.gate.max_perplexity_increase=0"]
    with pytest.raises(SystemExit):
        compare(strict)
    report = json.loads((recipe.parent / "run" / "report.json").read_text(encoding="utf-8"))
    failed = [check["name"] for check in report["gate"]["checks"] if not check["passed"]]
    assert "perplexity held_out" in failed
    message = refused(in_process, *strict, "--dry-run")
    assert "the gate failed: perplexity held_out" in message
    assert '--overrule-gate "perplexity held_out"' in message
    unknown = refused(in_process, *strict, "--dry-run", "--overrule-gate", "perplexity")
    assert "the gate has no check 'perplexity'" in unknown
    overruled = [word for name in failed for word in ("--overrule-gate", name)]
    dry_run(*strict, *overruled)
    text = (folder_of(recipe) / "README.md").read_text(encoding="utf-8")
    assert "gate of the recipe failed, and the publisher of this model overruled it" in text
    assert "Gate FAILED: perplexity held_out" in text


@pytest.mark.slow
def test_the_adapter_can_be_published_alone(hub, on_hub, publish, recipe, tiny_base):
    message = refused(in_process, recipe, "--dry-run", "--adapter-only")
    assert "publish.base_model: an adapter needs its base" in message
    done = publish("--adapter-only", "publish.base_model=org/base")
    assert done.returncode == 0, done.stderr
    files = hub.repositories[REPOSITORY].files
    config = json.loads(files["adapter_config.json"].content)
    assert config["base_model_name_or_path"] == "org/base"
    assert not any(name.startswith(("model.", "gguf/")) for name in files)
    data = card_of(recipe).data
    assert (data.base_model_relation, data.library_name) == ("adapter", "peft")
    code = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "PeftModel.from_pretrained(base, sys.argv[2])"
    )
    loaded = on_hub("-c", code, str(tiny_base), REPOSITORY, HF_TOKEN=WRITE)
    assert loaded.returncode == 0, loaded.stderr
    # The quantized model does not take the adapter's place unasked.
    assert "did not publish" in publish().stderr


@pytest.fixture
def papers(tmp_path) -> Path:
    folder = tmp_path / "papers"
    folder.mkdir()
    (folder / "LICENSE.txt").write_text(LICENSE, encoding="utf-8")
    (folder / "USE_POLICY.md").write_text("Use it well.", encoding="utf-8")
    return folder


def test_the_requirements_of_llamas_license_are_met(recipe, papers):
    llama = (recipe, "--dry-run", "publish.license=llama3.2", f"publish.license_folder={papers}")
    message = refused(in_process, *llama)
    assert "alice/tiny" in message
    assert "begin with Llama, such as alice/Llama-tiny" in message
    named = (*llama, "publish.repo_id=alice/Llama-tiny")
    dry_run(*named)
    folder = folder_of(recipe)
    assert (folder / "LICENSE.txt").read_text(encoding="utf-8") == LICENSE
    assert (folder / "USE_POLICY.md").exists()
    assert (folder / "NOTICE").read_text(encoding="utf-8") == (
        "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, "
        "Inc. All Rights Reserved.\n"
    )
    assert "\n**Built with Llama**\n" in (folder / "README.md").read_text(encoding="utf-8")
    (papers / "USE_POLICY.md").unlink()
    message = refused(in_process, *named)
    assert "lacks USE_POLICY.md: download it from the base's page" in message
    assert "publish.license_folder" in message


@pytest.mark.parametrize(
    ("license", "start", "line"),
    [
        ("llama2", "", None),
        ("llama3", "Llama-3-", "Built with Meta Llama 3"),
        ("llama3.1", "Llama-", "Built with Llama"),
    ],
)
def test_each_generation_of_llama_has_its_own_demands(recipe, papers, license, start, line):
    """https://ai.meta.com/llama/license/, https://www.llama.com/llama3/license/, and so on."""
    command = (
        recipe,
        "--dry-run",
        f"publish.license={license}",
        f"publish.license_folder={papers}",
    )
    if start:
        message = refused(in_process, *command)
        assert f"begin with {start[:-1].replace('-', ' ')}, such as alice/{start}tiny" in message
    if license == "llama3":
        message = refused(in_process, *command, "publish.repo_id=alice/Llama-tiny")
        assert "such as alice/Llama-3-tiny" in message
        dry_run(*command, "publish.repo_id=alice/Llama3_tiny")
    dry_run(*command, f"publish.repo_id=alice/{start}tiny")
    page = (folder_of(recipe) / "README.md").read_text(encoding="utf-8")
    assert (f"\n**{line}**\n" in page) if line else ("Built with" not in page)


def test_a_base_of_meta_is_a_llama_whatever_the_recipe_says(recipe):
    message = refused(in_process, recipe, "--dry-run", "publish.base_model=meta-llama/Llama-3.2-1B")
    assert "the base is by meta-llama" in message


def test_a_license_must_be_known_and_is_not_changed(recipe, tiny_base):
    from finequant.publish.license import license_of
    from finequant.recipes.errors import UserError
    from finequant.recipes.load import load_recipe

    unknown = refused(in_process, recipe, "--dry-run", "publish.license=null")
    assert "does not state its license" in unknown
    base = recipe.parent / "base"
    shutil.copytree(tiny_base, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n", encoding="utf-8")
    (base / "LICENSE").write_text("MIT", encoding="utf-8")
    with pytest.raises(UserError, match="apache-2.0, but .* says mit"):
        license_of(load_recipe(recipe, [f"model.base={base}"]))
    followed = license_of(load_recipe(recipe, [f"model.base={base}", "publish.license=null"]))
    assert followed.id == "mit"
    assert followed.documents == {"LICENSE": b"MIT"}


def test_a_repository_that_was_edited_on_the_hub_is_refused_without_into_existing(hub, publish):
    assert publish().returncode == 0
    repository, blob = hub.repositories[REPOSITORY], type(hub).blob
    edited = {"README.md": blob(b"my own words", False), "model.safetensors": blob(b"mine", True)}
    repository.commit(repository.files | edited)
    stopped = publish()
    assert stopped.returncode == 2
    assert "alice/tiny was edited on the Hub since" in stopped.stderr
    assert "published it: README.md, model.safetensors: move the edits" in stopped.stderr
    assert repository.files["README.md"].content == b"my own words"
    told = publish("--into-existing")
    assert told.returncode == 0, told.stderr
    assert repository.files["README.md"].content != b"my own words"
    assert publish("publish.description=Again.").returncode == 0


def test_no_quantized_model_is_published_beside_an_adapter(hub, publish):
    """transformers loads the adapter, and its base, from a repository that has both."""
    repository = make_repository(hub, {"adapter_config.json": b"{}"})
    stopped = publish("--into-existing")
    assert stopped.returncode == 2
    assert "alice/tiny has adapter_config.json, so that transformers would load" in stopped.stderr
    assert len(repository.commits) == 1
    done = publish("--into-existing", "--adapter-only", "publish.base_model=org/base")
    assert done.returncode == 0, done.stderr


def test_files_of_others_that_cannot_be_read_are_not_taken_for_ours(hub, publish):
    sums = b"\xff\xfe  model.bin\n"
    make_repository(hub, {"recipe.yaml": b"when: 2024-13-01\n", "SHA256SUMS": sums})
    stopped = publish()
    assert stopped.returncode == 2, stopped.stderr
    assert "alice/tiny exists, with 2 files that this recipe did not publish" in stopped.stderr


@pytest.mark.parametrize(
    ("route", "status", "said", "code", "words"),
    [
        (
            "commit",
            429,
            "cache it",
            1,
            "too many requests to the Hub, status 429: wait a few minutes",
        ),
        ("preupload", 403, "storage limit reached", 2, "alice/tiny (storage limit reached): "),
        ("create", 409, "it exists", 1, "created in the meantime, or this token may not see it"),
        ("validate", 400, "unknown license", 2, "the Hub refused, status 400: unknown license"),
        ("whoami", 200, None, 1, "the Hub gave an unexpected answer (without 'name')"),
        ("store", 403, None, 2, "the Hub refused, status 403"),
    ],
)
def test_what_the_hub_says_is_told_in_one_line(
    hub, publish, recipe, route, status, said, code, words
):
    hub.instead[route] = (status, {"error": said} if said else {}, {})
    stopped = publish()
    assert stopped.returncode == code, stopped.stderr
    message = stopped.stderr.strip().splitlines()[-1]
    assert message.startswith("error: publish: ")
    assert words in message
    assert "hf_Planted" not in stopped.stdout + stopped.stderr
    assert bool(hub.repositories) == (route in ("commit", "preupload", "store"))
    assert bool(hub.received) == (route == "commit")


def test_a_published_page_names_no_folder_of_this_machine(recipe, tiny_base):
    dry_run(recipe, "publish.rows=true")
    text = (folder_of(recipe) / "report.html").read_text(encoding="utf-8")
    assert "source: train.jsonl" in text
    for part in (str(recipe.parent), str(tiny_base.parent), "/tmp/", str(Path.home()) + "/"):
        assert part not in text


@pytest.fixture
def card(recipe):
    """Writes a card of the finished run with a changed recipe or report, without its metadata."""

    def write(kind: str, files: list[str], overrides: list[str], change=lambda models: None) -> str:
        from finequant.publish.card import card_text
        from finequant.publish.license import license_of
        from finequant.publish.publish import read_report
        from finequant.recipes.load import without_folders

        loaded = load_recipe(recipe, overrides)
        report = read_report(RunDir.of(load_recipe(recipe)))
        change(report["models"])
        shown, datasets = without_folders(loaded), ["imdb", "org/rows"]
        return card_text(shown, report, license_of(loaded), kind, files, datasets)

    return write


def test_the_card_says_what_was_not_measured(card):
    def only_answers(models):
        for model in models.values():
            model["perplexity"] = {}

    def only_sized(models):
        models["gguf"] = {"size_bytes": 9, "bits_per_weight": 9.0, "perplexity": {}, "tasks": {}}

    def nothing(models):
        only_answers(models)
        for model in models.values():
            model["tasks"] = {}

    assert "model-index" not in card("quantized", [], [], nothing)  # not one without results
    text = card("quantized", [], [], only_answers)
    assert "- No perplexity was measured.\n" in text
    assert "on the held-out rows only" not in text
    assert "The adapter was trained on" not in text  # the introduction names the only base
    text = card("quantized", ["gguf/model.gguf"], [], only_sized)
    assert "- The export gguf holds the same codes; only its size was measured.\n" in text
    assert "on the held-out rows only" in text


def test_the_card_of_an_adapter_speaks_of_its_two_models(card):
    def ran(models):
        models["gguf"] = dict(models["quantized"], speed={"prompt": 1.0, "decoding": 1.0})

    text = card("adapter", [], ["publish.base_model=org/base", "evaluate.limit=1"], ran)
    assert "\nBoth models are measured on the same inputs, in float32 arithmetic. " in text
    assert "± is one standard error. `report.json`" in text
    assert "- The adapter was trained and measured on `base`, not on org/base, whose " in text
    assert "- The adapter was trained on " not in text
    assert "- Accuracies were measured on as few as " in text


def test_the_card_tells_datasets_of_the_hub_from_the_authors_rows(card):
    sources = "data.train=[imdb, train.jsonl, {source: org/rows, limit: 9}]"
    text = card("quantized", [], [sources, "lora.use_dora=true"])
    assert "(DoRA of rank 16 on imdb, `train.jsonl` (the author's rows) and org/rows)" in text
    assert "datasets:\n- imdb\n- org/rows\n" in text


def test_snippets_of_a_model_without_a_chat_template_take_a_prompt(card):
    exported = ["gguf/m.gguf", "onnx/m_q4.onnx", "mlx/m.safetensors", "compressed-tensors/m"]
    plain, chat = (card("quantized", [*exported, *more], []) for more in ([], [TEMPLATE]))
    assert plain.count('prompt = "Hello!"') == chat.count("messages = [") == 5
    assert "messages" not in re.sub(r".*description.*", "", plain)
    assert 'prompt = "Hello!"' not in chat
    for line in (
        'inputs = tokenizer(prompt, return_tensors="pt")',
        "answer = model(prompt, max_tokens=64",
        "generator(prompt, { max_new_tokens: 64, do_sample: false, add_special_tokens: true })",
        "print(generate(model, tokenizer, prompt, max_tokens=64))",
    ):
        assert line in plain
    assert "await generator(messages, { max_new_tokens: 64, do_sample: false })" in chat
    assert "4 bits" not in chat  # their number is the recipe's: 2


@pytest.mark.parametrize(
    ("long_rows", "end"),
    [
        ("truncate", "; longer rows, if any, were cut.\n"),
        ("drop", "; longer rows, if any, were left out.\n"),
        ("error", ".\n"),
    ],
)
def test_the_card_says_what_was_done_to_long_rows(card, long_rows, end):
    def one_row(models):
        for model in models.values():
            model["tasks"]["held_out"]["exact_match"] = {"value": 1.0, "stderr": None, "n": 1}

    text = card("quantized", [], [f"data.long_rows={long_rows}"], one_row)
    assert f"- Trained on rows of at most 64 tokens{end}" in text
    assert "- Accuracies were measured on as few as 1 row.\n" in text  # which has no error


def test_what_the_card_installs_suffices_for_its_python(card):
    """Neither transformers nor torchao requires torch, without which transformers has no models."""
    texts = [
        card("quantized", [f"{name}/m" for name in ("compressed-tensors", "mlx")], []),
        card("adapter", [], ["publish.base_model=org/base"]),
    ]
    lines = re.findall(r"`pip install (.*?)`.*?```python\n(.*?)```", "".join(texts), re.DOTALL)
    assert len(lines) == 4
    for installed, code in lines:
        required = closure([word.strip('"') for word in installed.split()])
        imported = set(re.findall(r"^from (\w+) import", code, re.MULTILINE))
        needed = imported | ({"torch", "jinja2"} if "mlx_lm" not in imported else set())
        assert {name.replace("_", "-") for name in needed} <= required, installed


def closure(requirements: list[str]) -> set[str]:
    """Names the packages that pip installs for requirements: these, and what they require."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    todo, names = list(map(Requirement, requirements)), set()
    while todo:
        name = todo.pop().name.lower().replace("_", "-")
        if name in names:
            continue
        names.add(name)
        with suppress(PackageNotFoundError):  # not on this platform
            todo += [
                entry
                for entry in map(Requirement, requires(name) or ())
                if not entry.marker or entry.marker.evaluate({"extra": ""})
            ]
    return names


def test_the_card_names_programs_that_ignore_the_penalty_of_the_measured_answers(card, recipe):
    def unscored(models):
        for model in models.values():
            model["tasks"] = {}

    file = recipe.parent / "run" / "quantized" / "generation_config.json"
    exported = ["compressed-tensors/m", "gguf/m.gguf", "mlx/m.safetensors", "executorch/m.pte"]
    assert "repetition_penalty" not in card("quantized", exported, [])
    generation = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(generation | {"repetition_penalty": 1.1}), encoding="utf-8")
    line = (
        "- Answers to held-out rows were measured with the base's `repetition_penalty` of 1.1 on "
        "the tokens of prompt and answer. Used as above, {} will apply none, and may give other "
        "answers.\n"
    )
    assert line.format("llama-cpp-python") in card("quantized", exported[:2], [])
    programs = "llama-cpp-python, ExecuTorch's LLM runner and mlx-lm"
    assert line.format(programs) in card("quantized", exported, [])
    assert "repetition_penalty" not in card("quantized", exported, [], unscored)
    for files in (exported[:1], []):  # transformers applies it
        assert "repetition_penalty" not in card("quantized", files, [])


def test_the_recipes_folder_of_documents_adds_to_those_beside_the_base(recipe, tiny_base):
    from finequant.publish.license import license_of
    from finequant.recipes.errors import UserError

    base, papers = recipe.parent / "base", recipe.parent / "papers"
    shutil.copytree(tiny_base, base)
    papers.mkdir()
    (base / "README.md").write_text("---\nlicense: unknown\n---\n", encoding="utf-8")
    for file in (base / "LICENCE", base / "NOTICE"):
        file.write_text("of the base", encoding="utf-8")
    overrides = [f"model.base={base}", f"publish.license_folder={papers}"]
    with pytest.raises(UserError, match="license_folder: .*papers: expected a folder with files"):
        license_of(load_recipe(recipe, overrides))
    (papers / "LICENSE.txt").write_text("from its page", encoding="utf-8")
    documents = license_of(load_recipe(recipe, overrides)).documents
    assert documents == {"LICENSE.txt": b"from its page", "NOTICE": b"of the base"}
    with pytest.raises(UserError, match="does not state its license"):
        license_of(load_recipe(recipe, [*overrides, "publish.license=null"]))


@pytest.fixture
def on_hub_here(hub, tmp_path, monkeypatch):
    """Sets the client up, in this process, for another Hub, from which it has cached nothing."""
    from finequant.recipes.hub import offline_reason

    def use(endpoint: str) -> None:
        settings = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "empty"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        offline_reason.cache_clear()

    yield use
    offline_reason.cache_clear()


def test_the_message_about_a_license_on_the_hub_says_what_to_do(recipe, tiny_base, on_hub_here):
    """It was `403 Client Error.`; without a connection, the client tried for half a minute."""
    from conftest import Hub as ReadableHub

    from finequant.publish.license import license_of
    from finequant.recipes.errors import UserError

    readable, loaded = ReadableHub(), load_recipe(recipe, ["model.base=org/base"])
    readable.add("org/base", tiny_base)
    readable.gated.add("org/base")
    on_hub_here(readable.url)
    begin = "model.base: the license of org/base cannot be read: "
    with pytest.raises(UserError, match=begin + "the Hub shows you no such model; for a gated"):
        license_of(loaded)
    readable.close()
    on_hub_here("http://127.0.0.1:9")
    nameless = load_recipe(recipe, ["model.base=org/base", "publish.license=null"])
    where = "the card of org/base is not in the cache, and the Hub cannot be reached "
    with pytest.raises(UserError, match=f"publish.license: {where}.*: give the license of the"):
        license_of(nameless)


def test_offline_a_license_that_was_never_downloaded_is_not_called_unstated(
    recipe, tiny_base, on_hub_here, tmp_path, capsys
):
    """Training caches the base's weights, but neither its card nor its license."""
    from conftest import Hub as ReadableHub
    from huggingface_hub import hf_hub_download

    from finequant.recipes.errors import UserError

    base, readable = tmp_path / "with card", ReadableHub()
    shutil.copytree(tiny_base, base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (base / "LICENSE").write_text("MIT", encoding="utf-8")
    readable.add("org/base", base)
    on_hub_here(readable.url)
    hf_hub_download("org/base", "config.json")
    stated, unstated = (
        load_recipe(recipe, ["model.base=org/base", f"publish.license={license}"])
        for license in ("mit", "null")
    )
    on_hub_here("http://127.0.0.1:9")
    with pytest.raises(UserError, match="publish.license: the card of org/base is not in the cach"):
        license_of(unstated)
    assert license_of(stated).documents == {}
    assert "publish: the card of org/base is not in the cache" in capsys.readouterr().err
    on_hub_here(readable.url)
    for loaded in (stated, unstated):
        assert license_of(loaded).documents == {"LICENSE": b"MIT"}
    on_hub_here("http://127.0.0.1:9")  # all of it is in the cache now
    assert license_of(unstated).id == "mit"
    assert capsys.readouterr().err == ""
    readable.close()


def test_a_missing_connection_is_not_called_offline_mode(recipe, on_hub_here):
    """Offline mode is on, because finequant has found no connection, but nobody has set it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    from finequant.publish.upload import report_hub_errors
    from finequant.recipes.errors import OutsideError
    from finequant.recipes.hub import offline_reason

    on_hub_here("http://127.0.0.1:9")
    assert offline_reason()
    with (
        pytest.raises(OutsideError, match="publish: the Hub cannot be reached .*run the same"),
        report_hub_errors(load_recipe(recipe)),
    ):
        raise OfflineModeIsEnabled


def test_a_license_without_a_name_is_called_that_of_the_base(recipe):
    from finequant.publish.card import _license
    from finequant.publish.license import License

    nameless, loaded = License("other", None, None, "", {}), load_recipe(recipe)
    assert _license(nameless, loaded).startswith("The license is that of its base, `")
    linked = _license(nameless._replace(link="https://example.org/terms"), loaded)
    assert linked.startswith("The license is [that of its base](https://example.org/terms), `")
