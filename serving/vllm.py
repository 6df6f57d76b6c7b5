"""HydraHead for vLLM: full-attention heads on its paged KV cache, linear heads on its Gated DeltaNet kernels."""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn
from vllm import __version__

from . import why_not_with

if (problem := why_not_with(__version__)) is not None:
    raise ImportError(problem)

from vllm import _custom_ops as ops
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401  (torch.ops.vllm.linear_attention)
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader, sharded_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.third_party.flash_linear_attention.ops import (
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gated_delta_rule_packed_decode,
)
from vllm.third_party.flash_linear_attention.ops.utils import FLA_CHUNK_SIZE
from vllm.triton_utils.allocation import set_triton_allocator
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.gdn_attn import (
    GDNAttentionBackend,
    GDNAttentionMetadata,
    GDNAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from ..configuration_hydrahead import HydraHeadConfig
from .heads import (
    Pages,
    ServedFusion,
    ServedGates,
    ServedLayer,
    check_served,
    checkpoint_names,
    most_linear_heads,
    query_scale,
    served_kv_heads,
    served_weights,
)
from .kernels import prepare_step

logger = init_logger(__name__)

LONGER_ROPE = ("default", "linear", "llama3")  # kinds whose angles do not depend on how many positions there are

HALVES = (".gate_proj.weight", ".up_proj.weight")  # of a product


def state_shapes(vllm_config: VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the convolution's inputs and of the recurrent state in every layer on this GPU."""
    config: HydraHeadConfig = vllm_config.model_config.hf_config
    heads, dim = most_linear_heads(config), config.head_dim
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return MambaStateShapeCalculator.gated_delta_net_state_shape(
        ranks, heads, heads, dim, dim, config.short_conv_kernel_size
    )


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """Their dtypes: the model's, and fp32 unless `--mamba-ssm-cache-dtype` says otherwise."""
    cache = vllm_config.cache_config
    recurrent = "float32" if cache.mamba_ssm_cache_dtype == "auto" else cache.mamba_ssm_cache_dtype
    return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, recurrent
    )


def rotary_embedding(vllm_config: VllmConfig) -> nn.Module:
    """The teacher's, for as many positions as the server takes."""
    config: HydraHeadConfig = vllm_config.model_config.hf_config
    positions = config.max_position_embeddings
    if config.rope_parameters.get("rope_type", "default") in LONGER_ROPE:
        positions = max(positions, vllm_config.model_config.max_model_len)
    return get_rope(config.head_dim, max_position=positions, rope_parameters=config.rope_parameters)


def has_one_table(rotary_emb: nn.Module) -> bool:
    """Whether a position's angles are a row of one table, for whole heads and in halves."""
    if not isinstance(rotary_emb, RotaryEmbedding) or not hasattr(rotary_emb, "cos_sin_cache"):
        return False
    return rotary_emb.is_neox_style and rotary_emb.rotary_dim == rotary_emb.head_size


class HydraHeadFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """
    As vLLM's for FlashAttention, with the layers' heads rather than those of `config.json`.

    FlashAttention 3 refuses a schedule that was made for other numbers of heads than it is given.
    """

    supports_update_block_table = False  # it would hand on a schedule to layers with other heads

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # vLLM makes one builder for each number of query heads.
        self.num_heads_q = vllm_config.compilation_config.static_forward_context[layer_names[0]].num_heads
        self.num_heads_kv = kv_cache_spec.num_kv_heads


class HydraHeadFlashBackend(FlashAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[HydraHeadFlashMetadataBuilder]:
        return HydraHeadFlashMetadataBuilder


class HydraHeadSlots(Attention):
    """vLLM's attention, and its metadata made for the slots of the layer."""

    def get_attn_backend(self):
        backend = super().get_attn_backend()
        return HydraHeadFlashBackend if backend is FlashAttentionBackend else backend


class HydraHeadFullAttention(nn.Module):
    """Full-attention branch of a layer: its slots' q, k, v and output gate in one product, vLLM's attention."""

    def __init__(self, vllm_config: VllmConfig, layer: ServedLayer, prefix: str):
        super().__init__()
        config: HydraHeadConfig = vllm_config.model_config.hf_config
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.head_dim = config.head_dim
        self.heads, keys = len(layer.queries[rank]), len(layer.keys[rank])
        self.sizes = [self.heads * self.head_dim, keys * self.head_dim, keys * self.head_dim]
        if config.full_attention_gate:
            self.sizes.append(self.heads * self.head_dim)
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            ranks * sum(self.sizes),
            bias=config.attention_bias,
            prefix=f"{prefix}.qkv_proj",
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        is_rotated = config.full_attention_position == "rope"
        self.rotary_emb = rotary_embedding(vllm_config) if is_rotated else None
        self.attn = HydraHeadSlots(
            self.heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=keys,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """`[T, D]` to the slots' outputs `[T, S, d]`."""
        projected, _ = self.qkv_proj(hidden_states)
        query, key, value, *gate = projected.split(self.sizes, dim=-1)
        if self.q_norm is not None:
            query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, query, key)
        if scale is not None:
            query = query * scale.to(query.dtype)
        output = self.attn(query, key, value)
        if gate:
            output = output * (2 * gate[0].sigmoid())
        return output.unflatten(-1, (self.heads, self.head_dim))


class HydraHeadStateMetadataBuilder(GDNAttentionMetadataBuilder):
    """
    As vLLM's for Gated DeltaNet, and sequences that begin with a single token begin with an empty state.

    vLLM takes a single token for one of generation, which reads the state that is there: for the first of a sequence
    it is that of whoever had the page before (https://github.com/vllm-project/vllm/issues/51562).
    """

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args, **kwargs):
        metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound  # of new sequences the lengths, known on the CPU
        if lengths is None:
            lengths = common_attn_metadata.seq_lens.cpu()
        is_one_token = common_attn_metadata.query_start_loc_cpu.diff() == 1
        rows = (is_one_token & (lengths[: len(is_one_token)] == 1)).nonzero().squeeze(1)
        if len(rows):
            places = metadata.non_spec_state_indices_tensor
            pages = places[rows.to(places.device)].long()
            for layer in self.layers:
                for state in layer.kv_cache:
                    state[pages] = 0
        return metadata


class HydraHeadStateBackend(GDNAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[HydraHeadStateMetadataBuilder]:
        return HydraHeadStateMetadataBuilder


class HydraHeadGatedDeltaNet(nn.Module, MambaBase):
    """
    Linear branch of a layer, from the layer's input to the outputs of its heads.

    All of it is one operation for the compiler: vLLM's `linear_attention`, at which it splits the model's graph as at
    attention, and which calls `_forward` of the layer of that name. What feeds a recurrent state is computed there as
    it is without a compiler, because a state keeps every difference.
    """

    warm: ClassVar[set[int]] = set()  # numbers of heads for which the kernels are tuned

    def __init__(self, vllm_config: VllmConfig, layer: ServedLayer, prefix: str):
        super().__init__()
        config: HydraHeadConfig = vllm_config.model_config.hf_config
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.config = config
        self.prefix = prefix
        self.head_dim = config.head_dim
        self.heads = len(layer.linear[rank])
        self.channels = 3 * self.heads * self.head_dim
        self.shapes, self.dtypes = state_shapes(vllm_config), state_dtypes(vllm_config)
        self.kv_cache = (torch.tensor([]), torch.tensor([]))  # vLLM's name for the two states
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size, ranks * self.channels, bias=config.attention_bias, prefix=f"{prefix}.qkv_proj"
        )
        self.conv = nn.Parameter(torch.zeros(self.channels, config.short_conv_kernel_size), requires_grad=False)
        self.gates = ServedGates(config.hidden_size, self.heads)
        for weight in (self.conv, *self.gates.parameters()):
            set_weight_attrs(weight, {"weight_loader": sharded_weight_loader(0)})
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.rotary_emb = rotary_embedding(vllm_config)
        self.has_step = current_platform.is_cuda_alike() and has_one_table(self.rotary_emb)
        set_triton_allocator(current_platform.current_device())
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_attn_backend(self) -> type[HydraHeadStateBackend]:
        return HydraHeadStateBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        return self.dtypes

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        spec, slots = super().get_kv_cache_spec(vllm_config), served_kv_heads(self.config)
        if spec.mamba_cache_mode != "align" or not slots:
            return spec
        # States are kept where a page of keys and values ends, or no prefix would be found in both: vLLM counts the
        # tokens of a page by the teacher's KV heads, and makes it longer where a layer has fewer.
        ranks = vllm_config.parallel_config.tensor_parallel_size
        longer = max(1, self.config.num_key_value_heads // ranks) // max(1, slots // ranks)
        return replace(spec, block_size=spec.block_size * longer)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[T, D]` to the heads' outputs `[T, h, d]`."""
        output = hidden_states.new_empty(hidden_states.shape[0], self.heads * self.head_dim)
        torch.ops.vllm.linear_attention(hidden_states, output, positions, self.prefix)
        return output.unflatten(-1, (self.heads, self.head_dim))

    def _forward(self, hidden_states: torch.Tensor, output: torch.Tensor, positions: torch.Tensor) -> None:
        """Called by `torch.ops.vllm.linear_attention`; writes the heads' outputs `[T, h · d]`."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # memory is being measured, or a graph captured piece by piece
            output.zero_()
            return self._warm_up(hidden_states)
        metadata = metadata[self.prefix]
        assert isinstance(metadata, GDNAttentionMetadata)
        tokens = metadata.num_actual_tokens
        if tokens < len(output):  # a batch that is padded to the size of a CUDA graph
            output[tokens:] = 0
        hidden_states = hidden_states[:tokens]
        qkv, _ = self.qkv_proj(hidden_states)
        if metadata.num_prefills == 0 and self.has_step:
            return self._step(qkv, hidden_states, positions[:tokens], metadata, output[:tokens])
        beta, g = self.gates(hidden_states)
        heads = self._prepare(self._convolve(qkv, metadata), positions[:tokens])
        result = self._recur(*heads, g.unsqueeze(0), beta.unsqueeze(0), metadata)
        output[:tokens] = result.flatten(-2).squeeze(0)

    def _step(self, qkv, hidden_states, positions, metadata: GDNAttentionMetadata, output: torch.Tensor) -> None:
        """A token of every sequence, `[T, ...]`, in two kernels: each launch costs as much as the work in it."""
        tokens, gates = len(qkv), self.gates
        places = metadata.non_spec_state_indices_tensor[:tokens]
        norms = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        prepared, beta, step = prepare_step(
            qkv,
            self.conv,
            self._convolution_state(),
            places,
            *norms,
            self.config.rms_norm_eps,
            self.rotary_emb.cos_sin_cache,
            positions,
            hidden_states,
            gates.weight,
            gates.beta_bias,
        )
        fused_recurrent_gated_delta_rule_packed_decode(
            prepared,
            step,
            beta,
            gates.A_log,
            gates.dt_bias,
            self.head_dim**-0.5,
            self.kv_cache[1][:, : self.heads],
            output.view(tokens, 1, self.heads, self.head_dim),
            places,
            use_qk_l2norm_in_kernel=True,
        )

    def _convolution_state(self) -> torch.Tensor:
        """`[pages, 3 · h · d, taps - 1]`; layers with more heads use more of a page."""
        state = self.kv_cache[0]
        state = state if is_conv_state_dim_first() else state.transpose(-1, -2)
        return state[:, : self.channels]

    def _convolve(self, qkv: torch.Tensor, metadata: GDNAttentionMetadata) -> torch.Tensor:
        """`[T, 3 · h · d]`, convolved over each sequence from where it was left."""
        state = self._convolution_state()
        places = metadata.non_spec_state_indices_tensor
        if metadata.num_prefills == 0:
            return causal_conv1d_update(qkv, state, self.conv, conv_state_indices=places[: len(qkv)])
        return causal_conv1d_fn(
            qkv.transpose(0, 1),
            self.conv,
            None,
            conv_states=state,
            query_start_loc=metadata.non_spec_query_start_loc,
            cache_indices=places,
            has_initial_state=metadata.has_initial_state,
            activation=None,
            metadata=metadata,
        ).transpose(0, 1)

    def _prepare(self, qkv: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k and v `[1, T, h, d]`, normalised and rotated as in the teacher."""
        query, key, value = (x.contiguous() for x in qkv.chunk(3, dim=-1))
        if self.q_norm is not None:
            query, key = self._normalize(query, self.q_norm), self._normalize(key, self.k_norm)
        # Where no compiler fuses anything, vLLM's own kernels are asked for.
        has_kernel = query.is_cuda and isinstance(self.rotary_emb, RotaryEmbedding)
        rotate = self.rotary_emb.forward_cuda if has_kernel else self.rotary_emb
        query, key = rotate(positions, query, key)
        return tuple(x.view(1, -1, self.heads, self.head_dim) for x in (query, key, value))

    def _normalize(self, heads: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`[T, h * d]`, head by head."""
        rows = heads.view(-1, self.head_dim)
        if not rows.is_cuda:
            return norm(rows).view(heads.shape)
        output = torch.empty_like(rows)
        ops.rms_norm(output, rows, norm.weight, norm.variance_epsilon)
        return output.view(heads.shape)

    def _recur(self, query, key, value, g, beta, metadata: GDNAttentionMetadata) -> torch.Tensor:
        """`[1, T, h, d]`; vLLM puts the sequences that decode before those that have more than one token."""
        state = self.kv_cache[1][:, : self.heads]  # [pages, h, d, d]
        places, bounds = metadata.non_spec_state_indices_tensor, metadata.non_spec_query_start_loc
        tokens = query.shape[1] if metadata.num_prefills == 0 else metadata.num_decode_tokens
        outputs = []
        if metadata.num_decodes:
            output, _ = fused_recurrent_gated_delta_rule(
                *(x[:, :tokens] for x in (query, key, value, g, beta)),
                initial_state=state,
                inplace_final_state=True,
                cu_seqlens=bounds[: metadata.num_decodes + 1],
                ssm_state_indices=places,
                use_qk_l2norm_in_kernel=True,
            )
            outputs.append(output.view(1, tokens, self.heads, self.head_dim))
        if metadata.num_prefills:
            places = metadata.prefill_state_indices
            initial = state[places]
            initial[~metadata.prefill_has_initial_state] = 0
            output, final = chunk_gated_delta_rule(
                *(x[:, tokens:] for x in (query, key, value, g, beta)),
                initial_state=initial,
                output_final_state=True,
                cu_seqlens=metadata.prefill_query_start_loc,
                chunk_indices=metadata.chunk_indices,
                chunk_offsets=metadata.chunk_offsets,
                use_qk_l2norm_in_kernel=True,
            )
            state[places] = final.to(state.dtype)
            outputs.append(output)
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def _warm_up(self, hidden_states: torch.Tensor) -> None:
        """Tunes the prefill's kernels while there is memory for it: the KV cache will take what is left."""
        if self.heads in self.warm or not hidden_states.is_cuda:
            return
        self.warm.add(self.heads)
        shape = (1, FLA_CHUNK_SIZE, self.heads)
        heads = [
            torch.rand(*shape, self.head_dim, dtype=hidden_states.dtype, device=hidden_states.device) for _ in "qkv"
        ]
        gates = [torch.rand(shape, device=hidden_states.device) for _ in "gb"]
        chunk_gated_delta_rule(
            *heads,
            -gates[0],
            gates[1],
            initial_state=heads[0].new_zeros(1, self.heads, self.head_dim, self.head_dim, dtype=self.dtypes[1]),
            output_final_state=True,
            cu_seqlens=torch.tensor([0, FLA_CHUNK_SIZE], dtype=torch.int32, device=hidden_states.device),
            use_qk_l2norm_in_kernel=True,
        )


class HydraHeadAttention(nn.Module):
    """Both branches of a layer before one output projection, whose columns lie in the order of the slots."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        config: HydraHeadConfig = vllm_config.model_config.hf_config
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        layer = ServedLayer.of(config, layer_idx, ranks)
        self.full_attention = self.linear_attention = None
        if layer.queries[rank]:
            self.full_attention = HydraHeadFullAttention(vllm_config, layer, f"{prefix}.full_attention")
        if layer.linear[rank]:
            # vLLM wants an index of its own for everything in a layer that keeps something of a sequence.
            name = prefix.replace(f".{layer_idx}.", f".{config.num_hidden_layers + layer_idx}.")
            self.linear_attention = HydraHeadGatedDeltaNet(vllm_config, layer, f"{name}.linear_attention")
        self.fusion = ServedFusion(config, layer.heads[rank], len(layer.queries[rank]))
        self.o_proj = RowParallelLinear(
            sum(map(len, layer.heads)) * config.head_dim,
            config.hidden_size,
            bias=config.attention_output_bias,
            prefix=f"{prefix}.o_proj",
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, scale: torch.Tensor | None
    ) -> torch.Tensor:
        """`[T, D]` to `[T, D]`."""
        heads = []
        if self.full_attention is not None:
            heads.append(self.full_attention(positions, hidden_states, scale))
        if self.linear_attention is not None:
            heads.append(self.linear_attention(positions, hidden_states))
        heads = torch.cat(heads, dim=1) if len(heads) > 1 else heads[0]
        output, _ = self.o_proj(self.fusion(heads, hidden_states).flatten(-2))
        return output


class HydraHeadDecoderLayer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        config: HydraHeadConfig = vllm_config.model_config.hf_config
        self.self_attn = HydraHeadAttention(vllm_config, layer_idx, f"{prefix}.self_attn")
        self.mlp = Qwen2MLP(config.hidden_size, config.intermediate_size, config.hidden_act, prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, D]` and the sum before it to the layer's output and the sum before that, as vLLM's Qwen3 does it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, scale)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile
class HydraHeadModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: HydraHeadConfig = vllm_config.model_config.hf_config
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            HydraHeadDecoderLayer(vllm_config, layer_idx, f"{prefix}.layers.{layer_idx}")
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens of all sequences `[T]`, or their embeddings, and positions `[T]` to hidden states `[T, D]`."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        base = self.config.logit_scale_base
        scale = None if base is None else query_scale(positions, base)
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, scale)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class HydraHeadForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """Language model for vLLM, from the checkpoint that transformers loads."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: HydraHeadConfig = vllm_config.model_config.hf_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        refuse_what_is_not_supported(vllm_config)
        check_served(config, ranks)
        self.config = config
        if get_tensor_model_parallel_rank() == 0:
            kv_dtype = vllm_config.cache_config.cache_dtype
            kv_bytes = 1 if kv_dtype.startswith("fp8") else vllm_config.model_config.dtype.itemsize
            conv, recurrent = (dtype.itemsize for dtype in state_dtypes(vllm_config))
            logger.info("HydraHead: %s", Pages.of(config, ranks, kv_bytes, conv, recurrent).in_words())
        self.model = HydraHeadModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return state_shapes(vllm_config)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        From a checkpoint as transformers reads it; a layer's heads are laid out as soon as all its weights are there.

        Raises:
            ValueError: a weight that no such model has, or one that is missing.
        """
        parameters, ranks = dict(self.named_parameters()), get_tensor_model_parallel_world_size()
        missing = {layer: checkpoint_names(self.config, layer) for layer in range(self.config.num_hidden_layers)}
        parts: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in missing}
        loaded = set()

        def load(name: str, weight: torch.Tensor, *shard: int) -> None:
            if name not in parameters:
                raise ValueError(f"{name} is a weight that this model does not have: is config.json of another one?")
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight, *shard)
            loaded.add(name)

        for name, weight in weights:
            before, is_attention, part = name.partition(".self_attn.")
            if is_attention:
                layer = int(before.rpartition(".")[2])
                if part not in missing.get(layer, ()):
                    raise ValueError(
                        f"{name} is a weight that this model does not have: is config.json of another one?"
                    )
                parts[layer][part] = weight
                missing[layer].remove(part)
                if not missing[layer]:
                    served = served_weights(self.config, layer, parts.pop(layer), ranks)
                    for part, weight in served.items():
                        load(f"{before}.self_attn.{part}", weight)
            elif name.endswith(HALVES):
                mlp, _, half = name.removesuffix(".weight").rpartition(".")
                load(f"{mlp}.gate_up_proj.weight", weight, int(half == "up_proj"))
            elif not (self.config.tie_word_embeddings and name == "lm_head.weight"):
                load(name, weight)
        lacking = [f"layers.{layer}.self_attn.{part}" for layer, names in missing.items() for part in sorted(names)]
        if lacking:
            raise ValueError(
                f"the checkpoint has no {lacking[0]}" + f" and {len(lacking) - 1} more" * (len(lacking) > 1)
            )
        return loaded


def refuse_what_is_not_supported(vllm_config: VllmConfig) -> None:
    """
    Raises:
        ValueError: options under which this model would give wrong tokens, each in one line.
    """
    dtype = vllm_config.model_config.dtype
    if dtype != torch.bfloat16:  # the kernels' prefill knows no float32, and a state outgrows float16
        raise ValueError(f"HydraHead runs in bfloat16 in vLLM, not in {str(dtype).removeprefix('torch.')}")
    if vllm_config.speculative_config is not None:
        raise ValueError("HydraHead's recurrent states cannot be rolled back: start without speculative decoding")
    if vllm_config.quant_config is not None:
        raise ValueError("HydraHead is served without quantization, which would not follow its heads: leave it out")
