"""What only a GPU can show: fla's kernels against the reference, and the choice between them by device."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from transformers import CompileConfig, DynamicCache, Qwen3Config, Qwen3ForCausalLM

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM, modeling_hydrahead, ops_hydrahead
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import adapter_for
from hydrahead.data.batches import Batch
from hydrahead.training import loop
from hydrahead.training.align import FittedHeads, align
from hydrahead.training.loop import Schedule
from hydrahead.training.losses import distillation_loss, teacher_chunks
from hydrahead.training.replay import Replayed

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or ops_hydrahead.chunk_gated_delta_rule is None,
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


def test_fla_equals_the_reference_in_outputs_and_gradients(models, ids, monkeypatch):
    """
    fla's matrix products run in tf32: 10 bits of mantissa, hence 5e-3, and 2e-2 for gradients.

    For the gates the kernel's own gradients are compared, those of each token's β and decay. Their parameters' are
    sums of these over all tokens, with both signs: what is left of a sum is known as exactly as its terms are, not as
    itself (`test_the_decay_against_fp64`). For `A_log` the error is a share of `Σ |g · dL/dg|`.
    """
    cpu, gpu = models
    rule, given = modeling_hydrahead.gated_delta_rule, []

    def watched(query, key, value, g, beta, *more):
        for each in (g, beta):
            each.retain_grad()
            given.append(each)
        return rule(query, key, value, g, beta, *more)

    monkeypatch.setattr(modeling_hydrahead, "gated_delta_rule", watched)
    losses = [model(rows, labels=rows) for model, rows in ((cpu, ids), (gpu, ids.cuda()))]
    assert relative_error(losses[1].logits, losses[0].logits) < 5e-3
    losses[0].loss.backward()
    losses[1].loss.backward()
    half = len(given) // 2
    errors = {f"token gradient {i}": relative_error(given[half + i].grad, given[i].grad) for i in range(half)}
    decays = given[:half:2]  # of the CPU, layer by layer
    terms = iter([(g.detach() * g.grad).abs().sum((0, 1)) for g in decays])
    for (name, one), other in zip(gpu.named_parameters(), cpu.parameters()):
        if name.endswith("A_log"):
            errors[name] = float(((one.grad.cpu() - other.grad).abs() / next(terms)).max())
        elif other.grad.norm() > 1e-6 and ".gates." not in name:
            errors[name] = relative_error(one.grad, other.grad)
    cpu.zero_grad(), gpu.zero_grad()
    assert {name: error for name, error in errors.items() if error >= 2e-2} == {}


def exact_rule(q, k, v, g, beta):
    """METHOD §1's recurrence, token by token in fp64."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state, outputs = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[3] ** -0.5)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 2e-2)])
def test_the_decay_against_fp64(dtype, tolerance):
    """
    fla's gradient of `A_log`, `Σ g · dL/dg`, is off by rounding of its terms (tf32, bf16), however much they cancel.

    Slow decay makes them cancel: a share of the sum says nothing, a share of the terms' magnitudes does.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 300, 5)
    q, k, v, weight = (torch.randn(*shape, 64, generator=generator, device="cuda").to(dtype) for _ in range(4))
    beta = torch.rand(shape, generator=generator, device="cuda")
    sums, magnitudes = [], []
    for rule in (exact_rule, lambda *x: modeling_hydrahead.gated_delta_rule(*x, None, False)[0]):
        g = (
            -0.02 * torch.rand(shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        ).requires_grad_()
        (rule(q, k, v, g, beta).double() * weight).sum().backward()
        terms = g.detach().double() * g.grad.double()
        sums.append(terms.sum((0, 1)))
        magnitudes.append(terms.abs().sum((0, 1)))
    error = (sums[1] - sums[0]).abs()
    share = (error / magnitudes[0]).max()
    print(f"A_log {dtype}: error of itself {(error / sums[0].abs()).max():.1e}, of its terms {share:.1e}")
    assert share < tolerance


def test_autocast_trains_like_fp32(models, ids):
    """The loss of bf16 autocast, and gradients that point where fp32's do: 8 bits in every product."""
    gpu, rows = models[1], ids.cuda()
    gpu(rows, labels=rows).loss.backward()
    exact = {name: parameter.grad.clone() for name, parameter in gpu.named_parameters()}
    gpu.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = gpu(rows, labels=rows).loss
    loss.backward()
    for name, parameter in gpu.named_parameters():
        if exact[name].norm() > 1e-6 and not name.endswith("A_log"):
            assert torch.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), 0) > 0.98, name
    gpu.zero_grad()


def test_a_recorded_step_aligns_like_one_that_runs(ids, monkeypatch):
    """Over steps of two micro-batches, a new shape among them: the same losses and forms."""
    others = torch.randint(0, 128, (2, 200), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    teacher = Qwen3ForCausalLM(Qwen3Config(vocab_size=128, num_hidden_layers=2, head_dim=64, **sizes)).cuda().eval()
    adapter = adapter_for(teacher.config)
    config = student_config(adapter, adapter.blank_masks)
    forms = head_forms_of(teacher, torch.arange(64).view(1, -1), config)
    records = []

    class Watched(Replayed):
        def _record(self, *args):
            records.append(super()._record(*args))
            return records[-1]

    def run(is_recorded: bool) -> tuple[list[dict], dict[str, torch.Tensor]]:
        metrics = []
        monkeypatch.setattr(loop, "Replayed", Watched)
        monkeypatch.setattr(Watched, "serves", staticmethod(lambda _: is_recorded))

        def micro_batches(step: int) -> list[Batch]:
            rows = others if step == 5 else ids
            return [Batch(each.view(1, -1).roll(step, 1), torch.ones(1, rows.shape[1])) for each in rows]

        trained = align(
            Accelerator(gradient_accumulation_steps=2),
            teacher,
            FittedHeads(config, forms),
            micro_batches,
            Schedule(9, 1e-4, 1e-5, 2),
            autocast=partial(torch.autocast, "cuda", torch.bfloat16),
            on_step=lambda _, found: metrics.append(found),
        )
        return metrics, trained

    (found, weights), (expected, others_weights) = run(True), run(False)
    assert records == [True, True]  # anew after the one step of another shape, which was over before it was recorded
    assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in expected], rel=1e-3)
    # Products round otherwise while they are recorded, of which Adam makes 0.3% of a weight that began at zero.
    errors = {name: relative_error(weights[name], others_weights[name]) for name in weights}
    assert {name: error for name, error in errors.items() if error > 5e-3} == {}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("view", ["all logits", "likeliest tokens", "no teacher"])
def test_compiled_losses_equal_those_of_the_cpu(view, temperature):
    """In losses and gradients, over two chunks."""
    generator = torch.Generator().manual_seed(3)
    states, teachers = torch.randn(2, 160, 32, generator=generator)
    head = torch.randn(500, 32, generator=generator)
    labels, weights = torch.randint(0, 500, (160,), generator=generator), torch.rand(160, generator=generator)

    def losses(device: str) -> list[torch.Tensor]:
        inputs = [each.to(device).requires_grad_(True) for each in (states, head)]
        teacher = teacher_chunks(teachers.to(device), inputs[1].detach(), temperature)
        if view == "likeliest tokens":
            likeliest = teacher(slice(None))[0].log_softmax(-1).topk(7)

            def teacher(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
                return likeliest.values[part], likeliest.indices[part]

        rest = (labels.to(device), weights.to(device), None if view == "no teacher" else teacher)
        loss, sums = distillation_loss(*inputs, *rest, 0.7, 0.3, temperature, chunk_tokens=80)
        loss.backward()
        return [loss, sums, *(each.grad for each in inputs)]

    for found, expected in zip(losses("cuda"), losses("cpu")):
        assert relative_error(found, expected) < 1e-4


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


def test_packed_rows_have_the_gradients_of_their_sequences_alone(models, ids):
    _, gpu = models
    rows, lengths = ids[:1].cuda(), (7, 100, 1, 192)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).cuda()
    gpu(rows, position_ids=positions, use_cache=False).logits.square().sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in gpu.named_parameters()}
    gpu.zero_grad()
    for part in rows.split(lengths, dim=1):
        gpu(part, use_cache=False).logits.square().sum().backward()
    for name, parameter in gpu.named_parameters():
        if parameter.grad.norm() > 1e-6 and not name.endswith("A_log"):
            assert relative_error(packed[name], parameter.grad) < 2e-2, name
    gpu.zero_grad()


def test_prefill_and_steps_equal_one_forward(models, ids):
    _, gpu = models
    rows = ids.cuda()
    with torch.no_grad():
        whole = gpu(rows, use_cache=False).logits
        output = gpu(rows[:, :280], use_cache=True)
        parts = [output.logits]
        for index in range(280, 300):
            output = gpu(rows[:, index : index + 1], cache=getattr(output, modeling_hydrahead.CACHE), use_cache=True)
            parts.append(output.logits)
    assert relative_error(torch.cat(parts, dim=1), whole) < 5e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_chunks_of_a_prompt_equal_one_forward(models, ids, dtype, tolerance):
    """In fp32 by PyTorch's memory-efficient kernel, in bf16 by its flash attention; neither is given a mask."""
    _, gpu = models
    model, rows = copy.deepcopy(gpu).to(dtype), ids.cuda()
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(rows, use_cache=False).logits
        for part in rows.split([100, 120, 3, 77], dim=1):
            parts.append(model(part, use_cache=True, **{modeling_hydrahead.CACHE: cache}).logits)
    assert relative_error(torch.cat(parts, dim=1), whole) < tolerance


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
    dynamic = gpu.generate(prompt, max_new_tokens=8, do_sample=False, cache_implementation="dynamic")
    static = gpu.generate(
        prompt, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert dynamic.tolist() == static.tolist()


def counted_recordings(monkeypatch) -> list:
    """What `record` gives, of recordings that do not fail."""
    graphs, record = [], modeling_hydrahead.record

    def counted(*arguments):
        graphs.append(record(*arguments))
        return graphs[-1]

    monkeypatch.setattr(modeling_hydrahead, "record", counted)
    return graphs


def test_a_recorded_step_generates_the_same(models, ids, monkeypatch):
    """What `generate` does where nobody says anything of caches: a graph of the eager step, of padded rows too."""
    _, gpu = models
    graphs = counted_recordings(monkeypatch)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :20] = 0
    for rows, options in ((ids[:1, :50], {}), (ids[:, :50], {"attention_mask": mask.cuda()})):
        options |= {"max_new_tokens": 14, "do_sample": False}
        growing = gpu.generate(rows.cuda(), cache_implementation="dynamic", **options)
        for _ in range(2):
            assert gpu.generate(rows.cuda(), **options).tolist() == growing.tolist()
    assert len(graphs) == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_is_recorded_on_the_gpu_of_its_model(models, ids, monkeypatch):
    graphs = counted_recordings(monkeypatch)
    there = copy.deepcopy(models[1]).to("cuda:1")
    options = {"max_new_tokens": 14, "do_sample": False}
    growing = there.generate(ids[:1, :50].to("cuda:1"), cache_implementation="dynamic", **options)
    assert there.generate(ids[:1, :50].to("cuda:1"), **options).tolist() == growing.tolist() and len(graphs) == 1


def test_a_step_that_waits_for_the_gpu_is_not_recorded(models, ids, monkeypatch):
    _, gpu = models
    attend = modeling_hydrahead.attend_to_cache

    def waiting(*args):
        torch.cuda.current_stream().synchronize()
        return attend(*args)

    graphs, stream = counted_recordings(monkeypatch), torch.cuda.current_stream()
    options = {"max_new_tokens": 14, "do_sample": False}
    prompt = ids[:1, :50].cuda()
    growing = gpu.generate(prompt, cache_implementation="dynamic", **options)
    with monkeypatch.context() as patched:
        patched.setattr(modeling_hydrahead, "attend_to_cache", waiting)
        assert gpu.generate(prompt, **options).tolist() == growing.tolist()
    assert not graphs and not gpu.can_be_recorded and torch.cuda.current_stream() == stream
    del gpu.can_be_recorded
    assert gpu.generate(prompt, **options).tolist() == growing.tolist() and len(graphs) == 1


def test_recordings_leave_no_memory_behind(models, ids):
    _, gpu = models
    held = []
    for _ in range(8):
        gpu.generate(ids[:1, :50].cuda(), max_new_tokens=8, do_sample=False)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[1]


def test_a_compiled_step_generates_the_same(models, ids):
    """What `generate` compiles by itself for a static cache: one graph, replayed for every token."""
    _, gpu = models
    prompt = ids[:, :50].cuda()
    dynamic = gpu.generate(prompt, max_new_tokens=14, do_sample=False, cache_implementation="dynamic")
    compiled = gpu.generate(
        prompt,
        max_new_tokens=14,
        do_sample=False,
        cache_implementation="static",
        compile_config=CompileConfig(fullgraph=True),
    )
    assert dynamic.tolist() == compiled.tolist()


@pytest.mark.parametrize("length", [4096, 4099])  # in pieces or not
def test_a_step_of_attention_against_fp64(length):
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, 3, 2, 128, generator=generator, device="cuda").bfloat16()
    key, value = torch.randn(2, 2, 3, length, 128, generator=generator, device="cuda").bfloat16()
    mask = torch.rand(2, 1, 1, length, generator=generator, device="cuda") < 0.7
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), mask)
    with torch.no_grad():
        for attend in (ops_hydrahead.attend_to_cache, torch.compile(ops_hydrahead.attend_to_cache, fullgraph=True)):
            assert relative_error(attend(query, key, value, mask), exact) < 1e-2


def test_a_step_runs_on_one_shape_of_fla_whatever_the_heads(models, ids, monkeypatch):
    """Layers of 5, 8, 0 and 6 linear heads: one row of one head to the kernels, else each number is tuned anew."""
    _, gpu = models
    kernel, shapes = ops_hydrahead.chunk_gated_delta_rule, set()

    def watched(query, *args, **kwargs):
        shapes.add((query.shape[0], query.shape[2]))
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(ops_hydrahead, "chunk_gated_delta_rule", watched)
    with torch.no_grad():
        gpu(ids.cuda(), use_cache=False)
    assert shapes == {(1, 1)}


def test_compiled_forward_equals_eager(models, ids):
    _, gpu = models
    rows = ids.cuda()
    with torch.no_grad():
        eager = gpu(rows, use_cache=False).logits
        positions = torch.arange(rows.shape[1], device="cuda")[None]
        compiled = torch.compile(gpu)(rows, position_ids=positions, use_cache=False).logits
    assert relative_error(compiled, eager) < 5e-3
