"""MT-Bench against a real HTTP server that speaks the API, with faults: nothing lost or guessed."""

from __future__ import annotations

import http.server
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from helpers import greedy

from kfade.cli import main
from kfade.data.chat import ChatTemplate
from kfade.errors import InputError
from kfade.evaluate.generation import Decoding
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.judge import Judge, Reply, judge_messages, rating_of
from kfade.evaluate.log import read_log
from kfade.evaluate.mt_bench import (
    BenchQuestion,
    answer_questions,
    judge_answers,
    read_bench,
    summarise_ratings,
)
from kfade.models.load import load_model

MESSAGES = [{"role": "user", "content": "grade this"}]


def completion(text: str | None) -> tuple[int, dict, str]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return 200, {}, json.dumps({"object": "chat.completion", "choices": [choice]})


class Server:
    """Answers each request by ``reply(number, body)`` -> (status, headers, body)."""

    def __init__(self, reply: Callable[[int, dict], tuple[int, dict, str]]) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []
        self.connections = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def setup(self):
                server.connections += 1
                super().setup()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                status, headers, text = reply(len(server.requests), body)
                if status == 0:  # hangs up without an answer
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def start(reply: Callable[[int, dict], tuple[int, dict, str]]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(url: str, **options) -> tuple[str, list[float]]:
    waits: list[float] = []
    return Judge(url, "judge", **options).ask(MESSAGES, sleep=waits.append).text, waits


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_a_judge_is_asked_in_the_apis_form(serve, suffix):
    server = serve(lambda number, body: completion("fine [[7]]"))
    reply, waits = ask(server.url + suffix, key="secret", max_tokens=50)
    assert (reply, waits) == ("fine [[7]]", [])
    assert server.paths == ["/v1/chat/completions"]
    assert server.requests[0] == {
        "model": "judge", "messages": MESSAGES, "temperature": 0, "max_tokens": 50,
    }  # fmt: skip
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_a_server_that_wants_the_limit_by_its_later_name_gets_it_from_then_on(serve):
    refusal = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."

    def reply(number, body):
        return (400, {}, refusal) if "max_tokens" in body else completion("[[6]]")

    server = serve(reply)
    judge = Judge(server.url, "judge", max_tokens=50)
    assert [judge.ask(MESSAGES).text for _ in range(2)] == ["[[6]]"] * 2
    first, *rest = server.requests
    assert first == {
        "model": "judge", "messages": MESSAGES, "temperature": 0, "max_tokens": 50,
    }  # fmt: skip
    first["max_completion_tokens"] = first.pop("max_tokens")
    assert rest == [first, first]
    never = serve(lambda number, body: (400, {}, refusal))
    with pytest.raises(InputError, match=r"refused the request: HTTP 400 .*max_completion_tokens"):
        ask(never.url)
    assert len(never.requests) == 2


def test_a_reply_in_parts_is_one_text_and_a_cut_one_is_known(serve):
    parts = [
        {"type": "text", "text": "good "},
        {"type": "reasoning"},
        {"type": "text", "text": "[[8]]"},
    ]
    choices = [
        {"message": {"content": parts}, "finish_reason": "stop"},
        {"message": {"content": "so far"}, "finish_reason": "length"},
    ]
    server = serve(lambda number, body: (200, {}, json.dumps({"choices": [choices[number - 1]]})))
    judge = Judge(server.url, "judge")
    assert judge.ask(MESSAGES) == Reply("good [[8]]")
    assert judge.ask(MESSAGES) == Reply("so far", cut_off=True)


def test_faults_that_pass_are_waited_out_ever_longer(serve):
    faults = [
        (500, {}, "oops"),
        (429, {"Retry-After": "7"}, ""),
        (200, {}, "<html>a proxy</html>"),
        (200, {}, '{"choices": []}'),
        (0, {}, ""),
    ]
    server = serve(lambda number, body: [*faults, completion("[[5]]")][number - 1])
    assert ask(server.url) == ("[[5]]", [1, 7, 4, 8, 16])
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("form", "seconds", "wait"),
    [
        ("%a, %d %b %Y %H:%M:%S GMT", 30, 30),
        ("%a, %d %b %Y %H:%M:%S -0000", 30, 30),
        ("%A, %d-%b-%y %H:%M:%S GMT", 30, 30),  # as servers wrote it long ago
        ("%a, %d %b %Y %H:%M:%S GMT", 3600, 60),  # no longer than the longest
        ("%a, %d %b %Y %H:%M:%S GMT", -30, 1),  # passed, so by our own count
        ("in a while", 0, 1),
        ("%a, 99 %b %Y %H:%M:%S GMT", 30, 1),
    ],
)
def test_a_date_to_wait_for(serve, form, seconds, wait):
    date = time.strftime(form, time.gmtime(time.time() + seconds))
    faults = [(503, {"Retry-After": date}, "")]
    server = serve(lambda number, body: [*faults, completion("[[5]]")][number - 1])
    within = 5 if wait == 30 else 0
    assert ask(server.url) == ("[[5]]", [pytest.approx(wait, abs=within)])


def test_a_server_that_stays_broken_is_named(serve):
    server = serve(lambda number, body: (503, {}, ""))
    with pytest.raises(InputError, match=r"failed 3 times, at last: HTTP 503; .* --resume"):
        ask(server.url, tries=3)
    assert len(server.requests) == 3


def test_a_judge_that_does_not_answer_in_time(serve):
    server = serve(lambda number, body: (time.sleep(0.5), completion("late [[9]]"))[1])
    with pytest.raises(InputError, match="failed 2 times, at last: timed out"):
        ask(server.url, tries=2, timeout=0.1)


def test_a_judge_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match="refused"):
        ask(f"http://127.0.0.1:{port}", tries=2)


def test_a_refused_request_is_not_repeated_and_shows_no_key(serve):
    server = serve(lambda number, body: (401, {}, '{"error": "no such key"}'))
    with pytest.raises(InputError, match=r"HTTP 401.*no such key.*--judge-key-env") as caught:
        ask(server.url, key="secret")
    assert len(server.requests) == 1
    assert "secret" not in str(caught.value) + repr(Judge(server.url, "j", "secret"))


def test_a_key_that_the_server_repeats_is_hidden(serve):
    server = serve(lambda number, body: (401, {}, "the key 'secret' has run out"))
    with pytest.raises(InputError, match=r"HTTP 401 \(the key '\*\*\*' has run out\)"):
        ask(server.url, key="secret")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("where", ["another port", "the same server"])
def test_neither_key_nor_texts_follow_a_redirect(serve, status, where):
    other = serve(lambda number, body: completion("[[9]]"))
    path = "/v2/chat/completions"
    target = path if where == "the same server" else other.url + path
    server = serve(lambda number, body: (status, {"Location": target}, ""))
    full = server.url + path if where == "the same server" else target
    said = rf"^the judge at {server.url}/v1/chat/completions sends on to {full} \(HTTP {status}\)"
    with pytest.raises(InputError, match=said) as caught:
        ask(server.url, key="secret")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (server.paths, other.connections) == (["/v1/chat/completions"], 0)
    assert ask(other.url, key="secret") == ("[[9]]", [])  # where it is meant, it is asked
    assert (other.connections, other.headers[0]["Authorization"]) == (1, "Bearer secret")


def test_a_redirect_that_repeats_the_key_or_leads_nowhere_shows_none(serve):
    server = serve(lambda number, body: (302, {"Location": "http://other/?key=secret"}, ""))
    with pytest.raises(InputError, match=r"sends on to http://other/\?key=\*\*\* \(HTTP 302\)"):
        ask(server.url, key="secret")
    server = serve(lambda number, body: (302, {"Location": "http://other:secret/"}, ""))
    # httpx2 up to 2.8, at least, refuses the address itself.
    refused = r"sends on to http://other:\*\*\*/ |Invalid port: '\*\*\*'"
    with pytest.raises(InputError, match=refused):
        ask(server.url, key="secret")
    server = serve(lambda number, body: (302, {}, ""))
    with pytest.raises(InputError, match=r"refused the request: HTTP 302; check"):
        ask(server.url, key="secret")


@pytest.mark.parametrize("key", ["secret\n", "two secrets", "clé secret", "secret\0"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(key):
    with pytest.raises(InputError, match=r"--judge-key-env.*set the variable again") as caught:
        Judge("http://localhost", "judge", key)
    assert "secret" not in str(caught.value)


def test_a_password_in_the_address_is_refused_unseen():
    with pytest.raises(InputError, match=r"leave it out.*--judge-key-env") as caught:
        Judge("http://me:secret@localhost:8000", "judge")
    assert "secret" not in str(caught.value)


def test_a_proxy_that_cannot_be_used_is_named(serve, monkeypatch):
    server = serve(lambda number, body: completion("[[1]]"))
    monkeypatch.setenv("HTTP_PROXY", "gopher://localhost:70")
    with pytest.raises(InputError, match=r"proxies or certificates .*gopher://localhost:70"):
        ask(server.url, key="secret")
    assert server.connections == 0


def test_what_cannot_be_decompressed_is_asked_again(serve):
    packed = (200, {"Content-Encoding": "gzip"}, "no gzip")
    server = serve(lambda number, body: [packed, completion("[[2]]")][number - 1])
    assert ask(server.url) == ("[[2]]", [1])


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "http://", "", "http://host:port"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError, match="--judge-url"):
        Judge(url, "judge")


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Good.\n[[8]]", 8.0),
        ("[[7.5]]", 7.5),
        ("[[ 10 ]]", 10.0),
        ("A [[1]] would be harsh. [[6]]", 6.0),
        ("I cannot judge this.", None),
        ("8", None),
        ("[8]", None),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_a_rating_is_read_and_never_guessed(reply, rating):
    assert rating_of(reply) == rating


def test_the_judge_sees_turns_answers_and_references():
    _, asked = judge_messages(["two?", "and three?"], ["2"], ["2", "3"])
    assert [s in asked["content"] for s in ("two?", "A right answer to turn 1\n2")] == [True, True]
    assert "and three?" not in asked["content"]
    _, asked = judge_messages(["two?", "and three?"], ["2", "4"], ["", "3"])
    assert "A right answer to turn 1" not in asked["content"]
    assert "A right answer to turn 2\n3" in asked["content"]
    assert "answer in turn 2 only" in asked["content"]


QUESTIONS = [
    {"question_id": 1, "category": "math", "turns": ["a b", "c"], "reference": ["d", ""]},
    {"question_id": 2, "category": "writing", "turns": ["e f g", "h i"]},
    {"question_id": 3, "category": "math", "turns": ["j"]},
]


def questions_file(folder: Path, rows: list | None = None) -> Path:
    path = folder / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or QUESTIONS))
    return path


@pytest.mark.parametrize("chat", [False, True])
def test_answers_of_a_turn_follow_the_turn_before(tmp_path, chat):
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer(chat=chat)
    questions = read_bench(questions_file(tmp_path))
    with ItemLog(tmp_path / "a.jsonl", {}) as log:
        answer_questions(model, tokenizer, questions, log, Decoding(3), runs=2)
    assert set(log.items) == {f"{run}/{n}" for run in (0, 1) for n in (1, 2, 3)}
    first, second = log.items["0/1"]["answers"]
    start = f"Question: a b\nAnswer: {first} </s> Question: c\nAnswer:"
    if chat:
        start = f"<s> <user> a b <assistant> {first} </s> <user> c <assistant>"
    tokens = tokenizer(start, add_special_tokens=False).input_ids
    for _ in range(3):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    expected = tokenizer.decode(tokens[-3:], skip_special_tokens=True)
    assert second == expected.strip()
    assert len(log.items["0/3"]["answers"]) == 1
    assert log.items["0/1"] == log.items["1/1"]  # mathematics is greedy ...
    assert log.items["0/2"] != log.items["1/2"]  # ... and writing is sampled


def test_a_resumed_evaluation_draws_the_same(tmp_path, monkeypatch):
    model, tokenizer = zoo.tiny("llama"), zoo.tokenizer()
    rows = [{"question_id": i, "category": "writing", "turns": [w]} for i, w in enumerate("abcde")]
    questions = read_bench(questions_file(tmp_path, rows))
    monkeypatch.setattr("kfade.evaluate.mt_bench.BLOCK", 2)
    decoding = Decoding(4, 8)
    with ItemLog(tmp_path / "whole.jsonl", {}) as whole:
        answer_questions(model, tokenizer, questions, whole, decoding)
    with ItemLog(tmp_path / "cut.jsonl", {}) as cut:
        for key in ("0/0", "0/1", "0/2"):  # cut off within the second block
            cut.add(key, **whole.items[key])
        answer_questions(model, tokenizer, questions, cut, decoding)
    assert cut.items == whole.items
    with ItemLog(tmp_path / "other.jsonl", {}) as other:  # nor do the other questions matter
        answer_questions(model, tokenizer, [questions[3], questions[1]], other, decoding)
    assert other.items == {key: whole.items[key] for key in ("0/3", "0/1")}


def test_without_a_chat_template_an_answer_ends_before_the_next_question(tmp_path, monkeypatch):
    said = " yes \nQuestion: and you?\nAnswer: no"
    monkeypatch.setattr(
        "kfade.evaluate.mt_bench.generate_texts",
        lambda model, tok, prompts, _: [said] * len(prompts),
    )
    questions = read_bench(questions_file(tmp_path))
    model = zoo.tiny("llama")
    required = ChatTemplate(enabled=True)
    with ItemLog(tmp_path / "plain.jsonl", {}) as log:
        with pytest.raises(InputError, match="no chat template"):
            answer_questions(model, zoo.tokenizer(), questions, log, template=required)
        answer_questions(model, zoo.tokenizer(), questions, log)
    assert log.items["0/1"]["answers"] == ["yes", "yes"]
    with ItemLog(tmp_path / "chat.jsonl", {}) as log:  # a chat model may well say "Question:"
        answer_questions(model, zoo.tokenizer(chat=True), questions, log)
    assert log.items["0/1"]["answers"] == [said.strip()] * 2


def test_judging_goes_on_where_it_failed(serve, tmp_path):
    questions = [BenchQuestion("1", "math", ("a", "b"), ("x",)), BenchQuestion("2", "stem", ("c",))]
    answers = {"0/1": {"answers": ["p", "q"]}, "0/2": {"answers": ["r"]}}
    replies = [completion("[[8]]"), (403, {}, ""), completion("no"), completion("[[4]]")]
    server = serve(lambda number, body: replies[number - 1])
    judge = Judge(server.url, "judge")
    path = tmp_path / "items.jsonl"
    with pytest.raises(InputError, match="HTTP 403"), ItemLog(path, {}) as log:
        judge_answers(judge, questions, answers, log)
    with ItemLog(path, {}) as log:
        assert list(log.items) == ["0/1/1"]
        judge_answers(judge, questions, answers, log)
    assert {key: item["rating"] for key, item in log.items.items()} == {
        "0/1/1": 8.0, "0/1/2": None, "0/2/1": 4.0,
    }  # fmt: skip
    assert log.items["0/1/2"]["reply"] == "no"
    assert len(server.requests) == 4


def test_the_summary_is_that_of_paper():
    def judged(rating, category):
        return {"rating": rating, "category": category}

    summary = summarise_ratings(
        {
            "0/1/1": judged(8.0, "math"),
            "0/1/2": judged(4.0, "math"),
            "0/2/1": judged(6.0, "stem"),
            "1/1/1": judged(9.0, "math"),
            "1/1/2": judged(None, "math"),
            "1/2/1": judged(5.0, "stem"),
        }
    )
    assert summary["score"] == pytest.approx(32 / 5)
    assert summary["by_run"] == {"0": 6.0, "1": 7.0}
    assert summary["standard_error"] == pytest.approx(0.5)  # s = √(1/2) over √2 runs
    assert summary["by_turn"] == {"1": 7.0, "2": 4.0}
    assert summary["by_category"] == {"math": 7.0, "stem": 5.5}
    spread = statistics.stdev([7.0, 5.5]) / 2**0.5
    assert summary["standard_error_questions"] == pytest.approx(spread)
    assert (summary["judged"], summary["unrated"]) == (6, 1)
    assert summary["cut_off"] == 0
    nothing = summarise_ratings({"0/1/1": {**judged(None, "math"), "cut_off": True}})
    assert nothing["cut_off"] == 1
    assert nothing["score"] is nothing["standard_error"] is None
    assert nothing["unrated"] == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question_id": 1, "category": "math"}], "line 1: write"),
        ([{"question_id": 1, "category": "math", "turns": []}], "line 1: write"),
        ([{"question_id": 1, "category": "math", "turns": [3]}], "line 1: write"),
        ([{**QUESTIONS[0], "reference": "d"}], "line 1: write"),
        ([QUESTIONS[0], QUESTIONS[0]], "line 2: question_id 1 is used twice"),
        (["x"], "line 1: write"),
    ],
)
def test_malformed_questions_are_named(tmp_path, rows, said):
    with pytest.raises(InputError, match=said):
        read_bench(questions_file(tmp_path, rows))


def test_references_come_from_a_file_of_their_own(tmp_path):
    path = questions_file(tmp_path)
    plain = read_bench(path)
    right = tmp_path / "gpt-4.jsonl"
    row = {"answer_id": "x", "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["e", "f"]}]}
    both = [{"question_id": int(question.id), **row} for question in plain[:2]]
    right.write_text("".join(json.dumps(line) + "\n" for line in both))
    first, *others = read_bench(path, right)
    assert first.references == ("e", "f")
    assert others == plain[1:]  # the second is to write: no answer is the right one
    asked = judge_messages(first.turns, ["said"], first.references)[1]["content"]
    assert "### A right answer to turn 1\ne" in asked
    right.write_text(json.dumps({"question_id": 999, **row}) + "\n")
    with pytest.raises(InputError, match="answers none of the questions"):
        read_bench(path, right)
    right.write_text(json.dumps({"question_id": 1, "choices": []}) + "\n")
    with pytest.raises(InputError, match=r"gpt-4\.jsonl, line 1: write"):
        read_bench(path, right)


def test_an_empty_file_of_questions_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no questions"):
        read_bench(tmp_path / "q.jsonl")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    zoo.save(path, chat=True)
    return path


def bench(model_dir: Path, folder: Path, url: str, *more: str, judge: str = "j") -> int:
    return main(
        [
            *("eval", "mt-bench", str(model_dir), "--questions", str(questions_file(folder))),
            *("--judge-url", url, "--judge-model", judge, "--out", str(folder / "out")),
            *("--max-new-tokens", "3", *more),
        ]
    )


def test_the_command_from_end_to_end(model_dir, serve, tmp_path, monkeypatch, capsys):
    def reply(number: int, body: dict) -> tuple[int, dict, str]:
        if number == 2:
            return 401, {}, "the key has run out"
        return completion("no verdict" if number == 3 else f"[[{2 + number % 3}]]")

    server = serve(reply)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    options = ["--runs", "2", "--judge-key-env", "JUDGE_KEY"]
    assert bench(model_dir, tmp_path, server.url, *options) == 2
    assert "HTTP 401 (the key has run out)" in capsys.readouterr().err
    # The same server under another address: where the judge is decides no number.
    assert bench(model_dir, tmp_path, server.url + "/v1", *options, "--resume", "--json") == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    said = " ".join(captured.err.split())
    assert "1 of 10 replies of the judge contained no [[rating]] from 1 to 10" in said
    assert (printed["judged"], printed["unrated"]) == (10, 1)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"items.jsonl", "answers.jsonl", "metrics.json", "manifest.json"}
    items = read_log(out / "items.jsonl").items
    ratings = [item["rating"] for item in items.values() if item["rating"] is not None]
    assert printed["score"] == pytest.approx(statistics.fmean(ratings))
    assert len(read_log(out / "answers.jsonl").items) == 6
    assert len(server.requests) == 11  # one was refused; nothing was judged twice
    assert not any("secret" in path.read_text() for path in out.iterdir())
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_all_replies_without_a_rating(model_dir, serve, tmp_path, capsys):
    server = serve(lambda number, body: completion(None))
    assert bench(model_dir, tmp_path, server.url) == 0
    assert "no reply of the judge contained a rating" in capsys.readouterr().err


def test_a_key_that_is_not_set_is_told(model_dir, tmp_path, capsys):
    assert bench(model_dir, tmp_path, "http://127.0.0.1:9", "--judge-key-env", "NO_SUCH_KEY") == 2
    assert "NO_SUCH_KEY: this environment variable is not set" in capsys.readouterr().err
    assert not (tmp_path / "out.part").exists()


@pytest.mark.slow
def test_transformers_own_server_is_a_judge(model_dir, tmp_path):
    """A tiny random model grades nothing: what is shown is that the API is spoken."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("needs the server of transformers: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, name = f"http://127.0.0.1:{port}", str(model_dir)
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the server stopped"
                time.sleep(1)
        messages = judge_messages(["a b"], ["c"], [])
        reply = Judge(url, name, max_tokens=5, tries=1).ask(messages)
        assert (
            bench(model_dir, tmp_path, url, "--limit", "1", "--judge-max-tokens", "5", judge=name)
            == 0
        )
    finally:
        server.terminate()
        server.wait(30)
    model, tokenizer = load_model(name)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    expected = greedy(model, prompt, [2], 5)
    assert reply.text.split() == tokenizer.decode(expected, skip_special_tokens=True).split()
    assert reply.text.strip()
    assert reply.cut_off
    items = read_log(tmp_path / "out" / "items.jsonl").items
    assert [item["rating"] for item in items.values()] == [None, None]
    assert all(item["reply"].strip() for item in items.values())
