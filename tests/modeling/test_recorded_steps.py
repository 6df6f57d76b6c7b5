"""Steps of `generate` recorded once and replayed: when they are, and that tokens stay what they are."""

import os

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.modules.module import register_module_forward_hook
from transformers import DynamicCache, StaticCache

import hydrahead.modeling_hydrahead as modeling
from hydrahead.tests.families import MIXED, make_student, random_ids
from hydrahead.tests.modeling.checks import MASKS, NO_END


@pytest.fixture
def recorded(monkeypatch) -> list:
    """The inputs of recorded steps; what a graph would replay is called again."""
    found = []

    def record(call, device):
        outputs = modeling.CausalLMOutputWithPast()

        def replay() -> None:
            found.append(call)
            outputs.logits = call().logits

        return outputs, replay

    monkeypatch.setattr(modeling, "record", record)
    monkeypatch.setattr(modeling, "can_record", lambda device, cache_bytes: True)
    return found


@pytest.mark.parametrize("masks", MASKS)
def test_tokens_are_those_of_a_growing_cache(masks, recorded):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    expected = student.generate(ids, cache_implementation="dynamic", max_new_tokens=9, **NO_END)
    assert not recorded
    for _ in range(2):
        assert torch.equal(student.generate(ids, max_new_tokens=9, **NO_END), expected)
    assert len(recorded) == 2 * (9 - 1 - modeling.HydraHeadRecordedStep.WARM_UP)
    longer = random_ids(1, 11)
    expected = student.generate(longer, cache_implementation="dynamic", max_new_tokens=5, **NO_END)
    assert torch.equal(student.generate(longer, max_new_tokens=5, **NO_END), expected)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("masks", MASKS)
def test_prompts_that_are_read_in_pieces_are_recorded_too(masks, padding, recorded):
    student, ids = make_student(head_masks=masks), random_ids(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    options = NO_END | {"max_new_tokens": 6, "prefill_chunk_size": 3, "attention_mask": mask}
    expected = student.generate(ids, cache_implementation="dynamic", **options)
    assert torch.equal(student.generate(ids, **options), expected) and len(recorded) == 3


@pytest.mark.parametrize("masks", MASKS)
def test_rows_that_are_padded_give_their_own_tokens(masks, recorded):
    student, ids = make_student(head_masks=masks), random_ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = NO_END | {"attention_mask": mask, "max_new_tokens": 9}
    expected = student.generate(ids, cache_implementation="dynamic", **options)
    assert torch.equal(student.generate(ids, **options), expected) and recorded


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_text_are_not_recorded(kind, recorded):
    student = make_student(head_masks=MIXED)
    student.config.rope_parameters |= {"rope_type": kind, "original_max_position_embeddings": 64}
    student.generate(random_ids(1, 6), max_new_tokens=6, **NO_END)
    assert not recorded


def test_what_is_compiled_or_replaced_is_not_recorded(recorded):
    for change in ("compiled", "replaced"):
        student = make_student(head_masks=MIXED)
        layer = student.model.layers[1]
        if change == "compiled":
            layer._compiled_call_impl = layer._call_impl
        else:
            layer.forward = layer.forward
        student.generate(random_ids(1, 6), max_new_tokens=6, **NO_END)
    assert not recorded


def test_tokenizers_keep_their_threads(recorded, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    make_student(head_masks=MIXED).generate(random_ids(1, 6), max_new_tokens=6, **NO_END)
    assert recorded and "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_model_that_was_placed_whole_is_recorded(recorded):
    student, ids = make_student(head_masks=MIXED), random_ids(1, 6)
    student.hf_device_map = {"": "cpu"}  # what accelerate leaves where one device has room for all
    student.generate(ids, max_new_tokens=5, **NO_END)
    assert recorded


def test_a_cache_that_would_not_fit_grows(recorded, monkeypatch):
    student, ids, asked = make_student(head_masks=MIXED), random_ids(2, 6), []
    monkeypatch.setattr(modeling, "can_record", lambda device, cache_bytes: asked.append(cache_bytes))
    student.generate(ids, max_new_tokens=modeling.EVEN, num_return_sequences=3, **NO_END | {"do_sample": True})
    assert not recorded and asked == [2 * 3 * 2 * modeling.EVEN * student.config.kv_bytes_per_token(4)]


def test_sampling_is_recorded_too(recorded):
    student, ids = make_student(head_masks=MIXED), random_ids(2, 6)
    options = NO_END | {"do_sample": True, "max_new_tokens": 9, "num_return_sequences": 2}
    torch.manual_seed(0)
    expected = student.generate(ids, cache_implementation="dynamic", **options)
    torch.manual_seed(0)
    assert torch.equal(student.generate(ids, **options), expected) and recorded


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True},
        {"cache_implementation": "dynamic"},
        {"disable_compile": True},
        {"num_beams": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 1},
    ],
)
def test_what_a_caller_asks_for_is_not_recorded(options, recorded):
    student, ids = make_student(head_masks=MIXED), random_ids(1, 6)
    found = student.generate(ids, max_new_tokens=5, **NO_END | options)
    assert not recorded
    if "return_dict_in_generate" in options:
        assert type(found.past_key_values) is DynamicCache


def test_hooks_see_every_step(recorded):
    student, seen = make_student(head_masks=MIXED), []
    handle = student.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    student.generate(random_ids(1, 6), max_new_tokens=6, **NO_END)
    assert len(seen) == 6 and not recorded
    handle.remove()
    student.generate(random_ids(1, 6), max_new_tokens=6, **NO_END)
    assert len(seen) == 6 and recorded


def test_a_cache_that_is_handed_in_goes_on_growing(recorded):
    student, ids = make_student(head_masks=MIXED), random_ids(1, 6)
    cache = DynamicCache(config=student.config)
    found = student.generate(ids, past_key_values=cache, max_new_tokens=5, **NO_END)
    assert not recorded and not isinstance(cache, StaticCache)
    assert torch.equal(found, student.generate(ids, max_new_tokens=5, **NO_END)) and recorded


def test_what_cannot_be_recorded_goes_on_step_by_step_and_is_not_tried_again(recorded, monkeypatch, caplog):
    tried = []

    def record(call, device):
        tried.append(call)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(modeling, "record", record)
    monkeypatch.setattr(modeling.logger, "propagate", True)
    student, ids = make_student(head_masks=MIXED), random_ids(1, 6)
    expected = student.generate(ids, cache_implementation="dynamic", max_new_tokens=9, **NO_END)
    for _ in range(2):
        assert torch.equal(student.generate(ids, max_new_tokens=9, **NO_END), expected)
    assert len(tried) == 1 and caplog.text.count("cannot be recorded: operation not permitted when stream is cap") == 1


def test_virtual_tokens_are_not_recorded(recorded):
    student, ids = make_student(head_masks=MIXED), random_ids(2, 6)
    peft = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    options = NO_END | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    expected = peft.generate(cache_implementation="dynamic", **options)
    assert torch.equal(peft.generate(**options), expected) and not recorded


def test_adapters_are_recorded(recorded):
    student, ids = make_student(head_masks=MIXED), random_ids(1, 6)
    peft = get_peft_model(student, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    expected = peft.generate(input_ids=ids, cache_implementation="dynamic", max_new_tokens=6, **NO_END)
    assert torch.equal(peft.generate(input_ids=ids, max_new_tokens=6, **NO_END), expected) and recorded


def test_hidden_states_that_were_asked_for_once_leave_nothing_behind(recorded):
    student, ids = make_student(head_masks=MIXED), random_ids(1, 6)
    assert len(student(ids, output_hidden_states=True).hidden_states) == 3
    student.generate(ids, max_new_tokens=6, **NO_END)
    assert recorded


def test_steps_that_wait_for_other_processes_are_not_recorded(recorded, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    make_student(head_masks=MIXED).generate(random_ids(1, 6), synced_gpus=True, max_new_tokens=5, **NO_END)
    assert not recorded


def test_a_loop_of_ones_own_gets_a_cache_that_grows(recorded):
    caches = []

    def loop(model, input_ids, generation_config=None, **kwargs):
        caches.append(kwargs.get(modeling.CACHE))
        return input_ids

    student = make_student(head_masks=MIXED)
    student.generate(random_ids(1, 6), custom_generate=loop, max_new_tokens=5, **NO_END)
    assert [type(cache) for cache in caches] == [DynamicCache]


def test_hooks_of_all_modules_see_every_step(recorded):
    student, seen = make_student(head_masks=MIXED), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module is student))
    try:
        student.generate(random_ids(1, 6), max_new_tokens=6, **NO_END)
    finally:
        handle.remove()
    assert sum(seen) == 6 and not recorded


def test_a_step_of_other_shapes_is_not_replayed(recorded):
    student = make_student(head_masks=MIXED)
    step, calls = modeling.HydraHeadRecordedStep(student), []
    cache = StaticCache(config=student.config, max_cache_len=32)
    with torch.no_grad():
        for count in (6, 1, 1, 1, 2, 1):
            ids = random_ids(1, count, seed=count)
            place = torch.arange(count)[None] + (cache.get_seq_length() if calls else 0)
            found = step(input_ids=ids, position_ids=place, use_cache=True, **{modeling.CACHE: cache}).logits
            calls.append((count, found.shape[1], len(recorded)))
    assert calls == [(6, 6, 0), (1, 1, 0), (1, 1, 0), (1, 1, 1), (2, 2, 1), (1, 1, 2)]
