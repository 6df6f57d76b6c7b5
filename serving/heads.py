"""
How the heads of a HydraHead layer lie in vLLM: slots, weights, pages of memory. Nothing here imports vLLM.

vLLM gives every KV head of a layer the same number of query heads, and all layers pages of one size; the release that
this was written for knows one shape of recurrent state too. Where a mask gives a layer fewer heads than that, slots
stay empty: their weights are zeros, and what they put out meets columns of zeros in the output projection.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_hydrahead import HeadLayout, HydraHeadConfig

EMPTY = -1
WIDEST_CONVOLUTION = 4  # of vLLM's causal_conv1d_fn (model_executor/layers/mamba/ops/causal_conv1d.py)
KERNEL_BLOCK = 16  # tokens: pages are multiples of this


def served_kv_heads(config: HydraHeadConfig) -> int:
    """
    KV heads of every layer that has full-attention heads, empty slots among them; 0 where no layer has any.

    The smallest divisor of the teacher's KV heads that has room for the layer with most: vLLM makes the page of a
    model with all of the teacher's KV heads, and a layer's page has to fit into it a whole number of times.
    """
    most = max(len(config.head_layout(layer).kv_heads) for layer in range(config.num_hidden_layers))
    total = config.num_key_value_heads
    return next(count for count in range(most, total + 1) if total % count == 0) if most else 0


def most_linear_heads(config: HydraHeadConfig) -> int:
    """Linear heads of the layer with most: those of the one state shape."""
    return max(len(config.head_layout(layer).linear_heads) for layer in range(config.num_hidden_layers))


def group_size(layout: HeadLayout) -> int:
    """Query slots of each KV slot of a layer."""
    return max((size for size, _ in layout.blocks), default=0)


def why_not_on(config: HydraHeadConfig, ranks: int) -> str | None:
    """What keeps the heads from being split over so many GPUs, in words, or `None`."""
    slots = served_kv_heads(config)
    if slots and slots % ranks and ranks % slots:
        return f"its layers have {slots} KV heads"
    shared = max(1, ranks // slots) if slots else 1  # GPUs that hold the same KV head, and share its query heads
    for layer in range(config.num_hidden_layers):
        layout = config.head_layout(layer)
        if group_size(layout) % shared:
            return f"layer {layer} has {group_size(layout)} query heads for a KV head that {shared} GPUs would share"
        if len(layout.linear_heads) % ranks:
            return f"layer {layer} has {len(layout.linear_heads)} linear heads"
    return None


def check_served(config: HydraHeadConfig, ranks: int = 1) -> None:
    """
    Raises:
        ValueError: a checkpoint that cannot be served on so many GPUs, in one line that says what can be done.
    """
    if config.short_conv_kernel_size > WIDEST_CONVOLUTION and most_linear_heads(config):
        raise ValueError(
            f"short_conv_kernel_size is {config.short_conv_kernel_size}: vLLM's convolution has at most "
            f"{WIDEST_CONVOLUTION} taps, and this checkpoint cannot be served by it"
        )
    reason = why_not_on(config, ranks)
    if reason is not None:
        possible = [n for n in range(1, config.num_attention_heads + 1) if why_not_on(config, n) is None]
        raise ValueError(
            f"heads cannot be split over {ranks} GPUs, because {reason}: tensor_parallel_size may be "
            f"{', '.join(map(str, possible))}"
        )


@dataclass(frozen=True)
class ServedLayer:
    """
    Which head of a layer lies in which slot of which GPU. Every attribute holds one tuple for each GPU.

    Attributes:
        queries: for each query slot a place in `HeadLayout.full_heads`, or `EMPTY`; those of a KV slot side by side.
        keys: for each KV slot a place in `HeadLayout.kv_heads`, or `EMPTY`.
        linear: for each slot of the linear branch a place in `HeadLayout.linear_heads`.
        heads: for each query slot, then each linear one, the teacher's index of its head, or `EMPTY`.
    """

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    linear: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, config: HydraHeadConfig, layer_idx: int, ranks: int = 1) -> "ServedLayer":
        """The layer on so many GPUs; `check_served` says whether that can be."""
        layout = config.head_layout(layer_idx)
        slots, size = (served_kv_heads(config), group_size(layout)) if layout.kv_heads else (0, 0)
        groups, first = [], 0
        for readers, count in layout.blocks:
            for _ in range(count):
                groups.append([*range(first, first + readers), *[EMPTY] * (size - readers)])
                first += readers
        groups += [[EMPTY] * size] * (slots - len(groups))
        shared = max(1, ranks // slots) if slots else 1
        pieces = [
            (key if key < len(layout.kv_heads) else EMPTY, groups[key][part::shared])
            for key in range(slots)
            for part in range(shared)
        ]
        count = len(pieces) // ranks
        parts = [pieces[rank * count : (rank + 1) * count] for rank in range(ranks)]
        queries = tuple(tuple(place for _, places in part for place in places) for part in parts)
        linear = split(range(len(layout.linear_heads)), ranks)
        return cls(
            queries=queries,
            keys=tuple(tuple(key for key, _ in part) for part in parts),
            linear=linear,
            heads=tuple(
                tuple(EMPTY if place == EMPTY else layout.full_heads[place] for place in queries[rank])
                + tuple(layout.linear_heads[place] for place in linear[rank])
                for rank in range(ranks)
            ),
        )


def split(places: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """The same number of neighbours for each GPU."""
    count = len(places) // ranks
    return tuple(tuple(places[rank * count : (rank + 1) * count]) for rank in range(ranks))


def checkpoint_names(config: HydraHeadConfig, layer_idx: int) -> set[str]:
    """Names of the weights that a checkpoint holds for the attention of a layer, from `self_attn.` on."""
    layout, names = config.head_layout(layer_idx), {"o_proj.weight"}
    if config.attention_output_bias:
        names.add("o_proj.bias")
    if config.fusion != "concat":
        names.add("fusion.weight")
    if config.fusion == "gate":
        names.add("fusion.proj.weight")
    for branch, heads in (("full_attention", layout.full_heads), ("linear_attention", layout.linear_heads)):
        if not heads:
            continue
        names |= {f"{branch}.{part}_proj.weight" for part in "qkv"}
        if config.attention_bias:
            names |= {f"{branch}.{part}_proj.bias" for part in "qkv"}
        if config.qk_norm:
            names |= {f"{branch}.{part}_norm.weight" for part in "qk"}
    if layout.full_heads and config.full_attention_gate:
        names.add("full_attention.output_gate.weight")
    if layout.linear_heads:
        names |= {f"linear_attention.gates.{name}" for name in ("b_proj.weight", "b_proj.bias", "a_proj.weight")}
        names |= {f"linear_attention.{name}" for name in ("gates.A_log", "gates.dt_bias", "short_conv.weight")}
    return names


def take_heads(rows: torch.Tensor, places: Iterable[int], head_dim: int) -> torch.Tensor:
    """From rows of heads `[heads · d, ...]` those of some heads `[places · d, ...]`, zeros for `EMPTY`."""
    places = torch.tensor(list(places))
    heads = rows.unflatten(0, (-1, head_dim))[places.clamp_min(0)]
    heads[places == EMPTY] = 0
    return heads.flatten(0, 1)


def served_weights(
    config: HydraHeadConfig, layer_idx: int, weights: Mapping[str, torch.Tensor], ranks: int = 1
) -> dict[str, torch.Tensor]:
    """
    A layer's attention as vLLM's module has it, from a checkpoint's weights, both from `self_attn.` on.

    What is split over GPUs lies GPU by GPU: rows in `qkv_proj` (q, k, v and the output gate of the full-attention
    branch, q, k, v of the linear one), `conv` and `gates`, columns in `o_proj`. The rest is the same on all.
    """
    layer, dim = ServedLayer.of(config, layer_idx, ranks), config.head_dim
    whole = {
        "o_proj.bias": "o_proj.bias",
        "fusion.weight": "fusion.weight",
        "fusion.proj.weight": "fusion.proj_weight",
    }
    served = {ours: weights[name] for name, ours in whole.items() if name in weights}
    columns = weights["o_proj.weight"].t()
    served["o_proj.weight"] = torch.cat([take_heads(columns, heads, dim) for heads in layer.heads]).t().contiguous()
    for branch, queries, keys in (
        ("full_attention", layer.queries, layer.keys),
        ("linear_attention", layer.linear, layer.linear),
    ):
        if not any(queries):
            continue
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            q, k, v = (weights[f"{branch}.{part}_proj.{kind}"] for part in "qkv")
            gate = weights.get(f"{branch}.output_gate.{kind}")
            if gate is None and f"{branch}.output_gate.weight" in weights:
                gate = torch.zeros_like(q)  # the gate has no bias
            parts = []
            for of_queries, of_keys in zip(queries, keys):
                parts += [take_heads(q, of_queries, dim), take_heads(k, of_keys, dim), take_heads(v, of_keys, dim)]
                if gate is not None:
                    parts.append(take_heads(gate, of_queries, dim))
            served[f"{branch}.qkv_proj.{kind}"] = torch.cat(parts)
        if config.qk_norm:
            served |= {f"{branch}.{part}_norm.weight": weights[f"{branch}.{part}_norm.weight"] for part in "qk"}
    if any(layer.linear):
        gates = {name: weights[f"linear_attention.gates.{name}"].float() for name in ("A_log", "dt_bias")}
        beta, bias, step = (
            weights[f"linear_attention.gates.{name}"].float()
            for name in ("b_proj.weight", "b_proj.bias", "a_proj.weight")
        )
        served["linear_attention.gates.weight"] = torch.cat(
            [take_heads(rows, places, 1) for places in layer.linear for rows in (beta, step)]
        )
        for name, rows in (gates | {"beta_bias": bias}).items():
            served[f"linear_attention.gates.{name}"] = rows  # heads are ascending, as the slots
        channels = weights["linear_attention.short_conv.weight"].chunk(3)
        served["linear_attention.conv"] = torch.cat(
            [take_heads(rows, places, dim) for places in layer.linear for rows in channels]
        )
    return served


class ServedGates(nn.Module):
    """Writing strength and decay of some linear heads, in fp32, as `HydraHeadGates`."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2 * heads, hidden_size, dtype=torch.float32), requires_grad=False)
        for name in ("beta_bias", "A_log", "dt_bias"):
            setattr(self, name, nn.Parameter(torch.zeros(heads, dtype=torch.float32), requires_grad=False))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, D]` to β in (0, 1) and log decay g < 0, both `[T, h]` fp32."""
        beta, step = F.linear(hidden_states.float(), self.weight).chunk(2, dim=-1)
        return (beta + self.beta_bias).sigmoid(), -self.A_log.exp() * F.softplus(step + self.dt_bias)


class ServedFusion(nn.Module):
    """
    Fusion of the heads on one GPU, as `HydraHeadFusion`, in the order of the slots: `o_proj` has their columns.

    Args:
        heads: the teacher's index of each slot's head, or `EMPTY`, as in `ServedLayer.heads`.
        full: slots of the full-attention branch among them, which come first.
    """

    def __init__(self, config: HydraHeadConfig, heads: Sequence[int], full: int):
        super().__init__()
        self.kind, self.eps = config.fusion, config.rms_norm_eps
        self.as_it_is = full if config.fusion_norm == "linear" else 0  # slots that are not normalised
        self.register_buffer("index", torch.tensor([max(head, 0) for head in heads]), persistent=False)
        sizes = {"weight": (config.num_attention_heads,)} if self.kind != "concat" else {}
        if self.kind == "gate":
            sizes["proj_weight"] = (config.num_attention_heads, config.hidden_size)
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.zeros(size, dtype=torch.float32), requires_grad=False))

    def forward(self, heads: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Slots `[T, S, d]` and the layer's input `[T, D]` to `[T, S, d]`, in the dtype of the slots."""
        if self.kind == "concat":
            return heads
        full, rest = heads.float().split([self.as_it_is, heads.shape[1] - self.as_it_is], dim=1)
        rest = rest * torch.rsqrt(rest.square().mean(-1, keepdim=True) + self.eps)
        size = self.weight
        if self.kind == "gate":
            gamma = size.clamp_min(1e-6)
            size = F.linear(hidden_states.float(), self.proj_weight) + gamma.log()
            size = size.softmax(-1) * gamma.sum()  # [T, H], the whole model's heads on every GPU
        fused = torch.cat([full, rest], dim=1) * size[..., self.index].unsqueeze(-1)
        return fused.to(heads.dtype)


def query_scale(positions: torch.Tensor, base: float) -> torch.Tensor:
    """`log(t + a) / log(a)` fp32 at positions `t`, `[T]` to `[T, 1]`; `a` is `logit_scale_base`."""
    return (torch.log(positions.float() + base) / math.log(base)).unsqueeze(-1)


@dataclass(frozen=True)
class Pages:
    """
    Memory that vLLM keeps on all GPUs together, in bytes, beside what the masks need.

    Attributes:
        kv_bytes_per_token, kv_bytes_needed: of the KV cache, for one token.
        state_bytes, state_bytes_needed: of convolutions and recurrent states, for one sequence.
        page_bytes: of one page, on one GPU; a sequence holds whole pages.
        tokens: of a page of the KV cache.
        kv_groups, state_groups: vLLM's groups of layers; a page of a group has a number, and is there once a layer.
    """

    kv_bytes_per_token: int
    kv_bytes_needed: int
    state_bytes: int
    state_bytes_needed: int
    page_bytes: int
    tokens: int
    kv_groups: int
    state_groups: int

    @classmethod
    def of(cls, config: HydraHeadConfig, ranks: int = 1, kv_bytes: int = 2, conv_bytes: int = 2, state_bytes: int = 4):
        """
        As vLLM 0.26 lays them out: `Platform._align_hybrid_block_size`, then `unify_kv_cache_spec_page_size` and
        `_get_kv_cache_groups_uniform_page_size` (platforms/interface.py, v1/core/kv_cache_utils.py).

        Args:
            kv_bytes, conv_bytes, state_bytes: of one number in each.
        """
        layouts = [config.head_layout(layer) for layer in range(config.num_hidden_layers)]
        dim, taps = config.head_dim, config.short_conv_kernel_size - 1
        of_head = dim * (3 * taps * conv_bytes + dim * state_bytes)
        slots, linear = served_kv_heads(config), most_linear_heads(config) // ranks
        with_kv, with_state = sum(bool(x.kv_heads) for x in layouts), sum(bool(x.linear_heads) for x in layouts)
        of_token = 2 * max(1, slots // ranks) * dim * kv_bytes
        whole_token = 2 * max(1, config.num_key_value_heads // ranks) * dim * kv_bytes
        page = linear * of_head
        if with_kv:  # a page of the teacher's KV heads with room for a state
            page = KERNEL_BLOCK * whole_token * max(1, math.ceil(page / (KERNEL_BLOCK * whole_token)))
        if not with_state:
            page = KERNEL_BLOCK * of_token
        counts = [count for count in (with_kv, with_state) if count]
        size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
        kv_groups, state_groups = math.ceil(with_kv / size), math.ceil(with_state / size)
        return cls(
            kv_bytes_per_token=kv_groups * size * of_token * ranks,
            kv_bytes_needed=config.kv_bytes_per_token(kv_bytes),
            state_bytes=state_groups * size * page * ranks,
            state_bytes_needed=sum(len(x.linear_heads) for x in layouts) * of_head,
            page_bytes=page,
            tokens=page // of_token if with_kv else 0,
            kv_groups=kv_groups,
            state_groups=state_groups,
        )

    def numbers(self, tokens: int) -> int:
        """How many of vLLM's numbered pages (`num_gpu_blocks`) a sequence of so many tokens holds."""
        return self.state_groups + (self.kv_groups * math.ceil(tokens / self.tokens) if self.tokens else 0)

    def in_words(self) -> str:
        """One line for the start of a server."""
        line = (
            f"KV cache of {self.kv_bytes_per_token:,} bytes a token (the masks need {self.kv_bytes_needed:,}) and "
            f"states of {self.state_bytes:,} bytes a sequence (the masks need {self.state_bytes_needed:,})"
        )
        if self.tokens:
            line += f", in pages of {self.tokens:,} tokens"
        if self.kv_bytes_per_token > self.kv_bytes_needed:
            line += "; the rest are empty slots, because all layers have pages of one size"
        return line
