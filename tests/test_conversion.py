"""Conversion: equal to the teacher where nothing is converted, calibrated where something is, careful throughout."""

import json
import pathlib

import pytest
import torch
from transformers import (
    PreTrainedModel,
)

from hydrahead import HydraHeadForCausalLM
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import read_attention
from hydrahead.convert.migration import convert_model
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import adapter_for
from hydrahead.tests.families import (
    ALL_FULL,
    ALL_LINEAR,
    ANCHOR,
    ANCHOR_TOLERANCE,
    CALIBRATION,
    FAMILIES,
    HEADS,
    MIXED,
    NATIVE_LENGTH,
    bf16_teacher,
    head_inputs_of_o_proj,
    make_teacher,
    mask_examples,
    random_ids,
    same_weights,
)

pytestmark = pytest.mark.usefixtures("without_gradients")
SOURCES = {"memory": None, "folder": "50GB", "sharded": "40KB"}


@pytest.fixture
def gradients(without_gradients):
    with torch.enable_grad():
        yield


def as_source(teacher: PreTrainedModel, source: str, folder):
    """The teacher itself, or its folder with one or many safetensors files."""
    if SOURCES[source] is None:
        return teacher
    teacher.save_pretrained(folder, max_shard_size=SOURCES[source])
    assert (folder / "model.safetensors.index.json").is_file() is (source == "sharded")
    return folder


# ------------------------------------------------------------------------------------------ nothing converted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", SOURCES)
def test_with_nothing_converted_the_student_is_the_teacher(family, source, tmp_path):
    teacher = make_teacher(family)
    student = convert_model(as_source(teacher, source, tmp_path / "teacher"), ALL_FULL, **ANCHOR)
    # Within and beyond the lengths at which rope scalings change their factors.
    for length in (10, NATIVE_LENGTH, NATIVE_LENGTH + 20):
        ids = random_ids(2, length)
        assert (student(ids).logits - teacher(ids).logits).abs().max() <= ANCHOR_TOLERANCE
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    ids = random_ids(2, 20)
    output = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(output, teacher.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_teacher_is_taken_over_once(family, tmp_path):
    """No more and no fewer numbers: an anchor could not see a weight that happens to be neutral."""
    teacher = make_teacher(family)
    student = convert_model(teacher, ALL_FULL, **ANCHOR)
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in teacher.parameters())
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is teacher.config.tie_word_embeddings


def test_the_anchor_holds_for_a_phi3_as_published(tmp_path):
    """Its config.json says `rope_scaling` and `rope_theta`, and the original length beside them."""
    teacher, ids = make_teacher("phi3-longrope"), random_ids(2, 40)
    teacher.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    factors = {name: rope[name] for name in ("short_factor", "long_factor")}
    fields |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "longrope", **factors}}
    assert fields["original_max_position_embeddings"] == 16
    (tmp_path / "config.json").write_text(json.dumps(fields))
    student = convert_model(tmp_path, ALL_FULL, **ANCHOR)
    assert (student(ids).logits - teacher(ids).logits).abs().max() <= ANCHOR_TOLERANCE
    assert (student(ids[:, :10]).logits - teacher(ids[:, :10]).logits).abs().max() <= ANCHOR_TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 3, HEADS])
def test_the_anchor_holds_for_any_group_size(kv_heads):
    teacher, ids = make_teacher("llama3-tied", num_key_value_heads=kv_heads), random_ids(2, 20)
    student = convert_model(teacher, ALL_FULL, **ANCHOR)
    assert (student(ids).logits - teacher(ids).logits).abs().max() <= ANCHOR_TOLERANCE


def test_a_teacher_with_yarn_is_taken_over_with_it(tmp_path):
    """Which the user wrote into its config (docs/training.md), beyond the length that it was made for too."""
    teacher, ids = make_teacher("qwen3-tied"), random_ids(2, 3 * NATIVE_LENGTH)
    native = teacher.config.max_position_embeddings
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": native}
    teacher.config.rope_parameters = teacher.config.rope_parameters | yarn
    teacher.config.max_position_embeddings = 4 * native
    teacher.save_pretrained(tmp_path)
    scaled = type(teacher).from_pretrained(tmp_path).eval()
    assert (scaled(ids).logits - make_teacher("qwen3-tied")(ids).logits).abs().max() > 0.1
    student = convert_model(tmp_path, ALL_FULL, **ANCHOR)
    assert student.config.max_position_embeddings == 4 * native and student.config.rope_parameters["factor"] == 4
    assert (student(ids).logits - scaled(ids).logits).abs().max() <= ANCHOR_TOLERANCE
    mixed = convert_model(tmp_path, MIXED, calibration_ids=CALIBRATION, **ANCHOR)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    output = mixed.generate(ids, **options)
    assert torch.equal(output, mixed.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-untied", "phi3"])
def test_the_anchor_holds_in_bf16(family, tmp_path):
    """Not only to a tolerance: the student makes the same roundings in the same places."""
    teacher, ids = bf16_teacher(family, tmp_path), random_ids(2, 20)
    student = convert_model(teacher, ALL_FULL, **ANCHOR)
    assert student.dtype == torch.bfloat16
    assert torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("prompt", [10, 16, 17])
@pytest.mark.parametrize("masks", [ALL_FULL, MIXED])
def test_generation_goes_on_where_longrope_changes_its_frequencies(masks, prompt):
    """At the original length (16) all rotations change, and with them what is cached, as in the teacher."""
    teacher, ids = make_teacher("phi3-longrope"), random_ids(2, prompt)
    student = convert_model(teacher, masks, calibration_ids=CALIBRATION, **ANCHOR)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    output = student.generate(ids, **options)
    assert torch.equal(output, student.generate(ids, use_cache=False, **options))
    if masks == ALL_FULL:
        assert torch.equal(output, teacher.generate(ids, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_heads_start_as_the_teachers_beside_linear_ones(family):
    """With the norm on linear heads only; the first layer, which reads the same input as the teacher's."""
    teacher, ids = make_teacher(family), random_ids(2, 30)
    options = {"full_attention_position": "rope", "full_attention_gate": True, "fusion_norm": "linear"}
    student = convert_model(teacher, MIXED, calibration_ids=CALIBRATION, **options)
    full = [head for head in range(HEADS) if MIXED[0][head]]
    ours, theirs = head_inputs_of_o_proj(student, ids)[0], head_inputs_of_o_proj(teacher, ids)[0]
    assert (ours[:, :, full] - theirs[:, :, full]).abs().max() <= ANCHOR_TOLERANCE
    linear = [head for head in range(HEADS) if not MIXED[0][head]]
    assert (ours[:, :, linear] - theirs[:, :, linear]).abs().max() > 0.1


@pytest.mark.parametrize("masks", mask_examples(2))
def test_conversion_is_deterministic_and_the_same_from_memory_and_disk(masks, tmp_path):
    for family in ("qwen3-untied", "phi3"):
        teacher, students = make_teacher(family), []
        for source in SOURCES:
            torch.manual_seed(len(students))  # must not matter
            origin = as_source(teacher, source, tmp_path / family / source)
            students.append(convert_model(origin, masks, calibration_ids=CALIBRATION))
        assert all(same_weights(students[0], other) for other in students[1:])
        assert students[0].config.to_json_string() == students[1].config.to_json_string()


# ------------------------------------------------------------------------------------------------ head forms


def forms_of(teacher, *students):
    """The forms in students that together use each of them; NaN where none does."""
    shapes = head_forms_of(teacher, CALIBRATION, students[0].config)
    forms = {name: torch.full_like(form, torch.nan) for name, form in shapes.items()}
    for student in students:
        for layer, module in enumerate(student.model.layers):
            read_attention(forms, layer, student.config, module.self_attn.state_dict())
    return forms


@pytest.mark.parametrize("masks", mask_examples(2))
@pytest.mark.parametrize(
    "options", [{}, {"fusion": "gate", "full_attention_gate": False}, {"fusion_norm": "linear"}], ids=str
)
@pytest.mark.parametrize("family", ["qwen3-tied", "qwen2-untied"])
def test_forms_of_two_pure_students_make_any_mixed_one(family, options, masks):
    teacher = make_teacher(family)
    pure = [convert_model(teacher, kind, calibration_ids=CALIBRATION, **options) for kind in (ALL_LINEAR, ALL_FULL)]
    forms = forms_of(teacher, *pure)
    reassembled = convert_model(teacher, masks, head_forms=forms, **options)
    assert same_weights(reassembled, convert_model(teacher, masks, calibration_ids=CALIBRATION, **options))


@pytest.mark.parametrize("masks", mask_examples(2))
def test_trained_forms_arrive_at_their_heads(masks):
    """Every number different: what a head of the mixed student computes is what it computed in the pure one."""
    teacher, pure = make_teacher("qwen2-untied"), {}
    generator = torch.Generator().manual_seed(0)
    for kind, branch in ((ALL_LINEAR, "linear"), (ALL_FULL, "full")):
        pure[branch] = convert_model(teacher, kind, calibration_ids=CALIBRATION)
        for layer in pure[branch].model.layers:
            for name, parameter in layer.self_attn.named_parameters():
                if "o_proj" not in name:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    student = convert_model(teacher, masks, head_forms=forms_of(teacher, *pure.values()))
    ids = random_ids(2, 20)
    mixed = head_inputs_of_o_proj(student, ids)[0]
    by_branch = {branch: head_inputs_of_o_proj(model, ids)[0] for branch, model in pure.items()}
    for head in range(HEADS):
        expected = by_branch["full" if masks[0][head] else "linear"][:, :, head]
        torch.testing.assert_close(mixed[:, :, head], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("aligned", "asked", "line"),
    [
        (
            {},
            {"full_attention_gate": False},
            "hold full.output_gate.weight, which full_attention_gate=False would drop",
        ),
        ({}, {"fusion": "concat"}, "hold linear.gamma, which fusion='concat' would drop"),
        ({"full_attention_gate": False}, {}, "lack full.output_gate.weight, which full_attention_gate=True needs"),
        ({"fusion": "concat"}, {}, "lack linear.gamma, which fusion='scale' needs"),
    ],
    ids=str,
)
def test_forms_are_not_converted_without_their_gates_and_scales(aligned, asked, line):
    teacher = make_teacher("qwen3-tied")
    config = student_config(adapter_for(teacher.config), ALL_LINEAR, **aligned)
    forms = head_forms_of(teacher, CALIBRATION, config)
    with pytest.raises(ValueError, match=rf"^head_forms {line}[^\n]*$"):
        convert_model(teacher, MIXED, head_forms=forms, **asked)
    convert_model(teacher, MIXED, head_forms=forms, **aligned)


def test_the_student_does_not_share_memory_with_the_forms():
    teacher = make_teacher("qwen3-tied")
    config = student_config(adapter_for(teacher.config), MIXED)
    forms = head_forms_of(teacher, CALIBRATION, config)
    copies = {name: tensor.clone() for name, tensor in forms.items()}
    for masks in (MIXED, ALL_LINEAR, ALL_FULL):
        for parameter in convert_model(teacher, masks, head_forms=forms).parameters():
            parameter.add_(1)
    assert all(torch.equal(forms[name], copies[name]) for name in copies)


# ---------------------------------------------------------------------------------------- the teacher is left alone


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masks", [MIXED, ALL_FULL])
def test_training_the_student_leaves_the_teacher_as_it_is(family, masks):
    teacher = make_teacher(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = convert_model(teacher, masks, calibration_ids=CALIBRATION)
    taken = {tensor.untyped_storage().data_ptr() for tensor in teacher.state_dict().values()}
    for name, parameter in student.named_parameters():
        storage = parameter.untyped_storage()
        # Nor with another weight of its own: copying or pickling one would take the other along.
        assert storage.data_ptr() not in taken and storage.nbytes() == parameter.nbytes, name
        taken.add(storage.data_ptr())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in student.parameters())
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student(CALIBRATION, labels=CALIBRATION).loss.backward()
    optimizer.step()
    student.generation_config.max_new_tokens = 3
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not teacher.training and teacher.generation_config.max_new_tokens is None


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").is_file(), reason="mapped files are listed in Linux' /proc")
@pytest.mark.parametrize("family", ["qwen3-tied", "phi3"])
def test_the_student_does_not_stand_on_the_teachers_file(family, tmp_path):
    """Weights mapped from the file would change, or crash the process, when somebody writes over it."""
    student = convert_model(as_source(make_teacher(family), "folder", tmp_path), MIXED, calibration_ids=CALIBRATION)
    assert student.num_parameters() and str(tmp_path) not in pathlib.Path("/proc/self/maps").read_text()


def test_generation_settings_are_taken_over(tmp_path):
    teacher = make_teacher("qwen3-tied")
    teacher.generation_config.temperature = 0.6
    teacher.generation_config.do_sample = True
    teacher.generation_config.eos_token_id = [2, 5]
    teacher.save_pretrained(tmp_path)
    for source in (teacher, tmp_path):
        settings = convert_model(source, ALL_FULL, **ANCHOR).generation_config
        assert (settings.temperature, settings.do_sample, settings.eos_token_id) == (0.6, True, [2, 5])


@pytest.mark.parametrize("source", ["memory", "folder"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_the_student_has_the_dtype_asked_for(source, dtype, tmp_path):
    teacher = bf16_teacher("qwen3-untied", tmp_path / "bf16")
    student = convert_model(
        as_source(teacher, source, tmp_path / "teacher"), MIXED, calibration_ids=CALIBRATION, dtype=dtype
    )
    expected = dtype or torch.bfloat16
    assert student.config.dtype == student.dtype == expected
    for name, parameter in student.named_parameters():
        fp32 = ".gates." in name or ".fusion." in name
        assert parameter.dtype == (torch.float32 if fp32 else expected), name
    assert not student.training
    student.save_pretrained(tmp_path / "student")
    assert same_weights(HydraHeadForCausalLM.from_pretrained(tmp_path / "student"), student)
