"""Initialising, loading and resizing: what transformers asks of its own models."""

import pytest
import torch
from torch import nn

from hydrahead import HydraHeadForCausalLM, HydraHeadModel
from hydrahead.tests.families import VOCAB, make_student, random_ids
from hydrahead.tests.modeling.checks import MASKS, NO_END, assert_close

EVERYTHING = {"attention_bias": True, "attention_output_bias": True, "fusion": "gate", "tie_word_embeddings": False}


@pytest.mark.parametrize("masks", MASKS)
def test_every_weight_that_is_missing_is_initialised_as_in_a_new_model(masks, monkeypatch):
    """Loading builds a model without values, and what no file gives has to come from `_init_weights`."""
    config = make_student(head_masks=masks, **EVERYTHING).config
    # What is drawn depends on the order: everything gets the middle of its distribution, or its width.
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, mean=0, std=1, **_: self.fill_(std))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low=0, high=1, **_: self.fill_((low + high) / 2))
    new = HydraHeadForCausalLM(config)
    loaded = HydraHeadForCausalLM.from_pretrained(None, config=config, state_dict={})
    expected = dict(new.named_parameters()) | dict(new.named_buffers())
    found = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_new_weights_have_the_spread_that_the_configuration_says():
    torch.manual_seed(0)
    model = HydraHeadForCausalLM(make_student(hidden_size=96, initializer_range=0.05, **EVERYTHING).config)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            neutral = name.endswith(("output_gate", "fusion.proj"))
            # Of two hundred numbers or more: 20% is four standard errors.
            assert module.weight.std().item() == pytest.approx(0 if neutral else 0.05, rel=0.2), name
            assert getattr(module, "bias", None) is None or not module.bias.any(), name


def test_weights_come_from_a_state_dict_alone():
    student, ids = make_student(), random_ids(2, 9)
    loaded = HydraHeadForCausalLM.from_pretrained(None, config=student.config, state_dict=student.state_dict())
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_folder_lacks_is_named(tied, tmp_path):
    student = make_student(tie_word_embeddings=tied)
    student.model.save_pretrained(tmp_path / "decoder")
    student.save_pretrained(tmp_path / "whole")
    loaded, info = HydraHeadForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert set(info["missing_keys"]) == (set() if tied else {"lm_head.weight"}) and not info["unexpected_keys"]
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, student.model.layers[1].mlp.up_proj.weight)
    for model_class in (HydraHeadForCausalLM, HydraHeadModel):
        _, info = model_class.from_pretrained(tmp_path / "whole", output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert set(info["unexpected_keys"]) <= {"lm_head.weight"}


def test_weights_of_another_shape_are_refused_or_made_anew(tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        HydraHeadForCausalLM.from_pretrained(tmp_path, vocab_size=VOCAB + 10)
    loaded = HydraHeadForCausalLM.from_pretrained(tmp_path, vocab_size=VOCAB + 10, ignore_mismatched_sizes=True)
    assert loaded(random_ids(1, 5)).logits.shape[-1] == VOCAB + 10
    assert loaded.model.embed_tokens.weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert torch.equal(loaded.model.norm.weight, student.model.norm.weight)


def test_a_model_can_be_built_without_memory_and_loaded_onto_a_device_in_context(tmp_path):
    student, ids = make_student(), random_ids(2, 9)
    student.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = HydraHeadForCausalLM(student.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(student.state_dict(), assign=True)
    with torch.device("cpu"):
        loaded = HydraHeadForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_the_folder_unless_another_is_asked_for(name, tmp_path):
    half_dtype, full_dtype = torch.bfloat16, torch.float32
    make_student().save_pretrained(tmp_path / "fp32")
    half = HydraHeadForCausalLM.from_pretrained(tmp_path / "fp32", **{name: half_dtype})
    half.save_pretrained(tmp_path / "half")
    for asked, expected in (({}, half_dtype), ({name: "auto"}, half_dtype), ({name: "float32"}, full_dtype)):
        loaded = HydraHeadForCausalLM.from_pretrained(tmp_path / "half", **asked)
        assert loaded.dtype == loaded.model.layers[0].mlp.up_proj.weight.dtype == expected
        assert loaded.model.layers[0].self_attn.linear_attention.gates.A_log.dtype == torch.float32


def test_every_tensor_is_a_parameter_or_a_buffer_and_contiguous_when_loaded(tmp_path):
    """Others stay behind when a model moves, is sharded or off-loaded."""
    make_student(**EVERYTHING).save_pretrained(tmp_path)
    loaded = HydraHeadForCausalLM.from_pretrained(tmp_path)
    assert all(tensor.is_contiguous() for tensor in loaded.state_dict().values())
    loaded.generate(random_ids(1, 5), max_new_tokens=2, **NO_END)
    for name, module in loaded.named_modules():
        plain = [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert plain == [], (name, plain)


def test_what_the_class_says_of_its_parts_names_parts_that_are_there():
    student = make_student(**EVERYTHING)
    classes = {type(module).__name__ for module in student.modules()}
    assert set(student._no_split_modules) <= classes
    names = {name for name, _ in student.named_parameters()}
    plans = [f"model.{key}" for key in student.config.base_model_tp_plan] + list(student._tp_plan)
    for plan in (*plans, *student._tied_weights_keys, *student._tied_weights_keys.values()):
        pattern = plan.removeprefix("model.model.").replace("*", "0")
        assert any(name.startswith(pattern) for name in names), plan
    for part in student._keep_in_fp32_modules_strict:
        assert any(part in name.split(".") for name in names), part


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_grow_shrink_and_are_replaced(tied, tmp_path):
    student, ids = make_student(tie_word_embeddings=tied), random_ids(2, 9)
    logits = student(ids).logits
    for asked, size in (({"new_num_tokens": VOCAB + 5}, VOCAB + 5), ({"pad_to_multiple_of": 64}, 128)):
        student.resize_token_embeddings(**asked)
        assert student.config.vocab_size == student.vocab_size == student.lm_head.out_features == size
        assert (student.lm_head.weight is student.get_input_embeddings().weight) is tied
        assert_close(student(ids).logits[..., :VOCAB], logits, 1e-5)
        student(ids, labels=torch.full_like(ids, size - 1))
    student.save_pretrained(tmp_path)
    assert torch.equal(HydraHeadForCausalLM.from_pretrained(tmp_path)(ids).logits, student(ids).logits)
    student.resize_token_embeddings(VOCAB)
    assert_close(student(ids).logits, logits, 1e-5)
    student.set_input_embeddings(nn.Embedding(VOCAB, student.config.hidden_size))
    student.set_output_embeddings(nn.Linear(student.config.hidden_size, VOCAB, bias=False))
    assert student.get_input_embeddings() is student.model.embed_tokens
    assert student(ids).logits.shape == logits.shape
