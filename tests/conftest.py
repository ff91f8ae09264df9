"""A tiny random Llama with its own tokenizer, and a small dataset, both made when tests run."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock
from loopback import Handler, Server

if TYPE_CHECKING:
    import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The matrices are tiny: threads cost more than they gain, most of all beside other processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background jobs ignore these, and so would the processes that tests send them to.
for number, usual in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    f"{verb} the {colour} {thing} at {hour} o'clock"
    for verb in ("open", "close", "paint", "move")
    for colour in ("red", "green", "blue", "grey")
    for thing in ("door", "lamp", "window", "box")
    for hour in range(1, 13)
]


def byte_level(vocab_size: int, markers: list[str], **roles: str):
    """Makes a tokenizer, a byte-level BPE whose first tokens are the markers.

    roles: the markers that are `bos_token`, `eos_token` and `pad_token`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=markers,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)


def make_tokenizer():
    """Makes a byte-level BPE of 384 tokens with ChatML markers and a chat template."""
    end = "<|endoftext|>"
    markers = [end, "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(384, markers, bos_token=end, eos_token=markers[2], pad_token=end)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""The tiny bases' sizes, as keys of config.json."""


def make_llama(folder: Path, **changes) -> Path:
    """Saves a random two-layer Llama (grouped-query attention, tied) and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    settings = SHAPE | {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shard_size = changes.pop("max_shard_size", "1GB")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **changes) -> Path:
    """Saves a LoRA adapter of a base, with random matrices instead of trained ones.

    changes: of peft's LoraConfig.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **changes}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "bias" in name:
                weight.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def make_rows(numbers: range) -> list[dict[str, str]]:
    """Makes requests and their one-line JSON answers."""
    rows = []
    for number in numbers:
        verb, _, colour, thing, _, hour, _ = SENTENCES[number].split()
        answer = {"do": verb, "what": f"{colour} {thing}", "hour": int(hour)}
        rows.append({"prompt": SENTENCES[number], "completion": json.dumps(answer)})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def put_bos_in_front(tokenizer) -> None:
    """Makes a tokenizer add BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert tokenizer.encode("lamp")[0] == tokenizer.bos_token_id


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """The folder of the tiny Llama. It is shared: tests must not write into it."""
    return make_llama(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def llama(tmp_path):
    """Makes variants of the tiny Llama: llama("name", **config_changes) -> folder."""
    return lambda name, **changes: make_llama(tmp_path / name, **changes)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_recipe(folder: Path, base: Path) -> Path:
    """Writes a complete recipe over a base: 48 training, 8 validation, 8 test rows."""
    write_jsonl(folder / "train.jsonl", make_rows(range(0, 48)))
    write_jsonl(folder / "validation.jsonl", make_rows(range(60, 68)))
    write_jsonl(folder / "test.jsonl", make_rows(range(80, 88)))
    (folder / "text.txt").write_text("\n".join(SENTENCES[100:130]), encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(
        f"""\
name: tiny
seed: 7
output_dir: {folder / "run"}
model:
  base: {base}
data:
  train: train.jsonl
  validation: validation.jsonl
  test: test.jsonl
  max_length: 128
lora:
  rank: 4
  alpha: 8
train:
  batch_size: 8
  micro_batch_size: 4
  learning_rate: 1e-3
  precision: fp32
quantize:
  effort: fast
  scale: max
  scale_dtype: float32
  group_size: 32
evaluate:
  perplexity:
    - {{name: text, source: text.txt, max_length: 64}}
  max_new_tokens: 8
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def recipe_file(tmp_path, tiny_base) -> Path:
    """A complete recipe over the tiny Llama: 48 training, 8 validation, 8 test rows."""
    return make_recipe(tmp_path, tiny_base)


@pytest.fixture(scope="session")
def frozen() -> set[str]:
    """Modules whose objects the garbage collector no longer visits."""
    return set()


@pytest.fixture(autouse=True)
def freeze_libraries(frozen) -> None:
    """Keeps the garbage collector from visiting the libraries' million objects: each training and
    evaluation collects garbage, which would take most of a tiny model's time."""
    if len(sys.modules) > len(frozen) + 100:
        gc.collect()
        gc.freeze()
        frozen.update(sys.modules)


@pytest.fixture(autouse=True)
def stub_plots_unless_marked(request, monkeypatch) -> None:
    """Replaces plots by stub files, except in tests marked `plots`: drawing takes half of the time
    of an evaluation."""
    if request.node.get_closest_marker("plots"):
        return
    stub_figures(monkeypatch.setattr)


def stub_figures(replace: Callable[[object, str, object], None]) -> None:
    """Replaces the functions that draw figures by functions that write stub files."""
    from finequant.evaluate.report import plots, sweep_report

    make = plots.new_figure

    def new_figure(width: float):
        def savefig(target, format: str, **options: object) -> None:
            if format == "svg":
                target.write("<svg></svg>")
            else:
                Path(target).write_bytes(b"\x89PNG")

        figure = make(width)
        figure.savefig = savefig
        return figure

    for module in (plots, sweep_report):
        replace(module, "new_figure", new_figure)


class Reloads:
    """Stands in for `subprocess.run` where `convert` reloads its checkpoint in a fresh process.

    The same code runs, but in this process: importing torch and transformers anew would take
    seconds in each of a hundred conversions. Tests marked `fresh_process` start a real process.
    """

    def __init__(self) -> None:
        self.run, self.fresh = subprocess.run, False

    def __call__(self, command, *arguments, **options):
        reload = sys.modules.get("finequant.quantize.checkpoint.reload")
        if self.fresh or reload is None or reload.RELOAD not in command:
            return self.run(command, *arguments, **options)
        code, *rest = command[3:]
        before, sys.argv = sys.argv, ["-c", *rest]
        try:
            exec(code, {"__name__": "__main__"})
        except (Exception, SystemExit) as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        finally:
            sys.argv = before
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(scope="session", autouse=True)
def reloads() -> Iterator[Reloads]:
    stand_in = Reloads()
    subprocess.run = stand_in
    yield stand_in
    subprocess.run = stand_in.run


@pytest.fixture(autouse=True)
def reload_here_unless_marked(request, reloads) -> Iterator[None]:
    reloads.fresh = request.node.get_closest_marker("fresh_process") is not None
    yield
    reloads.fresh = False


@pytest.fixture(scope="session")
def train_once(tmp_path_factory) -> Callable[[list[str]], None]:
    """Runs `finetune/train.py` for tests of later stages, once in a session for equal inputs.

    Adapter and manifest of a run that was trained before, also by another worker, are copied.
    """
    from finequant.finetune.train import main
    from finequant.recipes.load import load_recipe
    from finequant.recipes.rundir import RunDir

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    store = shared / "trained"
    store.mkdir(exist_ok=True)

    def train(arguments: list[str]) -> None:
        recipe = load_recipe(Path(arguments[0]), arguments[1:])
        run = RunDir.of(recipe)
        inputs = json.dumps(run.inputs(recipe, "train"), sort_keys=True, default=str)
        kept = store / hashlib.sha256(inputs.encode()).hexdigest()
        if kept.exists() and not run.adapter.exists():
            shutil.copytree(kept, run.root, dirs_exist_ok=True)
            return
        main(arguments)
        if kept.exists():
            return
        partial = store / f"{kept.name}.{os.getpid()}"
        shutil.copytree(run.adapter, partial / "adapter")
        shutil.copy(run.root / "manifest.json", partial)
        try:
            partial.rename(kept)
        except OSError:  # another worker was first
            shutil.rmtree(partial)

    return train


EXECUTORCH = ("train.max_steps=2", "quantize.exports=[executorch]", "quantize.cache_length=320")


@pytest.fixture(scope="session")
def executorch_run(tmp_path_factory, tiny_base, train_once, worker_id) -> Path:
    """The folder of a recipe and its run with EXECUTORCH, exported once for all pytest workers.

    It is shared: tests must not write into it.
    """
    from finequant.quantize.convert import main as convert
    from finequant.quantize.export import main as export

    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "executorch"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            arguments = [str(make_recipe(folder, tiny_base)), *EXECUTORCH]
            train_once(arguments)
            convert(arguments)
            export(arguments)
    assert (folder / "run" / "exports" / "executorch").exists()
    return folder


def refused(command: Callable, *arguments, **options) -> str:
    """Returns what a command prints when it refuses, with exit code 2 and one error."""
    with redirect_stderr(StringIO()) as stderr, pytest.raises(SystemExit) as exit_:
        command(*arguments, **options)
    message = stderr.getvalue()
    assert exit_.value.code == 2, message
    assert "Traceback" not in message
    assert f"\n{message}".count("\nerror: ") == 1, message
    return message


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Computes the norm of the difference of two tensors, relative to that of `expected`."""
    return ((actual - expected).norm() / expected.norm()).item()


class Output(NamedTuple):
    """The output of a command, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(capfd):
    """Runs `finequant` in this process: importing torch anew would take most of the time."""
    from finequant.recipes.run import main

    def run(*arguments: str) -> Output:
        capfd.readouterr()
        code = 0
        try:
            main([*arguments])
        except SystemExit as end:
            code = end.code or 0
        return Output(code, *capfd.readouterr())

    return run


@pytest.fixture
def stages_here(monkeypatch) -> list[str]:
    """Makes `finequant run` call its stages in this process; lists the stages that it called."""
    from finequant.recipes.commands import pipeline
    from finequant.recipes.hub import COMMITS

    called = []

    def start(step: list[str], position: str, arguments: list[str], launcher: list[str]) -> int:
        called.extend(step)
        try:
            options = pipeline.export_options(step)
            import_module(pipeline.module_of(step[0])).main([*arguments, *options])
        except SystemExit as end:
            return end.code or 0
        return 0

    monkeypatch.setattr(pipeline, "_start", start)
    monkeypatch.setenv(COMMITS, "{}")  # the command sets it for its stages
    return called


class Hub(Server):
    """The part of the Hugging Face Hub's HTTP API that a client needs to read, on loopback.

    `add` makes a repository from a folder; `requests` lists the requests of clients.
    """

    def __init__(self) -> None:
        super().__init__(_HubHandler)
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path, and the token that came with it."""
        self.gated: set[str] = set()
        """Repositories whose files nobody may see."""
        self._repositories: dict[tuple[str, str], dict[str, Path]] = {}

    def add(self, repository: str, folder: Path, kind: str = "models") -> str:
        """Serves the folder as a new commit on `main` of `repository` (org/name); returns it."""
        commits = self._repositories.setdefault((kind, repository), {})
        commit = hashlib.sha1(f"{kind}/{repository}/{len(commits)}".encode()).hexdigest()
        commits[commit] = folder
        return commit

    def commits(self, kind: str, repository: str) -> dict[str, Path]:
        """Returns the commits of a repository and their folders; `main` is the last."""
        return self._repositories.get((kind, repository), {})


class _HubHandler(Handler):
    hub: Hub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, token))
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            kind, repository, verb, rest = match.groups()
            revision, _, folder = (rest or "main").partition("/")
        elif match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path):
            kind, repository, verb, revision, folder = match.groups()
        else:
            return self._refuse(404, "EntryNotFound")
        commits = self.hub.commits(kind or "models", repository)
        if not commits:
            return self._refuse(401, "RepoNotFound")  # as the Hub hides private ones
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._refuse(404, "RevisionNotFound")
        root = commits[commit]
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if verb == "resolve" and repository in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        if verb == "resolve":
            file = root / folder
            return self._send_file(file, commit) if file in files else self._missing(commit)
        if verb == "tree":
            inside = [file for file in files if file.is_relative_to(root / folder)]
            return self.send(200, [self._entry(file, root) for file in inside])
        names = [{"rfilename": file.relative_to(root).as_posix()} for file in files]
        info = {"id": repository, "sha": commit, "siblings": names, "tags": [], "downloads": 0}
        return self.send(200, info | {"private": False, "gated": False, "disabled": False})

    do_GET = do_HEAD = answer  # noqa: N815

    def _entry(self, file: Path, root: Path) -> dict[str, object]:
        name, size = file.relative_to(root).as_posix(), file.stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": self._etag(file)}

    def _etag(self, file: Path) -> str:
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def _send_file(self, file: Path, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{self._etag(file)}"'}
        self.send(200, file.read_bytes(), headers)

    def _missing(self, commit: str) -> None:
        self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, {}, {"X-Error-Code": code, **(headers or {})})


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub on loopback, empty at first; stopped after the test."""
    own = Hub()
    yield own
    own.close()


@pytest.fixture
def hub_environment(hub, tmp_path) -> dict[str, str]:
    """The environment of a user of `hub`, with an empty cache and no offline mode."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return clean | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def on_hub(hub_environment, tmp_path):
    """Runs a Python command line as a user of `hub`."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**hub_environment, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
