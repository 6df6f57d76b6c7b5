"""
The Triton kernels around the recurrence against PyTorch, on a GPU.

Where Triton is installed, `TRITON_INTERPRET=1 pytest tests/test_kernels.py` runs them on a CPU: some minutes.
"""

import os

import pytest
import torch

import hydrahead.modeling_hydrahead as modeling
from hydrahead import HydraHeadConfig, HydraHeadForCausalLM

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="Triton runs on a GPU, or interpreted"
)


def make_model(**options) -> HydraHeadForCausalLM:
    """Three layers: with both kinds of heads, with blocks of two sizes, without full attention; all weights random."""
    torch.manual_seed(0)
    config = HydraHeadConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,  # not a power of two
        head_masks=[[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
        max_position_embeddings=128,
        **{"logit_scale_base": 16.0, **options},
    )
    model = HydraHeadForCausalLM(config).to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def both_ways(monkeypatch, call) -> None:
    """The same logits from the kernels and from PyTorch, and the same gradients, if any, within rounding."""
    kernels = call()
    monkeypatch.setattr(modeling, "has_kernels", lambda x: False)
    for place, (found, expected) in enumerate(zip(kernels, call())):
        # On a GPU fla multiplies in tf32: what differs by rounding before it differs by 1e-3 of its terms after it,
        # and gradients are sums of terms of both signs.
        tolerance = 2e-2 if DEVICE == "cuda" and kernels[0].requires_grad and place else 1e-3
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    monkeypatch.setattr(modeling, "has_kernels", lambda x: True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"fusion_norm": "linear"}, {"qk_norm": False}, {"fusion": "concat"}])
def test_logits_and_gradients(monkeypatch, options, packed):
    model, ids = make_model(**options), ids_of(2, 70)
    positions = torch.cat([torch.arange(29), torch.arange(2), torch.arange(39)]).expand(2, -1).to(DEVICE)

    def call():
        model.zero_grad()
        outputs = model(ids, labels=ids, position_ids=positions if packed else None, use_cache=False)
        outputs.loss.backward()
        return [outputs.logits, *(parameter.grad for parameter in model.parameters())]

    both_ways(monkeypatch, call)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
        {"cache_implementation": "static", "disable_compile": True},
        {"attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("length", [9, 2])
def test_generation(monkeypatch, options, length):
    model, ids = make_model(), ids_of(2, length)
    if "attention_mask" in options:
        options = {"attention_mask": options["attention_mask"][:, -length:].to(DEVICE)}

    def call():
        found = model.generate(
            ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
        return found.logits

    with torch.no_grad():
        both_ways(monkeypatch, call)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("kernel_size", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_served_step_of_the_linear_branch(dtype, kernel_size, has_norm):
    from hydrahead.serving.kernels import prepare_step

    torch.manual_seed(0)
    heads, dim, hidden_size, columns = 3, 12, 40, kernel_size - 1
    channels, places, positions = 3 * heads * dim, [2, 0, 1], [5, 0, 7]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    x, conv, token = random(3, channels + 5)[:, :channels], random(channels, kernel_size), random(3, hidden_size)
    state = random(4, columns, channels + 7).transpose(1, 2)[:, :channels]  # as vLLM lays it
    norms = random(2, dim) if has_norm else (None, None)
    angle = torch.rand(9, dim // 2, device=DEVICE)
    table = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
    gates, bias = torch.randn(2 * heads, hidden_size, device=DEVICE), torch.randn(heads, device=DEVICE)
    left = state.clone()
    prepared, beta, step = prepare_step(
        x, conv, state, torch.tensor(places, dtype=torch.int32, device=DEVICE), *norms, 1e-6, table,
        torch.tensor(positions, device=DEVICE), token, gates, bias,
    )  # fmt: skip
    torch.testing.assert_close(state[[0, 3]], left[[0, 3]], rtol=0, atol=0)  # of others, and of rows that are nobody's
    for row in (0, 2):
        inputs = torch.cat([left[places[row]], x[row, :, None]], dim=1)
        torch.testing.assert_close(state[places[row]], inputs[:, 1:], rtol=0, atol=0)
        query, key, value = (inputs.float() * conv.float()).sum(1).view(3, heads, dim)
        cos, sin = table[positions[row]].float().chunk(2)
        rotated = []
        for each, norm in zip((query, key), norms):
            if has_norm:
                each = torch.nn.functional.rms_norm(each, (dim,), norm.float(), 1e-6)
            low, high = each.chunk(2, dim=-1)
            rotated.append(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1))
        torch.testing.assert_close(prepared[row].view(3, heads, dim), torch.stack([*rotated, value]).to(dtype))
        products = gates @ token[row].float()
        torch.testing.assert_close(beta[row], products[:heads] + bias)
        torch.testing.assert_close(step[row], products[heads:])
