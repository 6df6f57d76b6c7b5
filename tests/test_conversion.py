"""Conversion: equal to the teacher where nothing is converted, calibrated where something is, careful throughout."""

import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    T5Config,
)

from hydrahead import HydraHeadForCausalLM, loading
from hydrahead.convert import calibration, migration, teachers
from hydrahead.convert.calibration import head_forms_of, measure_heads
from hydrahead.convert.forms import read_attention
from hydrahead.convert.migration import convert_model
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import ADAPTERS, adapter_for, read_model
from hydrahead.hub.checkpoint import save_checkpoint
from hydrahead.tests.families import (
    ALL_FULL,
    ALL_LINEAR,
    ANCHOR,
    FAMILIES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    MIXED,
    NATIVE_LENGTH,
    SIZES,
    bf16_teacher,
    make_teacher,
    mask_examples,
    random_ids,
)

# Same operations in the same order: the difference is 0 where measured. The house promises 1e-5 in fp32.
ANCHOR_TOLERANCE = 1e-5
CALIBRATION = random_ids(4, 100, seed=1)
SOURCES = {"memory": None, "folder": "50GB", "sharded": "40KB"}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def gradients(_without_gradients):
    with torch.enable_grad():
        yield


def as_source(teacher: PreTrainedModel, source: str, folder):
    """The teacher itself, or its folder with one or many safetensors files."""
    if SOURCES[source] is None:
        return teacher
    teacher.save_pretrained(folder, max_shard_size=SOURCES[source])
    assert (folder / "model.safetensors.index.json").is_file() is (source == "sharded")
    return folder


def same_weights(one: HydraHeadForCausalLM, other: HydraHeadForCausalLM) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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


def head_inputs_of_o_proj(model, ids) -> list[torch.Tensor]:
    """What each layer's output projection reads, `[B, T, H, d]`."""
    seen, hooks = [], []
    for layer in model.model.layers:
        hooks.append(
            layer.self_attn.o_proj.register_forward_pre_hook(
                lambda module, inputs: seen.append(inputs[0].unflatten(-1, (HEADS, HEAD_DIM)))
            )
        )
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


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


# ---------------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("family", ["qwen3-untied", "llama-bias", "phi3"])
def test_head_statistics_are_those_of_the_teachers_own_attention(family):
    """RMS over several rows; distance and entropy by a loop over the attention weights that transformers gives out."""
    teacher = make_teacher(family)
    adapter, read = adapter_for(teacher.config), read_model(teacher)
    measured = measure_heads(adapter, read, CALIBRATION)
    for layer, heads in enumerate(head_inputs_of_o_proj(teacher, CALIBRATION)):
        torch.testing.assert_close(measured.rms[layer], heads.pow(2).mean((0, 1, 3)).sqrt(), rtol=1e-4, atol=0)

    rows, length = CALIBRATION[:2, :30], 30
    teacher.set_attn_implementation("eager")
    measured = measure_heads(adapter, read, rows)
    for layer, weights in enumerate(teacher(rows, output_attentions=True).attentions):
        for head in range(HEADS):
            distances, entropies = [], []
            for row in weights[:, head].tolist():
                for t in range(length):
                    distances.append(sum(row[t][s] * (t - s) for s in range(t + 1)))
                    if t:  # the first token has no choice
                        entropy = -sum(w * math.log(w) for w in row[t][: t + 1] if w > 0)
                        entropies.append(entropy / math.log(t + 1))
            assert math.isclose(measured.distance[layer, head], sum(distances) / len(distances), rel_tol=1e-4)
            assert math.isclose(measured.entropy[layer, head], sum(entropies) / len(entropies), rel_tol=1e-4)


class ProductDevices(TorchDispatchMode):
    """Notes the devices that matrix products and softmax run on."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "_softmax"):
            self.found.add(result.device.type)
        return result


def test_heads_are_measured_on_the_device_that_is_asked_for():
    """A device that holds no numbers stands for a GPU: everything is computed there, and only then brought back."""
    teacher, devices = make_teacher("qwen3-tied"), ProductDevices()
    with devices, pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        measure_heads(adapter_for(teacher.config), read_model(teacher), CALIBRATION, "meta")
    assert devices.found == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_heads_measured_on_a_gpu_are_those_measured_on_a_cpu():
    teacher = make_teacher("qwen3-tied")
    adapter, read = adapter_for(teacher.config), read_model(teacher)
    for name, found in vars(measure_heads(adapter, read, CALIBRATION, "cuda")).items():
        expected = getattr(measure_heads(adapter, read, CALIBRATION), name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_teachers_device_decides_where_its_heads_are_measured(tmp_path, monkeypatch):
    """That where it takes its inputs; for a folder an accelerator, if there is one."""
    asked, teacher = [], make_teacher("qwen3-tied")
    teacher.save_pretrained(tmp_path)

    def measure(adapter, read, ids, device="cpu"):
        asked.append(str(device))
        return measure_heads(adapter, read, ids)

    for module in (calibration, migration):
        monkeypatch.setattr(module, "measure_heads", measure)
    convert_model(teacher, MIXED, calibration_ids=CALIBRATION)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    convert_model(str(tmp_path), MIXED, calibration_ids=CALIBRATION)
    for module in (calibration, migration):
        monkeypatch.setattr(module, "input_device", lambda model: torch.device("cuda:1"))
    convert_model(teacher, MIXED, calibration_ids=CALIBRATION)
    head_forms_of(teacher, CALIBRATION, student_config(adapter_for(teacher.config), MIXED))
    assert asked == ["cpu", "cuda", "cuda:1", "cuda:1"]


def test_an_off_loaded_teacher_is_measured_as_any_other(tmp_path):
    teacher = make_teacher("qwen3-tied")
    expected = convert_model(teacher, MIXED, calibration_ids=CALIBRATION)
    teacher.save_pretrained(tmp_path / "teacher")
    places = {"model.layers.0": "disk", "model.norm": "disk"}
    places |= dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.rotary_emb", "lm_head"), "cpu")
    teacher = type(teacher).from_pretrained(tmp_path / "teacher", device_map=places, offload_folder=tmp_path / "off")
    assert teacher.model.layers[0].self_attn.q_proj.weight.is_meta
    assert same_weights(convert_model(teacher, MIXED, calibration_ids=CALIBRATION), expected)


# The norm's epsilon takes its share of a head whose output is near zero at some tokens: up to 3e-3 of the RMS here,
# hence 5e-3.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fusion", ["scale", "gate"])
def test_calibrated_heads_are_as_large_as_the_teachers(family, fusion):
    """The first layer for every mask, since only its input does not depend on other heads; γ makes it so in all."""
    teacher = make_teacher(family)
    rms = [heads.pow(2).mean((0, 1, 3)).sqrt() for heads in head_inputs_of_o_proj(teacher, CALIBRATION)]
    for masks in mask_examples(1):
        student = convert_model(teacher, masks, calibration_ids=CALIBRATION, fusion=fusion)
        for layer, heads in enumerate(head_inputs_of_o_proj(student, CALIBRATION)):
            torch.testing.assert_close(heads.pow(2).mean((0, 1, 3)).sqrt(), rms[layer], rtol=5e-3, atol=0)


def test_linear_norm_leaves_full_attention_heads_a_scale_of_one():
    student = convert_model(make_teacher("qwen3-tied"), MIXED, calibration_ids=CALIBRATION, fusion_norm="linear")
    for layer, row in zip(student.model.layers, MIXED):
        gamma = layer.self_attn.fusion.weight
        assert all((gamma[head] == 1) == bool(full) for head, full in enumerate(row))


def test_gates_start_from_the_teachers_attention_distance_and_entropy():
    teacher = make_teacher("qwen3-tied")
    statistics = measure_heads(adapter_for(teacher.config), read_model(teacher), CALIBRATION)
    student = convert_model(teacher, ALL_LINEAR, calibration_ids=CALIBRATION)
    # Whatever the token is: the gates do not look at it yet.
    states = torch.randn(1, 5, SIZES["hidden_size"], generator=torch.Generator().manual_seed(0))
    for index, layer in enumerate(student.model.layers):
        beta, g = layer.self_attn.linear_attention.gates(states)
        half_life = math.log(2) / -g
        expected = statistics.distance[index].clamp_min(1).expand(1, 5, -1)
        torch.testing.assert_close(half_life, expected, rtol=1e-4, atol=0)
        writing = (1 - statistics.entropy[index]).clamp(0.1, 0.9).expand(1, 5, -1)
        torch.testing.assert_close(beta, writing, rtol=1e-4, atol=0)


def test_without_text_conversion_says_that_it_calibrates_on_random_tokens(caplog):
    student = convert_model(make_teacher("qwen3-tied"), MIXED)
    assert "random tokens" in caplog.text
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_nothing_is_measured_where_nothing_needs_it(monkeypatch):
    measured = []
    monkeypatch.setattr(migration, "measure_heads", lambda *given, **more: measured.append(given))
    convert_model(make_teacher("qwen3-tied"), ALL_FULL, **ANCHOR)
    assert not measured


@pytest.mark.parametrize(
    "ids",
    [
        CALIBRATION[:, :1],
        CALIBRATION[:0],
        CALIBRATION[0],
        CALIBRATION.float(),
        CALIBRATION.tolist(),
        CALIBRATION + SIZES["vocab_size"],
        CALIBRATION - SIZES["vocab_size"],
    ],
    ids=["one token", "no row", "one-dimensional", "float", "list", "too large", "negative"],
)
def test_unusable_calibration_ids_are_refused(ids):
    with pytest.raises(ValueError, match=r"^calibration_ids must ") as error:
        convert_model(make_teacher("qwen3-tied"), MIXED, calibration_ids=ids)
    assert "\n" not in str(error.value)


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


# ---------------------------------------------------------------------------------------------------- refusals


def tiny(**changes) -> dict:
    return {name: value for name, value in SIZES.items() if name != "initializer_range"} | changes


WINDOW = {"use_sliding_window": True, "sliding_window": 16}
REFUSED = {
    "qwen3 window": (Qwen3Config(**tiny(**WINDOW, max_window_layers=1)), "qwen3.*sliding-window"),
    "qwen2 window": (Qwen2Config(**tiny(**WINDOW, max_window_layers=0)), "qwen2.*sliding-window"),
    "mistral window": (MistralConfig(**tiny(sliding_window=NATIVE_LENGTH - 1)), "mistral.*sliding-window"),
    "phi3 window": (Phi3Config(**tiny(sliding_window=16)), "phi3.*sliding-window"),
    "qwen3 moe": (Qwen3MoeConfig(**tiny()), "qwen3_moe.*mixture-of-experts"),
    "mixtral": (MixtralConfig(**tiny()), "mixtral.*mixture-of-experts"),
    "t5": (T5Config(), "t5.*encoder-decoder"),
    "phi3 partial rotary": (Phi3Config(**tiny(partial_rotary_factor=0.75)), "phi3.*partial rotary.*0.75"),
    "llama partial rotary": (LlamaConfig(**tiny(partial_rotary_factor=0.5)), "llama.*partial rotary.*0.5"),
    "llama mlp bias": (LlamaConfig(**tiny(mlp_bias=True)), "llama.*mlp_bias"),
    "gpt2": (GPT2Config(), "gpt2.*unknown teacher family.*qwen3"),
}


@pytest.fixture
def nothing_may_be_read(monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("weights were asked for")

    for name in ("snapshot_download", "safe_open", "read_safetensors", "read_model"):
        monkeypatch.setattr(teachers, name, read)
    for name in ("read_safetensors", "read_model"):
        monkeypatch.setattr(migration, name, read)


def assert_refused(pattern: str, *args, **options) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        convert_model(*args, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_cannot_be_represented_is_refused_before_any_weight_is_read(
    case, nothing_may_be_read, monkeypatch, tmp_path
):
    config, pattern = REFUSED[case]
    config.save_pretrained(tmp_path)
    assert_refused(f"^{pattern}", tmp_path, MIXED)
    with pytest.raises(ValueError, match=f"^{pattern}"):
        adapter_for(config)
    # From the Hub: its configuration is fetched, its weights are not.
    monkeypatch.setattr(teachers.PreTrainedConfig, "get_config_dict", lambda *a, **k: (config.to_dict(), {}))
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *a, **k: config)
    assert_refused(f"^{pattern}", "someone/model", MIXED)


def test_a_family_that_transformers_does_not_know_is_refused_without_running_its_code(nothing_may_be_read, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.Strange"}})
    )
    (tmp_path / "configuration_strange.py").write_text("raise SystemExit('code was run')")
    assert_refused("^strange: unknown teacher family", tmp_path, MIXED)
    (tmp_path / "config.json").write_text("{}")
    assert_refused("^None: unknown teacher family", tmp_path, MIXED)


def test_a_student_is_no_teacher(tmp_path):
    student = convert_model(make_teacher("qwen3-tied"), MIXED, calibration_ids=CALIBRATION)
    assert_refused("^hydrahead: unknown teacher family", student, MIXED)
    student.save_pretrained(tmp_path)
    assert_refused(f"^{tmp_path}: a HydraHead student; pass the pretrained transformer", tmp_path, MIXED)


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**tiny(use_sliding_window=False, sliding_window=16)),
        Qwen3Config(**tiny(use_sliding_window=True, sliding_window=16, max_window_layers=LAYERS)),
        MistralConfig(**tiny(sliding_window=NATIVE_LENGTH)),
        MistralConfig(**tiny(sliding_window=None)),
        Phi3Config(**tiny(sliding_window=4 * NATIVE_LENGTH)),
    ],
    ids=["qwen3 unused", "qwen3 in no layer", "mistral covers all", "mistral none", "phi3 covers all"],
)
def test_a_window_that_hides_nothing_is_accepted(config):
    assert adapter_for(config).student_fields()["num_hidden_layers"] == LAYERS


def test_a_mistral_whose_window_covers_all_positions_equals_its_student():
    teacher, ids = make_teacher("mistral", sliding_window=NATIVE_LENGTH), random_ids(2, NATIVE_LENGTH)
    student = convert_model(teacher, ALL_FULL, **ANCHOR)
    assert (student(ids).logits - teacher(ids).logits).abs().max() <= ANCHOR_TOLERANCE


BAD_OPTIONS = [
    (MIXED[:1], {}, "^head_masks must have one row per layer"),
    ([[1] * 5] * LAYERS, {}, r"^head_masks\[0\] must have one entry per query head"),
    ([[2] * HEADS] * LAYERS, {}, r"^head_masks\[0\]\[0\] must be 0 or 1"),
    (MIXED, {"fusions": "scale"}, "^unknown option 'fusions', expected some of .*fusion"),
    (MIXED, {"hidden_size": 64}, "^unknown option 'hidden_size'"),
    (MIXED, {"fusion": "sum"}, "^fusion must be one of"),
    (MIXED, {"fusion_norm": "full"}, "^fusion_norm must be one of"),
    (MIXED, {"full_attention_position": "alibi"}, "^full_attention_position must be one of"),
    (MIXED, {"full_attention_gate": "yes"}, "^full_attention_gate must be true or false"),
    (MIXED, {"logit_scale_base": 1}, "^logit_scale_base must be"),
    (MIXED, {"short_conv_kernel_size": 1}, "^short_conv_kernel_size must be"),
    (MIXED, {"dtype": torch.int8}, "^dtype must be a floating-point"),
    (MIXED, {"dtype": "bfloat16"}, "^dtype must be a floating-point"),
    (MIXED, {"calibration_ids": CALIBRATION[:, :1]}, "^calibration_ids must"),
]


@pytest.mark.parametrize(("masks", "options", "pattern"), BAD_OPTIONS, ids=[pattern for *_, pattern in BAD_OPTIONS])
def test_bad_masks_and_options_are_refused_before_any_weight_is_read(
    masks, options, pattern, nothing_may_be_read, tmp_path
):
    teacher = make_teacher("qwen3-tied")
    assert_refused(pattern, teacher, masks, **options)
    teacher.config.save_pretrained(tmp_path)
    assert_refused(pattern, tmp_path, masks, **options)


def test_options_default_to_the_papers_head():
    """NoPE, with a log scale of the teacher's native length; no scale where the rotary embedding stays."""
    teacher = make_teacher("qwen3-tied")
    config = convert_model(teacher, MIXED, calibration_ids=CALIBRATION).config
    assert (config.full_attention_position, config.logit_scale_base) == ("nope", NATIVE_LENGTH)
    assert (config.fusion, config.fusion_norm, config.full_attention_gate) == ("scale", "all", True)
    assert config.head_masks == MIXED
    rope = convert_model(teacher, MIXED, calibration_ids=CALIBRATION, full_attention_position="rope").config
    assert rope.logit_scale_base is None
    chosen = convert_model(teacher, MIXED, calibration_ids=CALIBRATION, logit_scale_base=None).config
    assert chosen.logit_scale_base is None


def test_unusable_folders_are_refused(tmp_path):
    assert_refused(f"^{tmp_path}: not a model folder", tmp_path, MIXED)
    assert_refused("no such folder", tmp_path / "missing", MIXED)
    assert_refused("no such folder", "./missing", MIXED)
    teacher = make_teacher("qwen3-tied")
    teacher.config.save_pretrained(tmp_path)
    torch.save(teacher.state_dict(), tmp_path / "pytorch_model.bin")
    assert_refused("no model.safetensors; pickled checkpoints are not read", tmp_path, MIXED)


def test_a_checkpoint_with_a_tensor_missing_is_refused_by_its_name(tmp_path):
    make_teacher("qwen3-tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_refused("its weights lack model.layers.1.mlp.up_proj.weight", tmp_path, ALL_FULL, **ANCHOR)


def test_a_model_without_a_language_model_head_is_refused():
    teacher = make_teacher("qwen3-tied")
    assert isinstance(teacher, Qwen3ForCausalLM)
    assert_refused("^Qwen3Model: has no language-model head", teacher.model, MIXED)
    classifier = Qwen3ForSequenceClassification(teacher.config)
    assert_refused("^Qwen3ForSequenceClassification: has no language-model head", classifier, MIXED)


def test_every_family_has_its_adapter_and_its_tests():
    tested = {config_class.model_type for _, config_class, _ in FAMILIES.values()}
    assert tested == set(ADAPTERS)


# ------------------------------------------------------------------------------- folders that load anywhere

WITHOUT_HYDRAHEAD = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hydrahead":
            raise ImportError("hydrahead is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import hydrahead
    raise SystemExit("hydrahead was imported")
except ImportError:
    pass
"""

LOAD_AND_RUN = """
import pathlib, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
results = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for thing in (config, model, decoder):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing).__module__
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        results[folder.name + ".logits"] = model(ids).logits
        results[folder.name + ".hidden"] = decoder(ids).last_hidden_state
    results[folder.name + ".tokens"] = model.generate(ids, max_new_tokens=5, do_sample=False)
assert "hydrahead" not in sys.modules
save_file(results, sys.argv[2])
"""


def run_python(code: str, *arguments, folder) -> str:
    """Standard output of a fresh, isolated process: no PYTHONPATH, no current directory, caches in `folder`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_folders_of_every_family_load_where_hydrahead_is_not_installed(tmp_path):
    expected, ids = {}, torch.arange(3, 40)[None]
    for family in FAMILIES:
        student = convert_model(make_teacher(family), MIXED, calibration_ids=CALIBRATION)
        save_checkpoint(student, None, tmp_path / "students" / family)
        expected[f"{family}.logits"] = student(ids).logits
        expected[f"{family}.hidden"] = student.model(ids).last_hidden_state
        expected[f"{family}.tokens"] = student.generate(ids, max_new_tokens=5, do_sample=False)
    (tmp_path / "cache").mkdir()
    code = WITHOUT_HYDRAHEAD + LOAD_AND_RUN
    run_python(code, tmp_path / "students", tmp_path / "results.safetensors", folder=tmp_path / "cache")
    results = load_file(tmp_path / "results.safetensors")
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        # The same code on the same machine; 1e-5 in case its threads are not the same.
        torch.testing.assert_close(results[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_folder_saved_again_after_loading_is_the_same(family, tmp_path):
    student = convert_model(make_teacher(family), MIXED, calibration_ids=CALIBRATION)
    save_checkpoint(student, None, tmp_path / "one")
    save_checkpoint(HydraHeadForCausalLM.from_pretrained(tmp_path / "one"), None, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert {"config.json", "model.safetensors", "configuration_hydrahead.py", "modeling_hydrahead.py"} <= set(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ memory

MEASURE_PEAK = """
import pathlib, sys
import torch
from hydrahead.convert.migration import convert_model

def resident(name):  # bytes; ru_maxrss would count the parent process, which a fork starts as
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
tiny, large = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ids = torch.arange(3, 67).view(1, 64)
convert_model(tiny, [[1, 0, 0, 0, 1, 0], [0] * 6], calibration_ids=ids)  # loads all code that conversion needs
before = resident("VmRSS")
student = convert_model(large, [[1, 1, 0, 0, 0, 0, 0, 0]] * 6, calibration_ids=ids)
torch.stack([parameter.sum() for parameter in student.parameters()])  # touches every page
print(resident("VmHWM") - before, sum(p.nbytes for p in student.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="peak memory is read from Linux' /proc")
def test_converting_from_a_folder_needs_about_one_copy_of_the_model(tmp_path):
    """
    Peak memory grows by at most 1.4 file sizes: the student (1.05 files here, its linear heads own their k and v) and,
    at one time, one layer of the teacher or the widest matrix. Loading the teacher first would take more than 2.
    """
    make_teacher("qwen3-tied").save_pretrained(tmp_path / "tiny")
    config = Qwen3Config(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=2560,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large/model.safetensors").stat().st_size
    assert size > 140e6
    output = run_python(MEASURE_PEAK, tmp_path / "tiny", tmp_path / "large", folder=tmp_path)
    growth, student = map(int, output.split())
    assert growth <= 1.4 * size, (growth / size, student / size)
    assert growth >= 0.9 * student  # the measurement sees the student at all
