"""Alignment without a recipe, enough to compare heads by: what `hydrahead score` runs where no forms are given."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..console import progress
from ..convert.calibration import calibrated_forms
from ..convert.forms import Forms, save_forms
from ..convert.hooks import input_device
from ..convert.options import options_of, student_config
from ..convert.scoring.command import Unfinished, check_settings, load_teacher, read_probes, text_name
from ..convert.scoring.settings import ScoreSettings
from ..convert.teachers import adapter_for
from ..data.mixture import mixture_rows
from ..provenance import environment
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
    The forms of every head, aligned on text three rows in four of which hide needles and ask for them.

    Heads are fitted to what they do on the rows they read: text without a single needle leaves those that find needles
    untrained for it (docs/experiments.md). The recipes' first stage is the same with more of it.

    Args:
        teacher: in eval mode, where it should run; off-loaded by accelerate, split over devices or neither.
        text_ids: token ids of a text.
        options: of the student, as in `convert.options.student_config`.
        steps: optimiser steps of 4 rows of 512 tokens.

    Returns:
        the forms, on the CPU.
    """
    adapter = adapter_for(teacher.config)
    config = student_config(adapter, adapter.blank_masks, **options)

    def batch_at(step: int) -> torch.Tensor:
        return torch.from_numpy(mixture_rows(tokenizer, text_ids, LENGTH, ROWS, [seed, step])[0])

    accelerator = Accelerator(cpu=input_device(teacher).type == "cpu")
    start = calibrated_forms(teacher, batch_at(2**32 - 1), config)  # rows of no step
    schedule = Schedule(steps, LEARNING_RATE, LEAST_LEARNING_RATE)
    return align_heads(accelerator, teacher, config, start, batch_at, schedule, on_step)


def align_for_scores(settings: ScoreSettings, output: Path) -> None:
    """
    Align the heads that `score_to_folder` will measure under the same settings, where it needs them and no file has
    them: a step of its own, which is not done again when what follows is interrupted.

    Raises:
        ValueError: see `check_settings`.
    """
    if not settings.needs_forms or settings.forms is not None:
        return
    opened, tokenizer, length = check_settings(settings)
    text_ids, _ = read_probes(settings, tokenizer, length)  # what is wrong with them is known before
    unfinished = Unfinished(output, settings)
    if unfinished.has_forms:
        return
    steps, seed, adapter = settings.align_steps, settings.seed, opened.adapter
    options = options_of(student_config(adapter, adapter.blank_masks, **settings.options or {}))
    teacher = load_teacher(opened, settings)
    unfinished.begin()
    with progress("align heads", steps) as advance:
        forms = quick_forms(teacher, tokenizer, text_ids, options, steps, seed, lambda *_: advance())
    made_from = {"text": text_name(settings), "length": LENGTH, "rows": ROWS, "steps": steps, "seed": seed}
    made_from |= {"dtype": settings.dtype, **opened.identity, **environment()}
    save_forms(forms, options, unfinished.forms, made_from)
