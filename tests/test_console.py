"""How commands end: one line for what a user can mend, a traceback for what only we can."""

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from hydrahead.console import one_line_errors
from hydrahead.training import launch

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB in all.\nSee the manual."


class HubIsAway(HfHubHTTPError):
    """The Hub's error without the answer that it comes with."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


BOTH = pytest.mark.parametrize("handler", [one_line_errors, launch.one_line_errors], ids=["command", "training"])


@BOTH
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("ratio: wrong\nin detail"), "ratio: wrong"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file", "masks.json"), "[Errno 2] No such file: 'masks.json'"),
        (HubIsAway("the Hub is away"), "the Hub is away"),
        (FloatingPointError("the gradient is not finite"), "the gradient is not finite"),
        (
            torch.OutOfMemoryError(FULL),
            "GPU memory is full: reduce the length or the batch, use bfloat16, or run on the CPU "
            "(CUDA out of memory. Tried to allocate 2.00 GiB)",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_user_can_mend_is_one_line(handler, error, said, capsys):
    with pytest.raises(SystemExit) as ended, handler():
        raise error
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"hydrahead: {said}\n"


@BOTH
@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, AssertionError, KeyError, TypeError])
def test_what_only_we_can_mend_passes(handler, kind, capsys):
    with pytest.raises(kind), handler():
        raise kind("shapes do not fit")
    assert capsys.readouterr().err == ""


@BOTH
def test_an_interruption_ends_with_the_status_of_one(handler):
    with pytest.raises(SystemExit) as ended, handler():
        raise KeyboardInterrupt
    assert ended.value.code == 130


def test_debugging_lets_every_error_through():
    for error in (ValueError("ratio"), OSError("disk"), torch.OutOfMemoryError(FULL)):
        with pytest.raises(type(error)), one_line_errors(debug=True):
            raise error


def test_a_stopped_run_ends_with_the_status_of_its_signal(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, launch.one_line_errors():
        raise launch.Stopped(15, tmp_path)
    assert ended.value.code == 143
    assert capsys.readouterr().err.startswith("hydrahead: stopped by SIGTERM")
