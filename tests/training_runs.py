"""Tiny runs of the three stages in processes that start quickly, for tests that kill and compare them."""

import contextlib
import gc
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.tests.families import HEADS, LAYERS, MIXED, make_teacher
from hydrahead.training import align, distill, finetune
from hydrahead.training import stage as stage_module

MAINS = {"align": align.main, "distill": distill.main, "finetune": finetune.main}
CLOCKS = ("seconds", "tokens_per_second", "memory_gb")
STAGE = {"tokens": 2048, "batch_tokens": 256, "length": 32, "learning_rate": 1e-2, "final_learning_rate": 1e-3}


def make_inputs(folder: Path, **teacher_changes) -> dict:
    """A tiny teacher with the demo's tokenizer, a text of some pages, and a recipe of all stages on them."""
    teacher = make_teacher("qwen3-tied", vocab_size=2048, eos_token_id=0, pad_token_id=1, **teacher_changes)
    teacher.save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(EMBEDDED_TEACHER).save_pretrained(folder / "teacher")
    words = ["amber", "basket", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket"]
    pages = [" ".join(words[(page * step) % 10] for step in range(1, 120)) for page in range(1, 25)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    (folder / "masks.json").write_text(json.dumps(MIXED))
    assert (len(MIXED), len(MIXED[0])) == (LAYERS, HEADS)
    return {
        "output": str(folder / "out"),
        "teacher": {"name": str(folder / "teacher"), "dtype": "float32"},
        "masks": str(folder / "masks.json"),
        "data": {"name": str(folder / "text.jsonl"), "heldout_tokens": 512},
        "run": {"micro_batch_tokens": 64, "mixed_precision": "no", "save_every": 1},
        "align": STAGE | {"warmup_steps": 2, "calibration_tokens": 128},
        "distill": STAGE | {"warmup_steps": 2},
        "finetune": STAGE | {"warmup_steps": 2, "curriculum": [[16, 0.5], [32, 0.5]]},
    }


def write_recipe(folder: Path, recipe: dict) -> str:
    """The recipe as a file."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


class CheckedAccelerator(Accelerator):
    """One that is left without replicas: what holds the process group when it ends may wait for itself forever."""

    def end_training(self) -> None:
        assert not any(issubclass(type(each), DistributedDataParallel) for each in gc.get_objects())
        super().end_training()


class ShardedAccelerator(Accelerator):
    """FSDP2 on a CPU: Accelerate's own path, but for its refusal to take it without a GPU."""

    def __init__(self, **options):
        del os.environ["ACCELERATE_USE_FSDP"]
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP


def run_stage(
    stage: str,
    arguments: list[str],
    environment: Mapping[str, str] = MappingProxyType({}),
    errors: Path | None = None,
    sharded: bool = False,
) -> None:
    """What a child process does: a stage's command line, with what it says on stderr in a file if one is given."""
    os.environ.update(environment)
    stage_module.Accelerator = ShardedAccelerator if sharded else CheckedAccelerator
    if sharded:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")  # what Accelerate's launcher tells
    if errors is not None:
        sys.stderr = errors.open("w")
    MAINS[stage](arguments)


def start_stage(
    stage: str,
    arguments: list[str],
    environment: dict[str, str] | None = None,
    errors: Path | None = None,
    sharded: bool = False,
):
    """A stage in a child of a server process that has imported everything: it starts in a blink."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hydrahead.tests.training_runs"])
    process = context.Process(target=run_stage, args=(stage, arguments, environment or {}, errors, sharded))
    process.start()
    return process


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def finish_stage(stage: str, arguments: list[str], processes: int = 1, sharded: bool = False) -> None:
    """Run a stage to its end, on one process or on several that share a batch."""
    (port,) = free_ports(1)
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)
    ]
    running = [start_stage(stage, arguments, environment, sharded=sharded) for environment in ranks]
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * processes


def metrics_of(folder: Path) -> list[dict]:
    """The record of a run without its clocks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


if __name__ == "__main__":  # for `accelerate launch`: STAGE --config …, with sharded weights on a CPU
    run_stage(sys.argv[1], sys.argv[2:], sharded=True)
