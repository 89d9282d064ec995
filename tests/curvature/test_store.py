"""A fit on disk: the numbers of one in memory, read as they are needed; it goes on after any end.

Blocks and fits are compared bit for bit throughout: one process with one thread adds the same rows
in the same order, wherever it was interrupted.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import Counted, flat, random_sequences, same_bits, tiny_llama
from processes import start
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kfade
from kfade import (
    EKFAC,
    KFAC,
    Curvature,
    Damping,
    Diagonal,
    Identity,
    find_targets,
    make_batches,
    sampled_labels,
    square_root_draw,
)
from kfade.curvature import fit as fit_module
from kfade.curvature import store as store_module
from kfade.curvature import sums as sums_module
from kfade.curvature.passes import run_pass

KINDS = [Identity, Diagonal, KFAC, EKFAC]
USUAL = EKFAC()
Store = partial(store_module.Store, device=torch.get_default_device())
SEQUENCES = random_sequences(8)
BUDGET = 20  # positions in a batch
GARBAGE = b"half of something"


@pytest.fixture
def batches():
    return make_batches(SEQUENCES, budget=BUDGET)


def differences(ours: Curvature, theirs: Curvature) -> list[str]:
    """Names of blocks and parts that do not agree to the last bit; [] if all do."""
    assert list(ours.blocks) == list(theirs.blocks)
    found = []
    for name in theirs.blocks:
        for part in ("q_out", "q_in", "eigenvalues"):
            one, other = (getattr(c.blocks[name], part) for c in (ours, theirs))
            if (one is None) != (other is None) or (one is not None and not same_bits(one, other)):
                found.append(f"{name}/{part}")
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut_short(kind, model, batches, targets, fail_at: int, **options) -> None:
    with pytest.raises(RuntimeError, match="cut short"):
        kind(Counted(fail_at)).fit(model, batches, targets, **options)


# --- The same numbers, read as they are needed --------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_on_disk_is_the_fit_in_memory(kind, dtype, grouped, batches, tmp_path):
    model = tiny_llama(dtype)
    targets, estimator = find_targets(model), kind()
    memory = estimator.peak_bytes(targets[0:2]) if grouped else None
    in_memory = estimator.fit(model, batches, targets)
    store = Store(tmp_path, {"model": "tiny"})
    on_disk = estimator.fit(model, batches, targets, memory=memory, store=store)
    count = 4 if grouped and kind is not Identity else 1
    assert files(tmp_path) == [f"curvature-{i:03}.safetensors" for i in range(count)]
    assert on_disk.provenance == {**in_memory.provenance, "model": "tiny"}
    loaded = Curvature.load(tmp_path)
    assert loaded.provenance == on_disk.provenance
    assert differences(on_disk, in_memory) == differences(loaded, in_memory) == []
    other = estimator.fit(model, batches[:-1], targets)
    assert differences(loaded, other) != [] or kind is Identity


def test_steps_and_forms_are_the_same_from_disk(model, targets, batches, tmp_path):
    in_memory = EKFAC().fit(model, batches, targets)
    on_disk = EKFAC().fit(model, batches, targets, store=Store(tmp_path))
    x = {t.name: torch.full(t.shape, 0.1, dtype=torch.float64) for t in targets}
    assert on_disk.quadratic(x) == in_memory.quadratic(x)
    for ours, theirs in (
        (on_disk.matvec(x), in_memory.matvec(x)),
        (
            on_disk.solve(x, damping=Damping()),
            in_memory.solve(x, damping=Damping()),
        ),
    ):
        assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_blocks_are_read_one_at_a_time_and_not_kept(model, targets, batches, tmp_path, monkeypatch):
    EKFAC().fit(model, batches, targets, store=Store(tmp_path))
    read = []

    class Watched:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            self.file.__exit__(*args)

        def metadata(self):
            return self.file.metadata()

        def get_tensor(self, key):
            read.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(store_module, "safe_open", Watched)
    curvature = Curvature.load(tmp_path)
    assert len(curvature.blocks) == 6
    assert list(curvature.blocks) == [target.name for target in targets]
    assert read == []
    gate, up = (f"model.layers.0.mlp.{which}_proj.weight" for which in ("gate", "up"))
    block = curvature.blocks[up]
    # The input basis that gate and up share is in the file once, under the first of them.
    assert read == [f"{up}/q_out", f"{gate}/q_in", f"{up}/eigenvalues"]
    assert curvature.blocks[up].q_out is not block.q_out
    with pytest.raises(KeyError, match="no such layer"):
        curvature.blocks["no such layer"]


def test_shared_bases_are_written_once(model, targets, batches, tmp_path):
    EKFAC().fit(model, batches, targets, store=Store(tmp_path))
    keys = load_file(tmp_path / "curvature-000.safetensors")
    assert len(keys) == 6 + 6 + 4  # grids, output bases, input bases of four distinct inputs


# --- Interrupted by an exception ----------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", [Diagonal, KFAC, EKFAC])
def test_an_interrupted_fit_goes_on_where_it_was(kind, grouped, model, targets, batches, tmp_path):
    """Interrupted in each batch of each pass in turn; no batch is computed twice."""
    memory = kind().peak_bytes(targets[0:2]) if grouped else None
    whole = kind().fit(model, batches, targets)
    total = len(batches) * (2 if kind is EKFAC else 1) * (4 if grouped else 1)
    for fail_at in range(1, total + 1):
        folder = tmp_path / str(fail_at)
        folder.mkdir()
        options = {"memory": memory, "store": Store(folder, seconds=0.0)}
        cut_short(kind, model, batches, targets, fail_at, **options)
        rest = Counted()
        resumed = kind(rest).fit(model, batches, targets, **options)
        assert rest.calls == total - (fail_at - 1)
        assert differences(resumed, whole) == []
        assert not [name for name in files(folder) if not name.startswith("curvature-")]
        # A whole fit is not made again.
        again = Counted()
        assert differences(kind(again).fit(model, batches, targets, **options), whole) == []
        assert again.calls == 0


def test_interrupted_many_times(model, targets, batches, tmp_path):
    store = Store(tmp_path, seconds=0.0)
    for _ in range(2 * len(batches) - 1):
        cut_short(EKFAC, model, batches, targets, 2, store=store)  # one batch each time
    last = Counted()
    resumed = EKFAC(last).fit(model, batches, targets, store=store)
    assert last.calls == 1
    assert differences(resumed, EKFAC().fit(model, batches, targets)) == []


def test_the_kept_sums_are_what_it_goes_on_from(model, targets, batches, tmp_path):
    """Negative control: doubled in the file, they change what comes out."""
    store = Store(tmp_path, seconds=0.0)
    cut_short(KFAC, model, batches, targets, 3, store=store)
    path = tmp_path / "sums-000-covariance-000.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["batches"] == "2"
    save_file({key: 2 * tensor for key, tensor in load_file(path).items()}, path, metadata)
    assert differences(KFAC().fit(model, batches, targets, store=store),
                       KFAC().fit(model, batches, targets)) != []  # fmt: skip


def test_sums_are_kept_every_so_many_seconds(model, targets, batches, tmp_path, monkeypatch):
    clock = itertools.count(0.0, 10.0)  # ten seconds pass between two looks at it
    monkeypatch.setattr(store_module.time, "monotonic", lambda: next(clock))
    cut_short(KFAC, model, batches, targets, 3, store=Store(tmp_path, seconds=1000.0))
    assert files(tmp_path) == []
    rest = Counted()
    KFAC(rest).fit(model, batches, targets, store=Store(tmp_path, seconds=1000.0))
    assert rest.calls == len(batches)  # nothing was kept: from the beginning


@pytest.mark.parametrize(
    ("takes", "expected"),
    # 25 s after the last write, or 30 times what it took, whatever is longer.
    [(0.0, [3, 6, 9, 12]), (0.5, [3, 6, 9, 12]), (2.0, [3, 9]), (8.0, [3])],
)
def test_slow_writes_of_sums_are_rarer(tmp_path, monkeypatch, takes, expected):
    now, saved = 0.0, []

    def write(path, tensors, metadata) -> None:
        nonlocal now
        now += takes
        saved.append(int(metadata["batches"]))

    monkeypatch.setattr(store_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(store_module, "write_tensors", write)
    checkpoint = Store(tmp_path, seconds=25.0).checkpoint(0, {}, "covariance")
    for number in range(1, 13):
        now += 10.0
        if checkpoint.due():
            checkpoint.save(number, {})
    assert saved == expected


def test_bases_that_do_not_repeat_themselves_start_the_eigenvalues_anew(
    model, targets, batches, tmp_path, monkeypatch
):
    """Another thread count or library may turn eigenvectors of equal eigenvalues; Λ summed in
    the old ones must not go on in the new."""
    store = Store(tmp_path, seconds=0.0)
    cut_short(EKFAC, model, batches, targets, len(batches) + 3, store=store)
    plain = sums_module.eigendecompose

    def turned(matrix_DD, name):
        values, vectors = plain(matrix_DD, name)
        return values, vectors.roll(1, dims=1)

    monkeypatch.setattr(sums_module, "eigendecompose", turned)
    rest = Counted()
    resumed = EKFAC(rest).fit(model, batches, targets, store=store)
    assert rest.calls == len(batches)  # both batches of Λ again, none of the covariances
    assert differences(resumed, EKFAC().fit(model, batches, targets)) == []
    assert files(tmp_path) == ["curvature-000.safetensors"]


# --- Finished groups ----------------------------------------------------------------------------


def test_finished_groups_are_not_fitted_again(model, targets, batches, tmp_path, monkeypatch):
    passes = []

    def counting(model, batches, targets, *rest, **head):
        passes.append(targets[0].name.split("layers.")[1])
        return run_pass(model, batches, targets, *rest, **head)

    monkeypatch.setattr(fit_module, "run_pass", counting)
    store, memory = Store(tmp_path, seconds=0.0), EKFAC().peak_bytes(targets[0:2])
    # Two passes a group: cut short in the second pass of the third.
    fail_at = 5 * len(batches) + 2
    cut_short(EKFAC, model, batches, targets, fail_at, store=store, memory=memory)
    first = ["0.mlp.gate_proj.weight", "0.mlp.down_proj.weight"]
    second = ["1.mlp.gate_proj.weight", "1.mlp.down_proj.weight"]
    assert passes == [name for name in [*first, second[0]] for _ in range(2)]
    finished = {f"curvature-00{i}.safetensors" for i in (0, 1)}
    assert finished < set(files(tmp_path))
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in finished}
    passes.clear()
    resumed = EKFAC().fit(model, batches, targets, store=store, memory=memory)
    assert passes == [name for name in second for _ in range(2)]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == before
    assert differences(resumed, EKFAC().fit(model, batches, targets)) == []


# --- What another fit has left is refused -------------------------------------------------------

OTHER = {
    "seed": {"seed": 1},
    "draw": {"estimator": EKFAC(sampled_labels)},
    "data": {"sequences": random_sequences(8, seed=5)},
    "estimator": {"estimator": Diagonal()},
    "model": {"provenance": {"weights": "b"}},
    "groups": {"memory": 8 * 1600},
}


def fit_here(folder, model, targets, *, estimator=USUAL, sequences=SEQUENCES, budget=BUDGET,
             provenance=None, **options):  # fmt: skip
    store = Store(folder, provenance or {"weights": "a"}, seconds=0.0)
    batches = make_batches(sequences, budget=budget)
    return estimator.fit(model, batches, targets, store=store, **options)


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_a_finished_group_of_another_fit_is_refused(other, model, targets, tmp_path):
    whole = fit_here(tmp_path, model, targets)
    with pytest.raises(kfade.InputError, match=r"of another fit .* differ"):
        fit_here(tmp_path, model, targets, **other)
    assert differences(fit_here(tmp_path, model, targets), whole) == []


@pytest.mark.parametrize("what", [*(k for k in OTHER if k != "estimator"), "processes"])
def test_sums_of_another_fit_are_refused(what, model, targets, batches, tmp_path, monkeypatch):
    store = Store(tmp_path, {"weights": "a"}, seconds=0.0)
    cut_short(EKFAC, model, batches, targets, 3, store=store)
    left = files(tmp_path)
    assert left == ["sums-000-covariance-000.safetensors"]
    with monkeypatch.context() as patch:
        if what == "processes":
            patch.setattr(store_module.distributed, "count", lambda: 2)
        options = OTHER.get(what, {})
        with pytest.raises(kfade.InputError, match=r"sums of another fit .* differ"):
            fit_here(tmp_path, model, targets, **options)
    assert files(tmp_path) == left
    assert (
        differences(fit_here(tmp_path, model, targets), EKFAC().fit(model, batches, targets)) == []
    )


def test_sums_over_other_batches_are_begun_anew(model, targets, batches, tmp_path):
    store = Store(tmp_path, {"weights": "a"}, seconds=0.0)
    cut_short(EKFAC, model, batches, targets, 3, store=store)
    draw = Counted()
    small = make_batches(SEQUENCES, budget=BUDGET // 2)
    assert len(small) > len(batches)
    fitted = fit_here(tmp_path, model, targets, budget=BUDGET // 2, estimator=EKFAC(draw))
    assert draw.calls == 2 * len(small)
    assert differences(fitted, EKFAC().fit(model, small, targets)) == []


def test_a_second_step_does_not_take_the_first_ones_curvature(model, tmp_path):
    """With one folder for all steps, which are fitted at other weights."""
    data = {"retain": SEQUENCES, "held_out": random_sequences(3, seed=1)}
    options = {"forget": random_sequences(3, seed=2), "alpha": 0.1, "fit": KFAC()}
    options["store"] = lambda model, targets: Store(tmp_path)
    kfade.unlearn(model, **data, **flat(**options))
    with pytest.raises(kfade.InputError, match="of another fit"):
        kfade.unlearn(model, **data, **flat(steps=2, **options))


# --- Files that are not whole -------------------------------------------------------------------


def test_half_a_file_is_never_taken_for_a_whole_one(model, targets, batches, tmp_path):
    store = Store(tmp_path, seconds=0.0)
    cut_short(EKFAC, model, batches, targets, 3, store=store)
    sums = tmp_path / "sums-000-covariance-000.safetensors"
    kept = sums.read_bytes()
    for length in (0, 5, len(kept) // 2, len(kept) - 1):
        sums.write_bytes(kept[:length])
        with pytest.raises(kfade.InputError, match=r"sums-000.*not a whole safetensors file"):
            EKFAC().fit(model, batches, targets, store=store)
    sums.write_bytes(kept)
    whole = EKFAC().fit(model, batches, targets, store=store)
    group = tmp_path / "curvature-000.safetensors"
    kept = group.read_bytes()
    for length in (0, 5, len(kept) // 2, len(kept) - 1):
        group.write_bytes(kept[:length])
        with pytest.raises(kfade.InputError, match=r"curvature-000.*not a whole .* file"):
            EKFAC().fit(model, batches, targets, store=store)
        with pytest.raises(kfade.InputError, match=r"curvature-000.*not a whole .* file"):
            Curvature.load(tmp_path)
    group.write_bytes(kept)
    assert differences(EKFAC().fit(model, batches, targets, store=store), whole) == []


def test_what_was_being_written_is_not_read(model, targets, batches, tmp_path):
    """A file is written aside; a kill leaves its half there."""
    store = Store(tmp_path, seconds=0.0)
    cut_short(EKFAC, model, batches, targets, 3, store=store)
    for name in ("sums-000-covariance-000", "sums-000-lambda-1-000", "curvature-000"):
        (tmp_path / f"{name}.safetensors.writing").write_bytes(GARBAGE)
    resumed = EKFAC().fit(model, batches, targets, store=store)
    assert differences(resumed, EKFAC().fit(model, batches, targets)) == []
    assert files(tmp_path) == ["curvature-000.safetensors"]
    (tmp_path / "curvature-001.safetensors.writing").write_bytes(GARBAGE)
    assert differences(Curvature.load(tmp_path), resumed) == []


# --- Killed -------------------------------------------------------------------------------------


def slow_fit(folder: Path, renames: int, count: int) -> None:
    """A fit that kills itself in place of its ``renames``-th renaming of a file."""
    rename, done = os.replace, 0

    def replace(*paths):
        nonlocal done
        done += 1
        if done == renames:  # written, but not yet in its place
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    def slow(p_NV, key_N):
        time.sleep(0.02)
        return square_root_draw(p_NV, key_N)

    slow.__name__ = "square_root_draw"
    os.replace = replace
    model = tiny_llama()
    batches = make_batches(random_sequences(count), budget=BUDGET)
    store = Store(folder, seconds=0.0)
    EKFAC(slow).fit(model, batches, find_targets(model), store=store)


def test_a_killed_fit_goes_on_where_it_was(model, targets, tmp_path, tmp_path_factory):
    """Twice by SIGKILL, which no handler sees: at a random moment, and between writing a file and
    renaming it."""
    count, said = 60, tmp_path_factory.mktemp("said")
    batches = make_batches(random_sequences(count), budget=BUDGET)
    process = start(slow_fit, tmp_path, 0, count, said=said)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("sums-*.safetensors")):
        assert process.exitcode is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.uniform(0.0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    after_one = batches_kept(tmp_path)
    assert 1 <= after_one < len(batches)
    process = start(slow_fit, tmp_path, 4, count, said=said)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert batches_kept(tmp_path) == after_one + 3
    assert list(tmp_path.glob("*.writing"))
    rest = Counted()
    resumed = EKFAC(rest).fit(model, batches, targets, store=Store(tmp_path, seconds=0.0))
    assert rest.calls == 2 * len(batches) - after_one - 3
    assert differences(resumed, EKFAC().fit(model, batches, targets)) == []
    whole = [name for name in files(tmp_path) if not name.startswith(".tmp")]  # of killed writes
    assert whole == ["curvature-000.safetensors"]


def batches_kept(folder: Path) -> int:
    [path] = folder.glob("sums-*.safetensors")
    with safe_open(path, "pt") as file:
        return int(file.metadata()["batches"])
