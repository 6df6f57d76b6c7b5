"""What a head's full-attention slot is worth: each form of each head put into the intact teacher (METHOD §2)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..forms import FormOutputs
from ..hooks import Head, each_head_replaced, head_slopes, home, replaced_heads
from .attribution import readout_slopes
from .probes import Pair
from .readout import answer_measure, divergence_measure

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
