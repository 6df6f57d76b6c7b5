"""What a step of work used: time, and how busy its GPUs were."""

import contextlib
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Self

SAMPLE_MS = 500


@dataclass
class Usage:
    """
    Wall time of the work inside, and the share of it in which the GPUs that are visible ran a kernel.

        with Usage() as usage:
            work()
        print(usage)

    Attributes:
        seconds: of wall time.
        busy: mean share of the GPUs as `nvidia-smi` samples it, or `None` where there is none.
    """

    seconds: float = 0.0
    busy: float | None = None

    def __enter__(self) -> Self:
        self._started, self._sampler = time.monotonic(), None
        self._samples = tempfile.TemporaryFile("w+")
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            command += [f"--id={visible}"]
        command += [f"--loop-ms={SAMPLE_MS}"]
        with contextlib.suppress(OSError):  # no GPU of NVIDIA's
            self._sampler = subprocess.Popen(command, stdout=self._samples, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_) -> None:
        self.seconds = time.monotonic() - self._started
        if self._sampler is not None:
            self._sampler.terminate()
            self._sampler.wait()
            self._samples.seek(0)
            samples = [float(line) for line in self._samples.read().splitlines() if line.strip().isdigit()]
            self.busy = sum(samples) / len(samples) / 100 if samples else None
        self._samples.close()

    def __add__(self, other: "Usage") -> "Usage":
        busy = [(part.seconds, part.busy) for part in (self, other) if part.busy is not None]
        seconds = sum(seconds for seconds, _ in busy)
        share = sum(seconds * share for seconds, share in busy) / seconds if seconds else None
        return Usage(self.seconds + other.seconds, share)

    def __str__(self) -> str:
        return f"{self.seconds:,.0f} s" + ("" if self.busy is None else f", GPU busy {self.busy:.0%}")
