"""A teacher that is off-loaded or split over devices gives what it gives in one place."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hydrahead.convert.scoring.command import score_to_folder
from hydrahead.convert.scoring.settings import ScoreSettings
from hydrahead.convert.teachers import Teacher
from hydrahead.tests.families import make_teacher
from hydrahead.tests.placements import compare, everything, split
from hydrahead.tests.test_scoring import usable_pairs
from hydrahead.tests.workshop import write_short_teacher
from hydrahead.training.quick import align_for_scores

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    _setup_privateuseone_for_python_backend = None


def sharp_teacher(family: str):
    return make_teacher(family, initializer_range=0.4)


@pytest.mark.parametrize("family", ["qwen3-untied", "qwen3-tied", "phi3"])
def test_an_off_loaded_teacher_gives_what_it_gives_in_memory(family, tmp_path):
    """All methods, alignment and exchange with the upper half on disk: the same kernels, hence the same numbers."""
    plain, accelerator = sharp_teacher(family), Accelerator(cpu=True)
    pairs = usable_pairs(plain, 4)
    teacher = split(sharp_teacher(family), "cpu", "disk", tmp_path)
    assert teacher.model.layers[1].mlp.down_proj.weight.is_meta
    compare(everything(teacher, pairs, accelerator), everything(plain, pairs, accelerator), 0)
    assert teacher.model.layers[1].mlp.down_proj.weight.is_meta


@pytest.mark.skipif(torch.cuda.is_available(), reason="real devices are there: test_gpu_convert.py")
@pytest.mark.skipif(
    _setup_privateuseone_for_python_backend is None, reason="this PyTorch cannot be told of a device from Python"
)
@pytest.mark.slow
def test_a_teacher_split_over_two_devices_gives_what_it_gives_on_one(tmp_path):
    """On devices that only refuse to be mixed; 1e-4: attention is another kernel there, sums in another order."""
    plain = sharp_teacher("qwen3-untied")
    expected = everything(plain, usable_pairs(plain, 4), Accelerator(cpu=True))
    command = [sys.executable, "-m", "hydrahead.tests.pretended", tmp_path / "found.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compare(torch.load(tmp_path / "found.pt"), expected, 1e-4)


@pytest.mark.slow
def test_score_aligns_and_measures_a_teacher_that_is_off_loaded(tmp_path, monkeypatch):
    """From a `device_map` to the score file, quick alignment included; half of the layers on disk."""
    lower = ("embed_tokens", "rotary_emb", "norm", "layers.0")
    places = {f"model.{name}": "cpu" for name in lower} | {"lm_head": "cpu", "model.layers.1": "disk"}
    folder, placed, found = write_short_teacher(tmp_path / "teacher"), [], []

    load = Teacher.load

    def load_and_look(self, *arguments):
        teacher = load(self, *arguments)
        placed.append(teacher.model.layers[1].mlp.down_proj.weight.is_meta)
        return teacher

    monkeypatch.setattr(Teacher, "load", load_and_look)
    for name, device in (("plain", "cpu"), ("off-loaded", places)):
        settings = ScoreSettings(
            str(folder),
            ("replacement", "logit-contribution"),
            length=200,
            pairs=2,
            text=Path(argparse.__file__),
            shortlist=1,
            evidence=False,
            device=device,
            options={"fusion_norm": "linear"},
            seed=1,
            align_steps=1,
        )
        align_for_scores(settings, tmp_path / name)
        score_to_folder(settings, tmp_path / name)
        found.append(
            json.loads((tmp_path / name / "head_scores.json").read_text()) | {"seconds": None, "made_from": None}
        )
    assert placed == [False, False, True, True]
    assert found[0] == found[1]
