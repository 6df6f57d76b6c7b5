"""
The direct effect of every head on the answer, by replay with frozen attention.

Here and in path patching a teacher is a residual stream that attention and MLPs write to. *Frozen* attention writes
what it wrote on the clean text, so that positions do not interact and a change is carried along by norms and MLPs
alone. Weights stay in the teacher's dtype, the carried stream is fp32, and every effect is a difference from an
unchanged row that was carried beside the changed ones, so that rounding cancels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..hooks import Recording, record, rms_norm
from .probes import Pair
from .readout import answer_positions, is_answer, readout, readout_direction

MLP_TOKENS = 16_384  # tokens that pass an MLP at once

Changes = dict[int, tuple[int, torch.Tensor]]
"""By layer: the first row that its attention output is changed in, and the changes `[rows, P, D]`."""


def _mlp(layer: nn.Module, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[rows, P, D]` fp32 to the same after the layer's MLP, a bounded number of tokens at a time."""

    def block(tokens: torch.Tensor) -> torch.Tensor:
        output = layer.mlp(rms_norm(layer.post_attention_layernorm, tokens).to(dtype))
        return tokens + output.to(tokens.device)

    run = block
    if torch.is_grad_enabled():

        def run(tokens: torch.Tensor) -> torch.Tensor:
            return checkpoint(block, tokens, use_reentrant=False)

    return torch.cat([run(tokens) for tokens in states.flatten(0, 1).split(MLP_TOKENS)]).view_as(states)


def carry(
    model: PreTrainedModel,
    attention: torch.Tensor,
    residual: torch.Tensor,
    changes: Changes,
    last: int | None = None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    Carry changes of attention outputs up the residual stream, with all other attention frozen.

    A row starts in the first layer that changes it; rows are ordered by where they start. No layer is computed for a
    row before that.

    Args:
        attention, residual: `[L, P, D]` of the clean text.
        last: layer whose input is wanted last; the final states (before the final norm) if `None`.

    Yields:
        a layer's index (`L` for the final states), its input in the rows started so far `[rows, P, D]`, and the
        unchanged input `[P, D]`, both fp32.
    """
    layers = model.model.layers
    last = len(layers) if last is None else last
    start = min(changes, default=last)
    reference = residual[min(start, len(layers) - 1)].float()
    rows = reference.new_empty(0, *reference.shape)
    for index in range(start, last):
        yield index, rows, reference
        first, change = changes.get(index, (0, rows[:0]))
        new = first + len(change) - len(rows)
        states = torch.cat([reference[None], rows, reference.expand(max(0, new), -1, -1)])
        states += attention[index]
        if len(change):
            states[1 + first : 1 + first + len(change)] += change
        states = _mlp(layers[index], states, model.dtype)
        reference, rows = states[0], states[1:]
    yield last, rows, reference


def direct_effects(
    model: PreTrainedModel, clean: Recording, changes: Changes, direction: torch.Tensor
) -> torch.Tensor:
    """Drop of the readout `[rows]` fp32, in logits, when attention outputs are changed at the answer's positions."""
    *_, (_, rows, reference) = carry(model, clean.attention, clean.residual, changes)
    readouts = readout(model.model.norm(torch.cat([reference[None], rows])), direction)
    return readouts[0] - readouts[1:]


def output_change(layer: nn.Module, heads: torch.Tensor, clean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `W_o` makes of head outputs `[rows, P, H, d]` beyond what it makes of the clean ones `[P, H, d]`: fp32."""
    stacked = torch.cat([clean[None].to(heads.dtype), heads]).flatten(2)
    outputs = layer.self_attn.o_proj(stacked.to(dtype)).float().to(heads.device)
    return outputs[1:] - outputs[0]


def each_head_changed(clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Head outputs `[P, H, d]` to `[H, P, H, d]`: row `h` has head `h` from `other`, all others clean."""
    heads = torch.eye(clean.shape[1], dtype=torch.bool, device=clean.device)  # [rows, H]
    return torch.where(heads[:, None, :, None], other, clean)


class ReceiverEffects(NamedTuple):
    """
    What `receiver_effects` gives.

    Attributes:
        drops: `[L, H]` fp32: the clean readout minus the patched one, in logits.
        clean, corrupt: the readouts of the two texts.
        answered: whether greedy generation from the clean prompt gives the answer.
    """

    drops: torch.Tensor
    clean: float
    corrupt: float
    answered: bool


@torch.no_grad()
def receiver_effects(model: PreTrainedModel, pair: Pair) -> ReceiverEffects:
    """
    Direct effect of every head on the readout: its output is replaced, where the answer is predicted, by its output on
    the corrupt text, and every later attention output is held at its clean value (docs/method.md §2).

    Equals one frozen-attention forward per head; exactly 0 for a head that the corruption does not change. Cost:
    two forwards over `T` tokens, and each layer's MLP once for the `A` positions of all heads below it; each layer is
    needed once, so that off-loaded weights travel once.
    """
    direction = readout_direction(model, pair)
    clean, corrupt = (record(model, ids, answer_positions(pair)) for ids in (pair.clean, pair.corrupt))
    heads = model.config.num_attention_heads
    changes = {}
    for index, layer in enumerate(model.model.layers):
        patched = each_head_changed(clean.heads[index], corrupt.heads[index])
        changes[index] = (index * heads, output_change(layer, patched, clean.heads[index], model.dtype))
    drops = direct_effects(model, clean, changes, direction).view(-1, heads)
    unchanged = (clean.heads == corrupt.heads).all(3).all(1)  # [L, H]
    return ReceiverEffects(
        drops.masked_fill(unchanged, 0).cpu(),
        *(readout(recording.states, direction).item() for recording in (clean, corrupt)),
        bool(is_answer(model, clean.states, pair)),
    )
