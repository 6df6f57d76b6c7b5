"""Arguments of the forward pass, what it returns, and modules frozen or checkpointed."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hydrahead import HydraHeadForCausalLM
from hydrahead.tests.families import ALL_LINEAR, LAYERS, MIXED, VOCAB, make_student, random_ids
from hydrahead.tests.modeling.checks import MASKS, NO_END, ROWS, assert_close, packed_rows, pad_rows


@pytest.mark.parametrize("masks", MASKS)
def test_embeddings_equal_ids(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    assert torch.equal(student(inputs_embeds=student.model.embed_tokens(ids)).logits, student(ids).logits)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": student.model.embed_tokens(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            student(**wrong)


@pytest.mark.parametrize("masks", MASKS)
def test_attention_implementations_agree(masks):
    """Padded, packed and generating; flex attention without the compiler, which takes half a minute."""
    student = make_student(head_masks=masks)
    padded, mask = pad_rows(ROWS, "left", filler_seed=0)
    packed, positions = packed_rows()
    found = {}
    with torch.compiler.set_stance("force_eager"):
        for implementation in ("eager", "sdpa", "flex_attention"):
            student.set_attn_implementation(implementation)
            found[implementation] = (
                student(padded, attention_mask=mask).logits[mask.bool()],
                student(packed, position_ids=positions).logits,
                student.generate(padded, attention_mask=mask, max_new_tokens=4, **NO_END).float(),
            )
    for implementation in ("eager", "flex_attention"):
        for logits, expected in zip(found[implementation], found["sdpa"]):
            assert_close(logits, expected)


def test_a_registered_attention_function_is_the_one_that_is_used(monkeypatch):
    """Also for single tokens, which have a way of their own where sdpa is asked for."""
    student, ids, calls = make_student(), random_ids(2, 9), []
    expected = student.generate(ids, max_new_tokens=3, **NO_END)

    def counted(module, query, *args, **kwargs):
        calls.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "counted", counted)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "counted", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    student.set_attn_implementation("counted")
    assert torch.equal(student.generate(ids, max_new_tokens=3, **NO_END), expected)
    assert calls.count(9) == LAYERS and 1 in calls


@pytest.mark.parametrize("masks", MASKS)
def test_attentions_and_hidden_states_are_given_out(masks):
    student, ids = make_student(head_masks=masks), random_ids(2, 9)
    student.set_attn_implementation("eager")
    output = student(ids, output_attentions=True, output_hidden_states=True)
    # One entry for each layer that has full-attention heads, one map for each of these heads.
    counts = [sum(row) for row in masks if any(row)]
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, count, 9, 9) for count in counts]
    for weights in output.attentions:
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-5)
        assert weights.triu(1).eq(0).all()
    assert len(output.hidden_states) == LAYERS + 1
    assert torch.equal(output.hidden_states[0], student.model.embed_tokens(ids))
    assert torch.equal(output.hidden_states[-1], student.model(ids).last_hidden_state)
    assert torch.equal(output.logits, student(ids).logits)
    as_tuple = student(ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
def test_attentions_and_hidden_states_are_the_ones_that_were_used_with_their_gradients(masks):
    student = make_student(head_masks=masks)
    student.set_attn_implementation("eager")
    output = student(random_ids(2, 9), output_attentions=True, output_hidden_states=True)
    given = [*output.attentions, *output.hidden_states]
    for each in given:
        each.retain_grad()
    output.logits.square().sum().backward()
    assert all(each.grad.abs().max() > 0 for each in given)


def test_logits_can_be_had_for_some_positions_only():
    student, ids = make_student(), random_ids(2, 9)
    logits = student(ids).logits
    assert_close(student(ids, logits_to_keep=1).logits, logits[:, -1:], 1e-5)
    assert_close(student(ids, logits_to_keep=4).logits, logits[:, -4:], 1e-5)
    assert_close(student(ids, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]], 1e-5)


def test_the_loss_is_cross_entropy_of_the_next_token():
    student, ids = make_student(), random_ids(2, 9)
    labels = ids.masked_fill(torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    output = student(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, expected, 1e-5)
    # Gradient accumulation: the Trainer hands over the number of labels in all its batches.
    scaled = student(ids, labels=labels, num_items_in_batch=40).loss
    assert_close(scaled, expected * labels[:, 1:].ne(-100).sum() / 40, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_or_not_as_configured(tied, tmp_path):
    student = make_student(tie_word_embeddings=tied)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) is tied
    student.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = HydraHeadForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert student.get_output_embeddings() is student.lm_head
    assert student.get_input_embeddings() is student.model.embed_tokens
    student.resize_token_embeddings(VOCAB + 8)
    assert student(random_ids(1, 5)).logits.shape[-1] == VOCAB + 8


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
def test_gradient_checkpointing_changes_no_gradient(masks):
    plain, checkpointed = make_student(head_masks=masks).train(), make_student(head_masks=masks).train()
    checkpointed.gradient_checkpointing_enable()
    ids, mask = pad_rows(ROWS, "right", filler_seed=0)
    for model in (plain, checkpointed):
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert checkpointed.model.layers[0].gradient_checkpointing
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters()):
        assert one.grad is not None and torch.equal(one.grad, other.grad), name


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("fusion", ["scale", "gate", "concat"])
def test_every_parameter_is_trained(masks, fusion):
    student = make_student(head_masks=masks, fusion=fusion, attention_bias=True)
    student(random_ids(2, 9)).logits.square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.ne(0).any(), name


@pytest.mark.usefixtures("gradients")
def test_attention_dropout_acts_in_training_only():
    student, ids = make_student(attention_dropout=0.5), random_ids(2, 9)
    assert torch.equal(student(ids).logits, student(ids).logits)
    student.train()
    assert not torch.equal(student(ids).logits, student(ids).logits)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("masks", [MIXED, ALL_LINEAR])
def test_a_text_is_learnt_by_heart_and_generated(masks):
    torch.manual_seed(0)
    model = HydraHeadForCausalLM(make_student(head_masks=masks, initializer_range=0.02).config).train()
    text = random_ids(1, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(text, labels=text).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert loss < 0.1
    generated = model.eval().generate(text[:, :2], max_new_tokens=22, **NO_END)
    assert torch.equal(generated, text)
