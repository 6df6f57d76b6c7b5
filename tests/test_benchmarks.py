"""The benchmarks' own machinery: models as loading gives them, bytes as they are, nothing lost where a part fails."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hydrahead.benchmarks import anatomy, decode, gpu, report, senders
from hydrahead.benchmarks.decode import TEACHER
from hydrahead.convert.scoring.probes import built_in_probes
from hydrahead.convert.scoring.scores import THRESHOLD
from hydrahead.convert.teachers import open_teacher
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.tests.workshop import run_command, write_short_teacher

ALL_AGAIN = "all_32_recorded_again_s"
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
def test_real_models_are_measured_with_their_own_masks(tmp_path):
    names = {TEACHER: "teacher", "one": "one", "two": "two"}
    folders = {name: str(tmp_path / folder) for name, folder in names.items()}
    shape = gpu.TINY | {"max_position_embeddings": 64}
    decode.build(TEACHER, shape, torch.float32, "cpu").save_pretrained(folders[TEACHER])
    for name, model in (("one", "12.5% heads"), ("two", "25% heads")):
        decode.build(model, shape, torch.float32, "cpu").save_pretrained(folders[name])
    machine, parts = replace(gpu.REHEARSAL, folders=folders), gpu.parts_of(["one", "two"])
    rows = [tuple(about.values()) for jobs in parts.values() for job in jobs for about in job.about]
    assert len(rows) == len(set(rows)) == 4 * 3 + 3 + 3 * 3 + 2 * (2 * 2 + 2 * 3)
    (job,) = parts["prefill-4K"]
    found = {about["model"]: row["cache_bytes"] for about, row in zip(job.about, job.open(machine).rows())}
    assert found["one"] < found["two"] < found[TEACHER]
    run = replace(parts["generate-32K"][-1], new_tokens=4).open(machine)
    run.measure()
    assert [row["new_tokens"] for row in run.rows()] == [4, 4, 4]
    assert [len(*calls) for calls in run.calls.values()] == [4, 4, 4]
    assert gpu.Results(tmp_path / "results.json", machine).shape == {"models": names, "dtype": "float32"}


def test_what_estimates_leave_out_of_senders_is_below_the_threshold():
    opened = open_teacher("demo")
    tokenizer, teacher = opened.tokenizer(), opened.load("float32")
    text = encode_corpus(tokenizer, load_corpus("train"))
    (probe,) = built_in_probes(tokenizer, text, 256, 4, only=["niah-4-keys.value"])
    row = senders.measure(teacher, probe, every=True)
    new, old, few, every = (np.array(row[name]) for name in ("new", "old", "new_on_3", "every"))
    assert row["pairs"] == 4 and every.max() > THRESHOLD
    assert abs(new - old).max() <= THRESHOLD and abs(few - every).max() <= THRESHOLD
    assert {key for key in row if key.endswith("_s")} == {"receiver_s", "sender_s", ALL_AGAIN, "every_s"}


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


def test_similarity_is_blind_to_turns_and_scales_and_unbiased_by_width():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 300, 128, generator=generator)
    turn = torch.linalg.qr(torch.randn(128, 128, generator=generator)).Q
    alike = anatomy.cka(torch.stack([one, 3 * one @ turn + 1, other, one + other]))
    assert alike[0, 1] == pytest.approx(1, abs=1e-4)
    assert abs(alike[0, 2]) < 0.05, "as wide as half the positions: the biased one would give 0.3"
    assert alike[0, 2] + 0.2 < alike[0, 3] < 0.8


def test_gini_is_zero_for_equals_and_nearly_one_where_one_has_everything():
    assert anatomy.gini(np.ones((4, 5))) == pytest.approx(0)
    assert anatomy.gini(np.eye(1, 100)) == pytest.approx(0.99)
    assert anatomy.gini(np.array([1.0, 3.0])) == pytest.approx(0.25)


def test_a_heads_kind_is_told_by_layer_and_group():
    """Two layers of two groups of two heads."""
    heads = torch.eye(8) + 0.1
    heads[0, 1] = heads[1, 0] = 0.9  # one group
    heads[2, 5] = heads[5, 2] = 0.8  # neighbouring layers
    found = anatomy.means(torch.eye(2) * 0.5 + 0.5, heads, groups=2)
    assert found["heads of one KV group"] == pytest.approx((0.9 + 3 * 0.1) / 4)
    assert found["other heads of one layer"] == pytest.approx(0.1)
    assert found["heads of neighbouring layers"] == pytest.approx((0.8 + 15 * 0.1) / 16)
    assert found["neighbouring layers"] == 0.5 and found["layers further apart"] is None


def test_the_anatomy_of_a_teacher_is_a_page_and_pictures(tmp_path):
    teacher = tmp_path / "teacher"
    write_short_teacher(teacher)
    folders = []
    for length in (200, 256):
        folder = tmp_path / f"scores-{length}"
        methods = ["--method", "receiver+sender", "--method", "receiver", "--no-evidence", "--pairs", "2"]
        ended = run_command(["score", str(teacher), str(folder), "--length", str(length), *methods])
        assert ended.status == 0, ended.said
        folders.append(str(folder))
    script = [sys.executable, anatomy.__file__, str(teacher), *folders, "--output", str(tmp_path / "out")]
    subprocess.run(script, check=True, capture_output=True)
    found = json.loads((tmp_path / "out" / "anatomy.json").read_text())
    assert set(found["few"]) == {"200", "256"} and list(found["lengths"]) == ["200 / 256"]
    assert all(0 <= row["convertible"] <= 1 for rows in found["few"].values() for row in rows.values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"anatomy.json", "anatomy.md", "similarity.png", "capabilities_200.png", "capabilities_256.png"}
    same = subprocess.run([*script[:3], folders[0], folders[0]], capture_output=True, text=True)
    assert same.returncode and same.stderr.startswith("hydrahead: scores: two folders")
