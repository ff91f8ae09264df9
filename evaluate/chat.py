"""Chat with a model of a run, or ask all models one question; shows text and tokens per second."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finequant.evaluate.models import GREEDY, MODELS
from finequant.recipes.command_line import open_run, quiet_libraries
from finequant.recipes.errors import UserError, counted, one_line
from finequant.recipes.interrupt import Interrupted
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.terminal import close, doing, say

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

    from finequant.finetune.architecture import Decoder, DecoderConfig
    from finequant.quantize.formats.format import Format

Messages = list[dict[str, str]]

STAGE_OF = {"tuned": "train", "quantized": "quantize"}
"""The stage that makes a model."""

NOT_UTF8 = "chat: the question is not UTF-8 text: set the terminal, or save the file, as UTF-8"

HELP = "/new starts over, /quit or an empty line ends the chat, /help shows this again"


class Described(NamedTuple):
    """What the files beside the weights say of a model."""

    tokenizer: PreTrainedTokenizerBase
    config: DecoderConfig
    generation: GenerationConfig
    """With every token that ends an answer."""


class Answer(NamedTuple):
    text: str
    tokens: int
    seconds: float

    @property
    def speed(self) -> str:
        """Formats the answer's tokens per second; the time includes reading the prompt."""
        return f"{self.tokens / self.seconds:.1f} tokens/s"


ChatModel = Callable[[Messages, int, Callable[[str], None]], Answer]
"""A function of the conversation, the answer's maximum tokens, and a callback for its text."""


def chat(
    where: Path,
    overrides: Sequence[str],
    model: str | None,
    prompt: str | None,
    max_new_tokens: int,
) -> None:
    """Holds a conversation with one model or, if `prompt` is given, shows each model's answer.

    where: a recipe, or a run directory.
    model: base, tuned, quantized, or an export by its name in the report. Default: quantized; with
        a prompt, all that exist.

    Raises:
        UserError: for a model that does not exist or cannot be used, or a question that is not
            UTF-8; without `model`, only if no model can answer.
    """
    checked_text(prompt or "")
    recipe, run = open_run(where, overrides, missing_ok=True)
    doing("chat: loading torch and transformers")
    if prompt is None:
        hold_conversation(model or "quantized", recipe, run, max_new_tokens)
    else:
        names = [model] if model else available(run)
        ask_each(names, prompt, recipe, run, max_new_tokens)


def hold_conversation(name: str, recipe: Recipe, run: RunDir, max_new_tokens: int) -> None:
    """Loads a model and talks to it until the user ends the conversation."""
    chat_model = load_made(name, recipe, run)
    try:
        converse(chat_model, name, recipe, max_new_tokens)
    except Interrupted as end:  # a usual way to leave a conversation
        print(file=sys.stderr)
        sys.exit(end.code)


def ask_each(
    names: list[str], prompt: str, recipe: Recipe, run: RunDir, max_new_tokens: int
) -> None:
    """Asks models one after the other, so that only one is in memory, and shows all answers.

    Raises:
        UserError: if none of them can answer; what is wrong with the first.
    """
    messages = [*system_message(recipe), {"role": "user", "content": prompt}]
    answers, problems = {}, []
    for name in names:
        try:
            chat_model = load_made(name, recipe, run)
            doing(f"chat: {name}: answering")
            answers[name] = chat_model(messages, max_new_tokens, lambda text: None)
        except UserError as error:
            problems.append((name, error))
    if not answers:
        raise problems[0][1]
    for name, error in problems:
        say(f"chat: {name}: skipped: {str(error).removeprefix(f'{name}: ')}")
    close()
    show(answers)


def available(run: RunDir) -> list[str]:
    """Names the models that exist in this run and whose runtimes are installed; the base may be
    anywhere, and is always named."""
    exported = []
    for name, entry in exports_with_a_runtime().items():
        if not (run.exports / entry.name).is_dir():
            continue
        if missing := entry.missing_runtime():
            say(f"chat: {name}: skipped, its runtime is not installed: {missing}")
        else:
            exported.append(name)
    made = [name for name in MODELS if name not in STAGE_OF or run.has(STAGE_OF[name])]
    return made + exported


def exports_with_a_runtime() -> dict[str, Format]:
    """Maps model names to the formats with their own runtime, which transformers cannot load."""
    from finequant.quantize.formats.formats import FORMATS  # imports torch

    entries = FORMATS.values()
    return {
        entry.report_key: entry for entry in entries if entry.runtime and not entry.is_checkpoint
    }


def check_made(name: str, recipe: Recipe, run: RunDir) -> None:
    """Checks that a model exists and was made from the run's present artifacts.

    Only base and tuned need the base, which may be gone or changed for the others.

    Raises:
        UserError: for an unknown name, or a model that is missing or out of date.
    """
    if name == "quantized" and not run.has("quantize"):
        run.require_there("train")  # what is missing first
    if name in MODELS:
        if stage := STAGE_OF.get(name):
            run.require(stage, recipe, any_base=name == "quantized")
        return
    exports = exports_with_a_runtime()
    if name not in exports:
        raise UserError(f"--model: {name!r}: expected {', '.join((*MODELS, *exports))}")
    if not (run.exports / exports[name].name).is_dir():
        raise UserError(
            f"{name}: not exported: run `finequant export RECIPE --to {exports[name].name}` first"
        )
    run.require(exports[name].name, recipe)


def load_made(name: str, recipe: Recipe, run: RunDir) -> ChatModel:
    """Loads a model that `check_made` does not refuse."""
    check_made(name, recipe, run)
    quiet_libraries()
    return load_chat_model(name, recipe, run)


def load_chat_model(name: str, recipe: Recipe, run: RunDir) -> ChatModel:
    """Loads a model in its runtime.

    Raises:
        UserError: if the runtime is not installed.
    """
    from finequant.evaluate.models import load_model
    from finequant.finetune.data.turns import configured_ends
    from finequant.quantize.size.terms import Lengths

    doing(f"chat: {name}: loading")
    described = describe(name, recipe, run)
    tokenizer, config, generation = described
    if not tokenizer.chat_template:
        say(f"chat: {name}: the base has no chat template: each line is a text that it continues")
    if name not in MODELS:
        return load_export(name, recipe, run, described)
    prompt = _encode([{"role": "user", "content": "Hello!"}], tokenizer, recipe)
    ends, lengths = configured_ends(generation), Lengths([], scored=0, prompt=0)
    model = load_model(name, recipe, run, prompt, ends, lengths, config)
    return transformers_chat_model(model, tokenizer, recipe, name)


def describe(name: str, recipe: Recipe, run: RunDir) -> Described:
    """Reads the files of quantized/ for it and its exports, which then need no base; for the others
    those of the base, as quantize does."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from finequant.finetune.data.turns import generation_config
    from finequant.finetune.model import load_config, load_tokenizer

    if name in ("base", "tuned") or not run.has("quantize"):
        tokenizer = load_tokenizer(recipe.model)
        generation = generation_config(recipe.model, recipe.data, tokenizer)
        return Described(tokenizer, load_config(recipe.model), generation)
    kinds = (AutoTokenizer, AutoConfig, GenerationConfig)
    return Described(*(kind.from_pretrained(run.quantized) for kind in kinds))


def load_export(name: str, recipe: Recipe, run: RunDir, described: Described) -> ChatModel:
    """Opens an export in its own runtime.

    Raises:
        UserError: if the runtime is not installed or cannot open the files; later, if the cache
            cannot hold a conversation.
    """
    import torch

    from finequant.evaluate.metrics.exports import greedy_tokens
    from finequant.finetune.architecture import usable_positions
    from finequant.finetune.data.turns import configured_ends, repetition_penalty
    from finequant.quantize.formats.format import CONTEXT

    entry = exports_with_a_runtime()[name]
    if missing := entry.missing_runtime():
        raise UserError(f"{name}: its runtime is not installed: {missing}")
    folder = run.exports / entry.name
    try:
        runtime = entry.open_runtime(folder, CONTEXT)
    except Exception as error:  # each runtime has its own
        raise UserError(
            f"{name}: {folder} cannot be opened ({one_line(error)}): run "
            f"`finequant export RECIPE --to {entry.name}` again"
        ) from None
    cache = run.manifest()[entry.name].get("cache_length", CONTEXT)
    tokenizer, config, generation = described
    positions = usable_positions(config)
    ends, penalty = configured_ends(generation), repetition_penalty(generation)

    def respond(messages: Messages, max_new_tokens: int, write: Callable[[str], None]) -> Answer:
        ids, new = _encode(messages, tokenizer, recipe), []
        limit = _limit(name, len(ids), positions, max_new_tokens, cache)
        streamer = _streamer(tokenizer, ends, write)
        streamer.put(torch.tensor(ids))
        started = time.monotonic()
        for token in greedy_tokens(runtime, ids, ends, limit, penalty):
            new.append(token)
            streamer.put(torch.tensor([token]))
        streamer.end()
        seconds = time.monotonic() - started
        return Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), seconds)

    return respond


def _limit(
    name: str, tokens: int, positions: int, max_new_tokens: int, cache: int | None = None
) -> int:
    """Returns how many tokens an answer may have after a conversation of so many, so that both fit
    into the positions of the base and into a cache, if it is limited; says so if they are fewer
    than asked for."""
    most, holder, remedy = positions, "the base reads at most", ""
    if cache is not None and cache < positions:
        most, holder = cache, "the cache holds"
        remedy = ", or export to onnx or executorch with a larger quantize.cache_length"
    room = most - tokens
    if room < 1:
        raise UserError(
            f"{name}: the conversation has {tokens} tokens, but {holder} {most}, the answer "
            f"included: begin a new one{remedy}"
        )
    if room < max_new_tokens:
        say(f"chat: {name}: {holder} {most} tokens: the answer has at most {room}")
    return min(room, max_new_tokens)


def transformers_chat_model(
    model: Decoder, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, name: str
) -> ChatModel:
    """Returns a function that answers greedily and streams the text.

    Raises:
        UserError: later, for a conversation that is longer than the base reads.
    """
    import torch

    from finequant.finetune.architecture import usable_positions
    from finequant.finetune.data.turns import configured_ends, until_end

    ends = configured_ends(model.generation_config)
    positions = usable_positions(model.config)

    def respond(messages: Messages, max_new_tokens: int, write: Callable[[str], None]) -> Answer:
        ids = torch.tensor([_encode(messages, tokenizer, recipe)], device=model.device)
        limit = _limit(name, ids.shape[1], positions, max_new_tokens)
        started = time.monotonic()
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                pad_token_id=tokenizer.pad_token_id,
                streamer=_streamer(tokenizer, ends, write),
                **GREEDY,
            )
        new = output[0, ids.shape[1] :].tolist()
        seconds = time.monotonic() - started
        text = tokenizer.decode(until_end(new, ends), skip_special_tokens=True)
        return Answer(text.strip(), len(new), seconds)

    return respond


def _streamer(
    tokenizer: PreTrainedTokenizerBase, ends: list[int], write: Callable[[str], None]
) -> TextStreamer:
    """Makes a streamer, which takes a prompt, then one token at a time. It writes text as soon as a
    word is complete, without end tokens, special or not: a token may hold a part of a letter."""
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or value.item() not in ends:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def converse(chat_model: ChatModel, name: str, recipe: Recipe, max_new_tokens: int) -> None:
    """Reads lines and streams answers; keeps the conversation as context."""
    say(f"chat: {name}; {HELP}")
    messages = system_message(recipe)
    while (line := _read_line()) not in ("", "/quit"):
        if line.startswith("/"):
            messages = system_message(recipe) if line == "/new" else messages
            say(f"chat: {'a new conversation' if line == '/new' else HELP}")
            continue
        messages.append({"role": "user", "content": line})
        answer = chat_model(messages, max_new_tokens, lambda text: print(text, end="", flush=True))
        print()
        say(f"chat: {counted(answer.tokens, 'token')}, {answer.speed}")
        messages.append({"role": "assistant", "content": answer.text})


def show(answers: dict[str, Answer]) -> None:
    """Prints a table with a column for each model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name, answer in answers.items():
        table.add_column(f"{name}, {answer.speed}", overflow="fold", ratio=1)
    table.add_row(*(Text(answer.text) for answer in answers.values()))
    Console().print(table)


def system_message(recipe: Recipe) -> Messages:
    """Returns the system message that the training rows begin with, if any."""
    return [{"role": "system", "content": recipe.data.system}] if recipe.data.system else []


def _encode(messages: Messages, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[int]:
    """Returns the tokens of a conversation or, without a chat template, of the last message: it is
    the beginning of a text, as the rows of training are texts.

    Raises:
        UserError: if that text has no tokens.
    """
    from finequant.finetune.data.row import Row
    from finequant.finetune.data.tokens import encode_prompt

    if not tokenizer.chat_template:
        ids = tokenizer(messages[-1]["content"])["input_ids"]
        if not ids:
            raise UserError("--prompt: expected the beginning of a text, found none")
        return ids
    asked = Row("chat", messages=(*messages, {"role": "assistant", "content": ""}))
    return encode_prompt(asked, tokenizer, recipe.data)


def _read_line() -> str:
    try:
        return checked_text(input("> " if sys.stdin.isatty() else "").strip())
    except EOFError:
        return ""
    except UnicodeDecodeError:
        raise UserError(NOT_UTF8) from None


def checked_text(text: str) -> str:
    """Returns a text that the user typed, and that a tokenizer takes.

    Raises:
        UserError: if it has bytes that are not UTF-8, for which Python puts surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(NOT_UTF8) from None
    return text
