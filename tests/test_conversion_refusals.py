"""Teachers, masks, options and folders that cannot be converted: one line, before a weight is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    T5Config,
)

from hydrahead import loading
from hydrahead.convert import migration, teachers
from hydrahead.convert.migration import convert_model
from hydrahead.convert.teachers import ADAPTERS, adapter_for
from hydrahead.tests.families import (
    ALL_FULL,
    ANCHOR,
    ANCHOR_TOLERANCE,
    CALIBRATION,
    FAMILIES,
    HEADS,
    LAYERS,
    MIXED,
    NATIVE_LENGTH,
    SIZES,
    make_teacher,
    random_ids,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


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
