"""What the stages share: optimiser, schedule, and a record of every step."""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn


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


def train(
    accelerator: Accelerator,
    model: nn.Module,
    batch_at: Callable[[int], Iterable[torch.Tensor]],
    backward: Callable[[nn.Module, Iterable[torch.Tensor]], dict[str, float]],
    schedule: Schedule,
    metrics_file: Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> nn.Module:
    """
    Train the parameters of `model` that require a gradient with AdamW.

    Args:
        batch_at: the batch of a step; the same step gives the same batch, whatever came before.
        backward: computes the losses of a batch, leaves their gradients in the parameters and gives what to record.
        metrics_file: one JSON line is appended for each step.
        on_step: called after each step with the steps done and what was recorded.

    Returns:
        the trained model, as prepared by `accelerator`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for step in range(schedule.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        metrics = backward(model, [tensor.to(accelerator.device) for tensor in batch_at(step)])
        grad_norm = accelerator.clip_grad_norm_(parameters, schedule.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite ({metrics}); lower the learning rate")
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {
            "grad_norm": float(grad_norm),
            "learning_rate": schedule.learning_rate_at(step),
            "seconds": time.perf_counter() - started,
        }
        if metrics_file is not None and accelerator.is_main_process:
            with metrics_file.open("a") as file:
                file.write(json.dumps({"step": step} | metrics) + "\n")
        if on_step is not None:
            on_step(step + 1, metrics)
    return model.eval()
