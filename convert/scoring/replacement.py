"""What a full-attention slot is worth: each form of each head put into the intact teacher (docs/method.md §2)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..forms import BRANCHES, HeadForms
from ..hooks import each_head_replaced, final_states, head_slopes, input_device, visit_heads
from ..selection import Head
from .attribution import readout_slopes
from .methods import Bench, UsedPairs
from .probes import Pair
from .readout import answer_measure, divergence_measure

FISHER_SAMPLES = 4


def form_candidates(
    forms: HeadForms, kinds: Sequence[str]
) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Replacements `[kinds, T, H, d]` for `each_head_replaced`: forms of a layer."""
    return lambda layer, hidden_states, heads: forms.outputs(layer, hidden_states, kinds)[:, 0]


def answer_effects(
    model: PreTrainedModel,
    forms: HeadForms,
    pair: Pair,
    wanted: set[Head] | None = None,
    kinds: Sequence[str] = BRANCHES,
) -> torch.Tensor:
    """Logits that the readout loses to each form alone in its head's place: `[kinds, L, H]` fp32, linear and full."""
    candidates = form_candidates(forms, kinds)
    measured = each_head_replaced(model, pair.clean, candidates, answer_measure(model, pair), wanted)
    return measured[0] - measured[1:]


@torch.no_grad()
def text_effects(
    model: PreTrainedModel,
    forms: HeadForms,
    ids: Sequence[int],
    wanted: set[Head] | None = None,
    kinds: Sequence[str] = BRANCHES,
) -> torch.Tensor:
    """`KL(teacher ‖ teacher with one form in place)` on a text, nats per token: `[kinds, L, H]` fp32."""
    measure = divergence_measure(model, final_states(model, [ids])[0])
    return each_head_replaced(model, ids, form_candidates(forms, kinds), measure, wanted)[1:]


@torch.no_grad()
def form_changes(
    model: PreTrainedModel, forms: HeadForms, ids: Sequence[int], kinds: Sequence[str] = BRANCHES
) -> torch.Tensor:
    """What the forms write beyond their heads, each reading the teacher's own states: `[kinds, L, T, H, d]` fp32."""
    changes: list[torch.Tensor] = []

    def keep(layer: int, hidden_states: torch.Tensor, heads: torch.Tensor) -> None:
        changes.append((forms.outputs(layer, hidden_states, kinds) - heads.float())[:, 0].to(input_device(model)))

    visit_heads(model, [ids], keep)
    return torch.stack(changes, dim=1)


def answer_estimates(
    model: PreTrainedModel, forms: HeadForms, pair: Pair, kinds: Sequence[str] = BRANCHES
) -> torch.Tensor:
    """First-order estimate of `answer_effects`' drops: two forwards and one backward for all heads."""
    change = form_changes(model, forms, pair.clean, kinds)
    return -(readout_slopes(model, pair) * change).sum((2, 4)).cpu()


def text_estimates(
    model: PreTrainedModel, forms: HeadForms, ids: Sequence[int], kinds: Sequence[str] = BRANCHES, seed: int = 0
) -> torch.Tensor:
    """
    Second-order estimate of `text_effects`.

    A KL divergence has no slope at its minimum; its curvature is the Fisher information, so that half the squared
    slope of the likelihood of tokens drawn from the teacher estimates it without bias to second order. Mean over
    four draws, a forward and a backward pass each.
    """
    change, estimates = form_changes(model, forms, ids, kinds), []
    generator = torch.Generator(device=input_device(model)).manual_seed(seed)

    def likelihood(states: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(states).to(input_device(model)).float()
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        return -F.cross_entropy(logits, drawn, reduction="sum")

    for _ in range(FISHER_SAMPLES):
        slopes = head_slopes(model, ids, likelihood)
        estimates.append((slopes * change).sum((2, 4)).square() / 2 / len(ids))
    return torch.stack(estimates).mean(0).cpu()


def shortlisted(estimates: torch.Tensor, count: int) -> set[Head]:
    """The `count` heads whose forms' estimates `[kinds, L, H]` are largest in magnitude."""
    size = estimates.abs().amax(0)
    places = size.flatten().argsort(descending=True)[:count].tolist()
    return {(place // size.shape[1], place % size.shape[1]) for place in places}


def _effects(bench: Bench, what: Pair | Sequence[int], measure: Callable, estimate: Callable) -> torch.Tensor:
    """
    Effects `[2, L, H]` of all heads on a pair or a text, or of the largest by estimate, and estimates of the others.
    Full forms that are the teacher's heads have none, and are not measured.
    """
    kinds = BRANCHES[:1] if bench.full_is_teacher else BRANCHES
    arguments = bench.teacher, bench.forms, what
    if bench.shortlist is None:
        found = measure(*arguments, kinds=kinds)
    else:
        estimates = estimate(*arguments, kinds=kinds)
        exact = measure(*arguments, shortlisted(estimates, bench.shortlist), kinds)
        found = torch.where(exact.isnan(), estimates, exact)
    return found if len(found) == len(BRANCHES) else torch.cat([found, torch.zeros_like(found)])


def replacement(bench: Bench, used: UsedPairs) -> Iterator[torch.Tensor]:
    """The method of this name: `[2, L, H]`, linear and full."""
    for pair, scale in zip(used.pairs, used.scales):
        yield _effects(bench, pair, answer_effects, answer_estimates) / scale


def replacement_on_text(bench: Bench, rows: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
    """The same on plain text, in nats per token."""
    for index, ids in enumerate(rows):
        yield _effects(bench, ids, text_effects, partial(text_estimates, seed=index))
