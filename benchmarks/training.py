"""Memory and speed of the training stages, with random weights: chunked against naive distillation, alignment at
2, 8 and 32 layers, and tokens per second of each stage beside a plain forward and backward pass of the teacher.

    python benchmarks/training.py                                # CPU, fp32, a small Qwen3 shape (Linux, glibc)
    python benchmarks/training.py --device cuda --shape 1.7b     # a GPU, bf16, the shape of Qwen3-1.7B
    python benchmarks/training.py --device cuda --shape 135m --speed-only    # the shape of SmolLM2-135M

Writes `training-<device>.json`, or `training-<device>-135m.json`, beside itself. What is compared takes turns, so that
a slow moment of the machine hits all alike; times are medians.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM

from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.migration import convert_model
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import adapter_for
from hydrahead.data.batches import Batch
from hydrahead.provenance import Record, environment
from hydrahead.training.align import FittedHeads, align, teacher_heads
from hydrahead.training.distill import compiled_layers, read_teacher
from hydrahead.training.loop import Schedule
from hydrahead.training.replay import WARM_UP, Replayed
from hydrahead.training.student import StudentLoss, prepare_student, train_student

SHAPES = {
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64,
    },
    "1.7b": {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
VOCABULARY = 151_936
LAYERS = (2, 8, 32)
ALIGN_LENGTH = 512
# Rows and tokens of a row; rows of 512 tokens for the memory of alignment; the vocabulary of the speed measurement;
# tokens of a chunk, an eighth of a batch.
SETTINGS = {
    "small": {"rows": 4, "length": 512, "align_rows": 4, "speed_vocabulary": 8192, "chunk_tokens": 256},
    "135m": {"rows": 16, "length": 2048, "align_rows": 8, "speed_vocabulary": 49_152, "chunk_tokens": 2048},
    "1.7b": {"rows": 2, "length": 4096, "align_rows": 8, "speed_vocabulary": VOCABULARY, "chunk_tokens": 1024},
}


class Machine:
    """A device, the precision used on it, and the most memory that something takes there."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16) if self.is_cuda else nullcontext

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def _status(self, field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    def start_peak(self) -> int:
        """Forget the peak so far; gives the bytes in use."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS:")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else self._status("VmHWM:")


def make_teacher(machine: Machine, shape: dict, vocabulary: int, **changes) -> Qwen3ForCausalLM:
    """A Qwen3 of random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **shape | changes, vocab_size=vocabulary, max_position_embeddings=32768, tie_word_embeddings=True
    )
    with machine.device:
        return Qwen3ForCausalLM(config).to(machine.dtype).eval().requires_grad_(False)


def make_student(machine: Machine, teacher: Qwen3ForCausalLM, checkpointing: bool = False):
    """A student in fp32 with a quarter of its heads full attention."""
    heads = teacher.config.num_attention_heads
    masks = [[int(head % 4 == 0) for head in range(heads)]] * teacher.config.num_hidden_layers
    student = convert_model(teacher, masks, dtype=torch.float32, calibration_ids=torch.arange(64).view(1, -1))
    prepare_student(student.to(machine.device), None, checkpointing)
    return student


def make_batch(machine: Machine, vocabulary: int, rows: int, length: int) -> Batch:
    ids = torch.randint(0, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(ids.shape)
    weights[:, 0] = 0
    return Batch(ids, weights).to(machine.device)


def naive_loss(teacher, student, batch: Batch) -> torch.Tensor:
    """KL and a tenth of cross entropy from whole logits, in fp32."""
    inputs, labels = batch.token_ids[:, :-1], batch.token_ids[:, 1:].flatten()
    with torch.no_grad():
        log_p = F.log_softmax(teacher(inputs, use_cache=False).logits.flatten(0, 1).float(), dim=-1)
    logits = student(inputs, use_cache=False).logits.flatten(0, 1).float()
    kl = F.kl_div(F.log_softmax(logits, dim=-1), log_p, reduction="sum", log_target=True)
    return kl + 0.1 * F.cross_entropy(logits, labels, reduction="sum")


def measure_distillation(machine: Machine, shape: dict, settings: dict, repeats: int) -> dict:
    """Peak memory above weights and gradients, and time, of a forward and backward pass of distillation."""
    teacher = make_teacher(machine, shape, VOCABULARY)
    student = make_student(machine, teacher, checkpointing=True)  # as the recipes at scale distil
    batch = make_batch(machine, VOCABULARY, settings["rows"], settings["length"])
    model = StudentLoss(student, 1.0, 0.1, chunk_tokens=settings["chunk_tokens"])

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "chunked": lambda: model(batch, read_teacher(teacher, batch))[0],
        "naive": lambda: naive_loss(teacher, student, batch),
    }
    found = {name: {"seconds": [], "peak_bytes": 0, "loss": 0.0} for name in ways}
    for repeat in range(repeats + 1):  # the first allocates the gradients and warms up
        for name, loss_of in ways.items():
            student.zero_grad(set_to_none=repeat == 0)
            before, started = machine.start_peak(), time.perf_counter()
            with machine.autocast():
                loss = loss_of()
            loss.backward()
            machine.synchronize()
            if repeat:
                found[name]["seconds"].append(time.perf_counter() - started)
                found[name]["peak_bytes"] = max(found[name]["peak_bytes"], machine.peak() - before)
                found[name]["loss"] = float(loss.detach())
            del loss
    for result in found.values():
        result["seconds"] = statistics.median(result["seconds"])
    ratios = {key: found["chunked"][key] / found["naive"][key] for key in ("peak_bytes", "seconds", "loss")}
    return found | {"chunked_over_naive": ratios}


def measure_alignment(machine: Machine, shape: dict, settings: dict) -> dict:
    """Peak memory of a step of alignment above weights, gradients and optimiser, by layers of the teacher."""
    result = {"layer_by_layer": {}, "one_graph": {}}
    for layers in LAYERS:
        teacher = make_teacher(machine, shape, 1024, num_hidden_layers=layers)
        batch = make_batch(machine, 1024, settings["align_rows"], ALIGN_LENGTH - 1)
        module = make_forms(machine, teacher)
        marks: list[int] = []

        def mark(step: int, _, marks=marks) -> None:
            marks.append(machine.start_peak() if step == 1 else machine.peak())

        accelerator = Accelerator(cpu=not machine.is_cuda)
        schedule = Schedule(2, 1e-4, 1e-4, 1)
        batches = [Batch(batch.token_ids, torch.ones_like(batch.weights))]
        align(accelerator, teacher, module, lambda _, b=batches: b, schedule, autocast=machine.autocast, on_step=mark)
        gradients = sum(parameter.nbytes for parameter in module.parameters())
        # Recorded steps keep their gradients, which are there when the first one ends.
        kept = Replayed.serves(accelerator)
        result["layer_by_layer"][layers] = marks[1] - marks[0] - (0 if kept else gradients)

        module.zero_grad(set_to_none=True)
        before = machine.start_peak()
        with machine.autocast():
            pairs = teacher_heads(teacher, batch.token_ids)
            total = sum(module(layer, states.float(), heads).sum() for layer, (states, heads) in enumerate(pairs))
        total.backward()
        result["one_graph"][layers] = machine.peak() - before - gradients
        del teacher, module, pairs, total
    for found in result.values():
        found["most_over_fewest_layers"] = found[LAYERS[-1]] / found[LAYERS[0]]
    return result


def make_forms(machine: Machine, teacher: Qwen3ForCausalLM) -> FittedHeads:
    """Untrained forms of a teacher's heads."""
    adapter = adapter_for(teacher.config)
    config = student_config(adapter, adapter.blank_masks)
    return FittedHeads(config, head_forms_of(teacher, torch.arange(64).view(1, -1), config)).to(machine.device)


def measure_speed(machine: Machine, shape: dict, settings: dict, repeats: int) -> dict:
    """Tokens per second of a whole step of each stage, and of a plain forward and backward pass of the teacher."""
    vocabulary, rows, length = settings["speed_vocabulary"], settings["rows"], settings["length"]
    teacher = make_teacher(machine, shape, vocabulary)
    read = compiled_layers(make_teacher(machine, shape, vocabulary))  # not the one whose heads alignment visits
    plain = make_teacher(machine, shape, vocabulary).float().requires_grad_(True)
    batch = make_batch(machine, vocabulary, rows, length)
    inputs, labels = batch.token_ids[:, :-1], batch.token_ids[:, 1:]
    aligned = [Batch(inputs, torch.ones(inputs.shape))]
    module = make_forms(machine, teacher)
    distilled, tuned = make_student(machine, teacher), make_student(machine, teacher, checkpointing=True)

    def teacher_pass() -> float:
        plain.zero_grad()
        machine.synchronize()
        started = time.perf_counter()
        with machine.autocast():
            logits = plain(inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        machine.synchronize()
        return time.perf_counter() - started

    def stage_step(train: Callable) -> float:
        seconds = []
        accelerator = Accelerator(cpu=not machine.is_cuda)
        train(accelerator, Schedule(WARM_UP + 3, 1e-6, 1e-6, 1), lambda _, metrics: seconds.append(metrics["seconds"]))
        return seconds[-1]  # the first steps allocate the optimiser's state, and record the others

    def run_align(accelerator, schedule, on_step):
        align(accelerator, teacher, module, lambda _: aligned, schedule, autocast=machine.autocast, on_step=on_step)

    def run_student(student, reads_teacher, accelerator, schedule, on_step):
        model = StudentLoss(student, float(reads_teacher), 0.1 if reads_teacher else 1.0)
        view = partial(read_teacher, read) if reads_teacher else lambda _: None
        train_student(
            accelerator, model, lambda _: [batch], schedule, view, autocast=machine.autocast, on_step=on_step
        )

    ways = {
        "teacher_forward_backward": teacher_pass,
        "align": partial(stage_step, run_align),
        "distill": partial(stage_step, partial(run_student, distilled, True)),
        "finetune": partial(stage_step, partial(run_student, tuned, False)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, measure in ways.items():
            taken = measure()
            if repeat:
                seconds[name].append(taken)
    speeds = {name: rows * length / statistics.median(taken) for name, taken in seconds.items()}
    base = speeds["teacher_forward_backward"]
    return {"tokens_per_second": speeds, "relative_to_teacher": {name: speed / base for name, speed in speeds.items()}}


def measure_memory(machine: Machine, shape: dict, settings: dict) -> dict:
    """Peak bytes of alignment, by layers, and of distillation."""
    alignment = measure_alignment(machine, shape, settings)
    distillation = measure_distillation(machine, shape, settings, repeats=1)
    return {
        "alignment_peak_bytes": alignment,
        "distillation_peak_bytes": {name: result["peak_bytes"] for name, result in distillation.items()},
    }


def measure_memory_apart(arguments: list[str]) -> dict:
    """The same in a process whose C library gives back at once what is freed: slow, but then memory is what it is."""
    command = [sys.executable, __file__, *arguments, "--memory-only"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true", help="print peak memory as JSON and write nothing")
    parser.add_argument("--speed-only", action="store_true", help="leave memory and chunked distillation out")
    parser.add_argument("--output", type=Path, help="default: beside this script")
    options = parser.parse_args()

    machine, shape, settings = Machine(options.device), SHAPES[options.shape], SETTINGS[options.shape]
    if options.memory_only:
        return print(json.dumps(measure_memory(machine, shape, settings)))
    report = {
        "shape": {"name": options.shape} | shape,
        "settings": settings | {"vocabulary": VOCABULARY, "repeats": options.repeats},
    }
    if not options.speed_only:
        report |= measure_memory(machine, shape, settings) if machine.is_cuda else measure_memory_apart(sys.argv[1:])
        distillation = measure_distillation(machine, shape, settings, options.repeats)
        for key in ("seconds", "loss"):
            report[f"distillation_{key}"] = {name: result[key] for name, result in distillation.items()}
    report |= {
        "speed": measure_speed(machine, shape, settings, options.repeats),
        "precision": "fp32" if not machine.is_cuda else "fp32 weights, bf16 autocast, bf16 teacher",
        **environment(options.device),
    }
    name = machine.device.type + ("-135m" if options.shape == "135m" else "")
    output = options.output or Path(__file__).with_name(f"training-{name}.json")
    Record(output).write(report)
    print(json.dumps({key: value for key, value in report.items() if isinstance(value, dict)}, indent=2))
    print(f"written to {output.name}")


if __name__ == "__main__":
    main()
