"""Conversations in the forms of data sets: read whole, or refused by a line that says why."""

from __future__ import annotations

import json

import pytest
import zoo

from kfade.data.chat import ChatTemplate
from kfade.data.examples import Example, load_examples, parse_example
from kfade.data.sequences import encode, encode_prompt
from kfade.errors import InputError
from kfade.evaluate.completions import read_prompts

SYSTEM, USER, ANSWER = ("system", "s"), ("user", "a"), ("assistant", "b")


def turns(row):
    return parse_example(row, "line 1").turns


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def sharegpt(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.mark.parametrize("key", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(
    "messages",
    [
        [said("user", "a"), said("assistant", "b")],
        [said("human", "a"), said("gpt", "b")],
        [said("User", "a"), said("Assistant", "b")],
        sharegpt(("human", "a"), ("gpt", "b")),
        sharegpt(("user", "a"), ("bard", "b")),
        sharegpt(("Human", "a"), ("chatgpt", "b")),
        sharegpt(("human", "a"), ("bing", "b")),
        sharegpt(("user", "a"), ("assistant", "b")),
        [{"human": "a", "assistant": "b"}],
        [{"user": "a", "assistant": "b"}],
        [{"input": "a", "output": "b"}],
        # data sets fill the keys that a message lacks with nothing
        [said("user", "a", value=None, tool_calls=None), said("assistant", "b", tool_calls=[])],
    ],
)
def test_one_exchange_in_every_form(key, messages):
    assert parse_example({key: messages}, "line 1") == Example(
        "line 1", turns=(USER, ANSWER), plain_prefix=("", "\n")
    )
    assert turns({key: messages, "system": "s"}) == (SYSTEM, USER, ANSWER)
    assert turns({key: messages, "system_prompt": "s"}) == (SYSTEM, USER, ANSWER)
    assert turns({key: messages, "system": "", "system_prompt": None}) == (USER, ANSWER)


def test_several_pairs_and_a_system_prompt_in_one():
    pairs = [{"system": "s", "input": "a", "output": "b"}, {"input": "c", "output": "d"}]
    expected = (SYSTEM, USER, ANSWER, ("user", "c"), ("assistant", "d"))
    assert turns({"conversation": pairs}) == expected


def test_tools_speak_by_the_name_that_templates_know():
    tool = ("tool", "{}")
    for speaker in ("tool", "observation", "function_response"):
        spoken = sharegpt(("human", "a"), (speaker, "{}"), ("gpt", "b"))
        assert turns({"conversations": spoken}) == (USER, tool, ANSWER)
    # where roles are given as templates take them, they stay
    own = [said("user", "a"), said("observation", "{}"), said("assistant", "b")]
    assert turns({"messages": own}) == (USER, ("observation", "{}"), ANSWER)


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "b "}, {"type": "text", "text": "c", "image": None}]
    assert turns({"messages": [said("user", "a"), said("assistant", parts)]})[1][1] == "b c"
    assert turns({"conversations": sharegpt(("human", "a"), ("gpt", parts))})[1][1] == "b c"


CALL = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
NOT_READ = "which kfade does not read; write it into the text, or remove the key or the row"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [said("user", "a"), said("assistant", "", tool_calls=CALL)]},
            f'line 3, message 2: has content in "tool_calls", {NOT_READ}',
        ),
        (
            {"messages": [said("user", "a"), said("assistant", None, tool_calls=CALL)]},
            f'line 3, message 2: has content in "tool_calls", {NOT_READ}',
        ),
        (
            {"messages": [said("user", "a"), said("assistant", "b", reasoning_content="r")]},
            f'line 3, message 2: has content in "reasoning_content", {NOT_READ}',
        ),
        (
            {"messages": [said("user", [{"type": "image", "url": "u"}]), said("assistant", "b")]},
            "line 3, message 1: its content has a part of the type image, and kfade reads .* only",
        ),
        (
            {"messages": [said("user", ["a"]), said("assistant", "b")]},
            "line 3, message 1: its content has a part of the type str",
        ),
        (
            {"messages": [said("user", [{"type": "text", "text": None}])]},
            "line 3, message 1: its content has a part of the type text",
        ),
        (
            {"messages": [said("user", "a"), said("assistant", None)]},
            "line 3, message 2: each message needs .* this one has role is str, content is None",
        ),
        (
            {"conversations": sharegpt(("human", "a"), ("function_call", "{}"), ("gpt", "b"))},
            r'line 3, message 2: from "function_call", whom kfade does not know \(it knows system,',
        ),
        (
            {"conversation": [{"human": "a"}]},
            "line 3, message 1: each message needs .* this one has human is str",
        ),
        (
            {"system": "s", "conversations": sharegpt(("system", "t"), ("human", "a"))},
            "line 3: two system prompts, one beside the messages; keep one",
        ),
        (
            {"system": "s", "system_prompt": "t", "messages": [said("assistant", "b")]},
            "line 3: two system prompts, one beside the messages; keep one",
        ),
        (
            {"system": ["s"], "conversations": sharegpt(("human", "a"), ("gpt", "b"))},
            'line 3: "system" is list; make it a string',
        ),
        ({"conversations": "a"}, r"line 3: has the keys conversations; .*\(conversations is str\)"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, row, message):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "a"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        load_examples(str(file))
    if "messages" in row:
        file.write_text("\n\n" + json.dumps(row) + "\n")
        with pytest.raises(InputError, match=message):
            read_prompts(str(file))


def test_keys_that_are_not_read_are_told_once(tmp_path, caplog):
    file = tmp_path / "data.jsonl"
    messages = [said("user", "a", name="Mia", toxic=False), said("assistant", "b", weight=0)]
    row = {"messages": messages, "tools": CALL, "id": 3}
    other = {"text": "a", "tools": CALL}
    file.write_text("".join(json.dumps(each) + "\n" for each in (row, row, other)))
    assert load_examples(str(file))[0].turns == (USER, ANSWER)
    told = f"{file}: not read of its conversations: name, tools, toxic, weight"
    assert caplog.messages == [told]
    file.write_text(json.dumps(row) + "\n")
    read_prompts(str(file))
    assert caplog.messages == [told] * 2


KNOWN = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}> " \
    "{{ m.content }} {% endif %}{% endfor %}"  # fmt: skip


@pytest.mark.parametrize("role", ["tool", "system", "narrator"])
def test_a_template_that_leaves_out_a_message_is_refused(role):
    turns = (("user", "a b"), (role, "b"), ("assistant", "c"))
    example = Example("line 3", turns=turns, plain_prefix=("", "\n"))
    template = ChatTemplate(KNOWN)
    told = rf"line 3: the chat template leaves out turn 2, of the role {role} \('b'\): use --templa"
    with pytest.raises(InputError, match=told):
        encode([example], zoo.tokenizer(), chat=True, template=template)
    with pytest.raises(InputError, match=told):
        encode_prompt(example, zoo.tokenizer(), chat=True, template=template)
    shown = ChatTemplate(KNOWN.replace("'assistant']", f"'assistant', '{role}']"))
    [made] = encode([example], zoo.tokenizer(), chat=True, template=shown)
    scored = [t for t, own in zip(made.tokens, made.scored, strict=True) if own]
    assert [zoo.WORDS[t] for t in scored] == ["c", "</s>"]
    [plain] = encode([example], zoo.tokenizer(), chat=False)
    assert [zoo.WORDS[t] for t in plain.tokens] == ["a", "b", "b", "c", "</s>"]
