"""Checkpoints as folders: loaded where hydrahead is not installed, saved again, converted within memory."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hydrahead import HydraHeadForCausalLM
from hydrahead.convert.migration import convert_model
from hydrahead.hub.checkpoint import save_checkpoint
from hydrahead.tests.families import (
    CALIBRATION,
    FAMILIES,
    MIXED,
    make_teacher,
)

pytestmark = pytest.mark.usefixtures("without_gradients")


WITHOUT_HYDRAHEAD = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hydrahead":
            raise ImportError("hydrahead is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import hydrahead
    raise SystemExit("hydrahead was imported")
except ImportError:
    pass
"""

LOAD_AND_RUN = """
import pathlib, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
results = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    decoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for thing in (config, model, decoder):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing).__module__
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        results[folder.name + ".logits"] = model(ids).logits
        results[folder.name + ".hidden"] = decoder(ids).last_hidden_state
    results[folder.name + ".tokens"] = model.generate(ids, max_new_tokens=5, do_sample=False)
assert "hydrahead" not in sys.modules
save_file(results, sys.argv[2])
"""


def run_python(code: str, *arguments, folder) -> str:
    """Standard output of a fresh, isolated process: no PYTHONPATH, no current directory, caches in `folder`."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_folders_of_every_family_load_where_hydrahead_is_not_installed(tmp_path):
    expected, ids = {}, torch.arange(3, 40)[None]
    for family in FAMILIES:
        student = convert_model(make_teacher(family), MIXED, calibration_ids=CALIBRATION)
        save_checkpoint(student, None, tmp_path / "students" / family)
        expected[f"{family}.logits"] = student(ids).logits
        expected[f"{family}.hidden"] = student.model(ids).last_hidden_state
        expected[f"{family}.tokens"] = student.generate(ids, max_new_tokens=5, do_sample=False)
    (tmp_path / "cache").mkdir()
    code = WITHOUT_HYDRAHEAD + LOAD_AND_RUN
    run_python(code, tmp_path / "students", tmp_path / "results.safetensors", folder=tmp_path / "cache")
    results = load_file(tmp_path / "results.safetensors")
    assert results.keys() == expected.keys()
    for name, tensor in expected.items():
        # The same code on the same machine; 1e-5 in case its threads are not the same.
        torch.testing.assert_close(results[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_folder_saved_again_after_loading_is_the_same(family, tmp_path):
    student = convert_model(make_teacher(family), MIXED, calibration_ids=CALIBRATION)
    save_checkpoint(student, None, tmp_path / "one")
    save_checkpoint(HydraHeadForCausalLM.from_pretrained(tmp_path / "one"), None, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert {"config.json", "model.safetensors", "configuration_hydrahead.py", "modeling_hydrahead.py"} <= set(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ memory

MEASURE_PEAK = """
import pathlib, sys
import torch
from hydrahead.convert.migration import convert_model

def resident(name):  # bytes; ru_maxrss would count the parent process, which a fork starts as
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
tiny, large = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
ids = torch.arange(3, 67).view(1, 64)
convert_model(tiny, [[1, 0, 0, 0, 1, 0], [0] * 6], calibration_ids=ids)  # loads all code that conversion needs
before = resident("VmRSS")
student = convert_model(large, [[1, 1, 0, 0, 0, 0, 0, 0]] * 6, calibration_ids=ids)
torch.stack([parameter.sum() for parameter in student.parameters()])  # touches every page
print(resident("VmHWM") - before, sum(p.nbytes for p in student.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="peak memory is read from Linux' /proc")
def test_converting_from_a_folder_needs_about_one_copy_of_the_model(tmp_path):
    """
    Peak memory grows by at most 1.4 file sizes: the student (1.05 files here, its linear heads own their k and v) and,
    at one time, one layer of the teacher or the widest matrix. Loading the teacher first would take more than 2.
    """
    make_teacher("qwen3-tied").save_pretrained(tmp_path / "tiny")
    config = Qwen3Config(
        vocab_size=16000,
        hidden_size=512,
        intermediate_size=2560,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large/model.safetensors").stat().st_size
    assert size > 140e6
    output = run_python(MEASURE_PEAK, tmp_path / "tiny", tmp_path / "large", folder=tmp_path)
    growth, student = map(int, output.split())
    assert growth <= 1.4 * size, (growth / size, student / size)
    assert growth >= 0.9 * student  # the measurement sees the student at all
