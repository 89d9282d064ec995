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
    messages = [said("user", "a", name="Mia", toxic=False), said("assistant", "b", rank=0)]
    row = {"messages": messages, "tools": CALL, "id": 3}
    other = {"text": "a", "tools": CALL}
    file.write_text("".join(json.dumps(each) + "\n" for each in (row, row, other)))
    assert load_examples(str(file))[0].turns == (USER, ANSWER)
    told = f"{file}: not read of its rows: name, rank, tools, toxic"
    assert caplog.messages == [told]
    file.write_text(json.dumps(row) + "\n")
    read_prompts(str(file))
    assert caplog.messages == [told] * 2


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("chat", [False, True])
def test_turns_that_the_data_leave_out_of_the_loss_are_context(caplog, mark, chat):
    left_out = {"weight": 1, **mark}
    rows = [
        {"messages": [said("user", "a", **mark), said("assistant", "b", **left_out),
                      said("user", "c"), said("assistant", "d", train=True)]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **mark},
                           {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
        {"conversation": [{"human": "a", "assistant": "b", **mark}, {"input": "c", "output": "d"}]},
    ]  # fmt: skip
    for row in rows:
        example = parse_example(row, "line 1")
        assert example.turns == (USER, ANSWER, ("user", "c"), ("assistant", "d"))
        assert (example.unscored, example.unread) == ((1,), ())
        [made] = encode([example], zoo.tokenizer(chat=chat), template=ChatTemplate(enabled=chat))
        words = [zoo.WORDS[t] for t in made.tokens]
        scored = [w for w, own in zip(words, made.scored, strict=True) if own]
        assert scored == ["d", "</s>"]
        assert words.index("a") < words.index("b") < words.index("c")
    # the system prompt beside the list is a turn, too
    assert parse_example({**rows[0], "system": "s"}, "line 1").unscored == (2,)


def test_a_last_turn_out_of_the_loss_gets_no_scored_end():
    messages = [said("user", "a"), said("assistant", "b"), said("user", "c"),
                said("assistant", "d", weight=0)]  # fmt: skip
    example = parse_example({"messages": messages}, "line 1")
    for chat in (False, True):
        [made] = encode([example], zoo.tokenizer(chat=chat), template=ChatTemplate(enabled=chat))
        words = [zoo.WORDS[t] for t in made.tokens]
        assert [w for w, own in zip(words, made.scored, strict=True) if own] == ["b", "</s>"]
        assert "d" in words


def test_conversations_with_no_turn_in_the_loss_and_weights_between():
    messages = [said("user", "a"), said("assistant", "b", weight=0)]
    with pytest.raises(InputError, match="line 1: every turn of the assistant is left out"):
        turns({"messages": messages})
    messages = [said("user", "a", weight=0.5), said("assistant", "b", weight=0.5)]
    with pytest.raises(InputError, match=r'message 2: "weight" is 0\.5, .*; give 0 or 1'):
        turns({"messages": messages})


def test_nobody_to_score_names_who_speaks():
    messages = [said("user", "a"), said("narrator", "b"), said("user", "c")]
    with pytest.raises(InputError, match=r"no message of the role assistant.*roles are user, narr"):
        turns({"messages": messages})


@pytest.mark.parametrize("form", ["data", "prompts"])
def test_what_stands_beside_an_instruction(tmp_path, caplog, form):
    def read(**more):
        file = tmp_path / "data.jsonl"
        file.write_text(json.dumps({"instruction": "c", "output": "d"} | more) + "\n")
        if form == "prompts":
            return read_prompts(str(file))[0].turns
        *said, answer = load_examples(str(file))[0].turns
        assert answer == ("assistant", "d")
        return tuple(said)

    for empty in (None, "", []):
        assert read(input=empty, system=empty, history=empty) == (("user", "c"),)
    history = [["a", "b"]]
    given = read(input="x", system="s", history=history)
    assert given == (SYSTEM, USER, ANSWER, ("user", "c\n\nx"))
    for value, kind in ((21, "int"), (0, "int"), (["3", "4"], "list")):
        with pytest.raises(InputError, match=f'line 1: "input" is {kind}; make it a string'):
            read(input=value)
    with pytest.raises(InputError, match='line 1: "system" is list; make it a string'):
        read(system=["s"])
    assert caplog.messages == []
    for unlike in ("text", [["a", None]], [{"user": "a"}]):
        assert read(history=unlike, context="k") == (("user", "c"),)
    [told] = set(caplog.messages)
    assert told.endswith("not read of its rows: context, history")


def test_the_plain_form_of_a_system_prompt_and_a_history():
    row = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    example, plain = parse_example(row, "line 1"), ChatTemplate(enabled=False)
    [made] = encode([example], zoo.tokenizer(), template=plain)
    expected = "s <unk> a <unk> b </s> <unk> c <unk> d </s>"  # Instruction: and Response:
    assert zoo.tokenizer().convert_ids_to_tokens(made.tokens) == expected.split()
    assert sum(made.scored) == 4  # both answers and their ends


@pytest.mark.parametrize("answer", [{"answer": "b"}, {"completion": "b"}])
def test_context_beside_one_exchange_is_told(tmp_path, caplog, answer):
    file = tmp_path / "data.jsonl"
    asked = "question" if "answer" in answer else "prompt"
    file.write_text(json.dumps({asked: "a", **answer, "context": "k", "history": []}) + "\n")
    assert load_examples(str(file))[0].turns == (USER, ANSWER)
    assert caplog.messages == [f"{file}: not read of its rows: context"]
    assert read_prompts(str(file))[0].turns == (USER,)
    assert len(caplog.messages) == 2


KNOWN = "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}> " \
    "{{ m.content }} {% endif %}{% endfor %}"  # fmt: skip


@pytest.mark.parametrize("role", ["tool", "system", "narrator"])
def test_a_template_that_leaves_out_a_message_is_refused(role):
    turns = (("user", "a b"), (role, "b"), ("assistant", "c"))
    example = Example("line 3", turns=turns, plain_prefix=("", "\n"))
    template = ChatTemplate(KNOWN, enabled=True)
    told = rf"line 3: the chat template leaves out turn 2, of the role {role} \('b'\): use --templa"
    with pytest.raises(InputError, match=told):
        encode([example], zoo.tokenizer(), template=template)
    with pytest.raises(InputError, match=told):
        encode_prompt(example, zoo.tokenizer(), template=template)
    shown = ChatTemplate(KNOWN.replace("'assistant']", f"'assistant', '{role}']"), enabled=True)
    [made] = encode([example], zoo.tokenizer(), template=shown)
    scored = [t for t, own in zip(made.tokens, made.scored, strict=True) if own]
    assert [zoo.WORDS[t] for t in scored] == ["c", "</s>"]
    [plain] = encode([example], zoo.tokenizer(), template=ChatTemplate(enabled=False))
    assert [zoo.WORDS[t] for t in plain.tokens] == ["a", "b", "b", "c", "</s>"]
