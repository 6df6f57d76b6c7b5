"""
Causal effects of single heads: receivers by replay, senders by path patching, and cheaper comparators.

Everything here sees a teacher as a residual stream that attention and MLPs write to. *Frozen* attention writes what it
wrote on the clean text, so that positions do not interact and a change is carried along by norms and MLPs alone.
Weights stay in the teacher's dtype, the carried stream is fp32, and every effect is a difference from an unchanged row
that was carried beside the changed ones, so that rounding cancels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from .probes import Pair
from .teachers import TeacherAttention, adapter_for, read_model

DISCOUNT = 0.9  # λ: what a token of the answer weighs beside the one before it
MLP_TOKENS = 16_384  # tokens that pass an MLP at once
PATH_TOKENS = 65_536  # tokens of changed streams that exist at once

Head = tuple[int, int]
"""Layer and query head."""

Changes = dict[int, tuple[int, torch.Tensor]]
"""By layer: the first row that its attention output is changed in, and the changes `[rows, P, D]`."""


@dataclass
class Recording:
    """
    What one forward over `T` ids leaves at `P` of its positions.

    Attributes:
        heads: `[L, P, H, d]`, the input of `W_o`.
        attention: `[L, P, D]`, the output of `W_o`.
        residual: `[L, P, D]`, the input of the layer.
        states: `[P, D]`, the final normed states.
    """

    heads: torch.Tensor
    attention: torch.Tensor
    residual: torch.Tensor
    states: torch.Tensor


def home(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs, also when `accelerate` keeps its weights elsewhere."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def answer_positions(pair: Pair) -> slice:
    """Where the `A` tokens of the answer are predicted."""
    first = pair.answer_start - 1
    return slice(first, first + len(pair.answer))


def first_change(pair: Pair) -> int:
    """The first position at which the two texts differ; that of the first answer if they are equal."""
    differing = (i for i, (one, other) in enumerate(zip(pair.clean, pair.corrupt)) if one != other)
    return min(next(differing, len(pair.clean)), pair.answer_start - 1)


def unembedding(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Rows `[len(ids), D]` fp32 of the language-model head."""
    with align_module_device(model.lm_head):
        weight = model.lm_head.weight
        return weight[torch.tensor(ids, device=weight.device)].float().to(home(model))


def readout_direction(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """
    `[A, D]` fp32: the direction that, applied to the final normed states at the answer's positions, gives the readout
    `m = (1/Z) Σ_j λ^j (z_j[a⁺_j] - z_j[a⁻_j])`. Tokens on which both answers agree do not count in `Z`.
    """
    answer, wrong = torch.tensor(pair.answer), torch.tensor(pair.wrong)
    weights = DISCOUNT ** torch.arange(len(answer)) * (answer != wrong)
    rows = unembedding(model, pair.answer) - unembedding(model, pair.wrong)
    return rows * (weights / weights.sum()).to(rows.device).unsqueeze(1)


@torch.no_grad()
def record(model: PreTrainedModel, ids: Sequence[int], positions: slice, full_residual: bool = False) -> Recording:
    """
    One forward over `T` ids, kept only at `positions`.

    Args:
        full_residual: keep `residual` at all `T` positions.
    """
    device = home(model)
    heads, attention, residual, hooks = [], [], [], []

    def keep(kept: list, tensor: torch.Tensor, where: slice = positions) -> None:
        # A copy: a view would hold on to the whole length of every layer.
        kept.append(tensor[0, where].to(device, copy=True))

    everywhere = slice(None) if full_residual else positions
    for layer in model.model.layers:
        o_proj: nn.Linear = layer.self_attn.o_proj
        hooks += [
            layer.register_forward_pre_hook(lambda _, args: keep(residual, args[0], everywhere)),
            o_proj.register_forward_pre_hook(lambda _, args: keep(heads, args[0])),
            o_proj.register_forward_hook(lambda _, args, output: keep(attention, output)),
        ]
    try:
        states = model.model(torch.tensor([ids], device=device), use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return Recording(
        heads=torch.stack(heads).unflatten(-1, (model.config.num_attention_heads, -1)),
        attention=torch.stack(attention),
        residual=torch.stack(residual),
        states=states[0, positions].to(device, copy=True),
    )


def readout(states: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Readouts of final normed states `[..., A, D]`."""
    return (states.to(direction.device).float() * direction).sum((-2, -1))


def _mlp(layer: nn.Module, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[rows, P, D]` fp32 to the same after the layer's MLP, a bounded number of tokens at a time."""

    def block(tokens: torch.Tensor) -> torch.Tensor:
        output = layer.mlp(layer.post_attention_layernorm(tokens).to(dtype))
        return tokens + output.to(tokens.device).float()

    run = block
    if torch.is_grad_enabled():

        def run(tokens: torch.Tensor) -> torch.Tensor:
            return checkpoint(block, tokens, use_reentrant=False)

    return torch.cat([run(tokens) for tokens in states.flatten(0, 1).split(MLP_TOKENS)]).view_as(states)


def carry(
    model: PreTrainedModel,
    attention: torch.Tensor,
    residual: torch.Tensor,
    changes: Changes,
    last: int | None = None,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    Carry changes of attention outputs up the residual stream, with all other attention frozen.

    A row starts in the first layer that changes it; rows are ordered by where they start. No layer is computed for a
    row before that.

    Args:
        attention, residual: `[L, P, D]` of the clean text.
        last: layer whose input is wanted last; the final states (before the final norm) if `None`.

    Yields:
        a layer's index (`L` for the final states), its input in the rows started so far `[rows, P, D]`, and the
        unchanged input `[P, D]`, both fp32.
    """
    layers = model.model.layers
    last = len(layers) if last is None else last
    start = min(changes, default=last)
    reference, rows = residual[min(start, len(layers) - 1)].float(), None
    rows = reference.new_empty(0, *reference.shape)
    for index in range(start, last):
        yield index, rows, reference
        first, change = changes.get(index, (0, rows[:0]))
        new = first + len(change) - len(rows)
        states = torch.cat([reference[None], rows, reference.expand(max(0, new), -1, -1)]) + attention[index].float()
        if len(change):
            before, touched, after = states.split([1 + first, len(change), len(states) - 1 - first - len(change)])
            states = torch.cat([before, touched + change, after])
        states = _mlp(layers[index], states, model.dtype)
        reference, rows = states[0], states[1:]
    yield last, rows, reference


def direct_effects(
    model: PreTrainedModel, clean: Recording, changes: Changes, direction: torch.Tensor
) -> torch.Tensor:
    """Drop of the readout `[rows]` fp32, in logits, when attention outputs are changed at the answer's positions."""
    *_, (_, rows, reference) = carry(model, clean.attention, clean.residual, changes)
    readouts = readout(model.model.norm(torch.cat([reference[None], rows])), direction)
    return readouts[0] - readouts[1:]


def output_change(layer: nn.Module, heads: torch.Tensor, clean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `W_o` makes of head outputs `[rows, P, H, d]` beyond what it makes of the clean ones `[P, H, d]`: fp32."""
    stacked = torch.cat([clean[None].to(heads.dtype), heads]).flatten(2)
    outputs = layer.self_attn.o_proj(stacked.to(dtype)).float().to(heads.device)
    return outputs[1:] - outputs[0]


def each_head_changed(clean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Head outputs `[P, H, d]` to `[H, P, H, d]`: row `h` has head `h` from `other`, all others clean."""
    heads = torch.eye(clean.shape[1], dtype=torch.bool, device=clean.device)  # [rows, H]
    return torch.where(heads[:, None, :, None], other, clean)


class ReceiverEffects(NamedTuple):
    """
    What `receiver_effects` gives.

    Attributes:
        drops: `[L, H]` fp32: the clean readout minus the patched one, in logits.
        clean, corrupt: the readouts of the two texts.
        answered: whether greedy generation from the clean prompt gives the answer.
    """

    drops: torch.Tensor
    clean: float
    corrupt: float
    answered: bool


@torch.no_grad()
def receiver_effects(model: PreTrainedModel, pair: Pair) -> ReceiverEffects:
    """
    Direct effect of every head on the readout: its output is replaced, where the answer is predicted, by its output on
    the corrupt text, and every later attention output is held at its clean value (METHOD §2).

    Equals one frozen-attention forward per head; exactly 0 for a head that the corruption does not change. Cost:
    two forwards over `T` tokens, and each layer's MLP once for the `A` positions of all heads below it; each layer is
    needed once, so that off-loaded weights travel once.
    """
    direction = readout_direction(model, pair)
    clean, corrupt = (record(model, ids, answer_positions(pair)) for ids in (pair.clean, pair.corrupt))
    heads = model.config.num_attention_heads
    changes = {}
    for index, layer in enumerate(model.model.layers):
        patched = each_head_changed(clean.heads[index], corrupt.heads[index])
        changes[index] = (index * heads, output_change(layer, patched, clean.heads[index], model.dtype))
    drops = direct_effects(model, clean, changes, direction).view(-1, heads)
    unchanged = (clean.heads == corrupt.heads).all(3).all(1)  # [L, H]
    return ReceiverEffects(
        drops.masked_fill(unchanged, 0).cpu(),
        *(readout(recording.states, direction).item() for recording in (clean, corrupt)),
        bool(is_answer(model, clean.states, pair)),
    )


def is_answer(model: PreTrainedModel, states: torch.Tensor, pair: Pair) -> torch.Tensor:
    """
    Whether greedy generation writes the answer, from final states `[..., A, D]` over prompt and answer: bool `[...]`.

    It does exactly when every token of the answer is the most likely one after those before it.
    """
    logits = model.lm_head(states)
    return (logits.argmax(-1) == torch.tensor(pair.answer, device=logits.device)).all(-1)


class HeadReader:
    """
    Recomputes single heads of a teacher, of a supported family, from the residual stream, in fp32.

    It keeps the attention weights that it has read: use one for all pairs.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.adapter, self.read = model, adapter_for(model.config), read_model(model)
        self.group_size = self.adapter.num_heads // self.adapter.num_kv_heads
        self.weights: dict[int, TeacherAttention] = {}
        self.cos = self.sin = torch.empty(0)

    def for_length(self, length: int) -> "HeadReader":
        """Ready for texts of `T` tokens: some families rotate by the length of the text."""
        if len(self.cos) != length:
            position_ids = torch.arange(length, device=home(self.model)).unsqueeze(0)
            rotary = self.model.model.rotary_emb(torch.zeros(1, 1, device=home(self.model)), position_ids)
            self.cos, self.sin = (tensor[0].to(home(self.model)).float() for tensor in rotary)  # [T, d]
        return self

    def attention(self, layer: int) -> TeacherAttention:
        """The layer's attention weights, fp32, read once."""
        if layer not in self.weights:
            found = self.adapter.attention(self.read, layer)
            tensors = {name: t.to(home(self.model)).float() for name, t in vars(found).items() if t is not None}
            self.weights[layer] = TeacherAttention(**tensors)
        return self.weights[layer]

    def project(self, layer: int, kind: str, heads: list[int], states: torch.Tensor, positions: slice) -> torch.Tensor:
        """
        Queries, keys or values (`kind`) of some heads (KV heads for k and v), normed and rotated: `[B, heads, P, d]`.

        Args:
            states: `[B, P, D]`, the layer's input.
            positions: where in the text they stand.
        """
        weights = self.attention(layer)
        normed = self.model.model.layers[layer].input_layernorm(states).to(states.device).float()
        output = torch.einsum("bpD,hdD->bhpd", normed, getattr(weights, kind)[heads])
        bias = getattr(weights, f"{kind}_bias")
        if bias is not None:
            output = output + bias[heads][:, None]
        if kind == "v":
            return output
        scale = getattr(weights, f"{kind}_norm")
        if scale is not None:
            variance = output.pow(2).mean(-1, keepdim=True)
            output = scale * output * torch.rsqrt(variance + self.model.config.rms_norm_eps)
        return output * self.cos[positions] + rotate_half(output) * self.sin[positions]

    def groups(self, heads: list[int]) -> tuple[list[int], list[int]]:
        """The KV heads that some query heads read, and for each query head its place among them."""
        kv_heads = sorted({head // self.group_size for head in heads})
        return kv_heads, [kv_heads.index(head // self.group_size) for head in heads]

    def keys_values(self, layer: int, heads: list[int], states: torch.Tensor, positions: slice):
        """Keys and values `[B, heads, P, d]` as these query heads read them."""
        kv_heads, places = self.groups(heads)
        return [self.project(layer, kind, kv_heads, states, positions)[:, places] for kind in ("k", "v")]

    def scores(self, query: torch.Tensor, key: torch.Tensor, queries: slice) -> torch.Tensor:
        """Attention weights `[B, heads, Q, T]` of the queries at positions `queries` over all keys before them."""
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        places = torch.arange(key.shape[-2], device=key.device)
        return logits.masked_fill(places[queries, None] < places, -torch.inf).softmax(-1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: slice) -> torch.Tensor:
        """Head outputs `[B, Q, heads, d]` of causal attention; `queries`: where in the text the queries stand."""
        places = torch.arange(key.shape[-2], device=key.device)
        mask = places[queries, None] >= places
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class PathPatching:
    """
    Indirect effects of heads on a pair's readout, through given heads that read them (METHOD §2).

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
        self.answer_in_text = positions
        self.direction = readout_direction(model, pair)
        self.reader = reader.for_length(self.length)
        self.residual = self.clean.residual[:, self.changed]  # [L, P, D]

    def readouts(self) -> tuple[float, float]:
        """Clean and corrupt readout."""
        clean, corrupt = (
            readout(recording.states[self.answer], self.direction) for recording in (self.clean, self.corrupt)
        )
        return clean.item(), corrupt.item()

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
        size = max(1, PATH_TOKENS // (self.length - self.first))
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
    What every head does to the readout through the receivers, exactly, over several rounds (METHOD §2).

    In the first round heads send to the receivers; those that pass the threshold on average are what the next round's
    heads send to, until nothing new appears. A head's effect is the largest of its rounds. Where a round has more than
    `shortlist` candidates, those with the largest first-order estimate on the first two pairs are measured and the
    others count as 0.

    Cost per round and pair: two forwards to record and at most `shortlist` passes through the MLPs below the last
    receiver, from the first changed token on; three more passes on the first two pairs where estimates are needed.

    Args:
        scales: for each pair the clean less the corrupt readout, which effects are divided by.
        receivers: heads whose direct effect on the readout passes the threshold.

    Returns:
        `[pairs, L, H]` fp32, 1 where a head's change alone does what the corrupt text does.
    """
    adapter = reader.adapter
    best = torch.zeros(len(pairs), adapter.num_layers, adapter.num_heads)
    known, hops = set(receivers), [sorted(receivers)]
    for _ in range(rounds if receivers else 0):
        reach = max(layer for layer, _ in hops[0])
        candidates = [(layer, head) for layer in range(reach) for head in range(adapter.num_heads)]
        if len(candidates) > shortlist:
            estimate = sum(PathPatching(reader, pair).estimate(hops).abs() for pair in pairs[:2])
            candidates = sorted(candidates, key=lambda head: -float(estimate[head]))[:shortlist]
        if not candidates:
            break
        found = torch.zeros_like(best)
        for index, (pair, scale) in enumerate(zip(pairs, scales)):
            drops = PathPatching(reader, pair).effects(candidates, hops)
            for head, drop in zip(candidates, drops):
                found[(index, *head)] = drop / scale
        best = torch.maximum(best, found)
        passed = found.clamp(0, 1).mean(0) > threshold
        new = [head for head in candidates if passed[head] and head not in known]
        if not new:
            break
        known |= set(new)
        hops = [sorted(new), *hops]
    return best
