"""What others rank heads by, on the same pairs: attribution patching, attention on the needle, logit contribution."""

from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from transformers import PreTrainedModel

from ..hooks import head_slopes, input_device, record
from .methods import Bench, UsedPairs
from .probes import Pair
from .readout import answer_positions, first_change, needle_positions, readout, readout_direction, unembedding
from .recompute import HeadReader


def readout_slopes(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """Gradient `[L, T, H, d]` fp32 of the clean readout by every head's output."""
    direction, positions = readout_direction(model, pair), answer_positions(pair)
    return head_slopes(model, pair.clean, lambda states: readout(states[positions], direction))


@torch.no_grad()
def attribution_effects(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """
    First-order estimate of the drop of the readout when a head's output is taken from the corrupt text at all
    positions and nothing is frozen: attribution patching (AtP).

    Returns:
        `[L, H]` fp32, in logits.
    """
    changed = slice(first_change(pair), len(pair.clean))
    clean, corrupt = (record(model, ids, changed).heads.float() for ids in (pair.clean, pair.corrupt))
    return -(readout_slopes(model, pair)[:, changed] * (corrupt - clean)).sum((1, 3)).cpu()


@torch.no_grad()
def query_key_effects(reader: HeadReader, pair: Pair) -> torch.Tensor:
    """
    Attribution patching with the query and key correction of AtP* (arXiv 2403.00745): a head's nodes are its queries,
    its keys and its values; the attention that patched queries or keys give is computed, not linearised, and only what
    follows is. A head's effect is the largest of its three.

    Returns:
        `[L, H]` fp32, in logits.
    """
    model, reader = reader.model, reader.for_length(len(pair.clean))
    changed = slice(first_change(pair), len(pair.clean))
    streams = [record(model, ids, changed, full_residual=True).residual for ids in (pair.clean, pair.corrupt)]
    slopes = readout_slopes(model, pair)[:, changed]
    heads, everywhere = list(range(model.config.num_attention_heads)), slice(0, len(pair.clean))
    effects = []
    for layer, slope in enumerate(slopes):
        (query, key, value), (other_query, other_key, other_value) = (
            (
                reader.project(layer, "q", heads, stream[layer, None, changed].float(), changed),
                *reader.keys_values(layer, heads, stream[layer, None].float(), everywhere),
            )
            for stream in streams
        )
        clean = reader.attend(query, key, value, changed)
        patched = [(other_query, key, value), (query, other_key, value), (query, key, other_value)]
        drops = [-((reader.attend(*nodes, changed) - clean)[0] * slope).sum((0, 2)) for nodes in patched]
        effects.append(torch.stack(drops).amax(0))
    return torch.stack(effects).cpu()


def _answer_attention(reader: HeadReader, pair: Pair):
    """For each layer, `W_o` `[D, H, d]`, attention weights `[H, A, T]` of the answer's positions, and values."""
    model, reader = reader.model, reader.for_length(len(pair.clean))
    stream = record(model, pair.clean, answer_positions(pair), full_residual=True)
    heads = list(range(model.config.num_attention_heads))
    everywhere, queries = slice(0, len(pair.clean)), answer_positions(pair)
    for layer, residual in enumerate(stream.residual[:, None].float()):
        query = reader.project(layer, "q", heads, residual[:, queries], queries)
        key, value = reader.keys_values(layer, heads, residual, everywhere)
        weight = reader.attention(layer).o.unflatten(1, (len(heads), -1))
        yield weight, reader.scores(query, key, queries)[0], value[0]


@torch.no_grad()
def attention_mass(reader: HeadReader, pair: Pair) -> torch.Tensor:
    """Share of each head's attention, from where the answer is predicted, that falls on what the pair changes."""
    needle = needle_positions(pair).to(input_device(reader.model))
    return torch.stack(
        [weights[..., needle].sum(-1).mean(-1) for _, weights, _ in _answer_attention(reader, pair)]
    ).cpu()


@torch.no_grad()
def logit_contribution(reader: HeadReader, pair: Pair) -> torch.Tensor:
    """
    Logit-contribution scores (LOCOS, arXiv 2607.01002): what a head writes from the needle towards the answer's
    unembedding, less what it would write if every position gave what the others give on average; mean over those
    tokens of the answer that the teacher gets right. The final norm's scale, one factor for all heads, is left out.

    Returns:
        `[L, H]` fp32.
    """
    model = reader.model
    needle = torch.zeros(len(pair.clean), dtype=torch.bool, device=input_device(model))
    needle[needle_positions(pair).to(needle.device)] = True
    answer = torch.tensor(pair.answer, device=needle.device)
    states = record(model, pair.clean, answer_positions(pair)).states
    logits = model.lm_head(states.to(model.dtype)).to(needle.device)
    right = (logits.argmax(-1) == answer).float()  # [A]
    with align_module_device(model.model.norm):  # accelerate may have off-loaded it
        directions = unembedding(model, pair.answer) * model.model.norm.weight.to(needle.device).float()  # [A, D]
    scores = []
    for weight, attention, value in _answer_attention(reader, pair):
        written = torch.einsum("aD,Dhd,hpd->hap", directions, weight, value) * attention  # [H, A, T]
        elsewhere = written[..., ~needle].mean(-1) * needle.sum()
        contrast = written[..., needle].sum(-1) - elsewhere  # [H, A]
        scores.append((contrast * right).sum(-1) / right.sum().clamp_min(1))
    return torch.stack(scores).cpu()


def attribution(bench: Bench, used: UsedPairs) -> Iterator[torch.Tensor]:
    """The method of this name."""
    return (attribution_effects(bench.teacher, pair) / scale for pair, scale in zip(used.pairs, used.scales))


def attribution_qk(bench: Bench, used: UsedPairs) -> Iterator[torch.Tensor]:
    """The method `attribution-qk`."""
    return (query_key_effects(bench.reader, pair) / scale for pair, scale in zip(used.pairs, used.scales))


def attention(bench: Bench, used: UsedPairs) -> Iterator[torch.Tensor]:
    """The method of this name."""
    return (attention_mass(bench.reader, pair) for pair in used.pairs)


def contribution(bench: Bench, used: UsedPairs) -> Iterator[torch.Tensor]:
    """The method `logit-contribution`."""
    return (logit_contribution(bench.reader, pair) for pair in used.pairs)
