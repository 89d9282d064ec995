"""Chat templates: a conversation as text, and which characters of it are the assistant's own.

A template puts marks of its own around what was written: roles, an empty block of reasoning, the
end of a turn. To find them, the conversation is rendered again with a known word in the place of an
answer. Nothing is assumed about the form of a template.
"""

from __future__ import annotations

import contextlib
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
# What transformers sets when it renders a template.
OWN_ARGUMENTS = {
    *("messages", "conversation", "conversations", "chat_template", "add_generation_prompt"),
    *("tools", "documents", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("tokenize", "sanitize_control_tokens", "template_kwargs", "kwargs", "self"),
    *("raise_exception", CLOCK),
}
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
    enabled: bool | None = None
    """Whether conversations go through a template; None: if there is one."""

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

    def used_by(self, tokenizer: Any) -> bool:
        """Whether conversations go through a template, with this tokenizer.

        Raises:
            InputError: a template is required, and there is none.
        """
        there = self.text is not None or bool(tokenizer.chat_template)
        if self.enabled and not there:
            raise InputError(
                "this tokenizer has no chat template: use --template plain, or give one with "
                "--template-file"
            )
        return there if self.enabled is None else self.enabled

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
        """The conversation as text, in which the assistant's turns but ``unscored`` are scored.

        Where a template marks the assistant's text (``{% generation %}``), a turn ends where that
        mark ends, and a turn without a mark is not scored.

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
            if own is None:
                mark = conversation.end_mark(index, after)
                closed = mark is not None
                spans.append((start, end))
                spans += [(end + mark[0], end + mark[1])] if mark else []
            else:
                ends = [b for a, b in own if a < end and b > start]
                closed = bool(ends)
                if not ends:
                    continue
                spans.append((start, max(ends)))
            cut.append(not whole)
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
        """(text before, mark, text after) of message ``index``, of the first ``count`` messages.

        The last two are empty where the template does not show the message's content.
        """
        marked = [
            {**message, "content": ANSWER} if i == index else message
            for i, message in enumerate(self.messages[:count])
        ]
        return replace(self, messages=marked).rendered().partition(ANSWER)

    def written(self, index: int, text: str) -> tuple[Span, str]:
        """(place in ``text`` of the answer of message ``index``, the template's text after it)."""
        content = self.messages[index]["content"]
        before, found, after = self.around(index)
        if found:
            for written in (content, content.strip(), content.lstrip(), content.rstrip()):
                if text == before + written + after:
                    return (len(before), len(before) + len(written)), after
            # The template takes the answer apart, as some do with reasoning: what is neither the
            # text before the mark nor the text after it came from the answer.
            start = common_length(text, before)
            rest = common_length(text[start:][::-1], after[::-1])
            if start < len(text) - rest:
                return (start, len(text) - rest), after
        raise InputError(
            f"{self.where}: the chat template does not show the assistant's turn {index + 1} "
            f"({content.strip()[:40]!r}), so it cannot be scored: use --template plain, another "
            "--template-file, or one exchange a line"
        )

    def check_shown(self, text: str) -> None:
        """Raises InputError where the template leaves out a message to the assistant.

        Some templates show only the roles that they know. All know users: for a user's message it
        is enough that its words are in ``text``.
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
        """The place of the mark that ends a turn, in the text ``after`` its answer.

        It is the first special token there. If there is none, it is all that the template puts
        between the answer and the next turn, without the white space around it.
        """
        ending = after
        if index + 1 < len(self.messages):
            ending = self.around(index, index + 1)[2]
        ending = ending[: common_length(ending, after)].rstrip()
        there = [token for token in _special_tokens(self.tokenizer) if token in ending]
        if there:
            first = min(there, key=lambda token: (ending.find(token), -len(token)))
            return ending.find(first), ending.find(first) + len(first)
        return (len(ending) - len(ending.lstrip()), len(ending)) if ending else None

    def own_spans(self, text: str) -> list[Span] | None:
        """What the template marks as the assistant's text; None if it has no such marks."""
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


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    """Within the ``with`` any error of a template becomes an InputError that quotes it."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a template is a program: it may raise anything
        words = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where}: the chat template refuses this conversation: {words}; change the example, "
            "give another template with --template-file, or use --template plain"
        ) from None


@cache
def _warn_of_unread(source: str, arguments: tuple[str, ...]) -> None:
    """Warn, once for each template, of arguments that it does not read."""
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
    """A text without its white space, which templates change."""
    return "".join(text.split())


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _special_tokens(tokenizer: Any) -> Iterator[str]:
    """The texts of all special tokens; not every version of transformers lists all in one place."""
    yield from tokenizer.all_special_tokens
    added = getattr(tokenizer, "added_tokens_decoder", {})
    yield from (token.content for token in added.values() if token.special)


def _stopped_clock(now: datetime) -> str:
    """A macro in Jinja that replaces the clock of a template; it is put before the template.

    transformers passes data to a template but no functions. The empty expression at the end keeps a
    newline with which the template may begin.
    """
    # Escaped percent signs are put aside first, so that they begin no directive.
    filters = "replace('%%', '\ufdd2')"
    for directive in DIRECTIVES:
        value = now.strftime(f"%{directive}").replace("\\", "\\\\").replace("'", "\\'")
        filters += f" | replace('%{directive}', '{value}')"
    filters += " | replace('\ufdd2', '%')"
    macro = f"{{%- macro {CLOCK}(format) %}}{{{{ format | {filters} }}}}{{%- endmacro %}}"
    return macro + "{{ '' }}"
