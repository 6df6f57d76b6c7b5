"""What a head's full-attention slot is worth: each form of each head put into the intact teacher (METHOD §2)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .ablation import answer_measure, divergence_measure, each_head_replaced, replaced_heads
from .attribution import head_slopes, readout_slopes
from .forms import FormOutputs, converted_heads
from .patching import Head, answer_positions, home, is_answer
from .probes import Pair

Masks = list[list[int]]
FISHER_SAMPLES = 4


def form_candidates(forms: FormOutputs) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Replacements `[2, T, H, d]` for `each_head_replaced`: the linear and the full forms of a layer."""
    return lambda layer, hidden_states, heads: forms.outputs(layer, hidden_states)[:, 0]


def answer_effects(
    model: PreTrainedModel, forms: FormOutputs, pair: Pair, wanted: set[Head] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each form does to the answer when it alone stands in for its head.

    Returns:
        the drop of the readout in logits, and whether greedy generation still gives the answer, both `[2, L, H]` fp32:
        linear, full.
    """
    measured = each_head_replaced(model, pair.clean, form_candidates(forms), answer_measure(model, pair), wanted)
    return measured[0, ..., 0] - measured[1:, ..., 0], measured[1:, ..., 1]


@torch.no_grad()
def text_effects(
    model: PreTrainedModel, forms: FormOutputs, ids: Sequence[int], wanted: set[Head] | None = None
) -> torch.Tensor:
    """`KL(teacher ‖ teacher with one form in place)` on a text, nats per token: `[2, L, H]` fp32, linear and full."""
    states = model.model(torch.tensor([ids], device=home(model)), use_cache=False).last_hidden_state[0]
    measure = divergence_measure(model, states)
    return each_head_replaced(model, ids, form_candidates(forms), measure, wanted)[1:, ..., 0]


@torch.no_grad()
def form_changes(model: PreTrainedModel, forms: FormOutputs, ids: Sequence[int]) -> torch.Tensor:
    """What the forms write beyond their heads, each reading the teacher's own states: `[2, L, T, H, d]` fp32."""
    changes: list[torch.Tensor] = []

    def keep(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        changes.append((forms.outputs(layer, hidden_states) - heads.float())[:, 0].to(home(model)))
        return heads

    with replaced_heads(model, keep):
        model.model(torch.tensor([ids], device=home(model)), use_cache=False)
    return torch.stack(changes, dim=1)


def answer_estimates(model: PreTrainedModel, forms: FormOutputs, pair: Pair) -> torch.Tensor:
    """First-order estimate of `answer_effects`' drops `[2, L, H]`: two forwards and one backward for all heads."""
    change = form_changes(model, forms, pair.clean)
    return -(readout_slopes(model, pair) * change).sum((2, 4)).cpu()


def text_estimates(model: PreTrainedModel, forms: FormOutputs, ids: Sequence[int], seed: int = 0) -> torch.Tensor:
    """
    Second-order estimate of `text_effects` `[2, L, H]`.

    A KL divergence has no slope at its minimum; its curvature is the Fisher information, so that half the squared
    slope of the likelihood of tokens drawn from the teacher estimates it without bias to second order. Mean over
    four draws, a forward and a backward pass each.
    """
    change, estimates = form_changes(model, forms, ids), []
    generator = torch.Generator(device=home(model)).manual_seed(seed)

    def likelihood(states: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(states).to(home(model)).float()
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        return -F.cross_entropy(logits, drawn, reduction="sum")

    for _ in range(FISHER_SAMPLES):
        slopes = head_slopes(model, ids, likelihood)
        estimates.append((slopes * change).sum((2, 4)).square() / 2 / len(ids))
    return torch.stack(estimates).mean(0).cpu()


def shortlisted(estimates: torch.Tensor, count: int) -> set[Head]:
    """The `count` heads whose two forms' estimates `[2, L, H]` are largest in magnitude."""
    size = estimates.abs().amax(0)
    places = size.flatten().argsort(descending=True)[:count].tolist()
    return {(place // size.shape[1], place % size.shape[1]) for place in places}


@torch.no_grad()
def conversion_loss(
    model: PreTrainedModel,
    forms: FormOutputs,
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
    teacher_states = [
        model.model(torch.tensor([ids], device=home(model)), use_cache=False).last_hidden_state[0] for ids in rows
    ]
    found, losses, divergences = [], [], []
    with replaced_heads(model, converted_heads(forms, masks)):
        for pair in pairs:
            states = model.model(torch.tensor([pair.clean], device=home(model)), use_cache=False).last_hidden_state
            states = states[0, answer_positions(pair)]
            found.append(float(is_answer(model, states, pair)))
            logits = model.lm_head(states).float()
            losses.append(F.cross_entropy(logits, torch.tensor(pair.answer, device=logits.device)).item())
        hybrid_states = [
            model.model(torch.tensor([ids], device=home(model)), use_cache=False).last_hidden_state for ids in rows
        ]
    for reference, states in zip(teacher_states, hybrid_states):
        divergences.append(divergence_measure(model, reference)(states).item())
    return {
        "accuracy": sum(found) / max(1, len(found)),
        "answer_loss": sum(losses) / max(1, len(losses)),
        "divergence": sum(divergences) / max(1, len(divergences)),
    }


def search_masks(
    model: PreTrainedModel,
    forms: FormOutputs,
    masks: Masks,
    pairs: Sequence[Pair],
    rows: Sequence[Sequence[int]] = (),
    *,
    unit_size: int = 1,
    fixed: set[Head] = frozenset(),
    candidates: int = 4,
    max_exchanges: int = 16,
    on_trial: Callable[[dict], None] = lambda record: None,
) -> tuple[Masks, list[dict]]:
    """
    Improve a choice of heads by greedy exchange, at one conversion and no training per trial.

    What is made smaller is the loss of the answers plus the divergence on text, both in nats per token. In each round
    the units (heads, or whole KV groups) are ordered by what exchanging them should change to first order at the
    present hybrid; the `candidates` most promising exchanges are tried, and the best is taken if it is an improvement.
    The budget stays what it was.

    Args:
        masks: where to start, such as `select_heads` gives.
        unit_size: query heads of a unit: 1, or `H / G` for KV groups.
        fixed: heads that keep the kind they have.
        on_trial: told each trial's record.

    Returns:
        the masks, and a record of what was accepted: `trials` so far and the measures of `conversion_loss`.
    """

    def judge(trial: Masks) -> tuple[float, dict]:
        measured = conversion_loss(model, forms, trial, pairs, rows)
        return measured["answer_loss"] + measured["divergence"], measured

    heads = len(masks[0])
    trials = 1
    value, measured = judge(masks)
    history = [{"trials": trials, **measured}]
    for _ in range(max_exchanges):
        gains = _exchange_gains(model, forms, masks, pairs).unflatten(1, (heads // unit_size, unit_size)).sum(2)
        free = [
            (layer, unit)
            for layer in range(len(masks))
            for unit in range(heads // unit_size)
            if not any((layer, unit * unit_size + index) in fixed for index in range(unit_size))
        ]
        kept, converted = ([u for u in free if masks[u[0]][u[1] * unit_size] == kind] for kind in (1, 0))
        order = sorted(
            ((float(gains[give] + gains[take]), give, take) for give in kept for take in converted), reverse=True
        )
        best = None
        for _, give, take in _spread(order, candidates):
            trial = [list(row) for row in masks]
            for (layer, unit), kind in ((give, 0), (take, 1)):
                trial[layer][unit * unit_size : (unit + 1) * unit_size] = [kind] * unit_size
            trials += 1
            trial_value, trial_measured = judge(trial)
            on_trial({"trials": trials, **trial_measured})
            if trial_value < value and (best is None or trial_value < best[0]):
                best = trial_value, trial, trial_measured
        if best is None:
            break
        value, masks, measured = best
        history.append({"trials": trials, **measured})
    return masks, history


def _spread(order: list, count: int) -> list:
    """The first `count` exchanges in which no unit takes part more than twice: the rest are much like them."""
    chosen, used = [], {}
    for exchange in order:
        if all(used.get(unit, 0) < 2 for unit in exchange[1:]):
            chosen.append(exchange)
            for unit in exchange[1:]:
                used[unit] = used.get(unit, 0) + 1
        if len(chosen) == count:
            break
    return chosen


def _exchange_gains(model: PreTrainedModel, forms: FormOutputs, masks: Masks, pairs: Sequence[Pair]) -> torch.Tensor:
    """`[L, H]`: how much the answers' loss should fall, to first order, if a head changed its kind in the hybrid."""
    total = torch.zeros(len(masks), len(masks[0]))
    full = torch.tensor(masks, dtype=torch.bool)
    for pair in pairs:
        answer, positions = torch.tensor(pair.answer, device=home(model)), answer_positions(pair)
        changes: list[torch.Tensor] = []

        def convert(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor, changes=changes) -> torch.Tensor:
            linear, full_output = forms.outputs(layer, hidden_states)
            kept = full[layer][:, None].to(heads.device)
            change = torch.where(kept, linear - full_output, full_output - linear)[0]
            changes.append(change.detach().to(home(model)))
            return torch.where(kept, full_output, linear)

        def loss(states: torch.Tensor, answer=answer, positions=positions) -> torch.Tensor:
            return F.cross_entropy(model.lm_head(states[positions]).to(answer.device).float(), answer)

        with replaced_heads(model, convert):
            slopes = head_slopes(model, pair.clean, loss)
        total -= (slopes * torch.stack(changes)).sum((1, 3)).cpu()
    return total / len(pairs)
