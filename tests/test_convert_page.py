"""docs/convert.md, typed in order: every command works on a small teacher in the real one's place."""

import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import hub as transformers_hub
from typer.testing import CliRunner

from hydrahead.cli import app
from hydrahead.tests.hub_server import TOKEN, Hub, running_hub
from hydrahead.tests.workshop import write_short_teacher

PAGE = (Path(__file__).parents[1] / "docs" / "convert.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]
STUDENT = Path("runs/qwen3-1.7b-7to1/finetune/student")
STAGE = ["tokens=256", "batch_tokens=128", "length=64", "warmup_steps=1"]
RECIPE = [  # at the size of a test
    "launch=null",
    "teacher.dtype=float32",
    "data.name=text.txt",
    "data.subset=null",
    "data.heldout_tokens=2048",
    "run.mixed_precision=no",
    "run.micro_batch_tokens=128",
    *(f"{stage}.{size}" for stage in ("align", "distill", "finetune") for size in STAGE),
    "distill.curriculum=null",
    "align.calibration_tokens=128",
    "score.length=200",
    "score.pairs=2",
    "score.method=[attribution]",  # the quickest
    "score.only=[niah-single.value]",
    "score.evidence=false",
    "score.text=text.txt",
    "select.ratio=0.25",  # of 48 heads
    "evaluate.every=0",
    "evaluate.lengths=[200]",
    "evaluate.tasks=[niah_single_2]",
    "evaluate.prompts=1",
    "evaluate.text_tokens=512",
]
NEEDLES = "--prompts 1 --tasks niah_single_2 --new-tokens 4 --text-tokens 256 --text text.txt"
SIZES = {  # what a test adds to a command
    "score": shlex.split("--length 200 --pairs 2 --only niah-single.value --no-evidence --text text.txt"),
    "select": ["--ratio", "0.25"],
    "evaluate": [*shlex.split(NEEDLES), "--teacher", "Qwen/Qwen3-1.7B"],  # a folder's name is not where it lies
}


def typed(words: list[str]) -> list[str]:
    """A command of the page at the size of a test."""
    name, *rest = words
    if name == "run" or (name == "plan" and "qwen3-1.7b-7to1" in rest):
        return [*words, *RECIPE]
    lengths = {"16384": "200", "32768": "256"}
    return [*(lengths.get(word, word) for word in words), *SIZES.get(name, [])]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    """The Hub that the page publishes on, for this process and its children."""
    with running_hub() as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # which it would keep
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.mark.slow
def test_the_pages_commands_lead_from_the_teacher_to_a_hybrid_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_short_teacher(Path("Qwen/Qwen3-1.7B"))  # a folder of that name comes before the Hub
    words = ["amber", "basket", "candle", "desert", "engine", "falcon", "garden", "harbor", "island", "jacket"]
    Path("text.txt").write_text(" ".join(words[(step * step // 7) % 10] for step in range(8000)))
    done = []
    for program, *words in COMMANDS:
        if program == "hydrahead":
            question = "/needle 200\n/quit\n" if words[0] == "chat" else ""
            result = CliRunner(env={"COLUMNS": "200"}).invoke(app, typed(words), input=question)
            assert result.exit_code == 0, (words, result.output, result.exception)
            done.append(words[0])
    expected = ["plan", "plan", "score", "select", "run", "run", "chat", "evaluate", "card", "push", "push"]
    assert done == expected
    left = "look/head_scores.json look/head_masks.png runs/qwen3-1.7b-7to1/align/head_forms.safetensors "
    left += "runs/qwen3-1.7b-7to1/scores/head_scores.json runs/qwen3-1.7b-7to1/head_masks.json report/report.html"
    assert [path for path in left.split() if not Path(path).is_file()] == []
    assert {"README.md", "report.json", "report.html", "made_from.json"} <= {path.name for path in STUDENT.iterdir()}
    repository = hub.repositories["NAME/Qwen3-1.7B-HydraHead-7to1"]
    published = repository.files("v1")
    assert {path.name for path in STUDENT.iterdir()} <= published.keys()
    tokenizer, model = AutoTokenizer.from_pretrained(STUDENT), AutoModelForCausalLM.from_pretrained(STUDENT)
    model.generate(**tokenizer("import", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2)
