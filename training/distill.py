"""Stage 2: train the whole student on the teacher's logits and on the text (METHOD §3)."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..modeling_hydrahead import HydraHeadForCausalLM
from .loop import Schedule, train
from .losses import distillation_loss

__all__ = ["distill"]


def distill(
    accelerator: Accelerator,
    teacher: PreTrainedModel,
    student: HydraHeadForCausalLM,
    batch_at: Callable[[int], Iterable[torch.Tensor]],
    schedule: Schedule,
    kl_weight: float = 1.0,
    ce_weight: float = 0.1,
    metrics_file: Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> HydraHeadForCausalLM:
    """
    Train all of a student's parameters on `kl_weight · KL(teacher ‖ student) + ce_weight · CE`.

    Args:
        teacher: in eval mode; moved to the accelerator's device.
        student: in fp32.
        batch_at: token ids `[B, T]` and loss weights `[B, T]` of a step; a weight belongs to the prediction *of* the
            token that it stands on.

    Returns:
        the trained student, in eval mode.
    """
    teacher = teacher.to(accelerator.device)

    def backward(model: nn.Module, batch: Iterable[torch.Tensor]) -> dict[str, float]:
        token_ids, weights = batch
        with torch.no_grad():
            teacher_states = teacher.model(token_ids[:, :-1], use_cache=False).last_hidden_state
        student_model = accelerator.unwrap_model(model)
        student_states = student_model.model(token_ids[:, :-1], use_cache=False).last_hidden_state
        kl, ce = distillation_loss(
            student_states,
            student_model.lm_head,
            teacher_states,
            teacher.lm_head,
            labels=token_ids[:, 1:],
            weights=weights[:, 1:],
        )
        accelerator.backward(kl_weight * kl + ce_weight * ce)
        return {"kl": float(kl.detach()), "ce": float(ce.detach())}

    return accelerator.unwrap_model(train(accelerator, student, batch_at, backward, schedule, metrics_file, on_step))
