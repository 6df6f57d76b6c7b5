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
"""What HydraHead layers compute with, by device: the recurrence, a step of attention, one product for several."""

import inspect
import os
from collections.abc import Callable
from functools import cache, lru_cache
from threading import Lock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# fla keeps what it derives from the bounds of the last four shapes, and a mask has as many shapes as its layers have
# counts of heads. It asks when it is imported, which transformers does below.
os.environ.setdefault("FLA_TENSOR_CACHE_SIZE", "64")

from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)
from transformers.utils import logging

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    fla_error = None
except Exception as error:  # not installed, or in pieces: the PyTorch reference takes over, and says why on a GPU
    chunk_gated_delta_rule = fused_recurrent_gated_delta_rule = None
    fla_error = f"{type(error).__name__}: {error}"

try:
    from .kernels_hydrahead import fuse_heads, prepare_heads
except ImportError:  # Triton comes with PyTorch's builds for GPUs
    fuse_heads = prepare_heads = None

logger = logging.get_logger(__name__)

# cuDNN's attention makes a plan for every length: in generation, for every token.
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
RECORDING = Lock()  # of one thread at a time
PIECES = 32  # of a cache, that a GPU reads beside each other
EVEN = 8 * PIECES  # tokens: caches of a multiple of it divide into them, and a row of scores begins at 16 bytes

# transformers wraps these two so that fla replaces them wherever it can be imported, even for tensors on the CPU,
# where its kernels cannot run. The unwrapped functions are the plain PyTorch reference; we choose per call, by device.
reference_chunk_gated_delta_rule = inspect.unwrap(torch_chunk_gated_delta_rule)
reference_recurrent_gated_delta_rule = inspect.unwrap(torch_recurrent_gated_delta_rule)


def has_kernels(x: torch.Tensor) -> bool:
    """Whether `prepare_heads` and `fuse_heads` run where a tensor is."""
    # Of more than one token the compiler makes nearly as few kernels itself, and it knows no length beforehand.
    is_traced = torch.compiler.is_compiling() and x.shape[1] > 1
    return x.is_cuda and prepare_heads is not None and not is_traced


class Padding(NamedTuple):
    """
    Which tokens are padding, found once in a forward and read by every layer.

    Attributes:
        mask: `[B, T, 1]` bool, true where a token is padding.
        order: `[B, kernel + T]`, the inputs of a convolution, those before this call among them, padding in front.
        place: `[B, T]`, where each token has gone in that order, counted from the first input of this call.
    """

    mask: torch.Tensor
    order: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, padding_mask: torch.Tensor, kernel_size: int) -> "Padding":
        """From a mask `[B, T]` that is 0 where a token is padding."""
        # Padding can stand between two tokens (a right-padded turn, then the next one): it goes to the front.
        is_real = F.pad(padding_mask.bool(), (kernel_size, 0), value=True)
        order = is_real.byte().argsort(dim=1, stable=True)
        place = (order.argsort(dim=1)[:, kernel_size:] - kernel_size).clamp_min(0)
        return cls(~padding_mask.bool().unsqueeze(-1), order, place)


class Packing(NamedTuple):
    """
    Where the sequences of packed rows begin, found once in a forward and read by every layer.

    Attributes:
        offset: `[B, T]`, tokens of its own sequence before each token.
        bounds: `[N + 1]`, the first token of each sequence in the flattened batch, and its length; on the CPU.
        of_heads: by number of heads, the bounds of that many copies of the batch, on the device and on the CPU.
    """

    offset: torch.Tensor
    bounds: torch.Tensor
    of_heads: dict[int, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    @torch.compiler.disable  # the number of sequences in a packed row is data
    def of(cls, restarts: torch.Tensor) -> "Packing":
        """From `[B, T - 1]` bool, true where the next token begins a sequence."""
        starts = F.pad(restarts, (1, 0), value=True)
        index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        offset = index - torch.where(starts, index, 0).cummax(1).values
        return cls(offset, F.pad(starts.flatten().nonzero().squeeze(1).cpu(), (0, 1), value=starts.numel()), {})

    def bounds_of(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The bounds of `heads` copies of the batch, one after the other, `[heads * N + 1]`."""
        if heads not in self.of_heads:
            tokens = self.offset.numel()
            starts = self.bounds[:-1] + tokens * torch.arange(heads)[:, None]
            bounds = F.pad(starts.flatten(), (0, 1), value=tokens * heads)
            self.of_heads[heads] = bounds.to(self.offset.device), bounds
        return self.of_heads[heads]


@lru_cache(maxsize=64)
def even_bounds(
    sequences: int, length: int, device: torch.device, is_inference: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of sequences of one length `[sequences + 1]`, on the device and on the CPU; see `Packing`."""
    # What is made under `inference_mode`, by fla from these too, cannot be saved for a backward pass.
    bounds = torch.arange(sequences + 1) * length
    return bounds.to(device), bounds


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    packing: Packing | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Gated delta rule `S_t = e^{g_t} (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ`, `o_t = S_tᵀ q_t / √d`, on L2-normalised
    q and k (Gated DeltaNet, https://huggingface.co/papers/2412.06464).

    Args:
        query, key, value: `[B, T, H, d]`.
        g, beta: `[B, T, H]`, fp32: log decay (<= 0) and writing strength.
        initial_state: `[B, H, d, d]` fp32, or `None` for zeros.
        packing: where rows are packed: each sequence starts from an empty state, and no state is given out.

    Returns:
        outputs `[B, T, H, d]` in the dtype of `query`, and the final state `[B, H, d, d]` fp32 if asked for.
    """
    is_decoding = query.shape[1] == 1 and initial_state is not None
    # Compiled, the reference's one step becomes as few kernels as fla's, and part of the graph.
    use_fla = query.is_cuda and chunk_gated_delta_rule is not None
    use_fla = use_fla and not (is_decoding and torch.compiler.is_compiling())
    if query.is_cuda and chunk_gated_delta_rule is None and not torch.compiler.is_compiling():
        logger.warning_once(
            "HydraHead: linear heads run on the PyTorch reference, which is slow on a GPU, because "
            f"flash-linear-attention cannot be imported ({fla_error})"
        )
    if use_fla and not is_decoding:
        return _chunk_gated_delta_rule(query, key, value, g, beta, initial_state, output_final_state, packing)
    if packing is not None:
        return _packed_gated_delta_rule(query, key, value, g, beta, packing), None
    if use_fla:  # one token: every head of every row is a row, because fla compiles anew for every number of heads
        output, state = fused_recurrent_gated_delta_rule(
            *(x.flatten(0, 2)[:, None, None] for x in (query, key, value)),
            g=g.flatten()[:, None, None],
            beta=beta.flatten()[:, None, None],
            initial_state=initial_state.flatten(0, 1).unsqueeze(1),
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=True,
        )
        return output.view(query.shape), state.view(initial_state.shape) if output_final_state else None
    kernel = reference_recurrent_gated_delta_rule if is_decoding else reference_chunk_gated_delta_rule
    return kernel(
        query,
        key,
        value,
        g=g,
        beta=beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=True,
    )


@torch.compiler.disable  # as fla's own function is
def _chunk_gated_delta_rule(query, key, value, g, beta, initial_state, output_final_state, packing: Packing | None):
    """
    As `gated_delta_rule`, on fla's kernels, with the sequences of all heads behind each other in one row of one head.

    fla compiles and tunes its kernels anew for every number of heads, some for every number of rows: so there is one
    shape for all layers, whatever the mask. It keeps what it derives from bounds by the tensors' identity.
    """
    batch_size, seq_len, heads, head_dim = query.shape
    if packing is None:
        bounds, on_cpu = even_bounds(heads * batch_size, seq_len, query.device, torch.is_inference_mode_enabled())
    else:
        bounds, on_cpu = packing.bounds_of(heads)
    state = None if initial_state is None else initial_state.transpose(0, 1).flatten(0, 1).unsqueeze(1)
    output, state = chunk_gated_delta_rule(
        *(x.permute(2, 0, 1, 3).reshape(1, -1, 1, head_dim) for x in (query, key, value)),
        g=g.permute(2, 0, 1).reshape(1, -1, 1),
        beta=beta.permute(2, 0, 1).reshape(1, -1, 1),
        initial_state=state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=bounds,
        cu_seqlens_cpu=on_cpu,
    )
    output = output.view(heads, batch_size, seq_len, head_dim).permute(1, 2, 0, 3)
    return output, state.view(heads, batch_size, head_dim, head_dim).transpose(0, 1) if output_final_state else None


@torch.compiler.disable  # the number of sequences in a packed row is data
def _packed_gated_delta_rule(query, key, value, g, beta, packing: Packing) -> torch.Tensor:
    """Gated delta rule that starts from an empty state at each packed sequence; shapes as in `gated_delta_rule`."""
    batch_size, seq_len = packing.offset.shape
    query, key, value, g, beta = (x.flatten(0, 1) for x in (query, key, value, g, beta))  # [B * T, ...]
    # The reference has no notion of packing: lay each sequence out as a row. Zeros at its end change nothing.
    bounds = packing.bounds.to(query.device)
    lengths = bounds.diff()
    offsets = torch.arange(int(lengths.max()), device=lengths.device)
    valid = offsets < lengths[:, None]  # [N, longest]
    index = (bounds[:-1, None] + offsets).clamp(max=batch_size * seq_len - 1)
    query, key, value, g, beta = (
        x[index].masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 1)), 0) for x in (query, key, value, g, beta)
    )
    output, _ = reference_chunk_gated_delta_rule(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    return output[valid].view(batch_size, seq_len, *output.shape[2:])


def attend_to_cache(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """
    Attention of one token to a cache, without gradients.

    Args:
        query: `[B, G, n, d]`, those of the query heads that read each KV head.
        key, value: `[B, G, S, d]`.
        attention_mask: `[B, 1, 1, S]` bool, or `None` where all of the cache is read.

    Returns:
        outputs `[B, G, n, d]`.
    """
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    # PyTorch's kernels for masked attention leave a GPU's processors idle: one of them reads all keys of a head. In a
    # graph nothing is lost by many small kernels, and who steps through a static cache would wait for that one longer.
    is_static = attention_mask is not None and key.shape[2] % EVEN == 0
    if not torch.compiler.is_compiling() and not is_static:
        with sdpa_kernel(WITHOUT_PLANS):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
    length = key.shape[2]
    pieces = PIECES if length % PIECES == 0 else 1
    query = (query * query.shape[-1] ** -0.5).unsqueeze(2).expand(-1, -1, pieces, -1, -1)  # [B, G, p, n, d]
    key, value = (x.unflatten(2, (pieces, -1)) for x in (key, value))  # [B, G, p, S / p, d]
    scores = matmul_fp32(query, key.transpose(-1, -2))
    if attention_mask is not None:
        mask = attention_mask.unflatten(-1, (pieces, -1)).transpose(2, 3)  # [B, 1, p, 1, S / p]
        # Finite, as PyTorch's own: a row that sees nothing is no number otherwise.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax((2, 4), keepdim=True)).exp()
    output = matmul_fp32(weights.to(value.dtype), value).sum(2)
    return (output / weights.sum((2, 4)).unsqueeze(-1)).to(value.dtype)


def can_record(device: torch.device, cache_bytes: int) -> bool:
    """Whether `record` works where a model is, and half of what is free there has room for a cache of full length."""
    if device.type != "cuda":
        return False
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return cache_bytes <= (torch.cuda.mem_get_info(device)[0] + reserved) / 2


@cache
def _recording_stream(device: torch.device) -> "torch.cuda.Stream":
    """One for all recordings of a GPU: libraries keep room of their own for every stream that they have seen."""
    return torch.cuda.Stream(device)


def record(call: Callable[[], object], device: torch.device) -> tuple[object, Callable[[], None]]:
    """
    A CUDA graph of what a call starts on a GPU, without running it: what the call gave, and what fills it.

    Raises:
        RuntimeError: it does what no graph can hold, such as to wait for the GPU. What it has taken is lost.
    """
    with RECORDING, torch.cuda.device(device):
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=_recording_stream(device), capture_error_mode="thread_local"):
                outputs = call()
        except RuntimeError as error:
            # What went wrong first: to end the recording fails too, and says no more than that.
            raise RuntimeError(str(error.__context__ or error)) from error
        finally:
            torch.cuda.set_stream(before)  # which PyTorch leaves where a recording fails
    return outputs, graph.replay


def matmul_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Products of matrices in the last two dimensions, given out as they were summed: in fp32."""
    product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
    return product.unflatten(0, left.shape[:-2])


class HydraHeadPackedLinear(nn.Module):
    """
    Linear layers of one input as one product, for inference: a layer of many heads has many small ones.

    `pack` lays their weights behind each other, and the layers hold views from then on: nothing is stored twice, and
    whatever changes a layer's weight changes this one. Adapters, quantizers and hooks see ordinary layers: where one
    of them is no longer plain, or its weight lies elsewhere, the layers are called one by one.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def _apply(self, *args, **kwargs):
        self.weight = self.bias = None  # the layers move one by one, and this would stay behind as a copy of them
        return super()._apply(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "HydraHeadPackedLinear":
        return HydraHeadPackedLinear()  # for the same reason

    @torch.no_grad()
    def pack(self, linears: list[nn.Linear]) -> None:
        """Pack layers, if all of them are plain ones on one device."""
        self.weight = self.bias = None
        weights = [linear.weight for linear in linears if is_plain(linear)]
        kinds = {(weight.dtype, weight.device) for weight in weights}
        if len(weights) < len(linears) or len(kinds) > 1 or weights[0].is_meta:
            return
        self.weight = torch.cat(weights)
        sizes = [linear.out_features for linear in linears]
        for weight, rows in zip(weights, self.weight.split(sizes)):
            weight.data = rows
        if any(linear.bias is not None for linear in linears):
            self.bias = self.weight.new_zeros(len(self.weight))
            for linear, part in zip(linears, self.bias.split(sizes)):
                if linear.bias is not None:
                    part.copy_(linear.bias)
                    linear.bias.data = part

    def holds(self, linears: list[nn.Linear]) -> bool:
        """Whether the product stands for these layers."""
        if self.weight is None or not all(map(is_plain, linears)):
            return False
        if torch.compiler.is_compiling():
            return True
        place = self.weight.data_ptr()
        for linear in linears:
            weight = linear.weight
            if weight.data_ptr() != place:
                return False
            place += weight.nbytes
        return True

    def forward(self, hidden_states: torch.Tensor, linears: list[nn.Linear]) -> torch.Tensor | None:
        """What the layers make of `[B, T, D]`, behind each other, or `None` where they are to be called one by one."""
        if torch.is_grad_enabled() or not self.holds(linears):
            return None
        if self.weight.dtype == torch.float32 and hidden_states.shape[1] == 1 and torch.compiler.is_compiling():
            # One kernel, with what follows in it; cuBLAS takes two for each of the gates' few numbers.
            product = (hidden_states.unsqueeze(-2) * self.weight).sum(-1)
            return product if self.bias is None else product + self.bias
        return F.linear(hidden_states, self.weight, self.bias)


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer computes what `nn.Linear` does, on a weight of its own, and nobody watches it."""
    own = linear.__dict__  # directly: every layer is asked in every step, and attributes of modules are slow
    is_linear = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward and "forward" not in own
    is_watched = own["_forward_hooks"] or own["_forward_pre_hooks"] or "_hf_hook" in own
    return is_linear and type(own["_parameters"].get("weight")) is nn.Parameter and not is_watched
