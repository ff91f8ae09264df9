"""Converts turns of every known form into messages for chat templates; checks and repairs them.

A message has `role` (system, user, assistant or tool) and `content` (text), and may have
`tool_calls`, `tool_call_id`, `name` and reasoning. Known forms are OpenAI's `role` and `content`,
ShareGPT's `from` and `value` with `function_call` and `observation`, and content in parts, which
Gemini calls `parts`.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from itertools import pairwise
from typing import Any

from finequant.finetune.data.files import BadRowError, parse_json
from finequant.recipes.errors import shown

Message = dict[str, Any]

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"developer": "system", "human": "user", "function_call": "assistant"},
    **dict.fromkeys(("gpt", "chatgpt", "model", "ai", "bot", "chatbot"), "assistant"),
    **{"observation": "tool", "function": "tool", "ipython": "tool"},
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of what a model writes before its answer."""
KEPT = ("tool_call_id", "name", *THOUGHTS)
"""Keys that are passed to the template as they are."""
FLAGS = ("weight", "train", "training", "loss")
"""Keys that say whether an answer is a target: OpenAI's and mistral-finetune's weight, axolotl's
train, ms-swift's and XTuner's loss."""
READ = {"role", "from", "content", "value", "parts", "tool_calls", "function_call", *KEPT, *FLAGS}
UNREADABLE = re.compile(r"[\0\ud800-\udfff]")


def read_messages(turns: Any, where: str) -> tuple[list[Message], set[str]]:
    """Returns the messages, and the keys of turns that are not read.

    Answers that are not targets (`weight: 0`, `train: false`, `loss: false`) get `learned: False`.

    Raises:
        BadRowError: for what is not a list of turns, or a turn that cannot be read.
    """
    turns = _in_rows(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRowError(f"{where}: expected a list of role and content, found {shown(turns)}")
    # Tables give every turn the keys of all turns.
    turns = [{key: turn[key] for key in turn if turn[key] is not None} for turn in turns]
    unread = {key for turn in turns for key in turn if key not in READ}
    return [_message(turn, where) for turn in turns], unread


def _in_rows(turns: Any) -> Any:
    """Returns {"role": [...], "content": [...]} as a list of turns: a `Sequence` of messages in
    `datasets` becomes one of such lists."""
    lists = turns.values() if isinstance(turns, dict) else ()
    if not lists or not all(isinstance(values, list) for values in lists):
        return turns
    if len({len(values) for values in lists}) > 1:
        return turns
    return [dict(zip(turns, turn, strict=True)) for turn in zip(*lists, strict=True)]


def turns_in(value: Any) -> list[dict[str, Any]] | None:
    """Returns the turns of a conversation, which may be JSON text; None for any other value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    value = _in_rows(value)
    is_turns = isinstance(value, list) and value and all(map(_is_turn, value))
    return value if is_turns else None


def transcript(turns: list[dict[str, Any]], where: str) -> str:
    """Returns a conversation as text, one turn on each line: "user: Who?".

    Raises:
        BadRowError: for a turn that cannot be read.
    """
    messages, _ = read_messages(turns, where)
    return "\n".join(
        f"{turn['role']}: {turn['content'] or json.dumps(turn.get('tool_calls', ''))}"
        for turn in messages
    )


def calls_of(value: Any) -> list[dict[str, Any]]:
    """Returns the calls in a list, or its JSON text, of nothing else, such as [{"name": ...,
    "arguments": ...}]; none for any other value."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    calls = value if isinstance(value, list) else [value]
    is_calls = all(
        isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls
    )
    return calls if is_calls else []


def _is_turn(turn: Any) -> bool:
    """Says whether this has a known role, and something said or called."""
    return (
        isinstance(turn, dict)
        and str(turn.get("role", turn.get("from"))).lower() in ROLES
        and bool({"content", "value", "parts", "tool_calls", "function_call"} & turn.keys())
    )


def _message(turn: dict[str, Any], where: str) -> Message:
    speaker = turn.get("role", turn.get("from"))
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise BadRowError(f"{where}: role {speaker!r}: expected system, user, assistant or tool")
    # "function_call" is OpenAI's form before "tool_calls".
    content, calls = turn.get("content", turn.get("value")), turn.get("tool_calls")
    calls = turn.get("function_call") if calls is None else calls
    if content is None and isinstance(turn.get("parts"), list):
        content = list(map(_typed, turn["parts"]))
    elif role != "tool" and isinstance(content, list):  # Bedrock's parts have no type
        content = [_typed(part) if _is_untyped(part) else part for part in content]
    if speaker == "function_call":
        content, calls = None, parse_json(str(content), f"{where}: function_call", "a call")
    calls = _objects(calls, f"{where}: calls", "a list of calls")
    if content is None and calls:
        content = ""
    message: Message = {"role": role, "content": _text(content, role, where, turn)}
    if calls:
        message["tool_calls"] = [_call(call, where) for call in calls]
    message |= {key: turn[key] for key in KEPT if key in turn}
    if not _is_learned(turn, where) and role == "assistant":
        message["learned"] = False
    return message


def _text(content: Any, role: str, where: str, turn: dict[str, Any]) -> str:
    if isinstance(content, str):
        return content
    if _is_parts(content):
        others = [part["type"] for part in content if not isinstance(part.get("text"), str)]
        if others:
            raise BadRowError(
                f"{where}: {_a(role)} message with a part {others[0]!r}: only text is read"
            )
        return "\n".join(part["text"] for part in content)
    if role == "tool" and content is not None:
        return json.dumps(content, ensure_ascii=False)
    keys = f"; its keys are {', '.join(turn)}" if content is None else ""
    raise BadRowError(
        f"{where}: {_a(role)} message whose content is not text: {shown(content)}{keys}"
    )


def _is_untyped(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and "type" not in part


def _typed(part: Any) -> Any:
    """Returns a part in OpenAI's form; its type is the key of what it holds, such as inlineData."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    kind = next((key for key in part if key != "text"), "")
    return {"type": kind} if kind else {"type": "text", **part}


def system_text(value: Any, where: str) -> str:
    """Returns a system message that is a list of parts, as Anthropic's and Bedrock's, or an object
    with one, as Gemini's.

    Raises:
        BadRowError: for parts that are not text.
    """
    turn = value if isinstance(value, dict) else {"content": value}
    return _message({**turn, "role": "system"}, where)["content"]


def _a(role: str) -> str:
    return f"{'an' if role == 'assistant' else 'a'} {role}"


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
    )


def _objects(value: Any, where: str, expected: str) -> list[Any]:
    """Returns the entries of a list. Tables may hold it, or each entry, as JSON text, because their
    calls and functions differ; a single entry needs no list."""
    if isinstance(value, str):
        value = parse_json(value, where, expected) if value.strip() else []
    items = value if isinstance(value, list) else [value] if value else []
    return [parse_json(x, where, "an object") if isinstance(x, str) else x for x in items]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Parses a call's arguments into values, which templates write as JSON themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError(f"{where}: a call without a name: {shown(call)}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        what = f"{where}: arguments of the call {function['name']}"
        arguments = parse_json(arguments, what, "an object") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise BadRowError(
            f"{where}: arguments of the call {function['name']}: expected an object, found "
            f"{shown(arguments)}"
        )
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    called = {"name": function["name"], "arguments": arguments}
    return {**identity, "type": "function", "function": called}


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Returns function definitions, from a list or its JSON text, in the form that templates take.

    Raises:
        BadRowError: for an entry that is not a definition.
    """
    tools = _objects(value, f"{where}: tools", "a list of functions")
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f"{where}: tools: a function without a name: {shown(tool)}")
    return tuple(
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    )


def _is_learned(turn: dict[str, Any], where: str) -> bool:
    for key in FLAGS:
        if (value := turn.get(key)) is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            expected = "0 or 1" if key == "weight" else "true or false"
            raise BadRowError(f"{where}: {key} of a message is {shown(value)}, expected {expected}")
        if not value:
            return False
    return True


def check_messages(messages: list[Message], where: str) -> None:
    """Checks that a row can be trained on; the chat template decides what else it may contain.

    Raises:
        BadRowError: if there is no answer at the end or no target, if user or system turns repeat,
            if a turn is empty, or if a character cannot be tokenized.
    """
    roles = [message["role"] for message in messages]
    problem = f"{where}: the turns are {', '.join(roles)}" if roles else f"{where}: no turns"
    if "assistant" not in roles[1:]:
        raise BadRowError(f"{problem}; expected an answer (assistant) after another turn")
    if roles[-1] != "assistant":
        raise BadRowError(
            f"{problem}; expected the last to be assistant (data.bad_rows=repair cuts what follows "
            "the last answer)"
        )
    if repeated := [role for role, after in pairwise(roles) if role == after in MERGED]:
        raise BadRowError(
            f"{problem}; expected no two {repeated[0]} turns in a row (data.bad_rows=repair merges "
            "them)"
        )
    if empty := [message["role"] for message in messages if _is_empty(message)]:
        raise BadRowError(
            f"{where}: empty {empty[0]} message: remove the row or fill it in "
            "(data.bad_rows=repair drops the turn)"
        )
    if all(
        message["role"] != "assistant" or not message.get("learned", True)
        for message in messages[1:]
    ):
        raise BadRowError(f"{where}: no answer to learn: all have weight 0, or train or loss false")
    for message in messages:
        texts = [message["content"]] if len(message) == 2 else strings_of(message)
        for text in texts:
            check_characters(text, where)


MERGED = ("user", "system")


def repair_messages(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """Repairs a conversation, and says what was done.

    It drops empty turns, merges turns that a user or system repeats (with an empty line between
    them), and cuts turns after the last answer.
    """
    done = []
    kept = [message for message in messages if not _is_empty(message)]
    if len(kept) < len(messages):
        done.append("empty turn dropped")
    merged: list[Message] = []
    for message in kept:
        if merged and message["role"] == merged[-1]["role"] in MERGED:
            content = f"{merged[-1]['content']}\n\n{message['content']}"
            merged[-1] = {**merged[-1], "content": content}
            done.append(f"{message['role']} turns merged")
        else:
            merged.append(message)
    while merged and merged[-1]["role"] != "assistant":
        done.append(f"{merged.pop()['role']} turn at the end cut")
    return merged, list(dict.fromkeys(done))


def _is_empty(message: Message) -> bool:
    """Says whether a message is empty; calls need no words, and a call may have no result."""
    return (
        message["role"] != "tool"
        and not message.get("tool_calls")
        and not message["content"].strip()
    )


def strings_of(value: Any) -> list[str]:
    """Lists all texts inside a message or a function definition."""
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings_of(part)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in strings_of(item)]
    return [value] if isinstance(value, str) else []


def check_characters(text: str, where: str) -> None:
    """Refuses characters that JSON can write but no tokenizer reads: signs of a damaged file.

    Raises:
        BadRowError: naming the first of them.
    """
    if wrong := UNREADABLE.search(text):
        raise BadRowError(
            f"{where}: character {wrong.start() + 1} is U+{ord(wrong[0]):04X}, which is not text "
            "(half a surrogate pair, or NUL): write the file as plain UTF-8, or remove the row"
        )
