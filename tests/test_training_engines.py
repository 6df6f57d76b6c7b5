"""However a batch is divided, and whatever shards the weights, a stage computes the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hydrahead.hub.folder import read_made_from
from hydrahead.provenance import digest
from hydrahead.tests.training_runs import finish_stage, make_inputs, metrics_of, write_recipe

STAGES = ("align", "distill", "finetune")
FEW_STEPS = [f"{stage}.{key}" for stage in STAGES for key in ("tokens=1024", "learning_rate=1e-3")]
# Sums of 256 tokens in another order, through 4 steps of Adam. Not a mean of means: rows weigh differently.
TOLERANCE = {"rel": 1e-5, "abs": 1e-6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All stages, on one process and with rows one by one."""
    folder = tmp_path_factory.mktemp("engines")
    recipe = make_inputs(folder)
    recipe["data"]["separate_documents"] = True
    path = write_recipe(folder, recipe)
    for stage in STAGES:
        finish_stage(stage, ["--config", path, *FEW_STEPS, "run.micro_batch_tokens=32"])
    return folder, path


def run_again(folder, path, stage, out, changes, processes=1, sharded=False):
    """The record of a stage that starts from the same earlier stages."""
    for earlier in STAGES[: STAGES.index(stage)]:
        shutil.copytree(folder / "out" / earlier, out / earlier)
    cache = f"data.cache={folder / 'out' / 'tokens'}"
    finish_stage(stage, ["--config", path, *FEW_STEPS, f"output={out}", cache, *changes], processes, sharded)
    return metrics_of(out / stage)


def assert_same_run(found, expected):
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected):
        for name in other:
            assert one[name] == pytest.approx(
                other[name], **TOLERANCE | ({"rel": 1e-4} if name == "grad_norm" else {})
            )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("micro_tokens", "processes", "sharded"),
    [(256, 1, False), (128, 2, False), (32, 2, False), (64, 2, True)],
    ids=["8x1", "2 processes x 4", "2 x 1 x 4 accumulated", "2 shards x 2 x 2 accumulated"],
)
def test_a_batch_can_be_divided_in_any_way(stage, micro_tokens, processes, sharded, finished, tmp_path):
    folder, path = finished
    changes = [f"run.micro_batch_tokens={micro_tokens}"]
    found = run_again(folder, path, stage, tmp_path / "out", changes, processes, sharded)
    assert_same_run(found, metrics_of(folder / "out" / stage))


@pytest.mark.slow
def test_a_sharded_run_resumes_and_writes_the_same_student(finished, tmp_path):
    """Two shards, stopped after two steps of four; the student is whole."""
    folder, path = finished
    out = tmp_path / "out"
    changes = ["run.micro_batch_tokens=128", "run.save_every=2", "run.keep=5"]
    whole = run_again(folder, path, "distill", out, changes, processes=2, sharded=True)
    shutil.rmtree(out / "distill" / "student")
    shutil.rmtree(out / "distill" / "checkpoint-4")
    cache = f"data.cache={folder / 'out' / 'tokens'}"
    finish_stage("distill", ["--config", path, *FEW_STEPS, f"output={out}", cache, *changes], 2, True)
    assert metrics_of(out / "distill") == whole
    found, expected = (load_file(each / "distill" / "student" / "model.safetensors") for each in (out, folder / "out"))
    assert found.keys() == expected.keys()
    # Adam divides by what is nearly zero where a gradient is: single weights may differ by a share of a step.
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        ("distill", "one", "replicas"),
        ("align", "replicas", "one"),
        ("finetune", "one", "shards"),
        ("distill", "shards", "one"),
        ("align", "replicas", "shards"),
        ("finetune", "shards", "replicas"),
    ],
)
def test_a_checkpoint_goes_on_under_another_engine(stage, before, after, finished, tmp_path):
    """Where a layer has a single linear head, one of two shards of its decay is empty."""
    folder, path = finished
    engines = {"one": (1, False), "replicas": (2, False), "shards": (2, True)}
    changes = ["run.micro_batch_tokens=64", "run.save_every=2", "run.keep=5"]
    if stage == "distill":
        changes.append(f"masks={json.dumps([[1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 0]])}")
    out, cache = tmp_path / "out", f"data.cache={folder / 'out' / 'tokens'}"
    whole = run_again(folder, path, stage, out, changes, *engines[before])
    for left in (out / stage).iterdir():  # all but what was there after half of it
        if left.name not in ("checkpoint-2", "recipe.json", "metrics.jsonl"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    finish_stage(stage, ["--config", path, *FEW_STEPS, f"output={out}", cache, *changes], *engines[after])
    assert_same_run(metrics_of(out / stage), whole)


@pytest.mark.slow
def test_adapters_train_what_the_recipe_names_and_are_merged(finished, tmp_path):
    folder, path = finished
    changes = ["distill.lora.r=4", "distill.lora.modules_to_save=[fusion, short_conv]"]
    run_again(folder, path, "distill", tmp_path / "out", changes)
    found = load_file(tmp_path / "out" / "distill" / "student" / "model.safetensors")
    started = load_file(folder / "out" / "align" / "head_forms.safetensors")
    full = load_file(folder / "out" / "distill" / "student" / "model.safetensors")
    assert found.keys() == full.keys()
    before = AutoModelForCausalLM.from_pretrained(folder / "teacher").state_dict()
    same = [name for name in found if name in before and torch.equal(found[name], before[name])]
    assert {name.split(".")[-2] for name in same} == {
        *("input_layernorm", "post_attention_layernorm", "norm", "embed_tokens"),
    }
    moved = "model.layers.0.self_attn.fusion.weight"
    assert not torch.equal(found[moved], started["0.linear.gamma"]) and not torch.equal(
        found[moved], started["0.full.gamma"]
    )
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "distill" / "student", dtype=torch.float32)
    assert not any("lora" in name for name in student.state_dict())


@pytest.mark.slow
def test_the_teachers_likeliest_tokens_on_disk_are_exact_for_all_of_them(finished, tmp_path):
    folder, path = finished
    cache = [f"distill.teacher_cache.folder={tmp_path / 'logits'}", "run.micro_batch_tokens=64"]
    changes = [*cache, "distill.teacher_cache.top_k=2048"]
    first = run_again(folder, path, "distill", tmp_path / "first", changes)
    assert_same_run(first, metrics_of(folder / "out" / "distill"))
    assert run_again(folder, path, "distill", tmp_path / "second", changes) == first  # read, not computed
    done = (tmp_path / "logits" / "done.bin").read_bytes()
    assert done == b"\1" * (1024 // 32)


@pytest.mark.slow
def test_a_student_records_what_it_was_trained_on_and_how_rows_were_mixed(finished, tmp_path):
    folder, path = finished
    shutil.copytree(folder / "out" / "distill", tmp_path / "out" / "distill")
    text = {"name": str(folder / "text.jsonl"), "heldout_tokens": 0}
    changes = [f"long_data={json.dumps(text)}", "finetune.long_share=0.25", "run.save_dtype=bfloat16"]
    finish_stage("finetune", ["--config", path, *FEW_STEPS, f"output={tmp_path / 'out'}", *changes])
    student = tmp_path / "out" / "finetune" / "student"
    card, made_from = (student / "README.md").read_text(), read_made_from(student)
    assert [entry["stage"] for entry in made_from["stages"]] == ["distill", "finetune"]
    forms = folder / "out" / "align" / "head_forms.safetensors"
    assert made_from["teacher"] == "teacher" and made_from["forms"]["sha256"] == digest(forms)
    assert made_from["options"]["full_attention_position"] == "nope"
    for entry in (made_from["forms"], *made_from["stages"]):
        assert {"text", "recipe", "teacher_dtype", "steps", "versions", "seed"} <= entry.keys()
    assert "25% of rows from long documents" in card and str(folder) not in card
    state = load_file(student / "model.safetensors")
    kept = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in state if ".gates." in name or ".fusion." in name}
    assert json.loads((student / "config.json").read_text())["dtype"] == "bfloat16"
