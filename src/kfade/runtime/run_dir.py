"""Output folders: a folder's existence means that its run is whole.

A run works in ``DIR.part`` and is renamed to ``DIR`` at its end. What an interrupted run has
finished lies in ``DIR.part/state``, each file written aside and renamed, so that ``--resume`` goes
on from there. A run that fails before it has anything worth keeping leaves nothing; one that is
refused after that says what it leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any

from kfade.errors import InputError
from kfade.runtime import distributed
from kfade.runtime.files import unwritable, write_file, write_text, writing

CONFIG = "config.json"  # what an unfinished run was asked for
INPUTS = "inputs.json"  # digests of what it reads


def check_free(path: Path) -> None:
    """Raises InputError where ``path`` is no folder, one that holds something, or the folder that
    one is in; or where it begins with a ~ that no shell has replaced."""
    with contextlib.suppress(RuntimeError):  # a name after ~ that is nobody's
        if path.expanduser() != path:
            raise InputError(
                f"{path}: a ~ that the shell did not replace; write {path.expanduser()}"
            )
    try:
        if not path.exists():
            return
        if not path.is_dir():
            raise InputError(f"{path}: is not a folder; choose another --out")
        if any(path.iterdir()):
            raise InputError(
                f"{path}: already exists and is not empty; choose another --out or remove it"
            )
        if path.samefile("."):
            raise InputError(f"{path}: the folder that you are in; choose a new one within it")
    except OSError as error:
        raise unwritable(path, error) from None


def beside(path: Path, ending: str) -> Path:
    """The path of the same name with ``ending`` added, also where ``path`` is . or .. or /."""
    whole = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    return whole.parent / f"{whole.name}{ending}"


def interrupted(path: Path) -> dict[str, Any]:
    """What an interrupted run into ``path`` was asked for; nothing where there is none.

    Raises:
        InputError: it cannot be read.
    """
    saved = beside(path, ".part") / CONFIG
    return _read(saved) if saved.is_file() else {}


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Settings of two runs that differ, each as ``--option VALUE (here VALUE)``."""
    found = []
    for name in [*there, *(name for name in asked if name not in there)]:
        one, other = there.get(name), asked.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other)
        elif one != other:
            called = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            told = (shorten(str(value), 60, placeholder=" ...") for value in (one, other))
            found.append(f"{called} {next(told)} (here {next(told)})")
    return found


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that a run keeps of itself.

    Raises:
        InputError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
    except (ValueError, AssertionError):  # not UTF-8, not JSON, or something else in it
        raise InputError(
            f"{path}: not what the interrupted run wrote, so that it cannot be gone on with; "
            f"remove {path.parent}"
        ) from None
    return content


class RunDir:
    """The output folder of one run; use it in a ``with``, and :meth:`finish` at the end.

    With several processes all read it and the first one writes.

    Args:
        path: the folder to make.
        config: everything that decides the result; a resumed run must ask for the same.
        resume: go on with an interrupted run, where there is one.
        free: settings of ``config`` that a resumed run may ask for anew, each by its name, as long
            as no file of the state matches the glob that is given with it.

    Raises:
        InputError: the folder exists, cannot be written, or holds an interrupted run that was not
            asked to be resumed or that asked for something else.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        free: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.part = beside(path, ".part")
        self.state = self.part / "state"
        self._config = json.loads(json.dumps(config))
        self._free = free or {}
        self._finished = False
        self._writes = distributed.rank() == 0
        if self._writes:
            check_free(path)
            if self.part.exists():
                self._check_resume(resume)
                self._remove_torn()
            with writing(path):
                self.state.mkdir(parents=True, exist_ok=True)
            self._write(self.part / CONFIG, self._config)
        self._found = self._files()
        distributed.barrier()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._writes or self._finished:  # the first process may be removing the state now
            return
        kept = self._files()
        if not kept:
            shutil.rmtree(self.part, ignore_errors=True)
        elif isinstance(error, InputError) and kept - self._found:
            other = "".join(f", also with another {name}" for name in self._free_now())
            raise InputError(
                f"{error} (what was finished is kept in {self.part}: go on from it with "
                f"--resume{other}, or remove the folder)"
            ) from error

    def reads(self, digests: Mapping[str, str], *, resumed: bool | None = None) -> None:
        """Note what the run reads.

        Args:
            digests: by what each is called in a message.
            resumed: whether what was kept depends on them; None: if anything was kept.

        Raises:
            InputError: the interrupted run that is gone on with read something else, or does not
                tell.
        """
        path = self.part / INPUTS
        if bool(self._files()) if resumed is None else resumed:
            self._check_told(path, "read")
            recorded = _read(path)
            changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
            if changed:
                raise InputError(
                    f"{self.part}: changed since the run was interrupted: {', '.join(changed)}; "
                    "restore what it was, or remove the folder"
                )
        elif self._writes:
            self._write(path, digests)

    def keep(self, name: str, write: Callable[[Path], None]) -> None:
        """Keep a finished piece: ``write`` a file aside, then give it its name in the state."""
        if not self._writes:
            return
        write_file(self.state / name, write, self.part / f"{name}.writing")

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to ``log.jsonl``."""
        if not self._writes:
            return
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
        path = self.part / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def put(self, name: str, write: Callable[[Path], None]) -> None:
        """``write`` a file or folder that will lie in DIR."""
        if self._writes:
            write_file(self.part / name, write)

    def publish(self, name: str) -> None:
        """Move a file of the state, now whole, to where it will lie in DIR."""
        if self._writes:
            os.replace(self.state / name, self.part / name)

    def finish(
        self,
        manifest: Mapping[str, Any],
        metrics: Mapping[str, Any],
        config_yaml: str | None = None,
    ) -> None:
        """Write manifest, metrics and configuration, drop the state, and give DIR its name."""
        if self._writes:
            self._finish(manifest, metrics, config_yaml)
        self._finished = True

    def _finish(
        self, manifest: Mapping[str, Any], metrics: Mapping[str, Any], config_yaml: str | None
    ) -> None:
        self._write(self.part / "manifest.json", manifest)
        self._write(self.part / "metrics.json", metrics)
        if config_yaml is not None:
            write_text(self.part / "config.yaml", config_yaml)
        with writing(self.path):
            shutil.rmtree(self.state)  # first: where there is a state, what it was made of is told
            (self.part / CONFIG).unlink()
            (self.part / INPUTS).unlink(missing_ok=True)
            os.replace(self.part, self.path)

    def _files(self) -> set[Path]:
        """All that is kept; of a process that does not write, nothing."""
        if not self._writes:
            return set()
        return {path for path in self.state.rglob("*") if path.is_file()}

    def _free_now(self) -> list[str]:
        """Settings that a resumed run may ask for anew."""
        return [name for name, files in self._free.items() if not list(self.state.glob(files))]

    def _check_resume(self, resume: bool) -> None:
        if not resume:
            raise InputError(
                f"{self.part}: an interrupted run lies there; pass --resume to go on with it, or "
                "remove the folder"
            )
        if self._files():
            self._check_told(self.part / CONFIG, "was asked for")
        asked, free = interrupted(self.path), self._free_now()
        there, here = ({k: v for k, v in c.items() if k not in free} for c in (asked, self._config))
        if asked and there != here:
            told = ", ".join(differences(there, here))
            raise InputError(
                f"{self.part}: the interrupted run was asked for {told}; repeat its options, or "
                "remove the folder"
            )

    def _remove_torn(self) -> None:
        """Drop what a killed write of safetensors has left, so that it is not published."""
        for path in self.part.rglob(".tmp*"):
            path.unlink()

    def _check_told(self, path: Path, what: str) -> None:
        if not path.is_file():
            raise InputError(
                f"{path}: is gone, so that nothing tells what the interrupted run {what}; remove "
                f"{self.part}"
            )

    @staticmethod
    def _write(path: Path, content: Mapping[str, Any]) -> None:
        write_text(path, json.dumps(content, indent=2) + "\n")
