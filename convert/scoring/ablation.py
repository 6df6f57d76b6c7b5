"""Heads that write their mean instead of what they would write."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from ..hooks import Visit, each_head_replaced, input_device, replaced_heads, visit_heads
from ..selection import Masks
from .methods import Bench, UsedPairs
from .readout import answer_measure

MEAN_TEXTS = 4  # over which a head's mean output is taken


@torch.no_grad()
def mean_heads(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean output `[L, H, d]` fp32 of every head over all positions of some texts."""
    sums: dict[int, torch.Tensor] = {}

    def add(layer: int, _, heads: torch.Tensor) -> None:
        sums[layer] = sums.get(layer, 0) + heads.float().sum((0, 1)).to(input_device(model))

    for ids in rows:
        visit_heads(model, [ids], add)
    return torch.stack([sums[layer] for layer in range(len(sums))]) / sum(map(len, rows))


def constant_heads(values: torch.Tensor, masks: Masks) -> Visit:
    """Constants `[L, H, d]` in place of what the heads that `masks` `[L][H]` names write."""
    return replaced_heads(masks, lambda layer, *_: values[layer])


def mean_ablation(bench: Bench, used: UsedPairs) -> Iterator[torch.Tensor]:
    """The method of this name; means over the first four clean texts."""
    means = mean_heads(bench.teacher, [pair.clean for pair in used.pairs[:MEAN_TEXTS]])

    def candidates(layer: int, _, heads: torch.Tensor) -> torch.Tensor:
        return means[layer].to(heads.device, heads.dtype).expand(1, *heads.shape)

    for pair, scale in zip(used.pairs, used.scales):
        measure = answer_measure(bench.teacher, pair)
        measured = each_head_replaced(bench.teacher, pair.clean, candidates, measure)
        yield (measured[0] - measured[1]) / scale
