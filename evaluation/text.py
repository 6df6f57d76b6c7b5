"""Loss on text, by position, and how far a model's predictions are from a reference's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .models import check_positions

CHUNK_TOKENS = 1024  # rows of logits that exist at once in fp32
FIRST_BUCKET = 128


@dataclass(frozen=True)
class Window:
    """
    What a model predicts in one window of text.

    Attributes:
        losses: sums of nats over the positions of each of `position_buckets`.
        kl: sum over all positions of KL(reference ‖ model) in nats; `None` without a reference.
        agreed: positions at which both hold the same token for the likeliest; `None` without a reference.
    """

    losses: list[float]
    kl: float | None = None
    agreed: int | None = None


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Positions `[start, end)` in buckets that double: 0–128, 128–256, 256–512, … up to `length`."""
    edges = [0, FIRST_BUCKET]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(start, min(end, length)) for start, end in pairwise(edges) if start < length]


@torch.no_grad()
def read_windows(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    length: int,
    windows: Sequence[int],
    reference: PreTrainedModel | None = None,
    batch_tokens: int = 1,
) -> Iterator[Window]:
    """
    Predict separate windows of `length` tokens.

    Logits are made in chunks of tokens; where a model scales or caps them after its output embedding, by the model
    itself for a whole window, and windows are then read one by one.

    Args:
        token_ids: the text, a list, array or tensor.
        windows: which ones, by number: the first begins at the first token.
        reference: has the same vocabulary.
        batch_tokens: of windows that are read together, one at the least; what does not fit into the GPU's memory is
            divided.

    Raises:
        ValueError: a window is longer than a model with learned positions can read.
    """
    models = [model] if reference is None else [model, reference]
    for each in models:
        check_positions(each, length)
    probe = torch.as_tensor(token_ids[:2]).unsqueeze(0)
    in_chunks = [_head_is_last(each, probe.to(each.device)) for each in models]
    rows, done = max(1, batch_tokens // length) if all(in_chunks) else 1, 0
    while done < len(windows):
        spans = [token_ids[index * length : (index + 1) * length + 1] for index in windows[done : done + rows]]
        try:
            found = _read(models, in_chunks, torch.stack([torch.as_tensor(span) for span in spans]))
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            rows = -(-rows // 2)
            continue
        yield from found
        done += len(spans)


def _read(models: Sequence[PreTrainedModel], in_chunks: Sequence[bool], ids: torch.Tensor) -> list[Window]:
    """Windows `ids` `[rows, length + 1]` that are read together; the arguments as in `read_windows` and `_logits`."""
    rows, length = ids.shape[0], ids.shape[1] - 1
    labels = ids[:, 1:].flatten().split(CHUNK_TOKENS)
    logits = [_logits(each, ids[:, :-1].to(each.device), chunked) for each, chunked in zip(models, in_chunks)]
    of_chunks = [_predictions(*chunk) for chunk in zip(labels, *logits)]
    columns = [torch.cat(parts).view(rows, length).cpu() for parts in zip(*of_chunks)]
    found = []
    for losses, *others in zip(*columns):
        sums = [losses[begin:end].sum().item() for begin, end in position_buckets(length)]
        found.append(Window(sums, *(each.sum().item() for each in others)))
    return found


def _predictions(labels: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor | None = None) -> list[torch.Tensor]:
    """
    Of each token its loss, and with other logits KL(theirs ‖ ours) and whether both hold the same for the likeliest.

    Args:
        labels: `[T]`.
        ours, theirs: logits `[T, vocabulary]`.
    """
    ours = ours.float()
    found = [F.cross_entropy(ours, labels.to(ours.device), reduction="none").double()]
    if theirs is not None:
        theirs = theirs.to(ours.device).float()
        same = ours.argmax(-1) == theirs.argmax(-1)
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        found += [F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).double(), same]
    return found


def text_loss(
    model: PreTrainedModel, token_ids: Sequence[int], length: int, windows: int | None = None, batch_tokens: int = 1
) -> float:
    """
    Mean loss in nats per token over the first `windows` separate windows of `length` tokens, or over all whole ones;
    `batch_tokens` as in `read_windows`.

    Raises:
        ValueError: the text is too short.
    """
    available = count_windows(token_ids, length)
    windows = available if windows is None else min(windows, available)
    found = read_windows(model, token_ids, length, range(windows), batch_tokens=batch_tokens)
    return sum(sum(window.losses) for window in found) / (windows * length)


def count_windows(token_ids: Sequence[int], length: int) -> int:
    """
    Whole windows that a text has.

    Raises:
        ValueError: not one.
    """
    available = (len(token_ids) - 1) // length
    if available < 1:
        raise ValueError(f"the text has {len(token_ids)} tokens, one window of {length} needs {length + 1}")
    return available


def _logits(model: PreTrainedModel, ids: torch.Tensor, in_chunks: bool) -> Iterator[torch.Tensor]:
    """Logits `[chunk, vocabulary]` of all positions of `ids` `[rows, T]`, row after row, some at a time."""
    if not in_chunks:
        yield from model(ids, use_cache=False).logits.flatten(0, 1).split(CHUNK_TOKENS)
        return
    states = model.get_decoder()(ids, use_cache=False).last_hidden_state
    for part in states.flatten(0, 1).split(CHUNK_TOKENS):
        yield model.get_output_embeddings()(part)


def _head_is_last(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether a model's logits are what its output embedding makes of its states: some scale or cap them after it."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    logits = head(model.get_decoder()(ids, use_cache=False).last_hidden_state)
    return torch.equal(logits, model(ids, use_cache=False).logits.to(logits))  # which may be on another device
