"""How a command ends when it fails: in one line where its user can mend it, in a traceback where only we can."""

import contextlib
import sys
from collections.abc import Iterator

from safetensors import SafetensorError


@contextlib.contextmanager
def one_line_errors(debug: bool = False) -> Iterator[None]:
    """
    What the user can mend ends in one line on stderr and status 1: bad input, files, the Hub, a full GPU, a loss that
    is no number. An interrupted command ends with status 130.

    A bug's ValueError cannot be told from one that means the input; `debug` shows where it comes from.

    Args:
        debug: let every error through as it is.
    """
    if debug:
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:  # the Hub's HTTP errors are OSErrors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _end(lines[0])
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # not imported for this: a command without PyTorch fills no GPU
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        said = ". ".join(str(error).strip().split(". ")[:2])
        _end(f"GPU memory is full: reduce the length or the batch, use bfloat16, or run on the CPU ({said})")


def _end(line: str) -> None:
    print(f"hydrahead: {line}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None
