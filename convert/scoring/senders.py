"""The effect of heads through the receivers that read them, by path patching (see `receivers`)."""

from collections.abc import Iterator, Sequence

import psutil
import torch

from ..hooks import TOKENS_AT_ONCE, Recording, record
from ..selection import Head
from .methods import Bench, UsedPairs
from .probes import Pair
from .readout import answer_positions, first_change, readout_direction
from .receivers import Changes, carry, direct_effects, each_head_changed, output_change
from .recompute import HeadReader
from .scores import THRESHOLD

HOPEFUL = 0.1  # of the threshold: what a head's estimate is above where it is worth measuring


class PathPatching:
    """
    Indirect effects of heads on a pair's readout, through given heads that read them (docs/method.md §2).

    A path is `hops[0] → hops[1] → … → hops[-1] → readout`: each hop a set of heads. A sender's output is that of the
    corrupt text, at all positions; the change is carried through norms and MLPs, all attention held clean, to the
    queries, keys and values of the first hop; its heads, recomputed, are in turn what changes for the next hop; the
    outputs of the last, at the answer's positions, have their direct effect on the readout.

    Cost per pair: two forwards to record. Per call: for each sender, the MLPs between it and the last head of each
    hop, over the positions from the first changed token on; earlier positions are never recomputed. `estimate` costs
    three such passes (forward, recomputed forward, backward) for all senders together.

    Args:
        reader: of the teacher.
        pair: two texts, one answer.
    """

    def __init__(self, reader: HeadReader, pair: Pair):
        model = reader.model
        self.model, self.layers = model, model.model.layers
        self.first, self.length = first_change(pair), len(pair.clean)
        self.changed = slice(self.first, self.length)
        self.clean = record(model, pair.clean, self.changed, full_residual=True)
        self.corrupt = record(model, pair.corrupt, self.changed)
        positions = answer_positions(pair)
        self.answer = slice(positions.start - self.first, positions.stop - self.first)
        self.direction = readout_direction(model, pair)
        self.reader = reader
        self.residual = self.clean.residual[:, self.changed]  # [L, P, D]

    def _reread(self, layer: int, heads: list[int], rows: torch.Tensor, reference: torch.Tensor, queries: slice):
        """
        What recomputed heads make `W_o` write beyond the clean text: `[rows, Q, D]`.

        Args:
            rows, reference: the layer's input in changed rows `[rows, P, D]` and without change `[P, D]`.
            queries: positions wanted, counted from the first changed one.
        """
        reader = self.reader
        states = torch.cat([reference[None], rows])
        in_text = slice(self.first + queries.start, self.first + queries.stop)
        query = reader.project(layer, "q", heads, states[:, queries], in_text)
        key, value = reader.keys_values(layer, heads, states, self.changed)
        if self.first:
            prefix = self.clean.residual[layer, None, : self.first].float()
            before = reader.keys_values(layer, heads, prefix, slice(0, self.first))
            key, value = (
                torch.cat([past.expand(len(states), -1, -1, -1), now], dim=2)
                for past, now in zip(before, (key, value))
            )
        outputs = reader.attend(query, key, value, in_text)  # [1 + rows, Q, heads, d]
        weight = reader.attention(layer).o.unflatten(1, (self.reader.adapter.num_heads, -1))[:, heads]  # [D, heads, d]
        return torch.einsum("bphd,Dhd->bpD", outputs[1:] - outputs[:1], weight)

    def _hop(self, changes: Changes, heads: Sequence[Head], queries: slice) -> Changes:
        """The changes that the heads of a hop write when the stream that they read is changed."""
        by_layer: dict[int, list[int]] = {}
        for layer, head in sorted(heads):
            by_layer.setdefault(layer, []).append(head)
        written: Changes = {}
        if not by_layer:
            return written
        for layer, rows, reference in carry(self.model, self.clean.attention, self.residual, changes, max(by_layer)):
            if layer in by_layer and len(rows):
                written[layer] = (0, self._reread(layer, by_layer[layer], rows, reference, queries))
        return written

    def _drops(self, changes: Changes, hops: Sequence[Sequence[Head]], rows: int) -> torch.Tensor:
        """Drop of the readout `[rows]` when changes travel along `hops`."""
        self.reader.for_length(self.length)
        everywhere = slice(0, self.length - self.first)
        for index, heads in enumerate(hops):
            changes = self._hop(changes, heads, self.answer if index == len(hops) - 1 else everywhere)
        if not changes:
            return self.direction.new_zeros(rows)
        at_answer = Recording(
            self.clean.heads, self.clean.attention[:, self.answer], self.residual[:, self.answer], self.clean.states
        )
        drops = direct_effects(self.model, at_answer, changes, self.direction)
        return torch.cat([drops, drops.new_zeros(rows - len(drops))])

    @torch.no_grad()
    def effects(self, senders: Sequence[Head], hops: Sequence[Sequence[Head]]) -> torch.Tensor:
        """
        Exact drop of the readout `[senders]` fp32, in logits, for each sender along `hops`.

        Raises:
            ValueError: there is no hop.
        """
        if not hops:
            raise ValueError("path patching needs at least one hop of receivers")
        order = sorted(range(len(senders)), key=lambda index: senders[index])
        size = max(1, TOKENS_AT_ONCE // (self.length - self.first))
        drops = torch.zeros(len(senders))
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            changes: Changes = {}
            for layer in sorted({senders[index][0] for index in batch}):
                heads = [senders[index][1] for index in batch if senders[index][0] == layer]
                patched = each_head_changed(self.clean.heads[layer], self.corrupt.heads[layer])[heads]
                first = sum(senders[index][0] < layer for index in batch)
                change = output_change(self.layers[layer], patched, self.clean.heads[layer], self.model.dtype)
                changes[layer] = (first, change)
            drops[batch] = self._drops(changes, hops, len(batch)).cpu()
        return drops

    def estimate(self, hops: Sequence[Sequence[Head]]) -> torch.Tensor:
        """First-order estimate `[L, H]` of `effects` for all heads at once: one backward pass along the same path."""
        shape = self.clean.attention.shape
        with torch.enable_grad():
            nudges = [
                torch.zeros(1, *shape[1:], device=self.direction.device, requires_grad=True) for _ in self.layers
            ]
            drops = self._drops({layer: (0, nudge) for layer, nudge in enumerate(nudges)}, hops, 1)
            if not drops.requires_grad:
                return torch.zeros(shape[0], self.clean.heads.shape[2])
            slopes = torch.autograd.grad(drops.sum(), nudges, allow_unused=True, materialize_grads=True)
        change = (self.corrupt.heads - self.clean.heads).float()  # [L, P, H, d]
        heads = self.clean.heads.shape[2]
        estimates = [
            torch.einsum(
                "pD,Dhd,phd->h", slope[0], self.reader.attention(layer).o.unflatten(1, (heads, -1)), change[layer]
            )
            for layer, slope in enumerate(slopes)
        ]
        return torch.stack(estimates).detach().cpu()


class _Recorded:
    """Path patching of pairs, which every round asks for: what finds room is recorded once."""

    ROOM = 0.25  # of the memory that is free

    def __init__(self, reader: HeadReader, pairs: Sequence[Pair]):
        self.reader, self.pairs = reader, pairs
        self.kept: dict[int, PathPatching] = {}
        on_gpu = reader.device.type == "cuda"
        free = torch.cuda.mem_get_info(reader.device)[0] if on_gpu else psutil.virtual_memory().available
        self.room = self.ROOM * free

    def __getitem__(self, index: int) -> PathPatching:
        if index in self.kept:
            return self.kept[index]
        patching = PathPatching(self.reader, self.pairs[index])
        size = patching.clean.nbytes + patching.corrupt.nbytes
        if size <= self.room:
            self.room -= size
            self.kept[index] = patching
        return patching


@torch.no_grad()
def sender_effects(
    reader: HeadReader,
    pairs: Sequence[Pair],
    scales: Sequence[float],
    receivers: Sequence[Head],
    threshold: float,
    shortlist: int = 32,
    rounds: int = 3,
) -> torch.Tensor:
    """
    What every head does to the readout through the receivers, exactly, over several rounds (docs/method.md §2).

    In the first round heads send to the receivers; those that pass the threshold on average are what the next round's
    heads send to, until nothing new appears. A head's effect is the largest of its rounds. Where a round has more than
    `shortlist` candidates, those with the largest first-order estimate on the first two pairs are measured, unless it
    is below a tenth of the threshold, and the others count as 0.

    Cost per pair: two forwards to record, in every round for pairs that memory does not hold; per round at most
    `shortlist` passes through the MLPs below the last receiver, from the first changed token on, and on the first two
    pairs three more where estimates are needed.

    Args:
        scales: for each pair the clean less the corrupt readout, which effects are divided by.
        receivers: heads whose direct effect on the readout passes the threshold.

    Returns:
        `[pairs, L, H]` fp32, 1 where a head's change alone does what the corrupt text does.
    """
    adapter = reader.adapter
    best = torch.zeros(len(pairs), adapter.num_layers, adapter.num_heads)
    known, hops = set(receivers), [sorted(receivers)]
    recorded = _Recorded(reader, pairs)
    for _ in range(rounds if receivers else 0):
        reach = max(layer for layer, _ in hops[0])
        candidates = [(layer, head) for layer in range(reach) for head in range(adapter.num_heads)]
        if len(candidates) > shortlist:
            estimates = [recorded[index].estimate(hops).abs() / scale for index, scale in enumerate(scales[:2])]
            estimate = torch.stack(estimates).mean(0)
            hopeful = [head for head in candidates if estimate[head] > HOPEFUL * threshold]
            candidates = sorted(hopeful, key=lambda head: -float(estimate[head]))[:shortlist]
        if not candidates:
            break
        found = torch.zeros_like(best)
        for index, scale in enumerate(scales):
            for head, drop in zip(candidates, recorded[index].effects(candidates, hops)):
                found[(index, *head)] = drop / scale
        best = torch.maximum(best, found)
        passed = found.clamp(0, 1).mean(0) > threshold
        new = [head for head in candidates if passed[head] and head not in known]
        if not new:
            break
        known |= set(new)
        hops = [sorted(new), *hops]
    return best


def senders(bench: Bench, used: UsedPairs) -> Iterator[torch.Tensor]:
    """The method `sender`."""
    receivers = [tuple(place) for place in (used.receivers.clamp(0, 1).mean(0) > THRESHOLD).nonzero().tolist()]
    yield from sender_effects(bench.reader, used.pairs, used.scales, receivers, THRESHOLD, bench.sender_shortlist)
