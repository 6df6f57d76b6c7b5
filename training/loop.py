"""What the stages share: optimiser, schedule, accumulation, checkpoints, and a record of every step."""

import contextlib
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import nn

from ..console import Stopped, progress
from ..data.batches import Batch
from .checkpoints import Checkpoints, keep_metrics_before
from .replay import Backward, Replayed

REPLICAS = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
ECHO_SECONDS = 5  # a scheduler signals every process, and a launcher hands on what it got itself
SPIKE_WINDOW = 50
SHORTEST_WINDOW = 20


@dataclass(frozen=True)
class Schedule:
    """
    How long and how fast to train.

    Attributes:
        steps: optimiser steps.
        learning_rate: after warm-up.
        final_learning_rate: at the last step, reached along a cosine.
        warmup_steps: steps of linear growth from 0.
        max_grad_norm: gradients are scaled down to this norm.
    """

    steps: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int = 10
    max_grad_norm: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine


@dataclass
class Run:
    """
    A training run that can be left alone: where it keeps itself, and how it is watched.

    Attributes:
        folder: of the checkpoints and of `metrics.jsonl`, which has a line for each step.
        save_every, keep: steps between checkpoints, and how many of them stay.
        spike_factor: a loss of so many times the median of the last 50 steps stops the run.
        name: of the stage, shown with its progress.
        evaluate: called every `evaluate_every` steps, if any, and after the last; what it gives is recorded.
    """

    folder: Path
    save_every: int
    keep: int
    spike_factor: float
    name: str
    evaluate: Callable[[], dict[str, float]] | None = None
    evaluate_every: int = 0


def train(
    accelerator: Accelerator,
    model: nn.Module,
    micro_batches: Callable[[int], list[Batch]],
    backward: Backward,
    schedule: Schedule,
    run: Run | None = None,
    on_step: Callable[[int, dict], None] | None = None,
    by_layers: bool = False,
    replays: bool = False,
) -> nn.Module:
    """
    Train the parameters of `model` that require a gradient with AdamW.

    A step is normalised by the weight of all its tokens, on all processes: how they are divided into micro-batches
    and processes changes nothing but rounding.

    Args:
        micro_batches: what this process accumulates in a step; the same step gives the same batches, whatever came
            before.
        backward: adds the gradients of a batch's summed loss, times a scale, to those in the parameters, and gives
            what to record: sums over tokens, of any shape; `loss` is the one that is watched.
        run: where to keep checkpoints, if at all, and to resume from the newest.
        on_step: called after each step with the steps done and what was recorded.
        by_layers: `backward` goes back once for every layer, which the hooks of DistributedDataParallel cannot follow:
            gradients of replicas are averaged when a step's last one is there.
        replays: `backward` does the same for all batches of a shape and reads nothing else: a GPU may record it.

    Returns:
        the trained model, as prepared by `accelerator`.

    Raises:
        FloatingPointError: a gradient is not finite, or the loss jumped; names the last good checkpoint.
        Stopped: SIGTERM or SIGINT, after the step and its checkpoint.
        OSError: the disk is full.
    """
    model, optimizer = _prepare(accelerator, model, schedule, by_layers)
    checkpoints = Checkpoints(run.folder, run.keep) if run else None
    resumed = checkpoints.resume(accelerator, model, optimizer) if run else {"step": 0}
    first, losses = resumed["step"], resumed.get("losses", [])
    records = run is not None and accelerator.is_main_process
    if records:
        metrics_file = run.folder / "metrics.jsonl"
        keep_metrics_before(metrics_file, first)
    model.train()
    replayed = Replayed(backward) if replays and Replayed.serves(accelerator) else None
    backward = replayed or backward
    seed = torch.initial_seed() + accelerator.process_index
    shown = progress(run.name if run else "", schedule.steps, first, active=records)
    with _stop_signals(run is not None) as received, shown as advance:
        for step in range(first, schedule.steps):
            started = time.perf_counter()
            torch.manual_seed(
                seed + step * accelerator.num_processes
            )  # of dropout: like the data, by the step's number
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate_at(step)
            metrics, tokens, stop = _accumulate(accelerator, model, micro_batches(step), backward, received)
            grad_norm = _finish_gradients(accelerator, model, schedule.max_grad_norm, by_layers)
            _check_step(step, metrics, grad_norm, losses, run, checkpoints)
            optimizer.step()
            optimizer.zero_grad(set_to_none=replayed is None)
            losses = [*losses, metrics["loss"]][-SPIKE_WINDOW:]
            seconds = time.perf_counter() - started
            metrics |= {"grad_norm": grad_norm, "learning_rate": schedule.learning_rate_at(step), "seconds": seconds}
            metrics |= {"tokens_per_second": tokens / seconds, "memory_gb": _memory_gb(accelerator)}
            if run and run.evaluate_every and ((step + 1) % run.evaluate_every == 0 or step + 1 == schedule.steps):
                if replayed:
                    replayed.forget()
                metrics |= run.evaluate()
                model.train()
            if records:
                with metrics_file.open("a") as file:
                    file.write(json.dumps({"step": step} | metrics) + "\n")
            if accelerator.trackers:
                accelerator.log({name: each for name, each in metrics.items() if isinstance(each, float)}, step=step)
            advance(note=_note(metrics))
            if run and (stop or (step + 1) % run.save_every == 0 or step + 1 == schedule.steps):
                checkpoints.save(accelerator, model, optimizer, step + 1, {"losses": losses})
            if on_step is not None:
                on_step(step + 1, metrics)
            if stop and step + 1 < schedule.steps:
                raise Stopped(stop, checkpoints.newest())
    return model.eval()


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _prepare(accelerator: Accelerator, model: nn.Module, schedule: Schedule, by_layers: bool):
    """Model and optimiser as Accelerate is configured; replicas as they are where `by_layers`."""
    optimizer = torch.optim.AdamW(
        trained_parameters(model),
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=accelerator.device.type == "cuda",  # without copies of the size of the weights
    )
    if not by_layers or accelerator.distributed_type not in REPLICAS:
        return accelerator.prepare(model, optimizer)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    for parameter in model.parameters():  # replicas start equal, whatever each machine computed
        parameter.data.copy_(broadcast(parameter.data))
    return model, accelerator.prepare_optimizer(optimizer)


def _accumulate(accelerator: Accelerator, model: nn.Module, batches: list[Batch], backward, received: list[int]):
    """Gradients and metrics of a step, its tokens, and the signal that some process received, or 0."""
    assert len(batches) == accelerator.gradient_accumulation_steps
    batches = [batch.to(accelerator.device) for batch in batches]
    own = sum(torch.stack([each.weights.double().sum(), each.weights.count_nonzero()]) for each in batches)
    weight, tokens = accelerator.reduce(own, "sum").tolist()
    # Engines give the mean over processes, and Accelerate divides by the accumulated batches.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / max(weight, 1e-6)
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        with accelerator.accumulate(model):
            for name, value in backward(model, batch, scale).items():
                value = value.detach().double()
                sums[name] = sums[name] + value if name in sums else value
    sums["stop"] = torch.tensor(float(bool(received)), device=accelerator.device, dtype=torch.double)
    flat = accelerator.reduce(torch.cat([value.flatten() for value in sums.values()]), "sum")
    parts = (flat / max(weight, 1e-6)).cpu().split([value.numel() for value in sums.values()])
    metrics = {name: part.view(value.shape).tolist() for (name, value), part in zip(sums.items(), parts)}
    stop = (received or [signal.SIGTERM])[0] if metrics.pop("stop") else 0
    return metrics, tokens, stop


def _finish_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float, by_layers: bool) -> float:
    """Clip the gradients, averaged over replicas where no engine has done so, and give their norm before that."""
    parameters = trained_parameters(model)
    if by_layers and accelerator.distributed_type in REPLICAS:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
    return float(accelerator.clip_grad_norm_(parameters, max_norm))


def _check_step(step: int, metrics: dict, grad_norm: float, losses: list[float], run, checkpoints) -> None:
    """Stop before a step that would spoil the weights."""
    where = f"; {checkpoints.last_good()}" if checkpoints else ""
    if not math.isfinite(grad_norm) or not math.isfinite(metrics["loss"]):
        raise FloatingPointError(
            f"step {step}: the gradient is not finite (loss {metrics['loss']:.4g}); lower the learning rate{where}"
        )
    if run and len(losses) >= SHORTEST_WINDOW:
        median = statistics.median(losses)
        if metrics["loss"] > run.spike_factor * median:
            raise FloatingPointError(
                f"step {step}: the loss is {metrics['loss']:.4g}, its median was {median:.4g}; lower the learning "
                f"rate, or raise run.spike_factor to go on{where}"
            )


@contextlib.contextmanager
def _stop_signals(active: bool) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a later one is handled as ever."""
    received: list[int] = []
    if not active:
        yield received
        return
    numbers, first = (signal.SIGTERM, signal.SIGINT), math.inf

    def handle(number: int, _) -> None:
        nonlocal first
        now = time.monotonic()
        if now - first > ECHO_SECONDS:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        first = min(first, now)
        received.append(number)

    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, previous[number])


def _memory_gb(accelerator: Accelerator) -> float:
    """Largest memory so far: of the device, or of this process where there is none; 0 where nobody counts it."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _note(metrics: dict) -> str:
    return (
        f"loss {metrics['loss']:.4f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
        f"gradient {metrics['grad_norm']:.2f}, {metrics['memory_gb']:.1f} GB"
    )
