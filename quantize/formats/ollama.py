"""A Modelfile for Ollama: the chat template in Go's template language, system message, stops, and
how tokens are picked.

The Go template is derived from what the Jinja template renders, message by message. If a
conversation comes out differently, no template is written, and the Modelfile says so.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, ASKED, ANSWERED, ASKED_NEXT = (
    "\u27eaS\u27eb",
    "\u27eaU\u27eb",
    "\u27eaA\u27eb",
    "\u27eaV\u27eb",
)
"""Contents that occur in no chat template, to find where each message begins and ends."""

CLOSING = re.compile(r'"""\s*[\r\n]')
"""Quotes within a text that Ollama takes for its end: those that end a line. There is no way to
escape them (`ParseFile` of https://github.com/ollama/ollama/blob/main/parser/parser.go)."""

Message = dict[str, str]


class Turns(NamedTuple):
    """The texts that a chat template puts around contents."""

    unasked: str
    """At the start of a conversation without a system message: a default one, or nothing."""
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    """The text before an answer."""

    def render(self, messages: list[Message]) -> str:
        """Renders a conversation as Ollama does with `go_template`."""
        begin = "" if messages[0]["role"] == "system" else self.unasked
        body = ""
        for message in messages:
            opening, closing = getattr(self, message["role"])
            body += opening + message["content"] + closing
        return begin + body + self.answer

    def without_bos(self, bos: str) -> Turns:
        """Returns the texts without the beginning-of-sequence token, for a file that adds it."""
        opening, closing = self.system
        return self._replace(
            unasked=self.unasked.removeprefix(bos), system=(opening.removeprefix(bos), closing)
        )

    def go_template(self) -> str:
        """Writes the template in Go's language, with Ollama's variables."""
        roles = [
            f'{{{{ {word} eq .Role "{role}" }}}}{opening}{{{{ .Content }}}}{closing}'
            for word, role, (opening, closing) in (
                ("if", "system", self.system),
                ("else if", "user", self.user),
                ("else if", "assistant", self.assistant),
            )
        ]
        begin = f"{{{{ if not .System }}}}{self.unasked}{{{{ end }}}}" if self.unasked else ""
        body = f"{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}"
        return begin + body + self.answer


def modelfile(
    file: str,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    ends: list[int],
    sampling: dict[str, float],
    adds_bos: bool,
) -> str:
    """Writes the Modelfile for a GGUF file in the same folder.

    system: the system message of the rows that the model was trained on.
    ends: token ids that end an answer.
    sampling: Ollama's parameters about picking tokens.
    adds_bos: whether llama.cpp puts the beginning-of-sequence token in front by itself.
    """
    lines = [f"FROM ./{file}"]
    turns = derived_turns(tokenizer)
    if turns and adds_bos:
        turns = turns.without_bos(tokenizer.bos_token or "")
    if turns:
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
    else:
        lines.append(
            "# No TEMPLATE: the model's chat template could not be translated for Ollama, which\n"
            "# then picks the most similar one that it knows: check what it sends to the model."
        )
    if system and CLOSING.search(system):
        lines.append(
            "# No SYSTEM: a line of the system message ends in three quotes, which Ollama would\n"
            "# take for the end of the message: send it with each conversation."
        )
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{token}"' for token in tokenizer.convert_ids_to_tokens(ends)]
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    return "\n".join(lines) + "\n"


def derived_turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Takes a chat template apart; None if a conversation is more than its messages in a row."""

    def rendered(contents: str, answer: bool = False) -> str:
        return tokenizer.apply_chat_template(
            conversation(contents), tokenize=False, add_generation_prompt=answer
        )

    try:
        whole, plain = rendered("SUAV"), rendered("UAV")
        closing = rendered("UA").partition(ANSWERED)[2]
        between = plain.partition(ANSWERED)[2].partition(ASKED_NEXT)[0]
        user = (between.removeprefix(closing), rendered("U").partition(ASKED)[2])
        opening = plain.partition(ASKED)[2].partition(ANSWERED)[0]
        before, _, after = whole.partition(SYSTEM)
        turns = Turns(
            unasked=plain.partition(ASKED)[0].removesuffix(user[0]),
            system=(before, after.partition(ASKED)[0].removesuffix(user[0])),
            user=user,
            assistant=(opening.removeprefix(user[1]), closing),
            answer=rendered("U", True).partition(ASKED)[2].removeprefix(user[1]),
        )
        asked = ("U", "SU", "UAV", "SUAV")
        same = all(turns.render(conversation(c)) == rendered(c, True) for c in asked)
    except Exception:  # a template may refuse a system message, or fail in any way of its own
        return None
    return turns if same and "{{" not in "".join(map(str, turns)) else None


def conversation(contents: str) -> list[Message]:
    """Makes messages: S system, U user, A assistant, V user again."""
    kinds = {
        "S": ("system", SYSTEM),
        "U": ("user", ASKED),
        "A": ("assistant", ANSWERED),
        "V": ("user", ASKED_NEXT),
    }
    return [dict(zip(("role", "content"), kinds[kind], strict=True)) for kind in contents]
