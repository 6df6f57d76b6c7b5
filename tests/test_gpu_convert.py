"""What only GPUs can show of conversion: that alignment, scores, demo and benchmark run where the teacher runs."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydrahead import ops_hydrahead
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import HeadForms
from hydrahead.convert.options import student_config
from hydrahead.convert.scoring.command import score_to_folder
from hydrahead.convert.scoring.replacement import text_effects
from hydrahead.convert.scoring.settings import ScoreSettings
from hydrahead.convert.teachers import EMBEDDED_TEACHER, Teacher, adapter_for
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.pipeline import walk
from hydrahead.tests.families import ALL_LINEAR, make_student, make_teacher, random_ids
from hydrahead.tests.placements import compare, everything, split
from hydrahead.tests.test_scoring import usable_pairs
from hydrahead.training.quick import align_for_scores, quick_forms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

GPU = "cuda:0"
FLA = {name: getattr(ops_hydrahead, name) for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")}


@pytest.fixture(autouse=True)
def plain_arithmetic(monkeypatch):
    """fp32 on the reference kernels, so that numbers compare closely; a fresh choice of accelerate's device."""
    for name in FLA:
        monkeypatch.setattr(ops_hydrahead, name, None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def sharp_teacher():
    return make_teacher("qwen3-untied", initializer_range=0.4)


@pytest.fixture(scope="module")
def pairs():
    return usable_pairs(sharp_teacher(), 4)


@pytest.fixture(scope="module")
def shipped():
    """The teacher of the demo, its tokenizer and ids of its training text."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(EMBEDDED_TEACHER, dtype=torch.float32).eval()
    return teacher, tokenizer, encode_corpus(tokenizer, load_corpus("train"))


def devices(module: torch.nn.Module) -> set[str]:
    return {str(parameter.device) for parameter in module.parameters()}


def test_a_teacher_on_a_gpu_gives_what_it_gives_on_the_cpu(pairs):
    """All methods, alignment included, within 1e-3 of the largest; left out is what a device's own dice decide."""
    found = everything(sharp_teacher().to(GPU), pairs, Accelerator())
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = everything(sharp_teacher(), pairs, Accelerator(cpu=True))
    compared = [name for name in expected if name.startswith(("calibrated", "aligned", "all", "tie-break"))]
    compare({name: found[name] for name in compared}, {name: expected[name] for name in compared}, 1e-3)


@pytest.mark.parametrize(
    "second", [pytest.param("cpu"), pytest.param("disk"), pytest.param(1, marks=two_gpus, id="another-gpu")]
)
def test_an_off_loaded_or_split_teacher_gives_what_it_gives_on_one_gpu(pairs, second, tmp_path):
    """The upper half in CPU memory, on disk or on another GPU; within 1e-4 of the largest value."""
    teacher = split(sharp_teacher(), 0, second, tmp_path)
    assert devices(teacher) == {GPU, "cuda:1" if second == 1 else "meta"}
    found = everything(teacher, pairs, Accelerator())
    compare(found, everything(sharp_teacher().to(GPU), pairs, Accelerator()), 1e-4)


@pytest.mark.parametrize("place", [GPU, pytest.param("cuda:1", marks=two_gpus)])
def test_quick_alignment_leaves_the_teacher_on_its_gpu(shipped, place):
    teacher, tokenizer, text_ids = shipped
    teacher = copy.deepcopy(teacher).to(place)
    forms = quick_forms(teacher, tokenizer, text_ids, {"fusion_norm": "linear"}, steps=2)
    assert devices(teacher) == {place}
    assert {tensor.device.type for tensor in forms.values()} == {"cpu"}
    assert all(tensor.isfinite().all() for tensor in forms.values())


def test_quick_alignment_of_a_teacher_on_the_cpu_asks_nothing_of_the_gpu(shipped):
    teacher, tokenizer, text_ids = shipped
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    quick_forms(teacher, tokenizer, text_ids, {"fusion_norm": "linear"}, steps=1)
    assert torch.cuda.max_memory_allocated() == before


def test_score_uses_the_gpus_there_are_without_being_told(tmp_path, monkeypatch):
    """`device_map="auto"`, quick alignment and evidence included."""
    placed, load = set(), Teacher.load

    def load_and_look(self, *arguments):
        teacher = load(self, *arguments)
        placed.update(devices(teacher))
        return teacher

    monkeypatch.setattr(Teacher, "load", load_and_look)
    settings = ScoreSettings(
        "demo",
        ("replacement",),
        length=200,
        pairs=2,
        shortlist=2,
        options={"fusion_norm": "linear"},
        align_steps=1,
    )
    align_for_scores(settings, tmp_path / "scores")
    scores = score_to_folder(settings, tmp_path / "scores")
    assert all(place.startswith("cuda") for place in placed), placed
    assert torch.tensor(scores.scores).isfinite().all() and set(scores.evidence) >= {"ablation", "conversion"}


def test_the_demo_runs_on_the_gpu(tmp_path):
    few = ["align.tokens=4096", "distill.tokens=4096", "finetune.tokens=4096", "score.pairs=2", "evaluate.prompts=1"]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    road = walk("demo", [f"output={tmp_path}", *few])
    assert torch.cuda.max_memory_allocated() > before + 2**26
    texts = json.loads((road.student / "report.json").read_text())["text"]
    assert [row["loss"] < 5 for row in texts if (row["model"], row["length"]) == ("teacher", 1024)] == [True]


def test_the_benchmark_of_head_rankings_runs_on_the_gpu():
    file = Path(__file__).parents[1] / "benchmarks" / "heads.py"
    spec = importlib.util.spec_from_file_location("heads", file)
    heads = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(heads)
    bench = heads.Bench(prompts=2, steps=2)
    assert devices(bench.teacher) == {GPU}
    forms = bench.align("plain")
    assert devices(bench.teacher) == {GPU}
    running, some = bench.running(forms, "nope"), [(1, 2), (1, 3)]
    judged = [bench.converted(some, forms, "nope"), bench.converted_alone(some, running), bench.ablated(some)]
    assert all(torch.tensor(list(each.values())).isfinite().all() for each in judged)


@two_gpus
@pytest.mark.skipif(None in FLA.values(), reason="needs flash-linear-attention")
def test_flas_kernels_run_on_the_gpu_of_the_layer_whose_heads_they_are(monkeypatch):
    """The same kernels on either GPU: 1e-3 of the largest effect."""
    for name, kernel in FLA.items():
        monkeypatch.setattr(ops_hydrahead, name, kernel)
    plain, ids = make_teacher("qwen3-untied"), random_ids(1, 130)
    config = student_config(adapter_for(plain.config), ALL_LINEAR)
    tensors, found = head_forms_of(plain, ids, config), []
    for teacher in (make_teacher("qwen3-untied").to(GPU), split(make_teacher("qwen3-untied"), 0, 1)):
        forms = HeadForms(config, tensors).requires_grad_(False)
        found.append(text_effects(teacher, forms, ids[0].tolist()))
    compare({"effects": found[1]}, {"effects": found[0]}, 1e-3)


@two_gpus
@torch.no_grad()
def test_our_kernels_run_on_the_gpu_of_the_layer_too(monkeypatch):
    """A student on the second GPU while the first is current: what it says there, and what it says on the first."""
    kernels_hydrahead = pytest.importorskip("hydrahead.kernels_hydrahead")
    launched, prepare = [], kernels_hydrahead._prepare
    monkeypatch.setattr(
        kernels_hydrahead, "_prepare", lambda *args: launched.append(torch.cuda.current_device()) or prepare(*args)
    )
    ids, found = random_ids(1, 130), []
    for place in (0, 1):
        student = make_student().to(f"cuda:{place}")
        assert torch.cuda.current_device() == 0
        found.append(student(ids.to(student.device)).logits.cpu())
        assert set(launched) == {place} and torch.cuda.current_device() == 0
        launched.clear()
    compare({"logits": found[1]}, {"logits": found[0]}, 1e-3)
