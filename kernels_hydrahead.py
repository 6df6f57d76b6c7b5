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
"""
What stands around the recurrence of a HydraHead layer, in one Triton kernel each way: before it the short convolution,
norm and rotation of q and k, after it the norm, size and order of heads.

Both read and write heads where they lie, so that no layout is copied into another, and compute in fp32. Sizes that
differ from layer to layer are ordinary arguments: one compilation serves every mask.
"""

import contextlib

try:
    import triton
    import triton.language as tl
except ImportError:  # without a GPU nobody calls what follows
    raise

import torch

BLOCK = 64  # tokens of a program
HEADS_OF = tl.constexpr(3)  # q, k and v


def on_gpu_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """
    Within the block kernels are launched where a tensor is. Triton's go to the current GPU otherwise, which need not
    be a layer's. In a graph that is compiled the compiler sees to it.
    """
    is_eager = x.is_cuda and not torch.compiler.is_compiling()
    return torch.cuda.device(x.device) if is_eager else contextlib.nullcontext()


@triton.jit
def _taps(
    x, weight, context, t, channel, in_head, offset, seq_len, x_stride,
    W: tl.constexpr, HAS_CONTEXT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Causal convolution of channels at tokens `t`, `[tokens, channels]`; `x` and `context` are those of a row."""
    output = tl.zeros((t.shape[0], channel.shape[0]), dtype=tl.float32)
    for back in tl.static_range(W):
        token = t - back
        is_there = (token >= 0) & (t < seq_len)
        if IS_PACKED:
            is_there = is_there & (offset >= back)
        place = x + token[:, None] * x_stride + channel[None, :]
        value = tl.load(place, mask=is_there[:, None] & in_head[None, :], other=0).to(tl.float32)
        if HAS_CONTEXT:
            is_before = (token < 0) & (t < seq_len)
            place = context + channel[None, :] * W + (W + token)[:, None]
            value += tl.load(place, mask=is_before[:, None] & in_head[None, :], other=0).to(tl.float32)
        output += value * tl.load(weight + channel * W + (W - 1 - back), mask=in_head, other=0).to(tl.float32)[None, :]
    return output


@triton.jit
def _both(place, half, mask):
    """The two halves of some heads, in fp32."""
    return tl.load(place, mask=mask, other=0).to(tl.float32), tl.load(place + half, mask=mask, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["heads", "seq_len"])
def prepare_kernel(
    x, weight, context, offset, q_weight, k_weight, cos, sin, query, key, value,
    heads, seq_len, x_row, x_stride, cos_row,
    EPS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr,
    HAS_CONTEXT: tl.constexpr, MOVES_CONTEXT: tl.constexpr, IS_PACKED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One head of q, k or v at `BT` tokens of a row."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(2)
    part = head // heads
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o = tl.arange(0, HALF)
    in_head = o < D // 2
    mask = (t < seq_len)[:, None] & in_head[None, :]
    x += row * x_row
    context += row * HEADS_OF * heads * D * W
    since = tl.load(offset + row * seq_len + t, mask=t < seq_len, other=0) if IS_PACKED else t
    low = _taps(x, weight, context, t, head * D + o, in_head, since, seq_len, x_stride, W, HAS_CONTEXT, IS_PACKED)
    high = _taps(
        x, weight, context, t, head * D + D // 2 + o, in_head, since, seq_len, x_stride, W, HAS_CONTEXT, IS_PACKED
    )
    if part < 2:
        if HAS_NORM:
            size = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + EPS)[:, None]
            q_low, q_high = _both(q_weight + o, D // 2, in_head & (part == 0))
            k_low, k_high = _both(k_weight + o, D // 2, in_head & (part == 1))
            low, high = low * size * (q_low + k_low)[None, :], high * size * (q_high + k_high)[None, :]
        angle = row * cos_row + t[:, None] * D + o[None, :]
        cos_low, cos_high = _both(cos + angle, D // 2, mask)
        sin_low, sin_high = _both(sin + angle, D // 2, mask)
        low, high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    place = (((head % heads) * rows + row) * seq_len + t)[:, None] * D + o[None, :]
    if part == 0:
        tl.store(query + place, low, mask=mask)
        tl.store(query + place + D // 2, high, mask=mask)
    elif part == 1:
        tl.store(key + place, low, mask=mask)
        tl.store(key + place + D // 2, high, mask=mask)
    else:
        tl.store(value + place, low, mask=mask)
        tl.store(value + place + D // 2, high, mask=mask)
    if MOVES_CONTEXT:  # a single token: the oldest input makes room for it
        channel = head * D + tl.arange(0, 2 * HALF)
        in_head = tl.arange(0, 2 * HALF) < D
        for column in tl.static_range(W):
            if column < W - 1:
                moved = tl.load(context + channel * W + column + 1, mask=in_head, other=0)
            else:
                moved = tl.load(x + channel, mask=in_head, other=0).to(context.dtype.element_ty)
            tl.debug_barrier()  # what another thread still reads is not overwritten
            tl.store(context + channel * W + column, moved, mask=in_head)


@triton.jit(do_not_specialize=["heads", "seq_len"])
def prepare_backward_kernel(
    x, weight, offset, q_weight, k_weight, cos, sin, d_query, d_key, d_value, d_convolved, d_norm,
    heads, seq_len, x_row, x_stride, cos_row,
    EPS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """From the gradients of q, k and v to those of the convolution's output, `[3 * heads, B, T, D]`."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, blocks = tl.num_programs(2), tl.num_programs(0)
    part = head // heads
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o = tl.arange(0, HALF)
    in_head = o < D // 2
    mask = (t < seq_len)[:, None] & in_head[None, :]
    place = (((head % heads) * rows + row) * seq_len + t)[:, None] * D + o[None, :]
    if part == 0:
        d_low, d_high = _both(d_query + place, D // 2, mask)
    elif part == 1:
        d_low, d_high = _both(d_key + place, D // 2, mask)
    else:
        d_low, d_high = _both(d_value + place, D // 2, mask)
    if part < 2:
        angle = row * cos_row + t[:, None] * D + o[None, :]
        cos_low, cos_high = _both(cos + angle, D // 2, mask)
        sin_low, sin_high = _both(sin + angle, D // 2, mask)
        d_low, d_high = d_low * cos_low + d_high * sin_high, d_high * cos_high - d_low * sin_low
        if HAS_NORM:
            x += row * x_row
            since = tl.load(offset + row * seq_len + t, mask=t < seq_len, other=0) if IS_PACKED else t
            low = _taps(x, weight, x, t, head * D + o, in_head, since, seq_len, x_stride, W, False, IS_PACKED)
            high = _taps(
                x, weight, x, t, head * D + D // 2 + o, in_head, since, seq_len, x_stride, W, False, IS_PACKED
            )
            size = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + EPS)[:, None]
            low, high = low * size, high * size
            q_low, q_high = _both(q_weight + o, D // 2, in_head & (part == 0))
            k_low, k_high = _both(k_weight + o, D // 2, in_head & (part == 1))
            partial = d_norm + ((head * rows + row) * blocks + tl.program_id(0)) * D + o
            tl.store(partial, tl.sum(d_low * low, 0), mask=in_head)
            tl.store(partial + D // 2, tl.sum(d_high * high, 0), mask=in_head)
            d_low, d_high = d_low * (q_low + k_low)[None, :], d_high * (q_high + k_high)[None, :]
            along = ((tl.sum(d_low * low, 1) + tl.sum(d_high * high, 1)) / D)[:, None]
            d_low, d_high = (d_low - low * along) * size, (d_high - high * along) * size
    place = ((head * rows + row) * seq_len + t)[:, None] * D + o[None, :]
    tl.store(d_convolved + place, d_low, mask=mask)
    tl.store(d_convolved + place + D // 2, d_high, mask=mask)


@triton.jit(do_not_specialize=["heads", "seq_len"])
def convolution_backward_kernel(
    x, weight, offset, d_convolved, d_x, d_weight, heads, seq_len, x_row, x_stride,
    W: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """From the gradient of the convolution's output to that of `x` `[B, T, 3 * heads * D]` and parts of `weight`'s."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, blocks = tl.num_programs(2), tl.num_programs(0)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o = tl.arange(0, BD)
    channel, channels = head * D + o, HEADS_OF * heads * D
    mask = (t < seq_len)[:, None] & (o < D)[None, :]
    inputs = tl.load(x + row * x_row + t[:, None] * x_stride + channel[None, :], mask=mask, other=0).to(tl.float32)
    gradient = tl.zeros((BT, BD), dtype=tl.float32)
    partial = d_weight + ((row * blocks + tl.program_id(0)) * channels + channel) * W
    for ahead in tl.static_range(W):
        token = t + ahead
        reads = token < seq_len
        if IS_PACKED:
            reads = reads & (tl.load(offset + row * seq_len + token, mask=reads, other=0) >= ahead)
        place = ((head * rows + row) * seq_len + token)[:, None] * D + o[None, :]
        later = tl.load(d_convolved + place, mask=reads[:, None] & (o < D)[None, :], other=0).to(tl.float32)
        tap = tl.load(weight + channel * W + (W - 1 - ahead), mask=o < D, other=0).to(tl.float32)
        gradient += later * tap[None, :]
        tl.store(partial + (W - 1 - ahead), tl.sum(later * inputs, 0), mask=o < D)
    tl.store(d_x + (row * seq_len + t)[:, None] * channels + channel[None, :], gradient, mask=mask)


class PreparedHeads(torch.autograd.Function):
    """`prepare_heads` with a gradient for everything but the rotation."""

    @staticmethod
    def forward(ctx, x, weight, q_weight, k_weight, cos, sin, offset, eps):
        ctx.save_for_backward(x, weight, q_weight, k_weight, cos, sin, offset)
        ctx.eps = eps
        return _prepare(x, weight, q_weight, k_weight, cos, sin, offset, eps, None)

    @staticmethod
    def backward(ctx, d_query, d_key, d_value):
        x, weight, q_weight, k_weight, cos, sin, offset = ctx.saved_tensors
        batch_size, seq_len, channels = x.shape
        head_dim, kernel_size = cos.shape[-1], weight.shape[1]
        heads = channels // (3 * head_dim)
        d_query, d_key, d_value = (each.contiguous() for each in (d_query, d_key, d_value))
        grid = (triton.cdiv(seq_len, BLOCK), 3 * heads, batch_size)
        d_convolved = torch.empty(3 * heads, batch_size, seq_len, head_dim, device=x.device, dtype=x.dtype)
        d_norm = torch.empty(2, heads * batch_size * grid[0], head_dim, device=x.device)
        has_norm = q_weight is not None
        prepare_backward_kernel[grid](
            x, weight, offset, q_weight, k_weight, cos, sin, d_query, d_key, d_value, d_convolved, d_norm,
            heads, seq_len, x.stride(0), x.stride(1), _row_stride(cos),
            EPS=ctx.eps, W=kernel_size, D=head_dim, HALF=triton.next_power_of_2(head_dim // 2), BT=BLOCK,
            IS_PACKED=offset is not None, HAS_NORM=has_norm,
        )  # fmt: skip
        d_x = torch.empty(batch_size, seq_len, channels, device=x.device, dtype=x.dtype)
        d_weight = torch.empty(batch_size * grid[0], channels, kernel_size, device=x.device)
        convolution_backward_kernel[grid](
            x, weight, offset, d_convolved, d_x, d_weight, heads, seq_len, x.stride(0), x.stride(1),
            W=kernel_size, D=head_dim, BD=triton.next_power_of_2(head_dim), BT=BLOCK, IS_PACKED=offset is not None,
        )  # fmt: skip
        d_q_weight, d_k_weight = d_norm.sum(1).to(q_weight.dtype) if has_norm else (None, None)
        return d_x, d_weight.sum(0).to(weight.dtype), d_q_weight, d_k_weight, None, None, None, None


def _row_stride(cos: torch.Tensor) -> int:
    """Numbers between the angles of one row and the next: none where all rows share them."""
    return 0 if cos.shape[0] == 1 else cos.stride(0)


def _prepare(x, weight, q_weight, k_weight, cos, sin, offset, eps, context) -> tuple[torch.Tensor, ...]:
    batch_size, seq_len, channels = x.shape
    head_dim, kernel_size = cos.shape[-1], weight.shape[1]
    heads = channels // (3 * head_dim)
    shape = (heads, batch_size, seq_len, head_dim)
    outputs = tuple(torch.empty(shape, device=x.device, dtype=x.dtype) for _ in range(3))
    is_step = seq_len == 1
    block = 1 if is_step else BLOCK
    prepare_kernel[(triton.cdiv(seq_len, block), 3 * heads, batch_size)](
        x, weight, x if context is None else context, offset, q_weight, k_weight, cos, sin, *outputs,
        heads, seq_len, x.stride(0), x.stride(1), _row_stride(cos),
        EPS=eps, W=kernel_size, D=head_dim, HALF=triton.next_power_of_2(head_dim // 2), BT=block,
        HAS_CONTEXT=context is not None, MOVES_CONTEXT=context is not None and is_step,
        IS_PACKED=offset is not None, HAS_NORM=q_weight is not None, num_warps=1 if is_step else 4,
    )  # fmt: skip
    return outputs


def prepare_heads(
    x: torch.Tensor,
    weight: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offset: torch.Tensor | None = None,
    context: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Causal depthwise convolution of projected q, k and v, RMS norm of q and k, rotary embedding of q and k.

    Args:
        x: `[B, T, 3 * h * d]`, its last dimension without gaps; all heads of q, then of k, then of v.
        weight: `[3 * h * d, kernel]`, the taps of each channel, the present token's last.
        q_weight, k_weight: `[d]`, or `None` where q and k are not normalised.
        cos, sin: `[B or 1, T, d]`.
        offset: `[B, T]`, tokens before each in its own sequence, where rows are packed.
        context: `[B, 3 * h * d, kernel]`, the inputs before `x`, without gradient. Where `x` is a single token, it
            is moved on by it.

    Returns:
        q, k and v, each a view `[B, T, h, d]` of a contiguous `[h, B, T, d]`.
    """
    assert x.stride(2) == 1 and (context is None or context.is_contiguous())
    cos, sin = cos.contiguous(), sin.contiguous()
    with on_gpu_of(x):
        if context is None:
            outputs = PreparedHeads.apply(x, weight, q_weight, k_weight, cos, sin, offset, eps)
        else:
            outputs = _prepare(x, weight, q_weight, k_weight, cos, sin, offset, eps, context)
    return tuple(output.permute(1, 2, 0, 3) for output in outputs)


@triton.jit(do_not_specialize=["full_heads", "seq_len"])
def fuse_kernel(
    full, linear, gamma, order, output, full_heads, seq_len,
    full_row, full_token, linear_row, linear_token, linear_head,
    EPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORMALIZES_FULL: tl.constexpr,
):  # fmt: skip
    """One head of the teacher at `BT` tokens of a row."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o = tl.arange(0, BD)
    mask = (t < seq_len)[:, None] & (o < D)[None, :]
    source = tl.load(order + head)
    if source < full_heads:
        x = tl.load(full + row * full_row + source * D + t[:, None] * full_token + o[None, :], mask=mask, other=0)
    else:
        head_of = linear + row * linear_row + (source - full_heads) * linear_head
        x = tl.load(head_of + t[:, None] * linear_token + o[None, :], mask=mask, other=0)
    x = x.to(tl.float32)
    size = tl.rsqrt(tl.sum(x * x, 1) / D + EPS)
    if not NORMALIZES_FULL:
        size = tl.where(source < full_heads, 1.0, size)
    x = x * size[:, None] * tl.load(gamma + head).to(tl.float32)
    place = ((row * seq_len + t) * tl.num_programs(1) + head)[:, None] * D + o[None, :]
    tl.store(output + place, x, mask=mask)


@triton.jit(do_not_specialize=["full_heads", "seq_len"])
def fuse_backward_kernel(
    full, linear, gamma, order, d_output, d_full, d_linear, d_gamma, full_heads, seq_len,
    full_row, full_token, linear_row, linear_token, linear_head,
    EPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, NORMALIZES_FULL: tl.constexpr,
):  # fmt: skip
    """The same backwards, to `[B, T, |F|, d]`, `[h, B, T, d]` and parts of the gradient of γ."""
    head, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads, rows, blocks = tl.num_programs(1), tl.num_programs(2), tl.num_programs(0)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o = tl.arange(0, BD)
    mask = (t < seq_len)[:, None] & (o < D)[None, :]
    source = tl.load(order + head)
    if source < full_heads:
        x = tl.load(full + row * full_row + source * D + t[:, None] * full_token + o[None, :], mask=mask, other=0)
    else:
        head_of = linear + row * linear_row + (source - full_heads) * linear_head
        x = tl.load(head_of + t[:, None] * linear_token + o[None, :], mask=mask, other=0)
    x = x.to(tl.float32)
    is_normalized = (source >= full_heads) | NORMALIZES_FULL
    size = tl.where(is_normalized, tl.rsqrt(tl.sum(x * x, 1) / D + EPS), 1.0)[:, None]
    x = x * size
    place = ((row * seq_len + t) * heads + head)[:, None] * D + o[None, :]
    gradient = tl.load(d_output + place, mask=mask, other=0).to(tl.float32)
    tl.store(d_gamma + (row * blocks + tl.program_id(0)) * heads + head, tl.sum(gradient * x))
    gradient = gradient * tl.load(gamma + head).to(tl.float32)
    along = tl.where(is_normalized, tl.sum(gradient * x, 1) / D, 0.0)[:, None]
    gradient = (gradient - x * along) * size
    if source < full_heads:
        place = ((row * seq_len + t) * full_heads + source)[:, None] * D + o[None, :]
        tl.store(d_full + place, gradient, mask=mask)
    else:
        place = (((source - full_heads) * rows + row) * seq_len + t)[:, None] * D + o[None, :]
        tl.store(d_linear + place, gradient, mask=mask)


class FusedHeads(torch.autograd.Function):
    """`fuse_heads` with its gradient."""

    @staticmethod
    def forward(ctx, full, linear, gamma, order, eps, normalizes_full):
        ctx.save_for_backward(full, linear, gamma, order)
        ctx.eps, ctx.normalizes_full = eps, normalizes_full
        some = linear if full is None else full
        batch_size, seq_len, _, head_dim = some.shape
        output = torch.empty(batch_size, seq_len, len(order), head_dim, device=some.device, dtype=some.dtype)
        grid, arguments, constants = _fusion(full, linear, eps, normalizes_full, len(order))
        fuse_kernel[grid](*_either(full, linear), gamma, order, output, *arguments, **constants)
        return output

    @staticmethod
    def backward(ctx, d_output):
        full, linear, gamma, order = ctx.saved_tensors
        grid, arguments, constants = _fusion(full, linear, ctx.eps, ctx.normalizes_full, len(order))
        d_full = None if full is None else torch.empty_like(full, memory_format=torch.contiguous_format)
        d_linear = None
        if linear is not None:
            batch_size, seq_len, heads, head_dim = linear.shape
            d_linear = torch.empty(heads, batch_size, seq_len, head_dim, device=linear.device, dtype=linear.dtype)
        d_gamma = torch.empty(grid[2] * grid[0], len(order), device=gamma.device)
        fuse_backward_kernel[grid](
            *_either(full, linear), gamma, order, d_output.contiguous(), *_either(d_full, d_linear), d_gamma,
            *arguments, **constants,
        )  # fmt: skip
        d_linear = None if d_linear is None else d_linear.permute(1, 2, 0, 3)
        return d_full, d_linear, d_gamma.sum(0).to(gamma.dtype), None, None, None


def _either(full, linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, the other in place of one that is not there: nothing reads it."""
    return (linear if full is None else full), (full if linear is None else linear)


def _fusion(full, linear, eps: float, normalizes_full: bool, heads: int):
    """Grid, sizes and constants of both ways."""
    some, rest = _either(full, linear)
    batch_size, seq_len, _, head_dim = some.shape
    block = 1 if seq_len == 1 else BLOCK
    grid = (triton.cdiv(seq_len, block), heads, batch_size)
    arguments = (0 if full is None else full.shape[2], seq_len, some.stride(0), some.stride(1))
    arguments = (*arguments, rest.stride(0), rest.stride(1), rest.stride(2))
    constants = {"EPS": eps, "D": head_dim, "BD": triton.next_power_of_2(head_dim), "BT": block}
    return grid, arguments, constants | {"NORMALIZES_FULL": normalizes_full, "num_warps": 1 if block == 1 else 4}


def fuse_heads(
    full: torch.Tensor | None,
    linear: torch.Tensor | None,
    gamma: torch.Tensor,
    order: torch.Tensor,
    eps: float,
    normalizes_full: bool,
) -> torch.Tensor:
    """
    `γ_h · RMSNorm(O_h)` of the heads of both branches, in the teacher's order.

    Args:
        full: `[B, T, |F|, d]`, or `None` without such heads.
        linear: `[B, T, h, d]`, or `None`; read where it lies if its last dimension has no gaps.
        gamma: `[H]`, in the teacher's order.
        order: `[H]` int64, for each head of the teacher its place in full, then linear heads.
        normalizes_full: whether full-attention heads are normalised too.

    Returns:
        `[B, T, H, d]` in the dtype of the heads.
    """
    if full is not None and full.stride()[2:] != (full.shape[3], 1):
        full = full.contiguous()
    if linear is not None and linear.stride(3) != 1:
        linear = linear.contiguous()
    with on_gpu_of(gamma):
        return FusedHeads.apply(full, linear, gamma, order, eps, normalizes_full)
