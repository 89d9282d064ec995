"""From JSONL lines to batches: forms, refusals, tokens, masks, packing, batching, drawing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import pytest
import torch
import zoo
from tqdm.std import tqdm

from kfade.data.batches import ENOUGH, PADDING, draw_without_replacement, make_batches
from kfade.data.chat import ChatTemplate
from kfade.data.examples import Example, load_examples, split_holdout
from kfade.data.sequences import TokenSequence, digest_sequences, encode, encode_prompt, open_tokens
from kfade.errors import InputError
from kfade.runtime import progress

EOS = zoo.WORDS.index("</s>")


def write(path, *rows):
    """A JSONL file of rows, given as objects or as raw lines; its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data.jsonl"


def words(tokens):
    return " ".join(zoo.WORDS[t] for t in tokens)


def scored_words(sequence):
    return words(t for t, scored in zip(sequence.tokens, sequence.scored, strict=True) if scored)


# --- reading ---------------------------------------------------------------------------------


def test_the_four_forms(file):
    source = write(
        file,
        {"text": "a b"},
        "",  # blank lines count in line numbers and nowhere else
        {"prompt": "a", "completion": "b", "note": "more keys do no harm"},
        {"question": "a", "answer": "b"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}]},
    )
    assert load_examples(source) == [
        Example(f"{file}, line 1", text="a b"),
        Example(f"{file}, line 3", turns=(("user", "a"), ("assistant", "b")), closes=False),
        Example(
            f"{file}, line 4",
            turns=(("user", "a"), ("assistant", "b")),
            plain_prefix=("Question: ", "\nAnswer: "),
        ),
        Example(
            f"{file}, line 5", turns=(("system", "s"), ("assistant", "b")), plain_prefix=("", "\n")
        ),
    ]


def test_rows_of_other_tools(file):
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    source = write(
        file,
        {"instruction": "a", "input": "", "output": "b", "text": "a and b"},
        {"instruction": "a", "input": "x", "output": "b"},
        {"instruction": "a", "output": "b", "id": 3},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                           {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": parts}]},
    )  # fmt: skip
    examples = load_examples(source)
    user = ("user", "a")
    assert [example.turns for example in examples] == [
        (user, ("assistant", "b")),
        (("user", "a\n\nx"), ("assistant", "b")),
        (user, ("assistant", "b")),
        (("system", "s"), user, ("assistant", "b")),
        (user, ("assistant", "bc")),
    ]
    prefixes = [example.plain_prefix for example in examples]
    assert prefixes == [("Instruction: ", "\nResponse: ")] * 3 + [("", "\n")] * 2


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Mia \ud83d said"},
        {"question": "a", "answer": "\udc00"},
        {"messages": [{"role": "user", "content": ["\ud83d"]}]},
        {"text": "a", "other": {"deep": ["\ud800x"]}},
    ],
)
def test_half_a_character_is_refused(file, row):
    source = write(file, {"text": "\U0001f642"}, row)
    with pytest.raises(InputError, match=r"data.jsonl, line 2: \\ud\w{3} without .* surrogate"):
        load_examples(source)


def test_lines_end_at_newlines_only(file):
    # JSON allows these raw within strings; str.splitlines would cut a line at each of them.
    text = "one\u2028two\u2029three\x85four"
    source = write(file, json.dumps({"text": text}, ensure_ascii=False), {"text": "a"})
    assert [e.text for e in load_examples(source)] == [text, "a"]


def test_windows_line_ends_and_byte_order_mark(file):
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [e.text for e in load_examples(str(file))] == ["a", "b"]


GOOD = {"text": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, '{"text": "a"'], r"line 2: not valid JSON \(Expecting ',' delimiter at column 13"),
        ([GOOD, GOOD, "[1, 2]"], "line 3: not a JSON object; write one of"),
        (['"text"'], "line 1: not a JSON object"),
        ([{"texts": "a", "id": 3}], r'line 1: has the keys texts, id; write one of \{"text"\}'),
        ([{}], "line 1: has the keys none"),
        ([{"text": 3}], r"line 1: has the keys text; write one of .* all strings \(text is int\)"),
        ([{"prompt": "a"}], "line 1: has the keys prompt"),
        ([{"question": "a", "answer": None}], "line 1: has the keys question, answer"),
        ([GOOD, {"text": " \n"}], "line 2: the text to score is blank"),
        ([{"prompt": "a", "completion": ""}], "line 1: the text to score is blank"),
        ([{"question": "a", "answer": "  "}], "line 1: the text to score is blank"),
        ([{"messages": []}], "line 1: no message of the role assistant, .*; the roles are none$"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            "line 1: no message of the role assistant, so nothing to score",
        ),
        (
            [{"messages": [{"role": "assistant"}]}],
            "line 1, message 1: each message needs .*, both strings; this one has role is str",
        ),
        ([{"messages": ["a"]}], 'line 1, message 1: each message needs "role" and "content"'),
        ([], r"data\.jsonl holds no examples: give at least one line of the form"),
    ],
)
def test_refusals_name_the_line(file, rows, message):
    with pytest.raises(InputError, match=message):
        load_examples(write(file, *rows))


def test_an_empty_file_holds_no_examples(file):
    file.write_text("")
    with pytest.raises(InputError, match="holds no examples"):
        load_examples(str(file))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(
        InputError, match=r"none\.jsonl: no such file; give a JSONL file, a folder, or hf:"
    ):
        load_examples(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match=r"could not be loaded \(.* any data files"):
        load_examples(str(tmp_path))


def test_not_utf8(file):
    file.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"not UTF-8 text \(invalid continuation byte at byte 13"):
        load_examples(str(file))


def test_split_holdout():
    examples = [Example(str(i), text="a") for i in range(10)]
    fit, held = split_holdout(examples, 3, seed=1)
    assert len(held) == 3
    assert sorted([*fit, *held], key=examples.index) == examples
    assert fit == sorted(fit, key=examples.index)
    assert split_holdout(examples, 3, seed=1) == (fit, held)
    assert split_holdout(examples, 3, seed=2) != (fit, held)


# --- hf: -------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """datasets without a network, its cache in a folder of the test's own, and no bars."""
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def folder(offline, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(
        folder / "train.jsonl", {"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}
    )
    write(folder / "test.jsonl", {"question": "e", "answer": "f"})
    return folder


def test_hf_from_a_local_folder(folder):
    train = load_examples(f"hf:{folder}")
    assert [e.turns[1] for e in train] == [("assistant", "b"), ("assistant", "d")]
    assert train[1].where == f"hf:{folder}, row 1"
    for source in (f"hf:{folder}:test", f"hf:{folder}:default:test"):
        assert [e.turns[0] for e in load_examples(source)] == [("user", "e")]


def test_loading_a_data_set_is_told_and_draws_no_bars(folder, capfd):
    told = []

    class Told:
        def start(self, name, total):
            told.append((name, total))
            return 7

        def received(self, task, done, total):
            """Bytes."""

        def stop(self, task):
            told.append(task)

    own = tqdm.__init__
    with progress.reporting(Told()):
        assert len(load_examples(f"hf:{folder}")) == 2
    assert told == [(f"loading hf:{folder}", None), 7]
    assert capfd.readouterr().err == ""  # datasets has bars for splits that it generates
    assert tqdm.__init__ is own


def test_blank_rows_of_a_data_set_are_skipped_and_counted(offline, tmp_path, caplog):
    texts = ["", "a", "  ", "b", "\n", "c"]
    (tmp_path / "blank").mkdir()
    write(tmp_path / "blank" / "train.jsonl", *({"text": text} for text in texts))
    for source in (f"hf:{tmp_path / 'blank'}", str(tmp_path / "blank")):
        caplog.clear()
        assert [example.text for example in load_examples(source)] == ["a", "b", "c"]
        assert caplog.messages == [f"{source}: 3 rows with nothing to score skipped, 3 rows kept"]
    with pytest.raises(InputError, match="holds no examples"):
        load_examples(f"hf:{tmp_path / 'blank'}:train[2:3]")
    with pytest.raises(InputError, match="line 1: the text to score is blank; remove the line"):
        load_examples(str(tmp_path / "blank" / "train.jsonl"))


@pytest.mark.parametrize(
    ("slice_", "expected"),
    [
        ("[:3]", "abc"),
        ("[1:3]", "bc"),
        ("[-2:]", "de"),
        ("[:-2]", "abc"),
        ("[-4:-1]", "bcd"),
        ("[0:40%]", "ab"),
        ("[-40%:]", "de"),
        ("[1:-1]", "bcd"),
        ("[40%:80%]", "cd"),
        ("+train[:1]", "abcdea"),
    ],
)
def test_slices_of_a_split(offline, tmp_path, slice_, expected):
    (tmp_path / "five").mkdir()
    write(tmp_path / "five" / "train.jsonl", *({"text": text} for text in "abcde"))
    for name in ("train", "default:train"):
        examples = load_examples(f"hf:{tmp_path / 'five'}:{name}{slice_}")
        assert "".join(example.text or "" for example in examples) == expected


@pytest.mark.parametrize(
    ("slice_", "said"),
    [
        ("[10%:3]", "has one end in rows and one in percent; give both in one unit"),
        ("[1:40%]", "has one end in rows and one in percent"),
        ("[80%:40%]", "holds no rows; give a later end"),
        ("[3:1]", "holds no rows; give a later end"),
        ("[-1:-3]", "holds no rows"),
        ("[:1]+train[3:1]", r"train\[:1\]\+train\[3:1\]: \[3:1\] holds no rows"),
    ],
)
def test_slices_that_would_be_read_as_others_are_refused(offline, tmp_path, slice_, said):
    (tmp_path / "five").mkdir()
    write(tmp_path / "five" / "train.jsonl", *({"text": text} for text in "abcde"))
    with pytest.raises(InputError, match=said):
        load_examples(f"hf:{tmp_path / 'five'}:train{slice_}")


def test_what_datasets_saved_to_disk(offline, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": text} for text in "abc"])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "several")
    assert [e.text for e in load_examples(str(tmp_path / "one"))] == ["a", "b", "c"]
    assert [e.text for e in load_examples(f"hf:{tmp_path / 'several'}:test[1:]")] == ["b", "c"]


def test_hf_names_what_is_missing(folder):
    with pytest.raises(InputError, match=r"could not be loaded \(Unknown split .none.\..*check"):
        load_examples(f"hf:{folder}:none")
    with pytest.raises(InputError, match=r"could not be loaded \(BuilderConfig 'none' not found"):
        load_examples(f"hf:{folder}:none:train")


@pytest.mark.usefixtures("offline")
def test_hf_without_a_network():
    with pytest.raises(
        InputError, match=r"hf:nobody/nothing: the data set could not be loaded \(.* give a JSONL"
    ):
        load_examples("hf:nobody/nothing")


@pytest.mark.parametrize("source", ["hf:", "hf::train", "hf:a:", "hf:a::train", "hf:a:b:c:d"])
def test_hf_spelling(source):
    with pytest.raises(InputError, match="write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT"):
        load_examples(source)


def test_hf_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes an import fail
    with pytest.raises(InputError, match=r"needs the package datasets: pip install 'kfade\[hub\]'"):
        load_examples("hf:some/set")


# --- encoding: texts -------------------------------------------------------------------------

PLAIN, CHAT = zoo.tokenizer(), zoo.tokenizer(chat=True)


def texts(*contents):
    return [Example(f"line {i}", text=content) for i, content in enumerate(contents, 1)]


def exchange(*turns, prefix=("", "")):
    return Example("line 1", turns=turns, plain_prefix=prefix)


def test_packing_keeps_every_token_once_with_eos_between():
    contents = ["a b c", "d", "e f g h i j k", "l m n"]
    packed = encode(texts(*contents), PLAIN, length=5)
    stream = [token for sequence in packed for token in sequence.tokens]
    assert words(stream) == "a b c </s> d </s> e f g h i j k </s> l m n </s>"
    assert [len(s.tokens) for s in packed] == [5, 5, 5, 3]
    for sequence in packed:  # the first token of a sequence has nothing to be predicted from
        words_scored = [word != "</s>" for word in words(sequence.tokens).split()]
        assert sequence.scored == (False, *words_scored[1:])
    ends = encode(texts(*contents), PLAIN, length=5, score_end=True)
    assert [s.tokens for s in ends] == [s.tokens for s in packed]
    assert all(all(s.scored[1:]) for s in ends)


def test_packing_drops_a_last_token_that_could_not_be_scored():
    packed = encode(texts("a b c d e"), PLAIN, length=5)
    assert [words(s.tokens) for s in packed] == ["a b c d e"]


def test_packing_puts_one_eos_where_the_text_has_one_already():
    packed = encode(texts("a b </s>", "c"), PLAIN, length=16)
    assert [words(s.tokens) for s in packed] == ["a b </s> c </s>"]


def test_without_packing_each_text_is_a_sequence():
    made = encode(texts("a b c", "d e"), PLAIN, pack=False, length=2)
    assert [words(s.tokens) for s in made] == ["a b c", "d e"]
    assert [s.scored for s in made] == [(False, True, True), (False, True)]
    made = encode(texts("a b c", "d"), PLAIN, pack=False, score_end=True)
    assert [words(s.tokens) for s in made] == ["a b c </s>", "d </s>"]
    assert [s.scored for s in made] == [(False, True, True, True), (False, True)]
    with pytest.raises(InputError, match="line 2: no token to score; the first token of a seq"):
        encode(texts("a b c", "d"), PLAIN, pack=False)


def test_packed_texts_come_after_exchanges():
    examples = [*texts("a b"), exchange(("user", "c "), ("assistant", "d"))]
    made = encode(examples, PLAIN, length=8)
    assert [words(s.tokens) for s in made] == ["c d </s>", "a b </s>"]


# --- encoding: windows -----------------------------------------------------------------------


def test_a_length_over_the_window():
    with pytest.raises(InputError, match="--sequence-length 9 is over the model's window of 8"):
        encode(texts("a b"), PLAIN, length=9, window=8)
    assert encode(texts("a b"), PLAIN, length=8, window=8)


@pytest.mark.parametrize("pack", [True, False])
def test_an_exchange_over_the_window(pack):
    long = exchange(("user", "a b c "), ("assistant", "d e"))
    fits = encode([long], PLAIN, window=6, length=6, pack=pack)
    assert words(fits[0].tokens) == "a b c d e </s>"
    with pytest.raises(
        InputError, match=r"line 1: 6 tokens, over the model's window of 5; .* pass --truncate"
    ):
        encode([long], PLAIN, window=5, length=5, pack=pack)
    cut = encode([long], PLAIN, window=5, length=5, pack=pack, truncate=True)
    assert words(cut[0].tokens) == "a b c d e"
    assert scored_words(cut[0]) == "d e"
    with pytest.raises(InputError, match="line 1: no token to score within the model's window"):
        encode([long], PLAIN, window=3, length=3, pack=pack, truncate=True)


def test_an_unpacked_text_over_the_window():
    examples = texts("a b", "a b c d e")
    with pytest.raises(InputError, match="line 2: 5 tokens, over the model's window of 4"):
        encode(examples, PLAIN, window=4, pack=False)
    cut = encode(examples, PLAIN, window=4, pack=False, truncate=True)
    assert [words(s.tokens) for s in cut] == ["a b", "a b c d"]


# --- encoding: plain exchanges ---------------------------------------------------------------


def test_plain_exchange_is_prompt_and_completion_end_to_end():
    made = encode([exchange(("user", "a b "), ("assistant", "c d"))], PLAIN)
    assert words(made[0].tokens) == "a b c d </s>"
    assert scored_words(made[0]) == "c d </s>"


def test_a_bare_completion_need_not_be_the_end_of_a_text():
    # "The capital of France is" | " Paris": no EOS, or forgetting would unlearn to stop.
    cloze = dataclasses.replace(exchange(("user", "a b "), ("assistant", "c")), closes=False)
    made = encode([cloze], PLAIN)
    assert words(made[0].tokens) == "a b c"
    assert scored_words(made[0]) == "c"


def test_plain_questions_carry_their_labels():
    example = exchange(("user", "a b"), ("assistant", "c"), prefix=("Question: ", "\nAnswer: "))
    made = encode([example], PLAIN)
    assert words(made[0].tokens) == "Question: a b Answer: c </s>"
    assert scored_words(made[0]) == "c </s>"


def test_plain_turns_each_end_in_eos():
    turns = [("user", "a "), ("assistant", "b"), ("user", "c "), ("assistant", "d")]
    made = encode([exchange(*turns)], PLAIN)
    assert words(made[0].tokens) == "a b </s> c d </s>"
    assert scored_words(made[0]) == "b </s> d </s>"


class Characters:
    """A tokenizer of single characters that opens with a BOS: shows every space."""

    bos_token_id, eos_token_id, chat_template = 1, 2, None

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(c) for c in text]
        self.input_ids = [self.bos_token_id, *ids] if add_special_tokens else ids
        return self


class Ending(Characters):
    """The same, closing all that it reads by EOS, as some tokenizers do."""

    def __call__(self, text, add_special_tokens=True):
        super().__call__(text, add_special_tokens)
        self.input_ids += [self.eos_token_id] if add_special_tokens else []
        return self


def test_a_tokenizers_own_eos_closes_no_prompt():
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    open_text = [dataclasses.replace(example, closes=False) for example in texts("abc")]
    for examples in ([exchange(*turns)], texts("abc"), open_text):
        plain = encode(examples, Characters(), pack=False)
        assert encode(examples, Ending(), pack=False) == plain
    assert plain[0].tokens == (1, *map(ord, "abc"))
    asked = exchange(("user", "q"))
    assert encode_prompt(asked, Ending()) == encode_prompt(asked, Characters()) == (1, ord("q"))
    bos = type("Bos", (Ending,), {"bos_token_id": Ending.eos_token_id})
    assert open_tokens(bos(), "") == [bos.bos_token_id]


@pytest.mark.parametrize(
    ("prefix", "prompt", "completion", "text"),
    [
        (("", ""), "q", "a", "qa"),
        (("", ""), "q ", "a", "q a"),
        (("", ""), "q\n", " a ", "q\n a "),
        (("Question: ", "\nAnswer: "), "q", "a", "Question: q\nAnswer: a"),
    ],
)
def test_plain_concatenation_is_exact(prefix, prompt, completion, text):
    example = exchange(("user", prompt), ("assistant", completion), prefix=prefix)
    made = encode([example], Characters())[0]
    assert made.tokens[0] == Characters.bos_token_id  # one BOS, at the start only
    assert made.tokens[-1] == Characters.eos_token_id
    assert "".join(map(chr, made.tokens[1:-1])) == text
    # The space before an answer belongs to it, as tokenizers join a space to the word after it.
    answer = text[len(text.removesuffix(completion).rstrip(" ")) :] if any(prefix) else completion
    scored = [t for t, is_scored in zip(made.tokens, made.scored, strict=True) if is_scored]
    assert "".join(map(chr, scored[:-1])) == answer


# --- encoding: chat template -----------------------------------------------------------------


def test_chat_scores_the_assistants_turns_only():
    made = encode([exchange(("user", "a b"), ("assistant", "c d"))], CHAT)
    assert words(made[0].tokens) == "<s> <user> a b <assistant> c d </s>"
    assert scored_words(made[0]) == "c d </s>"


def test_chat_of_several_turns():
    turns = [
        *(("system", "s"), ("user", "a"), ("assistant", "b")),
        *(("user", "c"), ("assistant", "d e"), ("user", "unanswered")),
    ]
    made = encode([exchange(*turns)], CHAT)
    rendered = "<s> <unk> s <user> a <assistant> b </s> <user> c <assistant> d e </s>"
    assert words(made[0].tokens) == rendered
    assert scored_words(made[0]) == "b </s> d e </s>"


def test_chat_tokens_are_those_of_the_rendered_conversation():
    turns = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = CHAT.apply_chat_template(messages, tokenize=False)
    made = encode([exchange(*turns)], CHAT)
    assert list(made[0].tokens) == CHAT(rendered, add_special_tokens=False).input_ids


def test_chat_template_is_used_where_there_is_one_unless_told():
    example = exchange(("user", "a"), ("assistant", "b"))
    assert encode([example], CHAT) == encode([example], CHAT, template=ChatTemplate(enabled=True))
    assert encode([example], CHAT, template=ChatTemplate(enabled=False)) == encode([example], PLAIN)
    assert encode([example], CHAT) != encode([example], PLAIN)
    with pytest.raises(InputError, match="has no chat template: use --template plain"):
        encode([example], PLAIN, template=ChatTemplate(enabled=True))


def test_chat_template_without_an_eos_gets_one():
    tokenizer = zoo.tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace(" </s>", "")
    made = encode([exchange(("user", "a"), ("assistant", "b"))], tokenizer)
    assert words(made[0].tokens) == "<s> <user> a <assistant> b </s>"
    assert scored_words(made[0]) == "b </s>"


def test_chat_template_that_puts_text_after_the_eos():
    tokenizer = zoo.tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace(" </s>", " </s> x")
    made = encode([exchange(("user", "a"), ("assistant", "b"))], tokenizer)
    assert words(made[0].tokens) == "<s> <user> a <assistant> b </s> x"
    assert scored_words(made[0]) == "b </s>"


def test_chat_template_that_rewrites_earlier_turns():
    # As templates of reasoning models do, which drop the reasoning of earlier answers.
    tokenizer = zoo.tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ m['content'] if loop.last else 'x' }}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    with pytest.raises(
        InputError,
        match=r"line 1: the chat template does not show the assistant's turn 2 \('b'\), .* plain",
    ):
        encode([exchange(*turns)], tokenizer)


def test_texts_do_not_go_through_the_chat_template():
    assert encode(texts("a b"), CHAT) == encode(texts("a b"), PLAIN)


# --- sequences and batches -------------------------------------------------------------------


def test_live_positions_and_loss_tokens():
    sequence = TokenSequence((5, 6, 7, 8, 9), (False, False, True, True, False))
    assert (sequence.live, sequence.loss_tokens) == (3, 2)


@pytest.mark.parametrize("scored", [(True, True), (False, False), (False, True, True)])
def test_a_sequence_without_a_token_to_score_is_refused(scored):
    with pytest.raises(InputError, match=r"first token is scored|without a scored token|3 marks"):
        TokenSequence((5, 6), scored)


def test_batches_are_exactly_the_sequences():
    made = [
        *zoo.sequences((6, 3, 9, 9, 4, 2), seed=4),
        *zoo.sequences((8, 5), seed=5, prompt=3),
        TokenSequence((5, 6, 7, 8, 9), (False, True, False, False, False)),  # an unscored tail
    ]
    batches = make_batches(made, budget=16)
    assert sorted(i for b in batches for i in b.id_B.tolist()) == list(range(len(made)))
    for batch in batches:
        for row, number in enumerate(batch.id_B.tolist()):
            sequence, n = made[number], made[number].live
            assert batch.live_BT[row].tolist() == [t < n for t in range(batch.live_BT.shape[1])]
            assert batch.input_BT[row, :n].tolist() == list(sequence.tokens[:n])
            assert batch.target_BT[row, :n].tolist() == list(sequence.tokens[1 : n + 1])
            assert batch.loss_BT[row, :n].tolist() == list(sequence.scored[1 : n + 1])
            assert batch.loss_BT[row, n - 1]  # cut after the last loss position
            assert not batch.loss_BT[row, n:].any()
            assert not batch.input_BT[row, n:].any()
        assert batch.loss_tokens == sum(made[i].loss_tokens for i in batch.id_B.tolist())
        assert batch.positions == batch.input_BT.numel()


@pytest.mark.parametrize("budget", [1, 7, 16, 40, 10_000])
def test_batches_are_sorted_and_under_the_budget(budget):
    made = zoo.sequences((6, 3, 9, 9, 4, 2, 8, 5, 7, 3), seed=4)
    batches = make_batches(made, budget=budget)
    lengths = [made[i].live for b in batches for i in b.id_B.tolist()]
    assert lengths == sorted(lengths, reverse=True)
    for batch in batches:
        assert batch.positions <= budget or len(batch.id_B) == 1
        assert batch.input_BT.shape[1] == max(made[i].live for i in batch.id_B.tolist())
    # One more would not have fitted, or would have been padded too much.
    for batch, after in itertools.pairwise(batches):
        width = batch.input_BT.shape[1]
        fits = batch.positions + width <= budget
        is_short = after.input_BT.shape[1] < (1 - PADDING) * width
        assert not fits or (is_short and batch.positions + width > ENOUGH * budget)


def test_a_batch_that_is_large_enough_takes_no_much_shorter_sequences():
    made = zoo.sequences((100, 100, 90, 80, 30, 20, 5), seed=4)
    widths = [b.live_BT.shape for b in make_batches(made, budget=1600)]  # enough: 200 positions
    assert widths == [(4, 99), (3, 29)]  # 29 + 19 + 4 positions are not enough to be cut again


def test_no_sequences_make_no_batches():
    assert make_batches([]) == []


# --- drawing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 5), (10, 1), (7, 6)])
def test_draws_do_not_repeat_within_a_pass(count, size):
    per_pass = count // size
    for start in (0, per_pass, 5 * per_pass):
        drawn = [
            i for step in range(start, start + per_pass)
            for i in draw_without_replacement(count, size, step, seed=3)
        ]  # fmt: skip
        assert len(drawn) == per_pass * size == len(set(drawn))
        assert set(drawn) <= set(range(count))


def test_draws_cover_everything():
    whole = [draw_without_replacement(12, 4, step, seed=0) for step in range(3)]
    assert sorted(itertools.chain(*whole)) == list(range(12))
    # Where the size does not divide the count, the rest of a pass is left to later passes.
    drawn = {i for step in range(20) for i in draw_without_replacement(12, 5, step, seed=0)}
    assert drawn == set(range(12))


def test_draws_hang_on_seed_and_step_only():
    draws = [draw_without_replacement(50, 10, step, seed=1) for step in range(10)]
    torch.manual_seed(123)
    assert [draw_without_replacement(50, 10, step, seed=1) for step in range(10)] == draws
    assert draws[:5] != draws[5:]  # a new pass, a new permutation
    assert [draw_without_replacement(50, 10, step, seed=2) for step in range(10)] != draws


@pytest.mark.parametrize("size", [None, 5, 9])
def test_drawing_all(size):
    for step in (0, 3):
        assert draw_without_replacement(5, size, step, seed=7) == [0, 1, 2, 3, 4]


# --- digest ----------------------------------------------------------------------------------


def test_digest_tells_tokens_masks_and_order():
    first, second = zoo.sequences((6, 5), seed=1)
    original = digest_sequences([first, second])
    assert digest_sequences(zoo.sequences((6, 5), seed=1)) == original
    mask = dataclasses.replace(first, scored=(False, False, *first.scored[2:]))
    token = dataclasses.replace(first, tokens=(3 + first.tokens[0] % 30, *first.tokens[1:]))
    others = [[mask, second], [token, second], [second, first], [first]]
    digests = [digest_sequences(other) for other in others]
    assert len({original, *digests}) == 5
