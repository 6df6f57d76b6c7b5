"""Runs that are killed, stopped, or meet a full disk lose nothing."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from hydrahead.data.batches import Batch
from hydrahead.hub.folder import read_made_from
from hydrahead.tests.training_runs import (
    finish_stage,
    free_ports,
    make_inputs,
    metrics_of,
    start_stage,
    write_recipe,
)
from hydrahead.training.checkpoints import Checkpoints, keep_metrics_before
from hydrahead.training.data import prepare_tokenizer, stage_batches
from hydrahead.training.loop import Run, Schedule, _stop_signals, train
from hydrahead.training.recipe import RECIPES, load_recipe
from hydrahead.training.stage import Stage

KILLS = 7  # of each stage, 21 in all; three or more of them with something to resume from
RESULTS = {
    "align": "head_forms.safetensors",
    "distill": "student/model.safetensors",
    "finetune": "student/model.safetensors",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All stages, run without interruption: folder, recipe, and how long each took, in seconds."""
    folder = tmp_path_factory.mktemp("runs")
    path, seconds = write_recipe(folder, make_inputs(folder)), {}
    start_stage("align", ["--config", path, "--dry-run"]).join()  # what all are forked from is there now
    for stage in RESULTS:
        started = time.perf_counter()
        finish_stage(stage, ["--config", path])
        seconds[stage] = time.perf_counter() - started
    return folder, path, seconds


def recorded(folder) -> int:
    """Bytes of a run's record by now."""
    file = folder / "metrics.jsonl"
    return file.stat().st_size if file.exists() else 0


def put_earlier_stages(folder, out, stage) -> None:
    """What a stage starts from."""
    for earlier in list(RESULTS)[: list(RESULTS).index(stage)]:
        shutil.copytree(folder / "out" / earlier, out / earlier)


@pytest.mark.slow
@pytest.mark.parametrize("stage", RESULTS)
def test_a_run_killed_at_random_instants_is_the_uninterrupted_run_bit_for_bit(stage, finished):
    folder, path, seconds = finished
    expected, weights = metrics_of(folder / "out" / stage), load_file(folder / "out" / stage / RESULTS[stage])
    rng, out = random.Random(stage), folder / f"killed-{stage}"
    kills = halfway = 0
    arguments = ["--config", path, f"output={out}", f"data.cache={folder / 'out' / 'tokens'}"]
    while kills < KILLS or halfway < KILLS // 2:
        shutil.rmtree(out, ignore_errors=True)
        put_earlier_stages(folder, out, stage)
        while True:
            process = start_stage(stage, arguments)
            if kills % 2:  # every other one while it trains and saves
                before = recorded(out / stage)
                while process.is_alive() and recorded(out / stage) in (before, 0):
                    time.sleep(0.01)
                process.join(rng.uniform(0, 0.2))
            else:
                process.join(rng.uniform(0, seconds[stage]))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            newest = Checkpoints(out / stage, 1).newest()
            halfway += newest is not None and newest.name != f"checkpoint-{len(expected)}"
        assert process.exitcode == 0
        assert metrics_of(out / stage) == expected
        found = load_file(out / stage / RESULTS[stage])
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert not list((out / stage).glob("*.partial"))


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory):
    """An alignment of twice its tokens, that went on from the finished one: folder and arguments."""
    folder, path, _ = finished
    out = tmp_path_factory.mktemp("extended") / "out"
    shutil.copytree(folder / "out" / "align", out / "align")
    arguments = ["--config", path, f"output={out}", f"data.cache={folder / 'out' / 'tokens'}", "align.tokens=4096"]
    finish_stage("align", arguments)
    return out, arguments


def test_a_finished_run_goes_on_where_its_tokens_grew(finished, extended):
    """Its first steps are not done again, and what it reads then is new."""
    folder, path, _ = finished
    out, arguments = extended
    before, after = metrics_of(folder / "out" / "align"), metrics_of(out / "align")
    assert len(after) == 2 * len(before) and after[: len(before)] == before
    forms = [load_file(run / "align" / RESULTS["align"]) for run in (folder / "out", out)]
    assert any(not torch.equal(forms[0][name], forms[1][name]) for name in forms[0])
    stamp = (out / "align" / RESULTS["align"]).stat().st_mtime_ns
    finish_stage("align", arguments)  # it is done now
    assert (out / "align" / RESULTS["align"]).stat().st_mtime_ns == stamp
    recipe = load_recipe(path, arguments[2:])
    batches = stage_batches(recipe, "align", prepare_tokenizer(recipe), Stage(recipe, "align").parts)
    first, added = batches.phases
    assert (added.first_step, added.rows.first) == (len(before), first.rows.first + 2048)
    assert added.rows.count == first.rows.count == 2048 // 32


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_finished_student_goes_on_too_and_its_folder_says_for_how_long(stage, finished, tmp_path):
    """At the last length of a curriculum."""
    folder, path, _ = finished
    out = tmp_path / "out"
    put_earlier_stages(folder, out, stage)
    shutil.copytree(folder / "out" / stage, out / stage)
    cache = f"data.cache={folder / 'out' / 'tokens'}"
    finish_stage(stage, ["--config", path, f"output={out}", cache, f"{stage}.tokens=2560"])
    before, after = metrics_of(folder / "out" / stage), metrics_of(out / stage)
    assert len(after) == len(before) + 2 and after[: len(before)] == before
    stages = read_made_from(out / stage / "student")["stages"]
    assert (stages[-1]["stage"], stages[-1]["recipe"]["tokens"], stages[-1]["steps"]) == (stage, 2560, 10)


@pytest.mark.slow
def test_an_extension_that_is_killed_is_the_same_extension_bit_for_bit(finished, extended, tmp_path):
    folder, (whole, arguments) = finished[0], extended
    out = tmp_path / "out"
    shutil.copytree(folder / "out" / "align", out / "align")
    arguments = [*arguments, f"output={out}"]
    expected, kills = metrics_of(whole / "align"), 0
    while True:
        process, before = start_stage("align", arguments), recorded(out / "align")
        while kills < 3 and process.is_alive() and recorded(out / "align") == before:
            time.sleep(0.01)
        if kills == 3 or not process.is_alive():
            process.join()
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills == 3
    assert metrics_of(out / "align") == expected
    found, wanted = (load_file(run / "align" / RESULTS["align"]) for run in (out, whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_stage_that_has_begun_never_reads_other_text_or_starts_from_something_else(finished, extended, tmp_path):
    folder, path, _ = finished
    out, arguments = extended
    recipe = load_recipe(path, arguments[2:])
    assert Stage(recipe, "distill").record()["text_begins"] == 512 + 4096  # it has not begun: its text moves
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(folder / "out" / "distill", tmp_path / "out" / "distill")
    other = load_recipe(path, [*arguments[2:], f"output={tmp_path / 'out'}"])
    with pytest.raises(
        ValueError, match=r"^[^\n]*distill: made with another starts_from.forms [^\n]*begin the stage anew$"
    ):
        Stage(other, "distill")
    shutil.rmtree(tmp_path / "out" / "align")  # what is gone cannot be told from what it was
    with pytest.raises(ValueError, match=r"^[^\n]*distill: made with another text_begins \(2560, now 4608\); [^\n]*$"):
        Stage(other, "distill")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("align.tokens=1024", "align.tokens (2048, now 1024)"),
        ("align.learning_rate=0.5", "align.learning_rate (0.01, now 0.5)"),
        ("data.heldout_tokens=256", "data.heldout_tokens (512, now 256)"),
    ],
)
def test_what_else_changed_than_more_tokens_is_refused_by_name(change, said, finished):
    recipe = load_recipe(finished[1], ["align.tokens=4096", change])
    with pytest.raises(ValueError) as refused:
        Stage(recipe, "align")
    assert f"made with another {said}; choose another output" in str(refused.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_finishes_the_step_and_saves(number, finished, tmp_path):
    folder, path, _ = finished
    out = tmp_path / "stopped"
    arguments = ["--config", path, f"output={out}", f"data.cache={folder / 'out' / 'tokens'}"]
    arguments += ["align.tokens=25600", "run.save_every=1000"]
    process = start_stage("align", arguments, errors=tmp_path / "errors.txt")
    while not (out / "align" / "metrics.jsonl").exists():
        time.sleep(0.05)
    sent_after = len(metrics_of(out / "align"))
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    (checkpoint,) = (out / "align").glob("checkpoint-*")
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    assert sent_after <= done < 100 and len(metrics_of(out / "align")) == done
    said = (tmp_path / "errors.txt").read_text().splitlines()[-1]
    assert said.startswith(f"hydrahead: stopped by {number.name}; ") and checkpoint.name in said


@pytest.fixture
def heard_signals():
    """Signals as a terminal leaves them: `nohup` and a shell's `&` hand down that they are ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    previous = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGHUP), (2, signal.SIGTERM)])
def test_a_launched_stage_that_is_stopped_saves_itself_and_goes_on(processes, number, finished, tmp_path):
    """As `hydrahead run` launches it; on one process Accelerate's launcher would leave it running."""
    folder, path, _ = finished
    out, file = tmp_path / "out", tmp_path / "launch.yaml"
    settings = yaml.safe_load((RECIPES / "accelerate" / "ddp_cpu.yaml").read_text())
    kind = {1: "NO", 2: "MULTI_GPU"}[processes]
    file.write_text(yaml.safe_dump(settings | {"distributed_type": kind, "num_processes": processes}))
    arguments = ["--config", path, f"output={out}", f"data.cache={folder / 'out' / 'tokens'}", "run.save_every=1000"]
    launch = ["--config_file", str(file), "--main_process_port", *free_ports(1), "-m", "hydrahead.training.align"]
    words = "import sys; from hydrahead.pipeline import launch_stage; launch_stage(sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    launched = [sys.executable, "-c", words, *launch, *arguments, "align.tokens=10240"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(launched, env=environment, stderr=log)
    while not recorded(out / "align"):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait() == 128 + number
    (checkpoint,) = Checkpoints(out / "align", 1).all()
    done = len(metrics_of(out / "align"))
    assert checkpoint.name == f"checkpoint-{done}" and done < 40
    finish_stage("align", [*arguments, "align.tokens=10240"], processes=3 - processes)
    assert [line["step"] for line in metrics_of(out / "align")] == list(range(40))


def test_a_signal_that_arrives_twice_is_one_and_a_later_one_interrupts(monkeypatch, heard_signals):
    """A scheduler signals every process, and a launcher hands on what it got."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), _stop_signals(True) as received:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT] * 2
        now += 6
        signal.raise_signal(signal.SIGINT)


class Line(torch.nn.Module):
    """The smallest thing that can be trained."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))


def train_line(folder, steps=6, loss_of=lambda step, weight: weight.pow(2).sum(), keep=2, save_every=1, spike=5.0):
    accelerator, step_of = Accelerator(cpu=True), []

    def micro_batches(step):
        step_of[:] = [step]
        return [Batch(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1))]

    def backward(model, batch, scale):
        loss = loss_of(step_of[0], model.weight)
        accelerator.backward(loss * scale)
        return {"loss": loss.detach()}

    run = Run(folder, save_every, keep, spike, "line")
    return train(accelerator, Line(), micro_batches, backward, Schedule(steps, 1e-2, 1e-2, 1), run)


def test_checkpoints_are_kept_to_their_number_and_no_step_is_recorded_twice(tmp_path):
    train_line(tmp_path, steps=4)
    assert [path.name for path in Checkpoints(tmp_path, 2).all()] == ["checkpoint-3", "checkpoint-4"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')  # what a kill leaves
    (tmp_path / "checkpoint-5.partial").mkdir()
    train_line(tmp_path, steps=6)
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(6))
    assert not list(tmp_path.glob("*.partial"))


def test_metrics_from_the_checkpoint_on_are_forgotten(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    keep_metrics_before(file, 2)
    assert file.read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize(
    ("said", "free"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2**30),
        (RuntimeError("unexpected pos 450880 vs 450768"), 512),
    ],
    ids=["the system's own words", "PyTorch's"],
)
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(said, free, tmp_path, monkeypatch):
    train_line(tmp_path, steps=2)
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}

    def full(*_):
        (tmp_path / "checkpoint-3.partial" / "half").write_text("written")
        raise said

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    line = r"^[^\n]*does not fit on the disk; the last good checkpoint is [^\n]*checkpoint-2$"
    with pytest.raises(OSError, match=line) as stopped:
        train_line(tmp_path, steps=4)
    assert stopped.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == before
    assert not list(tmp_path.glob("*.partial"))


def test_an_error_that_is_no_full_disk_is_not_called_one(tmp_path, monkeypatch):
    bug = RuntimeError("a bug")
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", lambda *_: (_ for _ in ()).throw(bug))
    with pytest.raises(CheckpointException, match="RuntimeError: a bug"):
        train_line(tmp_path, steps=1)


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "random_states_0.pkl").touch()
    with pytest.raises(ValueError, match=r"^[^\n]*checkpoint-2: in the format of an earlier version; [^\n]*$"):
        train_line(tmp_path)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoiled(loss, tmp_path):
    def loss_of(step, weight):
        return weight.pow(2).sum() * (loss if step == 4 else 1)

    with pytest.raises(FloatingPointError, match=r"^step 4: the gradient is not finite [^\n]*checkpoint-3$"):
        train_line(tmp_path, loss_of=loss_of, save_every=3)
    (file,) = (tmp_path / "checkpoint-3").glob("*.safetensors")
    assert torch.isfinite(load_file(file)["model.weight"]).all()


def test_a_loss_spike_stops_with_the_last_good_checkpoint(tmp_path):
    def loss_of(step, weight):
        return weight.pow(2).sum() * (50 if step == 25 else 1)

    with pytest.raises(FloatingPointError, match=r"^step 25: the loss is [^\n]*run.spike_factor[^\n]*checkpoint-20$"):
        train_line(tmp_path, steps=30, loss_of=loss_of, save_every=20)
    with contextlib.suppress(FloatingPointError):  # the window travels in the checkpoint: it is seen again
        train_line(tmp_path, steps=30, loss_of=loss_of, save_every=20)
    assert len(metrics_of(tmp_path)) == 25
    train_line(tmp_path, steps=30, loss_of=loss_of, save_every=20, spike=100.0)
    assert len(metrics_of(tmp_path)) == 30
