"""What is scored: against the joint tokenisation, with tokenizers of four kinds, and templates.

The oracles count bytes of the tokens themselves; they do not ask for offsets.
"""

from __future__ import annotations

import json
import random
from datetime import datetime
from itertools import accumulate, compress

import pytest
import torch
import zoo
from helpers import flat
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import kfade
from kfade.cli import main
from kfade.data.chat import ChatTemplate
from kfade.data.examples import Example, parse_example
from kfade.data.sequences import continuation, encode, encode_prompt, open_tokens
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.runs import unlearning
from kfade.runs.config import read_config

TEXT = [
    "Once upon a time there was a little girl.",
    "the time, a  girl\n\n12 345",
    "über 日本 🙂 🙃",
]
PIECES = ["a", " time", "time", " ", "  ", "\n", "\n\n", "12", " 3", "日本", "🙂", "é", ".", "girl"]


def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's form: a mark for each space, one before the text, bytes for what is unknown."""
    characters = sorted(set("abcdefghijklmnopqrstuvwxyzO▁.\n, é123"))
    merges = [("▁", "t"), ("i", "m"), ("▁t", "im"), ("▁tim", "e"), ("▁", "a"), ("t", "im"),
              ("tim", "e"), ("▁", "▁"), ("1", "2"), (".", "\n")]  # fmt: skip
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *characters]
    vocabulary += [a + b for a, b in merges]
    model = models.BPE(
        {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))},
        merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_level(trim: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's form; with ``trim`` a token's offsets leave its spaces out."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's form: no token holds a space, and the tokenizer ends all that it reads."""
    words = ["[UNK]", "[CLS]", "[SEP]", "once", "a", "time", "##time", "##s", "12", ".", "girl"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


class Slow:
    """A tokenizer that cannot tell offsets, around one that can."""

    is_fast, chat_template = False, None

    def __init__(self, inner):
        self.inner = inner
        self.bos_token_id, self.eos_token_id = inner.bos_token_id, inner.eos_token_id

    def __call__(self, text, add_special_tokens=True):
        return self.inner(text, add_special_tokens=add_special_tokens)


def byte_counts(tokenizer, tokens):
    """Bytes of the text that each token stands for; of a special one, none."""
    counts = []
    for piece in tokenizer.convert_ids_to_tokens(list(tokens)):
        if piece in tokenizer.all_special_tokens:
            counts.append(0)
        elif piece.startswith("<0x"):
            counts.append(1)
        elif "▁" in tokenizer.get_vocab():
            counts.append(len(piece.replace("▁", " ").encode()))
        else:
            counts.append(len(piece))  # a character a byte
    return counts


def exchange(prompt, completion):
    return parse_example({"prompt": prompt, "completion": completion}, "line 1")


def pairs(count):
    draw = random.Random(5)
    for _ in range(count):
        words = ["".join(draw.choices(PIECES, k=draw.randint(1, 5))) for _ in range(2)]
        if words[1].strip():
            yield tuple(words)


@pytest.mark.parametrize(
    ("tokenizer", "shift"),
    [(sentencepiece(), 1), (byte_level(), 0), (byte_level(trim=True), 0)],
    ids=["sentencepiece", "byte level", "byte level, trimmed"],
)
def test_prompt_and_answer_are_one_text(tokenizer, shift):
    apart = 0
    for prompt, completion in pairs(400):
        whole = tokenizer(prompt + completion).input_ids
        [made] = encode([exchange(prompt, completion)], tokenizer)
        assert list(made.tokens) == whole
        # A token is scored if it ends after the border, in bytes; one mark more before the text.
        ends = accumulate(byte_counts(tokenizer, whole))
        border = len(prompt.encode()) + shift
        assert list(made.scored) == [t > 0 and end > border for t, end in enumerate(ends)]
        pieces = [tokenizer(part, add_special_tokens=False).input_ids
                  for part in (prompt, completion)]  # fmt: skip
        apart += [*pieces[0], *pieces[1]] != whole[shift:]
    assert apart > 10  # tokenised apart it would be another text


@pytest.mark.parametrize("tokenizer", [sentencepiece(), byte_level()], ids=["pieces", "bytes"])
def test_a_tokenizer_without_offsets_scores_the_same(tokenizer):
    same = 0
    for prompt, completion in pairs(200):
        [made] = encode([exchange(prompt, completion)], Slow(tokenizer))
        [known] = encode([exchange(prompt, completion)], tokenizer)
        assert made.tokens == known.tokens
        same += made == known
        # The text before the border can be cut into other tokens when it stands alone; then a
        # token too many is scored, never one too few. A character of several tokens is the rest.
        if (prompt + completion).isascii():
            assert all(m or not k for m, k in zip(made.scored, known.scored, strict=True))
    assert same > 160


def scored(tokenizer, sequence):
    return tokenizer.convert_ids_to_tokens(list(compress(sequence.tokens, sequence.scored)))


@pytest.mark.parametrize(
    ("prompt", "completion", "answer"),
    [
        ("Once a", " time", ["time"]),
        ("Once a ", "time", ["time"]),
        ("Once [UNK", "] a", ["[UNK]", "a"]),  # a token over the border
        ("Once", " a  time.", ["a", "time", "."]),
        ("Once a girl", "s.", ["##s", "."]),
    ],
)
def test_a_tokenizer_whose_tokens_hold_no_space(prompt, completion, answer):
    tokenizer = wordpiece()
    [made] = encode([exchange(prompt, completion)], tokenizer)
    assert list(made.tokens) == tokenizer(prompt + completion).input_ids[:-1]  # no [SEP]
    assert scored(tokenizer, made) == answer


def test_a_token_over_the_border_belongs_to_the_answer():
    tokenizer = sentencepiece()
    assert scored(tokenizer, encode([exchange("a ti", "me")], tokenizer)[0]) == ["▁time"]
    assert scored(tokenizer, encode([exchange("a ", "time")], tokenizer)[0]) == ["▁time"]
    assert scored(tokenizer, encode([exchange("a.", "\na")], tokenizer)[0]) == [".\n", "a"]


def test_evaluations_score_by_the_same_rule():
    tokenizer = sentencepiece()
    for prompt, completion in pairs(50):
        [made] = encode([exchange(prompt, completion)], tokenizer)
        assert continuation(tokenizer, prompt, completion) == made
    closed = continuation(tokenizer, "a", " time", closed=True)
    assert scored(tokenizer, closed) == ["▁time", "</s>"]
    assert scored(tokenizer, continuation(tokenizer, "a a a", " time", window=1)) == ["▁time"]
    assert open_tokens(wordpiece(), "once a") == [1, 3, 4]


def test_bos_is_no_target_wherever_it_stands():
    tokenizer = sentencepiece()
    rows = [parse_example({"text": text}, "x") for text in ("a time", "time <s> a", "a")]
    [packed] = encode(rows, tokenizer)
    assert packed.tokens.count(tokenizer.bos_token_id) == 4
    said = scored(tokenizer, packed)
    assert "<s>" not in said
    assert "</s>" not in said
    with_ends = scored(tokenizer, encode(rows, tokenizer, score_end=True)[0])
    assert [word for word in with_ends if word != "</s>"] == said
    assert with_ends.count("</s>") == 3


# --- templates -------------------------------------------------------------------------------

TURN = "<{{ m.role }}>{{ m.content }}"
PLAIN = "{% for m in messages %}" + TURN + "[end]{% endfor %}" \
    "{% if add_generation_prompt %}<assistant>{% endif %}"  # fmt: skip
THINKS = PLAIN.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
DROPS = PLAIN.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].strip() }}")
OPENS = PLAIN.replace("<assistant>{% endif", "<assistant><think>\n{% endif")
DROPPED = "content.split('</think>')[-1].strip()"
SETS_OUT = PLAIN.replace(
    "{{ m.content }}",
    "{% set parts = m.content.split('</think>') %}<think>\n{% if parts | length > 1 %}"
    "{{ parts[0].split('<think>')[-1].strip() }}{% endif %}\n</think>\n\n{{ parts[-1].strip() }}",
)
MARKS_ITSELF = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}[end]"
    "{% endgeneration %}{% else %}<u>{{ m.content }}{% endif %}{% endfor %}"
)
STRICT = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" \
    "{{ raise_exception('roles must take turns') }}{% endif %}" + TURN + "{% endfor %}"  # fmt: skip
DATED = "Today is {{ strftime_now('%d %b %Y, %-d, 100%%') }}." + PLAIN


def chat(*turns):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return parse_example({"messages": messages}, "line 3")


def said(example, source, tokenizer=None, **arguments):
    """What is scored of an example, as text."""
    tokenizer = tokenizer or byte_level()
    [made] = encode([example], tokenizer, template=ChatTemplate(source, arguments))
    return tokenizer.decode(list(compress(made.tokens, made.scored)))


@pytest.mark.parametrize("source", [PLAIN, THINKS, OPENS], ids=["plain", "thinks", "opens"])
@pytest.mark.parametrize("answer", ["Mia.", "think", "end", "</think>", "a\n\nb", "日本"])
def test_what_was_written_is_scored_and_the_mark_of_its_end(source, answer):
    assert said(chat("Who? think", answer), source) == f"{answer}[end]"
    twice = said(chat("Who?", answer, "And then?", "Tim."), source)
    assert twice == f"{answer}[end]Tim.[end]"


def test_a_template_that_trims_or_drops_reasoning():
    assert said(chat("Who?", " Mia. "), DROPS) == "Mia.[end]"
    assert said(chat("Who?", "<think>hm</think>\nMia."), DROPS) == "Mia.[end]"


def test_answers_of_which_the_template_drops_a_part_are_counted_once(caplog):
    told = (
        "in {} answers the chat template drops some of what was written (first: line 3): that part "
        "is not scored"
    )
    cut = chat("Who?", "<think>hm</think>\nMia.", "And?", " Tim. ")
    encode([cut, chat("Who?", "Mia."), cut], byte_level(), template=ChatTemplate(DROPS))
    assert caplog.messages == [told.format("2 of 5")]
    encode([cut], byte_level(), template=ChatTemplate(MARKS_ITSELF.replace("content", DROPPED)))
    assert caplog.messages[1:] == [told.format("1 of 2")]
    # reasoning set out anew, and white space trimmed, are all there
    for source in (PLAIN, THINKS, SETS_OUT, MARKS_ITSELF):
        encode([cut], byte_level(), template=ChatTemplate(source))
    assert len(caplog.messages) == 2


def test_the_mark_is_a_special_token_where_there_is_one():
    tokenizer = byte_level()
    source = PLAIN.replace("[end]", "\n<|end|>\n")
    assert said(chat("Who?", "Mia.", "And?", "Tim."), source, tokenizer) == "Mia.<|end|>Tim.<|end|>"
    bare = PLAIN.replace("[end]", "\n")  # no mark: the last answer gets an EOS
    assert said(chat("Who?", "Mia.", "And?", "Tim."), bare, tokenizer) == "Mia.Tim.<|end|>"


def test_the_templates_own_mask_is_believed():
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<a>"
        "{%- generation -%}\n<think></think>{{ m.content }}.[end]\n{% endgeneration %}\n"
        "{% else %}<u>{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer, example = byte_level(), chat("Who", "Mia", "And", "Tim")
    assert said(example, source, tokenizer) == "Mia.[end]\nTim.[end]\n"
    messages = [{"role": role, "content": text} for role, text in example.turns]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    [made] = encode([example], tokenizer, template=ChatTemplate(source))
    assert list(made.tokens) == theirs["input_ids"]
    assert all(b for a, b in zip(made.scored, theirs["assistant_masks"], strict=True) if a)
    last = source.replace("m.role == 'assistant' %}<a>", "loop.last %}<a>")
    assert said(example, last, tokenizer) == "Tim.[end]\n"  # the mask leaves the first out
    with pytest.raises(InputError, match="line 3: the chat template's own mask marks none"):
        said(example, source.replace("m.role == 'assistant'", "m.role == 'nobody'"), tokenizer)


@pytest.mark.parametrize(
    ("example", "source", "message"),
    [
        (chat("a", "b", "c", "d"), "{{ messages[9].content }}", "line 3: the chat template ref"),
        (parse_example({"messages": [{"role": "assistant", "content": "a"}]}, "f, line 7"), STRICT,
         r"f, line 7: the chat template refuses this conversation: roles must take turns; "),
        (chat("a", "b"), "{% if %}", "line 3: the chat template refuses this conversation: Exp"),
        (chat("a", "b"), "{{ messages[0].content }}", r"does not show the assistant's turn 2 \('b"),
    ],
)  # fmt: skip
def test_a_template_that_fails_is_told_in_one_line(example, source, message):
    with pytest.raises(InputError, match=message) as told:
        said(example, source)
    assert "\n" not in str(told.value)


def test_several_templates_and_none_of_them_the_default():
    tokenizer = byte_level()
    tokenizer.chat_template = {"tool_use": PLAIN, "rag": PLAIN}
    with pytest.raises(InputError, match=r"line 3: the chat template refuses .* --template-file"):
        encode([chat("a", "b")], tokenizer)
    assert encode([chat("a", "b")], tokenizer, template=ChatTemplate(PLAIN))


def test_a_template_is_told_its_arguments():
    source = PLAIN.replace("<assistant>{%", "<assistant>{% if brief is false %}-{% endif %}{%")
    tokenizer, example = byte_level(), chat("a", "b", "c")
    for arguments, end in (({}, "<assistant>"), ({"brief": False}, "<assistant>-")):
        template = ChatTemplate(source, arguments)
        assert tokenizer.decode(encode_prompt(example, tokenizer, template=template)).endswith(end)


def test_a_template_that_knows_the_date_is_told_the_date_of_the_run():
    tokenizer, now = byte_level(), datetime(2024, 2, 3, 4, 5, 6)
    assert DATED.count("%") > 4
    template = ChatTemplate(DATED, now=now)
    [made] = encode([chat("a", "b")], tokenizer, template=template)
    today = tokenizer.decode(made.tokens)
    assert today.startswith("Today is 03 Feb 2024, 3, 100%.<user>a")
    [present] = encode([chat("a", "b")], tokenizer, template=ChatTemplate(DATED))
    assert tokenizer.decode(present.tokens).startswith(datetime.now().strftime("Today is %d %b"))
    bare = ChatTemplate("\n" + PLAIN, now=now)  # knows no date: not touched
    assert bare.render([{"role": "user", "content": "a"}], tokenizer, "x")[0] == "\n"
    every = "aAwdbBmyYHIpMSfjUWcxXGuV"
    source = "{{ strftime_now('" + " ".join(f"%{d}" for d in every) + "') }}"
    shown = ChatTemplate(source, now=now).render([{"role": "user", "content": ""}], tokenizer, "x")
    assert shown == now.strftime(" ".join(f"%{d}" for d in every))


def test_without_a_template_turns_are_parted():
    example, plain = chat("Who?", "Mia.", "And?", "Tim."), ChatTemplate(enabled=False)
    [made] = encode([example], byte_level(), template=plain)
    tokenizer = byte_level()
    assert tokenizer.decode(made.tokens) == "Who?\nMia.<|end|>And?\nTim.<|end|>"
    assert tokenizer.decode(list(compress(made.tokens, made.scored))) == "Mia.<|end|>Tim.<|end|>"


@pytest.fixture
def chat_folder(tmp_path):
    """A tiny model whose template knows the date, and data for it."""
    model, tokenizer = zoo.tiny("llama", torch.float32), zoo.tokenizer(chat=True)
    tokenizer.chat_template = "{{ strftime_now('%-d') }} " + tokenizer.chat_template
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"question": f"a {x}", "answer": f"b {x}"} for x in "cdefghij"]
    for name, own in (("forget", rows[:2]), ("retain", rows[2:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in own), encoding="utf-8")
    return tmp_path


def test_a_resumed_run_and_its_evaluations_are_told_the_date_of_its_beginning(
    chat_folder, monkeypatch
):
    def at(day):
        moment = datetime(2024, 2, day, 12).timestamp()
        monkeypatch.setattr("kfade.runs.template.time.time", lambda: moment)

    def run(out, *more):
        arguments = [str(chat_folder / "model"), "--out", str(chat_folder / out)]
        arguments += ["--forget", str(chat_folder / "forget.jsonl")]
        arguments += ["--retain", str(chat_folder / "retain.jsonl"), "--kl", "0.01"]
        arguments += ["--sequence-length", "16"]
        return main(["unlearn", *arguments, "--steps", "2", *more])

    def stop(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    at(2)
    assert run("whole") == 0
    keep = unlearning._keep_step
    monkeypatch.setattr(unlearning, "_keep_step", stop)
    assert run("cut") == 130
    monkeypatch.setattr(unlearning, "_keep_step", keep)
    at(3)
    assert run("other") == 0
    assert run("cut", "--resume") == 0
    whole, cut, other = (Update.load(chat_folder / name) for name in ("whole", "cut", "other"))
    assert cut.provenance["forget_sha256"] == whole.provenance["forget_sha256"]
    assert cut.provenance["forget_sha256"] != other.provenance["forget_sha256"]
    assert all(torch.equal(cut.deltas[name], whole.deltas[name]) for name in whole.deltas)
    manifest = json.loads((chat_folder / "cut" / "manifest.json").read_text())
    assert manifest["config"]["data"]["template_date"] == "2024-02-02T12:00:00"
    for update, day in ((["--update", str(chat_folder / "cut")], 2), ([], 3)):
        out = chat_folder / f"eval{day}"
        common = [str(chat_folder / "model"), *update, "--out", str(out)]
        assert main(["eval", "memorisation", *common, "--members",
                     str(chat_folder / "forget.jsonl")]) == 0  # fmt: skip
        settings = json.loads((out / "manifest.json").read_text())["config"]
        assert settings["template_date"] == f"2024-02-0{day}T12:00:00"


def test_options_of_templates_that_cannot_be_read(chat_folder, capsys):
    files = [f"--{name}={chat_folder / name}.jsonl" for name in ("forget", "retain")]
    base = ["unlearn", str(chat_folder / "model"), *files, f"--out={chat_folder / 'o'}"]
    base += ["--sequence-length=16"]
    for option, message in (
        ("--template-arg=thinking", "--template-arg thinking: write NAME=VALUE"),
        ("--template-file=nowhere.jinja", "--template-file nowhere.jinja: no such file"),
        ("--template-date=soon", "--template-date soon: write a date as 2026-01-31"),
    ):
        assert main([*base, option]) == 2
        assert message in capsys.readouterr().err
    assert main([*base, "--template", "plain", "--template-arg", "a=1"]) == 2
    assert "--template plain uses no template" in capsys.readouterr().err
    assert not (chat_folder / "o").exists()
    source = chat_folder / "own.jinja"
    source.write_text(zoo.CHAT_TEMPLATE.replace("<assistant>", "{{ word }}"), encoding="utf-8")
    more = ["--template-file", str(source), "--template-arg", "word=z", "--template-arg", "n=1"]
    assert main([*base, "--kl", "0.01", *more]) == 0
    config = read_config(chat_folder / "o" / "config.yaml")
    assert config.data.template_args == ["word=z", "n=1"]


# --- what a library call is given ------------------------------------------------------------


def test_texts_where_token_sequences_are_wanted_are_refused_by_name():
    model = zoo.tiny("llama", torch.float32)
    good = zoo.sequences((6, 7, 8))
    sets = {"forget": good, "retain": good, "held_out": good}
    for name, said in (("forget", "forget set"), ("held_out", "held-out retain set")):
        for wrong in (["a b"], "a b", [Example("here", text="a b")]):
            kind = type(wrong[0]).__name__
            with pytest.raises(InputError, match=rf"the {said}: holds {kind}, not token sequences"):
                kfade.unlearn(model, **flat(**{**sets, name: wrong}, kl=0.01))
    with pytest.raises(InputError, match=r"kfade\.encode\(kfade\.load_examples\(path\), tokeniz"):
        kfade.make_batches(["a b"])
    with pytest.raises(InputError, match=r"examples: hold str, .* kfade\.load_examples\(path\)"):
        kfade.encode(["a b"], zoo.tokenizer())
