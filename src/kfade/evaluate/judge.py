"""A judge model behind any OpenAI-compatible API: the requests to it, and its replies.

Requests are ``POST {base}/v1/chat/completions``. After a time-out or a passing error of the server
a request is repeated, after 1, 2, 4, ... seconds or as ``Retry-After`` says. Redirects are not
followed, so that the key and the texts go to no other address than the user's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from kfade.errors import InputError

LOWEST, HIGHEST = 1.0, 10.0
LONGEST_WAIT = 60.0  # seconds
RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
PASSING = {408, 409, 425, 429}  # statuses after which, as after 5xx, a request is repeated
LIMIT, LATER_LIMIT = "max_tokens", "max_completion_tokens"  # old and new name of one setting

INSTRUCTIONS = (
    "You grade answers that an AI assistant gave. Judge how correct, useful, relevant, complete "
    "and well written the answer is, and whether it does what the user asked. Length is no merit. "
    "First give your reasons in a few sentences. Then, on the last line, give one whole number "
    "from 1 (worthless) to 10 (could not be better) in double square brackets, for example "
    "[[4]], and nothing after it."
)


@dataclass(frozen=True)
class Reply:
    """The judge's reply."""

    text: str
    cut_off: bool = False
    """Whether it ended at the limit of tokens."""


class _Fault(Exception):
    """A passing error of a try; ``wait``: seconds that the server asked to wait."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


@dataclass
class Judge:
    """Where the judge is, and how it is asked.

    Raises:
        InputError: no web address, one that holds a password, or an impossible key.
    """

    url: str
    """Address of the server, with or without ``/v1`` or ``/v1/chat/completions``."""
    model: str
    """The judge's name on the server."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token, and hidden in all messages."""
    tries: int = 6
    wait: float = 1.0
    """Seconds before the second try; doubled before each further one."""
    timeout: float = 300.0
    """Seconds to wait for one answer."""
    max_tokens: int = 1024
    """Most tokens of a reply."""
    limit_name: str = field(default=LIMIT, init=False)
    """The name of that setting; it changes when the server asks for the other name."""

    def __post_init__(self) -> None:
        try:
            url = httpx2.URL(self.url)
        except httpx2.InvalidURL:
            url = httpx2.URL()
        if url.userinfo:
            raise InputError(
                "--judge-url holds a user name or password: leave it out, and put the key into the "
                "environment variable that --judge-key-env names"
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"--judge-url {self.url}: write http://HOST:PORT or https://HOST/...")
        if self.key and not all("!" <= letter <= "~" for letter in self.key):
            raise InputError(
                "the key of the judge (--judge-key-env) holds a space, a line break or a letter "
                "that is not ASCII, which no key has: set the variable again"
            )

    @property
    def endpoint(self) -> str:
        """The address of requests."""
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return f"{base}/chat/completions" if base.endswith("/v1") else f"{base}/v1/chat/completions"

    def ask(
        self, messages: Sequence[dict[str, str]], *, sleep: Callable[[float], None] = time.sleep
    ) -> Reply:
        """The judge's reply at temperature 0, which may be empty.

        Raises:
            InputError: the server refused the request, or failed at every try.
        """
        with self._client() as client:
            for number in range(1, self.tries + 1):
                try:
                    return self._try(client, messages)
                except _Fault as fault:
                    if number == self.tries:
                        raise InputError(
                            f"the judge at {self.endpoint} failed {self.tries} times, at last: "
                            f"{self._hide_key(str(fault))}; what was judged is kept, the same "
                            "command with --resume goes on"
                        ) from None
                    wait = self.wait * 2 ** (number - 1) if fault.wait is None else fault.wait
                    sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("no tries")

    def _client(self) -> httpx2.Client:
        """A client that follows no redirects; the environment sets proxies and certificates."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            return httpx2.Client(headers=headers, timeout=self.timeout, follow_redirects=False)
        except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
            raise InputError(
                f"the judge at {self.endpoint} cannot be asked with the proxies or certificates "
                f"that the environment variables name: {' '.join(str(error).split())}"
            ) from None

    def _try(self, client: httpx2.Client, messages: Sequence[dict[str, str]]) -> Reply:
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            self.limit_name: self.max_tokens,
        }
        try:
            response = client.post(self.endpoint, json=body)
        except httpx2.TransportError as error:  # unreachable, interrupted, timed out
            raise _Fault(str(error) or type(error).__name__) from None
        except httpx2.DecodingError:
            raise _Fault("what it answered cannot be decompressed") from None
        if response.is_success:
            return _reply(response.content)
        asks = response.status_code == 400 and LATER_LIMIT in response.text
        if asks and self.limit_name == LIMIT:
            self.limit_name = LATER_LIMIT
            return self._try(client, messages)
        raise self._refusal(response)

    def _refusal(self, response: httpx2.Response) -> Exception:
        """A passing error, or the user's error: a wrong key, address or model name."""
        code = response.status_code
        if code in PASSING or code >= 500:
            return _Fault(f"HTTP {code}", _seconds(response.headers.get("Retry-After")))
        if response.has_redirect_location:
            target = response.headers["Location"]
            with contextlib.suppress(httpx2.InvalidURL):  # else it is shown as it is
                target = str(response.url.join(target))
            return InputError(
                f"the judge at {self.endpoint} sends on to {self._hide_key(target)} (HTTP {code}), "
                "where neither the key nor the texts are sent; if that is the right address, give "
                "it as --judge-url, with --resume"
            )
        text = " ".join(self._hide_key(response.text).split())[:200]
        said = f" ({text})" if text else ""
        return InputError(
            f"the judge at {self.endpoint} refused the request: HTTP {code}{said}; check "
            "--judge-url, --judge-model and --judge-key-env, then --resume"
        )

    def _hide_key(self, text: str) -> str:
        """A server's text, in which the key may be repeated, without the key."""
        return text.replace(self.key, "***") if self.key else text


def rating_of(reply: str) -> float | None:
    """The last ``[[number]]`` of a reply; None where there is none from 1 to 10."""
    found = RATING.findall(reply)
    rating = float(found[-1]) if found else math.nan
    return rating if LOWEST <= rating <= HIGHEST else None


def judge_messages(
    turns: Sequence[str], answers: Sequence[str], references: Sequence[str]
) -> list[dict[str, str]]:
    """Messages that ask for a rating of the last of ``answers``, with earlier turns as context.

    Args:
        references: right answers by turn, where there are any; empty ones are left out.
    """
    last = len(answers) - 1
    pieces = []
    for number, (turn, answer) in enumerate(zip(turns, answers, strict=False)):
        pieces.append(f"### User, turn {number + 1}\n{turn}")
        if number < len(references) and references[number]:
            pieces.append(f"### A right answer to turn {number + 1}\n{references[number]}")
        pieces.append(f"### Assistant, turn {number + 1}\n{answer}")
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


def _reply(answer: bytes) -> Reply:
    """The text of a chat completion, its parts joined; empty where a filter removed the text."""
    try:
        choice: Any = json.loads(answer)["choices"][0]
        content: Any = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise _Fault("what it answered is not a chat completion") from None
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    text = "".join(text for text in texts if isinstance(text, str))
    return Reply(text, cut_off=choice.get("finish_reason") == "length")


def _seconds(header: str | None) -> float | None:
    """Seconds that a Retry-After asks to wait; None if it is neither a number nor a future date."""
    if not header:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    # A date with "-0000" is in UTC, and has no time zone here.
    wait = date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp() - time.time()
    return wait if wait > 0 else None
