"""Conversations in the forms that data sets have: who said what, in order.

{"messages": [{"role", "content"}]}         as chat templates take them
{"conversations": [{"from", "value"}]}      ShareGPT's
{"conversation": [{"human", "assistant"}]}  both sides of an exchange in one object

Each key may hold any of the three kinds of list. A system prompt may stand beside the list, as
"system" or "system_prompt". A message with content that kfade cannot read is an error.

{"instruction"[, "input", "system", "history"]}  Alpaca's: the turns before its output
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfade.errors import InputError

LISTS = ("messages", "conversations", "conversation")
SYSTEM_KEYS = ("system", "system_prompt")
USERS = ("user", "human")
ASSISTANTS = ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai")
TOOLS = ("tool", "observation", "function_response", "tool_response")
ROLES = {
    "system": "system",
    **dict.fromkeys(USERS, "user"),
    **dict.fromkeys(ASSISTANTS, "assistant"),
    **dict.fromkeys(TOOLS, "tool"),
}
PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
# Keys of a message with content that kfade does not read and that belongs to the conversation.
SAID_ELSEWHERE = (
    *("tool_calls", "function_call", "tool_plan", "reasoning_content", "reasoning", "thinking"),
    *("images", "image", "audio", "videos"),
)
TOOL_LISTS = ("tools", "functions")  # of a row: templates show them in the system prompt
# Keys by which data sets leave a message out of the loss, with the value 0 or false.
LOSS_KEYS = ("weight", "train", "loss")
# Keys of a row whose content would stand before its one exchange.
BESIDE = (*SYSTEM_KEYS, "history", "context", *TOOL_LISTS)

Turns = tuple[tuple[str, str], ...]
"""(role, content) of each message."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a row."""

    turns: Turns
    unscored: tuple[int, ...] = ()
    """Numbers, from 0, of the assistant's turns that the row leaves out of the loss."""
    unread: tuple[str, ...] = ()
    """Keys with content that is not read."""


def read_conversation(row: Mapping[str, Any], where: str) -> Conversation | None:
    """The conversation of a row with a list of messages; None if it has none.

    Raises:
        InputError: a message of an unknown form or sender, with content that is not text, or with a
            weight that is neither 0 nor 1.
    """
    messages = next((row[key] for key in LISTS if isinstance(row.get(key), list)), None)
    if messages is None:
        return None
    system = _system(row, where)
    turns, unscored = list(system), []
    unread = set(unread_of(row, TOOL_LISTS))
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        said, used = _turns(message, place)
        turns += said
        if said[-1][0] == "assistant":  # with which an exchange in one object ends, too
            used = (*used, *LOSS_KEYS)
            if _left_out(message, place):
                unscored.append(len(turns) - 1)
        else:  # other messages are not scored, so that 0 and false say nothing new
            used = (*used, *(key for key in LOSS_KEYS if message.get(key) == 0))
        unread.update(unread_of(message, (key for key in message if key not in used)))
    if len(system) > 1 or (system and any(role == "system" for role, _ in turns[1:])):
        raise InputError(f"{where}: two system prompts, one beside the messages; keep one")
    return Conversation(tuple(turns), tuple(unscored), tuple(sorted(unread)))


def read_instruction(row: Mapping[str, Any], where: str) -> Conversation:
    """The turns before the output of a row of Alpaca's form; the last is the instruction.

    The input, if there is one, follows the instruction after a blank line. A history that is not a
    list of pairs of strings is not read.

    Raises:
        InputError: an input or a system prompt that is not a string, or two system prompts.
    """
    said = row["instruction"]
    if _holds(given := row.get("input")):
        if not isinstance(given, str):
            raise _no_string("input", given, where)
        said = f"{said}\n\n{given}"
    system = _system(row, where)
    if len(system) > 1:
        raise InputError(f"{where}: two system prompts; keep one")
    earlier = _history(row.get("history"))
    read = SYSTEM_KEYS if earlier is None else (*SYSTEM_KEYS, "history")
    unread = unread_of(row, (key for key in BESIDE if key not in read))
    return Conversation((*system, *(earlier or ()), ("user", said)), unread=unread)


def unread_of(row: Mapping[str, Any], keys: Iterable[str] = BESIDE) -> tuple[str, ...]:
    """Those of ``keys`` that have content in ``row``."""
    return tuple(key for key in keys if _holds(row.get(key)))


def _history(value: Any) -> Turns | None:
    """The turns of a list of [user, assistant] pairs; None if it is not such a list."""
    if not isinstance(value, list):
        return None
    turns: list[tuple[str, str]] = []
    for pair in value:
        match pair:
            case [str(asked), str(answered)]:
                turns += [("user", asked), ("assistant", answered)]
            case _:
                return None
    return tuple(turns)


def _left_out(message: Mapping[str, Any], where: str) -> bool:
    """Whether one of the keys for it leaves a message out of the loss."""
    given = {key: message[key] for key in LOSS_KEYS if _holds(message.get(key))}
    for key, value in given.items():
        if value not in (0, 1):  # True and False are 1 and 0
            raise InputError(
                f'{where}: "{key}" is {value!r}, but kfade cannot weight a turn; give 0 or 1 '
                "(or false or true)"
            )
    return any(value == 0 for value in given.values())


def _no_string(key: str, value: Any, where: str) -> InputError:
    return InputError(f'{where}: "{key}" is {type(value).__name__}; make it a string')


def _system(row: Mapping[str, Any], where: str) -> Turns:
    """The system prompt that stands beside the messages."""
    given = {key: row[key] for key in SYSTEM_KEYS if _holds(row.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise _no_string(key, value, where)
    return tuple(("system", text) for text in given.values() if text.strip())


def _turns(message: Any, where: str) -> tuple[list[tuple[str, str]], Sequence[str]]:
    """(turns of one message, keys that were read)."""
    if isinstance(message, Mapping):
        for key in SAID_ELSEWHERE:
            if _holds(message.get(key)):
                raise InputError(
                    f'{where}: has content in "{key}", which kfade does not read; write it into '
                    "the text, or remove the key or the row"
                )
    match message:
        case {"role": str(role), "content": str() | [*_] as content}:
            known = ROLES.get(role.lower(), role)
            # Templates know a tool by several names.
            role = role if known == "tool" else known
            return [(role, _text(content, where))], ("role", "content")
        case {"from": str(speaker), "value": str() | [*_] as content}:
            if speaker.lower() not in ROLES:
                raise InputError(
                    f'{where}: from "{speaker}", whom kfade does not know (it knows '
                    f"{', '.join(ROLES)}); rename it, or remove the row"
                )
            return [(ROLES[speaker.lower()], _text(content, where))], ("from", "value")
    for pair in PAIRS:
        match [message.get(key) for key in pair] if isinstance(message, Mapping) else []:
            case [str(asked), str(answered)]:
                exchange = [("user", asked), ("assistant", answered)]
                return [*_system(message, where), *exchange], (*pair, *SYSTEM_KEYS)
    kinds = "no object"
    if isinstance(message, Mapping):
        kinds = ", ".join(f"{key} is {type(value).__name__}" for key, value in message.items())
    raise InputError(
        f'{where}: each message needs "role" and "content" (or "from" and "value"), both strings; '
        f"this one has {kinds or 'neither'}"
    )


def _text(content: str | list[Any], where: str) -> str:
    """A message's content, or the texts of its parts, joined."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise InputError(
                    f'{where}: its content has a part of the type {kind}, and kfade reads {{"type":'
                    ' "text", "text": "..."} only; remove the part or the row'
                )
    return "".join(texts)


def _holds(value: Any) -> bool:
    """Whether a value is not empty; data sets fill the keys that a row lacks with empty values."""
    return value is not None and value not in ("", [], {})
