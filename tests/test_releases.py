"""What users do with a checkpoint, on every release of transformers: CI runs this on the lowest and the newest."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DynamicCache, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from hydrahead import HydraHeadForCausalLM, modeling_hydrahead
from hydrahead.convert import convert_model
from hydrahead.hub.checkpoint import save_checkpoint
from hydrahead.modeling_hydrahead import CACHE
from hydrahead.tests.families import ALL_FULL, make_student, make_teacher, random_ids

OLD = Path(__file__).parent / "checkpoint_0_1"  # written by version 0.1: weights, configuration, what they gave
CODE = [
    Path(inspect.getfile(HydraHeadForCausalLM)).parent / f"{kind}_hydrahead.py"
    for kind in ("modeling", "ops", "kernels", "configuration")
]
EMBEDDED_TEACHER = Path(__file__).parents[1] / "demo" / "teacher"
DEMO_MASKS = [  # as the demo chose them once
    [1, 0, 0, 0, 0, 0, 0, 1],
    [0, 0, 1, 1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0],
    [1, 0, 0, 0, 0, 1, 1, 0],
]
LENGTH, NEW = 20, 8
NO_END = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "max_new_tokens": NEW}
TOLERANCE = 1e-4  # logits of order 5: the order of fp32 sums, which differs between a cache and a whole forward


OTHERS = os.environ.get("HYDRAHEAD_CHECKPOINTS", "").split()  # folders of any checkpoints, to try them too


@pytest.fixture(scope="module", params=["version 0.1", "demo", "all full", *OTHERS])
def folder(request, tmp_path_factory) -> Path:
    """Checkpoint folders: an old one with the new code, the demo's before training, one with nothing converted."""
    if request.param in OTHERS:
        return Path(request.param)
    folder = tmp_path_factory.mktemp("checkpoint") / "hydrahead"
    if request.param == "version 0.1":
        shutil.copytree(OLD, folder)
        for file in CODE:
            shutil.copy(file, folder)
    elif request.param == "demo":
        ids = random_ids(2, 32)
        student = convert_model(
            EMBEDDED_TEACHER, DEMO_MASKS, calibration_ids=ids, fusion_norm="linear", dtype=torch.float32
        )
        save_checkpoint(student, None, folder)
    else:
        save_checkpoint(
            convert_model(make_teacher("llama3-tied"), ALL_FULL, calibration_ids=random_ids(2, 32)), None, folder
        )
    return folder


def load(folder: Path):
    """The checkpoint as `trust_remote_code=True` loads it without hydrahead: by the code that lies in its folder."""
    model_class = get_class_from_dynamic_module("modeling_hydrahead.HydraHeadForCausalLM", folder)
    assert model_class.__module__.startswith("transformers_modules."), model_class
    return model_class.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return random_ids(2, LENGTH, seed=3).clamp(max=63)


@pytest.fixture(scope="module")
def continuation(model, ids) -> torch.Tensor:
    """Greedy tokens `[2, NEW]` by whole forwards that know of no cache."""
    text = ids
    with torch.no_grad():
        for _ in range(NEW):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return text[:, LENGTH:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 1},
        {"prefill_chunk_size": 6},
    ],
    ids=lambda options: next(iter(options), "dynamic"),
)
def test_every_way_of_greedy_generation_gives_the_same_tokens(model, ids, continuation, options):
    assert torch.equal(model.generate(ids, **options, **NO_END)[:, LENGTH:], continuation)


def test_left_padding_changes_no_token(model, ids, continuation):
    padded = torch.cat([torch.full((2, 5), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    generated = model.generate(padded, attention_mask=mask, **NO_END)
    assert torch.equal(generated[:, LENGTH + 5 :], continuation)


def test_beams_carry_their_caches(model, ids):
    options = NO_END | {"num_beams": 3}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", ["past_key_values", CACHE])
def test_generation_goes_on_from_a_cache_under_either_name(model, ids, continuation, name):
    first = model.generate(ids, return_dict_in_generate=True, **NO_END | {"max_new_tokens": 3})
    rest = NO_END | {"max_new_tokens": NEW - 3}
    assert torch.equal(
        model.generate(first.sequences, **{name: getattr(first, CACHE)}, **rest)[:, LENGTH:], continuation
    )


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_forwards_take_a_cache_under_either_name(model, ids, name):
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = [model(part, **{name: cache}, use_cache=True) for part in ids.split(7, dim=1)]
    assert (torch.cat([part.logits for part in parts], dim=1) - whole).abs().max() < TOLERANCE
    assert getattr(parts[-1], CACHE) is cache and cache.get_seq_length() == LENGTH


def test_a_cache_is_never_lost_in_silence(model, ids):
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with pytest.raises(ValueError, match="past_keys holds a cache under a name that is not known"):
        model(ids, past_keys=caches[0])
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=caches[0], past_key_values=caches[1])
    legacy = ((torch.zeros(2, 1, 4, 8), torch.zeros(2, 1, 4, 8)),)
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="must be one of transformers' Cache classes, got tuple"):
            model(ids, **{name: legacy})
    for name in ("cache_params", "past_key_value"):
        with pytest.raises(ValueError, match=f"{name} holds a cache under a name that is not known"):
            model(ids, **{name: legacy})


def test_packed_rows_equal_their_sequences_alone(model, ids):
    lengths = (3, 1, 9, 7)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    with torch.no_grad():
        packed = model(ids[:1], position_ids=positions).logits
        alone = torch.cat([model(part).logits for part in ids[:1].split(lengths, dim=1)], dim=1)
    assert (packed - alone).abs().max() < 10 * TOLERANCE  # a near-zero output, enlarged by a norm


def test_a_clean_process_loads_and_generates_without_a_word_of_deprecation(folder, ids, continuation):
    script = """
import json, sys
sys.modules["hydrahead"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids, options = torch.tensor(json.loads(sys.argv[2])), json.loads(sys.argv[3])
ways = ({}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 6})
generated = [model.generate(ids, **way, **options)[:, ids.shape[1]:].tolist() for way in ways]
model(ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
print(json.dumps(generated))
"""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::FutureWarning",
            "-c",
            script,
            folder,
            json.dumps(ids.tolist()),
            json.dumps(NO_END),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"TRANSFORMERS_VERBOSITY": "warning", "PYTHONPATH": ""},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr, done.stderr
    assert all(tokens == continuation.tolist() for tokens in json.loads(done.stdout.splitlines()[-1]))


def test_trainer_evaluates_and_collects_logits_alone(model, ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=1, report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, eval_dataset=rows)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predictions = trainer.predict(rows).predictions
    assert getattr(predictions, "shape", None) == (2, LENGTH, model.config.vocab_size)


def test_gradient_checkpointing_refuses_a_cache(folder, ids):
    """A layer that runs twice would fill it twice, and transformers drops it under one of its two names only."""
    model = load(folder).train()
    plain = model(ids, labels=ids).loss
    model.gradient_checkpointing_enable()
    assert torch.equal(model(ids, labels=ids).loss, plain)
    for name in ("cache", "past_key_values"):
        with pytest.raises(ValueError, match="would fill the cache twice"):
            model(ids, labels=ids, **{name: DynamicCache(config=model.config)})
    assert model.generate(ids, **NO_END).shape == (2, LENGTH + NEW)  # without gradients layers run once


def test_adapters_train_and_generate(folder, ids):
    model = load(folder)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["fusion"]))
    optimizer = torch.optim.SGD((p for p in tuned.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    tuned.eval()
    cached = tuned.generate(input_ids=ids, **NO_END)
    assert torch.equal(cached, tuned.generate(input_ids=ids, use_cache=False, **NO_END))
    assert torch.equal(cached, tuned.merge_and_unload().generate(ids, **NO_END))


def test_prefix_tuning_passes_its_cache_by_the_old_name():
    """Where all heads are full attention: a prefix is keys and values, and a recurrent state has none."""
    student, ids = make_student(head_masks=ALL_FULL), random_ids(2, 6)
    tuned = get_peft_model(student, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad():
        assert (tuned(input_ids=ids).logits - student(ids).logits).abs().max() > 1e-3
        text = ids
        for _ in range(NEW):
            text = torch.cat([text, tuned(input_ids=text).logits[:, -1:].argmax(-1)], dim=1)
    try:
        assert torch.equal(tuned.generate(input_ids=ids, **NO_END), text)
    except ValueError as error:
        # peft 0.21 on transformers 5.24 passes the prefix beside the cache that `generate` made, where transformers'
        # own models lose it in silence.
        assert CACHE == "cache" and "two names of one argument" in str(error)


def test_a_checkpoint_of_version_0_1_gives_what_it_gave(tmp_path):
    folder = shutil.copytree(OLD, tmp_path / "old")
    for file in CODE:
        shutil.copy(file, folder)
    model = load(folder).eval()
    expected = load_file(OLD / "expected.safetensors")
    with torch.no_grad():
        off = (model(expected["input_ids"]).logits - expected["logits"]).abs().amax((1, 2))
    # Noise of 6e-8 in the weights moves the first row by 1e-4, even in fp64, the second by 8e-6: a norm of what is
    # nearly zero, and processors sum in different orders.
    assert off[0] < 5e-4 and off[1] < 1e-5
    assert torch.equal(model.generate(expected["input_ids"], **NO_END)[:, LENGTH:], expected["generated"])


def test_no_name_of_a_cache_is_left_out():
    """Of those that transformers calls a cache on this release, none may end in **kwargs."""
    for forward in (modeling_hydrahead.HydraHeadModel.forward, HydraHeadForCausalLM.forward):
        assert {"cache", "past_key_values"} <= set(inspect.signature(forward).parameters)
    assert CACHE in HydraHeadForCausalLM._skip_keys_device_placement
    assert CACHE in HydraHeadForCausalLM.config_class.keys_to_ignore_at_inference
