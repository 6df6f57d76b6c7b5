"""A choice of heads improved by converting and looking."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..console import progress
from .forms import HeadForms, converted_heads
from .hooks import final_states, head_slopes, input_device, visited_heads
from .scoring.command import check_settings, load_teacher, read_text, running_forms, text_rows
from .scoring.probes import NIAH_KEYS, Pair, niah_probe
from .scoring.readout import answer_positions, divergence_measure, is_answer
from .scoring.scores import HeadScores
from .scoring.settings import Exchange
from .selection import Head, Masks, Unit

CANDIDATES = 4  # exchanges tried in a round


@torch.no_grad()
def conversion_loss(
    model: PreTrainedModel,
    forms: HeadForms,
    masks: Masks,
    pairs: Sequence[Pair],
    rows: Sequence[Sequence[int]] = (),
) -> dict[str, float]:
    """
    How a conversion does before any end-to-end training.

    Args:
        masks: `[L][H]`.
        rows: texts on which the KL is measured.

    Returns:
        `accuracy`: share of pairs answered by greedy generation; `answer_loss`: nats per token of the answer;
        `divergence`: `KL(teacher ‖ hybrid)` in nats per token of the texts (0 without texts).
    """
    teacher_states = [final_states(model, [ids])[0] for ids in rows]
    found, losses, divergences = [], [], []
    with visited_heads(model, converted_heads(forms, masks)):
        for pair in pairs:
            states = final_states(model, [pair.clean])[0, answer_positions(pair)]
            found.append(float(is_answer(model, states, pair)))
            logits = model.lm_head(states).float()
            losses.append(F.cross_entropy(logits, torch.tensor(pair.answer, device=logits.device)).item())
        for ids, reference in zip(rows, teacher_states):
            divergences.append(divergence_measure(model, reference)(final_states(model, [ids])).item())
    measured = {"accuracy": found, "answer_loss": losses, "divergence": divergences}
    return {name: sum(values) / max(1, len(values)) for name, values in measured.items()}


def search_masks(
    model: PreTrainedModel,
    forms: HeadForms,
    masks: Masks,
    pairs: Sequence[Pair],
    rows: Sequence[Sequence[int]] = (),
    *,
    unit_size: int = 1,
    fixed: set[Head] = frozenset(),
    every_layer: bool = False,
    max_exchanges: int = 16,
    on_trial: Callable[[], None] = lambda: None,
) -> tuple[Masks, list[dict]]:
    """
    Improve a choice of heads by greedy exchange, at one conversion and no training per trial.

    What is made smaller is the loss of the answers plus the divergence on text, both in nats per token. In each round
    the units (heads, or whole KV groups) are ordered by what exchanging them should change to first order at the
    present hybrid; the four most promising exchanges are tried, and the best is taken if it is an improvement.
    The budget stays what it was.

    Args:
        masks: where to start, such as `select_heads` gives.
        unit_size: query heads of a unit: 1, or `H / G` for KV groups.
        fixed: heads that keep the kind they have.
        every_layer: no layer gives its last full-attention unit to another.
        on_trial: called after each trial.

    Returns:
        the masks, and a record of what was accepted: `trials` so far and the measures of `conversion_loss`.
    """
    measured = conversion_loss(model, forms, masks, pairs, rows)
    trials, history = 1, [{"trials": 1, **measured}]
    for _ in range(max_exchanges):
        better = []
        gains = _exchange_gains(model, forms, masks, pairs).unflatten(1, (-1, unit_size)).sum(2)
        for give, take in _promising(gains, masks, unit_size, fixed, every_layer)[:CANDIDATES]:
            trial = _exchanged(masks, give, take, unit_size)
            found = conversion_loss(model, forms, trial, pairs, rows)
            trials += 1
            on_trial()
            if _loss(found) < _loss(measured):
                better.append((found, trial))
        if not better:
            break
        measured, masks = min(better, key=lambda each: _loss(each[0]))
        history.append({"trials": trials, **measured})
    return masks, history


def _loss(measured: dict[str, float]) -> float:
    return measured["answer_loss"] + measured["divergence"]


def _exchanged(masks: Masks, give: Unit, take: Unit, unit_size: int) -> Masks:
    """Masks in which one unit gave up full attention and another took it."""
    trial = [list(row) for row in masks]
    for (layer, unit), kind in ((give, 0), (take, 1)):
        trial[layer][unit * unit_size : (unit + 1) * unit_size] = [kind] * unit_size
    return trial


def _promising(
    gains: torch.Tensor, masks: Masks, unit_size: int, fixed: set[Head], every_layer: bool
) -> list[tuple[Unit, Unit]]:
    """
    Exchanges (the unit to convert, the unit to keep), those that should gain most first, in which no unit takes part
    more than twice: the rest are much like them.

    Args:
        gains: `[L][units]`.
    """
    free = {(layer, unit) for layer, row in enumerate(gains) for unit in range(len(row))}
    free -= {(layer, head // unit_size) for layer, head in fixed}
    kept = [(layer, unit) for layer, unit in sorted(free) if masks[layer][unit * unit_size]]
    converted = sorted(free - set(kept))
    sums = (
        (float(gains[one] + gains[other]), one, other)
        for one in kept
        for other in converted
        if not every_layer or one[0] == other[0] or sum(masks[one[0]]) > unit_size
    )
    chosen, used = [], Counter()
    for _, *units in sorted(sums, reverse=True):
        if all(used[unit] < 2 for unit in units):
            chosen.append(tuple(units))
            used.update(units)
    return chosen


def _exchange_gains(model: PreTrainedModel, forms: HeadForms, masks: Masks, pairs: Sequence[Pair]) -> torch.Tensor:
    """`[L, H]`: how much the answers' loss should fall, to first order, if a head changed its kind in the hybrid."""
    total = torch.zeros(len(masks), len(masks[0]))
    full = torch.tensor(masks, dtype=torch.bool)
    for pair in pairs:
        answer, positions = torch.tensor(pair.answer, device=input_device(model)), answer_positions(pair)
        changes: list[torch.Tensor] = []

        def convert(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor, changes=changes) -> torch.Tensor:
            linear, full_output = forms.outputs(layer, hidden_states)
            kept = full[layer][:, None].to(heads.device)
            change = torch.where(kept, linear - full_output, full_output - linear)[0]
            changes.append(change.detach().to(input_device(model)))
            return torch.where(kept, full_output, linear)

        def loss(states: torch.Tensor, answer=answer, positions=positions) -> torch.Tensor:
            return F.cross_entropy(model.lm_head(states[positions]).to(answer.device).float(), answer)

        with visited_heads(model, convert):
            slopes = head_slopes(model, pair.clean, loss)
        total -= (slopes * torch.stack(changes)).sum((1, 3)).cpu()
    return total / len(pairs)


def exchange_heads(
    scores: HeadScores,
    masks: Masks,
    exchange: Exchange,
    budget_unit: str,
    fixed: set[Head],
    seed: int,
    every_layer: bool,
) -> tuple[Masks, list[dict]]:
    """
    Improve a choice by greedy exchange on needles and plain text (`search_masks`).

    Raises:
        ValueError: see `check_settings`; or the scores are of another shape than the teacher.
    """
    opened, tokenizer, length = check_settings(exchange)
    opened.check_made_from("the scores", {"teacher": scores.teacher, "revision": scores.revision})
    adapter = opened.adapter
    if (len(masks), len(masks[0])) != (adapter.num_layers, adapter.num_heads):
        raise ValueError(
            f"the scores are of {len(masks)} layers of {len(masks[0])} heads, {exchange.teacher} has "
            f"{adapter.num_layers} of {adapter.num_heads}"
        )
    text_ids = read_text(tokenizer, exchange)
    teacher = load_teacher(opened, exchange)
    forms = running_forms(opened, exchange.forms)
    pairs = [
        pair
        for keys in NIAH_KEYS
        for pair in niah_probe(tokenizer, text_ids, length, num_keys=keys, num_pairs=4, seed=seed + 1).pairs
    ]
    size = adapter.num_heads // adapter.num_kv_heads if budget_unit == "kv_groups" else 1
    inputs = teacher, forms, masks, pairs, text_rows(text_ids)
    options = {"unit_size": size, "fixed": fixed, "every_layer": every_layer, "max_exchanges": exchange.rounds}
    with progress("exchange heads", CANDIDATES * exchange.rounds) as advance:
        return search_masks(*inputs, **options, on_trial=advance)
