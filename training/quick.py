"""Alignment without a recipe, enough to compare heads by: what `hydrahead score` runs where no forms are given."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..convert.forms import calibrated_forms
from ..convert.hooks import input_device
from ..convert.migration import Forms, student_config
from ..convert.teachers import adapter_for
from ..data.mixture import mixture_rows
from .align import align_heads
from .loop import Schedule

ROWS, LENGTH = 4, 512
LEARNING_RATE, LEAST_LEARNING_RATE = 6e-3, 6e-5


def quick_forms(
    teacher: PreTrainedModel,
    tokenizer,
    text_ids: np.ndarray,
    options: dict,
    steps: int,
    seed: int = 0,
    on_step: Callable[[int, dict], None] | None = None,
) -> Forms:
    """
    Both forms of every head, aligned on text three rows in four of which hide needles and ask for them.

    Heads are fitted to what they do on the rows they read: text without a single needle leaves those that find needles
    untrained for it (docs/experiments.md). The recipes' first stage is the same with more of it.

    Args:
        teacher: in eval mode, where it should run; off-loaded by accelerate, split over devices or neither.
        text_ids: token ids of a text.
        options: of the student, as in `convert.migration.student_config`.
        steps: optimiser steps of 4 rows of 512 tokens.

    Returns:
        the forms, on the CPU.
    """
    adapter = adapter_for(teacher.config)
    config = student_config(adapter, [[0] * adapter.num_heads] * adapter.num_layers, **options)

    def batch_at(step: int) -> list[torch.Tensor]:
        ids, _ = mixture_rows(tokenizer, text_ids, LENGTH, ROWS, [seed, step])
        return [torch.from_numpy(ids)]

    return align_heads(
        Accelerator(cpu=input_device(teacher).type == "cpu"),
        teacher,
        config,
        calibrated_forms(teacher, batch_at(-1 % 2**32)[0], config),
        batch_at,
        Schedule(steps, LEARNING_RATE, LEAST_LEARNING_RATE),
        on_step=on_step,
    )
