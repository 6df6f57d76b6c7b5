"""Time and GPU use of a step, with a program in the place of `nvidia-smi`."""

import os
import time

import pytest

from hydrahead.usage import Usage


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Has two GPUs, one idle and one that is always busy."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$0.asked"\nwhile true; do echo 0; echo 100; sleep 0.05; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def test_share_is_the_mean_of_all_samples(gpus):
    with Usage() as usage:
        time.sleep(0.3)
    assert usage.busy == pytest.approx(0.5, abs=0.1)
    assert 0.3 <= usage.seconds < 5
    assert "GPU busy 5" in str(usage) or "GPU busy 4" in str(usage)


def test_only_visible_gpus_are_asked_for(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with Usage():
        time.sleep(0.2)
    assert "--id=1" in gpus.with_name("nvidia-smi.asked").read_text().splitlines()


def test_a_machine_without_gpus_has_time_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with Usage() as usage:
        pass
    assert usage.busy is None
    assert str(usage) == "0 s"


def test_parts_are_weighed_by_their_time():
    whole = Usage() + Usage(10, 0.9) + Usage(30, 0.5) + Usage(60)
    assert whole == Usage(100, pytest.approx(0.6))
