"""Files written whole or not at all; errors of writing in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from kfade.errors import InputError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_CODE = re.compile(r"\((?:os error|errno) (\d+)\)|\[Errno (\d+)\]")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any library's error of writing ``path`` into an InputError.

    Raises:
        InputError: the disk is full, the folder is read-only, or whatever the system says.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and _code_of(error) is None:
            raise
        raise unwritable(path, error) from None


def unwritable(path: Path | str, error: Exception) -> InputError:
    """The error for a file or folder that cannot be written."""
    code = _code_of(error)
    reason = os.strerror(code) if code is not None else first_line(error)
    about = getattr(error, "filename", None)
    advice = ""
    if about is not None and not Path(about).absolute().is_relative_to(Path(path).absolute()):
        reason += f": {about}"  # the file to be copied, or a folder above
    if code in FULL:
        advice = "; free some space, or choose a place on another disk"
    elif code in _CLOSED:
        advice = "; choose a place that you may write to"
    return InputError(f"{path}: cannot be written ({reason}){advice}")


def _code_of(error: Exception) -> int | None:
    """The system's error number; libraries in Rust and shutil.copytree tell it in text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _CODE.search(str(error))
    return int(found[1] or found[2]) if found else None


def write_file(path: Path, write: Callable[[Path], object], aside: Path | None = None) -> None:
    """Have ``write`` make a file under another name, then rename it; a failure leaves nothing.

    Args:
        aside: the other name, on the same disk; None: beside ``path``.

    Raises:
        InputError: it cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays, and its target is replaced
    aside = aside or target.with_name(f"{target.name}.writing")
    with writing(path):
        if target.exists() and not (target.is_file() and os.access(target, os.W_OK)):
            write(target)  # a device is written to directly; a folder or a closed file fails here
            return
        try:
            write(aside)
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(aside)
            raise


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write text in UTF-8, whole or not at all; see :func:`write_file`."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8", errors=errors))


@contextlib.contextmanager
def reading_kept(path: Path) -> Iterator[None]:
    """Raises InputError where a safetensors file of an unfinished run is broken, and what to do."""
    try:
        yield
    except (SafetensorError, InputError) as error:
        told = str(error)
        told = told if str(path) in told else f"{path}: not a whole safetensors file ({told})"
        raise InputError(
            f"{told}; remove it, so that what it held is computed anew, or the folder of the "
            "unfinished run"
        ) from None


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """``folder``, which is made if it is missing, and removed then if the ``with`` fails.

    Raises:
        InputError: it cannot be made.
    """
    new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; nothing if it does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
