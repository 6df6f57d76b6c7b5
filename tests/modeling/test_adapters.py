"""LoRA, and modules that are trained whole beside it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hydrahead import HydraHeadForCausalLM
from hydrahead.tests.families import HEADS, LAYERS, make_student, random_ids
from hydrahead.tests.modeling.checks import assert_close


@pytest.mark.usefixtures("gradients")
def test_lora_on_all_linear_layers_trains_its_adapters_only_and_merges():
    student, ids = make_student(fusion="gate"), random_ids(2, 9)
    original = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    before = student(ids).logits.detach()
    model = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    for part in ("linear_attention.q_proj", "full_attention.output_gate", "self_attn.o_proj", "mlp.up_proj"):
        assert any(part in name for name in trainable), part
    assert_close(model(ids).logits, before, 1e-5)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(ids).logits.detach()
    assert (trained - before).abs().max() > 0.01
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, original[plain]), plain
    merged = model.merge_and_unload()
    assert type(merged) is HydraHeadForCausalLM
    assert_close(merged(ids).logits, trained)


@pytest.mark.usefixtures("gradients")
def test_the_fusion_can_be_trained_whole_beside_adapters(tmp_path):
    student, ids = make_student(), random_ids(2, 9)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["fusion"], task_type="CAUSAL_LM")
    model = get_peft_model(student, config)
    gamma = [p for name, p in model.named_parameters() if p.requires_grad and name.endswith("default.weight")]
    gamma = [p for p in gamma if p.shape == (HEADS,)]
    assert len(gamma) == LAYERS
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in gamma:
            assert parameter.grad.ne(0).any()
            parameter.mul_(1.5)
    expected = model(ids).logits.detach()
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(make_student(), tmp_path)
    assert_close(loaded(ids).logits, expected, 1e-5)
    assert_close(model.merge_and_unload()(ids).logits, expected)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_adapters_changes_no_gradient(reentrant):
    """Embeddings are frozen there: with the reentrant kind the input of the first layer has to ask for a gradient."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = make_student()
        if checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            student.enable_input_require_grads()
        model = get_peft_model(student, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
        ids = random_ids(2, 9)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    student.gradient_checkpointing_disable()
    assert not student.is_gradient_checkpointing
