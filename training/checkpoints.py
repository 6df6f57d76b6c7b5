"""Checkpoints of a run: whole or not at all, the newest few kept, and found again without being told."""

import errno
import json
import re
import shutil
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from ..files import atomic_file, force_to_disk, read_json, read_utf8

_NOTHING_FREE = 2**20  # bytes
_FILE_BYTES = 2**30  # of a file, at most, unless one tensor is larger: it is built in memory
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True, strict=False)


class Checkpoints:
    """
    Folders `checkpoint-N` of N steps done, beside the record of the run.

    One is written as `checkpoint-N.partial`, forced to the disk and then renamed: a folder without that ending is
    whole. Weights that are trained and the optimiser's state are safetensors in PyTorch's distributed format: each
    process writes its share, and any engine on any number of processes goes on from it.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is enough

    def all(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def newest(self) -> Path | None:
        return next(reversed(self.all()), None)

    def check(self) -> None:
        """
        Check that the newest checkpoint, if there is one, can be gone on from; no tensor is read.

        Raises:
            ValueError: it is damaged.
        """
        newest = self.newest()
        if newest is None or (newest / "random_states_0.pkl").is_file():  # `resume` says what that is
            return
        try:
            step = read_json(newest / "progress.json").get("step")
            if not isinstance(step, int) or not (files := list(newest.glob("*.safetensors"))):
                raise ValueError(f"{newest}: not a whole checkpoint")
            for path in files:
                with safe_open(path, framework="pt"):
                    pass
        except (ValueError, OSError, SafetensorError) as error:
            raise ValueError(f"{newest}: damaged ({error}); remove it to go on from the one before") from None

    def save(
        self, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer, step: int, progress: dict
    ) -> None:
        """
        Write a prepared model and optimiser, and `progress`, something that JSON can hold, after `step` steps.

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
            tensors = _tensors(accelerator, model, *get_state_dict(model, optimizer.optimizer, options=_OPTIONS))
            writer = dcp.HuggingFaceStorageWriter(str(partial), _files(tensors), save_distributed=True)
            dcp.save(tensors, storage_writer=writer)
            if accelerator.is_main_process:
                (partial / "progress.json").write_text(json.dumps({"step": step} | progress))
                force_to_disk(*partial.rglob("*"), partial, *self.folder.glob("metrics.jsonl"))
                partial.rename(done)
                force_to_disk(self.folder)
        except (Exception, CheckpointException) as error:
            # PyTorch and safetensors fail with errors of their own, which do not say why: the disk does.
            is_full = shutil.disk_usage(self.folder).free < _NOTHING_FREE
            causes = [error, *(cause for cause, _ in getattr(error, "failures", {}).values())]
            if not is_full and not any(
                getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for each in causes
            ):
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

    def resume(self, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer) -> dict:
        """
        Bring a prepared model and optimiser back to the newest checkpoint, if there is one, and give its progress;
        what is not whole is removed.

        Raises:
            ValueError: it is from before checkpoints had this format, or damaged.
        """
        if accelerator.is_main_process:
            for partial in self.folder.glob("checkpoint-*.partial"):
                shutil.rmtree(partial)
        accelerator.wait_for_everyone()
        newest = self.newest()
        if newest is None:
            return {"step": 0}
        if (newest / "random_states_0.pkl").is_file():
            raise ValueError(
                f"{newest}: in the format of an earlier version; go on with that one, or remove {self.folder} to "
                "begin the stage anew"
            )
        weights, state = get_state_dict(model, optimizer.optimizer, options=_OPTIONS)
        tensors = _tensors(accelerator, model, weights, state)
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(newest)))  # into these very tensors
        except CheckpointException as error:  # which is no Exception
            raise ValueError(
                f"{newest}: holds other tensors than this run's; remove it to go on without it"
            ) from error
        set_state_dict(model, optimizer.optimizer, model_state_dict=weights, optim_state_dict=state, options=_OPTIONS)
        return json.loads((newest / "progress.json").read_text())

    def last_good(self) -> str:
        """Where a stopped run would go on, in words."""
        newest = self.newest()
        return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"


def _tensors(accelerator: Accelerator, model: nn.Module, weights: dict, state: dict) -> dict[str, torch.Tensor]:
    """What training changes, by name: tied weights once, of the optimiser's state what the schedule does not set."""
    trained = [name for name, each in accelerator.unwrap_model(model).named_parameters() if each.requires_grad]
    tensors = {f"model.{name}": weights[name] for name in trained}
    return tensors | {f"optimizer.{name}": each for name, each in state.items() if isinstance(each, torch.Tensor)}


def _files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to: none so large that building it fills the memory."""
    files, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > _FILE_BYTES:
            number, filled = number + 1, 0
        files[name], filled = number, filled + tensor.nbytes
    return files


def keep_metrics_before(file: Path, step: int) -> None:
    """Cut a record of steps back to those before `step`, and a line that was never finished with them."""
    if not file.is_file():
        return
    kept = []
    for line in read_utf8(file).splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= step:
            break
        kept.append(line)
    with atomic_file(file) as partial:
        partial.write_text("".join(kept))
