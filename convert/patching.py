"""Causal effects of single heads, exactly: receivers by replay with frozen attention."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .probes import Pair

DISCOUNT = 0.9  # λ: what a token of the answer weighs beside the one before it


@dataclass
class Recording:
    """What one forward leaves at the `A` positions that predict the answer, `[L, A, ...]`."""

    heads: torch.Tensor  # [L, A, H, d], the input of W_o
    attention: torch.Tensor  # [L, A, D], the output of W_o
    residual: torch.Tensor  # [L, A, D], the input of the layer
    readout: float  # m


def readout_direction(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """
    `[A, D]` fp32: the direction that, applied to the final normed states at the answer's positions, gives the readout
    `m = (1/Z) Σ_j λ^j (z_j[a⁺_j] - z_j[a⁻_j])`. Tokens on which both answers agree do not count in `Z`.
    """
    device = model.lm_head.weight.device
    answer, wrong = (torch.tensor(ids, device=device) for ids in (pair.answer, pair.wrong))
    weights = DISCOUNT ** torch.arange(len(answer), device=device) * (answer != wrong)
    rows = model.lm_head.weight[answer].float() - model.lm_head.weight[wrong].float()
    return rows * (weights / weights.sum()).unsqueeze(1)


@torch.no_grad()
def record(model: PreTrainedModel, ids: list[int], pair: Pair, direction: torch.Tensor) -> Recording:
    """One forward over `T` ids, kept only where it predicts the answer."""
    first = pair.answer_start - 1
    positions = slice(first, first + len(pair.answer))
    heads, attention, residual, hooks = [], [], [], []
    for layer in model.model.layers:
        o_proj: nn.Linear = layer.self_attn.o_proj
        hooks += [
            layer.register_forward_pre_hook(lambda _, args: residual.append(args[0][0, positions])),
            o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0][0, positions])),
            o_proj.register_forward_hook(lambda _, args, output: attention.append(output[0, positions])),
        ]
    try:
        states = model.model(torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    head_shape = (model.config.num_attention_heads, -1)
    return Recording(
        heads=torch.stack(heads).unflatten(-1, head_shape),
        attention=torch.stack(attention),
        residual=torch.stack(residual),
        readout=float((states[0, positions].float() * direction).sum()),
    )


@torch.no_grad()
def receiver_effects(model: PreTrainedModel, pair: Pair) -> tuple[torch.Tensor, float, float]:
    """
    Direct effect of every head on the readout: its output is replaced, where the answer is predicted, by its output on
    the corrupt text, and every later attention output is held at its clean value (METHOD §2).

    With later attention frozen positions do not interact, so all heads of a layer are replayed as one batch through
    norms and MLPs at the answer's `A` positions. Cost: two forwards over `T` tokens, and for each layer `H · A` tokens
    through the layers above it, without attention. The result equals one frozen-attention forward per head.

    Returns:
        drops `[L, H]` fp32: the clean readout minus the patched one, in logits;
        the clean readout; the corrupt readout.
    """
    direction = readout_direction(model, pair)
    clean = record(model, pair.clean, pair, direction)
    corrupt = record(model, pair.corrupt, pair, direction)
    layers = model.model.layers
    drops = torch.empty(len(layers), model.config.num_attention_heads)
    for index, layer in enumerate(layers):
        weight = layer.self_attn.o_proj.weight.unflatten(1, (model.config.num_attention_heads, -1))  # [D, H, d]
        change = torch.einsum("ahd,Dhd->haD", corrupt.heads[index] - clean.heads[index], weight)  # [H, A, D]
        states = clean.residual[index] + clean.attention[index] + change
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        for later in range(index + 1, len(layers)):
            states = states + clean.attention[later]
            states = states + layers[later].mlp(layers[later].post_attention_layernorm(states))
        patched = (model.model.norm(states).float() * direction).sum((1, 2))  # [H]
        drops[index] = clean.readout - patched.cpu()
    return drops, clean.readout, corrupt.readout
