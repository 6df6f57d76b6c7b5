"""Both branches and their fusion against the equations of docs/method.md §1, head by head and token by token."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM
from hydrahead.convert.migration import convert_model
from hydrahead.modeling_hydrahead import HydraHeadAttention, HydraHeadRotaryEmbedding
from hydrahead.tests.families import (
    ALL_FULL,
    ALL_LINEAR,
    FAMILIES,
    GROUP,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    MIXED,
    make_student,
    make_teacher,
    random_ids,
    random_masks,
    student_fields,
)

# The naive computation runs in fp64, the model in fp32 (24 bits, 6e-8): after a few hundred operations of order one
# a relative error of 1e-5 is rounding, one of 1e-3 would be a mistake. Gradients sum over all tokens: ten times that.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected entry."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12)).item()


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight


def rotate(x: torch.Tensor, position: int, theta: float = 1e4) -> torch.Tensor:
    """Rotary embedding of one `[..., d]` vector at `position`: pairs (i, i + d/2) turned by position · θ^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=x.dtype) * 2 / x.shape[-1])
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def project(params: dict, name: str, x: torch.Tensor, row: int) -> torch.Tensor:
    """Rows of head `row` of a projection applied to `x` `[..., D]`: `[..., d]`."""
    rows = slice(row * HEAD_DIM, (row + 1) * HEAD_DIM)
    out = x @ params[f"{name}.weight"][rows].T
    return out + params[f"{name}.bias"][rows] if f"{name}.bias" in params else out


def naive_gated_delta_net(params: dict, x: torch.Tensor, num_heads: int, eps: float) -> torch.Tensor:
    """
    The linear branch of docs/method.md §1 for `x` `[B, T, D]` from position 0, head by head: `[B, T, h, d]`.

    q, k, v -> causal depthwise convolution -> q/k norm -> rotary embedding -> L2 norm ->
    S_t = e^g (I - β k kᵀ) S_{t-1} + β k vᵀ, o_t = S_tᵀ q / √d.
    """
    batch, length, _ = x.shape
    beta = torch.sigmoid(x @ params["gates.b_proj.weight"].T + params["gates.b_proj.bias"])
    step = torch.nn.functional.softplus(x @ params["gates.a_proj.weight"].T + params["gates.dt_bias"])
    decay = torch.exp(-params["gates.A_log"].exp() * step)
    kernel = params["short_conv.weight"].shape[1]
    taps = params["short_conv.weight"].view(3, num_heads, HEAD_DIM, kernel)
    eye = torch.eye(HEAD_DIM, dtype=x.dtype)
    outputs = []
    for head in range(num_heads):
        inputs = [project(params, f"{name}_proj", x, head) for name in "qkv"]
        state = x.new_zeros(batch, HEAD_DIM, HEAD_DIM)
        tokens = []
        for t in range(length):
            q, k, v = (
                sum(taps[i, head, :, kernel - 1 - back] * inputs[i][:, t - back] for back in range(min(kernel, t + 1)))
                for i in range(3)
            )
            if "q_norm.weight" in params:
                q, k = rms_norm(q, params["q_norm.weight"], eps), rms_norm(k, params["k_norm.weight"], eps)
            q, k = rotate(q, t), rotate(k, t)
            q, k = (y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
            b = beta[:, t, head, None, None]
            outer = k.unsqueeze(2) * k.unsqueeze(1)  # k kᵀ
            state = decay[:, t, head, None, None] * (eye - b * outer) @ state + b * k.unsqueeze(2) * v.unsqueeze(1)
            tokens.append((state.transpose(1, 2) @ q.unsqueeze(2)).squeeze(2) / math.sqrt(HEAD_DIM))
        outputs.append(torch.stack(tokens, dim=1))
    return torch.stack(outputs, dim=2)


def naive_full_attention(
    params: dict, x: torch.Tensor, config: HydraHeadConfig, layer: int
) -> dict[int, torch.Tensor]:
    """docs/method.md §1's full-attention branch, by teacher head: outputs `[B, T, d]` after the gate."""
    layout, length = config.head_layout(layer), x.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    outputs = {}
    for row, head in enumerate(layout.full_heads):
        kv_row = layout.kv_heads.index(head // GROUP)
        q = project(params, "q_proj", x, row)
        k, v = project(params, "k_proj", x, kv_row), project(params, "v_proj", x, kv_row)
        if config.qk_norm:
            q, k = (rms_norm(y, params[f"{n}_norm.weight"], config.rms_norm_eps) for n, y in (("q", q), ("k", k)))
        if config.full_attention_position == "rope":
            q, k = (torch.stack([rotate(y[:, t], t) for t in range(length)], dim=1) for y in (q, k))
        if (a := config.logit_scale_base) is not None:
            q = q * torch.tensor([math.log(t + a) / math.log(a) for t in range(length)], dtype=x.dtype)[:, None]
        scores = (q @ k.transpose(1, 2) / math.sqrt(HEAD_DIM)).masked_fill(~causal, -math.inf)
        outputs[head] = scores.softmax(-1) @ v
        if config.full_attention_gate:
            gate = 2 * torch.sigmoid(project(params, "output_gate", x, row))
            outputs[head] = outputs[head] * gate
    return outputs


def naive_fusion(
    params: dict, heads: dict[int, torch.Tensor], x: torch.Tensor, config: HydraHeadConfig, layer: int
) -> torch.Tensor:
    """docs/method.md §1's three fusions of head outputs, by teacher head: `[B, T, H, d]` in the teacher's order."""
    gamma = params.get("weight")
    if config.fusion == "gate":
        share = torch.softmax(x @ params["proj.weight"].T + gamma.log(), dim=-1)
    fused = []
    for head in range(HEADS):
        out = heads[head]
        is_full = bool(config.head_masks[layer][head])
        if config.fusion != "concat" and not (config.fusion_norm == "linear" and is_full):
            out = rms_norm(out, None, config.rms_norm_eps)
        if config.fusion == "scale":
            out = gamma[head] * out
        elif config.fusion == "gate":
            out = share[:, :, head, None] * gamma.sum() * out
        fused.append(out)
    return torch.stack(fused, dim=2)


def naive_attention(params: dict, x: torch.Tensor, config: HydraHeadConfig, layer: int) -> torch.Tensor:
    """A whole attention layer, `[B, T, D]` to `[B, T, D]`."""

    def of(prefix):
        return {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}

    layout, heads = config.head_layout(layer), {}
    if layout.full_heads:
        heads |= naive_full_attention(of("full_attention."), x, config, layer)
    if layout.linear_heads:
        count = len(layout.linear_heads)
        linear = naive_gated_delta_net(of("linear_attention."), x, count, config.rms_norm_eps)
        heads |= {head: linear[:, :, row] for row, head in enumerate(layout.linear_heads)}
    out = naive_fusion(of("fusion."), heads, x, config, layer).flatten(2) @ params["o_proj.weight"].T
    return out + params["o_proj.bias"] if "o_proj.bias" in params else out


def attention_layer(layer: int = 0, **changes) -> tuple[HydraHeadAttention, HydraHeadConfig]:
    """One attention layer of a random student, and the student's configuration."""
    student = make_student(**changes)
    return student.model.layers[layer].self_attn, student.config


def hidden(length: int, batch: int = 2, size: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, size, generator=torch.Generator().manual_seed(seed))


def call_inputs(config: HydraHeadConfig, length: int) -> dict:
    """What the model hands to its attention layers for unpadded rows from position 0."""
    positions = torch.arange(length)[None]
    base = config.logit_scale_base
    scale = None if base is None else torch.log(positions + float(base)) / math.log(base)
    return {
        "position_embeddings": HydraHeadRotaryEmbedding(config)(torch.zeros(1), positions),
        "query_scale": scale,
        "attention_mask": torch.full((length, length), -math.inf).triu(1)[None, None],
    }


def double(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}


def assert_same_function(module, actual, expected, x, x64, params) -> None:
    """Outputs, and gradients of the input and of every parameter, for a random cotangent."""
    assert relative_error(actual, expected) < OUTPUT_TOLERANCE
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2))
    (actual * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert relative_error(x.grad, x64.grad) < GRADIENT_TOLERANCE
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert params[name].grad.abs().max() > 0, name  # or the comparison would say nothing
        assert relative_error(parameter.grad, params[name].grad) < GRADIENT_TOLERANCE, name


# Below, at and beyond one chunk (64 tokens) of the kernel.
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 150])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_linear_branch_equals_the_naive_recurrence(length, qk_norm):
    attention, config = attention_layer(head_masks=[[0, 1, 0, 0, 1, 0]] * LAYERS, qk_norm=qk_norm, attention_bias=True)
    branch, inputs = attention.linear_attention, call_inputs(config, length)
    x = hidden(length).requires_grad_()
    x64, params = x.detach().double().requires_grad_(), double(branch)
    actual = branch(x, inputs["position_embeddings"])
    expected = naive_gated_delta_net(params, x64, 4, config.rms_norm_eps)
    if length == 1:  # the decay has nothing to decay yet
        assert relative_error(actual, expected) < OUTPUT_TOLERANCE
    else:
        assert_same_function(branch, actual, expected, x, x64, params)


@pytest.mark.parametrize("kernel_size", [2, 3, 7])
def test_linear_branch_equals_the_naive_recurrence_for_other_kernel_sizes(kernel_size):
    attention, config = attention_layer(head_masks=ALL_LINEAR, short_conv_kernel_size=kernel_size)
    x, params = hidden(9), {n: p.detach().double() for n, p in attention.linear_attention.named_parameters()}
    actual = attention.linear_attention(x, call_inputs(config, 9)["position_embeddings"])
    assert relative_error(actual, naive_gated_delta_net(params, x.double(), HEADS, 1e-6)) < OUTPUT_TOLERANCE


def test_linear_branch_forgets_and_overwrites():
    """The delta rule in two tokens: the second write of a key replaces the first, a third with β = 0 only decays."""
    attention, _ = attention_layer(head_masks=ALL_LINEAR, qk_norm=False)
    branch = attention.linear_attention
    cos, sin = torch.ones(1, 3, HEAD_DIM), torch.zeros(1, 3, HEAD_DIM)  # no rotation: the same token, the same key
    with torch.no_grad():
        branch.short_conv.weight.zero_()
        branch.short_conv.weight[:, -1] = 1
        branch.gates.b_proj.weight.zero_()
        branch.gates.b_proj.bias.fill_(50.0)  # β = 1
        branch.gates.a_proj.weight.zero_()
        branch.gates.A_log.zero_()
        branch.gates.dt_bias.fill_(-50.0)  # no decay
        out = branch(hidden(1).expand(-1, 3, -1), (cos, sin))
    torch.testing.assert_close(out[:, 0], out[:, 1])
    torch.testing.assert_close(out[:, 0], out[:, 2])


def test_a_long_memory_is_not_lost_to_rounding():
    """A decay of 0.9999 over 2000 tokens: what the first token wrote is still there, to 1e-4."""
    attention, config = attention_layer(head_masks=ALL_LINEAR)
    branch, length = attention.linear_attention, 2000
    with torch.no_grad():
        branch.gates.a_proj.weight.zero_()
        branch.gates.A_log.zero_()
        branch.gates.dt_bias.fill_(math.log(math.expm1(1e-4)))
        # Only the first token writes.
        branch.gates.b_proj.weight.zero_()
        branch.gates.b_proj.bias.fill_(-100.0)
        branch.gates.b_proj.weight[:, 0] = 1.0
        x = hidden(length, batch=1)
        x[..., 0] = 0
        x[:, 0, 0] = 200.0
        out = branch(x, call_inputs(config, length)["position_embeddings"])
        params = {n: p.double() for n, p in branch.named_parameters()}
        expected = naive_gated_delta_net(params, x.double(), HEADS, config.rms_norm_eps)
    assert expected[:, -1].abs().max() > 0.1 * expected[:, 0].abs().max()
    assert relative_error(out[:, -1], expected[:, -1]) < 1e-4


@pytest.mark.parametrize("position", ["nope", "rope"])
@pytest.mark.parametrize("base", [None, 64, 1.5])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_full_branch_equals_per_head_attention(position, base, gate, implementation):
    attention, config = attention_layer(
        full_attention_position=position, logit_scale_base=base, full_attention_gate=gate, attention_bias=True
    )
    config._attn_implementation = implementation
    branch, inputs = attention.full_attention, call_inputs(config, 20)
    x = hidden(20).requires_grad_()
    x64, params = x.detach().double().requires_grad_(), double(branch)
    actual, _ = branch(x, inputs["position_embeddings"], inputs["query_scale"], inputs["attention_mask"])
    by_head = naive_full_attention(params, x64, config, 0)
    expected = torch.stack([by_head[head] for head in config.head_layout(0).full_heads], dim=2)
    # A bias of k shifts all scores of a query alike: without a norm or a rotation its gradient would be zero.
    assert_same_function(branch, actual, expected, x, x64, params)


@given(masks=random_masks(), seed=st.integers(0, 100))
@example(masks=ALL_FULL, seed=0)
@example(masks=ALL_LINEAR, seed=0)
@example(masks=MIXED, seed=0)
@settings(max_examples=12)
@pytest.mark.parametrize("fusion", ["scale", "gate", "concat"])
@pytest.mark.parametrize("norm", ["all", "linear"])
def test_attention_layer_equals_per_head_computation_whatever_the_mask(fusion, norm, masks, seed):
    attention, config = attention_layer(
        seed=seed, head_masks=masks, fusion=fusion, fusion_norm=norm, attention_output_bias=True
    )
    x = hidden(7).requires_grad_()
    x64, params = x.detach().double().requires_grad_(), double(attention)
    actual = attention(x, **call_inputs(config, 7))
    assert_same_function(attention, actual, naive_attention(params, x64, config, 0), x, x64, params)


def naive_model(student: HydraHeadForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]` in fp64: embedding, per layer attention and SwiGLU between residuals, norm, head."""
    config, params = student.config, {name: p.detach().double() for name, p in student.named_parameters()}
    x = params["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        attention = {name.removeprefix("self_attn."): p for name, p in own.items() if name.startswith("self_attn.")}
        x = x + naive_attention(attention, rms_norm(x, own["input_layernorm.weight"], 1e-6), config, layer)
        y = rms_norm(x, own["post_attention_layernorm.weight"], 1e-6)
        y = torch.nn.functional.silu(y @ own["mlp.gate_proj.weight"].T) * (y @ own["mlp.up_proj.weight"].T)
        x = x + y @ own["mlp.down_proj.weight"].T
    head = params.get("lm_head.weight", params["model.embed_tokens.weight"])
    return rms_norm(x, params["model.norm.weight"], 1e-6) @ head.T


@given(masks=random_masks(), seed=st.integers(0, 100))
@example(masks=ALL_FULL, seed=0)
@example(masks=ALL_LINEAR, seed=0)
@example(masks=MIXED, seed=0)
@settings(max_examples=8)
@pytest.mark.parametrize("position", ["nope", "rope"])
@pytest.mark.parametrize("base", [None, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_model_equals_the_method_computed_naively(position, base, tied, masks, seed):
    """Positions counted from 0, scale log(t + a) / log(a), every part in its place: logits from ids alone."""
    student = make_student(
        seed=seed,
        head_masks=masks,
        full_attention_position=position,
        logit_scale_base=base,
        tie_word_embeddings=tied,
    )
    ids = random_ids(2, 12, seed)
    with torch.no_grad():
        # Layers multiply a relative error of 1e-6 each by the condition of their norms.
        assert relative_error(student(ids).logits, naive_model(student, ids)) < 1e-4


@given(masks=random_masks())
@settings(max_examples=10)
@pytest.mark.parametrize("norm", ["all", "linear"])
def test_gate_fusion_without_weights_equals_scale_fusion(norm, masks):
    gate = make_student(head_masks=masks, fusion="gate", fusion_norm=norm)
    scale = make_student(head_masks=masks, fusion="scale", fusion_norm=norm)
    state = {name: tensor for name, tensor in gate.state_dict().items() if "fusion.proj" not in name}
    scale.load_state_dict(state)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        for layer in gate.model.layers:
            layer.self_attn.fusion.proj.weight.zero_()
        # A softmax of logarithms and back: a few roundings per head.
        torch.testing.assert_close(gate(ids).logits, scale(ids).logits, rtol=1e-4, atol=1e-4)


def test_fused_heads_have_the_size_that_gamma_says():
    attention, config = attention_layer(fusion="scale")
    with torch.no_grad():
        heads = attention.head_outputs(hidden(30), **call_inputs(config, 30))
    # Each token's RMS, less what the norm's epsilon takes from a small output.
    rms = heads.pow(2).mean(-1).sqrt()
    assert (rms <= attention.fusion.weight * (1 + 1e-5)).all()
    torch.testing.assert_close(rms.median(1).values.mean(0), attention.fusion.weight, rtol=0.05, atol=0)


def test_neutral_gate_is_exactly_one():
    with_gate, config = attention_layer(full_attention_gate=True)
    with torch.no_grad():
        with_gate.full_attention.output_gate.weight.zero_()
        gated = with_gate(hidden(9), **call_inputs(config, 9))
        with_gate.full_attention.output_gate = None
        assert torch.equal(gated, with_gate(hidden(9), **call_inputs(config, 9)))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_head_owns_the_rows_of_its_kv_head(family):
    """Rows are repeated head by head; repeating the rows of the 2-D matrix gives heads of mixed rows."""
    teacher = make_teacher(family)
    student = convert_model(teacher, ALL_LINEAR, calibration_ids=torch.arange(3, 90)[None])
    state = teacher.state_dict()
    for layer, module in enumerate(student.model.layers):
        prefix = f"model.layers.{layer}.self_attn."
        if (fused := state.get(f"{prefix}qkv_proj.weight")) is not None:
            split = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
            teacher_rows = dict(zip("qkv", fused.split(split)))
        else:
            teacher_rows = {name: state[f"{prefix}{name}_proj.weight"] for name in "qkv"}
        for name in "kv":
            rows = getattr(module.self_attn.linear_attention, f"{name}_proj").weight
            for head in range(HEADS):
                kv = head // GROUP
                own = rows[head * HEAD_DIM : (head + 1) * HEAD_DIM]
                assert torch.equal(own, teacher_rows[name][kv * HEAD_DIM : (kv + 1) * HEAD_DIM])
            # The known bug would be seen: it gives another matrix of the same shape.
            wrong = teacher_rows[name].repeat_interleave(GROUP, dim=0)
            assert wrong.shape == rows.shape and not torch.equal(wrong, rows)
            if (bias := state.get(f"{prefix}{name}_proj.bias")) is not None:
                own_bias = getattr(module.self_attn.linear_attention, f"{name}_proj").bias
                assert torch.equal(
                    own_bias.view(KV_HEADS, GROUP, -1), bias.view(KV_HEADS, 1, -1).expand(-1, GROUP, -1)
                )
        assert torch.equal(module.self_attn.linear_attention.q_proj.weight, teacher_rows["q"])


def test_converted_linear_heads_read_the_right_kv_head():
    """The recurrence computed from the teacher's own rows, KV head `h // group`: what conversion must start from."""
    teacher = make_teacher("qwen3-tied")
    student = convert_model(teacher, ALL_LINEAR, calibration_ids=torch.arange(3, 90)[None])
    branch, x = student.model.layers[1].self_attn.linear_attention, hidden(12)
    own = teacher.model.layers[1].self_attn
    params = {name: p.double() for name, p in branch.named_parameters() if name.startswith(("gates", "short_conv"))}
    params |= {
        "q_proj.weight": own.q_proj.weight.double(),
        "q_norm.weight": own.q_norm.weight.double(),
        "k_norm.weight": own.k_norm.weight.double(),
    }
    for name in ("k_proj", "v_proj"):
        by_head = [getattr(own, name).weight.view(KV_HEADS, HEAD_DIM, -1)[head // GROUP] for head in range(HEADS)]
        params[f"{name}.weight"] = torch.cat(by_head).double()
    with torch.no_grad():
        expected = naive_gated_delta_net(params, x.double(), HEADS, 1e-6)
        actual = branch(x, call_inputs(student.config, 12)["position_embeddings"])
    assert relative_error(actual, expected) < OUTPUT_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_are_computed_in_fp32_inside_autocast(dtype):
    attention, _ = attention_layer(head_masks=ALL_LINEAR)
    gates, x = attention.linear_attention.gates, hidden(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        beta, g = gates(x.to(dtype))
    exact_beta, exact_g = gates(x.to(dtype).float())
    assert beta.dtype == g.dtype == torch.float32
    assert torch.equal(beta, exact_beta) and torch.equal(g, exact_g)


def test_fresh_model_starts_neutral():
    """A model that was not converted: identity convolution, gate of one, equal shares, decay half-lives in range."""
    student = HydraHeadForCausalLM(HydraHeadConfig(**student_fields(fusion="gate")))
    for layer in student.model.layers:
        attention = layer.self_attn
        weight = attention.linear_attention.short_conv.weight
        assert weight[:, -1].eq(1).all() and weight[:, :-1].eq(0).all()
        assert attention.full_attention.output_gate.weight.eq(0).all()
        assert attention.fusion.weight.eq(1).all() and attention.fusion.proj.weight.eq(0).all()
        gates = attention.linear_attention.gates
        assert gates.b_proj.bias.eq(0).all()
        half_life = math.log(2) / (gates.A_log.exp() * torch.nn.functional.softplus(gates.dt_bias))
        assert half_life.min() > 0.3 and half_life.max() < 1000
