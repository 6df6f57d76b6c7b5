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
"""HydraHead configuration: which query heads stay full attention, and how the two branches are built."""

from dataclasses import dataclass

from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

POSITIONS = ("nope", "rope")
FUSIONS = ("scale", "gate", "concat")
FUSION_NORMS = ("all", "linear")
AUTO_MAP = {
    "AutoConfig": "configuration_hydrahead.HydraHeadConfig",
    "AutoModel": "modeling_hydrahead.HydraHeadModel",
    "AutoModelForCausalLM": "modeling_hydrahead.HydraHeadForCausalLM",
}


@dataclass(frozen=True)
class HeadLayout:
    """Where the heads of one layer live, derived from its mask.

    Full-attention heads are ordered by *blocks*: all KV heads that the same number of full-attention query heads read
    stand side by side, so that each block is a plain grouped-query attention over a contiguous slice of the KV cache,
    however irregular the mask. A mask of whole KV groups has one block, in the teacher's order.

    Attributes:
        full_heads: teacher indices of the full-attention query heads, in the order of the FA branch.
        kv_heads: teacher indices of the KV heads that they read, in the order of the FA branch and its cache.
        blocks: (query heads per KV head, number of KV heads) of each block.
        linear_heads: teacher indices of the linear-attention heads, ascending.
    """

    full_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    linear_heads: tuple[int, ...]

    @classmethod
    def from_mask(cls, mask: list[int], num_key_value_heads: int) -> "HeadLayout":
        group_size = len(mask) // num_key_value_heads
        readers = {
            kv: [head for head in range(kv * group_size, (kv + 1) * group_size) if mask[head]]
            for kv in range(num_key_value_heads)
        }
        sizes = sorted({len(heads) for heads in readers.values() if heads})
        kv_heads = tuple(kv for size in sizes for kv, heads in readers.items() if len(heads) == size)
        return cls(
            full_heads=tuple(head for kv in kv_heads for head in readers[kv]),
            kv_heads=kv_heads,
            blocks=tuple((size, sum(len(heads) == size for heads in readers.values())) for size in sizes),
            linear_heads=tuple(head for head, full in enumerate(mask) if not full),
        )

    @property
    def fused_to_teacher(self) -> list[int]:
        """For each query head of the teacher, its place in the concatenation (FA heads, LA heads)."""
        order = self.full_heads + self.linear_heads
        return sorted(range(len(order)), key=order.__getitem__)

    @property
    def layer_type(self) -> str:
        """The cache layer that transformers gives this layer: "hybrid", "full_attention" or "linear_attention"."""
        if not self.linear_heads:
            return "full_attention"
        return "hybrid" if self.full_heads else "linear_attention"


# Not @strict: its errors are no ValueErrors and span several lines. Fields are checked in `_check_fields`.
class HydraHeadConfig(PreTrainedConfig):  # trf-ignore: TRF010, trf-ignore: TRF057
    r"""
    Configuration of a [`HydraHeadModel`]: a decoder whose attention layers mix, head by head, full attention (FA) and
    Gated DeltaNet (LA). Fields not listed are those of `Qwen3Config`.

    Args:
        head_masks (`list[list[int]]`, *optional*):
            `[num_hidden_layers][num_attention_heads]`, 1 for a query head that is full attention, 0 for one that is
            Gated DeltaNet. Defaults to all ones: the teacher's own architecture.
        full_attention_position (`str`, defaults to `"nope"`):
            `"nope"` gives full-attention heads no position signal, `"rope"` the teacher's rotary embedding.
            Gated DeltaNet heads always use the rotary embedding.
        logit_scale_base (`float`, *optional*):
            `a` of the length scale `log(t + a) / log(a)` that multiplies the full-attention query at position `t`
            (counted from 0). `None`: no scale.
        full_attention_gate (`bool`, defaults to `True`):
            Elementwise output gate `2 * sigmoid(W x)` on full-attention heads; `W = 0` is the identity.
        fusion (`str`, defaults to `"scale"`):
            `"scale"` normalises each head's output and multiplies it by a learned constant of that head, `"gate"`
            by a share that a softmax over heads computes from `x`, `"concat"` leaves outputs as they are.
        fusion_norm (`str`, defaults to `"all"`):
            Which heads `"scale"` and `"gate"` normalise: `"all"`, or `"linear"` only.
        short_conv_kernel_size (`int`, defaults to 4):
            Kernel of the causal depthwise convolution on q, k and v of Gated DeltaNet heads.
        qk_norm (`bool`, defaults to `True`):
            Whether q and k are RMS-normalised per head, as in Qwen3.
        attention_bias (`bool`, defaults to `False`):
            Whether the q, k and v projections have a bias.
        attention_output_bias (`bool`, defaults to `False`):
            Whether the output projection has a bias.
    """

    model_type = "hydrahead"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # the name since and before transformers 5.24
    # Sharding q, k and v by columns would shard the head masks: only the MLP is split.
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    qk_norm: bool = True
    head_masks: list[list[int]] | None = None
    full_attention_position: str = "nope"
    logit_scale_base: float | int | None = None
    full_attention_gate: bool = True
    fusion: str = "scale"
    fusion_norm: str = "all"
    short_conv_kernel_size: int = 4
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_masks is None:
            self.head_masks = [[1] * self.num_attention_heads for _ in range(self.num_hidden_layers)]
        self._check_fields()
        # What the masks say cannot be said otherwise: a stored value is replaced.
        self.layer_types = [self.head_layout(layer).layer_type for layer in range(self.num_hidden_layers)]
        if not any(map(sum, self.head_masks)):
            # Without any KV cache nothing would know how many tokens have been seen: the first layer counts them.
            self.layer_types[0] = "hybrid"
        super().__post_init__(**kwargs)
        # Whichever class is saved, its folder loads through all three.
        self.auto_map = dict(AUTO_MAP)

    def _check_sizes(self):
        """Raise a one-line `ValueError` that names the size at fault, before anything is computed from it."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for field in (*sizes, "num_key_value_heads", *(["head_dim"] if self.head_dim is not None else [])):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads ({heads}), got {groups}")

    def _check_fields(self):
        """Raise a one-line `ValueError` that names the field at fault."""
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary embedding), got {self.head_dim}")
        masks = self.head_masks
        if not isinstance(masks, (list, tuple)) or len(masks) != layers:
            shape = len(masks) if isinstance(masks, (list, tuple)) else type(masks).__name__
            raise ValueError(f"head_masks must have one row per layer ({layers}), got {shape}")
        for layer, row in enumerate(masks):
            if not isinstance(row, (list, tuple)) or len(row) != heads:
                shape = len(row) if isinstance(row, (list, tuple)) else type(row).__name__
                raise ValueError(f"head_masks[{layer}] must have one entry per query head ({heads}), got {shape}")
            for head, value in enumerate(row):
                if isinstance(value, float) or value not in (0, 1):
                    raise ValueError(f"head_masks[{layer}][{head}] must be 0 or 1, got {value!r}")
        self.head_masks = [[int(value) for value in row] for row in masks]
        for field, allowed in (
            ("full_attention_position", POSITIONS),
            ("fusion", FUSIONS),
            ("fusion_norm", FUSION_NORMS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        for field in ("full_attention_gate", "qk_norm", "attention_bias", "attention_output_bias"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, got {getattr(self, field)!r}")
        base = self.logit_scale_base
        if base is not None and not (isinstance(base, (int, float)) and 1 < base < float("inf")):
            raise ValueError(f"logit_scale_base must be a finite number greater than 1 or None, got {base!r}")
        if not isinstance(self.short_conv_kernel_size, int) or self.short_conv_kernel_size < 2:
            raise ValueError(f"short_conv_kernel_size must be an integer >= 2, got {self.short_conv_kernel_size!r}")

    def head_layout(self, layer_idx: int) -> HeadLayout:
        """Which head of layer `layer_idx` goes where."""
        return HeadLayout.from_mask(self.head_masks[layer_idx], self.num_key_value_heads)

    @property
    def full_attention_share(self) -> float:
        """Share of all query heads that are full attention."""
        return sum(map(sum, self.head_masks)) / (self.num_hidden_layers * self.num_attention_heads)

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """KV cache growth in bytes per token and sequence: 2 · Σ_l |G_F[l]| · head_dim · `dtype_bytes`."""
        kv_heads = sum(len(self.head_layout(layer).kv_heads) for layer in range(self.num_hidden_layers))
        return 2 * kv_heads * self.head_dim * dtype_bytes

    def state_bytes(self, dtype_bytes: int = 2) -> int:
        """Constant bytes per sequence: fp32 recurrent states and, in `dtype_bytes`, the convolution's inputs."""
        linear = sum(len(self.head_layout(layer).linear_heads) for layer in range(self.num_hidden_layers))
        return linear * self.head_dim * (4 * self.head_dim + 3 * self.short_conv_kernel_size * dtype_bytes)


# Whoever saves a model, a Trainer among them, saves the code that loads it beside it.
HydraHeadConfig.register_for_auto_class()

__all__ = ["HydraHeadConfig"]
