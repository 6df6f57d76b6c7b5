"""Losses against their plain form, and that the two stages train what they should."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hydrahead.convert.migration import convert_model, head_forms_of, student_config
from hydrahead.convert.teachers import adapter_for
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, MIXED, make_teacher, random_ids
from hydrahead.training.align import HeadForms, align_heads, teacher_heads
from hydrahead.training.distill import distill
from hydrahead.training.loop import Schedule
from hydrahead.training.losses import distillation_loss, teacher_chunks


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


def same_batch(step: int) -> list[torch.Tensor]:
    """Every step reads the same rows: what is learnt shows in the loss."""
    return [random_ids(2, 24), torch.ones(2, 24)]


def test_the_schedule_warms_up_and_decays():
    schedule = Schedule(steps=100, learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10)
    assert schedule.learning_rate_at(0) == pytest.approx(0.1)
    assert schedule.learning_rate_at(10) == pytest.approx(1.0)
    assert schedule.learning_rate_at(99) == pytest.approx(0.1)


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-tied", "phi3"])
def test_alignment_brings_both_forms_of_all_heads_closer_and_moves_every_parameter(family):
    teacher = make_teacher(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = student_config(adapter_for(teacher.config), ALL_LINEAR)
    start = head_forms_of(teacher, random_ids(2, 24), config)
    seen = []
    forms = align_heads(
        Accelerator(cpu=True),
        teacher,
        config,
        start,
        same_batch,
        Schedule(25, 3e-3, 3e-3, warmup_steps=1),
        on_step=lambda _, metrics: seen.append(metrics),
    )
    assert seen[-1]["linear_loss"] < 0.8 * seen[0]["linear_loss"]
    assert seen[-1]["full_loss"] < 0.9 * seen[0]["full_loss"]
    assert forms.keys() == start.keys()
    unmoved = [name for name in forms if torch.equal(forms[name], start[name])]
    assert not unmoved
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_aligned_layers_read_what_the_student_of_one_kind_reads():
    """The loss compares what a student with these forms computes: same heads, same input, same positions."""
    teacher = make_teacher("qwen3-tied")
    config = student_config(adapter_for(teacher.config), ALL_LINEAR)
    forms = head_forms_of(teacher, random_ids(2, 24), config)
    module, ids = HeadForms(config, forms), random_ids(2, 20)
    states, target = teacher_heads(teacher, ids)[0]
    for branch, masks in (("linear", ALL_LINEAR), ("full", ALL_FULL)):
        student = convert_model(teacher, masks, head_forms=forms)
        _, heads = teacher_heads(student, ids)[0]
        trained = module.branches[branch][0].head_outputs(states, **module.positions(states))
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
        same_batch,
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
        distill(Accelerator(cpu=True), teacher, student, same_batch, Schedule(2, 1e-3, 1e-3))
