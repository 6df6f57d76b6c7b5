"""Recipes: what is wrong is one line, before anything is downloaded or allocated; what ships is right."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hydrahead.configuration_hydrahead import HydraHeadConfig
from hydrahead.convert import migration, teachers
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import save_forms
from hydrahead.convert.options import OPTIONS, options_of, student_config
from hydrahead.convert.teachers import adapter_for, open_teacher
from hydrahead.hub.checkpoint import save_checkpoint
from hydrahead.modeling_hydrahead import HydraHeadForCausalLM
from hydrahead.tests.families import ALL_LINEAR, MIXED, make_student, make_teacher, random_ids
from hydrahead.tests.training_runs import MAINS, make_inputs, write_recipe
from hydrahead.training import stage as stage_module
from hydrahead.training.cost import estimate
from hydrahead.training.data import check_rows
from hydrahead.training.recipe import RECIPES, STAGES, load_recipe, shipped_recipes
from hydrahead.training.speed import GPUS


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A recipe whose weights nobody may read."""
    recipe = make_inputs(tmp_path)

    def read(*_, **__):
        pytest.fail("read weights or started processes before the recipe was checked")

    monkeypatch.setattr(teachers.Teacher, "load", read)
    monkeypatch.setattr(stage_module, "Accelerator", read)
    monkeypatch.setattr(stage_module, "stage_batches", read)
    monkeypatch.setattr(migration, "read_safetensors", read)
    return tmp_path, recipe


def refusal(stage, folder, recipe, capsys, *overrides) -> str:
    """The one line on stderr with which a stage refuses a recipe."""
    with pytest.raises(SystemExit) as stopped:
        MAINS[stage](["--config", write_recipe(folder, recipe), *overrides])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("hydrahead: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "align.learning_rat=1",
            "align.learning_rat: .* Did you mean one of: 'learning_rate', .*known: tokens, ",
        ),
        ("aling.tokens=1", "aling: Key 'aling' not in 'Recipe'. Did you mean: 'align'?"),
        ("align.tokens=many", "align.tokens: Value 'many' of type 'str' could not be converted to Integer"),
        ("align.tokens=10.5", "align.tokens: Value '10.5' .* could not be converted to Integer"),
        ("align.mode=rows", r"align.mode: Invalid value 'rows', expected one of \['heads', 'layers'\]"),
        ("data=demo", "data: .*str is not a subclass of DataSection"),
        ("output.name=1", "output: Cannot convert 'DictConfig' to string"),
        ("tokens", "tokens: expected key=value"),
        ("output=${oc.env:HOME}", r"output: .*oc.env:HOME}: recipes do not replace"),
        ("data.name=nowhere/text.jsonl", "data: nowhere/text.jsonl: no such file"),
        ("teacher.name=./nowhere", "nowhere: no such folder"),
        ("align.length=128", "align: rows of 128 tokens, the teacher's max_position_embeddings is 64"),
        ("align.batch_tokens=100", "align.batch_tokens .* must be a multiple of run.micro_batch_tokens"),
        ("run.micro_batch_tokens=48", "run.micro_batch_tokens .* must be a multiple of the align length"),
        ("align.tokens=8", "align.tokens .* must be at least one batch"),
        ("align.long_share=0.5", "align.long_share needs a section long_data"),
        ("run.report_to=nosuchtracker", "run.report_to: nosuchtracker is not installed"),
        ("run.keep=0", "run.keep: 0, expected 1 or more"),
        ("evaluate={every: 5, length: 600}", "evaluate: 512 tokens are held out .*, a window of 600 needs more"),
        ("student.fusion=sum", "fusion must be one of"),
        ("data.heldout_tokens=0", "data.heldout_tokens: alignment measures heads on held-out text"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_in_one_line_before_weights_are_read(override, line, inputs, capsys):
    folder, recipe = inputs
    assert re.match(f"hydrahead: .*({line.replace('?', '[?]')})", refusal("align", folder, recipe, capsys, override))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("masks=null", "masks: missing from the recipe"),
        ("masks=nowhere.json", "masks: nowhere.json: no such file"),
        ("masks=[[1, 0], [0, 1]]", r"head_masks\[0\] must have one entry per query head"),
        ("distill.length=128", "distill: rows of 128 tokens"),
        ("distill.student=./nowhere", "nowhere: no student there"),
        ("seed=1", "seed: Key 'seed' not in 'Recipe'"),
        ("distill.lora={target_modules: [nowhere]}", r"lora.target_modules \['nowhere'\]: No modules were targeted"),
    ],
)
def test_distillation_refuses_masks_and_students_that_do_not_fit(override, line, inputs, capsys):
    folder, recipe = inputs
    assert re.match(f"hydrahead: .*({line})", refusal("distill", folder, recipe, capsys, override))


def test_a_student_or_heads_of_another_teacher_are_refused(inputs, capsys):
    folder, recipe = inputs
    make_student(vocab_size=2048, intermediate_size=80).save_pretrained(folder / "other")
    for stage in ("distill", "finetune"):
        said = refusal(stage, folder, recipe, capsys, f"{stage}.student={folder / 'other'}")
        assert "not a student of this teacher: intermediate_size is 80, the teacher's 64" in said
    assert "alignment writes it" in refusal("distill", folder, recipe, capsys)
    for shape, layers in (((6, 16, 32), 2), ((6, 16, 48), 3), ((6, 16, 48), 1)):
        tensors = {f"{i}.linear.q_proj.weight": torch.ones(shape) for i in range(layers)}
        tensors |= {f"{i}.full.k_proj.weight": torch.ones(2, *shape[1:]) for i in range(layers)}
        save_file(tensors, folder / "forms.safetensors")
        said = refusal("distill", folder, recipe, capsys, f"distill.head_forms={folder / 'forms.safetensors'}")
        assert "heads of another teacher" in said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"teacher": "another"}, "made from the teacher another, not from teacher: "),
        ({"revision": "v2"}, "made from the teacher teacher at v2, not from teacher: "),
        (
            {"head_masks": ALL_LINEAR},
            "but one of another choice of heads: leave masks out of the recipe",
        ),
        (
            {"fusion_norm": "linear"},
            "but one of another fusion_norm ('linear', now 'all')",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_student_that_the_recipe_does_not_make_is_refused_by_name(changes, line, inputs, capsys):
    folder, recipe = inputs
    masks = {"head_masks": changes.get("head_masks", MIXED)}
    options = {key: value for key, value in changes.items() if key in OPTIONS}
    config = student_config(open_teacher(recipe["teacher"]["name"]).adapter, **masks, **options)
    made_from = {"teacher": "teacher", "revision": None, "masks": {}, "forms": {}, "stages": []}
    made_from |= {key: value for key, value in changes.items() if key in made_from}
    save_checkpoint(HydraHeadForCausalLM(config), None, folder / "student", made_from)
    for stage in ("distill", "finetune"):
        said = refusal(stage, folder, recipe, capsys, f"{stage}.student={folder / 'student'}")
        assert f"{folder / 'student'}: " in said and line in said


def test_a_teacher_cache_that_does_not_fit_is_refused_before_anything_is_written(inputs, capsys):
    folder, recipe = inputs
    config = student_config(open_teacher(recipe["teacher"]["name"]).adapter, MIXED)
    save_checkpoint(HydraHeadForCausalLM(config), None, folder / "student")
    cache = f"distill.teacher_cache={{folder: {folder / 'logits'}, top_k: 4096}}"
    said = refusal("distill", folder, recipe, capsys, f"distill.student={folder / 'student'}", cache)
    assert "distill.teacher_cache.top_k must be 1 … 2048, got 4096" in said
    assert not (folder / "logits").exists() and not (folder / "out").exists()


def test_a_student_of_version_0_1_keeps_what_it_says_it_was_trained_on(inputs):
    folder, recipe = inputs
    config = student_config(open_teacher(recipe["teacher"]["name"]).adapter, MIXED)
    save_checkpoint(HydraHeadForCausalLM(config), None, folder / "student")
    trained = [{"stage": "distill", "summary": "8 tokens", "recipe": {}}]
    (folder / "student" / "training.json").write_text(json.dumps(trained))
    path = write_recipe(folder, recipe)
    stage = stage_module.Stage(load_recipe(path, [f"finetune.student={folder / 'student'}"]), "finetune")
    made_from = stage.made_from(stage.check_student(folder / "student"))
    assert (made_from["teacher"], made_from["stages"]) == ("teacher", trained)


def test_heads_aligned_for_other_options_are_refused_by_name(inputs, capsys):
    """Under RoPE, heads that were aligned for NoPE would train in silence."""
    folder, recipe = inputs
    teacher = make_teacher("qwen3-tied", vocab_size=2048)
    config = student_config(adapter_for(teacher.config), ALL_LINEAR)
    file = folder / "forms.safetensors"
    save_forms(head_forms_of(teacher, random_ids(2, 24), config), options_of(config), file)
    for option, line in {
        "full_attention_position=rope": "full_attention_position 'nope', and 'rope' is asked for: ask for 'nope'",
        "full_attention_gate=false": "full_attention_gate True, and False is asked for",
        "fusion=concat": "fusion 'scale', and 'concat' is asked for",
    }.items():
        said = refusal("distill", folder, recipe, capsys, f"distill.head_forms={file}", f"student.{option}")
        assert f"{file}: its heads were aligned for {line}" in said


def test_an_alignment_goes_on_with_the_kinds_of_forms_that_it_began_with(inputs):
    """Before they were recorded all were fitted, also those that are left alone now."""
    folder, values = inputs
    values = values | {"student": {"full_attention_position": "rope", "fusion_norm": "linear"}}
    recipe = load_recipe(write_recipe(folder, values))
    assert stage_module.Stage(load_recipe(write_recipe(folder, values | {"student": {}})), "align").kinds == [
        "linear",
        "full",
    ]
    assert (
        stage_module.Stage(recipe, "distill").kinds == []
        and "kinds" not in stage_module.Stage(recipe, "distill").record()
    )
    begun = stage_module.Stage(recipe, "align")
    assert begun.kinds == begun.record()["kinds"] == ["linear"]
    for kinds, expected in (({"kinds": ["linear"]}, ["linear"]), ({}, ["linear", "full"])):
        record = {key: value for key, value in begun.record().items() if key != "kinds"} | kinds
        begun.folder.mkdir(parents=True, exist_ok=True)
        begun.earlier.write(record)
        assert stage_module.Stage(recipe, "align").kinds == expected


def test_the_curriculum_is_checked(inputs, capsys):
    folder, recipe = inputs
    longer = "finetune.curriculum=[[16, 0.5], [128, 0.5]]"  # than the teacher knows: it does not read them
    assert "run.micro_batch_tokens (64) must be a multiple of the finetune length (128)" in refusal(
        "finetune", folder, recipe, capsys, longer
    )
    said = refusal("finetune", folder, recipe, capsys, "finetune.curriculum=[[16, 0.5]]")
    assert "shares add up to 1" in said
    said = refusal("distill", folder, recipe, capsys, "distill.curriculum=[[16, 0.5], [128, 0.5]]")
    assert "distill.curriculum: rows of 128 tokens" in said
    both = ["distill.curriculum=[[16, 0.5], [32, 0.5]]", f"distill.teacher_cache.folder={folder / 'cache'}"]
    assert "distill.teacher_cache: its rows are all of one length" in refusal("distill", folder, recipe, capsys, *both)


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    path = write_recipe(tmp_path, make_inputs(tmp_path))
    recipe = load_recipe(path, ["align.tokens=8e8", "align.learning_rate=1e-3", "run.mixed_precision=no"])
    assert recipe.align.tokens == 800_000_000 and recipe.align.learning_rate == 1e-3
    assert recipe.run.mixed_precision == "no" and load_recipe(path, ["distill.lora.r=4"]).distill.lora.r == 4


def test_an_output_with_another_recipe_is_not_mixed_with_this_one(inputs, capsys):
    folder, recipe = inputs
    stage = stage_module.Stage(load_recipe(write_recipe(folder, recipe)), "align")
    stage.folder.mkdir(parents=True)
    (stage.folder / "recipe.json").write_text(json.dumps(stage.record()))
    stage_module.Stage(load_recipe(write_recipe(folder, recipe), ["run.save_every=7", "distill.tokens=512"]), "align")
    said = refusal("align", folder, recipe, capsys, "align.learning_rate=0.5")
    assert "made with another align.learning_rate (0.01, now 0.5)" in said


SHAPES = {
    "Qwen/Qwen3-1.7B": {},  # what HydraHeadConfig has by default
    "meta-llama/Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "qk_norm": False,
    },
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "qk_norm": False,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "qk_norm": False,
    },
}
TEACHER = {"full_attention_position": "rope", "full_attention_gate": False, "fusion": "concat"}


@pytest.mark.parametrize("name", sorted(set(shipped_recipes()) - {"demo"}))
def test_a_shipped_recipe_fits_its_teacher_and_the_gpus_that_it_asks_for(name):
    recipe = load_recipe(name)
    teacher = HydraHeadConfig(**SHAPES[recipe.teacher.name] | TEACHER)
    every = {"3to1": 4, "7to1": 8}[name.rsplit("-", 1)[1]]
    masks = [[int(head % every == 0) for head in range(teacher.num_attention_heads)]] * teacher.num_hidden_layers
    student = HydraHeadConfig(**SHAPES[recipe.teacher.name] | {"head_masks": masks})
    assert recipe.data.name == "HuggingFaceFW/fineweb-edu"
    minutes = {"smollm2": [12e6, 40e6, 8e6], "qwen2.5": [40e6, 80e6, 16e6]}
    hours = {"qwen3-1.7b-7to1": [4e8, 1e9, 1e8]}  # of eight GPUs; others as in the paper
    tokens = minutes.get(name.split("-")[0]) or hours.get(name, [8e8, 4e9, 1e9])
    assert [getattr(recipe, stage).tokens for stage in STAGES] == tokens
    assert recipe.score and recipe.select.ratio == 1 / every and recipe.evaluate.lengths
    assert tokens in minutes.values() or max(recipe.evaluate.lengths) <= teacher.max_position_embeddings
    for stage in STAGES:
        for processes in (1,) if recipe.launch is None else (1, 2, 4, 8):
            check_rows(recipe, stage, teacher.max_position_embeddings, processes)
            memory = estimate(recipe, stage, student, teacher).memory(processes)
            assert sum(memory.values()) < GPUS["h100"].memory


def test_a_dry_run_prints_the_cost_and_writes_nothing(inputs, capsys):
    folder, recipe = inputs
    for stage in STAGES:
        MAINS[stage](["--config", write_recipe(folder, recipe), "--dry-run"])
        said = capsys.readouterr().out
        assert said.startswith(f"{stage}: ") and "GPU-hours" in said and "computed, not measured" in said
        assert "warning" not in said
        MAINS[stage](["--config", write_recipe(folder, recipe), "--dry-run", f"{stage}.warmup_steps=50"])
        said = capsys.readouterr().out
        assert "is not read" not in said
        assert re.search(rf"^warning: 50 of \d+ steps warm up; lower {stage}\.warmup_steps or ", said, flags=re.M)
    unread = ["distill.length=64", "distill.curriculum=[[16, 0.5], [32, 0.5]]"]
    MAINS["distill"](["--config", write_recipe(folder, recipe), "--dry-run", *unread])
    assert (
        "warning: distill.length is not read: rows are of 16 and 32 tokens; distill.curriculum=null"
        in capsys.readouterr().out
    )
    assert not (folder / "out").exists()


def test_masks_are_those_that_select_writes_unless_the_recipe_has_some():
    assert load_recipe("demo", ["output=here"]).masks == "here/head_masks.json"
    assert load_recipe("demo", ["masks=mine.json"]).masks == "mine.json"


def test_every_accelerate_configuration_leaves_precision_to_the_recipe():
    """FSDP's own bf16 would round gates and decay."""
    files = sorted((RECIPES / "accelerate").glob("*.yaml"))
    assert [file.stem for file in files] == ["ddp", "ddp_cpu", "fsdp2"]
    for file in files:
        assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"


@pytest.mark.parametrize(
    ("stage", "environment", "line"),
    [
        ("finetune", {"PARALLELISM_CONFIG_CP_SIZE": "2"}, "parallelism_config cp_size: only data can be parallel"),
        ("distill", {"PARALLELISM_CONFIG_SP_SIZE": "2"}, "parallelism_config sp_size: only data can be parallel"),
        ("align", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: launch with FSDP2"),
        ("distill", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported: launch with FSDP2"),
        ("align", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2 is needed"),
        (
            "distill",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "evaluate.every: weights sharded by FSDP cannot generate",
        ),
        ("distill", {"WORLD_SIZE": "3"}, "distill.batch_tokens .* times the processes"),
    ],
)
def test_engines_that_would_compute_something_else_are_refused(stage, environment, line, inputs, capsys, monkeypatch):
    folder, recipe = inputs
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert re.match(f"hydrahead: {line}", refusal(stage, folder, recipe, capsys, "evaluate.every=5"))


def test_masks_chosen_for_another_teacher_are_refused_by_name(inputs, capsys):
    folder, recipe = inputs
    (folder / "masks.json").write_text(json.dumps({"masks": MIXED, "teacher": "other"}))
    line = refusal("distill", folder, recipe, capsys, f"masks={folder / 'masks.json'}")
    assert "masks.json: made from the teacher other, not from teacher" in line
