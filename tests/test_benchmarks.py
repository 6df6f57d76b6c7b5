"""The benchmarks' own machinery: models as loading gives them, bytes as they are, nothing lost where a part fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hydrahead.benchmarks import decode, gpu, report

SHAPE = gpu.TINY | {"num_hidden_layers": 8}


@pytest.mark.parametrize("name", [*gpu.HYBRIDS, decode.TEACHER])
def test_models_have_the_dtypes_that_loading_gives_them(name, tmp_path):
    model = decode.build(name, SHAPE, torch.bfloat16, "cpu")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = [
        {
            key: value.dtype
            for key, value in [*each.named_parameters(), *each.named_buffers()]
            if "projections" not in key
        }
        for each in (model, loaded)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", gpu.EVERY)
@torch.no_grad()
def test_caches_hold_the_bytes_that_arithmetic_gives(name):
    model = decode.build(name, SHAPE, torch.bfloat16, "cpu")
    cache = gpu.filled_cache(model, batch=3, length=256)
    assert decode.cache_bytes(cache) == 3 * gpu.bytes_of_sequence(model, 256 + gpu.START)


def test_the_layerwise_hybrid_has_about_the_cache_of_an_eighth_of_the_groups():
    kinds = [decode.config_of(name, gpu.QWEN3_1_7B) for name in (decode.LAYERWISE, "12.5% kv_groups")]
    layerwise, groups = (decode.kv_bytes_per_token(config, torch.bfloat16) for config in kinds)
    assert abs(layerwise / groups - 1) < 0.15


@torch.no_grad()
def test_steps_of_a_turn_start_from_the_prefilled_length():
    runs = decode.measure({"teacher": decode.build("teacher", SHAPE, torch.float32, "cpu")}, 64, 2, turns=3, steps=2)
    run = runs["teacher"]
    assert run.cache.get_seq_length() == 66 and len(run.prefills) == 2 and [len(turn) for turn in run.turns] == [2] * 3
    assert decode.speed_over(run, run) == 1


def test_the_most_sequences_are_those_that_do_not_run_out_of_memory(monkeypatch):
    tried = []

    def try_out(count):
        tried.append(count)
        if count > 5:
            raise torch.OutOfMemoryError

    model = decode.build("teacher", SHAPE, torch.float32, "cpu")
    free = 7.5 * gpu.bytes_of_sequence(model, 128)
    assert gpu.most_sequences(model, 128, 32, free, try_out) == 5 and tried == [7, 6, 5]
    assert gpu.most_sequences(model, 128, 4, free, try_out) == 4
    with pytest.raises(torch.OutOfMemoryError):
        gpu.most_sequences(model, 128, 32, 0, try_out)


class FakeWorker:
    """A process that fails, or needs the GPU for itself, by the tokens of its job."""

    def __init__(self, machine, job, gpu, deadline):
        self.job, self.error, self.alone = job, None, FakeWorker.alive == 0
        FakeWorker.alive += 1

    alive = 0

    def hear(self):
        if self.job.tokens == 1 or (self.job.tokens == 2 and not self.alone):
            self.error = RuntimeError("it broke") if self.job.tokens == 1 else MemoryError("out of memory")

    def tell(self, goes_on):
        return None if self.error else ([self.job.about[0] | {"ms_per_token": 1.0}], {"hardware": "x"})

    def close(self):
        FakeWorker.alive -= 1


def test_what_fails_is_a_row_and_what_lacked_memory_beside_others_runs_again_alone(monkeypatch):
    monkeypatch.setattr(gpu, "Worker", FakeWorker)
    jobs = [gpu.Decode("teacher", tokens) for tokens in (3, 1, 2)]
    rows, where = gpu.run_part(gpu.REHEARSAL, jobs, "", deadline=float("inf"))
    found = {row["tokens"]: row.get("error", row.get("ms_per_token")) for row in rows}
    assert found == {3: 1.0, 1: "it broke", 2: 1.0} and where == {"hardware": "x"}


def test_parts_are_measured_again_where_code_or_versions_have_changed_and_rows_have_one_place(tmp_path):
    here = {"hardware": "x", "date": "today", "versions": {"torch": "1"}}
    results = gpu.Results(tmp_path / "results.json", gpu.REHEARSAL)
    rows = [{"what": "decode", "tokens": tokens, "model": "teacher", "ms_per_token": 1.0} for tokens in (1, 2)]
    results.add("both", rows, here, 1)
    results.add("second", [rows[1] | {"ms_per_token": 2.0}], here, 1)
    again = gpu.Results(tmp_path / "results.json", gpu.REHEARSAL)
    assert {name: part["rows"] for name, part in again.parts.items()} == {
        "both": rows[:1],
        "second": [rows[1] | {"ms_per_token": 2.0}],
    }
    assert again.holds("second", here | {"date": "tomorrow"})
    assert not again.holds("second", here | {"versions": {"torch": "2"}})
    assert not again.holds("third", here)
    again.code = {"modeling_hydrahead": "other"}
    assert not again.holds("second", here)


def test_every_part_measures_rows_of_its_own():
    rows = [tuple(about.values()) for jobs in gpu.PARTS.values() for job in jobs for about in job.about]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("part", ["prefill", "sequences", "chunks"])
@torch.no_grad()
def test_a_part_runs_on_a_tiny_model(part):
    (job,) = gpu.PARTS[part]
    rows = job.open(gpu.REHEARSAL).rows()
    assert len(rows) == len(job.about) and json.dumps(rows)


@torch.no_grad()
def test_a_compiled_step_of_the_largest_batch():
    (job,) = gpu.PARTS["batches-teacher"]
    run = job.open(gpu.REHEARSAL)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="recompile"):
        run.measure()
    run.measure()
    (row,) = run.rows()
    assert row["batch"] == gpu.REHEARSAL.free_bytes() // gpu.bytes_of_sequence(run.model, 64)
    assert row["ms_per_token"] > 0 and json.dumps(row)


@pytest.mark.slow
def test_a_rehearsal_in_processes(tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, Path(gpu.__file__), "sequences", "--rehearse", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["parts"]["sequences"]["rows"]
    assert len(rows) == 4 and all(row.get("sequences") for row in rows)


def test_bad_input_ends_in_one_line(tmp_path, capsys, monkeypatch):
    for arguments in (["nowhere"], ["--rehearse"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            gpu.main()
        assert stop.value.code == 2
        assert capsys.readouterr().err.strip().count("error:") == 1


def measured(what: str, tokens: int, model: str, **numbers) -> dict:
    return {(what, tokens, model): {"what": what, "tokens": tokens, "model": model} | numbers}


def test_a_target_is_judged_against_the_best_teacher_and_only_where_that_is_measured(monkeypatch):
    def line() -> str:
        return next(line for line in report.targets().splitlines() if line.startswith("| decoding, 128K: speed"))

    rows = {}
    for model, ms in ((report.TEACHER, 30.0), (report.GROUPS, 5.0)):
        rows |= measured("decode", 128 * 1024, model, ms_per_token=ms, tokens_per_second=1e3 / ms)
    monkeypatch.setattr(report, "ROWS", rows)
    assert line().split("|")[3:6] == [" not measured ", "  ", " 6 "]
    rows |= measured("decode", 128 * 1024, report.BEST_TEACHER, ms_per_token=12.0, tokens_per_second=83.3)
    monkeypatch.setattr(report, "ROWS", rows)
    assert line().split("|")[3:6] == [" 2.4 ", " missed ", " 6 "]


def test_nothing_is_compared_across_kinds_of_gpus(monkeypatch):
    rows = measured("decode", 512 * 1024, report.BEST_TEACHER, ms_per_token=30.0, hardware="H200")
    rows |= measured("decode", 512 * 1024, report.GROUPS, ms_per_token=5.0, hardware="H100")
    monkeypatch.setattr(report, "ROWS", rows)
    line = next(line for line in report.targets().splitlines() if line.startswith("| decoding, 512K"))
    assert line.split("|")[3:5] == [" not on one kind of GPU ", "  "]


def test_what_failed_says_so_in_its_row_and_in_what_is_computed_from_it(monkeypatch):
    rows = measured("decode", 512 * 1024, report.BEST_TEACHER, error="out of memory")
    rows |= measured("decode", 512 * 1024, report.GROUPS, ms_per_token=5.0, tokens_per_second=200.0)
    monkeypatch.setattr(report, "ROWS", rows)
    lines = [line for line in report.decoding().splitlines() if line.startswith("| 524,288")]
    assert "out of memory" in lines[1] and lines[2].split("|")[3:5] == [" 5.00 ", " out of memory "]


def test_the_picture_is_drawn_whole_or_with_what_there_is(monkeypatch, tmp_path):
    rows = {}
    for tokens in report.LENGTHS:
        for model in report.MODELS:
            rows |= measured("decode", tokens, model, ms_per_token=tokens / 1e3)
            rows |= measured("eager", tokens, model, prefill_seconds=tokens / 1e4)
    for found in ({}, rows):
        monkeypatch.setattr(report, "ROWS", found)
        report.draw(tmp_path / "decode.png")
        assert (tmp_path / "decode.png").stat().st_size > 1000
