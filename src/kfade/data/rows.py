"""Read rows of data, whatever they hold: a file of JSON, a folder, or a data set from the hub.

FILE                        JSON lines, or one JSON list
FOLDER                      what ``datasets`` saved to disk, or files of a kind that it reads
hf:NAME[:CONFIG][:SPLIT]    a data set of the hub (or a folder); SPLIT as in ``train``,
                            ``train[:1000]``, ``train[10%:20%]`` or ``train+test``

The first n rows of a split, ``train[:n]``, are streamed: no more of it is downloaded.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kfade.errors import InputError, first_line
from kfade.runtime.progress import no_bars, waiting

SOURCES = "a JSONL file, a folder, or hf:NAME[:CONFIG][:SPLIT]"
SPELLING = "hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, with SPLIT as in train[:1000]"
Rows = list[tuple[str, Any]]
"""(where, row) pairs; ``where`` names the line or the number of the row, for messages."""
# The two ends of a slice, each in rows or in percent.
ENDS = re.compile(r"\[(-?\d[\d_]*)(%?):(-?\d[\d_]*)(%?)\]")
# Rows of a split from one number to another, both counted from the beginning.
FROM_TO = re.compile(r"(?P<split>[^\[\]+]+)\[(?P<first>[\d_]*):(?P<last>\d[\d_]*)\]")


def read_rows(source: str, limit: int | None = None) -> Rows:
    """The rows of a source as above, at most ``limit`` of them.

    Raises:
        InputError: nothing there, not JSON, text that is not Unicode, a data set that cannot be
            loaded.
    """
    if not is_file(source):
        return _set_rows(source, limit)
    rows = _file_rows(Path(source), limit)
    for where, row in rows:
        check_unicode(row, where)
    return rows


def is_file(source: str) -> bool:
    """Whether a source is a file, whose lines the user can correct, and not a data set."""
    return not source.startswith("hf:") and not Path(source).is_dir()


def read_utf8(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        InputError: it is not UTF-8.
    """
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: compressed by gzip; unpack it first, with gunzip")
    if data.startswith(b"PAR1"):
        raise InputError(f"{path}: a Parquet file; put it into a folder and give that folder")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def check_unicode(value: Any, where: str) -> None:
    """Raises InputError where a JSON value holds a string that no tokenizer can read.

    JSON can hold half of a surrogate pair, as in ``"\\ud83d"``, which is not a character.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ord(error.object[error.start])
        raise InputError(
            f"{where}: \\u{half:04x} without the other half of its pair is not a character "
            "(a lone surrogate); remove or correct it"
        ) from None


def _file_rows(path: Path, limit: int | None) -> Rows:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give {SOURCES}")
    text = read_utf8(path)
    if text.lstrip().startswith("["):
        found = _parse(text, str(path), "give JSON lines, or one JSON list of objects")
        return [(f"{path}, row {index}", row) for index, row in enumerate(found[:limit])]
    rows: Rows = []
    # Not splitlines(): JSON strings may hold line separators such as U+2028 as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if len(rows) == limit:
            break
        if line.strip():
            where = f"{path}, line {number}"
            rows.append((where, _parse(line, where, "each line must hold one JSON object")))
    return rows


def _parse(text: str, where: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if error.lineno > 1:
            place = f"line {error.lineno}, {place}"
        raise InputError(f"{where}: not valid JSON ({error.msg} at {place}); {wanted}") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply to be read; {wanted}") from None
    except ValueError as error:  # a number of more digits than Python takes
        raise InputError(f"{where}: JSON that cannot be read ({error})") from None


def _set_rows(source: str, limit: int | None) -> Rows:
    """Rows of a data set; errors of ``datasets`` and of what it builds on are quoted."""
    name, rest = _parts(source)
    try:
        import datasets  # an optional extra, and slow to import
    except ImportError:
        raise InputError(
            f"{source}: reading data sets needs the package datasets: pip install 'kfade[hub]'"
        ) from None
    try:
        with no_bars(), waiting(f"loading {source}"):
            config, split = _config_and_split(datasets, name, rest)
            if _is_saved(name):
                rows = _saved(datasets, name, split)
            else:
                rows = _loaded(datasets, name, config, split)
            first = itertools.islice(rows, limit)  # where rows are streamed, no more is downloaded
            return [(f"{source}, row {index}", row) for index, row in enumerate(first)]
    except Exception as error:
        raise InputError(
            f"{source}: the data set could not be loaded ({first_line(error)}); check the name, "
            "the configuration and the split, or download it and give a JSONL file"
        ) from None


def _parts(source: str) -> tuple[str, list[str]]:
    """(name or folder of a data set, configuration and split as far as they are given)."""
    given = source.removeprefix("hf:")
    pieces = re.split(r":(?![^\[]*\])", given)  # not at the colon of a slice
    for count in range(len(pieces), 0, -1):  # a folder's name may hold colons and brackets
        folder = Path(":".join(pieces[:count])).expanduser()
        if pieces[0] and folder.is_dir():
            pieces = [str(folder), *pieces[count:]]
            break
    else:
        if "[" in pieces[0]:
            raise InputError(f"{source}: a slice belongs to a split; write {SPELLING}")
    if not all(pieces) or len(pieces) > 3:
        raise InputError(f"{source}: write {SPELLING}")
    if len(pieces) > 1:
        _check_slices(source, pieces[-1])
    return pieces[0], pieces[1:]


def _check_slices(source: str, split: str) -> None:
    """Raises InputError for slices that ``datasets`` misreads: of two units, or without rows."""
    for found in ENDS.finditer(split):
        first, last = int(found[1]), int(found[3])
        if found[2] != found[4] and first:
            raise InputError(
                f"{source}: {found[0]} has one end in rows and one in percent; give both in one "
                "unit"
            )
        if first >= last and (first < 0) == (last < 0):
            raise InputError(f"{source}: {found[0]} holds no rows; give a later end")


def _config_and_split(datasets: Any, name: str, rest: list[str]) -> tuple[str | None, str]:
    if len(rest) == 2:
        return rest[0], rest[1]
    if not rest:
        return None, "train"
    # One word after the name is a configuration if the data set has one of that name, else a split.
    is_word = not re.search(r"[\[+]", rest[0])
    if is_word and not _is_saved(name) and rest[0] in datasets.get_dataset_config_names(name):
        return rest[0], "train"
    return None, rest[0]


def _is_saved(name: str) -> bool:
    """Whether a name is a folder that ``save_to_disk`` wrote: of one split, or of several."""
    return any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))


def _saved(datasets: Any, name: str, split: str) -> Iterable[Any]:
    found = datasets.load_from_disk(name)
    if isinstance(found, datasets.Dataset):  # one split: it may be called train, or by its own name
        found = {"train": found, str(found.split or "train"): found}
    instruction = datasets.ReadInstruction.from_spec(split)
    parts = instruction.to_absolute({key: len(rows) for key, rows in found.items()})
    return itertools.chain.from_iterable(
        found[part.splitname].select(range(part.from_, part.to)) for part in parts
    )


def _loaded(datasets: Any, name: str, config: str | None, split: str) -> Iterable[Any]:
    wanted = FROM_TO.fullmatch(split)
    offline = datasets.config.HF_HUB_OFFLINE and not Path(name).is_dir()
    if wanted is None or offline:  # the cache cannot be streamed
        return datasets.load_dataset(name, config, split=split)
    first, last = int(wanted["first"] or 0), int(wanted["last"])
    rows = datasets.load_dataset(name, config, split=wanted["split"], streaming=True)
    return rows.skip(first).take(max(0, last - first))
