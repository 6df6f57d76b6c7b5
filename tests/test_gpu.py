"""What only a GPU can show: fla's kernels against the reference, and the choice between them by device."""

import copy

import pytest
import torch

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM, modeling_hydrahead

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or modeling_hydrahead.chunk_gated_delta_rule is None,
    reason="needs a CUDA GPU and flash-linear-attention",
)

MASKS = [[1, 0, 1, 1, 0, 0, 0, 1], [0] * 8, [1] * 8, [0, 0, 1, 0, 0, 1, 0, 0]]


def small_model() -> HydraHeadForCausalLM:
    torch.manual_seed(0)
    config = HydraHeadConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=len(MASKS),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        head_masks=MASKS,
        logit_scale_base=64,
        initializer_range=0.06,
    )
    return HydraHeadForCausalLM(config).eval()


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    return float((value - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def models() -> tuple[HydraHeadForCausalLM, HydraHeadForCausalLM]:
    """The same model on the CPU (reference kernels) and on the GPU (fla)."""
    model = small_model()
    return model, copy.deepcopy(model).cuda()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 128, (2, 300), generator=torch.Generator().manual_seed(1))


def test_cpu_model_runs_where_triton_is_installed(models, ids):
    """transformers' wrapper would call fla here and die: no GPU holds these tensors."""
    assert torch.isfinite(models[0](ids).logits).all()


def test_fla_equals_the_reference_in_outputs_and_gradients(models, ids):
    """fla's matrix products run in tf32: 10 bits of mantissa, hence 5e-3."""
    cpu, gpu = models
    losses = [model(rows, labels=rows) for model, rows in ((cpu, ids), (gpu, ids.cuda()))]
    assert relative_error(losses[1].logits, losses[0].logits) < 5e-3
    losses[0].loss.backward()
    try:
        losses[1].loss.backward()
    except RuntimeError as error:  # fla refuses Triton versions whose backward is wrong on some GPUs
        pytest.skip(f"outputs agree; no gradients here: {error}")
    for (name, one), other in zip(gpu.named_parameters(), cpu.parameters()):
        if other.grad.norm() > 1e-6:
            assert relative_error(one.grad, other.grad) < 2e-2, name
    cpu.zero_grad(), gpu.zero_grad()


def test_bf16_stays_close_to_fp32(models, ids):
    _, gpu = models
    half = copy.deepcopy(gpu).to(torch.bfloat16)
    with torch.no_grad():
        assert relative_error(half(ids.cuda()).logits.float(), gpu(ids.cuda()).logits) < 5e-2


def test_packed_rows_equal_their_sequences_alone(models, ids):
    _, gpu = models
    rows = ids[:1].cuda()
    lengths = (7, 100, 1, 192)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).cuda()
    with torch.no_grad():
        packed = gpu(rows, position_ids=positions, use_cache=False).logits
        alone = torch.cat([gpu(part, use_cache=False).logits for part in rows.split(lengths, dim=1)], dim=1)
    assert relative_error(packed, alone) < 5e-3


def test_prefill_and_steps_equal_one_forward(models, ids):
    _, gpu = models
    rows = ids.cuda()
    with torch.no_grad():
        whole = gpu(rows, use_cache=False).logits
        output = gpu(rows[:, :280], use_cache=True)
        parts = [output.logits]
        for index in range(280, 300):
            output = gpu(rows[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
    assert relative_error(torch.cat(parts, dim=1), whole) < 5e-3


def test_left_padded_generation_equals_the_row_alone(models, ids):
    _, gpu = models
    alone = gpu.generate(ids[:1, 40:100].cuda(), max_new_tokens=8, do_sample=False)[:, -8:]
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :40] = 0
    padded = gpu.generate(ids[:, :100].cuda(), attention_mask=mask.cuda(), max_new_tokens=8, do_sample=False)
    assert padded[:1, -8:].tolist() == alone.tolist()


def test_static_cache_generates_the_same(models, ids):
    _, gpu = models
    prompt = ids[:, :50].cuda()
    dynamic = gpu.generate(prompt, max_new_tokens=8, do_sample=False)
    static = gpu.generate(
        prompt, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert dynamic.tolist() == static.tolist()


def test_compiled_forward_equals_eager(models, ids):
    _, gpu = models
    rows = ids.cuda()
    with torch.no_grad():
        eager = gpu(rows, use_cache=False).logits
        compiled = torch.compile(gpu)(rows, use_cache=False).logits
    assert relative_error(compiled, eager) < 5e-3
