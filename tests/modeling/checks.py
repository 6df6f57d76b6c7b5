"""What the tests of the model share: tolerances, masks, batches, and ways to feed them."""

import torch
from transformers import DynamicCache, StaticCache

from hydrahead import HydraHeadForCausalLM
from hydrahead.tests.families import VOCAB, mask_examples, random_ids

# Logits are of order 5 and differ by the order of fp32 sums only: 1e-5 is usual, 1e-4 the promise.
CACHE_TOLERANCE = 1e-4
# Full-attention heads everywhere, nowhere, in some layers, irregular.
MASKS = mask_examples(2)
NO_END = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = CACHE_TOLERANCE) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance, difference


def make_cache(kind: str, student: HydraHeadForCausalLM):
    return DynamicCache(config=student.config) if kind == "dynamic" else StaticCache(student.config, max_cache_len=40)


def feed(student, ids, sizes, cache, mask=None) -> torch.Tensor:
    """Logits of `ids`, fed in pieces of the given sizes; what is left over comes last, in one piece."""
    logits, start = [], 0
    for size in [*sizes, ids.shape[1]]:
        end = min(start + size, ids.shape[1])
        if end > start:
            seen = None if mask is None else mask[:, :end]
            logits.append(
                student(ids[:, start:end], attention_mask=seen, past_key_values=cache, use_cache=True).logits
            )
        start = end
    return torch.cat(logits, dim=1)


def states(cache) -> list[torch.Tensor]:
    """Convolution and recurrent states of all layers."""
    tensors = []
    for layer in cache.layers:
        for by_index in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            tensors += [tensor for tensor in by_index.values() if tensor is not None]
    return tensors


def pad_rows(rows: list[torch.Tensor], side: str, filler_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one batch, whatever ids in the padding: ids and mask `[B, T]`."""
    length = max(len(row) for row in rows) + 2
    ids = torch.randint(0, VOCAB, (len(rows), length), generator=torch.Generator().manual_seed(filler_seed))
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


ROWS = [random_ids(1, length, seed=length)[0] for length in (1, 3, 11, 7)]


# A sequence of one token whose key barely matches its query has an output near zero, and the fusion's norm enlarges
# its rounding error: ten times the promise for caches. Leaks between sequences are of order 1.
PACKING_TOLERANCE = 1e-3
PACKED_LENGTHS = [[5, 1, 9, 2], [17], [1] * 17, [3, 14]]


def packed_rows(lengths=PACKED_LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(len(lengths), sum(lengths[0]))
    return ids, torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
