"""Opening a teacher: the one that ships here by its short name, and as it is asked for."""

import torch

from hydrahead.convert.teachers import EMBEDDED_TEACHER, open_teacher, public_name


def test_the_name_demo_is_the_teacher_that_ships_here(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # where a folder of that name holds no model
    teacher = open_teacher("demo")
    assert teacher.fetch() == EMBEDDED_TEACHER and teacher.name == teacher.public_name == "demo"
    assert open_teacher(f"{EMBEDDED_TEACHER}/../teacher").public_name == "demo"  # the same one by another name
    assert teacher.tokenizer().is_fast and teacher.adapter.num_layers == teacher.config.num_hidden_layers


def test_records_name_no_folders_of_this_machine(tmp_path):
    (tmp_path / "mine").mkdir()
    assert public_name(str(tmp_path / "mine")) == "mine" and public_name("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"


def test_a_teacher_is_loaded_as_asked_for_and_never_trained():
    model = open_teacher("demo").load("bfloat16", "cpu")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
