# Copyright 2026 The HydraHead authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""HydraHead: decoder layers whose query heads are, one by one, full attention or Gated DeltaNet."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation import CompileConfig, GenerationConfig, GenerationMixin, GenerationMode
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_hydrahead import HydraHeadConfig
from .ops_hydrahead import (
    EVEN,
    HydraHeadPackedLinear,
    Packing,
    Padding,
    attend_to_cache,
    can_record,
    fuse_heads,
    gated_delta_rule,
    has_kernels,
    prepare_heads,
    record,
)

logger = logging.get_logger(__name__)

CACHES = (Cache, PagedAttentionCache)
RECORDED = CompileConfig(backend="cudagraphs")  # for `generate`: the step as a graph, without a compiler
OLD_CACHE_NAMES = ("past", "past_key_value", "layer_past", "cache_params")
# transformers 5.24 renamed `past_key_values` to `cache`. A cache comes in under either name, on every release, and
# goes out under the name that the release's outputs have.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def is_whole(attention_mask: torch.Tensor | dict | None) -> bool:
    """Whether nothing is padding; a GPU is waited for."""
    return attention_mask is None or (is_padding_mask(attention_mask) and bool(attention_mask.all()))


def keys_to_read(
    cache: Cache | None, tokens: int, attention_mask: torch.Tensor | dict | None, is_sdpa: bool
) -> int | None:
    """
    How many keys of a static cache a call of several tokens reads: those that are written by then.

    `None` for any other call, and where only a mask over all the room that a cache has can tell: in a graph, and for
    padded rows in later pieces of a prompt.
    """
    is_readable = attention_mask is None or is_padding_mask(attention_mask)
    if tokens == 1 or not isinstance(cache, StaticCache) or not is_readable or torch.compiler.is_compiling():
        return None
    seen = int(cache.get_seq_length())
    return seen + tokens if seen == 0 or (is_sdpa and is_whole(attention_mask)) else None


class HydraHeadRMSNorm(Qwen3RMSNorm):
    """The same in one or two kernels where the original has eight, in the dtype that comes in."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, shape = self.weight.to(hidden_states.dtype), hidden_states.shape[-1:]
        if weight.dtype == torch.float32:
            return F.rms_norm(hidden_states, shape, weight, self.variance_epsilon)
        return weight * F.rms_norm(hidden_states, shape, eps=self.variance_epsilon)  # rounded where the original is


class HydraHeadRotaryEmbedding(Qwen3RotaryEmbedding):
    """Rotary embedding with every `rope_parameters` type of transformers, llama3 and longrope among them."""


def only_cache(cache: Cache | None, past_key_values: Cache | None, more: dict) -> Cache | None:
    """
    The cache that a caller passed, under the name of either release.

    Raises:
        ValueError: two different ones, or one among `more`, under a name that is not known.
    """
    for name, value in more.items():
        if isinstance(value, CACHES) or (name in OLD_CACHE_NAMES and value is not None):
            raise ValueError(f"{name} holds a cache under a name that is not known: pass it as cache")
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them")
    cache = past_key_values if cache is None else cache
    if cache is not None and not isinstance(cache, CACHES):
        raise ValueError(f"cache must be one of transformers' Cache classes, got {type(cache).__name__}")
    return cache


def is_padding_mask(attention_mask: torch.Tensor | dict | None) -> bool:
    """Whether a mask is `[B, tokens]`: neither absent, nor prepared by `generate`, nor a pattern of its own."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def find_packing(
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | dict | None,
    cache: Cache | None,
    is_declared: bool,
) -> Packing | None:
    """
    The sequences packed into rows, or `None` where no row holds more than one.

    Packed rows are recognised, as elsewhere in transformers, by position ids that do not grow by one. A compiled
    forward cannot look at them: there `is_declared` (by `cu_seq_lens_q`) decides, and rows that restart all the same
    fail.

    Raises:
        ValueError: packed rows together with an attention mask or a cache, which could not keep them apart, or
            declared without their position ids.
    """
    is_pattern = attention_mask is not None and not is_padding_mask(attention_mask)
    if is_declared and position_ids is None:
        raise ValueError("cu_seq_lens_q describes packed sequences: pass their position_ids too")
    if position_ids is None or position_ids.shape[-1] == 1 or is_pattern or isinstance(cache, PagedAttentionCache):
        return None
    restarts = position_ids.diff(dim=-1) != 1
    if is_padding_mask(attention_mask):  # positions of padding do not count
        real = attention_mask[:, -position_ids.shape[-1] :].bool()
        restarts = restarts & real[:, 1:] & real[:, :-1]
    if torch.compiler.is_compiling():
        if not is_declared:
            message = (
                "position_ids restart within a row: a compiled forward needs cu_seq_lens_q to see packed sequences"
            )
            torch._assert_async(~restarts.any(), message)
            return None
    elif not restarts.any():
        if is_declared:
            raise ValueError("cu_seq_lens_q describes packed sequences, but their position_ids do not restart")
        return None
    if attention_mask is not None or cache is not None:
        raise ValueError(
            "position_ids restart within a row (packed sequences): pass them without attention_mask and without a "
            "cache, or one sequence per row"
        )
    return Packing.of(restarts)


def for_products(hidden_states: torch.Tensor) -> torch.Tensor:
    """In autocast's dtype, where it is on: each of the linear layers that read this would cast it for itself."""
    device = hidden_states.device.type
    if not torch.is_autocast_enabled(device):
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device))


def log_position_scale(config: HydraHeadConfig, position_ids: torch.Tensor) -> torch.Tensor | None:
    """
    `log(t + a) / log(a)` `[B, T]` fp32 for full-attention queries at positions `t`, or `None` without a scale.

    It keeps attention as sharp over a long context as it is over `a` tokens.
    """
    # CODEPATH: set together with NoPE; `None` for the unchanged teacher.
    if config.logit_scale_base is None:
        return None
    return torch.log(position_ids.float() + config.logit_scale_base) / math.log(config.logit_scale_base)


class HydraHeadFullAttentionBlock(nn.Module):
    """Grouped-query attention over a contiguous block of KV heads; what the attention interface sees as its module."""

    def __init__(self, config: HydraHeadConfig, layer_idx: int, num_key_value_groups: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = num_key_value_groups
        self.is_causal = True
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query `[B, n · h, T, d]`, key and value `[B, h, S, d]` to outputs `[B, T, n · h, d]` and weights."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )


def step_places(blocks: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """
    How queries are laid out where each KV head has as many as the one with most.

    Args:
        blocks: queries of a KV head and number of such KV heads, as in `HeadLayout`.

    Returns:
        for each place the query that stands in it, and for each query its first place.
    """
    most, first, slots, places = max((size for size, _ in blocks), default=0), 0, [], []
    for size, count in blocks:
        for _ in range(count):
            places += [len(slots) + query for query in range(size)]
            slots += [first + min(query, size - 1) for query in range(most)]
            first += size
    return slots, places


class HydraHeadOutputGate(nn.Linear):
    """Logits of the output gate, zero at initialisation: a class by which `_init_weights` can tell them apart."""


class HydraHeadFullAttention(nn.Module):
    """
    Full-attention branch: the teacher's attention for some query heads and the KV heads that they read.

    Differs from `Qwen3Attention` in three options: no rotary embedding, a query scale that grows with the logarithm of
    the position, and an output gate. It has no output projection: that is shared with the other branch.
    """

    def __init__(self, config: HydraHeadConfig, layer_idx: int):
        super().__init__()
        layout = config.head_layout(layer_idx)
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.use_rope = config.full_attention_position == "rope"

        query_dim, key_dim = len(layout.full_heads) * self.head_dim, len(layout.kv_heads) * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_dim, bias=config.attention_bias)
        # CODEPATH: Qwen3 teachers normalise q and k; Llama, Mistral, Qwen2.5 and Phi-3 teachers do not.
        self.q_norm = HydraHeadRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        # CODEPATH: as q_norm.
        self.k_norm = HydraHeadRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.output_gate = None
        # CODEPATH: on in the paper's checkpoints; off for the unchanged teacher and as an ablation.
        if config.full_attention_gate:
            self.output_gate = HydraHeadOutputGate(config.hidden_size, query_dim, bias=False)
        self.query_splits = [size * count for size, count in layout.blocks]
        self.key_splits = [count for _, count in layout.blocks]
        self.slots, self.places = step_places(layout.blocks)
        self.slot_index = nn.Buffer(torch.tensor(self.slots), persistent=False)
        self.place_index = nn.Buffer(torch.tensor(self.places), persistent=False)
        self.blocks = nn.ModuleList(HydraHeadFullAttentionBlock(config, layer_idx, size) for size, _ in layout.blocks)
        self.whole = HydraHeadFullAttentionBlock(config, layer_idx, 1)

    def linears(self) -> list[nn.Linear]:
        """What reads the layer's input."""
        gate = [] if self.output_gate is None else [self.output_gate]
        return [self.q_proj, self.k_proj, self.v_proj, *gate]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        query_scale: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        projected: torch.Tensor | None = None,
        keys_read: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `[B, T, D]` to head outputs `[B, T, |F|, d]`, in the order of `HeadLayout.full_heads`, and weights.

        Args:
            keys_read: of those in a static cache, see `keys_to_read`.
            projected: what the `linears` make of `hidden_states`, behind each other, where that is known.
        """
        linears = self.linears()
        if projected is None:
            projected = [linear(hidden_states) for linear in linears]
        else:
            projected = projected.split([linear.out_features for linear in linears], dim=-1)
        query, key, value, *gate = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        query, key, value = (x.transpose(1, 2) for x in (self.q_norm(query), self.k_norm(key), value))
        if self.use_rope:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if query_scale is not None:
            query = query * query_scale[:, None, :, None].to(query.dtype)
        # Under autocast fp32 norms and rotations promote what the projections gave in bf16: the kernel gets that.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if isinstance(cache, PagedAttentionCache) and CACHE == "past_key_values":
            kwargs["cache"] = cache  # before transformers 5.24 the attention function fills it
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)  # a paged one adds to kwargs
            # CODEPATH: a prompt in a static cache; all else reads all of a cache.
            if keys_read is not None:
                key, value = key[:, :, :keys_read], value[:, :, :keys_read]

        # CODEPATH: a later chunk of a prompt, whose mask against all before it would be larger than anything else.
        if self._is_chunk(query, key, attention_mask, cache, keys_read):
            attention_mask = causal_lower_right(query.shape[2], key.shape[2])
        # CODEPATH: one token of generation, of which nobody wants attention weights or a gradient; else any call.
        attend = self._attend_once if self._is_step(query, attention_mask) else self._attend
        output, weights = attend(query, key, value, attention_mask, **kwargs)
        if gate:
            output = output * (2 * gate[0].sigmoid())
        return output, weights

    @property
    def _is_sdpa(self) -> bool:
        return self.whole.config._attn_implementation == "sdpa"  # trf-ignore: TRF051

    def _is_chunk(self, query, key, attention_mask, cache, keys_read) -> bool:
        # The keys of a static cache are more than were read: their number says nothing, but for those counted.
        is_growing = (isinstance(cache, DynamicCache) or keys_read is not None) and key.shape[2] > query.shape[2]
        return is_growing and query.shape[2] > 1 and attention_mask is None and self._is_sdpa

    def _is_step(self, query: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        # The others keep their own kernels, whose single tokens are quick, or their attention weights.
        if not self._is_sdpa or query.shape[2] > 1 or torch.is_grad_enabled():
            return False
        return attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)

    def _attend_once(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, None]:
        """As `_attend` for one token, in one call: KV heads with fewer queries than others get one of them twice."""
        if len(self.blocks) > 1:
            query = query.index_select(1, self.slot_index)
        query = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
        output = attend_to_cache(query, key, value, attention_mask).flatten(1, 2)  # [B, |G_F| * n, d]
        if len(self.blocks) > 1:
            output = output.index_select(1, self.place_index)
        return output.unsqueeze(1), None

    def _attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, |F|, T, d]`, `[B, |G_F|, S, d]` to outputs `[B, T, |F|, d]` and weights, by the attention interface."""
        blocks, queries = self.blocks, query.split(self.query_splits, dim=1)
        keys, values = key.split(self.key_splits, dim=1), value.split(self.key_splits, dim=1)
        if len(blocks) > 1 and query.shape[2] > 1:
            # One call. A step of decoding would copy the cache for it.
            sizes = [block.num_key_value_groups for block in blocks]
            keys, values = (
                [torch.cat([x.repeat_interleave(size, dim=1) for size, x in zip(sizes, parts)], dim=1)]
                for parts in (keys, values)
            )
            blocks, queries = [self.whole], [query]
        outputs, weights = zip(
            *(block(q, k, v, attention_mask, **kwargs) for block, q, k, v in zip(blocks, queries, keys, values))
        )
        if len(outputs) == 1:
            return outputs[0], weights[0]  # those that were used: they have a gradient
        return torch.cat(outputs, dim=2), torch.cat(weights, dim=1) if weights[0] is not None else None


class HydraHeadGates(nn.Module):
    """Per-head writing strength and decay of the recurrent state, in fp32: bf16 cannot tell 0.999 from 1."""

    def __init__(self, config: HydraHeadConfig, layer_idx: int):
        super().__init__()
        num_heads = len(config.head_layout(layer_idx).linear_heads)
        self.b_proj = nn.Linear(config.hidden_size, num_heads, bias=True)
        self.a_proj = nn.Linear(config.hidden_size, num_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.projections = HydraHeadPackedLinear()

    def linears(self) -> list[nn.Linear]:
        """What reads the layer's input."""
        return [self.b_proj, self.a_proj]

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, T, D]` to β in (0, 1) and log decay g < 0, both `[B, T, h]` fp32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(self.A_log.dtype)
            projected = self.projections(hidden_states, self.linears())
            if projected is None:
                beta, step = self.b_proj(hidden_states), self.a_proj(hidden_states)
            else:
                beta, step = projected.chunk(2, dim=-1)
            step = F.softplus(step.float() + self.dt_bias.float())
            return beta.float().sigmoid(), -self.A_log.float().exp() * step


class HydraHeadShortConvolution(nn.Module):
    """Causal depthwise convolution over time, without bias or activation; the identity at initialisation."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, kernel_size))
        self.kernel_size = kernel_size

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        padding: Padding | None = None,
        packing: Packing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: `[B, T, C]`, zeros where a token is padding.
            context: `[B, C, kernel_size]`, the inputs before `x`, or `None` for zeros.

        Returns:
            outputs `[B, T, C]` in the dtype of `x`, of no meaning where a token is padding, and the last inputs
            `[B, C, kernel_size]`.
        """
        if context is None:
            inputs = F.pad(x, (0, 0, self.kernel_size, 0))
        else:
            inputs = torch.cat([context.transpose(1, 2), x], dim=1)
        if padding is not None:
            inputs = inputs.gather(1, padding.order.unsqueeze(-1).expand_as(inputs))
        output = self._sum_of_taps(inputs, packing)
        if padding is not None:
            output = output.gather(1, padding.place.unsqueeze(-1).expand_as(output))
        return output, inputs[:, -self.kernel_size :].transpose(1, 2)

    def next_context(self, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor | None:
        """The last inputs after `x`, or `None` where `prepare_heads` has moved them on itself."""
        if context is not None and x.shape[1] == 1:
            return None
        last = x[:, -self.kernel_size :].transpose(1, 2)
        missing = self.kernel_size - last.shape[2]
        if not missing:
            return last
        return F.pad(last, (missing, 0)) if context is None else torch.cat([context[..., -missing:], last], dim=2)

    def _sum_of_taps(self, inputs: torch.Tensor, packing: Packing | None) -> torch.Tensor:
        """Inputs `[B, kernel_size + T, C]` to outputs `[B, T, C]`; no tap reaches back over a sequence's beginning."""
        kernel_size, seq_len = self.kernel_size, inputs.shape[1] - self.kernel_size
        weight = self.weight.to(inputs.dtype)
        if seq_len == 1:
            return (inputs[:, 1:] * weight.t()).sum(1, keepdim=True)
        output = inputs[:, kernel_size:] * weight[:, -1]
        for tap in range(kernel_size - 1):
            earlier = inputs[:, tap + 1 : tap + 1 + seq_len]
            if packing is not None:
                earlier = earlier.masked_fill((packing.offset < kernel_size - 1 - tap).unsqueeze(-1), 0)
            output = output + earlier * weight[:, tap]
        return output


class HydraHeadGatedDeltaNet(nn.Module):
    """
    Linear branch: Gated DeltaNet heads (https://huggingface.co/papers/2412.06464) with a state of fixed size.

    Differs from `Qwen3NextGatedDeltaNet` so that a head can start from a softmax head's weights: each head owns its
    q, k and v, q and k are normalised and rotated as in the teacher, the convolution starts as the identity and has
    no activation. Output norm and projection are shared with the other branch.
    """

    def __init__(self, config: HydraHeadConfig, layer_idx: int):
        super().__init__()
        num_heads = len(config.head_layout(layer_idx).linear_heads)
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        dim = num_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, dim, bias=config.attention_bias)
        self.short_conv = HydraHeadShortConvolution(3 * dim, config.short_conv_kernel_size)
        # CODEPATH: Qwen3 teachers normalise q and k; Llama, Mistral, Qwen2.5 and Phi-3 teachers do not.
        self.q_norm = HydraHeadRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        # CODEPATH: as q_norm.
        self.k_norm = HydraHeadRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.gates = HydraHeadGates(config, layer_idx)

    def linears(self) -> list[nn.Linear]:
        """What reads the layer's input, beside the gates."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        padding: Padding | None = None,
        packing: Packing | None = None,
        cache: Cache | None = None,
        projected: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `[B, T, D]` to head outputs `[B, T, h, d]`, in the order of `HeadLayout.linear_heads`.

        Args:
            projected: what the `linears` make of `hidden_states`, behind each other, where that is known.

        A token that is padding writes nothing into the convolution or the state and does not decay it, whatever stands
        in it.
        """
        beta, g = self.gates(hidden_states)  # [B, T, h]
        qkv = projected  # [B, T, 3 * h * d]
        if qkv is None:
            qkv = torch.cat([linear(hidden_states) for linear in self.linears()], dim=-1)
        if padding is not None:
            # Filled, not multiplied: 0 · inf in a padded position would be NaN. After the projection: it has a bias.
            qkv, beta, g = (x.masked_fill(padding.mask, 0) for x in (qkv, beta, g))

        state = context = None
        if cache is not None:
            state = cache.get_recurrent_state(self.layer_idx)
            context = cache.get_conv_state(self.layer_idx)
        query, key, value, context = self._prepare(qkv, context, position_embeddings, padding, packing)
        if cache is not None and context is not None:
            cache.update_conv_state(context, self.layer_idx)
        output, state = gated_delta_rule(query, key, value, g, beta, state, cache is not None, packing)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return output

    def _prepare(self, qkv, context, position_embeddings, padding: Padding | None, packing: Packing | None):
        """q, k and v `[B, T, h, d]` as the recurrence reads them, and the context, where it has not been moved on."""
        has_gradient = torch.is_grad_enabled() and context is not None  # of which the kernel has none
        if padding is None and not has_gradient and has_kernels(qkv):
            heads = prepare_heads(
                qkv,
                self.short_conv.weight,
                getattr(self.q_norm, "weight", None),
                getattr(self.k_norm, "weight", None),
                self.eps,
                *position_embeddings,
                None if packing is None else packing.offset,
                context,
            )
            return *heads, self.short_conv.next_context(qkv, context)
        qkv, context = self.short_conv(qkv, context, padding, packing)
        query, key, value = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)  # [B, T, h, d]
        query, key = apply_rotary_pos_emb(self.q_norm(query), self.k_norm(key), *position_embeddings, unsqueeze_dim=2)
        # Under autocast fp32 rotations promote what the projections gave in bf16: the recurrence gets that.
        return query.to(value.dtype), key.to(value.dtype), value, context


class HydraHeadFusion(nn.Module):
    """
    Scale-normalised fusion of the two branches: `Õ_h = γ_h · RMSNorm(O_h)`, heads back in the teacher's order.

    Full-attention outputs are sharp, recurrent ones smooth and, in deep layers, several times larger; the norm makes
    them comparable and γ gives each head its own size.
    """

    def __init__(self, config: HydraHeadConfig, layer_idx: int):
        super().__init__()
        layout = config.head_layout(layer_idx)
        self.fusion = config.fusion
        self.eps = config.rms_norm_eps
        self.num_heads = config.num_attention_heads
        # Heads from this one on are normalised; full-attention heads come first.
        # CODEPATH: "all" in the paper; "linear" lets full-attention heads start exactly as the teacher's.
        self.first_normalized = len(layout.full_heads) if config.fusion_norm == "linear" else 0
        self.order = layout.fused_to_teacher
        self.is_ordered = self.order == sorted(self.order)
        if self.fusion != "concat":
            self.weight = nn.Parameter(torch.ones(self.num_heads))  # γ, in the teacher's order
        if self.fusion == "gate":
            self.proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.index = nn.Buffer(torch.tensor(self.order), persistent=False)

    def forward(
        self, full: torch.Tensor | None, linear: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """full heads `[B, T, |F|, d]`, linear ones `[B, T, h, d]` and `x` `[B, T, D]` to `[B, T, H, d]`."""
        heads = [branch for branch in (full, linear) if branch is not None]
        if self.fusion == "scale" and has_kernels(heads[0]):
            return fuse_heads(full, linear, self.weight, self.index, self.eps, not self.first_normalized)
        heads = torch.cat(heads, dim=2) if len(heads) > 1 else heads[0]
        dtype = heads.dtype
        if self.fusion != "concat":
            full, rest = heads.float().split([self.first_normalized, self.num_heads - self.first_normalized], dim=2)
            rest = F.rms_norm(rest, rest.shape[-1:], eps=self.eps)
            heads = torch.cat([full, rest], dim=2) if self.first_normalized else rest
        if not self.is_ordered:
            heads = heads.index_select(2, self.index)
        if self.fusion == "scale":
            heads = heads * self.weight.float()[:, None]
        elif self.fusion == "gate":
            # At W = 0 each head's share of the total is its γ: the scale fusion.
            gamma = self.weight.float().clamp_min(1e-6)
            share = torch.softmax(self.proj(hidden_states.to(self.weight.dtype)).float() + gamma.log(), dim=-1)
            heads = heads * (share * gamma.sum()).unsqueeze(-1)
        return heads.to(dtype)


class HydraHeadAttention(nn.Module):
    """Attention that mixes full-attention and Gated DeltaNet heads before one output projection."""

    def __init__(self, config: HydraHeadConfig, layer_idx: int):
        super().__init__()
        layout = config.head_layout(layer_idx)
        self.full_attention = HydraHeadFullAttention(config, layer_idx) if layout.full_heads else None
        self.linear_attention = HydraHeadGatedDeltaNet(config, layer_idx) if layout.linear_heads else None
        self.fusion = HydraHeadFusion(config, layer_idx)
        self.projections = HydraHeadPackedLinear()
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.attention_output_bias
        )

    def linears(self) -> list[nn.Linear]:
        """What reads the layer's input, beside the gates: the full-attention branch's, then the linear one's."""
        branches = (self.full_attention, self.linear_attention)
        return [linear for branch in branches if branch is not None for linear in branch.linears()]

    def head_outputs(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        query_scale: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding: Padding | None = None,
        packing: Packing | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """`[B, T, D]` to fused head outputs `[B, T, H, d]`, in the teacher's order: what `o_proj` reads."""
        full = linear = for_full = for_linear = None
        projected = self.projections(hidden_states, self.linears())
        if projected is not None:
            count = sum(layer.out_features for layer in self.full_attention.linears()) if self.full_attention else 0
            for_full, for_linear = projected[..., :count], projected[..., count:]
        if self.full_attention is not None:
            full, _ = self.full_attention(
                hidden_states, position_embeddings, query_scale, attention_mask, cache, for_full, **kwargs
            )
        if self.linear_attention is not None:
            linear = self.linear_attention(hidden_states, position_embeddings, padding, packing, cache, for_linear)
        return self.fusion(full, linear, hidden_states)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; keywords as in `head_outputs`."""
        return self.o_proj(self.head_outputs(hidden_states, **kwargs).flatten(2))


class HydraHeadDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: HydraHeadConfig, layer_idx: int):
        super().__init__()
        self.self_attn = HydraHeadAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = HydraHeadRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = HydraHeadRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        query_scale: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        padding: Padding | None = None,
        packing: Packing | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = for_products(self.input_layernorm(hidden_states))
        hidden_states = self.self_attn(
            hidden_states,
            position_embeddings=position_embeddings,
            query_scale=query_scale,
            attention_mask=attention_mask,
            padding=padding,
            packing=packing,
            cache=cache,
            **kwargs,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = for_products(self.post_attention_layernorm(hidden_states))
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class HydraHeadPreTrainedModel(PreTrainedModel):  # trf-ignore: TRF057
    config: HydraHeadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HydraHeadDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict = ["gates", "fusion"]
    # What quantizers leave alone: they match the end of a module's name, or a pattern of a parameter's beginning.
    _keep_in_fp32_modules = [
        *(name for part in ("gates.a_proj", "gates.b_proj", "fusion.proj") for name in (part, rf".*\.{part}")),
    ]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": HydraHeadDecoderLayer,
        "attentions": OutputRecorder(HydraHeadFullAttention, index=1),
    }
    # A recurrent state cannot be rolled back: assisted decoding refuses such models by this flag.
    _is_stateful = True

    @property
    def _is_sdpa(self) -> bool:
        return self.config._attn_implementation == "sdpa"  # trf-ignore: TRF051

    def pack_projections(self) -> None:
        """
        Have each layer's projections computed in one product where no gradient is wanted; `generate` does it.

        Their weights become views of one matrix: memory and state dict stay as they are.
        """
        for module in self.modules():
            is_packable = isinstance(module, (HydraHeadAttention, HydraHeadGates))
            if is_packable and not module.projections.holds(module.linears()):
                module.projections.pack(module.linears())

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, HydraHeadOutputGate):
            init.zeros_(module.weight)
        elif isinstance(module, HydraHeadGates):
            # Decay half-lives spread from a few to a few hundred tokens, as in fla's GatedDeltaNet.
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log_())
            step = torch.empty_like(module.dt_bias).uniform_(-6.9, -2.3).exp_()  # 0.001 … 0.1
            init.copy_(module.dt_bias, step + torch.log(-torch.expm1(-step)))
            init.zeros_(module.b_proj.bias)
        elif isinstance(module, HydraHeadShortConvolution):
            identity = torch.zeros_like(module.weight)
            identity[:, -1] = 1
            init.copy_(module.weight, identity)
        elif isinstance(module, HydraHeadFullAttention):
            init.copy_(module.slot_index, torch.tensor(module.slots, device=module.slot_index.device))
            init.copy_(module.place_index, torch.tensor(module.places, device=module.place_index.device))
        elif isinstance(module, HydraHeadFusion):
            init.copy_(module.index, torch.tensor(module.order, device=module.index.device))
            if module.fusion != "concat":
                init.ones_(module.weight)
            if module.fusion == "gate":
                init.zeros_(module.proj.weight)


class HydraHeadModel(HydraHeadPreTrainedModel):  # trf-ignore: TRF057
    """Decoder without a language-model head."""

    def __init__(self, config: HydraHeadConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            HydraHeadDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = HydraHeadRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.has_full_attention = config.full_attention_share > 0
        self.has_linear_attention = config.full_attention_share < 1
        self.post_init()

    def _default_position_ids(self, inputs_embeds, attention_mask, cache) -> torch.Tensor:
        """Position ids `[B or 1, T]`. Padding does not count, so that a padded row is the row alone."""
        seq_len = inputs_embeds.shape[1]
        if is_padding_mask(attention_mask):
            return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -seq_len:]
        seen = cache.get_seq_length() if cache is not None else 0
        return torch.arange(seq_len, device=inputs_embeds.device).unsqueeze(0) + seen

    def _local_padding_mask(self, inputs_embeds, attention_mask, cache) -> torch.Tensor | None:
        """Mask `[B, T]` of the tokens of this call, or `None` where none is padding."""
        if inputs_embeds.shape[1] == 1 and is_padding_mask(attention_mask) and not torch.compiler.is_compiling():
            # transformers takes a single token for a generated one, but a prompt too can be fed token by token.
            return None if attention_mask[:, -1].all() else attention_mask[:, -1:]
        return create_recurrent_attention_mask(self.config, inputs_embeds, attention_mask, cache)

    def _causal_mask(self, inputs_embeds, attention_mask, cache, position_ids, keys_read) -> torch.Tensor | None:
        """The mask of full attention, or `None` where all before a token is seen and no mask has to say so."""
        tokens = inputs_embeds.shape[1]
        if keys_read is not None:
            if keys_read > tokens:  # see `_is_chunk`
                return None
            cache = None  # with it there would be columns for all the room that it has
        is_later = isinstance(cache, DynamicCache) and tokens > 1 and cache.get_seq_length() > 0
        if is_later and self._is_sdpa and not torch.compiler.is_compiling() and is_whole(attention_mask):
            return None  # see `_is_chunk`
        # By place: the cache's name is another one before transformers 5.24.
        return create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)

    def _masks(self, inputs_embeds, attention_mask, cache, position_ids, keys_read) -> dict[str, torch.Tensor | None]:
        """The masks of either kind of head."""
        if isinstance(attention_mask, dict):  # prepared by `generate`
            return attention_mask
        if isinstance(cache, PagedAttentionCache):  # prepared by `generate_batch`
            return {"full_attention": attention_mask}
        masks = {"linear_attention": self._local_padding_mask(inputs_embeds, attention_mask, cache)}
        if self.has_full_attention:
            masks["full_attention"] = self._causal_mask(inputs_embeds, attention_mask, cache, position_ids, keys_read)
        return masks

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids or inputs_embeds: `[B, T]` or `[B, T, D]`, exactly one of them.
            attention_mask: `[B, past + T]`, 0 where a token is padding (on either side).
            position_ids: `[B, T]`; rows in which they restart are packed sequences.
            cache: what earlier calls have seen; `past_key_values` is its name before transformers 5.24.
        """
        cache = only_cache(cache, past_key_values, kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim != 2 and self.has_linear_attention:
            raise ValueError(
                f"attention_mask must be a 2-D padding mask [batch, tokens], got {attention_mask.ndim}-D: "
                "linear heads read the whole past and cannot follow another pattern"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        if position_ids is not None:
            position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
        bounds = kwargs.get("cu_seq_lens_q")
        packing = find_packing(position_ids, attention_mask, cache, bounds is not None and bounds.numel() > 2)
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing runs layers twice, which would fill the cache twice: pass none, or turn it off"
            )
        if use_cache and cache is None and packing is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self._default_position_ids(inputs_embeds, attention_mask, cache)

        keys_read = keys_to_read(cache, inputs_embeds.shape[1], attention_mask, self._is_sdpa)
        masks = self._masks(inputs_embeds, attention_mask, cache, position_ids, keys_read)
        padding = None
        if self.has_linear_attention and masks.get("linear_attention") is not None:
            padding = Padding.of(masks["linear_attention"], self.config.short_conv_kernel_size)
        if cache is not None and not self.has_full_attention:
            # One number per token in the first layer's otherwise empty KV cache counts the tokens seen.
            count = inputs_embeds.new_zeros(inputs_embeds.shape[0], 1, inputs_embeds.shape[1], 1)
            cache.update(count, count, 0)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        query_scale = log_position_scale(self.config, position_ids)
        for decoder_layer in self.layers:
            hidden_states = decoder_layer(
                hidden_states,
                position_embeddings=position_embeddings,
                query_scale=query_scale,
                position_ids=position_ids,
                attention_mask=masks.get("full_attention"),
                padding=padding,
                packing=packing,
                cache=cache,
                keys_read=keys_read,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE: cache if use_cache else None}
        )


class HydraHeadRecordedStep:
    """
    The step of one `generate` as a CUDA graph: what a processor would start kernel by kernel is recorded once, which
    takes as long as a step, and replayed. Nothing is compiled. It holds the tensors of a cache, and so serves one.
    """

    WARM_UP = 2  # steps, in which kernels are compiled and libraries find their room

    def __init__(self, model: "HydraHeadForCausalLM"):
        self.model = model
        self.left = self.WARM_UP
        self.replay: Callable[[], None] | None = None

    def __call__(self, **inputs) -> CausalLMOutputWithPast:
        ids = inputs.get("input_ids")
        if ids is None or ids.shape[1] > 1:  # a piece of a prompt
            return self.model(**inputs)
        if self.left:
            self.left -= 1
            return self.model(**inputs)
        given, form = tree_flatten(inputs, is_leaf=lambda x: isinstance(x, Cache))
        if self.replay is None and not self._record(given, form):
            return self.model(**inputs)
        if form != self.form or list(map(_kind, given)) != list(map(_kind, self.given)):
            return self.model(**inputs)
        for held, x in zip(self.given, given):
            if isinstance(x, torch.Tensor):
                held.copy_(x)
        self.replay()
        return self.outputs

    def _record(self, given: list, form) -> bool:
        """Whether a step could be recorded: a kernel that waits for the GPU cannot be."""
        self.form, self.given = form, [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        inputs = tree_unflatten(self.given, form)
        try:
            self.outputs, self.replay = record(lambda: self.model(**inputs), self.model.device)
        except RuntimeError as error:
            self.left = math.inf
            self.model.can_be_recorded = False
            reason = str(error).partition("\n")[0]
            logger.warning(f"HydraHead: generate goes kernel by kernel, its step cannot be recorded: {reason}")
        return self.replay is not None


def even_length(tokens: int) -> int:
    """Room for so many tokens that `attend_to_cache` can divide; a prompt and its answer are hardly ever."""
    return -(-tokens // EVEN) * EVEN


def _is_watched(module: nn.Module) -> bool:
    """Whether a replay would pass by what somebody has put around a module, accelerate for one, or a compiler."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # Of a call that asked for hidden states transformers leaves its own behind.
    is_hooked = any(getattr(hook, "__module__", None) != capture_outputs.__module__ for hook in hooks)
    return is_hooked or "forward" in module.__dict__ or module._compiled_call_impl is not None


def _kind(x: object) -> object:
    """What has to stay as it is from step to step: all but a tensor's contents."""
    return (x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else x


class HydraHeadForCausalLM(HydraHeadPreTrainedModel, GenerationMixin):  # trf-ignore: TRF057
    """Language model whose attention layers mix full-attention and Gated DeltaNet heads."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    can_be_recorded = True  # until a recording has failed: each that fails loses memory

    def __init__(self, config: HydraHeadConfig):
        super().__init__(config)
        self.model = HydraHeadModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, cache=None, inputs_embeds=None, past_key_values=None, **kwargs
    ):
        cache = only_cache(cache, past_key_values, kwargs)
        # As in `Phi3ForCausalLM`: longrope changes all its frequencies where a text outgrows the original length, and
        # what is cached was rotated by the old ones. It is computed anew, once.
        rope = self.config.rope_parameters
        if cache is not None and rope["rope_type"] == "longrope":
            seen, original = cache.get_seq_length(), rope["original_max_position_embeddings"]
            if 0 < seen <= original < input_ids.shape[1]:
                cache = next_sequence_length = None
        given = input_ids if inputs_embeds is None else inputs_embeds
        tokens = given.shape[1] if next_sequence_length is None else next_sequence_length
        # A mask for a static cache is made here, and would have columns for all the room that it has.
        is_counted = keys_to_read(cache, tokens, kwargs.get("attention_mask"), self._is_sdpa) is not None
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, None if is_counted else cache, inputs_embeds=inputs_embeds, **kwargs
        )
        return inputs | {CACHE: cache} if is_counted else inputs

    def generate(self, *args, **kwargs):
        self.pack_projections()
        # Somebody else's loop, and one that goes on where a row of another process does, take a cache that grows.
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        is_named = getattr(config or self.generation_config, "cache_implementation", None)
        if (callable(kwargs.get("custom_generate")) or kwargs.get("synced_gpus")) and not is_named:
            kwargs.setdefault("cache_implementation", "dynamic")
        return super().generate(*args, **kwargs)

    def _records_steps(self, wanted: GenerationConfig, model_kwargs: dict, mode: GenerationMode) -> bool:
        """Whether steps are recorded where the caller says nothing of caches and compilation."""
        is_asked = wanted.cache_implementation or wanted.compile_config or wanted.disable_compile
        is_plain = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and wanted.use_cache is not False
        # What is given out, or goes on from somewhere, keeps the cache that others know.
        is_kept = wanted.return_dict_in_generate or model_kwargs.get(CACHE) is not None
        # Frequencies that change with the length of the text are looked up by the processor, and of single tokens only
        # a growing cache can tell a padded prompt's.
        is_changing = self.config.rope_parameters["rope_type"] in ("dynamic", "longrope")
        if is_asked or not is_plain or is_kept or is_changing or wanted.prefill_chunk_size == 1:
            return False
        quantizer = getattr(self, "hf_quantizer", None)
        is_fixed = self.can_be_recorded and self._is_sdpa and (quantizer is None or quantizer.is_compileable)
        is_spread = len({parameter.device for parameter in self.parameters()}) > 1
        # A replay passes by whoever watches what is called, and PEFT's virtual tokens come in where inputs are made.
        is_other = "prepare_inputs_for_generation" in self.__dict__ or torch._C._len_torch_dispatch_stack() > 0
        is_other = is_other or bool(_has_any_global_hook())
        return is_fixed and not is_spread and not is_other and not any(map(_is_watched, self.modules()))

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if self._records_steps(generation_config, model_kwargs, generation_mode):
            length = even_length(max_cache_length)
            rows = batch_size * generation_config.num_return_sequences
            cache_bytes = rows * length * self.config.kv_bytes_per_token(self.dtype.itemsize)
            if can_record(self.device, cache_bytes):
                model_kwargs[CACHE] = StaticCache(config=self.config, max_cache_len=length)
                generation_config.compile_config = RECORDED
                return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def _valid_auto_compile_criteria(self, model_kwargs, generation_config) -> bool:
        # transformers turns off the tokenizers' threads, for a compiler that starts processes.
        is_recorded = generation_config.compile_config is RECORDED
        return is_recorded or super()._valid_auto_compile_criteria(model_kwargs, generation_config)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        # CODEPATH: where nobody asked for anything; what a caller asks to be compiled is.
        if compile_config is RECORDED:
            return HydraHeadRecordedStep(self)
        return super().get_compiled_call(compile_config)

    def _prepare_static_cache(self, *args, max_cache_len: int, **kwargs) -> Cache:
        return super()._prepare_static_cache(*args, max_cache_len=even_length(max_cache_len), **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        # Later, in its own thread, a failing forward would leave `generate_batch` with empty results.
        if self.model.has_linear_attention:
            raise ValueError(
                "continuous batching keeps keys and values in pages and has no place for a recurrent state: use "
                "generate with a left-padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)

    @can_return_tuple
    def forward(  # trf-ignore: TRF057
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Arguments as in `HydraHeadModel`.

        Args:
            labels: `[B, T]`, -100 where no loss is taken; shifted inside.
            logits_to_keep: compute logits of the last so many tokens only (0: all), or of these indices.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


HydraHeadModel.register_for_auto_class("AutoModel")
HydraHeadForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["HydraHeadForCausalLM", "HydraHeadModel", "HydraHeadPreTrainedModel"]
