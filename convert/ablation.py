"""Heads replaced in an otherwise intact teacher: one by one, or many at once."""

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from .patching import PATH_TOKENS, Head, answer_positions, home, is_answer, readout, readout_direction
from .probes import Pair

Replace = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer, what its attention reads `[B, T, D]`, its heads' outputs `[B, T, H, d]`; gives the outputs to go on with."""


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


def constant_heads(values: torch.Tensor, ablated: Sequence[Sequence[int]]) -> Replace:
    """
    Heads that write a constant.

    Args:
        values: `[L, H, d]`.
        ablated: `[L][H]`, 1 for the heads to replace.
    """
    masks = torch.tensor(ablated, dtype=torch.bool, device=values.device)

    def replace(layer: int, _, heads: torch.Tensor) -> torch.Tensor:
        mask = masks[layer][:, None].to(heads.device)
        return torch.where(mask, values[layer].to(heads.device, heads.dtype), heads)

    return replace


@torch.no_grad()
def mean_heads(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean output `[L, H, d]` fp32 of every head over all positions of some texts."""
    sums: dict[int, torch.Tensor] = {}

    def add(layer: int, _, heads: torch.Tensor) -> torch.Tensor:
        total = heads.float().sum((0, 1)).to(home(model))
        sums[layer] = sums[layer] + total if layer in sums else total
        return heads

    with replaced_heads(model, add):
        for ids in rows:
            model.model(torch.tensor([ids], device=home(model)), use_cache=False)
    return torch.stack([sums[layer] for layer in range(len(sums))]) / sum(map(len, rows))


@torch.no_grad()
def answers_found(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[bool]:
    """
    Whether greedy generation from each clean prompt gives the answer.

    One forward per pair over prompt and answer (see `is_answer`).
    """
    found = []
    for pair in pairs:
        states = model.model(torch.tensor([pair.clean], device=home(model)), use_cache=False).last_hidden_state
        found.append(bool(is_answer(model, states[0, answer_positions(pair)], pair)))
    return found


Measure = Callable[[torch.Tensor], torch.Tensor]
"""Final normed states `[rows, T, D]` to numbers `[rows, M]` fp32."""


def answer_measure(model: PreTrainedModel, pair: Pair) -> Measure:
    """Measures the readout, in logits, and whether greedy generation gives the answer (1 or 0)."""
    positions, direction = answer_positions(pair), readout_direction(model, pair)

    def measure(states: torch.Tensor) -> torch.Tensor:
        states = states[:, positions]
        answered = is_answer(model, states, pair).to(direction)
        return torch.stack([readout(states, direction), answered], dim=1)

    return measure


def divergence_measure(model: PreTrainedModel, states: torch.Tensor) -> Measure:
    """Measures `KL(teacher ‖ patched)` in nats per token, against the teacher's own final states `[T, D]`."""
    chunks = [F.log_softmax(model.lm_head(part).float(), -1) for part in states.split(512)]

    def row(patched: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for part, reference in zip(patched.split(512), chunks):
            logits = F.log_softmax(model.lm_head(part).float(), -1)
            total = total + (reference.exp() * (reference - logits)).sum()
        return total / len(patched)

    return lambda patched: torch.stack([row(states) for states in patched]).unsqueeze(1)


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
        size = max(1, PATH_TOKENS // len(ids))
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
