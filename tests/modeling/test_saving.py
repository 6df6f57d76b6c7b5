"""Saving and loading."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hydrahead import HydraHeadForCausalLM, HydraHeadModel
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, LLAMA3_ROPE, LONGROPE, MIXED, make_student, random_ids

SAVED = [
    {"head_masks": MIXED, "fusion": "gate"},
    {"head_masks": ALL_FULL, "fusion": "concat"},
    {"head_masks": ALL_LINEAR, "tie_word_embeddings": False},
    {"rope_parameters": LLAMA3_ROPE},
    {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 16}},
]


@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_saving_what_was_loaded_gives_the_same_bytes(fields, tmp_path):
    student, ids = make_student(**fields), random_ids(2, 30)
    student.save_pretrained(tmp_path / "one")
    loaded = HydraHeadForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert torch.equal(loaded(ids).logits, student(ids).logits)


@pytest.mark.parametrize("fields", SAVED, ids=str)
def test_buffers_that_are_not_saved_are_rebuilt_on_loading(fields, tmp_path):
    student = make_student(**fields)
    student.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {name: buffer for name, buffer in student.named_buffers() if name not in saved}
    assert any(name.endswith("fusion.index") for name in expected) and any("inv_freq" in name for name in expected)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = dict(HydraHeadForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_buffers())
        assert loaded.keys() == expected.keys()
        for name, buffer in expected.items():
            assert torch.equal(loaded[name], buffer), name


def test_the_decoder_alone_loads_from_a_language_model(tmp_path):
    student, ids = make_student(), random_ids(2, 9)
    student.save_pretrained(tmp_path)
    decoder = HydraHeadModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(ids).last_hidden_state, student.model(ids).last_hidden_state)


def test_a_saved_configuration_says_where_its_code_is(tmp_path):
    make_student().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "hydrahead"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_hydrahead.HydraHeadConfig",
        "AutoModel": "modeling_hydrahead.HydraHeadModel",
        "AutoModelForCausalLM": "modeling_hydrahead.HydraHeadForCausalLM",
    }
    for name in ("configuration_hydrahead.py", "modeling_hydrahead.py", "ops_hydrahead.py"):
        assert (tmp_path / name).is_file()
