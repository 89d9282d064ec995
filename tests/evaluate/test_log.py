"""The log of an evaluation: written item by item, resumed, read."""

import pytest

from kfade.errors import InputError
from kfade.evaluate.item_log import ItemLog
from kfade.evaluate.log import read_log

HEADER = {"benchmark": "kl", "model": "m"}


def test_round_trip(tmp_path):
    path = tmp_path / "items.jsonl"
    with ItemLog(path, HEADER) as log:
        log.add("0", kl=0.5, tokens=[1, 2])
        log.add("1", kl=0.25, tokens=[])
        log.finish({"mean": 0.375})
    read = read_log(path)
    assert read.header["benchmark"] == "kl"
    assert read.items == {"0": {"kl": 0.5, "tokens": [1, 2]}, "1": {"kl": 0.25, "tokens": []}}
    assert read.aggregate == {"mean": 0.375}


def test_an_interrupted_log_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "items.jsonl"
    with ItemLog(path, HEADER) as log:
        log.add("0", kl=0.5)
    with path.open("a") as file:
        file.write('{"item": "1", "k')
    with pytest.raises(InputError, match="interrupted"):
        read_log(path)
    with ItemLog(path, HEADER) as log:
        assert list(log.items) == ["0"]
        log.add("1", kl=0.25)
        log.finish({})
    assert list(read_log(path).items) == ["0", "1"]


def test_another_evaluation_is_not_continued(tmp_path):
    path = tmp_path / "items.jsonl"
    with ItemLog(path, HEADER) as log:
        log.add("0", kl=0.5)
    with pytest.raises(InputError, match="with other options"):
        ItemLog(path, {**HEADER, "model": "other"})


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "not an evaluation log"), ('{"a": 1}\n', "not an evaluation log"), ("x\n{}\n", "line 1")],
)
def test_what_is_not_a_log_is_refused(tmp_path, content, said):
    path = tmp_path / "items.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        read_log(path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(InputError, match=r"items\.jsonl: not UTF-8 text"):
        read_log(path)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(InputError, match="no such evaluation log"):
        read_log(tmp_path / "none.jsonl")
