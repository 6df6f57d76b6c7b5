"""Needles answered: greedy generation, scored as RULER does (arXiv 2404.06654), in cells of one task and length."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..data.needles import NiahSample, make_niah

TASKS = MappingProxyType({"niah_single": {"num_keys": 1}, "niah_four": {"num_keys": 4}})
FIRST_SEED = 1_000_000  # of prompts that are evaluated; training rows come from small seeds, and from other text


@dataclass(frozen=True)
class NiahCell:
    """
    Prompts of one task at one length.

    Attributes:
        task: a key of `TASKS`, or a name of the caller's.
        length: tokens of a prompt and its answer.
    """

    task: str
    length: int
    samples: list[NiahSample]


def niah_cells(
    tokenizer,
    heldout_ids: Sequence[int],
    lengths: Sequence[int],
    count: int,
    tasks: Mapping[str, Mapping] = TASKS,
) -> list[NiahCell]:
    """
    `count` prompts of every task at every length, hidden in held-out text; the same ones for every model.

    Args:
        heldout_ids: token ids of the text, more than the longest prompt has.
        tasks: by name, keywords of `data.needles.make_niah`.

    Raises:
        ValueError: a length too short for the needles, or a short text.
    """
    return [
        NiahCell(
            task,
            length,
            [make_niah(tokenizer, heldout_ids, length, **how, seed=FIRST_SEED + index) for index in range(count)],
        )
        for length in lengths
        for task, how in tasks.items()
    ]


def answer_cell(model, tokenizer, cell: NiahCell, batch_tokens: int = 4096) -> dict:
    """
    A cell as a record: `task`, `length`, how many `prompts` there were, and in how many the first number of the answer
    is the one asked for (`found`): counts, so that an interval can be given.

    Args:
        batch_tokens: tokens of the prompts that are answered together, one prompt at the least.
    """
    batch_size = max(1, batch_tokens // cell.length)
    exact = evaluate_niah(model, cell.samples, tokenizer, batch_size, max_new_tokens=16)["exact"]
    count = len(cell.samples)
    return {"task": cell.task, "length": cell.length, "prompts": count, "found": round(exact * count)}


def evaluate_niah(
    model,
    samples: Sequence[NiahSample],
    tokenizer,
    batch_size: int = 8,
    max_new_tokens: int = 32,
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
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_id,
            )
        answers += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    model.train(was_training)

    per_sample = [_share_found(sample.answers, answer) for sample, answer in zip(samples, answers)]
    exact = [_first_number(answer) == sample.answers[0] for sample, answer in zip(samples, answers)]
    return {
        "accuracy": sum(per_sample) / len(samples),
        "exact": sum(exact) / len(samples),
        "per_sample": per_sample,
        "answers": answers,
    }


def _share_found(references: Sequence[str], continuation: str) -> float:
    return sum(reference.lower() in continuation.lower() for reference in references) / len(references)


def _first_number(text: str) -> str | None:
    match = re.search(r"\d+", text)
    return match[0] if match else None
