"""Loss on text."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

CHUNK_TOKENS = 1024  # rows of logits that exist at once in fp32


@torch.no_grad()
def text_loss(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    length: int,
    windows: int | None = None,
) -> float:
    """
    Mean loss in nats per token over the first `windows` separate windows of `length` tokens, or over all whole ones.

    Logits are made in chunks of tokens; where a model scales or caps them after its output embedding, by the model
    itself for a whole window.

    Args:
        token_ids: the text, a list, array or tensor at least one window and one token long.

    Raises:
        ValueError: the text is too short.
    """
    available = (len(token_ids) - 1) // length
    windows = available if windows is None else min(windows, available)
    if windows < 1:
        raise ValueError(f"the text has {len(token_ids)} tokens, one window of {length} needs {length + 1}")
    total, in_chunks = 0.0, None
    for index in range(windows):
        ids = torch.as_tensor(token_ids[index * length : (index + 1) * length + 1], device=model.device).unsqueeze(0)
        if in_chunks is None:
            in_chunks = _head_is_last(model, ids[:, :2])
        if in_chunks:
            states = model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state
            parts = (model.get_output_embeddings()(part) for part in states.split(CHUNK_TOKENS, dim=1))
        else:
            parts = model(ids[:, :-1], use_cache=False).logits.split(CHUNK_TOKENS, dim=1)
        for logits, labels in zip(parts, ids[0, 1:].split(CHUNK_TOKENS)):
            total += F.cross_entropy(logits[0].float(), labels.to(logits.device), reduction="sum").item()
    return total / (windows * length)


def _head_is_last(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether a model's logits are what its output embedding makes of its states: some scale or cap them after it."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    logits = head(model.get_decoder()(ids, use_cache=False).last_hidden_state)
    return torch.equal(logits, model(ids, use_cache=False).logits.to(logits))  # which may be on another device
