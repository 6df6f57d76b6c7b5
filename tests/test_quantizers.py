"""docs/using.md, 8 and 4 bits: `make test-quantizers` runs it where torchao and bitsandbytes are installed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hydrahead.tests.families import random_ids
from hydrahead.tests.test_tools import run, student, workplace  # noqa: F401

IDS = random_ids(2, 30)


def quantised_layers(model) -> set[str]:
    """Names of the linear layers whose weights are no plain numbers of their shape any more."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (type(module) is not torch.nn.Linear or type(module.weight) is not torch.nn.Parameter)
    }


def check(model, exact, most_lost: float) -> None:
    """All but the gates and the head are quantised, and little is lost: nats a token."""
    linear = {name for name, module in exact.named_modules() if isinstance(module, torch.nn.Linear)}
    assert quantised_layers(model) == {name for name in linear if ".gates." not in name and name != "lm_head"}
    with torch.no_grad():
        ours, expected = model(IDS).logits.float().log_softmax(-1), exact(IDS).logits.log_softmax(-1)
    lost = (expected.exp() * (expected - ours)).sum(-1).mean()
    assert 0 < lost < most_lost, lost
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 33)


def check_adapters_train(model) -> None:
    adapters = LoraConfig(target_modules="all-linear", modules_to_save=["fusion"], task_type="CAUSAL_LM")
    tuned = get_peft_model(prepare_model_for_kbit_training(model), adapters).train()
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in tuned.named_parameters() if "lora_B" in name or "modules_to_save" in name]
    assert all(gradient is not None and gradient.ne(0).any() for gradient in gradients)


def test_torchao_quantises_to_8_bits_and_saves(workplace):  # noqa: F811
    pytest.importorskip("torchao")
    found = run("8 and 4 bits", slice(0, 1))
    found["small"].save_pretrained("saved")
    with torch.no_grad():
        expected = found["small"](IDS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained("saved")(IDS).logits, expected)
    check(found["small"], found["model"], most_lost=0.01)  # 0.0005 measured
    check_adapters_train(found["small"])


def test_bitsandbytes_quantises_to_4_bits(workplace):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    found = run("8 and 4 bits", slice(1, 2))
    check(found["smaller"], found["model"], most_lost=0.2)  # 0.06 measured


def test_bitsandbytes_quantises_to_8_bits_and_saves(workplace):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    found = run("8 and 4 bits", slice(0, 0))
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained("student", quantization_config=settings, device_map="cpu")
    model.save_pretrained("saved")
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained("saved", device_map="cpu")
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    check(model, found["model"], most_lost=0.01)  # 0.001 measured
    check_adapters_train(model)
