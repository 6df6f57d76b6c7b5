"""Losses that never hold the logits of a whole batch."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def _chunk_losses(
    student_states, student_head, teacher_states, teacher_head, labels, weights, temperature: float
) -> torch.Tensor:
    student = F.linear(student_states, student_head).float()  # [N, V]
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_states, teacher_head).float() / temperature, dim=-1)
    kl = F.kl_div(F.log_softmax(student / temperature, dim=-1), teacher, reduction="none", log_target=True).sum(-1)
    ce = F.cross_entropy(student, labels, reduction="none")
    return torch.stack([(kl * weights).sum() * temperature**2, (ce * weights).sum()])


def distillation_loss(
    student_states: torch.Tensor,
    student_head: nn.Linear,
    teacher_states: torch.Tensor,
    teacher_head: nn.Linear,
    labels: torch.Tensor,
    weights: torch.Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `KL(teacher ‖ student)` on the logits and cross entropy on the labels, in fp32, computed in chunks of tokens whose
    logits are recomputed in the backward pass: no more than `chunk_tokens` rows of logits exist at a time.

    Args:
        student_states, teacher_states: final hidden states `[B, T, D]`.
        labels: `[B, T]`, the token that follows each position.
        weights: `[B, T]`, what each position weighs; 0 leaves it out.
        temperature: divides both logits in the KL, which is multiplied by its square to keep gradients comparable.

    Returns:
        KL and cross entropy, weighted means in nats per token.
    """
    tensors = (student_states.flatten(0, 1), teacher_states.flatten(0, 1), labels.flatten(), weights.flatten().float())
    total = torch.zeros(2, device=student_states.device)
    for student, teacher, label, weight in zip(*(tensor.split(chunk_tokens) for tensor in tensors)):
        total = total + checkpoint(
            _chunk_losses,
            student,
            student_head.weight,
            teacher,
            teacher_head.weight,
            label,
            weight,
            temperature,
            use_reentrant=False,
        )
    kl, ce = total / weights.sum().clamp_min(1e-6)
    return kl, ce


def head_matching_loss(heads: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Squared error of each head's output over the mean square of its teacher's: 0 is equal, 1 is as bad as silence.

    Args:
        heads, target: `[B, T, H, d]` outputs before `W_o`.

    Returns:
        `[H]` fp32.
    """
    heads, target = heads.float(), target.float()
    return (heads - target).pow(2).mean((0, 1, 3)) / target.pow(2).mean((0, 1, 3)).clamp_min(1e-12)
