"""Output folders: a folder exists only if its run is finished.

A run writes into ``DIR.part``, which is renamed to ``DIR`` at the end. Finished pieces of an
interrupted run lie in ``DIR.part/state``, and ``--resume`` goes on from them. A run that fails
without such pieces leaves nothing; one that fails later says what it leaves.
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

CONFIG = "config.json"  # the settings of an unfinished run
INPUTS = "inputs.json"  # digests of what it reads
CHOICES = "choices.json"  # what it chose by the state of the machine


def check_free(path: Path) -> None:
    """Raises InputError where ``path`` cannot become an output folder.

    It is a file, a folder that is not empty, the working directory, or begins with a ``~`` that the
    shell did not replace.
    """
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
    """The settings of an interrupted run into ``path``; empty where there is none.

    Raises:
        InputError: it cannot be read.
    """
    saved = beside(path, ".part") / CONFIG
    return _read(saved) if saved.is_file() else {}


def differences(there: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Settings of two runs that differ, each as ``--option VALUE (here VALUE)``."""
    found = []
    for name in there | asked:
        one, other = there.get(name), asked.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other)
        elif one != other:
            option = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            before, now = (shorten(str(value), 60, placeholder=" ...") for value in (one, other))
            found.append(f"{option} {before} (here {now})")
    return found


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a file of an interrupted run; raises InputError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
    except (ValueError, AssertionError):  # not UTF-8, not JSON, or something else in it
        raise InputError(
            f"{path}: not what the interrupted run wrote, so that it cannot be resumed; "
            f"remove {path.parent}"
        ) from None
    return content


class RunDir:
    """The output folder of one run; use it in a ``with``, and :meth:`finish` at the end.

    Of several processes all read it and the first one writes.

    Args:
        path: the folder to make.
        config: all settings that decide the result; a resumed run must have the same.
        resume: go on with an interrupted run, if there is one.
        free: {name of a setting: glob}. A resumed run may change the setting as long as no file of
            the state matches the glob.

    Raises:
        InputError: the folder exists or cannot be written; or there is an interrupted run, and
            ``resume`` is False or the settings differ.
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
        if not self._writes or self._finished:
            return
        kept = self._files()
        if not kept:
            shutil.rmtree(self.part, ignore_errors=True)
        elif isinstance(error, InputError) and kept - self._found:
            free = ", ".join(self._free_now())
            settings = f"also with other settings of {free}" if free else "with the same settings"
            raise InputError(
                f"{error} (what was finished is kept in {self.part}: --resume continues from it, "
                f"{settings}; for a new run choose another --out or remove the folder)"
            ) from error

    def reads(self, digests: Mapping[str, str], *, resumed: bool | None = None) -> None:
        """Record the run's inputs, or compare them with those of the resumed run.

        Args:
            digests: of the inputs, by the names that messages use.
            resumed: whether kept pieces depend on the inputs; None: if there are any.

        Raises:
            InputError: the resumed run had other inputs, or their record is gone.
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

    def settle(self, name: str, choose: Callable[[], int]) -> int:
        """The number that the interrupted run chose, or else that of ``choose``, which is kept.

        The same in all processes; ``choose`` runs in all of them or in none.
        """
        path = self.part / CHOICES
        recorded = self._writes and path.is_file() and bool(self._found)
        if distributed.any_of(recorded):
            return int(distributed.maximum(_read(path)[name] if recorded else 0))
        number = choose()
        if self._writes:
            self._write(path, {name: number})
        return number

    def keep(
        self,
        name: str,
        write: Callable[[Path], None],
        attend: Callable[[], None] | None = None,
        *,
        in_each: bool = False,
    ) -> None:
        """Have ``write`` make a file of the state, a finished piece; see :func:`write_file`.

        Args:
            attend: runs in the other processes, where ``write`` needs them.
            in_each: each process writes, a file with a name of its own.
        """
        if self._writes or in_each:
            write_file(self.state / name, write, self.part / f"{name}.writing")
        elif attend is not None:
            attend()

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to ``log.jsonl``."""
        if not self._writes:
            return
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts}
        path = self.part / "log.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def put(
        self, name: str, write: Callable[[Path], None], attend: Callable[[], None] | None = None
    ) -> None:
        """Have ``write`` make a file or folder of DIR; ``attend``: see :meth:`keep`."""
        if self._writes:
            write_file(self.part / name, write)
        elif attend is not None:
            attend()

    def publish(self, name: str) -> None:
        """Move a finished file of the state into DIR."""
        if self._writes:
            os.replace(self.state / name, self.part / name)

    def finish(
        self,
        manifest: Mapping[str, Any],
        metrics: Mapping[str, Any],
        config_yaml: str | None = None,
    ) -> None:
        """Write manifest, metrics and configuration, remove the state, and rename the folder."""
        if self._writes:
            self._write(self.part / "manifest.json", manifest)
            self._write(self.part / "metrics.json", metrics)
            if config_yaml is not None:
                write_text(self.part / "config.yaml", config_yaml)
            with writing(self.path):
                shutil.rmtree(self.state)  # before the files that describe it
                (self.part / CONFIG).unlink()
                (self.part / INPUTS).unlink(missing_ok=True)
                (self.part / CHOICES).unlink(missing_ok=True)
                os.replace(self.part, self.path)
        self._finished = True

    def _files(self) -> set[Path]:
        """The finished pieces; none in a process that does not write."""
        paths = self.state.rglob("*") if self._writes else ()
        return {path for path in paths if path.is_file()}

    def _free_now(self) -> list[str]:
        """Names of the settings that a resumed run may change."""
        return [name for name, files in self._free.items() if not list(self.state.glob(files))]

    def _check_resume(self, resume: bool) -> None:
        if not resume:
            raise InputError(
                f"{self.part}: an interrupted run lies there; pass --resume to go on with it, or "
                "remove the folder"
            )
        if self._files():
            self._check_told(self.part / CONFIG, "was asked for")
        asked = interrupted(self.path)
        there, here = dict(asked), dict(self._config)
        for name in self._free_now():
            there.pop(name, None)
            here.pop(name, None)
        if asked and there != here:
            told = ", ".join(differences(there, here))
            raise InputError(
                f"{self.part}: the interrupted run was asked for {told}; repeat its options, or "
                "remove the folder"
            )

    def _remove_torn(self) -> None:
        """Remove what a killed process has left of safetensors files."""
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
