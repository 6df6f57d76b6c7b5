"""Needles answered: greedy generation, scored as RULER does (arXiv 2404.06654), in cells of one task and length."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.needles import NiahSample, make_niah

TASKS = {"niah_single": 1, "niah_four": 4}  # keys in a prompt, one of which is asked for
FIRST_SEED = 1_000_000  # of prompts that are evaluated; training rows come from small seeds, and from other text


@dataclass(frozen=True)
class NiahCell:
    """
    Prompts of one task at one length.

    Attributes:
        task: a key of `TASKS`.
        length: tokens of a prompt and its answer.
    """

    task: str
    length: int
    samples: list[NiahSample]


def niah_cells(tokenizer, heldout_ids: Sequence[int], lengths: Sequence[int], count: int) -> list[NiahCell]:
    """
    `count` prompts of every task at every length, hidden in held-out text; the same ones for every model.

    Args:
        heldout_ids: token ids of the text, more than the longest prompt has.

    Raises:
        ValueError: a length too short for the needles, or a short text.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    return [
        NiahCell(task, length, [make_niah(tokenizer, heldout_ids, length, num_keys=keys, seed=seed) for seed in seeds])
        for length in lengths
        for task, keys in TASKS.items()
    ]


def answer_cell(model, tokenizer, cell: NiahCell, batch_tokens: int = 4096) -> int:
    """
    In how many prompts of a cell the first number of the answer is the one asked for.

    Args:
        batch_tokens: tokens of the prompts that are answered together, one prompt at the least.
    """
    batch_size = max(1, batch_tokens // cell.length)
    exact = evaluate_niah(model, cell.samples, tokenizer, batch_size, max_new_tokens=16)["exact"]
    return round(exact * len(cell.samples))


def evaluate_niah(
    model, samples: Sequence[NiahSample], tokenizer, batch_size: int = 8, max_new_tokens: int = 32
) -> dict:
    """
    Answer every sample by greedy generation and score it as RULER does.

    Args:
        model: Any causal language model with `generate`; runs where its weights are.
        samples: Prompts; those of a batch are padded on the left where their lengths differ.
        tokenizer: Decodes the continuation.
        batch_size: Prompts generated together.
        max_new_tokens: Tokens generated at most (RULER: 128; 32 hold one number or two in any tokenizer).

    Returns:
        `accuracy`, the mean of `per_sample`: each sample's share of references found in its continuation, case
        ignored; `exact`: share of samples whose first number in the continuation is the first reference; `answers`:
        the continuations.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("there are no samples to evaluate")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    was_training = model.training
    model.eval()
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        prompts = [sample.input_ids for sample in samples[start : start + batch_size]]
        width = max(map(len, prompts))
        input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        with torch.no_grad():
            greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "pad_token_id": pad_id}
            output = model.generate(input_ids=input_ids, attention_mask=mask, **greedy)
        answers += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    model.train(was_training)

    per_sample = [
        sum(each.lower() in answer.lower() for each in sample.answers) / len(sample.answers)
        for sample, answer in zip(samples, answers)
    ]
    exact = [re.findall(r"\d+", answer)[:1] == sample.answers[:1] for sample, answer in zip(samples, answers)]
    return {
        "accuracy": sum(per_sample) / len(samples),
        "exact": sum(exact) / len(samples),
        "per_sample": per_sample,
        "answers": answers,
    }
