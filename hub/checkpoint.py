"""Checkpoint folders that load anywhere: written whole or not at all, and tried in a process without hydrahead."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:  # files alone are written without PyTorch
    from transformers import PreTrainedTokenizerBase

    from ..modeling_hydrahead import HydraHeadForCausalLM

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def whole_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
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
    file = path.open("w")
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
def whole_file(path: str | Path) -> Iterator[Path]:
    """
    A path to write to that takes the place of `path`, forced to the disk, when the block ends, and vanishes when it
    fails.
    """
    path = Path(path).absolute()
    partial = path.with_name(f"{path.name}.partial")
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
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def check_free(folder: str | Path, overwrite: bool = False) -> None:
    """
    Check, before long work begins, that `folder` may be written.

    Raises:
        ValueError: it is a file, or it holds something already and `overwrite` is not set.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, expected a folder to write")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder}: not empty; choose another folder or pass overwrite")


def save_checkpoint(
    student: "HydraHeadForCausalLM",
    tokenizer: "PreTrainedTokenizerBase | None",
    folder: str | Path,
    extra_files: Mapping[str, str | dict | list | Path] | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write a student as a folder that loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

    Args:
        extra_files: further files by name: text, something to write as JSON, or a file to copy.
        overwrite: replace what the folder holds.

    Raises:
        ValueError: the folder holds something already, and `overwrite` is not set.
    """
    with whole_folder(folder, overwrite) as partial:
        student.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, content in (extra_files or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, partial / name)
            else:
                text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
                (partial / name).write_text(text)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read


# Runs without hydrahead: an import of it fails, whatever is installed.
_RELOAD = """
import json, sys
sys.modules["hydrahead"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
folder, max_new_tokens = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(sys.stdin.read(), return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"class": type(model).__module__, "answer": answer}))
"""


def answer_in_clean_process(folder: str | Path, prompt: str, max_new_tokens: int = 16) -> str:
    """
    Load a checkpoint folder in a fresh Python process that cannot import hydrahead, and continue a prompt greedily.

    Returns:
        the text of the continuation.

    Raises:
        RuntimeError: the folder does not load or generate there, with the last line of what the process said.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", _RELOAD, str(Path(folder).absolute()), str(max_new_tokens)],
        input=prompt,
        capture_output=True,
        text=True,
        env=environment,
        cwd=tempfile.gettempdir(),
    )
    if done.returncode:
        raise RuntimeError(f"{folder}: does not load in a clean process: {done.stderr.strip().splitlines()[-1]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["class"].startswith("transformers_modules."), result
    return result["answer"]
