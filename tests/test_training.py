"""Losses against their plain form, and that the two stages train what they should."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, on_main_process
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hydrahead.convert.calibration import calibrated_forms, full_forms_are_teachers, head_forms_of
from hydrahead.convert.hooks import visit_heads
from hydrahead.convert.migration import convert_model
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import adapter_for, read_model
from hydrahead.data.batches import Batch
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, LAYERS, MIXED, make_student, make_teacher, random_ids
from hydrahead.training import teacher_cache
from hydrahead.training.align import FittedHeads, FittedLayers, align, align_heads, starting_forms, teacher_heads
from hydrahead.training.distill import read_teacher
from hydrahead.training.loop import Schedule
from hydrahead.training.losses import distillation_loss, teacher_chunks
from hydrahead.training.recipe import LoraSection
from hydrahead.training.student import StudentLoss, prepare_student, train_student
from hydrahead.training.teacher_cache import TeacherCache


def plain_distillation(states, heads, labels, weights, temperature):
    """KL and cross entropy from whole logits, as autograd differentiates them."""
    student, teacher = (head(state) for head, state in zip(heads, states))
    log_p, log_q = (F.log_softmax(logits / temperature, -1) for logits in (teacher.detach(), student))
    kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum() * temperature**2
    return kl, (F.cross_entropy(student, labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [3, 8, 100])
def test_chunked_distillation_equals_the_plain_one_in_value_and_gradient(chunk_tokens, temperature):
    torch.manual_seed(0)
    states = [torch.randn(10, 8, requires_grad=index == 0) for index in range(2)]
    heads = [torch.nn.Linear(8, 11, bias=False) for _ in range(2)]
    labels, weights = torch.randint(0, 11, (10,)), torch.rand(10)
    inputs = (states[0], heads[0].weight)
    kl, ce = plain_distillation(states, heads, labels, weights, temperature)
    expected = torch.autograd.grad(0.7 * kl + 0.3 * ce, inputs)

    teacher = teacher_chunks(states[1], heads[1].weight.detach(), temperature)
    loss, sums = distillation_loss(*inputs, labels, weights, teacher, 0.7, 0.3, temperature, chunk_tokens)
    found = torch.autograd.grad(2 * loss, inputs)
    torch.testing.assert_close(sums, torch.stack([kl, ce]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, 0.7 * kl + 0.3 * ce, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, 2 * other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 4, 11])
def test_distillation_on_the_likeliest_tokens_is_a_lower_bound_and_exact_for_all_of_them(top_k):
    torch.manual_seed(0)
    states = [torch.randn(10, 8, requires_grad=index == 0) for index in range(2)]
    heads = [torch.nn.Linear(8, 11, bias=False) for _ in range(2)]
    labels, weights = torch.randint(0, 11, (10,)), torch.rand(10)
    log_p = F.log_softmax(heads[1](states[1]), -1).detach()
    values, indices = log_p.topk(top_k)
    loss, sums = distillation_loss(
        states[0], heads[0].weight, labels, weights, lambda part: (values[part], indices[part]), 1.0, 0.0
    )
    kl, _ = plain_distillation(states, heads, labels, weights, 1.0)

    # What is computed from the definition: all other tokens as one event.
    log_q = F.log_softmax(heads[0](states[0]), -1)
    rest = [(1 - each.exp().gather(-1, indices).sum(-1)).clamp_min(1e-30) for each in (log_p, log_q)]
    kept = (values.exp() * (values - log_q.gather(-1, indices))).sum(-1)
    coarse = ((kept + (rest[0] * (rest[0] / rest[1]).log() if top_k < 11 else 0)) * weights).sum()
    torch.testing.assert_close(loss, coarse, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(coarse, (states[0], heads[0].weight))
    for one, other in zip(torch.autograd.grad(loss, (states[0], heads[0].weight)), expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert sums[0] <= kl + 1e-6
    if top_k == 11:
        torch.testing.assert_close(sums[0], kl, rtol=1e-6, atol=1e-6)


def test_a_teacher_cache_reads_logits_in_chunks_and_claims_no_row_before_its_data_is_on_disk(tmp_path, monkeypatch):
    """What a power failure leaves is what was flushed: tokens first, then what says that they are there."""
    monkeypatch.setattr(teacher_cache, "CHUNK_TOKENS", 8)
    logits = torch.randn(60, 11, generator=torch.Generator().manual_seed(0))
    log_p, asked, flushed = F.log_softmax(logits, -1), [], []

    def teacher(part: slice):
        asked.append(len(logits[part]))
        return logits[part], None

    def flush(self):
        name = Path(self.filename).name
        flushed.append((name, (tmp_path / "done.bin").read_bytes(), (tmp_path / name).read_bytes()))

    monkeypatch.setattr(np.memmap, "flush", flush)
    cache = TeacherCache(tmp_path, rows=5, length=20, top_k=4, vocab_size=11, settings={})
    samples = torch.tensor([4, 0, 2])
    chunk = cache.chunks(Batch(torch.ones(3, 21).long(), torch.ones(3, 21), samples=samples), lambda: teacher)
    values, indices = chunk(slice(0, 60))
    assert torch.equal(values, log_p.topk(4).values) and torch.equal(indices, log_p.topk(4).indices)
    assert max(asked) == 8 and sum(asked) == 60
    assert [name for name, *_ in flushed] == ["log_probs.bin", "indices.bin", "done.bin"]
    assert [done for _, done, _ in flushed] == [bytes(5), bytes(5), b"\1\0\1\0\1"]
    kept = np.frombuffer(flushed[0][2], "<f4").reshape(5, 20, 4)
    assert (kept[samples] == log_p.topk(4).values.view(3, 20, 4).numpy()).all()


def same_batch(step: int) -> list[torch.Tensor]:
    """Every step reads the same rows: what is learnt shows in the loss."""
    return [random_ids(2, 24), torch.ones(2, 24)]


def distill(accelerator, teacher, student, schedule, **options):
    """A student trained on its teacher's logits, and a little on the text, of the same rows."""
    train_student(
        accelerator,
        StudentLoss(student, kl_weight=1.0, ce_weight=0.1),
        lambda step: [Batch(*same_batch(step))],
        schedule,
        lambda batch: read_teacher(teacher, batch),
        **options,
    )
    return student.eval()


def test_the_schedule_warms_up_and_decays():
    schedule = Schedule(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)
    assert schedule.learning_rate_at(0) == pytest.approx(0.1)
    assert schedule.learning_rate_at(10) == pytest.approx(1.0)
    assert schedule.learning_rate_at(99) == pytest.approx(0.1)


def aligned(teacher, config, start: dict, steps: int) -> tuple[dict, list[dict]]:
    """Forms after some steps on the same rows, and the metrics of each step."""
    seen = []
    forms = align_heads(
        Accelerator(cpu=True),
        teacher,
        config,
        start,
        lambda step: same_batch(step)[0],
        Schedule(steps, 3e-3, 3e-3, warmup_steps=1),
        on_step=lambda _, metrics: seen.append(metrics),
    )
    return forms, seen


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-tied", "phi3"])
def test_alignment_brings_both_forms_of_all_heads_closer_and_moves_every_parameter(family):
    teacher = make_teacher(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = student_config(adapter_for(teacher.config), ALL_LINEAR)
    start = head_forms_of(teacher, random_ids(2, 24), config)
    forms, seen = aligned(teacher, config, start, 25)
    assert seen[-1]["linear_loss"] < 0.8 * seen[0]["linear_loss"]
    assert seen[-1]["full_loss"] < 0.9 * seen[0]["full_loss"]
    assert forms.keys() == start.keys()
    unmoved = [name for name in forms if torch.equal(forms[name], start[name])]
    assert not unmoved
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("options", [{"fusion": "concat"}, {"fusion_norm": "linear"}, {"fusion_norm": "all"}])
def test_alignment_leaves_full_forms_alone_that_are_the_teachers_heads(options):
    """With RoPE kept they are, unless the fusion normalises them too: then they are fitted."""
    teacher = make_teacher("qwen2-tied")
    config = student_config(adapter_for(teacher.config), ALL_LINEAR, full_attention_position="rope", **options)
    start = head_forms_of(teacher, random_ids(2, 24), config)
    forms, seen = aligned(teacher, config, start, 3)
    are_fitted = options.get("fusion_norm") == "all"
    assert forms.keys() == start.keys() and ("full_loss" in seen[0]) == are_fitted
    moved = {name.split(".")[1] for name in forms if not torch.equal(forms[name], start[name])}
    assert moved == ({"linear", "full"} if are_fitted else {"linear"})
    assert full_forms_are_teachers(adapter_for(teacher.config), read_model(teacher), forms, config) != are_fitted


def test_heads_are_measured_on_as_much_text_as_is_held_out(tmp_path):
    """Be it shorter than a row."""
    teacher = make_teacher("qwen3-tied")
    config, heldout = student_config(adapter_for(teacher.config), ALL_LINEAR), random_ids(1, 24)
    job = SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        folder=tmp_path,
        section=SimpleNamespace(calibration_tokens=128, length=32),
        data=SimpleNamespace(heldout=heldout[0].numpy()),
    )
    found, expected = starting_forms(job, teacher, config), calibrated_forms(teacher, heldout, config)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_aligned_layers_read_what_the_student_of_one_kind_reads():
    """The loss compares what a student with these forms computes: same heads, same input, same positions."""
    teacher = make_teacher("qwen3-tied")
    config = student_config(adapter_for(teacher.config), ALL_LINEAR)
    forms = head_forms_of(teacher, random_ids(2, 24), config)
    module, ids = FittedHeads(config, forms), random_ids(2, 20)
    states, target = teacher_heads(teacher, ids)[0]
    for branch, masks in (("linear", ALL_LINEAR), ("full", ALL_FULL)):
        student = convert_model(teacher, masks, head_forms=forms)
        _, heads = teacher_heads(student, ids)[0]
        trained = module.layers[0].branches[branch].head_outputs(states, **module.positions(states))
        torch.testing.assert_close(trained, heads, rtol=1e-5, atol=1e-5)
    assert target.shape == trained.shape


def test_distillation_lowers_the_divergence_and_moves_every_parameter():
    teacher = make_teacher("qwen3-tied")
    student = convert_model(teacher, MIXED, calibration_ids=random_ids(2, 24))
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    seen = []
    student = distill(
        Accelerator(cpu=True),
        teacher,
        student,
        Schedule(25, 3e-3, 3e-3, warmup_steps=1),
        on_step=lambda _, metrics: seen.append(metrics),
    )
    assert seen[-1]["kl"] < 0.7 * seen[0]["kl"]
    assert not [name for name, parameter in student.named_parameters() if torch.equal(parameter, start[name])]


def test_a_gradient_that_is_not_finite_stops_training_with_a_line():
    teacher = make_teacher("qwen3-tied")
    student = convert_model(teacher, MIXED, calibration_ids=random_ids(2, 24))
    with torch.no_grad():
        student.model.norm.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"^step 0: the gradient is not finite[^\n]*$"):
        distill(Accelerator(cpu=True), teacher, student, Schedule(2, 1e-3, 1e-3))


def test_the_gradient_of_alignment_is_that_of_the_sum_of_all_layers_losses():
    """Layer by layer in the teacher's forward pass, in two batches, against one graph over everything."""
    teacher = make_teacher("qwen3-tied")
    config = student_config(adapter_for(teacher.config), ALL_LINEAR)
    forms = head_forms_of(teacher, random_ids(2, 24), config)
    ids = random_ids(4, 16)
    plain = FittedHeads(config, forms)
    pairs = teacher_heads(teacher, ids)
    total = sum(plain(layer, states, heads).sum() for layer, (states, heads) in enumerate(pairs))
    expected = torch.autograd.grad(total, list(plain.parameters()))

    module, found = FittedHeads(config, forms), {}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    batches = [Batch(rows, torch.ones(rows.shape)) for rows in ids.split(2)]

    def keep_gradients(*_):
        found.update({name: parameter.grad.clone() for name, parameter in module.named_parameters()})

    hook = register_optimizer_step_pre_hook(keep_gradients)
    try:
        align(accelerator, teacher, module, lambda step: batches, Schedule(1, 1e-3, 1e-3, warmup_steps=1))
    finally:
        hook.remove()
    for (name, _), gradient in zip(plain.named_parameters(), expected):
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_alignment_keeps_nothing_of_a_layer_when_the_next_begins():
    """What makes its memory flat: when a layer is visited, what earlier ones read and wrote is gone."""
    teacher, seen = make_teacher("qwen3-tied", num_hidden_layers=4), []

    def visit(layer, states, heads):
        assert not any(each() is not None for each in seen)
        seen.extend([weakref.ref(heads), weakref.ref(heads.untyped_storage())])

    visit_heads(teacher, random_ids(2, 8), visit)
    assert len(seen) == 8


@pytest.mark.parametrize("masks", [MIXED, ALL_FULL, ALL_LINEAR], ids=["mixed", "full", "linear"])
def test_alignment_by_layers_fits_the_masked_student_and_nothing_else(masks):
    teacher = make_teacher("qwen3-tied")
    config = student_config(adapter_for(teacher.config), masks)
    start = head_forms_of(teacher, random_ids(2, 24), config)
    outputs = [layer.self_attn.o_proj.weight.detach() for layer in teacher.model.layers]
    module, seen = FittedLayers(config, start, outputs), []

    # It starts as the student's own attention, and its forms put back give that student.
    untrained = convert_model(teacher, masks, head_forms=module.forms())
    states, heads = teacher_heads(teacher, random_ids(2, 12))[0]
    expected = untrained.model.layers[0].self_attn(states, **module.positions(states))
    target = teacher.model.layers[0].self_attn.o_proj(heads.flatten(2))
    loss = (expected - target).pow(2).mean() / target.pow(2).mean()
    torch.testing.assert_close(module(0, states, heads).squeeze(), loss, rtol=1e-5, atol=1e-6)

    batch = Batch(random_ids(2, 24), torch.ones(2, 24))
    schedule = Schedule(25, 3e-3, 3e-3, warmup_steps=1)
    align(Accelerator(cpu=True), teacher, module, lambda step: [batch], schedule, on_step=lambda _, m: seen.append(m))
    assert seen[-1]["layer_loss"] < 0.8 * seen[0]["layer_loss"]
    assert len(seen[-1]["layers"]) == LAYERS
    forms = module.forms()
    assert all(torch.equal(weight, output) for weight, output in zip(module.output_weights, outputs))
    for layer, mask in enumerate(masks):
        for branch, chosen in (("linear", 0), ("full", 1)):
            name = f"{layer}.{branch}.q_proj.weight"
            moved = [not torch.equal(one, other) for one, other in zip(forms[name], start[name])]
            assert moved == [kept == chosen for kept in mask]


def test_after_twenty_steps_all_that_is_trained_has_moved_and_nothing_else():
    """Adapters on attention with the fusion trained whole: γ moves, gates and decay, frozen here, do not."""
    teacher = make_teacher("qwen3-tied")
    frozen_teacher = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for lora in (None, LoraSection(r=2, target_modules=["q_proj", "v_proj"])):
        student = convert_model(teacher, MIXED, calibration_ids=random_ids(2, 24))
        merge = prepare_student(student, lora, checkpointing=True)
        before = {name: tensor.detach().clone() for name, tensor in student.named_parameters()}
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        distill(Accelerator(cpu=True), teacher, student, Schedule(20, 1e-2, 1e-2, warmup_steps=1))
        moved = {name for name, tensor in student.named_parameters() if not torch.equal(tensor, before[name])}
        assert moved == trained
        if lora is None:
            assert moved == set(before)
            for part in ("A_log", "dt_bias", "b_proj.bias", "fusion.weight", "output_gate", "short_conv"):
                assert any(part in name for name in moved)
        else:
            assert all("lora_" in name or "fusion" in name for name in moved)
            assert any("fusion" in name for name in moved)
            merged = merge()
            assert set(merged.state_dict()) == set(convert_model(teacher, MIXED).state_dict())
    assert all(torch.equal(tensor, frozen_teacher[name]) for name, tensor in teacher.state_dict().items())


def test_autocast_leaves_masters_and_gates_in_fp32():
    """bf16 in the projections, fp32 in weights, gradients, gates and decay."""
    teacher = make_teacher("qwen3-tied")
    student = convert_model(teacher, MIXED, calibration_ids=random_ids(2, 24)).train()
    seen = {}
    gates = student.model.layers[0].self_attn.linear_attention.gates
    gates.register_forward_hook(lambda _, __, output: seen.update(gates=[each.dtype for each in output]))
    projection = student.model.layers[0].self_attn.linear_attention.q_proj
    projection.register_forward_hook(lambda _, __, output: seen.update(projection=output.dtype))
    batch = Batch(*same_batch(0))
    train_student(
        Accelerator(cpu=True),
        StudentLoss(student),
        lambda step: [batch],
        Schedule(2, 1e-3, 1e-3, warmup_steps=1),
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
    )
    assert seen == {"gates": [torch.float32] * 2, "projection": torch.bfloat16}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_packed_documents_are_trained_as_if_they_stood_alone():
    """Two documents in one row with restarting positions, against two rows."""
    student = make_student().train()
    ids = random_ids(1, 17)
    first, second = ids[:, :9], ids[:, 8:]
    weights = torch.ones(1, 17)
    weights[:, 0] = 0
    positions = torch.cat([torch.arange(8), torch.arange(8)]).unsqueeze(0)
    packed, _ = StudentLoss(student)(Batch(ids, weights, positions))
    apart = sum(StudentLoss(student)(Batch(rows, weights[:, :9]))[0] for rows in (first, second))
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)


class ListTracker(GeneralTracker):
    """Keeps what it is told."""

    name = "list"
    requires_logging_directory = False

    @on_main_process
    def __init__(self):
        super().__init__()
        self.told = []

    @property
    def tracker(self):
        return self.told

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.told.append((step, values))


def test_every_step_reaches_the_tracker():
    teacher = make_teacher("qwen3-tied")
    student = convert_model(teacher, MIXED, calibration_ids=random_ids(2, 24))
    tracker = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("distill")
    distill(accelerator, teacher, student, Schedule(3, 1e-3, 1e-3, warmup_steps=1))
    assert [step for step, _ in tracker.told] == [0, 1, 2]
    assert {"loss", "kl", "ce", "grad_norm", "tokens_per_second", "memory_gb"} <= tracker.told[0][1].keys()
