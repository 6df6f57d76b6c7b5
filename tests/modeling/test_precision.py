"""bf16, autocast and what stays in fp32."""

import pytest
import torch
from transformers import DynamicCache
from transformers.quantizers.quantizers_utils import should_convert_module

from hydrahead import HydraHeadForCausalLM, modeling_hydrahead
from hydrahead.convert.migration import convert_model
from hydrahead.tests.families import LAYERS, MIXED, bf16_teacher, make_student, make_teacher, random_ids
from hydrahead.tests.modeling.checks import MASKS, NO_END, feed


def bf16_error(model: torch.nn.Module, low: torch.nn.Module, ids: torch.Tensor) -> float:
    """Relative error of a model's logits in bf16 against itself in fp32."""
    exact = model(ids).logits
    return ((low(ids).logits.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-untied", "llama3-tied", "phi3"])
@pytest.mark.parametrize("fusion", ["scale", "gate", "concat"])
def test_bf16_costs_a_student_no_more_than_its_teacher(family, fusion, tmp_path):
    """The error depends on the weights, so the teacher's is the measure; 1.5 for the roundings that differ."""
    teacher, ids = make_teacher(family), random_ids(4, 60)
    student = convert_model(teacher, MIXED, calibration_ids=random_ids(4, 60, 1), fusion=fusion)
    student.save_pretrained(tmp_path / "student")
    low = HydraHeadForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    student_error = bf16_error(student, low, ids)
    teacher_error = bf16_error(teacher, bf16_teacher(family, tmp_path / "teacher"), ids)
    print(f"bf16 {family} {fusion}: student {student_error:.4f}, teacher {teacher_error:.4f}")
    assert student_error <= 1.5 * teacher_error, (student_error, teacher_error)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
def test_training_under_autocast_keeps_fp32_weights_and_finite_gradients(masks):
    student, ids = make_student(head_masks=masks, fusion="gate").train(), random_ids(2, 70)
    exact = student(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            assert student.generate(ids[:, :5], max_new_tokens=4, **NO_END).shape == (2, 9)
    # bf16 has 8 bits: 4e-3 for one rounding, a few of which add up in a loss that averages 138 tokens.
    assert (loss - exact).abs() <= 0.02 * exact.abs()
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("position", ["nope", "rope"])
def test_kernels_get_the_dtype_that_the_projections_gave_under_autocast(position, monkeypatch):
    """fp32 norms, convolution and rotations would promote q and k, and the recurrence would run in fp32."""
    student, ids = make_student(full_attention_position=position), random_ids(2, 9)
    seen = {"linear": set(), "full": set()}
    rule = modeling_hydrahead.gated_delta_rule

    def watched_rule(query, key, value, g, beta, *more):
        seen["linear"] |= {query.dtype, key.dtype, value.dtype}
        assert g.dtype == beta.dtype == torch.float32
        return rule(query, key, value, g, beta, *more)

    monkeypatch.setattr(modeling_hydrahead, "gated_delta_rule", watched_rule)
    for layer in student.model.layers:
        for block in [*layer.self_attn.full_attention.blocks, layer.self_attn.full_attention.whole]:
            block.register_forward_pre_hook(lambda _, args: seen["full"].update(each.dtype for each in args[:3]))
    cache = DynamicCache(config=student.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(ids, cache=cache, use_cache=True).logits.sum().backward()
    assert seen == {"linear": {torch.bfloat16}, "full": {torch.bfloat16}}
    assert all(layer.keys.dtype == layer.conv_states[0].dtype == torch.bfloat16 for layer in cache.layers)


def test_quantizers_leave_gates_and_the_fusion_alone():
    """Both ways in which transformers asks: by the name of a module, and (torchao) by the name of a parameter."""
    student = make_student(fusion="gate")
    linear = {name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {name for name in linear if ".gates." in name or ".fusion." in name}
    assert len(kept) == 3 * LAYERS
    for suffix in ("", ".weight"):
        converted = {name for name in linear if should_convert_module(name + suffix, student._keep_in_fp32_modules)}
        assert converted == linear - kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", ["scale", "gate"])
def test_gates_and_fusion_stay_fp32_when_loaded_in_half_precision(dtype, fusion, tmp_path):
    make_student(fusion=fusion).save_pretrained(tmp_path)
    student = HydraHeadForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in student.named_parameters():
        fp32 = ".gates." in name or ".fusion." in name
        assert parameter.dtype == (torch.float32 if fp32 else dtype), name
    assert student(random_ids(2, 9)).logits.dtype == dtype
    output = student.generate(random_ids(2, 5), max_new_tokens=4, **NO_END)
    assert output.shape == (2, 9)


@pytest.mark.parametrize("masks", MASKS)
def test_the_recurrent_state_is_fp32_in_a_bf16_model(masks, tmp_path):
    make_student(head_masks=masks).save_pretrained(tmp_path)
    student = HydraHeadForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cache = DynamicCache(config=student.config)
    feed(student, random_ids(2, 9), [5, 1, 1, 1], cache)
    for layer in cache.layers:
        assert all(t.dtype == torch.float32 for t in getattr(layer, "recurrent_states", {}).values() if t is not None)


def test_no_parameter_is_a_scalar():
    """FSDP2 cannot shard one."""
    student = make_student(fusion="gate", attention_bias=True, attention_output_bias=True)
    assert all(parameter.ndim >= 1 for parameter in student.parameters())
