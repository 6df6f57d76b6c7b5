"""Files and folders that appear whole or not at all, whatever kills their process."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def is_gguf(name: str | Path) -> bool:
    """Whether a name is that of a GGUF file."""
    return Path(name).suffix.lower() == ".gguf"


@contextlib.contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A folder to write into that takes the place of `folder`, forced to the disk, when the block ends, and vanishes when
    it fails. What a process that was killed left of the same folder is removed first.

    Raises:
        ValueError: `folder` holds something already, and `overwrite` is not set; or another process is writing it.
    """
    folder = Path(folder).absolute()
    check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _writer_lock(folder) as is_only_writer:
        if is_only_writer:
            _settle(folder)
            check_free(folder, overwrite)  # what it put back may not be overwritten either
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp's own mode is private
            force_to_disk(*partial.rglob("*"), partial)
            if folder.exists():
                folder.rename(partial.with_suffix(".replaced"))
            partial.rename(folder)
            force_to_disk(folder.parent)
        finally:
            _settle(folder, partial.stem)


@contextlib.contextmanager
def _writer_lock(folder: Path) -> Iterator[bool]:
    """Keep others from writing a folder; gives whether that was possible. Raises as `_take_lock`."""
    path = folder.with_name(f".{folder.name}.lock")
    lock = _take_lock(path, folder)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)  # before it is released: whoever opened it meanwhile sees that it is gone
            lock.close()


def _take_lock(path: Path, folder: Path) -> IO | None:
    """
    The open file of a lock, which the system releases however this process ends.

    Returns:
        `None` where there are no locks: on Windows and on some network file systems.

    Raises:
        ValueError: another process holds it.
    """
    if fcntl is None:
        return None
    file = path.open("a")  # not "w": what a link in its place leads to stays as it is
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        file.close()
        path.unlink(missing_ok=True)
        return None
    file.close()
    raise ValueError(f"{folder}: another process is writing it; wait for it or choose another folder")


def _settle(folder: Path, stem: str | None = None) -> None:
    """
    Remove what was not finished of a folder, and put back what was about to be replaced.

    Args:
        stem: of one attempt's names; of all attempts by default, for who holds the lock.
    """
    pattern = rf"\.{re.escape(folder.name)}\.[^.]+" if stem is None else re.escape(stem)
    pattern = re.compile(rf"{pattern}\.(partial|replaced)")
    for left in [path for path in folder.parent.iterdir() if pattern.fullmatch(path.name)]:
        if left.suffix == ".replaced" and not folder.exists():
            left.rename(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """
    A path to write to that takes the place of `path`, forced to the disk, when the block ends, and vanishes when it
    fails.
    """
    path = Path(path).absolute()
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # what a killed process left, or a link: it is not written through
    try:
        yield partial
        force_to_disk(partial)
        partial.replace(path)
        force_to_disk(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def force_to_disk(*paths: Path) -> None:
    """Return when files and folders would survive a power failure as they are."""
    if os.name == "nt":  # where folders cannot be opened, nor files be forced that are open for reading
        return
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems force files only, not folders
                raise
        finally:
            os.close(handle)


def read_utf8(path: Path) -> str:
    """
    The text of a file.

    Raises:
        ValueError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def read_json(path: Path, kind: type | tuple[type, ...] = dict):
    """
    What a JSON file holds.

    Args:
        kind: `dict`, `list` or both: what it has to be.

    Raises:
        ValueError: there is no such file, it is not UTF-8 or not JSON, or it holds something else; one line.
    """
    text = read_utf8(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, kind):
        wanted = {dict: "an object", list: "a list", (dict, list): "an object or a list"}[kind]
        raise ValueError(f"{path}: expected {wanted} in JSON, got {text.strip()[:20]!r}")
    return found


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """
    Check, before long work begins, that `folder` may be written.

    Raises:
        ValueError: it is a file, cannot be written, or holds something already and `overwrite` is not set.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder}: not empty; choose another folder, or --overwrite")
    check_writable(folder)


def check_writable(folder: str | Path) -> None:
    """
    Check, before long work begins, that files can be written into a folder, which need not be there yet.

    Raises:
        ValueError: they cannot: it, or what it would be in, is a file, or the system forbids it.
    """
    there = Path(folder).absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{there}: is a file, expected a folder to write")
    try:
        os.rmdir(
            tempfile.mkdtemp(prefix=".", dir=there)
        )  # the only way to know: for the superuser access() is a guess
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
