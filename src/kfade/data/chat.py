"""Chat templates: a conversation as text, and which characters of it are the assistant's own.

A template surrounds what was written by marks of its own: roles, an empty block of reasoning, the
end of a turn. What a template adds is found by rendering the conversation once more with a mark in
an answer's place; nothing is assumed about any template's form.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, TemplateError
from jinja2.meta import find_undeclared_variables

from kfade.errors import InputError

Span = tuple[int, int]
"""Characters from the first number to before the second."""
Message = Mapping[str, str]

ANSWER = "KfadeMarksThisAnswer"  # one word, which no template splits or trims
OPENING, CLOSING = "\ufdd0", "\ufdd1"  # noncharacters: no text holds them
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
CLOCK = "strftime_now"
# What the machinery that renders a template sets by itself.
OWN_ARGUMENTS = frozenset(
    (
        *("messages", "conversation", "chat_template", "add_generation_prompt", "tokenize"),
        *("tools", "documents", "continue_final_message", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *(
            "conversations",
            "sanitize_control_tokens",
            "template_kwargs",
            "kwargs",
            "self",
            "raise_exception",
            CLOCK,
        ),
    )
)
DIRECTIVES = ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "e", *"aAwdbBmyYHIpMSfzZjUWcxXGuVDFTR")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and what of it is scored."""

    text: str
    spans: Sequence[Span]
    """Each scored answer as it was written, and the mark that ends its turn, if there is one."""
    closed: bool
    """Whether the last turn has such a mark, or is not scored."""
    cut: Sequence[bool]
    """For each scored answer: does the template leave out some of what was written?"""


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations are rendered."""

    text: str | None = None
    """A template in place of the tokenizer's own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the template is told by name, such as ``enable_thinking``."""
    now: datetime | None = None
    """What a template that asks for the date is told; the present moment when None."""

    def __post_init__(self) -> None:
        for name in self.arguments:
            if name in OWN_ARGUMENTS or name.startswith("return_"):
                raise InputError(
                    f"--template-arg {name}: this is set by what renders the template, not by the "
                    "user; give only names that the template itself reads"
                )

    def source(self, tokenizer: Any) -> str:
        """The template's text."""
        return self.text if self.text is not None else tokenizer.get_chat_template()

    def reads_date(self, tokenizer: Any) -> bool:
        """Whether the template asks for the date."""
        return CLOCK in self.source(tokenizer)

    def used_by(self, tokenizer: Any, chat: bool | None) -> bool:
        """Whether conversations go through a template: as ``chat`` says, or if there is one.

        Raises:
            InputError: it was asked for, and there is none.
        """
        there = self.text is not None or bool(tokenizer.chat_template)
        if chat and not there:
            raise InputError(
                "this tokenizer has no chat template: use --template plain, or give one with "
                "--template-file"
            )
        return there if chat is None else chat

    def render(
        self, messages: Sequence[Message], tokenizer: Any, where: str, *, prompt: bool = False
    ) -> str:
        """The conversation as text; with ``prompt`` up to where the next answer begins.

        Raises:
            InputError: the template refuses the conversation, or leaves out a message; ``where``
                says which one.
        """
        conversation = _Conversation.of(self, messages, tokenizer, where)
        text = conversation.rendered(prompt=prompt)
        conversation.check_shown(text)
        return text

    def answers(
        self,
        messages: Sequence[Message],
        tokenizer: Any,
        where: str,
        unscored: Container[int] = (),
    ) -> Rendered:
        """A conversation of which the assistant's turns are scored, but for ``unscored``.

        A template that says by itself which text is the assistant's (``{% generation %}``) is
        believed about where a turn ends, and which turns count.

        Raises:
            InputError: the template refuses the conversation, or leaves out a message.
        """
        conversation = _Conversation.of(self, messages, tokenizer, where)
        text = conversation.rendered()
        own = conversation.own_spans(text)
        spans: list[Span] = []
        cut: list[bool] = []
        closed = False
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not message["content"].strip():
                continue
            if index in unscored:
                closed = True
                continue
            (start, end), after = conversation.written(index, text)
            whole = _dense(text[:end]).endswith(_dense(message["content"]))
            if own is not None:
                ends = [b for a, b in own if a < end and b > start]
                closed = bool(ends)
                if ends:
                    spans.append((start, max(ends)))
                    cut.append(not whole)
                continue
            spans.append((start, end))
            cut.append(not whole)
            mark = conversation.end_mark(index, after)
            closed = mark is not None
            if mark is not None:
                spans.append((end + mark[0], end + mark[1]))
        conversation.check_shown(text)
        if not spans:
            raise InputError(
                f"{where}: the chat template's own mask marks none of the answers as the "
                "assistant's: give another with --template-file, or use --template plain"
            )
        return Rendered(text, spans, closed, cut)


@dataclass(frozen=True)
class _Conversation:
    """Messages, and the template that renders them."""

    source: str
    """The template's text, with the clock stopped."""
    arguments: Mapping[str, Any]
    messages: Sequence[Message]
    tokenizer: Any
    where: str

    @classmethod
    def of(
        cls, template: ChatTemplate, messages: Sequence[Message], tokenizer: Any, where: str
    ) -> _Conversation:
        with _refusals(where):
            source = template.source(tokenizer)
        _warn_of_unread(source, tuple(template.arguments))
        if template.now and CLOCK in source:
            source = _stopped_clock(template.now) + source
        return cls(source, template.arguments, messages, tokenizer, where)

    def rendered(self, *, prompt: bool = False) -> str:
        """As text; with ``prompt`` up to where the next answer begins."""
        with _refusals(self.where):
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in self.messages],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
                **self.arguments,
            )

    def around(self, index: int, count: int | None = None) -> tuple[str, str, str]:
        """(text before, mark, text after) of message ``index``, among the first ``count``; the last
        two are empty where the template does not show its content."""
        marked = [
            {**message, "content": ANSWER} if i == index else message
            for i, message in enumerate(self.messages[:count])
        ]
        return replace(self, messages=marked).rendered().partition(ANSWER)

    def written(self, index: int, text: str) -> tuple[Span, str]:
        """Where in ``text`` the answer of message ``index`` stands, and what the template puts
        after it."""
        content = self.messages[index]["content"]
        before, found, after = self.around(index)
        if found:
            for written in (content, content.strip(), content.lstrip(), content.rstrip()):
                if text == before + written + after:
                    return (len(before), len(before) + len(written)), after
            # The template takes the answer apart, as some do with reasoning: what is neither the
            # text before the mark nor the text after it came from the answer.
            start = _shared(text, before)
            rest = _shared(text[start:][::-1], after[::-1])
            if start < len(text) - rest:
                return (start, len(text) - rest), after
        raise InputError(
            f"{self.where}: the chat template does not show the assistant's turn {index + 1} "
            f"({content.strip()[:40]!r}), so it cannot be scored: use --template plain, another "
            "--template-file, or one exchange a line"
        )

    def check_shown(self, text: str) -> None:
        """Refuse a template that leaves out, of what others say to the assistant, a message.

        Some show the roles that they know and no others. Users are known to all, so that the
        words in ``text`` are proof enough.
        """
        for index, message in enumerate(self.messages):
            role, content = message["role"], message["content"].strip()
            if role == "assistant" or not content or (role == "user" and content in text):
                continue
            if not self.around(index)[1]:
                raise InputError(
                    f"{self.where}: the chat template leaves out turn {index + 1}, of the role "
                    f"{role} ({content[:40]!r}): use --template plain, another --template-file, "
                    "or remove the message"
                )

    def end_mark(self, index: int, after: str) -> Span | None:
        """The mark that ends a turn, within the text ``after`` its answer.

        It is the first special token there, or where there is none all that the template puts
        between the answer and the next turn but the white space around it.
        """
        ending = after
        if index + 1 < len(self.messages):
            ending = self.around(index, index + 1)[2]
        ending = ending[: _shared(ending, after)].rstrip()
        places = [(ending.find(token), -len(token)) for token in _special_tokens(self.tokenizer)]
        found = min(((at, length) for at, length in places if at >= 0), default=None)
        if found is not None:
            return found[0], found[0] - found[1]
        return (len(ending) - len(ending.lstrip()), len(ending)) if ending else None

    def own_spans(self, text: str) -> list[Span] | None:
        """What the template itself marks as the assistant's; None where it marks nothing at all."""
        if not GENERATION.search(self.source):
            return None

        def shown(tag: re.Match[str]) -> str:
            # Two blocks around a mark: white space is cut before the first and after the last, as
            # it is around the tag.
            before, end, after = tag.groups()
            word, mark = ("endif", CLOSING) if end else ("if true", OPENING)
            return f"{{%{before} {word} %}}{{{{ '{mark}' }}}}{{% {word} {after}%}}"

        marked = replace(self, source=GENERATION.sub(shown, self.source)).rendered()
        spans, start, length = [], 0, 0
        for piece in re.split(f"([{OPENING}{CLOSING}])", marked):
            if piece == OPENING:
                start = length
            elif piece == CLOSING:
                spans.append((start, length))
            else:
                length += len(piece)
        assert marked.replace(OPENING, "").replace(CLOSING, "") == text
        return spans


class _refusals:
    """A context in which whatever a template raises is told in one line, in its own words."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # A template is a program of somebody else's: it may raise anything.
        if isinstance(error, Exception) and not isinstance(error, InputError | MemoryError):
            words = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{self._where}: the chat template refuses this conversation: {words}; change the "
                "example, give another template with --template-file, or use --template plain"
            ) from None


@cache
def _warn_of_unread(source: str, arguments: tuple[str, ...]) -> None:
    """Once for a template: names of arguments that it does not read."""
    if not arguments:
        return
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        read = find_undeclared_variables(environment.parse(GENERATION.sub("", source)))
    except TemplateError:  # told where it is rendered
        return
    unread = [name for name in arguments if name not in read]
    if unread:
        logger.warning("--template-arg: the chat template does not read %s", ", ".join(unread))


def _dense(text: str) -> str:
    """A text without its white space, of which templates make their own."""
    return "".join(text.split())


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _special_tokens(tokenizer: Any) -> Iterator[str]:
    """The special tokens' texts, those that only some versions list among the special included."""
    yield from tokenizer.all_special_tokens
    added = getattr(tokenizer, "added_tokens_decoder", {})
    yield from (token.content for token in added.values() if token.special)


def _stopped_clock(now: datetime) -> str:
    """A macro in Jinja, to stand before a template, that takes the place of its clock.

    A template can be given data but no function. The last, empty expression keeps a newline that
    the template may begin with.
    """
    # The percent sign itself goes first and comes back last, so that none is read twice.
    filters = "replace('%%', '\ufdd2')"
    for directive in DIRECTIVES:
        value = now.strftime(f"%{directive}").replace("\\", "\\\\").replace("'", "\\'")
        filters += f" | replace('%{directive}', '{value}')"
    filters += " | replace('\ufdd2', '%')"
    macro = f"{{%- macro {CLOCK}(format) %}}{{{{ format | {filters} }}}}{{%- endmacro %}}"
    return macro + "{{ '' }}"
