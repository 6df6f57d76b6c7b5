"""
The three stages on two GPUs, started as users start them: DDP and FSDP2 over NCCL compute what one GPU computes, and a
checkpoint goes on under another engine and on another number of GPUs.

All runs are started at once, those that resume after them: GPUs and processors are shared. On a machine without GPUs
`HYDRAHEAD_TEST_DEVICE=cpu pytest tests/test_gpu_training.py -s` takes the same road with gloo, two runs at a time.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydrahead import HydraHeadForCausalLM
from hydrahead.convert.calibration import calibrated_forms
from hydrahead.convert.forms import save_forms
from hydrahead.convert.migration import convert_to_folder
from hydrahead.convert.options import options_of, student_config
from hydrahead.convert.teachers import EMBEDDED_TEACHER, open_teacher
from hydrahead.data.tokens import DataSection, TokenFile
from hydrahead.tests.training_runs import free_ports
from hydrahead.training.recipe import RECIPES, STAGES

DEVICE = os.environ.get("HYDRAHEAD_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA GPUs, or HYDRAHEAD_TEST_DEVICE=cpu"
)

STEPS, LENGTH = 20, 256
BATCH = 8192 if DEVICE == "cuda" else 2048  # a loss over more tokens averages what bf16 rounds
LONG = 2 * STEPS  # steps of a run that is stopped
AT_ONCE = 64 if DEVICE == "cuda" else 2
SECONDS = 240 if DEVICE == "cuda" else 1200  # that a run may take, its start included
ENGINES = ("one", "ddp", "fsdp2")
CROSSINGS = [("one", "ddp"), ("ddp", "one"), ("one", "fsdp2"), ("fsdp2", "one")]
# Heads in disorder, a layer without full attention, one without recurrence; two layers as one would choose them.
MASKS = [[1, 0, 1, 1, 0, 0, 0, 1], [0] * 8, [1] * 8, [0, 0, 1, 0, 0, 1, 0, 0], [1, 1] + [0] * 6, [0] * 6 + [1, 1]]
STAGE = {"batch_tokens": BATCH, "tokens": STEPS * BATCH, "length": LENGTH, "warmup_steps": 4}
# bf16 autocast rounds every product to 8 bits: sums in another order flip last bits, which Adam carries on.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-3, 2e-2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """What every run starts from: tokens, forms, a student, a recipe whose stages do not wait for one another."""
    folder = tmp_path_factory.mktemp("engines")
    data = DataSection(name="demo", heldout_tokens=8192)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    tokens = TokenFile(folder / "tokens", data, tokenizer)
    tokens.fill(8192 + (LONG + 2 * STEPS) * BATCH + 1)
    opened = open_teacher("demo")
    config = student_config(opened.adapter, MASKS)
    calibration = torch.from_numpy(tokens.read()[:2048].astype("int64")).view(-1, 512)
    forms = calibrated_forms(opened.load("float32", "cpu"), calibration, config)
    save_forms(forms, options_of(config), folder / "forms.safetensors", opened.identity)
    (folder / "masks.json").write_text(json.dumps(MASKS))
    convert_to_folder("demo", folder / "student", folder / "masks.json", forms_file=folder / "forms.safetensors")
    recipe = {
        "output": str(folder / "out"),
        "teacher": {"name": "demo"},
        "masks": str(folder / "masks.json"),
        "data": {"name": "demo", "heldout_tokens": 8192, "cache": str(folder / "tokens")},
        "run": {"micro_batch_tokens": BATCH // 4, "save_every": STEPS // 2, "keep": 9},
        "align": STAGE | {"learning_rate": 3e-3, "final_learning_rate": 3e-4},
        "distill": STAGE
        | {"learning_rate": 1e-4, "final_learning_rate": 1e-5, "head_forms": str(folder / "forms.safetensors")},
        "finetune": STAGE
        | {"learning_rate": 5e-5, "final_learning_rate": 5e-6, "student": str(folder / "student")}
        | {"curriculum": [[LENGTH // 2, 0.5], [LENGTH, 0.5]]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@dataclass
class Launch:
    """
    One `accelerate launch`.

    Attributes:
        out: the recipe's `output`.
        stop: send SIGTERM after the first step.
    """

    inputs: Path
    engine: str
    stage: str
    out: Path
    overrides: tuple[str, ...] = ()
    stop: bool = False

    @property
    def folder(self) -> Path:
        return self.out / self.stage

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        name = "head_forms.safetensors" if self.stage == "align" else "student/model.safetensors"
        return load_file(self.folder / name)

    def command(self, port: str) -> list[str]:
        how = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        module = ["-m", f"hydrahead.training.{self.stage}"]
        if self.engine != "one":
            file = self.engine if DEVICE == "cuda" else "ddp_cpu"
            how = ["--config_file", str(RECIPES / "accelerate" / f"{file}.yaml"), "--num_processes", "2"]
            how += ["--main_process_port", port]
        if self.engine == "fsdp2" and DEVICE == "cpu":
            module = ["-m", "hydrahead.tests.training_runs", self.stage]
        recipe = ["--config", str(self.inputs / "recipe.yaml"), f"output={self.out}", *self.overrides]
        return [sys.executable, "-m", "accelerate.commands.launch", *how, *module, *recipe]

    def start(self, port: str, gpu: int) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        if self.engine == "one":
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / f"log{len(list(self.out.glob('log*')))}.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command(port), env=environment, stdout=log, stderr=log)
        self.started = time.monotonic()

    def is_over(self) -> bool:
        """Whether it has ended; asks it to stop, where it is to, or kills it, where it takes too long."""
        if self.stop and self.process.poll() is None and (self.folder / "metrics.jsonl").is_file():
            self.process.send_signal(signal.SIGTERM)
            self.stop = False
        if time.monotonic() - self.started > SECONDS:
            self.process.kill()
        return self.process.poll() is not None


def run_all(launches: list[Launch]) -> None:
    """Run all to their end, many at once."""
    waiting, running = list(zip(launches, free_ports(len(launches)), islice(cycle((0, 1)), len(launches)))), []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            launch, *place = waiting.pop(0)
            launch.start(*place)
            running.append(launch)
        time.sleep(0.01)
        running = [launch for launch in running if not launch.is_over()]
    for launch in launches:
        print(f"{launch.out.name}: {launch.stage}, exit {launch.process.returncode}")


def check_finished(launch: Launch) -> None:
    assert launch.process.returncode == 0, "\n".join(launch.log.read_text().splitlines()[-40:])


@pytest.fixture(scope="module")
def runs(inputs) -> dict[tuple[str, str], Launch]:
    """Every stage under every engine; and distillation that is stopped, longer, so that it is not over by then."""
    launches = {
        (stage, engine): Launch(inputs, engine, stage, inputs / f"{stage}-{engine}")
        for stage in STAGES
        for engine in ENGINES
    }
    longer = (f"distill.tokens={LONG * BATCH}", "run.save_every=1000")
    for engine in ENGINES[1:]:
        out = inputs / f"stopped-{engine}"
        launches["stopped", engine] = Launch(inputs, engine, "distill", out, longer, stop=True)
    run_all(list(launches.values()))
    return launches


@pytest.fixture(scope="module")
def resumed(inputs, runs) -> dict[tuple, Launch]:
    """Every stage again from the checkpoint at half of it, under another engine; and what was stopped."""
    launches = {}
    for stage in STAGES:
        for before, after in CROSSINGS:
            launch = Launch(inputs, after, stage, inputs / f"{stage}-{before}-{after}")
            half = runs[stage, before].folder
            shutil.copytree(half / f"checkpoint-{STEPS // 2}", launch.folder / f"checkpoint-{STEPS // 2}")
            for name in ("recipe.json", "metrics.jsonl", "initial_forms.safetensors"):
                if (half / name).is_file():
                    shutil.copy(half / name, launch.folder)
            launches[stage, before, after] = launch
    for engine in ENGINES[1:]:
        stopped = runs["stopped", engine]
        launches["stopped", engine] = Launch(inputs, engine, "distill", stopped.out, stopped.overrides)
    run_all(list(launches.values()))
    return launches


def largest(found: list[dict], expected: list[dict], name: str) -> float:
    return max(abs(one[name] / other[name] - 1) for one, other in zip(found, expected, strict=True))


def check_same_run(found: Launch, expected: Launch) -> None:
    """The record step by step, and what the stage leaves."""
    check_finished(found)
    check_finished(expected)
    one, other = found.metrics(), expected.metrics()
    loss, norm = largest(one, other, "loss"), largest(one, other, "grad_norm")
    print(f"{found.out.name}: loss {loss:.1e}, gradient norm {norm:.1e} off over {len(one)} steps", end="; ")
    assert [line["step"] for line in one] == list(range(STEPS))
    assert loss < LOSS_TOLERANCE and norm < NORM_TOLERANCE
    weights, others = found.weights(), expected.weights()
    assert weights.keys() == others.keys()
    off = sum((weights[name].double() - others[name].double()).square().sum() for name in weights)
    share = float((off / sum(tensor.double().square().sum() for tensor in others.values())).sqrt())
    print(f"weights {share:.1e}")
    assert share < LOSS_TOLERANCE


@pytest.mark.parametrize("engine", ENGINES[1:])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_like_one(stage, engine, runs):
    """Loss within 1e-3 in each of 20 steps. Adam forgives gradients of a wrong scale: their norm does not."""
    losses = [line["loss"] for line in runs[stage, "one"].metrics()]
    assert sum(losses[-4:]) < 0.99 * sum(losses[:4])  # something is learnt, so that there is something to compare
    check_same_run(runs[stage, engine], runs[stage, "one"])


@pytest.mark.parametrize(("before", "after"), CROSSINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_goes_on_under_another_engine_and_number_of_processes(stage, before, after, runs, resumed):
    launch, half = resumed[stage, before, after], STEPS // 2
    check_finished(launch)
    assert launch.metrics()[:half] == runs[stage, before].metrics()[:half]  # not done again
    check_same_run(launch, runs[stage, "one"])


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_launch_that_is_stopped_saves_itself_and_goes_on(engine, runs, resumed):
    """SIGTERM to `accelerate launch`, which hands it to its processes."""
    stopped, launch = runs["stopped", engine], resumed["stopped", engine]
    assert stopped.process.returncode != 0
    assert "stopped by SIGTERM" in stopped.log.read_text()
    check_finished(launch)
    checkpoints = {path.name for path in launch.folder.glob("checkpoint-*")} - {f"checkpoint-{LONG}"}
    assert len(checkpoints) == 1  # that of the stop: none was due
    assert [line["step"] for line in launch.metrics()] == list(range(LONG))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_two_processes_write_loads_anywhere(engine, runs):
    check_finished(runs["distill", engine])
    student = AutoModelForCausalLM.from_pretrained(runs["distill", engine].folder / "student", dtype=torch.float32)
    assert isinstance(student, HydraHeadForCausalLM) and student.config.head_masks == MASKS
    with torch.no_grad():
        assert torch.isfinite(student(torch.arange(64).view(1, -1)).logits).all()
