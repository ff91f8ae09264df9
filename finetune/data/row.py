"""A row of data, checked: a conversation, or a text."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from finequant.finetune.data.files import BadRowError
from finequant.finetune.data.messages import Message
from finequant.recipes.errors import shown


def _listed(value: Any) -> list[Any]:
    """Writes a set as a list."""
    if not isinstance(value, frozenset):
        raise TypeError(f"{type(value).__name__} {shown(value)} cannot be written as JSON")
    return sorted(value)


@dataclass(frozen=True)
class Row:
    """One training or evaluation row: a conversation, or raw text."""

    where: str
    """The location that errors name: file and line, or dataset and index."""
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    """Function definitions that the chat template gets."""
    excluded: frozenset[int] = frozenset()
    """Answers that the model sees but that are not targets, by their index in messages."""

    @property
    def targets(self) -> list[int]:
        """Returns the indices of target messages, without an assistant's opening greeting."""
        return [
            index
            for index, message in enumerate(self.messages)
            if index and message["role"] == "assistant" and index not in self.excluded
        ]

    @property
    def prompt_key(self) -> str:
        """Returns a key of the prompt, which ignores white space."""
        return self._key(self.messages[:-1])

    @property
    def key(self) -> str:
        """Returns a key of prompt and answer, which ignores white space."""
        return self._key(self.messages)

    def _key(self, messages: tuple[Message, ...]) -> str:
        parts = [part for turn in messages for part in (turn["content"], turn.get("tool_calls"))]
        texts = [
            part if isinstance(part, str) else json.dumps(part)
            for part in (*parts, self.tools, self.text)
            if part
        ]
        return "\0".join(" ".join(text.split()) for text in texts)  # no text contains NUL

    def to_json(self) -> bytes:
        """Returns the row as JSON, from which `from_json` makes an equal one.

        Raises:
            BadRowError: for what JSON cannot write, such as a date in the arguments of a call.
        """
        kept = {
            name: value
            for name, usual in DEFAULTS.items()
            if (value := getattr(self, name)) != usual
        }
        try:
            text = ENCODE(kept)
        except TypeError as error:
            raise BadRowError(f"{self.where}: {error}: write it as text") from None
        return text.encode("utf-8", "surrogatepass")

    @classmethod
    def from_json(cls, content: bytes) -> Row:
        values = json.loads(content.decode("utf-8", "surrogatepass"))
        for name in ("messages", "tools"):
            values[name] = tuple(values.get(name, ()))
        values["excluded"] = frozenset(values.get("excluded", ()))
        return cls(**values)


ENCODE = json.JSONEncoder(ensure_ascii=False, default=_listed).encode
DEFAULTS = {item.name: item.default for item in fields(Row)}
