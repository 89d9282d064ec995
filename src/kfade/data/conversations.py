"""Conversations in the forms that data sets have: who said what, in order.

{"messages": [{"role", "content"}]}         as chat templates take them
{"conversations": [{"from", "value"}]}      ShareGPT's
{"conversation": [{"human", "assistant"}]}  both sides of an exchange in one object

Each key may hold any of the three kinds of list. A system prompt may stand beside the list, as
"system" or "system_prompt". What would change the conversation and cannot be read is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
# Keys of a message that hold some of what is said in it, or what a template would write there.
SAID_ELSEWHERE = (
    *("tool_calls", "function_call", "tool_plan", "reasoning_content", "reasoning", "thinking"),
    *("images", "image", "audio", "videos"),
)
TOOL_LISTS = ("tools", "functions")  # of a row: templates show them in the system prompt

Turns = tuple[tuple[str, str], ...]
"""(role, content) of each message."""


def read_conversation(row: Mapping[str, Any], where: str) -> tuple[Turns, tuple[str, ...]] | None:
    """(turns, names of keys with content that is not read) of a row; None if it has none.

    Raises:
        InputError: a message of no known form, from nobody known, or with content that is not text.
    """
    messages = next((row[key] for key in LISTS if isinstance(row.get(key), list)), None)
    if messages is None:
        return None
    turns: list[tuple[str, str]] = []
    unread = {key for key in TOOL_LISTS if _holds(row.get(key))}
    for number, message in enumerate(messages, start=1):
        said, used = _turns(message, f"{where}, message {number}")
        turns += said
        unread |= {key for key, value in message.items() if key not in used and _holds(value)}
    system = _system(row, where)
    if len(system) > 1 or (system and any(role == "system" for role, _ in turns)):
        raise InputError(f"{where}: two system prompts, one beside the messages; keep one")
    return (*system, *turns), tuple(sorted(unread))


def _system(row: Mapping[str, Any], where: str) -> Turns:
    """The system prompt that stands beside the messages."""
    given = {key: row[key] for key in SYSTEM_KEYS if _holds(row.get(key))}
    for key, value in given.items():
        if not isinstance(value, str):
            raise InputError(f'{where}: "{key}" is {type(value).__name__}; make it a string')
    return tuple(("system", text) for text in given.values() if text.strip())


def _turns(message: Any, where: str) -> tuple[list[tuple[str, str]], Sequence[str]]:
    """What one message says, and the keys that were read."""
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
    """A message's content; of a list of parts, all of text, one after the other."""
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
    """Whether a key has content; data sets fill the keys that a row lacks with nothing."""
    return value is not None and value not in ("", [], {})
