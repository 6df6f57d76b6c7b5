"""Tokens per second of each training stage on one GPU and on several, under DDP and FSDP2, with random weights.

    python benchmarks/scaling.py                      # all GPUs of the machine, the shape of Qwen3-1.7B
    python benchmarks/scaling.py --shape small        # without GPUs: two processes with gloo, DDP alone

Every process reads rows of the same size, so that the batch grows with them: the ideal is as many times the tokens per
second as there are GPUs. A step has one micro-batch, the most that gradients can cost, or four. Weights and optimiser
are fp32; on GPUs it computes in bf16 under autocast, the teacher is bf16, and students checkpoint their activations.

Each way is launched by `accelerate launch` and written to `scaling-<device>.json` as soon as it is done. Times are
medians, from the end of a step to the end of the next.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator

from hydrahead import HydraHeadForCausalLM
from hydrahead.benchmarks.training import SETTINGS, SHAPES, Machine, make_batch, make_forms, make_teacher
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import adapter_for
from hydrahead.data.batches import Batch
from hydrahead.kernels import use_tuned_kernels
from hydrahead.provenance import Record, environment
from hydrahead.training.align import align
from hydrahead.training.distill import compiled_layers, read_teacher
from hydrahead.training.loop import Schedule
from hydrahead.training.recipe import RECIPES
from hydrahead.training.stage import open_accelerator, open_autocast
from hydrahead.training.student import StudentLoss, prepare_student, train_student

STAGES = ("align", "distill", "finetune")
# Micro-batches of each step in turn. Accelerate counts them from the start: as many as a multiple come before a four.
STEPS = (*[1] * 8, 4, 4, 4)
WARM_UP = 4  # steps, the recording of one among them
SECONDS = 270  # that a launch on GPUs may take


def random_student(machine: Machine, teacher) -> HydraHeadForCausalLM:
    """A student in fp32 with a quarter of its heads full attention, made where it is trained."""
    heads, layers = teacher.config.num_attention_heads, teacher.config.num_hidden_layers
    config = student_config(adapter_for(teacher.config), [[int(head % 4 == 0) for head in range(heads)]] * layers)
    with machine.device:
        student = HydraHeadForCausalLM(config)
    prepare_student(student, None, checkpointing=machine.is_cuda)
    return student


def measure_stage(stage: str, machine: Machine, accelerator: Accelerator, teacher, batch: Batch) -> dict:
    """Tokens per second of all processes by the micro-batches of a step, and the most GB of one process."""
    marks, schedule = [time.perf_counter()], Schedule(len(STEPS), 1e-6, 1e-6, 1)

    def micro_batches(step: int) -> list[Batch]:
        accelerator.gradient_accumulation_steps = STEPS[step]
        return [Batch(batch.token_ids, batch.weights.clone())] * STEPS[step]

    def on_step(*_) -> None:
        machine.synchronize()
        marks.append(time.perf_counter())

    arguments = {"autocast": open_autocast(accelerator, machine.is_cuda), "on_step": on_step}
    if machine.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    if stage == "align":
        align(accelerator, teacher, make_forms(machine, teacher), micro_batches, schedule, **arguments)
    else:
        reads = stage == "distill"
        model = StudentLoss(random_student(machine, teacher), float(reads), 0.1 if reads else 1.0)
        teacher_of: Callable = partial(read_teacher, compiled_layers(teacher)) if reads else lambda _: None
        train_student(accelerator, model, micro_batches, schedule, teacher_of, **arguments)
    seconds = [after - before for before, after in pairwise(marks)]
    speeds = {}
    for count in sorted(set(STEPS)):
        timed = [took for took, micro in list(zip(seconds, STEPS))[WARM_UP:] if micro == count]
        speeds[count] = count * batch.weights.numel() * accelerator.num_processes / statistics.median(timed)
    memory = torch.cuda.max_memory_allocated() / 1e9 if machine.is_cuda else None
    return {"tokens_per_second": speeds, "memory_gb": memory, "first_step_seconds": seconds[0]}


def measure(options: argparse.Namespace) -> None:
    """What each launched process does; the first writes the result."""
    use_tuned_kernels()
    accelerator = open_accelerator()
    machine, settings = Machine(str(accelerator.device)), SETTINGS[options.shape]
    teacher = make_teacher(machine, SHAPES[options.shape], settings["speed_vocabulary"])
    batch = make_batch(machine, settings["speed_vocabulary"], settings["rows"], settings["length"])
    # What is read is what counts; alignment reads as many tokens as the others.
    aligned = Batch(batch.token_ids[:, :-1], torch.ones_like(batch.token_ids[:, :-1], dtype=torch.float32))
    result = {}
    # Alignment first: it visits the heads of layers that distillation compiles.
    for stage in sorted(options.stages, key=STAGES.index):
        started = time.monotonic()
        try:
            result[stage] = measure_stage(stage, machine, accelerator, teacher, aligned if stage == "align" else batch)
        except torch.OutOfMemoryError:
            result[stage] = {"error": "out of memory"}
        accelerator.free_memory()
        gc.collect()
        if accelerator.is_fsdp2:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None  # the next stage's layers are others
        if accelerator.is_main_process:
            print(f"{stage}: {result[stage]}, {time.monotonic() - started:.0f} s", flush=True)
            Record(options.result).write(result)
    accelerator.end_training()


def launch(way: str, processes: int, options: argparse.Namespace) -> dict:
    """The result of `measure` in so many processes, as far as it came."""
    how = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    if processes > 1:
        file = way if options.device == "cuda" else "ddp_cpu"
        how += ["--config_file", str(RECIPES / "accelerate" / f"{file}.yaml"), "--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        asked = ["--shape", options.shape, "--stages", *options.stages, "--result", str(result)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *how, __file__, *asked]
        visible = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {}
        started = time.monotonic()
        process = subprocess.Popen(command, env=os.environ | visible, start_new_session=True)
        try:
            failed = process.wait(SECONDS if options.device == "cuda" else None)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # the launcher, which ends its processes, or the only one with it
            failed = process.wait()
        found = Record(result).read() or {}
    found |= {"seconds": time.monotonic() - started}
    return found | ({"error": f"ended with status {failed}"} if failed else {})


def scaling(runs: dict, stages: list[str]) -> dict:
    """By stage and way: tokens per second over those of one process, and over as many of them as there were."""
    result = {}
    for stage in stages:
        one = runs["one"].get(stage, {}).get("tokens_per_second")
        for way, run in runs.items():
            found = run.get(stage, {}).get("tokens_per_second")
            if one and found and way != "one":
                times = {count: found[count] / one[count] for count in found}
                shares = {count: each / run["processes"] for count, each in times.items()}
                result.setdefault(stage, {})[way] = {"times": times, "efficiency": shares}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.7b")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--processes", type=int, help="default: one for each GPU, two without")
    parser.add_argument("--output", type=Path, help="default: scaling-<device>.json beside this script")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        return measure(options)

    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    several = options.processes or max(2, torch.cuda.device_count())
    ways = {"one": 1, "ddp": several} | ({"fsdp2": several} if options.device == "cuda" else {})
    output = options.output or Path(__file__).with_name(f"scaling-{options.device}.json")
    runs: dict[str, dict] = {}
    for way, processes in ways.items():
        print(f"{way}, {processes} processes", flush=True)
        runs[way] = launch(way, processes, options) | {"processes": processes}
        report = {
            "shape": {"name": options.shape} | SHAPES[options.shape],
            "settings": SETTINGS[options.shape] | {"steps": STEPS, "warm_up": WARM_UP},
            "runs": runs,
            "scaling": scaling(runs, options.stages),
            "precision": "fp32" if options.device == "cpu" else "fp32 weights, bf16 autocast, bf16 teacher",
            **environment(options.device),
        }
        Record(output).write(report)
    print(json.dumps(report["scaling"], indent=2))
    print(f"written to {output.name}")


if __name__ == "__main__":
    main()
