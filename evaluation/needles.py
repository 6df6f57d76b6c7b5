"""Needles answered: greedy generation, scored as RULER does (arXiv 2404.06654)."""

import re
from collections.abc import Callable, Sequence

import torch

from ..data.needles import NiahSample


def evaluate_niah(
    model,
    samples: Sequence[NiahSample],
    tokenizer,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> dict:
    """
    Answer every sample by greedy generation and score it as RULER does.

    Args:
        model: Any causal language model with `generate`; runs where its weights are.
        samples: Prompts; those of a batch are padded on the left where their lengths differ.
        tokenizer: Decodes the continuation.
        batch_size: Prompts generated together.
        max_new_tokens: Tokens generated at most (RULER: 128; 32 hold one number or two in any tokenizer).
        on_batch: Called after each batch with the number of samples done so far.

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
        if on_batch is not None:
            on_batch(len(answers))
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
