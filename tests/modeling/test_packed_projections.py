"""One product for all that reads a layer's input: `generate` packs the weights, and nobody else notices."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hydrahead import HydraHeadForCausalLM
from hydrahead.tests.families import MIXED, make_student, random_ids
from hydrahead.tests.modeling.checks import NO_END, assert_close


@pytest.fixture(params=[{}, {"attention_bias": True}, {"full_attention_gate": False}], ids=str)
def packed(request) -> HydraHeadForCausalLM:
    """A student that has generated once."""
    student = make_student(head_masks=MIXED, **request.param)
    student.generate(random_ids(1, 5), max_new_tokens=2, **NO_END)
    return student


def products(student: HydraHeadForCausalLM) -> list[bool]:
    """Of each layer: whether it computes its projections in one product."""
    return [layer.self_attn.projections.holds(layer.self_attn.linears()) for layer in student.model.layers]


def one_by_one(student: HydraHeadForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits by the layers' own products."""
    with torch.enable_grad():
        return student(ids).logits.detach()


def test_generation_packs_and_gives_the_same_logits(packed):
    ids = random_ids(2, 9)
    assert all(products(packed))
    assert_close(packed(ids).logits, one_by_one(packed, ids), 1e-5)


def test_nothing_is_stored_twice_and_the_state_dict_stays(packed):
    attention = packed.model.layers[0].self_attn
    storages = {linear.weight.untyped_storage().data_ptr() for linear in attention.linears()}
    assert storages == {attention.projections.weight.untyped_storage().data_ptr()}
    unpacked = make_student(head_masks=MIXED, attention_bias=packed.config.attention_bias).state_dict()
    assert set(packed.state_dict()) <= set(unpacked)


def test_a_packed_student_is_saved_as_any(packed, tmp_path):
    packed.save_pretrained(tmp_path)
    again = HydraHeadForCausalLM.from_pretrained(tmp_path)
    assert not any(products(again))
    for name, tensor in packed.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("copied", [False, True])
def test_training_after_generation_changes_what_is_generated(copied, packed):
    student = copy.deepcopy(packed) if copied else packed
    assert all(products(student)) is not copied  # a copy has no second copy of its weights, which training would leave
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.5)
    ids = random_ids(2, 9)
    assert_close(student(ids).logits, one_by_one(student, ids), 1e-4)
    student.generate(ids, max_new_tokens=2, **NO_END)
    assert all(products(student))
    assert_close(student(ids).logits, one_by_one(student, ids), 1e-4)


def test_gradients_reach_every_projection(packed, gradients):
    packed(random_ids(2, 9)).logits.square().sum().backward()
    for layer in packed.model.layers:
        assert all(linear.weight.grad is not None for linear in layer.self_attn.linears())


def test_a_layer_whose_call_somebody_replaced_is_called(packed):
    layer, seen = packed.model.layers[0].self_attn.linears()[0], []
    forward = layer.forward
    layer.forward = lambda x: seen.append(x) or forward(x)
    packed.generate(random_ids(1, 5), max_new_tokens=3, **NO_END)
    assert len(seen) == 3 and products(packed) == [False, True]


def test_another_dtype_or_device_unpacks(packed):
    packed.double()
    assert all(layer.self_attn.projections.weight is None for layer in packed.model.layers)
    ids = random_ids(2, 9)
    assert_close(packed(ids).logits, one_by_one(packed, ids), 1e-10)


def test_hooks_and_adapters_are_heard(packed):
    ids, heard = random_ids(2, 9), []
    layer = packed.model.layers[0].self_attn
    handle = layer.linear_attention.k_proj.register_forward_hook(lambda *_: heard.append(1))
    packed(ids)
    assert heard == [1] and products(packed)[0] is False
    handle.remove()
    assert products(packed)[0]

    adapted = get_peft_model(packed, LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    assert not any(products(packed))
    with adapted.disable_adapter():
        plain = adapted(ids).logits
    assert (adapted(ids).logits - plain).abs().max() > 1e-3
    generated = adapted.generate(input_ids=ids, max_new_tokens=2, **NO_END)
    assert generated.shape == (2, 11) and not any(products(packed))


def test_the_product_is_compiled_without_a_graph_break(packed):
    ids, seen = random_ids(1, 4), []

    def backend(graph, _):
        seen.append(sum(node.target is torch._C._nn.linear for node in graph.graph.nodes))
        return graph

    layer = packed.model.layers[0].self_attn
    x = packed.model.embed_tokens(ids)
    positions = {"position_embeddings": packed.model.rotary_emb(x, torch.arange(4)[None])}
    torch._dynamo.reset()
    compiled = torch.compile(layer.head_outputs, backend=backend, fullgraph=True)(x, **positions)
    torch._dynamo.reset()
    assert seen == [2]  # and that of the gates
    assert_close(compiled, layer.head_outputs(x, **positions), 1e-5)
