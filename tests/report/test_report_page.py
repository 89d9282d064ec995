"""The page and its files as ``kfade report`` writes them."""

import json
import re
from html.parser import HTMLParser

import pytest
import report_data as data
import zoo

from kfade.cli import main
from kfade.report.names import short

pytest.importorskip("plotly", reason="the page needs plotly: pip install 'kfade[report]'")
pytest.importorskip("jinja2", reason="the page needs jinja2: pip install 'kfade[report]'")

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Elements(HTMLParser):
    """Collects elements, and checks that each is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.seen if name == tag]


def written(folder, *arguments) -> str:
    out = folder / "report.html"
    assert main(["report", *map(str, arguments), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    page = written(tmp_path, *data.write_everything(tmp_path / "in"))
    elements = Elements(page)
    assert not any("src" in attributes for _, attributes in elements.seen)
    assert [link["href"] for link in elements.named("link")] == ["data:,"]
    (policy,) = [m["content"] for m in elements.named("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy
    nonce = re.search(r"'nonce-(\w+)'", policy).group(1)
    assert [script["nonce"] for script in elements.named("script")] == [nonce] * 3
    anchors = {a["href"] for a in elements.named("a")}
    ids = {f"#{attributes['id']}" for _, attributes in elements.seen if "id" in attributes}
    assert anchors <= ids
    assert len(elements.named("figure")) == 9
    heads = [th for th in elements.named("th") if "aria-sort" in th]
    assert len(heads) == 9 + 10


def test_what_kfade_unlearn_writes(tmp_path, monkeypatch):
    """The folders of the other tests are made up; this one is real, of a tiny model."""
    monkeypatch.chdir(tmp_path)
    zoo.save("MODEL")
    forget = [{"prompt": f"a b {x}", "completion": " d e"} for x in "fghi"]
    retain = [{"text": f"{x} k l m n o p q r s {y}"} for x in "abcdef" for y in "xyz"]
    for name, rows in (("forget", forget), ("retain", retain)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = "unlearn MODEL --forget forget.jsonl --retain retain.jsonl --sequence-length 8"
    options = ["--steps", "2", "--bound", "2"]  # by default there is none on such text
    assert main([*command.split(), *options, "--out", "run"]) == 0
    page = written(tmp_path, "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "K-FADE, kfac, margin, bound 2, corrected 1, on MODEL." in page
    assert f">{short(metrics['retain_kl'])}<" in page
    figures = [figure["id"] for figure in Elements(page).named("figure")]
    assert figures == [
        f"figure-{key}"
        for key in ("kl-forgetting", "predicted-measured", "update-blocks", "seconds", "memory")
    ]


def test_hostile_text_stays_text(tmp_path):
    steps = [data.step()]
    data.write_run(tmp_path / "in" / "run", steps=steps, model=data.HOSTILE)
    data.write_kl(tmp_path / "in" / "run" / "eval-kl", tmp_path / "in" / "run")
    page = written(tmp_path, tmp_path / "in", "--title", data.HOSTILE)
    assert data.HOSTILE not in page
    assert "<img" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    elements = Elements(page)
    assert len(elements.named("script")) == 3
    (content,) = re.findall(r'<script type="application/json".*?>(.*?)</script>', page)
    prompts = [item["prompt"] for item in json.loads(content)["completions"]]
    assert prompts[0] == f"What is {data.HOSTILE}?"  # the highest KL, and the text as it was


def test_what_is_missing_is_left_out_and_said(tmp_path):
    data.write_run(tmp_path / "run")
    (tmp_path / "run" / "eval-kl.part").mkdir()
    page = written(tmp_path, tmp_path / "run")
    elements = Elements(page)
    ids = {attributes.get("id") for _, attributes in elements.seen}
    assert {"summary", "runs", "figures", "provenance"} <= ids
    assert not {"generations", "completions"} & ids
    assert "Attack curves: need the folder of a kfade attack." in page
    assert "eval-kl.part: an interrupted run" in page
    assert "<h1>run</h1>" in page


def test_an_evaluation_alone_makes_a_page(tmp_path):
    data.write_choice(tmp_path / "in", None, 0.75, "general.jsonl")
    page = written(tmp_path, tmp_path / "in")
    assert "general: accuracy by" in page
    assert "75.0 %" in page
    assert "<figure" not in page
    assert "plotly.js v" not in page  # 4.8 MB that would draw nothing


@pytest.mark.slow
def test_figures_for_papers(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'kfade[report]'")
    folders = map(str, data.write_everything(tmp_path / "in"))
    drawn, out = tmp_path / "figures", tmp_path / "new" / "r.html"
    command = ["report", *folders, "--figures", str(drawn), "--out", str(out), "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == out.stat().st_size
    assert told["missing"] == []
    assert len(told["files"]) == 2 * len(told["figures"]) == 18
    for key in told["figures"]:
        svg = (drawn / f"{key}.svg").read_text(encoding="utf-8")
        assert "<text" in svg  # text that can be edited, not outlines
        assert (drawn / f"{key}.png").read_bytes()[:4] == b"\x89PNG"
    before = (drawn / "seconds.svg").read_bytes()
    assert main(command) == 0
    assert (drawn / "seconds.svg").read_bytes() == before  # to the byte


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "r.html")]) == 2
    assert "holds no results" in capsys.readouterr().err
    data.write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "r.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
