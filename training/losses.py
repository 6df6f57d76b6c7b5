"""Losses that never hold the logits of a whole batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

CHUNK_TOKENS = 1024  # rows of logits that exist at once

TeacherChunk = Callable[[slice], tuple[torch.Tensor, torch.Tensor | None]]
"""
The teacher's view of some tokens, at the temperature of the loss: its logits `[n, V]` and `None`, or the log
probabilities of its `k` likeliest tokens `[n, k]` fp32 and which ones they are.
"""


def _divergence(
    log_q: torch.Tensor, log_p: torch.Tensor, indices: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `KL(p ‖ q)` `[n]`, and the probabilities `[n, V]` that its gradient `q - p` asks for.

    Where only the teacher's likeliest tokens are known, all others are one event: the teacher says how likely it is,
    the student how it is divided. This is exact where all are known and never more than the divergence elsewhere.
    """
    p = log_p.exp()
    if indices is None:
        return (p * (log_p - log_q)).sum(-1), p
    kl = (p * (log_p - log_q.gather(-1, indices))).sum(-1)
    if indices.shape[-1] == log_q.shape[-1]:
        return kl, torch.zeros_like(log_q).scatter(-1, indices, p)
    q = log_q.exp()
    rest_q = q.scatter(-1, indices, 0.0).sum(-1).clamp_min(1e-30)
    rest_p = (1 - p.sum(-1)).clamp_min(1e-30)
    target = (q * (rest_p / rest_q).unsqueeze(-1)).scatter(-1, indices, p)
    return kl + rest_p * (rest_p.log() - rest_q.log()), target


def _losses_of_chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    kl_scale: torch.Tensor,
    ce_scale: torch.Tensor,
    teacher: tuple[torch.Tensor, torch.Tensor | None] | None,
    temperature: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    KL and cross entropy of each token `[n]`, and the gradient of the scaled losses' sum by the logits, in their dtype.

    Args:
        logits: `[n, V]`.
        labels, kl_scale, ce_scale: `[n]`.
        temperature: `None` for 1.
    """
    whole = logits.float()
    log_q = F.log_softmax(whole if temperature is None else whole / temperature, dim=-1)
    kl, grad = torch.zeros_like(kl_scale), 0.0
    if teacher is not None:
        values, indices = teacher
        log_p = F.log_softmax(values.float(), dim=-1) if indices is None else values
        kl, target = _divergence(log_q, log_p, indices)
        grad = (log_q.exp() - target) * kl_scale.unsqueeze(-1)
    if temperature is not None:
        log_q = F.log_softmax(whole, dim=-1)
    ce = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    is_label = torch.arange(whole.shape[-1], device=whole.device) == labels.unsqueeze(-1)
    grad = grad + (log_q.exp() - is_label.float()) * ce_scale.unsqueeze(-1)
    return kl, ce, grad.to(logits.dtype)


# Over logits of a large vocabulary there are some twenty operations, which a GPU does in three kernels.
_compiled_losses = torch.compile(_losses_of_chunk, dynamic=False)


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient where the logits are at hand, in the forward pass: nothing is computed twice."""

    @staticmethod
    def forward(ctx, states, head_weight, labels, weights, teacher, kl_weight, ce_weight, temperature, chunk_tokens):
        wants_states, wants_head = ctx.needs_input_grad[:2]
        states_grad = torch.empty_like(states) if wants_states else None
        head_grad = torch.zeros_like(head_weight) if wants_head else None
        losses_of = _compiled_losses if states.is_cuda else _losses_of_chunk
        kl_scale, ce_scale = weights * (kl_weight * temperature), weights * ce_weight
        sums = torch.zeros(2, device=states.device)
        for start in range(0, len(states), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            kl, ce, logits_grad = losses_of(
                F.linear(states[part], head_weight),
                labels[part],
                kl_scale[part],
                ce_scale[part],
                None if teacher is None else teacher(part),
                None if temperature == 1 else temperature,
            )
            sums += torch.stack([(kl * weights[part]).sum() * temperature**2, (ce * weights[part]).sum()])
            if wants_states:
                states_grad[part] = F.linear(logits_grad, head_weight.t()).to(states.dtype)
            if wants_head:
                head_grad += (logits_grad.t() @ states[part]).to(head_weight.dtype)
        ctx.grads = states_grad, head_grad
        ctx.mark_non_differentiable(sums)
        return kl_weight * sums[0] + ce_weight * sums[1], sums

    @staticmethod
    def backward(ctx, grad, _):
        grads, ctx.grads = ctx.grads, None
        return *(None if each is None else each.mul_(grad.to(each.dtype)) for each in grads), *(None for _ in range(7))


def distillation_loss(
    states: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    teacher: TeacherChunk | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `kl_weight · KL(teacher ‖ student) + ce_weight · CE`, summed over tokens, in fp32 and in chunks of tokens: no more
    than `chunk_tokens` rows of logits exist at a time. Can be differentiated once.

    Args:
        states: the student's final hidden states `[N, D]`.
        head_weight: its language-model head `[V, D]`.
        labels: `[N]`, the token that follows each position.
        weights: `[N]`, what each position weighs; 0 leaves it out.
        teacher: gives the teacher's log probabilities; `None` for cross entropy alone.
        temperature: divides both logits in the KL, which is multiplied by its square to keep gradients comparable.

    Returns:
        the loss, and weighted sums of KL and cross entropy `[2]` in nats, without gradient.
    """
    if teacher is None:
        kl_weight = 0.0
    return _ChunkedLoss.apply(
        states, head_weight, labels, weights.float(), teacher, kl_weight, ce_weight, temperature, chunk_tokens
    )


def teacher_chunks(states: torch.Tensor, head_weight: torch.Tensor, temperature: float) -> TeacherChunk:
    """The whole distribution of a teacher with final hidden states `[N, D]`, computed when it is asked for."""

    def chunk(part: slice) -> tuple[torch.Tensor, None]:
        logits = F.linear(states[part], head_weight)
        return (logits if temperature == 1 else logits.float() / temperature), None

    return chunk


def mean_square(heads: torch.Tensor) -> torch.Tensor:
    """Mean square `[H]` fp32 of head outputs `[B, T, H, d]`."""
    return heads.float().pow(2).mean((0, 1, 3))


def head_matching_loss(
    heads: torch.Tensor, target: torch.Tensor, target_square: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Squared error of each head's output over the mean square of its teacher's: 0 is equal, 1 is as bad as silence.

    Args:
        heads, target: `[B, T, H, d]` outputs before `W_o`.
        target_square: `[H]`, what errors are divided by where it should not depend on the batch.

    Returns:
        `[H]` fp32.
    """
    square = mean_square(target) if target_square is None else target_square
    return mean_square(heads.float() - target.float()) / square.clamp_min(1e-12)
