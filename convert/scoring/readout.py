"""What is measured on a pair: how sure of its answer the teacher is, and whether it writes it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from ..hooks import Measure, final_states, input_device
from .probes import Pair

TOKENS_AT_ONCE = 65_536 if torch.cuda.is_available() else 16_384  # of prompts that are read together
DISCOUNT = 0.9  # λ: what a token of the answer weighs beside the one before it


def answer_positions(pair: Pair) -> slice:
    """Where the `A` tokens of the answer are predicted."""
    first = pair.answer_start - 1
    return slice(first, first + len(pair.answer))


def first_change(pair: Pair) -> int:
    """The first position at which the two texts differ; that of the first answer if they are equal."""
    return min([*needle_positions(pair).tolist(), pair.answer_start - 1])


def needle_positions(pair: Pair) -> torch.Tensor:
    """Positions at which the two texts differ."""
    return torch.tensor([i for i, (one, other) in enumerate(zip(pair.clean, pair.corrupt)) if one != other])


def unembedding(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Rows `[len(ids), D]` fp32 of the language-model head."""
    with align_module_device(model.lm_head):
        weight = model.lm_head.weight
        return weight[torch.tensor(ids, device=weight.device)].float().to(input_device(model))


def readout_direction(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """
    `[A, D]` fp32: the direction that, applied to the final normed states at the answer's positions, gives the readout
    `m = (1/Z) Σ_j λ^j (z_j[a⁺_j] - z_j[a⁻_j])`. Tokens on which both answers agree do not count in `Z`.
    """
    answer, wrong = torch.tensor(pair.answer), torch.tensor(pair.wrong)
    weights = DISCOUNT ** torch.arange(len(answer)) * (answer != wrong)
    rows = unembedding(model, pair.answer) - unembedding(model, pair.wrong)
    return rows * (weights / weights.sum()).to(rows.device).unsqueeze(1)


def readout(states: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Readouts of final normed states `[..., A, D]`."""
    return (states.to(direction.device).float() * direction).sum((-2, -1))


def is_answer(model: PreTrainedModel, states: torch.Tensor, pair: Pair) -> torch.Tensor:
    """
    Whether greedy generation writes the answer, from final states `[..., A, D]` over prompt and answer: bool `[...]`.

    It does exactly when every token of the answer is the most likely one after those before it.
    """
    logits = model.lm_head(states)
    return (logits.argmax(-1) == torch.tensor(pair.answer, device=logits.device)).all(-1)


@torch.no_grad()
def answers_found(model: PreTrainedModel, pairs: Sequence[Pair]) -> list[bool]:
    """
    Whether greedy generation from each clean prompt gives the answer.

    Forwards over prompts and answers (see `is_answer`), several at once.
    """
    found = []
    longest = max((len(pair.clean) for pair in pairs), default=1)
    at_once = max(1, TOKENS_AT_ONCE // longest)
    for batch in (pairs[start : start + at_once] for start in range(0, len(pairs), at_once)):
        # What stands behind an answer changes nothing before it.
        rows = [pair.clean + pair.clean[-1:] * (longest - len(pair.clean)) for pair in batch]
        for pair, states in zip(batch, final_states(model, rows)):
            found.append(bool(is_answer(model, states[answer_positions(pair)], pair)))
    return found


def answer_measure(model: PreTrainedModel, pair: Pair) -> Measure:
    """Measures the readout, in logits."""
    positions, direction = answer_positions(pair), readout_direction(model, pair)
    return lambda states: readout(states[:, positions], direction)


def divergence_measure(model: PreTrainedModel, states: torch.Tensor) -> Measure:
    """Measures `KL(teacher ‖ patched)` in nats per token, against the teacher's own final states `[T, D]`."""
    chunks = [F.log_softmax(model.lm_head(part).float(), -1) for part in states.split(512)]

    def row(patched: torch.Tensor) -> torch.Tensor:
        total = 0.0
        for part, reference in zip(patched.split(512), chunks):
            logits = F.log_softmax(model.lm_head(part).float(), -1)
            total = total + (reference.exp() * (reference - logits)).sum()
        return total / len(patched)

    return lambda patched: torch.stack([row(states) for states in patched])
