"""Heads start from what the teacher's heads are measured to do."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hydrahead.convert import calibration, migration
from hydrahead.convert.calibration import head_forms_of, measure_heads
from hydrahead.convert.migration import convert_model
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import adapter_for, read_model
from hydrahead.tests.families import (
    ALL_FULL,
    ALL_LINEAR,
    ANCHOR,
    CALIBRATION,
    FAMILIES,
    HEADS,
    MIXED,
    SIZES,
    head_inputs_of_o_proj,
    make_teacher,
    mask_examples,
    same_weights,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


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
