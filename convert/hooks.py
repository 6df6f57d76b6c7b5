"""The only hooks into a running teacher: what its heads read and write, what they would do otherwise, and slopes."""

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

TOKENS_AT_ONCE = 65_536  # of changed streams that exist at once

Head = tuple[int, int]
"""Layer and query head."""

Replace = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer, what its attention reads `[B, T, D]`, its heads' outputs `[B, T, H, d]`; gives the outputs to go on with."""

Measure = Callable[[torch.Tensor], torch.Tensor]
"""Final normed states `[rows, T, D]` to numbers `[rows, M]` fp32."""


def home(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs, also when `accelerate` keeps its weights elsewhere."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


@contextlib.contextmanager
def replaced_heads(model: PreTrainedModel, replace: Replace) -> Iterator[None]:
    """Within the block every forward of the model uses the head outputs that `replace` gives."""
    hooks, reads = [], {}
    shape = (model.config.num_attention_heads, -1)
    for index, layer in enumerate(model.model.layers):

        def before(_, args, kwargs, index=index):
            reads[index] = args[0] if args else kwargs["hidden_states"]

        def swap(_, args, index=index):
            return (replace(index, reads.pop(index), args[0].unflatten(-1, shape)).flatten(2).to(args[0].dtype),)

        hooks.append(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(swap))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


@torch.no_grad()
def record(model: PreTrainedModel, ids: Sequence[int], positions: slice, full_residual: bool = False) -> Recording:
    """
    One forward over `T` ids, kept only at `positions`.

    Args:
        full_residual: keep `residual` at all `T` positions.
    """
    device = home(model)
    heads, attention, residual, hooks = [], [], [], []

    def keep(kept: list, tensor: torch.Tensor, where: slice = positions) -> None:
        # A copy: a view would hold on to the whole length of every layer.
        kept.append(tensor[0, where].to(device, copy=True))

    everywhere = slice(None) if full_residual else positions
    for layer in model.model.layers:
        o_proj: nn.Linear = layer.self_attn.o_proj
        hooks += [
            layer.register_forward_pre_hook(lambda _, args: keep(residual, args[0], everywhere)),
            o_proj.register_forward_pre_hook(lambda _, args: keep(heads, args[0])),
            o_proj.register_forward_hook(lambda _, args, output: keep(attention, output)),
        ]
    try:
        states = model.model(torch.tensor([ids], device=device), use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return Recording(
        heads=torch.stack(heads).unflatten(-1, (model.config.num_attention_heads, -1)),
        attention=torch.stack(attention),
        residual=torch.stack(residual),
        states=states[0, positions].to(device, copy=True),
    )


def head_slopes(
    model: PreTrainedModel, ids: Sequence[int], scalar: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """
    Gradient, by every head's output, of a number computed from the final normed states `[T, D]`: `[L, T, H, d]` fp32.

    One forward and one backward pass over `T` tokens.
    """
    inputs, hooks = [], []
    for layer in model.model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
    embeddings = model.model.embed_tokens(torch.tensor([ids], device=home(model))).detach().requires_grad_()
    try:
        with torch.enable_grad():
            states = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            slopes = torch.autograd.grad(scalar(states[0]), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    stacked = torch.stack([slope[0].float().to(home(model)) for slope in slopes])
    return stacked.unflatten(-1, (model.config.num_attention_heads, -1))


@torch.no_grad()
def each_head_replaced(
    model: PreTrainedModel,
    ids: Sequence[int],
    candidates: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    measure: Measure,
    wanted: Container[Head] | None = None,
) -> torch.Tensor:
    """
    Replace every head on its own, at all positions, with nothing frozen, and measure what comes out.

    All heads of a layer are one batch that enters the model at that layer. Cost: for each kind of replacement
    `H · L / 2` forwards over `T` tokens.

    Args:
        ids: `T` tokens.
        candidates: layer, what its attention reads `[1, T, D]`, its heads `[T, H, d]`; gives replacements
            `[K, T, H, d]` of `K` kinds.
        measure: see `Measure`.
        wanted: heads to replace, all by default; what is measured of the others is not a number.

    Returns:
        `[1 + K, L, H, M]` fp32; the first is the intact teacher's, the same everywhere.
    """
    device, shape = home(model), (model.config.num_attention_heads, -1)
    states = model.model.embed_tokens(torch.tensor([ids], device=device))
    position_ids = torch.arange(len(ids), device=device).unsqueeze(0)
    context = {
        "position_ids": position_ids,
        "position_embeddings": model.model.rotary_emb(states, position_ids),
        "attention_mask": create_causal_mask(model.config, states, None, None),  # no padding, no cache
    }
    measured: dict[tuple[int, int, int], torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        seen: dict[str, torch.Tensor] = {}

        def keep(_, args, seen=seen) -> None:
            seen["heads"] = args[0][0]

        hook = layer.self_attn.o_proj.register_forward_pre_hook(keep)
        above = layer(states, **context)
        hook.remove()
        heads = seen["heads"].unflatten(-1, shape)  # [T, H, d]
        kinds = candidates(index, layer.input_layernorm(states), heads)
        rows = [
            (kind, head)
            for kind in range(len(kinds))
            for head in range(shape[0])
            if wanted is None or (index, head) in wanted
        ]
        size = max(1, TOKENS_AT_ONCE // len(ids))
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            patched = heads.expand(len(batch), -1, -1, -1).clone()
            for row, (kind, head) in enumerate(batch):
                patched[row, :, head] = kinds[kind, :, head].to(heads.dtype)
            for place, value in zip(batch, measure(_finish(model, index, states, patched, context)).float().cpu()):
                measured[(index, *place)] = value
        states = above
    intact = measure(model.model.norm(states))[0].float().cpu()  # [M]
    result = torch.full((1 + len(kinds), len(model.model.layers), shape[0], len(intact)), torch.nan)
    result[0] = intact
    for (index, kind, head), value in measured.items():
        result[1 + kind, index, head] = value
    return result


def _finish(model: PreTrainedModel, index: int, states: torch.Tensor, heads: torch.Tensor, context: dict):
    """Final normed states `[rows, T, D]` when layer `index` reads `states` and its heads write `[rows, T, H, d]`."""
    layer: nn.Module = model.model.layers[index]
    states = states.to(heads.device) + layer.self_attn.o_proj(heads.flatten(2))
    states = states + layer.mlp(layer.post_attention_layernorm(states))
    for later in model.model.layers[index + 1 :]:
        states = later(states, **context)
    return model.model.norm(states)
