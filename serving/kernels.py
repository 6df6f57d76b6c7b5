"""What a linear branch does to a token that is generated before the recurrence, in one Triton kernel."""

import torch
import triton
import triton.language as tl

PARTS = tl.constexpr(3)  # q, k and v


@triton.jit
def _convolved(x, weight, state, channel, in_head, channel_stride, column_stride, W: tl.constexpr):
    """Causal convolution of some channels in fp32; the inputs that it keeps move on by one."""
    kept = state + channel * channel_stride
    newest = tl.load(x + channel, mask=in_head, other=0)
    output = newest.to(tl.float32) * tl.load(weight + channel * W + W - 1, mask=in_head, other=0).to(tl.float32)
    for column in tl.static_range(W - 1):
        value = tl.load(kept + column * column_stride, mask=in_head, other=0)
        output += value.to(tl.float32) * tl.load(weight + channel * W + column, mask=in_head, other=0).to(tl.float32)
        tl.debug_barrier()  # what another thread still reads is not overwritten
        if column > 0:
            tl.store(kept + (column - 1) * column_stride, value, mask=in_head)
    if W > 1:
        tl.store(kept + (W - 2) * column_stride, newest.to(state.dtype.element_ty), mask=in_head)
    return output


@triton.jit(do_not_specialize=["heads"])
def step_kernel(
    x, conv, state, places, q_weight, k_weight, angles, positions, hidden, gates, beta_bias, output, beta, step,
    heads, x_stride, page_stride, channel_stride, column_stride, angle_stride, hidden_stride,
    EPS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """A head of q, k or v of a sequence, or the product of a gate with its token."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    page = tl.load(places + row).to(tl.int64)
    if page > 0:  # else a row that fills a batch up
        if head < PARTS * heads:
            part = head // heads
            o = tl.arange(0, HALF)
            in_head = o < D // 2
            x += row * x_stride
            state += page * page_stride
            low = _convolved(x, conv, state, head * D + o, in_head, channel_stride, column_stride, W)
            high = _convolved(x, conv, state, head * D + D // 2 + o, in_head, channel_stride, column_stride, W)
            if part < 2:
                if HAS_NORM:
                    size = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / D + EPS)
                    low, high = low * size, high * size
                    if part == 0:
                        low *= tl.load(q_weight + o, mask=in_head, other=0).to(tl.float32)
                        high *= tl.load(q_weight + D // 2 + o, mask=in_head, other=0).to(tl.float32)
                    else:
                        low *= tl.load(k_weight + o, mask=in_head, other=0).to(tl.float32)
                        high *= tl.load(k_weight + D // 2 + o, mask=in_head, other=0).to(tl.float32)
                angle = angles + tl.load(positions + row) * angle_stride + o
                cos = tl.load(angle, mask=in_head, other=0).to(tl.float32)
                sin = tl.load(angle + D // 2, mask=in_head, other=0).to(tl.float32)
                low, high = low * cos - high * sin, high * cos + low * sin
            place = output + (row * PARTS * heads + head) * D + o
            tl.store(place, low, mask=in_head)
            tl.store(place + D // 2, high, mask=in_head)
        else:
            gate = head - PARTS * heads
            column = tl.arange(0, BLOCK)
            token = tl.load(hidden + row * hidden_stride + column, mask=column < HIDDEN, other=0).to(tl.float32)
            product = tl.sum(token * tl.load(gates + gate * HIDDEN + column, mask=column < HIDDEN, other=0), 0)
            if gate < heads:
                tl.store(beta + row * heads + gate, product + tl.load(beta_bias + gate))
            else:
                tl.store(step + row * heads + gate - heads, product)


def prepare_step(
    x: torch.Tensor,
    conv: torch.Tensor,
    state: torch.Tensor,
    places: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    angles: torch.Tensor,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    gates: torch.Tensor,
    beta_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Short convolution, RMS norm and rotation of one projected token of every sequence, and its gates' products.

    Args:
        x: `[T, 3 * h * d]`, its last dimension without gaps; all heads of q, then of k, then of v.
        conv: `[3 * h * d, kernel]`, the present token's tap last.
        state: `[pages, 3 * h * d, kernel - 1]` in any layout, the inputs before, which move on.
        places: `[T]`, the page of each sequence; 0 for rows that are nobody's, for which nothing is computed.
        q_weight, k_weight: `[d]`, or `None` where q and k are not normalised.
        angles: `[positions, d]`, cosines and then sines of `d / 2` frequencies.
        positions: `[T]`.
        hidden_states: `[T, D]`, the layer's input.
        gates: fp32 `[2 * h, D]`, of writing strength and then of decay.
        beta_bias: fp32 `[h]`.

    Returns:
        q, k and v `[T, 3 * h * d]`; the logit of β and, without its bias, that of the step of decay, fp32 `[T, h]`.
    """
    (rows, channels), columns = x.shape, state.shape[2]
    heads, head_dim = len(beta_bias), angles.shape[1]
    assert channels == 3 * heads * head_dim and columns == conv.shape[1] - 1 and conv.is_contiguous()
    assert x.stride(1) == hidden_states.stride(1) == angles.stride(1) == 1 and gates.is_contiguous()
    assert places.is_contiguous() and positions.is_contiguous() and len(places) == rows
    output = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    beta, step = torch.empty(2, rows, heads, dtype=torch.float32, device=x.device)
    has_norm = q_weight is not None
    step_kernel[(5 * heads, rows)](
        x, conv, state, places, q_weight if has_norm else x, k_weight if has_norm else x, angles, positions,
        hidden_states, gates, beta_bias, output, beta, step,
        heads, x.stride(0), *state.stride(), angles.stride(0), hidden_states.stride(0),
        EPS=eps, W=conv.shape[1], D=head_dim, HALF=triton.next_power_of_2(head_dim // 2),
        HIDDEN=hidden_states.shape[1], BLOCK=triton.next_power_of_2(hidden_states.shape[1]), HAS_NORM=has_norm,
        num_warps=1,
    )  # fmt: skip
    return output, beta, step
