"""Checkpoints of a run: whole or not at all, the newest few kept, and found again without being told."""

import errno
import json
import re
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..files import atomic_file, force_to_disk

_NOTHING_FREE = 2**20  # bytes


class Checkpoints:
    """
    Folders `checkpoint-N` of N steps done, beside the record of the run.

    One is written as `checkpoint-N.partial`, forced to the disk and then renamed: a folder without that ending is
    whole. Weights are safetensors; Accelerate keeps the optimiser in PyTorch's own format, which is read without
    running code from it. Sharded checkpoints (FSDP2) are in PyTorch's distributed format, whose index is a pickle:
    resume from your own only.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def newest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def save(self, accelerator: Accelerator, step: int, progress: dict) -> None:
        """
        Write what `accelerator` has prepared and `progress`, something that JSON can hold, after `step` steps.

        Raises:
            OSError: the disk is full; older checkpoints are as they were.
        """
        done, partial = self.folder / f"checkpoint-{step}", self.folder / f"checkpoint-{step}.partial"
        if done.is_dir():
            return
        try:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (partial / "progress.json").write_text(json.dumps({"step": step} | progress))
                force_to_disk(*partial.rglob("*"), partial, *self.folder.glob("metrics.jsonl"))
                partial.rename(done)
                force_to_disk(self.folder)
        except Exception as error:
            # PyTorch and safetensors fail with errors of their own, which do not say why: the disk does.
            is_full = shutil.disk_usage(self.folder).free < _NOTHING_FREE
            if not is_full and getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(errno.ENOSPC, f"{partial.name} does not fit on the disk; {self.last_good()}") from None
        if accelerator.is_main_process:
            self._forget_old()
        accelerator.wait_for_everyone()

    def _forget_old(self) -> None:
        for path in self.all()[: -self.keep]:
            # Renamed first: a folder that is being deleted must never look whole.
            path.rename(partial := path.with_name(f"{path.name}.partial"))
            shutil.rmtree(partial)

    def resume(self, accelerator: Accelerator) -> dict:
        """Bring back the newest checkpoint, if there is one, and give its progress; what is not whole is removed."""
        if accelerator.is_main_process:
            for partial in self.folder.glob("checkpoint-*.partial"):
                shutil.rmtree(partial)
        accelerator.wait_for_everyone()
        newest = self.newest()
        if newest is None:
            return {"step": 0}
        accelerator.load_state(str(newest))
        return json.loads((newest / "progress.json").read_text())

    def last_good(self) -> str:
        """Where a stopped run would go on, in words."""
        newest = self.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def keep_metrics_before(file: Path, step: int) -> None:
    """Cut a record of steps back to those before `step`, and a line that was never finished with them."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    with atomic_file(file) as partial:
        partial.write_text("".join(kept))
