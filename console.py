"""What a command shows: how far it is, and, when it fails, one line where its user can mend it."""

import contextlib
import logging
import os
import signal
import sys
import textwrap
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator

from safetensors import SafetensorError

LINES = 20  # of a step's progress where nobody watches


class Stopped(Exception):
    """Work that was asked to stop by a signal, and has saved itself; says where in words."""

    def __init__(self, signal_number: int, saved: object):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}; {saved} holds everything: the same command goes on"
        )
        self.signal_number = signal_number


@contextlib.contextmanager
def progress(name: str, total: int, done: int = 0, active: bool = True) -> Iterator[Callable[..., None]]:
    """
    Show on stderr how far a long step is, with the time left: a bar on a terminal, about twenty lines elsewhere.

        with progress("score heads", len(pairs)) as advance:
            for pair in pairs:
                advance(note="loss 0.3")

    Args:
        total, done: how much there is to do, and how much of it was done before.
        active: show anything.

    Returns:
        what to call after each part: `advance(count=1, note="")`.
    """
    if not active or done >= total:
        yield lambda count=1, note="": None
        return
    from tqdm import tqdm

    is_watched, started, first = sys.stderr.isatty(), time.monotonic(), done
    with tqdm(total=total, initial=done, desc=name, file=sys.stderr, disable=not is_watched) as bar:

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            before, done = done, min(total, done + count)
            if is_watched:
                bar.set_postfix_str(note, refresh=False)
                bar.update(count)
            elif done * LINES // total > before * LINES // total:
                left = (time.monotonic() - started) / max(1, done - first) * (total - done)
                note = f": {note}" if note else ""
                line = f"{name} {done:,}/{total:,}, {tqdm.format_interval(left)} left{note}"
                print(line, file=sys.stderr, flush=True)

        yield advance


def quiet() -> None:
    """
    Have the libraries say only what went wrong, because a command has its own progress; also before they are imported.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network it tells of every retry
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # what it logs of a broken file is in its exception
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # flash-linear-attention says so at its import wherever there is no GPU; linear heads then run on PyTorch.
    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # tied weights are saved once, as they should
    if "transformers" in sys.modules:
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets import logging as datasets_logging

        datasets_logging.set_verbosity(logging.CRITICAL)


@contextlib.contextmanager
def one_line_errors(debug: bool | None = None) -> Iterator[None]:
    """
    Run a command quietly. What its user can mend ends in one line on stderr and status 1: bad input, files, the Hub, a
    full GPU, a loss that is no number. One that a signal stopped ends with the signal's status.

    A bug's ValueError cannot be told from one that means the input; `debug` shows where it comes from.

    Args:
        debug: let every error through as it is; by default, where the command line says `--debug`.
    """
    quiet()
    debug = "--debug" in sys.argv if debug is None else debug
    try:
        yield
    except Stopped as stopped:
        _end(str(stopped), 128 + stopped.signal_number)
    except KeyboardInterrupt:
        if debug:
            raise
        raise SystemExit(130) from None
    except Exception as error:
        line = _as_line(error)
        if debug or line is None:
            raise
        _end(line)


def printable(text: str) -> str:
    """Text that cannot command a terminal, and that one can show: models, and who names one, may write anything."""
    kinds = ("Cc", "Cs")  # control characters, and halves of surrogate pairs, which no encoding has
    return "".join(each if each in "\n\t" or unicodedata.category(each) not in kinds else "\ufffd" for each in text)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__))


@contextlib.contextmanager
def blaming(what: str) -> Iterator[None]:
    """
    Around one call of a library that reads a stranger's file: whatever it stumbles on there is the file's fault.

    Args:
        what: the file, and what it should have been, in words.

    Raises:
        ValueError: `what`, and what the library said.
    """
    try:
        yield
    except Exception as error:  # bare ones of Rust, KeyErrors of missing keys, TypeErrors of a number for a list
        reason = textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__
        raise ValueError(f"{what} ({reason})") from error


def _as_line(error: Exception) -> str | None:
    """What to tell a user who can mend it; `None` for what only we can."""
    if isinstance(error, (ValueError, OSError, FloatingPointError, SafetensorError)):  # the Hub's are OSErrors
        return first_line(error)
    torch = sys.modules.get("torch")  # not imported for this: a command without PyTorch fills no GPU
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    said = ". ".join(str(error).strip().split(". ")[:2])
    return f"GPU memory is full: reduce the length or the batch, use bfloat16, or run on the CPU ({said})"


def _end(line: str, status: int = 1) -> None:
    print(f"hydrahead: {line}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None
