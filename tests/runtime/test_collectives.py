"""All processes issue the same collectives in the same order, none of them on objects.

With gloo another order often goes well by chance. With NCCL it hangs, or adds up the wrong numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import collectives_worker
import pytest
import torch
import zoo
from processes import run_together

pytestmark = pytest.mark.slow
COUNTS = (2, 3, 4)
ROWS, WEIGHTS = "all_to_all_single", ("all_gather_single", "all_gather_into_tensor")
MORE = {
    "fit": [],
    "unlearn": ["--kl", "0.01", "--refine", "1", "--refine-sequences", "4"],
    "fit, sharded": ["--shard", "--memory", "2GB"],
    "unlearn, sharded": ["--shard", "--kl", "0.01", "--steps", "2", "--recompute"],
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> dict[str, str]:
    """A model of two blocks, and texts of different lengths."""
    folder = tmp_path_factory.mktemp("desk")
    zoo.tiny("llama", dtype=torch.float32).save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(zoo.WORDS[i % 12 : i % 12 + 4 + i % 3]) for i in range(20)]
    for name, own in (("forget", texts[:5]), ("retain", texts[5:])):
        lines = [json.dumps({"text": text}) + "\n" for text in own]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {name: str(folder / name) for name in ("model", "forget.jsonl", "retain.jsonl")}


def words(desk: dict[str, str], kind: str, out: Path) -> list[str]:
    name = kind.split(",")[0]
    forget = ["--forget", desk["forget.jsonl"]] if name == "unlearn" else []
    given = [*forget, "--retain", desk["retain.jsonl"], "--out", str(out)]
    return [name, desk["model"], *given, "--batch-tokens", "16", "--no-pack", *MORE[kind]]


def recorded(count: int, work, folder: Path, *arguments) -> list[list[list]]:
    """The collectives of each process, in their order."""
    run_together(count, work, folder, *arguments, said=folder / "said", timeout=200)
    lines = [(folder / str(rank)).read_text().splitlines() for rank in range(count)]
    return [[json.loads(line) for line in own] for own in lines]


def refuse_disorder(found: list[list[list]]) -> None:
    """Fails where processes issue different collectives, or any on objects."""
    assert found[0]
    for own in found[1:]:
        for number, (ours, theirs) in enumerate(zip(own, found[0], strict=False)):
            assert ours == theirs, f"collective {number} differs"
        assert len(own) == len(found[0])
    assert not {name for name, *_ in found[0] if "object" in name}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", MORE)
def test_processes_issue_the_same_collectives(desk, tmp_path, kind, count):
    given = words(desk, kind, tmp_path / "out")
    found = recorded(count, collectives_worker.command, tmp_path, given)
    refuse_disorder(found)
    names = [name for name, *_ in found[0]]
    assert not {"send", "recv", "isend", "irecv"} & {*names}
    groups = {(name, group) for name, _, _, group, _ in found[0]}
    rows = {group for name, group in groups if name == ROWS}
    gathered = {group for name, group in groups if name in WEIGHTS}
    # Rows, and the layers of vectors, have a group of their own beside that of FSDP's weights.
    assert len(rows) == len(gathered - rows) == ("sharded" in kind)
    if kind == "fit, sharded":
        # In the backward pass the next block's weights come before this block's rows are sent.
        ours = [name in WEIGHTS for name in names if name in (ROWS, *WEIGHTS)]
        assert (False, True, True, False) in zip(ours, ours[1:], ours[2:], ours[3:], strict=False)


def test_another_order_is_noticed(tmp_path):
    """Negative control: a call that depends on the rank."""
    found = recorded(2, collectives_worker.in_other_order, tmp_path)
    with pytest.raises(AssertionError, match="collective 0 differs"):
        refuse_disorder(found)
    refuse_disorder([found[0], found[0]])


def test_a_collective_on_objects_is_noticed(tmp_path):
    """Negative control."""
    found = recorded(2, collectives_worker.with_objects, tmp_path)
    with pytest.raises(AssertionError, match="all_gather_object"):
        refuse_disorder(found)


def test_a_resumed_choice_is_the_same_in_all_processes(tmp_path):
    refuse_disorder(recorded(2, collectives_worker.settled, tmp_path))
