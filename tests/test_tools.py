"""docs/using.md: every piece of code on the page is run as it stands, and does what the page says."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hydrahead import HydraHeadForCausalLM, HydraHeadModel
from hydrahead.convert import convert_model
from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.hub.card import state
from hydrahead.hub.checkpoint import save_checkpoint
from hydrahead.hub.publish import check_folder
from hydrahead.tests.families import random_ids
from hydrahead.training.sft import main, run_sft

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "using.md").read_text()
SECTIONS = dict(re.findall(r"^##+ (.+)\n((?:(?!^##).*\n?)*)", PAGE, flags=re.M))
MASKS = [[1, 0, 0, 0, 0, 0, 0, 1], [0] * 8, [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [0] * 8, [1] * 8]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = {
    "texts": [{"text": f"def f(x):\n    return x + {i}\n"} for i in range(16)],
    "chats": [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        for i in range(16)
    ],
    "pairs": [{"prompt": f"def f{i}", "completion": "(x):\n    return x\n"} for i in range(8)],
    "preferences": [{"prompt": f"def f{i}", "chosen": "(x):\n", "rejected": " x\n"} for i in range(8)],
    "prompts": [{"prompt": f"def f{i}"} for i in range(8)],
}


def code(section: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], flags=re.S)


def command_of(section: str) -> list[str]:
    return shlex.split(code(section, "bash")[0].replace("\\\n", ""))


LOAD = re.search(r"```python\n(.*?)```", PAGE, flags=re.S).group(1)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A student of the shipped teacher, converted and not trained, that can chat."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    tokenizer.chat_template = TEMPLATE
    model = convert_model(EMBEDDED_TEACHER, MASKS, calibration_ids=random_ids(2, 64), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("tools") / "student"
    made_from = {"teacher": "demo", "revision": None, "options": {}, "masks": {}, "forms": {}, "stages": []}
    save_checkpoint(model, tokenizer, folder, made_from)
    return folder


@pytest.fixture
def workplace(student, tmp_path, monkeypatch) -> Path:
    """Where the page's code runs: `student` and the rows that it reads. Trainers stop after two steps, on the CPU."""
    (tmp_path / "student").symlink_to(student)
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    original = TrainingArguments.__post_init__

    def two_steps(arguments):
        arguments.use_cpu, arguments.max_steps, arguments.save_steps, arguments.logging_steps = True, 2, 1, 1
        arguments.per_device_train_batch_size = 4
        original(arguments)

    monkeypatch.setattr(TrainingArguments, "__post_init__", two_steps)
    return tmp_path


def run(section: str, which: slice = slice(None)) -> dict:
    """The page's first piece of code, then those of a section; what they leave behind, by name."""
    namespace = {"__name__": "page"}
    for piece in [LOAD, *code(section)[which]]:
        exec(compile(piece, f"docs/using.md, {section}", "exec"), namespace)
    return namespace


def check_losses(trainer) -> None:
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 2 and all(torch.tensor(found).isfinite()), found


def changed(before: Path, model) -> set[str]:
    """Names of the weights that differ from a folder's."""
    old = AutoModelForCausalLM.from_pretrained(before).state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}


def test_every_piece_of_code_is_tested():
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_tools.py", "test_quantizers.py"))
    assert [name for name in SECTIONS if "```" in SECTIONS[name] and f'"{name}"' not in tests] == []


def test_a_pipeline_pads_and_answers(workplace):
    found = run("Pipeline")
    model, tokenizer = found["model"], found["tokenizer"]
    for prompt, answer in zip(["def read(path):", "import"], found["answers"], strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=16)
        assert answer[0]["generated_text"] == tokenizer.decode(alone[0], skip_special_tokens=True)
    messages = found["generator"]([{"role": "user", "content": "Who?"}], max_new_tokens=4)[0]["generated_text"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_chats_follow_the_template_and_go_on_from_their_cache(workplace):
    found = run("Chat")
    assert found["tokenizer"].decode(found["inputs"]["input_ids"][0]) == "<user>Where is the key?\n<assistant>"
    assert isinstance(found["answer"], str) and torch.equal(found["first"], found["output"])
    assert torch.equal(found["second"], found["model"].generate(found["turn"], max_new_tokens=16))


def test_text_arrives_in_pieces(workplace, capsys):
    found = run("Streaming")
    output = found["model"].generate(**found["inputs"], max_new_tokens=16)
    expected = found["tokenizer"].decode(output[0])
    assert capsys.readouterr().out.strip() == expected.strip()
    assert expected == "def read(path):" + found["text"]


def test_a_cache_by_name_gives_the_same_answer(workplace):
    found = run("On a GPU")
    assert torch.equal(found["recorded"], found["by_kernels"])


def test_the_decoder_gives_the_states_that_the_head_reads(workplace):
    found = run("The decoder alone")
    ids = found["tokenizer"]("def read(path):", return_tensors="pt")["input_ids"]
    assert type(found["decoder"]) is HydraHeadModel
    assert torch.equal(found["model"].lm_head(found["states"]), found["model"](ids).logits)


def test_a_trainer_that_was_killed_goes_on_to_the_same_weights(workplace, student):
    whole = run("Trainer")
    expected = whole["model"].state_dict()
    assert changed(student, whole["model"]) == set(expected)
    shutil.rmtree("finetuned/checkpoint-2")
    resumed = run("Trainer")
    assert [entry["step"] for entry in resumed["trainer"].state.log_history if "loss" in entry] == [1, 2]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed["model"].state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained("finetuned")
    assert Path("finetuned/modeling_hydrahead.py").is_file() and Path("finetuned/tokenizer.json").is_file()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.state_dict().items())


def test_trl_packs_whole_texts_and_each_is_read_alone(workplace, student):
    found = run("TRL: supervised", slice(0, 1))
    check_losses(found["trainer"])
    assert len(changed(student, found["model"])) == len(found["model"].state_dict())
    batch = next(iter(found["trainer"].get_train_dataloader()))
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = positions[0].eq(0).nonzero().flatten().tolist()
    assert len(starts) > 1
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits[0]
        for start, end in zip(starts, [*starts[1:], ids.shape[1]]):
            assert (packed[start:end] - model(ids[:, start:end]).logits[0]).abs().max() < 1e-3


def test_trl_learns_completions_by_adapters_that_become_a_student(workplace, student):
    found = run("TRL: supervised", slice(1, 2))
    check_losses(found["trainer"])
    labels = next(iter(found["trainer"].get_train_dataloader()))["labels"]
    assert labels[:, 0].eq(-100).all() and labels.ne(-100).any(dim=1).all()
    tuned = found["trainer"].model.eval()
    trained = {name.split(".")[-3] for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "modules_to_save"}
    loaded = run("Adapters")
    ids = random_ids(1, 9)
    with torch.no_grad():
        expected = tuned.base_model(ids).logits  # the whole one computes in bf16 since it was trained
        merged = AutoModelForCausalLM.from_pretrained("merged")
        assert type(merged) is HydraHeadForCausalLM
        assert (merged(ids).logits - expected).abs().max() < 1e-3  # of order 10
        assert (loaded["model"](ids).logits - expected).abs().max() > 1e-3


def test_peft_has_defaults_for_the_model(student):
    own = {"full_attention.q_proj", "full_attention.v_proj", "linear_attention.q_proj", "linear_attention.v_proj"}
    for config, more in ((LoraConfig(), set()), (IA3Config(), {"mlp.down_proj"})):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(student), config)
        adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        assert {".".join(name.split(".")[-2:]) for name in adapted} == own | more


@pytest.mark.parametrize("section", ["TRL: preferences", "TRL: rewards"])
def test_trl_learns_from_preferences_and_rewards(section, workplace, student):
    found = run(section)
    check_losses(found["trainer"])
    assert changed(student, found["model"])


def test_the_script_goes_on_where_it_was_killed_and_records_what_it_did(workplace, student, monkeypatch):
    command = command_of("On several processes")
    assert command[:3] == ["accelerate", "launch", "-m"]
    monkeypatch.setattr(sys, "argv", command[3:])
    runpy.run_module(command[3], run_name="__main__")
    trained = load_file("tuned/student/model.safetensors")
    shutil.rmtree("tuned/checkpoint-2")
    runpy.run_module(command[3], run_name="__main__")
    assert json.loads(Path("tuned/checkpoint-2/trainer_state.json").read_text())["log_history"][0]["step"] == 1
    assert all(
        torch.equal(tensor, trained[name]) for name, tensor in load_file("tuned/student/model.safetensors").items()
    )
    assert changed(student, AutoModelForCausalLM.from_pretrained("tuned/student"))
    [stage] = json.loads(Path("tuned/student/made_from.json").read_text())["stages"]
    assert stage.pop("tokens") > 0
    summary = "2 steps on chats.jsonl, with TRL"
    assert stage == {"stage": "sft", "summary": summary, "steps": 2, "datasets": []}
    assert summary in Path("tuned/student/README.md").read_text()
    state(Path("tuned/student"), license="apache-2.0")  # nobody knows the licence of a teacher of our own
    assert {"README.md", "head_masks.json", "model.safetensors"} <= check_folder(Path("tuned/student")).keys()


@pytest.mark.parametrize("options", [[], ["--dataset_name", "chats.jsonl"], ["--model_name_or_path", "student"]])
def test_the_script_asks_for_what_it_needs_in_one_line(options, workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft", "--output_dir", "tuned", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hydrahead.training.sft", run_name="__main__")
    assert ended.value.code == 1 and not Path("tuned").exists()
    assert re.search(r"^hydrahead: no (student|data): --(model_name_or_path|dataset_name) is", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--push_to_hub", "--push_to_hub: leave it out"),
        ("--dataset_streaming", "--dataset_streaming: leave it out"),
        ("--eval_strategy=steps", "chats.jsonl: no rows to train on"),
    ],
)
def test_the_script_passes_no_option_over(option, line, workplace, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--output_dir", "tuned", "--model_name_or_path", "student", "--dataset_name", "chats.jsonl", option])
    assert ended.value.code == 1 and not Path("tuned").exists()
    assert f"hydrahead: {line}" in capsys.readouterr().err


def test_the_script_says_that_trl_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^TRL is not installed: pip install 'hydrahead\[train\]'$"):
        run_sft()


def launch(command: list[str], said: str = "") -> str:
    """What a command answers, run where `student` is by a Python that finds hydrahead but has not imported it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent), "HF_HUB_OFFLINE": "1", "HF_HOME": "home"}
    script = Path(sys.executable).parent / command[0]
    # An environment that borrows packages has no scripts of theirs.
    command = [*([str(script)] if script.is_file() else [sys.executable, "-m", command[0]]), *command[1:]]
    done = subprocess.run(command, input=said, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WITHOUT_HYDRAHEAD = """
import json, sys
sys.modules["hydrahead"] = None
from transformers import TrainingArguments
original = TrainingArguments.__post_init__
def two_steps(arguments):
    arguments.use_cpu, arguments.max_steps, arguments.per_device_train_batch_size = True, 2, 4
    original(arguments)
TrainingArguments.__post_init__ = two_steps
for section, pieces in json.load(sys.stdin).items():
    namespace = {"__name__": "page"}
    for piece in pieces:
        exec(compile(piece, section, "exec"), namespace)
    assert type(namespace["model"]).__module__.startswith("transformers_modules."), section
"""


@pytest.mark.slow
def test_the_page_holds_where_the_folders_own_code_is_run(workplace):
    pieces = {name: [LOAD, *code(name)] for name in SECTIONS if code(name) and name not in ("8 and 4 bits", "Export")}
    launch(["python", "-c", WITHOUT_HYDRAHEAD], json.dumps(pieces))


@pytest.mark.slow
def test_the_script_trains_adapters_on_two_processes(workplace):
    command = command_of("On several processes")
    engine = ["--config_file", str(ROOT / "training" / "recipes" / "accelerate" / "ddp_cpu.yaml")]
    adapters = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_modules_to_save", "fusion"]
    launch([*command[:2], *engine, *command[2:], *adapters, "--use_cpu", "--max_steps", "2"])
    tuned = AutoPeftModelForCausalLM.from_pretrained("tuned/adapters").merge_and_unload()
    assert changed(Path("student"), tuned)


@pytest.mark.slow
def test_the_command_of_lm_eval_reads_a_folder(workplace, monkeypatch):
    # It would fetch a splitter of sentences, for a haystack that it does not split.
    (workplace / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setenv("NLTK_DATA", "nltk")
    table = launch(command_of("Evaluate"))
    assert re.search(r"\|\s*1024\|", table), table


def test_an_off_loaded_model_gives_the_same_logits(workplace):
    found = run("Off-load")
    ids = random_ids(2, 9)
    assert {"cpu", "disk"} == set(found["big"].hf_device_map.values())
    with torch.no_grad():
        assert torch.equal(found["big"](ids).logits, found["model"](ids).logits)
    expected = found["model"].generate(ids, max_new_tokens=4)
    assert torch.equal(found["big"].generate(ids, max_new_tokens=4), expected)


def test_a_sharded_folder_loads_anywhere(workplace):
    found = run("Shards")
    assert len(list(Path("sharded").glob("*.safetensors"))) > 2 and Path("sharded/modeling_hydrahead.py").is_file()
    assert changed(Path("sharded"), found["model"]) == set()


@pytest.mark.slow
def test_an_exported_program_serves_rows_of_its_length(workplace):
    found = run("Export")
    ids = found["tokenizer"]("import", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = found["model"](ids).logits[0]
    real = found["tokenizer"]("import", **found["padding"])["attention_mask"][0].bool()
    assert (found["logits"][0, real] - expected).abs().max() < 1e-4
