"""Loss on text."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@torch.no_grad()
def text_loss(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    length: int,
    windows: int | None = None,
) -> float:
    """
    Mean loss in nats per token over the first `windows` separate windows of `length` tokens, or over all whole ones.

    Args:
        token_ids: the text, a list, array or tensor at least one window and one token long.

    Raises:
        ValueError: the text is too short.
    """
    available = (len(token_ids) - 1) // length
    windows = available if windows is None else min(windows, available)
    if windows < 1:
        raise ValueError(f"the text has {len(token_ids)} tokens, one window of {length} needs {length + 1}")
    losses = []
    for index in range(windows):
        ids = torch.as_tensor(token_ids[index * length : (index + 1) * length + 1], device=model.device).unsqueeze(0)
        logits = model(ids[:, :-1], use_cache=False).logits
        losses.append(F.cross_entropy(logits[0].float(), ids[0, 1:]).item())
    return sum(losses) / len(losses)
