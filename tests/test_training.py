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
from hydrahead.training.losses import distillation_loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [3, 8, 100])
def test_chunked_distillation_equals_the_plain_one_in_value_and_gradient(chunk_tokens, temperature):
    torch.manual_seed(0)
    states = [torch.randn(2, 5, 8, requires_grad=index == 0) for index in range(2)]
    heads = [torch.nn.Linear(8, 11, bias=False) for _ in range(2)]
    labels, weights = torch.randint(0, 11, (2, 5)), torch.rand(2, 5)
    kl, ce = distillation_loss(
        states[0], heads[0], states[1], heads[1], labels, weights, temperature, chunk_tokens=chunk_tokens
    )
    (kl + 0.3 * ce).backward()
    found = [states[0].grad.clone(), heads[0].weight.grad.clone()]
    assert heads[1].weight.grad is None
    states[0].grad = heads[0].weight.grad = None

    student, teacher = (head(state) for head, state in zip(heads, states))
    log_p, log_q = (F.log_softmax(logits / temperature, -1) for logits in (teacher.detach(), student))
    plain_kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum() / weights.sum() * temperature**2
    plain_ce = (F.cross_entropy(student.transpose(1, 2), labels, reduction="none") * weights).sum() / weights.sum()
    (plain_kl + 0.3 * plain_ce).backward()
    for one, other in zip((kl, ce, *found), (plain_kl, plain_ce, states[0].grad, heads[0].weight.grad)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


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
