"""Renders conversations by the model's chat template, and finds the spans of their answers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from finequant.finetune.data.messages import THOUGHTS, Message
from finequant.finetune.data.row import Row
from finequant.finetune.data.turns import AnswerEnd, answer_end
from finequant.recipes.errors import UserError
from finequant.recipes.locate import CHATML_TOOLS
from finequant.recipes.schema import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""The first character, and the one after the last."""


class Rendering:
    """A conversation as the chat template writes it, whole or up to one of its turns."""

    def __init__(
        self,
        row: Row,
        tokenizer: PreTrainedTokenizerBase,
        data: Data,
        end: AnswerEnd | None = None,
    ) -> None:
        """end: the result of `answer_end`, so that it is not computed for each row."""
        self.row, self.tokenizer, self.data = row, tokenizer, data
        self._end = end
        self._texts: dict[tuple[int, bool], str] = {}

    @property
    def text(self) -> str:
        """Returns the whole conversation."""
        return self.up_to(len(self.row.messages))

    def up_to(self, stop: int, add_generation_prompt: bool = False) -> str:
        """Returns the text of the turns before index `stop`.

        Raises:
            UserError: for a row that the template refuses.
        """
        key = (stop, add_generation_prompt)
        if key not in self._texts:
            self._texts[key] = self._rendered(stop, add_generation_prompt)
        return self._texts[key]

    def _rendered(self, stop: int, add_generation_prompt: bool) -> str:
        row, data = self.row, self.data
        try:
            (text,) = _render(
                [row.messages[:stop]], row.tools, self.tokenizer, data, add_generation_prompt
            )
        # A template is a program: besides jinja's errors it raises whatever Python's operators do.
        except Exception as error:
            if isinstance(error, UserError):
                raise
            reason = str(error) or type(error).__name__
            raise UserError(
                f"{row.where}: the chat template refuses this row: {reason}; change the row, "
                "data.template_arguments or model.chat_template"
            ) from None
        return text

    def answer_span(self, index: int) -> Span:
        """Finds the span of an answer in the whole conversation, with the token that ends it.

        It begins where the template's generation prompt ends, as the model's own answer will; the
        span of an opening greeting begins with the text.

        Raises:
            UserError: if the template leaves out the generation prompt or a word of the answer,
                ends it in no token, or rewrites earlier turns once later ones follow.
        """
        row, text = self.row, self.text
        # Nothing is asked before an opening greeting, and most templates refuse no messages.
        prompt = self.up_to(index, add_generation_prompt=True) if index else ""
        truncated = self.up_to(index + 1)
        start = _end_of_prompt(truncated, prompt)
        if start is None:
            raise UserError(_unlike_prompt(row, index, prompt, truncated))
        last_word = _end_of_content(row, index, truncated, start)
        end = self._end or answer_end(self.tokenizer, self.data)
        if end.token is None and self.data.missing_end == "error":
            raise UserError(_no_end(end.written))
        at = truncated.rfind(end.token, last_word) if end.token else -1
        stop = len(truncated.rstrip()) if at < 0 else at + len(end.token)
        if not text.startswith(truncated[:stop]) and not row.messages[index].get("tool_calls"):
            # Some templates only end the last answer of a conversation.
            stop = last_word
        if not text.startswith(truncated[:stop]):
            raise UserError(
                f"{row.where}: the chat template writes earlier turns differently once later ones "
                "follow, so the answers cannot be told apart: use rows with one answer, a "
                "model.chat_template that only appends, or data.loss_on=all, which makes "
                "prompts targets, too"
            )
        return start, stop


def _unlike_prompt(row: Row, index: int, prompt: str, truncated: str) -> str:
    """Writes the message about an answer that does not begin where the generation prompt ends.

    truncated: the conversation with this answer, but without what follows it.
    """
    same = len(commonprefix([prompt, truncated]))
    if prompt[same:].isspace() and _opened(row.messages[index]["content"], prompt):
        return (
            f"{row.where}: the chat template asks for an answer with {prompt[-20:]!r}, but "
            f"this row's answer goes on with {truncated[same:][:40]!r} where the prompt "
            f"has {prompt[same:]!r}, so the model would be asked with a prompt that it was "
            f"not trained on: put {prompt[same:]!r} there in the rows"
        )
    return (
        f"{row.where}: the chat template asks for an answer with {prompt[same:][:40]!r}, "
        f"but writes {truncated[same:][:40]!r} where this row has its answer, so the model "
        "would be asked with a prompt that it was not trained on: set model.chat_template "
        "to one that writes the same in both cases: one that opens no thought, or one that "
        "keeps thoughts"
    )


def render_rows(
    rows: Iterable[Row], answers: Iterable[Collection[int]], tokenizer: Any, data: Data
) -> list[Rendering]:
    """Renders many conversations in a few calls, whole and up to each of their `answers`.

    If the template refuses a call, its texts are left out. Each is then rendered by itself when it
    is needed, so that the error names the row.
    """
    end = answer_end(tokenizer, data)
    renderings = [Rendering(row, tokenizer, data, end) for row in rows]
    alike: dict[tuple[bool, str], list[tuple[Rendering, int]]] = defaultdict(list)
    for rendering, indices in zip(renderings, answers, strict=True):
        tools = json.dumps(rendering.row.tools) if rendering.row.tools else ""
        stops = {len(rendering.row.messages), *(index + 1 for index in indices)}
        alike[False, tools] += [(rendering, stop) for stop in stops]
        alike[True, tools] += [(rendering, index) for index in indices if index]
    for (asks, _), pieces in alike.items():
        turns = [rendering.row.messages[:stop] for rendering, stop in pieces]
        tools = pieces[0][0].row.tools if pieces else ()
        try:
            texts = _render(turns, tools, tokenizer, data, asks)
        except Exception:
            continue
        for (rendering, stop), text in zip(pieces, texts, strict=True):
            rendering._texts[stop, asks] = text
    return renderings


def _render(
    conversations: list[tuple[Message, ...]],
    tools: tuple[dict[str, Any], ...],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    add_generation_prompt: bool,
) -> list[str]:
    if not tokenizer.chat_template:
        raise UserError(
            "model.chat_template: this base has no chat template, but the data are conversations; "
            "set model.chat_template (Jinja text, or the path of a .jinja file)"
        )
    if not conversations:
        return []
    return tokenizer.apply_chat_template(
        [list(messages) for messages in conversations],
        tools=list(tools) or None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **data.template_arguments,
    )


class TemplateCheck:
    """Checks that the chat template writes every part of the rows: a template may skip what it does
    not know. Each kind of part is checked in the first row that has it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        self.tokenizer, self.data = tokenizer, data
        self._checked: set[str] = set()

    def __call__(self, rows: Iterable[Row]) -> None:
        """
        Raises:
            UserError: naming the row and what the template leaves out.
        """
        for row in rows:
            for part, index, key in _parts(row):
                if part not in self._checked:
                    self._checked.add(part)
                    self._check(row, part, index, key)

    def _check(self, row: Row, part: str, index: int, key: str) -> None:
        text = Rendering(row, self.tokenizer, self.data).text
        try:
            shorter = Rendering(_without(row, index, key), self.tokenizer, self.data).text
        except UserError:  # such as two turns of the user in a row, with nothing between them
            return
        if text == shorter:
            it = "them" if index == TOOLS or key in THOUGHTS else "it"
            raise UserError(
                f"{row.where}: the chat template leaves out {part}: the model would never see "
                f"{it}; set model.chat_template to one that writes {it}{_example(part)}, or "
                f"remove {it} from the rows"
            )


def check_template(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
    """Checks some rows: see `TemplateCheck`.

    Raises:
        UserError: naming the row and what the template leaves out.
    """
    TemplateCheck(tokenizer, data)(rows)


def _example(part: str) -> str:
    """Names a template that is shipped, for what has to do with tools."""
    return f" (model.chat_template={CHATML_TOOLS.name} does, for ChatML)" if "tool" in part else ""


TOOLS = -1
"""Stands for the function definitions where others have a message's index."""


def _parts(row: Row) -> Iterator[tuple[str, int, str]]:
    """Yields what a row has besides users' and assistants' words: its name, the index of its
    message, and its key there; without a key, it is the whole message.

    Thoughts are those of the last answer: many templates leave out earlier ones.
    """
    if row.tools:
        yield "the function definitions (tools)", TOOLS, ""
    for index, message in enumerate(row.messages):
        if calls := message.get("tool_calls"):
            yield f"call {len(calls)} of an answer (tool_calls)", index, "tool_calls"
        if message["role"] in ("system", "tool"):
            late = " after other turns" if message["role"] == "system" and index else ""
            yield f"a {message['role']} message{late}", index, ""
    for key in THOUGHTS:
        if row.messages and row.messages[-1].get(key):
            yield f"the thoughts of an answer ({key})", len(row.messages) - 1, key


def _without(row: Row, index: int, key: str) -> Row:
    """Returns the row without one of its parts, of several calls without the last."""
    if index == TOOLS:
        return replace(row, tools=())
    message = row.messages[index]
    fewer = {name: value for name, value in message.items() if name != key}
    if key == "tool_calls" and len(message[key]) > 1:
        fewer[key] = message[key][:-1]
    left = (fewer,) if key else ()
    return replace(row, messages=(*row.messages[:index], *left, *row.messages[index + 1 :]))


def _end_of_prompt(text: str, prompt: str) -> int | None:
    """Finds where the prompt ends in a text that begins with it; None for any other text.

    White space may differ inside it: Hermes' template writes a line break after the result of a
    call only once other turns follow.
    """
    if text.startswith(prompt):
        return len(prompt)
    written = list("".join(prompt.split()))
    letters = [at for at, letter in enumerate(text) if not letter.isspace()][: len(written)]
    if [text[at] for at in letters] != written:
        return None
    after, tail = letters[-1] + 1, prompt[len(prompt.rstrip()) :]
    return after + len(tail) if text.startswith(tail, after) else None


def _opened(content: str, prompt: str) -> str:
    """Returns the tag at the beginning of an answer, such as <think>, if the prompt ends with it;
    else an empty string."""
    tag = f"{content.lstrip().partition('>')[0]}>"
    return tag if tag.startswith("<") and prompt.rstrip().endswith(tag) else ""


WORDS = re.compile(r"\s+|(?=<)|(?<=>)")
"""Splits where templates may change the white space: between words, and around tags."""


def _end_of_content(row: Row, index: int, text: str, start: int) -> int:
    """Finds where an answer's last word ends; templates may change the white space between words.

    Raises:
        UserError: for an answer that is not in the text.
    """
    content = row.messages[index]["content"]
    if content and text.startswith(content, start):
        return start + len(content.rstrip())
    left = content.lstrip().removeprefix(_opened(content, text[:start]))
    for word in filter(None, WORDS.split(left)):
        at = text.find(word, start)
        if at < 0:
            raise UserError(
                f"{row.where}: the chat template leaves {word[:40]!r} out of the answer, as "
                "those of reasoning models do with thoughts: set model.chat_template to one that "
                "keeps it, or remove it from the row"
            )
        start = at + len(word)
    return start


def _no_end(written: str) -> str:
    what = f"{written!r}, which contains no" if written.strip() else "no"
    return (
        f"model.chat_template: answers end in no token: after an answer it writes {what} added "
        "token of the tokenizer, so the model would not learn to stop: set model.chat_template to "
        "one that writes {{ eos_token }} there, or set data.missing_end=allow"
    )
