"""A judge model behind any OpenAI-compatible API: what it is asked, and what it answered.

``POST {base}/v1/chat/completions`` by the standard library, so that any server will do. A server
that is busy, fails or does not answer is asked again after 1, 2, 4, ... seconds.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kfade.errors import InputError

LOWEST, HIGHEST = 1.0, 10.0
LONGEST_WAIT = 60.0  # seconds
RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
PASSING = {408, 409, 425, 429}  # with 5xx: a later try may do

INSTRUCTIONS = (
    "You grade answers that an AI assistant gave. Judge how correct, useful, relevant, complete "
    "and well written the answer is, and whether it does what the user asked. Length is no merit. "
    "First give your reasons in a few sentences. Then, on the last line, give one whole number "
    "from 1 (worthless) to 10 (could not be better) in double square brackets, for example "
    "[[4]], and nothing after it."
)


class _Fault(Exception):
    """A try that failed in a way that may pass; ``wait`` is what the server asked for."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass(frozen=True)
class Judge:
    """Where the judge is and how patiently it is asked."""

    url: str
    """Of the server, with or without ``/v1`` or ``/v1/chat/completions``."""
    model: str
    """The name that the server knows it by."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; it appears in no message."""
    tries: int = 6
    wait: float = 1.0
    """Seconds before the second try; doubled before each further one."""
    timeout: float = 300.0
    """Seconds to wait for one answer."""
    max_tokens: int = 1024
    """Of a judgement."""

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"--judge-url {self.url}: write http://HOST:PORT or https://HOST/...")

    @property
    def endpoint(self) -> str:
        """The address that is asked."""
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}/chat/completions" if base.endswith("/v1") else f"{base}/v1/chat/completions"

    def ask(
        self,
        messages: Sequence[dict[str, str]],
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> str:
        """The judge's reply at temperature 0; an empty one is a reply.

        Raises:
            InputError: the server refused the request, or failed at every try.
        """
        for number in range(1, self.tries + 1):
            try:
                return self._try(messages)
            except _Fault as fault:
                if number == self.tries:
                    raise InputError(
                        f"the judge at {self.endpoint} failed {self.tries} times, at last: {fault}"
                        "; what was judged is kept, the same command with --resume goes on"
                    ) from None
                wait = self.wait * 2 ** (number - 1) if fault.wait is None else fault.wait
                sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("no tries")

    def _try(self, messages: Sequence[dict[str, str]]) -> str:
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            self.endpoint, json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # unreachable, cut off, timed out
            reason = getattr(error, "reason", error)
            raise _Fault(str(reason) or type(error).__name__) from None
        return _content(answer)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """A fault that may pass, or the user's: a wrong key, address or model name."""
        if error.code in PASSING or error.code >= 500:
            return _Fault(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After")))
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        said = f" ({' '.join(text.split())[:200]})" if text.strip() else ""
        return InputError(
            f"the judge at {self.endpoint} refused the request: HTTP {error.code}{said}; check "
            "--judge-url, --judge-model and --judge-key-env, then --resume"
        )


def rating_of(reply: str) -> float | None:
    """The last ``[[number]]`` of a reply; None where there is none from 1 to 10."""
    found = RATING.findall(reply)
    rating = float(found[-1]) if found else math.nan
    return rating if LOWEST <= rating <= HIGHEST else None


def judge_messages(
    turns: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> list[dict[str, str]]:
    """What the judge is asked about the last of ``answers``, the turns before it as context.

    Args:
        references: right answers by turn, where there are any; empty ones are left out.
    """
    last = len(answers) - 1
    pieces = []
    for number, (turn, answer) in enumerate(zip(turns, answers, strict=False)):
        pieces.append(_piece(f"User, turn {number + 1}", turn))
        if number < len(references) and references[number]:
            pieces.append(_piece(f"A right answer to turn {number + 1}", references[number]))
        pieces.append(_piece(f"Assistant, turn {number + 1}", answer))
    what = "the assistant's answer"
    if last:
        what = f"the assistant's answer in turn {last + 1} only; what came before is the context"
    if any(references[: last + 1]):
        what += ". Hold it against the right answer: what contradicts it is wrong"
    pieces.append(f"Grade {what}.")
    return [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": "\n\n".join(pieces)},
    ]


def _piece(title: str, text: str) -> str:
    return f"### {title}\n{text}"


def _content(answer: bytes) -> str:
    """The text of a chat completion; no text (a filtered answer) is an empty one."""
    try:
        content: Any = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise _Fault("what it answered is not a chat completion") from None
    return content if isinstance(content, str) else ""


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; its other form, a date, is ignored."""
    return float(header) if header and header.strip().isdecimal() else None
