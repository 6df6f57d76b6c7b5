"""The only hooks into a running teacher: what its heads read and write, what they would do otherwise, and slopes."""

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from .selection import Head, Masks

TOKENS_AT_ONCE = 65_536  # of changed streams that exist at once

Visit = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Layer, what its attention reads `[B, T, D]`, its heads' outputs `[B, T, H, d]`; gives others to use, or None."""

Measure = Callable[[torch.Tensor], torch.Tensor]
"""Final normed states `[rows, T, D]` to a number each, `[rows]` fp32."""


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs, also when `accelerate` keeps its weights elsewhere."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def rms_norm(norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """A teacher's norm of fp32 states as it does it, but in one kernel where it has eight, each over all of memory."""
    with align_module_device(norm):  # accelerate may have off-loaded it
        weight = norm.weight.to(states.device, states.dtype)
    return F.rms_norm(states, weight.shape, weight, norm.variance_epsilon)


def final_states(model: PreTrainedModel, token_ids: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor:
    """One forward over `[B, T]` without a cache: final normed states `[B, T, D]`."""
    token_ids = torch.as_tensor(token_ids).to(input_device(model))
    return model.model(token_ids, use_cache=False).last_hidden_state


@contextlib.contextmanager
def visited_heads(model: PreTrainedModel, visit: Visit) -> Iterator[None]:
    """
    Within the block every forward calls `visit` at each layer, where that layer runs, when its heads are known. What
    it gives takes their place; nothing of a layer is kept when the next begins.
    """
    hooks, read = [], {}
    shape = (model.config.num_attention_heads, -1)
    for index, layer in enumerate(model.model.layers):

        def before(_, args, kwargs, index=index):
            read[index] = args[0] if args else kwargs["hidden_states"]

        def at_heads(_, args, index=index):
            found = visit(index, read.pop(index), args[0].unflatten(-1, shape))
            return None if found is None else (found.flatten(2).to(args[0].dtype),)

        hooks.append(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(at_heads))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def visit_heads(model: PreTrainedModel, token_ids: torch.Tensor | Sequence[Sequence[int]], visit: Visit) -> None:
    """Run a model on `[B, T]`, and `visit` its heads."""
    with visited_heads(model, visit):
        final_states(model, token_ids)


def replaced_heads(masks: Masks, others: Visit) -> Visit:
    """What `others` gives in place of the heads that `masks` `[L][H]` names; not asked for layers without any."""
    chosen = torch.tensor(masks, dtype=torch.bool)

    def replace(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor | None:
        if not chosen[layer].any():
            return None
        other = others(layer, hidden_states, heads).to(heads.device, heads.dtype)
        return torch.where(chosen[layer][:, None].to(heads.device), other, heads)

    return replace


@dataclass
class Recording:
    """
    What one forward over `T` ids leaves at `P` of its positions.

    Attributes:
        heads: `[L, P, H, d]`, the input of `W_o`.
        attention: `[L, P, D]`, the output of `W_o`.
        residual: `[L, P, D]`, the input of the layer.
        states: `[P, D]`, the final normed states.
    """

    heads: torch.Tensor
    attention: torch.Tensor
    residual: torch.Tensor
    states: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


@torch.no_grad()
def record(model: PreTrainedModel, ids: Sequence[int], positions: slice, full_residual: bool = False) -> Recording:
    """
    One forward over `T` ids, kept only at `positions`.

    Args:
        full_residual: keep `residual` at all `T` positions.
    """
    device = input_device(model)
    heads, attention, residual, hooks = [], [], [], []

    def keep(kept: list, tensor: torch.Tensor, where: slice = positions) -> None:
        # A copy: a view would hold on to the whole length of every layer.
        kept.append(tensor[0, where].to(device, copy=True))

    everywhere = slice(None) if full_residual else positions
    for layer in model.model.layers:
        hooks += [
            layer.register_forward_pre_hook(lambda _, args: keep(residual, args[0], everywhere)),
            layer.self_attn.o_proj.register_forward_hook(lambda _, args, output: keep(attention, output)),
        ]
    try:
        with visited_heads(model, lambda layer, _, found: keep(heads, found)):
            states = final_states(model, [ids])
    finally:
        for hook in hooks:
            hook.remove()
    stacked = (torch.stack(tensors) for tensors in (heads, attention, residual))
    return Recording(*stacked, states=states[0, positions].to(device, copy=True))


def head_slopes(
    model: PreTrainedModel, ids: Sequence[int], scalar: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """
    Gradient, by every head's output, of a number computed from the final normed states `[T, D]`: `[L, T, H, d]` fp32.

    One forward and one backward pass over `T` tokens.
    """
    heads: list[torch.Tensor] = []

    def keep(layer: int, _, found: torch.Tensor) -> torch.Tensor:
        heads.append(found)
        return found  # what goes on is this very tensor, by which a gradient can be taken

    embeddings = model.model.embed_tokens(torch.tensor([ids], device=input_device(model)))
    with torch.enable_grad(), visited_heads(model, keep):
        embeddings = embeddings.detach().requires_grad_()
        states = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        slopes = torch.autograd.grad(scalar(states[0]), heads)
    return torch.stack([slope[0].float().to(input_device(model)) for slope in slopes])


Layer = tuple[int, torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]
"""
A layer's index, what its attention reads `[1, T, D]`, its heads `[T, H, d]`, and what the model makes of other heads:
from `[rows, T, H, d]` to final normed states `[rows, T, D]`.
"""


def _layers_entered(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[Layer]:
    """The layers of a model that runs on `T` ids, one after the other, each a place to enter the model with others."""
    device, layers = input_device(model), model.model.layers
    states = model.model.embed_tokens(torch.tensor([ids], device=device))
    position_ids = torch.arange(len(ids), device=device).unsqueeze(0)
    context = {
        "position_ids": position_ids,
        "position_embeddings": model.model.rotary_emb(states, position_ids),
        "attention_mask": create_causal_mask(model.config, states, None, None),  # no padding, no cache
    }
    for index, layer in enumerate(layers):
        seen: list[torch.Tensor] = []
        hook = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        above = layer(states, **context)
        hook.remove()

        def finish(heads: torch.Tensor, layer: nn.Module = layer, states=states, later=layers[index + 1 :]):
            states = states.to(heads.device) + layer.self_attn.o_proj(heads.flatten(2))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
            for each in later:
                states = each(states, **context)
            return model.model.norm(states)

        heads = seen[0].unflatten(-1, (model.config.num_attention_heads, -1))
        yield index, layer.input_layernorm(states), heads, finish
        states = above


@torch.no_grad()
def each_head_replaced(
    model: PreTrainedModel,
    ids: Sequence[int],
    candidates: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    measure: Measure,
    wanted: Container[Head] | None = None,
) -> torch.Tensor:
    """
    Visit every head on its own, at all positions, with nothing frozen, and measure what comes out.

    All heads of a layer are one batch that enters the model at that layer. Cost: for each kind of replacement
    `H · L / 2` forwards over `T` tokens.

    Args:
        ids: `T` tokens.
        candidates: layer, what its attention reads `[1, T, D]`, its heads `[T, H, d]`; gives replacements
            `[K, T, H, d]` of `K` kinds.
        wanted: heads to replace, all by default; what is measured of the others is not a number.

    Returns:
        `[1 + K, L, H]` fp32; the first is the intact teacher's, the same everywhere.
    """
    places: list[tuple[int, int, int]] = []
    values: list[float] = []
    for index, read, heads, finish in _layers_entered(model, ids):
        kinds = candidates(index, read, heads)
        rows = [
            (kind, index, head)
            for kind in range(len(kinds))
            for head in range(heads.shape[1])
            if wanted is None or (index, head) in wanted
        ]
        size = max(1, TOKENS_AT_ONCE // len(ids))
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            patched = heads.expand(len(batch), -1, -1, -1).clone()
            for row, (kind, _, head) in enumerate(batch):
                patched[row, :, head] = kinds[kind, :, head].to(heads.dtype)
            values += measure(finish(patched)).cpu().tolist()
        places += rows
    result = torch.full((1 + len(kinds), index + 1, heads.shape[1]), torch.nan)
    result[0] = measure(finish(heads.unsqueeze(0))).cpu().item()
    for (kind, *place), value in zip(places, values):
        result[(1 + kind, *place)] = value
    return result
