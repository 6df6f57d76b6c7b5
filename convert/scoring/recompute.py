"""Single heads of a teacher, recomputed from the residual stream."""

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from ..hooks import input_device, rms_norm
from ..teachers import TeacherAttention, adapter_for, read_model


class HeadReader:
    """
    Recomputes single heads of a teacher, of a supported family, from the residual stream, in fp32.

    It keeps the attention weights that it has read: use one for all pairs.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.adapter, self.read = model, adapter_for(model.config), read_model(model)
        self.device = input_device(model)
        self.group_size = self.adapter.num_heads // self.adapter.num_kv_heads
        self.weights: dict[int, TeacherAttention] = {}
        self.cos = self.sin = torch.empty(0)

    def for_length(self, length: int) -> "HeadReader":
        """Ready for texts of `T` tokens: some families rotate by the length of the text."""
        if len(self.cos) != length:
            position_ids = torch.arange(length, device=self.device).unsqueeze(0)
            rotary = self.model.model.rotary_emb(torch.zeros(1, 1, device=self.device), position_ids)
            self.cos, self.sin = (tensor[0].to(self.device).float() for tensor in rotary)  # [T, d]
        return self

    def attention(self, layer: int) -> TeacherAttention:
        """The layer's attention weights, fp32, read once."""
        if layer not in self.weights:
            found = self.adapter.attention(self.read, layer)
            tensors = {name: t.to(self.device).float() for name, t in vars(found).items() if t is not None}
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
        normed = rms_norm(self.model.model.layers[layer].input_layernorm, states)
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

    def keys_values(self, layer: int, heads: list[int], states: torch.Tensor, positions: slice):
        """Keys and values `[B, heads, P, d]` as these query heads read them."""
        kv_heads = sorted({head // self.group_size for head in heads})
        places = [kv_heads.index(head // self.group_size) for head in heads]
        return [self.project(layer, kind, kv_heads, states, positions)[:, places] for kind in ("k", "v")]

    def scores(self, query: torch.Tensor, key: torch.Tensor, queries: slice) -> torch.Tensor:
        """Attention weights `[B, heads, Q, T]` of the queries at positions `queries` over all keys before them."""
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        places = torch.arange(key.shape[-2], device=key.device)
        return logits.masked_fill(places[queries, None] < places, -torch.inf).softmax(-1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: slice) -> torch.Tensor:
        """Head outputs `[B, Q, heads, d]` of causal attention; `queries`: where in the text the queries stand."""
        # CUDA's kernels know this bias: nothing of it is kept for a backward pass, as an fp32 mask would be.
        if key.is_cuda and queries.stop == key.shape[-2]:
            mask = causal_lower_right(query.shape[-2], key.shape[-2])
        else:
            places = torch.arange(key.shape[-2], device=key.device)
            mask = places[queries, None] >= places
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
