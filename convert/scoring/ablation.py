"""Heads that write their mean instead of what they would write."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..hooks import Replace, home, replaced_heads


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
