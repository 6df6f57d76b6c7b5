"""What commands show: how far they are, one line for what a user can mend, a traceback for what only we can."""

import io
import itertools
import sys
import time

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from hydrahead.console import Stopped, one_line_errors, progress

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB in all.\nSee the manual."


class HubIsAway(HfHubHTTPError):
    """The Hub's error without the answer that it comes with."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


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
def test_what_the_user_can_mend_is_one_line(error, said, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"hydrahead: {said}\n"


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, AssertionError, KeyError, TypeError])
def test_what_only_we_can_mend_passes(kind, capsys):
    with pytest.raises(kind), one_line_errors():
        raise kind("shapes do not fit")
    assert capsys.readouterr().err == ""


def test_an_interruption_ends_with_the_status_of_one():
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise KeyboardInterrupt
    assert ended.value.code == 130


def test_debugging_lets_every_error_through():
    for error in (ValueError("ratio"), OSError("disk"), torch.OutOfMemoryError(FULL)):
        with pytest.raises(type(error)), one_line_errors(debug=True):
            raise error


def test_a_stopped_run_ends_with_the_status_of_its_signal(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise Stopped(15, tmp_path)
    assert ended.value.code == 143
    assert capsys.readouterr().err.startswith("hydrahead: stopped by SIGTERM")


def test_where_nobody_watches_a_long_step_says_twenty_times_how_far_it_is_and_what_is_left(capsys, monkeypatch):
    clock = itertools.count(0, 2)  # the first look is the start
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with progress("align", 400, done=200) as advance:
        for step in range(200):
            advance(note=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10  # of 20: half was done before
    assert lines[0] == "align 220/400, 00:18 left: loss 19"  # 2 s for 20 steps, 180 to go
    assert lines[-1] == "align 400/400, 00:00 left: loss 199"


def test_on_a_terminal_it_is_a_bar_with_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("tokens", 1000) as advance:
        advance(1000, "done")
    assert "tokens: 100%" in sys.stderr.getvalue() and "done" in sys.stderr.getvalue()


def test_what_is_done_already_or_another_processs_business_shows_nothing(capsys):
    for arguments in ({"done": 10}, {"active": False}):
        with progress("align", 10, **arguments) as advance:
            advance()
    assert capsys.readouterr().err == ""
