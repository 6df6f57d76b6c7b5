"""What is planned from a config alone: parameters and bytes as the model has them, times as they were measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hydrahead import HydraHeadConfig, HydraHeadForCausalLM
from hydrahead.benchmarks.measured import OUTPUT, measured, scaling
from hydrahead.cli import app
from hydrahead.convert import HeadScores, select_heads
from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.tests.families import ALL_FULL, ALL_LINEAR, MIXED, make_student, student_fields
from hydrahead.training import speed
from hydrahead.training.cost import decode_bytes, parameters, weight_bytes
from hydrahead.training.plan import make_plan
from hydrahead.training.recipe import STAGES
from hydrahead.training.speed import GPUS, check_points, efficiency, least_squares, points, several_share

ROOT = Path(__file__).parents[1]
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "32B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
MILLION = 2**20


@pytest.fixture(scope="module", params=SHAPES)
def size(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Teachers of which there is nothing but their config."""
    found = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(QWEN3 | shape))
        found[name] = str(folder)
    return found


def on_meta(config: HydraHeadConfig) -> HydraHeadForCausalLM:
    with torch.device("meta"):
        return HydraHeadForCausalLM(config)


def bytes_in_bf16(model: HydraHeadForCausalLM) -> int:
    kept = model._keep_in_fp32_modules_strict
    return sum(p.numel() * (4 if any(part in name for part in kept) else 2) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_masks": ALL_LINEAR, "attention_bias": True},
        {"head_masks": ALL_FULL, "full_attention_gate": False, "fusion": "concat", "qk_norm": False},
        {"fusion": "gate", "attention_output_bias": True, "short_conv_kernel_size": 3, "tie_word_embeddings": False},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_parameters_and_their_bytes_are_those_of_the_model(changes):
    model = make_student(**changes)
    assert parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(model.config) == bytes_in_bf16(model)


@pytest.mark.parametrize(("unit", "ratio"), [("kv_groups", 0.125), ("heads", 0.25)])
def test_a_plan_counts_a_large_hybrid_as_it_would_be_built(size, folders, unit, ratio):
    plan = make_plan(folders[size], ratio=ratio, budget_unit=unit, context=MILLION)
    shape = SHAPES[size]
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    teacher, hybrid = plan["models"]["teacher"], plan["models"]["hybrid"]
    assert teacher["parameters"] == {"8B": 8_190_735_360, "32B": 32_762_123_264}[size]  # as Qwen's checkpoints have
    assert (teacher["full_attention_heads"], teacher["kv_heads"]) == (layers * heads, layers * 8)
    assert hybrid["full_attention_heads"] == ratio * layers * heads
    for model in (teacher, hybrid):
        assert model["kv_bytes"] == model["kv_heads"] * 2 * 128 * 2 * MILLION
        linear = layers * heads - model["full_attention_heads"]
        assert model["state_bytes"] == linear * (128 * 128 * 4 + 3 * 128 * 4 * 2)
    if unit == "kv_groups":
        assert hybrid["kv_heads"] == layers * 8 // 8
        masks = select_heads(HeadScores.drawn(layers, heads, 8), ratio)
        fields = {key: value for key, value in (QWEN3 | shape).items() if key != "model_type"}
        built = on_meta(HydraHeadConfig(**fields, head_masks=masks))
        assert hybrid["parameters"] == sum(parameter.numel() for parameter in built.parameters())
        assert hybrid["weight_bytes"] == bytes_in_bf16(built)
    else:
        least, most = ratio * layers * 8, min(hybrid["full_attention_heads"], layers * 8)
        assert least < hybrid["kv_heads"] <= most
        note = plan["notes"][0]
        assert f"they read {hybrid['kv_heads']} of {layers * 8} KV heads, where so many heads may read" in note


def test_what_fits_a_gpu_is_what_memory_leaves_beside_the_weights(folders):
    plan = make_plan(folders["8B"], ratio=0.125, budget_unit="kv_groups", context=131_072)
    for model in plan["models"].values():
        fits = model["sequences_that_fit"]
        each = model["kv_bytes"] + model["state_bytes"]
        assert model["weight_bytes"] + fits * each <= 80e9 < model["weight_bytes"] + (fits + 1) * each
    plan = make_plan(folders["32B"], context=MILLION, batch=2)
    assert [model["sequences_that_fit"] for model in plan["models"].values()] == [0, 0]
    assert any("hybrid: weights and 2 x 1,048,576 tokens take" in note for note in plan["notes"])
    assert "context: 25.6 times the teacher's native length of 40,960 tokens" in plan["notes"]


def test_a_step_reads_weights_once_and_every_sequences_cache():
    config = HydraHeadConfig(**student_fields(tie_word_embeddings=False))
    one, two = (decode_bytes(config, 1000, batch) for batch in (1, 2))
    assert two - one == config.kv_bytes_per_token() * 1000 + 2 * config.state_bytes()
    unread = 2 * config.vocab_size * config.hidden_size  # an embedding gives one row
    assert one == weight_bytes(config) - unread + (two - one)
    tied = HydraHeadConfig(**student_fields(tie_word_embeddings=True))
    assert decode_bytes(tied, 1000, 1) == one  # whose head reads it


def test_longer_contexts_and_larger_batches_take_longer_and_faster_gpus_less(folders):
    def seconds(**options) -> list[float]:
        models = make_plan(folders["8B"], budget_unit="kv_groups", **options)["models"]
        assert all(model["decode_bound_seconds"] < model["decode_seconds"] for model in models.values())
        hybrid = models["hybrid"]
        return [models["teacher"]["decode_seconds"], hybrid["decode_seconds"], hybrid["prefill_seconds"]]

    base = seconds(context=131_072)
    for slower in (seconds(context=MILLION), seconds(context=131_072, batch=8), seconds(context=131_072, gpu="a100")):
        assert all(slow > fast for slow, fast in zip(slower, base))
    assert all(quick <= fast for quick, fast in zip(seconds(context=131_072, gpu="h200"), base))


def test_the_points_in_the_package_are_those_of_the_benchmarks():
    """Where this fails, `python benchmarks/report.py` has to be run: a benchmark was measured again."""
    assert json.loads(OUTPUT.read_text()) == json.loads(json.dumps(measured()))


def test_a_point_is_predicted_from_the_bytes_that_the_benchmark_counted():
    """Irregular masks are drawn anew: they pin other KV heads than those measured, nearly as many."""
    parts = json.loads((ROOT / "benchmarks" / "decode-cuda.json").read_text())["parts"]
    counted = {row["model"]: row.get("kv_bytes_per_token") for part in parts.values() for row in part["rows"]}
    for point in points():
        if (exact := counted[point.facts["model"]]) is not None:
            irregular = point.facts.get("budget_unit") == "heads"
            assert point.config.kv_bytes_per_token() == pytest.approx(exact, rel=0.05 if irregular else 0)


def test_least_squares_are_those_of_what_is_not_negative():
    rows = np.array([(0.5, 0.1), (0.5, 0.2), (0.6, 0.1)])
    assert least_squares(rows) == pytest.approx(np.linalg.lstsq(rows, np.ones(3))[0])
    rows = np.array([(0.5, 0.1), (0.7, 0.9), (0.6, 0.5)])
    assert np.linalg.lstsq(rows, np.ones(3))[0][1] < 0
    assert least_squares(rows) == pytest.approx((1.8 / 1.1, 0))  # of the first column alone
    assert least_squares(rows[:, ::-1]) == pytest.approx((0, 1.8 / 1.1))


def test_efficiencies_are_shares_of_what_a_gpu_can_do():
    found = efficiency()
    assert 0.1 < found.decode_share < 1 and 0 <= found.kernel_seconds < 2e-5
    assert all(0.05 < share < 0.7 for share in found.prefill_share.values())
    assert all(0.05 < speed.stage_share(stage) < 0.7 for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_small_model_trains_at_a_smaller_share_of_a_gpu(stage):
    (least, low), (most, high) = speed.stage_points(stage)
    assert least < most and low < high == pytest.approx(speed.stage_share(stage))
    assert (
        speed.stage_share(stage, least) == pytest.approx(low) == pytest.approx(speed.stage_share(stage, least / 100))
    )
    assert speed.stage_share(stage, 100 * most) == pytest.approx(high)
    assert speed.stage_share(stage, (least * most) ** 0.5) == pytest.approx((low * high) ** 0.5)


def test_a_recipe_that_was_run_and_not_fitted_took_what_its_plan_says():
    rows = [row for row in check_points() if row["case"].startswith("smollm2")]
    names = {row["case"].split(",")[0] for row in rows}
    assert names == {"smollm2-135m-3to1", "smollm2-135m-7to1"} and len(rows) == 7, "one alignment serves both"
    assert sum(row["what"] == "distill, bytes" for row in rows) == 2
    assert all(abs(row["error"]) < 0.1 for row in rows)


def test_the_check_names_every_measurement_and_its_error():
    rows = check_points()
    stages, several = speed.MEASURED["training"], speed.MEASURED["scaling"]
    count = len(points()) + sum(3 + len(report["peak_bytes"]) for report in stages) + len(speed.MEASURED["recipes"])
    assert len(rows) == count + 3 * len(several) + sum("bytes" in recipe for recipe in speed.MEASURED["recipes"])
    for row in rows:
        assert row["predicted"] is None or row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    memory = [row for row in rows if row["note"].startswith("above weights")]
    assert memory and all(abs(row["error"]) < 0.1 for row in memory)


def test_runs_on_several_gpus_are_checked_too(monkeypatch):
    found = {"tokens_per_second": {"1": 9e3, "4": 1e4}, "memory_gb": 50.0, "first_step_seconds": 1.0}
    training = speed.MEASURED["training"][0]
    report = {
        "shape": {"name": "1.7b"} | {key: value for key, value in training["shape"].items() if key != "vocab_size"},
        "settings": {"rows": 2, "length": 4096, "speed_vocabulary": 151936},
        "runs": {
            "one": {"distill": found, "processes": 1, "seconds": 1.0},
            "fsdp2": {"distill": found, "finetune": {"error": "out of memory"}, "processes": 2},
        },
        "hardware": "NVIDIA H100 80GB HBM3",
    }
    monkeypatch.setitem(speed.MEASURED, "scaling", list(scaling(report)))
    several_share.cache_clear()
    rows = check_points()[-6:]
    several_share.cache_clear()
    assert [row["what"] for row in rows] == 2 * ["distill, tokens/s", "distill, tokens/s", "distill, bytes"]
    assert rows[3]["case"] == "fsdp2, 2 x 1 x 2 x 4,096"
    # Two that were no faster than one are predicted as they were measured.
    assert rows[3]["predicted"] == pytest.approx(rows[0]["predicted"])
    trained = speed.measured_stage(training, "distill", 2, 4096).trained
    # Weights and optimiser are divided, gradients of four micro-batches are not.
    assert rows[2]["predicted"] - rows[5]["predicted"] == pytest.approx(
        6 * trained - speed.measured_stage(training, "distill", 2, 4096).gathered_bytes
    )


def test_what_nobody_measured_is_not_predicted(monkeypatch):
    found = efficiency()
    teacher = HydraHeadConfig(full_attention_position="rope", full_attention_gate=False, fusion="concat")
    less = speed.Efficiency(found.decode_share, found.kernel_seconds, {}, {}, {})
    assert less.decode(teacher, 1024, 1, GPUS["h100"]) is None and less.prefill(teacher, 1024, 1, GPUS["h100"]) is None


def test_a_plan_of_stages_says_tokens_memory_and_hours(folders):
    one, eight = (make_plan(folders["8B"], gpus=gpus)["stages"] for gpus in (1, 8))
    assert list(one) == list(eight) == list(STAGES)
    assert [stage["tokens"] for stage in one.values()] == pytest.approx([8e8, 4e9, 1e9], rel=1e-3)
    for name in STAGES:
        kept = several_share("ddp" if "replicas" in eight[name]["fits"] else "fsdp2")
        assert eight[name]["gpus"] == 8 and eight[name]["gpu_hours"] == pytest.approx(one[name]["gpu_hours"] / kept)
        assert eight[name]["hours"] == pytest.approx(eight[name]["gpu_hours"] / 8)
        assert eight[name]["tokens_per_second"] == pytest.approx(8 * kept * one[name]["tokens_per_second"])
        ways = eight[name]["bytes_per_gpu"]
        assert sum(ways["sharded"].values()) < sum(ways["replicas"].values())
        assert list(one[name]["bytes_per_gpu"]) == ["replicas"]  # there is nothing to divide them among
    trained, held = one["distill"]["trained_parameters"], one["distill"]["bytes_per_gpu"]["replicas"]
    assert held["weights and optimiser"] + held["gradients"] == 16 * trained
    assert held["teacher"] == 2 * 8_190_735_360 and one["finetune"]["bytes_per_gpu"]["replicas"]["teacher"] == 0
    assert one["distill"]["fits"] == []


def test_sixty_four_gpus_work_where_a_batch_has_something_for_each(folders):
    plan = make_plan(folders["32B"], gpus=64, gpu="h200", context=MILLION)
    assert [stage["gpus"] for stage in plan["stages"].values()] == [16, 32, 32]
    advice = [note.split("; ")[1] for note in plan["notes"] if "GPUs work" in note]
    assert advice == [f"{stage}.batch_tokens=1048576 gives all" for stage in STAGES]
    overrides = [line.removesuffix(" gives all") for line in advice]
    plan = make_plan(folders["32B"], overrides, gpus=64, gpu="h200")
    assert [stage["gpus"] for stage in plan["stages"].values()] == [64, 64, 64]
    held = plan["stages"]["finetune"]["bytes_per_gpu"]["sharded"]
    trained = plan["stages"]["finetune"]["trained_parameters"]
    # One micro-batch each: nothing is accumulated, and gradients are divided like all else.
    assert held["weights and optimiser"] + held["gradients"] == pytest.approx(16 * trained / 64)
    accumulated = make_plan(folders["32B"], overrides, gpus=32)["stages"]["finetune"]["bytes_per_gpu"]["sharded"]
    assert accumulated["gradients"] == 4 * trained


def test_a_recipe_is_planned_by_its_name_with_its_own_stages():
    plan = make_plan("demo", ["distill.tokens=819200", "finetune=null"])
    assert plan["teacher"] == "demo" and list(plan["stages"]) == ["align", "distill"]
    assert plan["stages"]["distill"]["tokens"] == 819200 and plan["stages"]["align"]["length"] == 512
    assert plan["models"]["hybrid"]["full_attention_heads"] == 12
    assert any("so small a model waits for launches" in note for note in plan["notes"])


def test_masks_that_were_chosen_are_planned_as_they_are(tmp_path):
    masks = [[1, 1, 0, 0, 0, 0, 0, 0]] * 6  # one KV group of four in each layer
    (tmp_path / "masks.json").write_text(json.dumps(masks))
    plan = make_plan("demo", [f"masks={tmp_path / 'masks.json'}"])
    assert plan["models"]["hybrid"]["kv_heads"] == 6 and not any("drawn" in note for note in plan["notes"])
    (tmp_path / "head_masks.json").write_text(json.dumps(masks))
    plan = make_plan("demo", [f"output={tmp_path}"])
    assert plan["models"]["hybrid"]["kv_heads"] == 6
    plan = make_plan("demo", [f"output={tmp_path}"], ratio=0.5)  # asked for otherwise
    assert plan["models"]["hybrid"]["full_attention_heads"] == 24


def test_a_teacher_by_name_is_trained_as_in_the_paper_in_rows_that_it_can_read():
    plan = make_plan(str(EMBEDDED_TEACHER))  # knows 1,024 positions
    lengths = [stage["length"] for stage in plan["stages"].values()]
    assert lengths == [512, 1024, 16384], "the teacher does not read the rows of finetuning"
    assert make_plan(str(EMBEDDED_TEACHER), ["finetune.length=256"])["stages"]["finetune"]["length"] == 256


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["8B", "--gpu", "b300"], "gpu must be one of h100, h200, a100, got 'b300'"),
        (["8B", "--ratio", "1.5"], "ratio must be in (0, 1], got 1.5"),
        (["8B", "--ratio", "0.0001"], "global needs at least 1: choose a ratio of"),
        (["8B", "--budget-unit", "layers"], "budget_unit must be one of heads, kv_groups, got 'layers'"),
        (["8B", "--context", "0"], "context must be at least 1, got 0"),
        (["8B", "--batch", "0"], "batch must be at least 1, got 0"),
        (["8B", "--gpus", "0"], "gpus must be at least 1, got 0"),
        (
            ["8B", "distill.length=1048576"],
            "distill: rows of 1,048,576 tokens, the teacher's max_",
        ),
        (["8B", "distil.tokens=1"], "distil: Key 'distil' not in 'Recipe'"),
        (["8B", "masks=[[1,0]]"], "head_masks must have one row per layer (36), got 1"),
        (["demo", "select=null"], "masks: missing from the recipe, and no section select says how many heads stay"),
        (["none.yaml"], "none.yaml: no such recipe"),
        (["./none"], "none: no such folder"),
        (["no/such-model"], "no/such-model: no folder here, and not to be had from the Hub"),
        ([], "TEACHER is missing: expected a Hub id, a folder, a GGUF file or a recipe, or --check"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line(arguments, line, folders, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(app, ["plan", *(folders.get(word, word) for word in arguments)])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("hydrahead: ") and result.stderr.count("\n") == 1 and line in result.stderr


def test_the_command_prints_tables_json_and_the_check(folders):
    def said(*words) -> str:
        result = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["plan", *words], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    asked = f"{folders['8B']} --ratio 0.125 --budget-unit kv_groups --context {MILLION} --gpus 64".split()
    table, plan = said(*asked), json.loads(said(*asked, "--json"))
    for words in ("1,048,576 tokens, batch 1", "8.19B", "9.07B", "155 GB", "19.3 GB", "64 x NVIDIA H100", "hours"):
        assert words in table
    assert plan["models"]["hybrid"]["kv_bytes_per_token"] == 36 * 2 * 128 * 2
    assert all(note.split()[0] in table for note in plan["notes"])
    table, rows = said("--check"), json.loads(said("--check", "--json"))
    assert len(rows) == len(check_points())
    assert "predicted" in table and "error" in table and "Fitted, on" in table


def test_nothing_but_the_config_is_read(folders, monkeypatch):
    assert [path.name for path in Path(folders["8B"]).iterdir()] == ["config.json"]
    monkeypatch.setattr("hydrahead.convert.teachers.snapshot_download", lambda *_, **__: pytest.fail("a download"))
    assert make_plan(folders["8B"])["models"]["teacher"]["parameters"] == 8_190_735_360


def test_mixed_masks_count_as_irregular_and_whole_groups_as_uniform():
    kinds = {"irregular": MIXED, "uniform": ALL_LINEAR, "teacher": ALL_FULL}
    for kind, masks in kinds.items():
        assert speed.kind_of(HydraHeadConfig(**student_fields(head_masks=masks))) == kind
