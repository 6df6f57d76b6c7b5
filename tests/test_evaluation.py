"""One evaluator for any model: scores that are true, cells that are done once, and a report of them all."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, FalconH1Config, FalconH1ForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hydrahead.cli import app
from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.data.ruler import TASKS, Haystack, make_prompts
from hydrahead.evaluation import cells as cells_module
from hydrahead.evaluation.evaluator import Settings, evaluate
from hydrahead.evaluation.models import Model, cache_costs, position_limit
from hydrahead.evaluation.needles import FIRST_SEED, answer, as_asked, score
from hydrahead.evaluation.report import is_measured, markdown, read_report, short_table
from hydrahead.evaluation.statistics import mcnemar, paired_difference, wilson_interval
from hydrahead.tests.families import make_student, make_teacher

FEW = Settings(
    tasks=("niah_single_2", "niah_multikey_1"), lengths=(200, 300), prompts=3, new_tokens=4, text_tokens=600
)
VOCAB = {"vocab_size": 2048, "eos_token_id": 0, "pad_token_id": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)


@pytest.fixture(scope="module")
def texts(tokenizer):
    return {"library": encode_corpus(tokenizer, load_corpus("heldout"))[:20_000]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> list[str]:
    """A tiny teacher and a tiny student with the demo's tokenizer."""
    found = []
    for name, make in (("one", lambda: make_teacher("qwen3-tied", **VOCAB)), ("two", lambda: make_student(**VOCAB))):
        folder = tmp_path_factory.mktemp("models") / name
        make().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found.append(str(folder))
    return found


@pytest.fixture
def models(folders) -> list[Model]:
    return [Model(Path(folder).name, folder, Path(folder).name, dtype="float32") for folder in folders]


class Scripted:
    """Continues prompts as a table says, with as little as there is of a model."""

    dtype, device, training = torch.float32, "cpu", False
    config = type("Config", (), {"model_type": "scripted", "max_position_embeddings": 64})
    _is_stateful = False

    def __init__(self, tokenizer, continuations: dict[tuple, str]):
        self.tokenizer, self.continuations = tokenizer, continuations

    def eval(self):
        return self

    def train(self, mode):
        return self

    def modules(self):
        return []

    def generate(self, input_ids, attention_mask, **options):
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask)]
        new = [self.tokenizer(self.continuations[each], add_special_tokens=False).input_ids for each in prompts]
        width = max(map(len, new))
        new = [ids + [self.tokenizer.pad_token_id or 0] * (width - len(ids)) for ids in new]
        return torch.cat([input_ids, torch.tensor(new)], dim=1)


def scripted(monkeypatch, tokenizer, texts, settings, of_prompt) -> None:
    """Have every model say what `of_prompt` makes of a prompt."""
    haystack = Haystack(tokenizer, texts["library"])
    said = {
        tuple(prompt.input_ids): of_prompt(prompt)
        for task in settings.tasks
        for length in settings.lengths
        for prompt in make_prompts(haystack, task, length, settings.prompts, FIRST_SEED, settings.depths)
    }
    monkeypatch.setattr(Model, "load", lambda self, device=None: Scripted(tokenizer, said))
    facts = {"model_type": "scripted", "parameters": 0, "dtype": "float32", "native_length": 64}
    monkeypatch.setattr(
        "hydrahead.evaluation.evaluator.facts", lambda model: facts | {"kv_bytes_per_token": 0, "state_bytes": 0}
    )


@pytest.mark.parametrize(
    ("of_prompt", "accuracy"),
    [(lambda prompt: f" {', '.join(prompt.answers).upper()}.", 1.0), (lambda prompt: " I do not know.", 0.0)],
    ids=["oracle", "copies nothing"],
)
def test_an_oracle_finds_everything_and_a_model_that_copies_nothing_finds_nothing(
    of_prompt, accuracy, tokenizer, texts, models, tmp_path, monkeypatch
):
    settings = Settings(suites=("needles",), tasks=tuple(TASKS), lengths=(1600,), prompts=2, depths=2)
    scripted(monkeypatch, tokenizer, texts, settings, of_prompt)
    evaluate(models[:1], settings, texts, tmp_path, {"text_name": "library"})
    cells = read_report(tmp_path)["needles"]
    assert [cell["task"] for cell in cells] == list(TASKS)
    assert {cell["accuracy"] for cell in cells} == {accuracy}


def test_a_score_is_the_share_of_references_that_an_answer_holds():
    assert score(" 12 and ABC.", ["abc", "12", "13", "14"]) == 0.5


@pytest.fixture(scope="module")
def finished(folders, texts, tmp_path_factory) -> Path:
    """The report of two models, of everything."""
    output = tmp_path_factory.mktemp("finished")
    models = [Model(Path(folder).name, folder, Path(folder).name, dtype="float32") for folder in folders]
    evaluate(models, FEW, texts, output, {"text_name": "library"})
    return output


def without_clocks(report: dict) -> dict:
    for kind in ("needles", "text"):
        for cell in report[kind]:
            cell.pop("seconds")
    return report


def test_a_share_lies_in_its_interval():
    for samples in range(1, 100):
        for count in range(samples + 1):
            low, high = wilson_interval(count / samples, samples)
            assert 0 <= low <= count / samples <= high <= 1


def test_a_report_holds_every_cell_with_intervals_and_differences(finished):
    report = read_report(finished)
    assert [model["label"] for model in report["models"]] == ["one", "two"]
    cells = {(cell["model"], cell["task"], cell["length"]) for cell in report["needles"]}
    assert len(cells) == len(report["needles"]) == 8
    for cell in report["needles"]:
        assert cell["accuracy"] == np.mean(cell["scores"]) and len(cell["scores"]) == len(cell["depths"]) == 3
        assert [cell["low"], cell["high"]] == list(wilson_interval(cell["accuracy"], 3))
    one, two = (next(c for c in report["text"] if (c["model"], c["length"]) == (name, 300)) for name in ("one", "two"))
    assert one["tokens"] == 600 and one["loss"] == pytest.approx(np.mean(one["window_losses"]))
    weights = [end - start for start, end, _ in one["by_position"]]
    assert weights == [128, 128, 44]
    assert np.average([loss for *_, loss in one["by_position"]], weights=weights) == pytest.approx(one["loss"])
    assert "kl" not in one and two["kl"] > 0 and 0 <= two["agreement"] < 1
    assert len(report["differences"]) == 6 and {each["model"] for each in report["differences"]} == {"two"}
    assert sorted(path.name for path in finished.iterdir()) == [
        "accuracy.png",
        "depths.png",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert "| niah_multikey_1 | 300 | " in markdown(report)
    columns, *rows = short_table(report)
    assert columns[:3] == ["tokens", "single key", "four keys"] and [row[0] for row in rows] == ["200", "300"]


@pytest.mark.parametrize("every", [1, 3])
def test_killed_after_any_cell_an_evaluation_goes_on_and_no_cell_is_done_twice(
    every, finished, models, texts, tmp_path, monkeypatch
):
    done, keep = [], cells_module.Cells.keep

    def keep_and_die(self, kind, cell):
        keep(self, kind, cell)
        done.append((kind, *(cell[key] for key in cells_module.KINDS[kind])))
        if len(done) % every == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(cells_module.Cells, "keep", keep_and_die)
    for _ in range(20):
        try:
            evaluate(models, FEW, texts, tmp_path, {"text_name": "library"})
            break
        except KeyboardInterrupt:
            assert not (tmp_path / "report.json").exists()
    assert len(done) == len(set(done)) == 14  # two models, eight needle cells, four of text
    assert without_clocks(read_report(tmp_path)) == without_clocks(read_report(finished))
    assert not (tmp_path / ".evaluation").exists()


def test_a_finished_report_takes_further_lengths_and_models_and_refuses_other_settings(
    finished, models, texts, tmp_path, monkeypatch
):
    output = shutil.copytree(finished, tmp_path / "out")
    before, loaded, load = read_report(output), [], Model.load
    monkeypatch.setattr(Model, "load", lambda self, device=None: loaded.append(self.label) or load(self, device))
    evaluate(models, FEW, texts, output, {"text_name": "library"})
    assert loaded == [] and read_report(output) == before
    more = Settings(**vars(FEW) | {"lengths": (200, 300, 400), "suites": ("needles",)})
    evaluate(models, more, texts, output, {"text_name": "library"})
    assert loaded == ["one", "two"]
    after = read_report(output)
    assert [cell for cell in after["needles"] if cell["length"] < 400] == before["needles"]
    assert {(c["model"], c["task"]) for c in after["needles"] if c["length"] == 400} > {
        ("two", "niah_single_2"), ("two", "niah_multikey_1")
    }  # fmt: skip
    evaluate(
        models,
        Settings(**vars(FEW) | {"lengths": (250,), "suites": ("text",)}),
        texts,
        output,
        {"text_name": "library"},
    )
    assert read_report(output)["haystack_tokens"] == before["haystack_tokens"] > 0, "needles are there, and not asked"
    with pytest.raises(ValueError, match="its report compares with one: name that model first"):
        evaluate(models[1:], more, texts, output, {"text_name": "library"})
    other = Settings(**vars(FEW) | {"prompts": 4})
    with pytest.raises(ValueError, match=r"^.*out: made with another prompts \(3, now 4\); choose another output"):
        evaluate(models, other, texts, output, {"text_name": "library"})
    swapped = [Model("one", models[1].source, "one", dtype="float32")]
    with pytest.raises(ValueError, match=r"made with another one\.weights"):
        evaluate(swapped, FEW, texts, output, {"text_name": "library"})


def test_a_model_has_left_the_memory_before_the_next_one_comes(models, texts, tmp_path, monkeypatch):
    loaded, load = [], Model.load

    def load_alone(self, device=None):
        assert [kept() for kept in loaded] == [None] * len(loaded)
        model = load(self, device)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Model, "load", load_alone)
    settings = Settings(**vars(FEW) | {"suites": ("needles",), "lengths": (200,)})
    evaluate(models, settings, texts, tmp_path, {"text_name": "library"})
    assert len(loaded) == 2


def test_a_length_that_cannot_be_read_says_so_and_the_others_stand(texts, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_positions=256, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    settings = Settings(**vars(FEW) | {"lengths": (200, 300, 30_000), "tasks": ("niah_single_2",), "text_tokens": 200})
    evaluate(
        [Model("gpt2", str(tmp_path / "gpt2"), "gpt2")], settings, texts, tmp_path / "out", {"text_name": "library"}
    )
    cells = {cell["length"]: cell for cell in read_report(tmp_path / "out")["needles"]}
    assert "accuracy" in cells[200]
    assert cells[300]["error"] == "296 tokens, and the model has positions for 256"
    assert cells[30_000]["error"] == "29,996 tokens, and the model has positions for 256", "the text goes round"
    page = (tmp_path / "out" / "report.md").read_text()
    assert "The 20,000 tokens of text go round in longer prompts." in page
    assert "the model has positions for 256" in page
    assert is_measured(tmp_path / "out", "gpt2", settings.tasks, (200,))
    assert not is_measured(tmp_path / "out", "gpt2", settings.tasks, (200, 300)), "asked for again, it is tried again"
    assert not is_measured(tmp_path / "out", "other", settings.tasks, (200,)) and not is_measured(
        tmp_path, "gpt2", (), (1,)
    )


def test_a_batch_that_is_too_large_for_the_memory_is_divided_and_a_prompt_that_is_too_large_says_so(
    tokenizer, texts, models, tmp_path, monkeypatch
):
    settings = Settings(**vars(FEW) | {"suites": ("needles",), "batch_tokens": 900})
    scripted(monkeypatch, tokenizer, texts, settings, lambda prompt: " " + prompt.answers[0])
    generate, sizes = Scripted.generate, []

    def with_little_memory(self, input_ids, attention_mask, **options):
        sizes.append(len(input_ids))
        if input_ids.numel() > 250:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return generate(self, input_ids, attention_mask, **options)

    monkeypatch.setattr(Scripted, "generate", with_little_memory)
    evaluate(models[:1], settings, texts, tmp_path, {"text_name": "library"})
    assert sizes == [3, 2, 1, 1, 1, 3, 2, 1, 1, 1, 3, 2, 1, 3, 2, 1]
    cells = read_report(tmp_path)["needles"]
    assert [cell.get("accuracy", cell.get("error")) for cell in cells] == [1.0, 1.0, "out of memory", "out of memory"]


def test_tables_of_positions_are_told_from_other_tables():
    """Of words by layer, say, in a model that computes its positions."""
    model = make_teacher("llama3-tied")
    assert position_limit(model) is None
    model.words_by_layer = torch.nn.Embedding(10 * model.config.max_position_embeddings, 4)
    assert position_limit(model) is None
    model.positions = torch.nn.Embedding(model.config.max_position_embeddings + 2, 4)  # as OPT has them
    assert position_limit(model) == model.config.max_position_embeddings


@pytest.mark.parametrize("make", [make_student, lambda **options: make_teacher("llama3-tied", **options)])
def test_batch_size_and_order_change_no_answer_in_fp32(make, tokenizer, texts):
    model, haystack = make(**VOCAB), Haystack(tokenizer, texts["library"])
    prompts = [
        prompt.input_ids
        for task, length in (("niah_single_2", 200), ("niah_multikey_1", 260), ("niah_single_1", 320))
        for prompt in make_prompts(haystack, task, length, 2, seed=0)
    ]
    alone = answer(model, tokenizer, prompts, 6, batch_tokens=1)
    assert len(set(alone)) > 1
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 3, 1, 4]):
        for together in (700, 10_000):
            found = answer(model, tokenizer, [prompts[index] for index in order], 6, batch_tokens=together)
            assert found == [alone[index] for index in order]


def test_in_bf16_the_share_of_answers_that_batching_changes_is_reported(folders, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("hydrahead.evaluation.evaluator.ALONE", 2)
    settings = Settings(**vars(FEW) | {"suites": ("needles",), "lengths": (200,)})
    evaluate([Model("one", folders[0], "one", dtype="bfloat16")], settings, texts, tmp_path, {"text_name": "library"})
    (cell,) = read_report(tmp_path)["batching"]
    assert cell["prompts"] == 2 < settings.prompts and "% of 2 answers to" in (tmp_path / "report.md").read_text()
    assert (cell["task"], cell["length"]) == ("niah_single_2", 200) and 0 <= cell["changed"] <= 1
    assert "one by one instead of together" in (tmp_path / "report.md").read_text()
    one_by_one = Settings(**vars(settings) | {"batch_tokens": 300})
    evaluate(
        [Model("one", folders[0], "one", dtype="bfloat16")],
        one_by_one,
        texts,
        tmp_path / "b",
        {"text_name": "library"},
    )
    assert read_report(tmp_path / "b")["batching"] == [], "nothing was answered beside anything"


def test_any_model_computes_in_the_dtype_that_is_asked_for(folders):
    for folder in folders:
        found = {
            dtype: Model("x", folder, "x", dtype=dtype).load(torch.device("cpu")) for dtype in ("auto", "bfloat16")
        }
        assert [model.dtype for model in found.values()] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("make", [make_student, lambda **options: make_teacher("qwen3-tied", **options)])
def test_a_long_prompt_is_read_in_chunks_with_the_same_answer(make, tokenizer, texts, monkeypatch):
    model, prompt = make(**VOCAB), texts["library"][:300].tolist()
    whole = answer(model, tokenizer, [prompt], 8)
    monkeypatch.setattr("hydrahead.evaluation.needles.PREFILL_CHUNK", 64)
    rows = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    assert answer(model, tokenizer, [prompt], 8) == whole
    assert rows[:5] == [64, 64, 64, 64, 44]


@pytest.mark.parametrize("make", [make_student, lambda **options: make_teacher("qwen3-tied", **options)])
def test_long_prompts_of_one_length_are_read_together_in_chunks(make, tokenizer, texts, monkeypatch):
    model, text = make(**VOCAB), texts["library"].tolist()
    prompts = [text[:300], text[300:600], text[600:900]]
    alone = answer(model, tokenizer, prompts, 8)
    monkeypatch.setattr("hydrahead.evaluation.needles.PREFILL_CHUNK", 64)
    read = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: read.append(tuple(args[0].shape)))
    assert answer(model, tokenizer, prompts, 8, batch_tokens=600) == alone
    assert read[:5] == [(2, 64)] * 4 + [(2, 44)] and (1, 64) in read
    read.clear()
    assert answer(model, tokenizer, [text[:299], *prompts[1:]], 8, batch_tokens=600)[1:] == alone[1:]
    assert {rows for rows, _ in read} == {1}, "padded, they would be read whole"


def test_other_hybrids_are_read_whole(tokenizer, texts, monkeypatch):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    mamba = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    model = FalconH1ForCausalLM(FalconH1Config(**sizes, **mamba, **VOCAB, bos_token_id=0)).eval()
    monkeypatch.setattr("hydrahead.evaluation.needles.PREFILL_CHUNK", 64)
    rows = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    answer(model, tokenizer, [texts["library"][:200].tolist()], 3)
    assert rows[0] == 200
    kv, state = cache_costs(model)
    assert kv == 2 * 2 * 2 * 16 * 2 and state > 0


def test_a_chat_model_is_asked_in_its_template_with_the_same_text_and_the_same_beginning_of_the_answer(
    tokenizer, texts
):
    chat = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    chat.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
    (prompt,) = make_prompts(Haystack(tokenizer, texts["library"]), "niah_single_2", 300, 1, seed=0)
    (plain,), (asked,) = (as_asked([prompt], tokenizer, chat, template) for template in (False, True))
    asked = chat.decode(asked)
    assert plain == prompt.input_ids
    question = tokenizer.decode(plain, skip_special_tokens=True).removesuffix(prompt.prefix)
    assert asked == f"<user>{question}</user><assistant>{prompt.prefix.lstrip()}"


def test_rope_is_scaled_without_another_checkpoint(folders):
    model = Model("one", folders[0], "one", rope_scaling="yarn:4")
    config = model.load().config
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 4.0
    assert config.max_position_embeddings == 4 * config.rope_parameters["original_max_position_embeddings"] == 256
    for scaling in ("yarn", "yarn:1", "best:4"):
        with pytest.raises(ValueError, match="expected KIND:FACTOR"):
            Model("one", folders[0], "one", rope_scaling=scaling).config()


def test_cache_of_a_teacher_is_counted_in_bf16():
    teacher = make_teacher("qwen3-tied")
    assert cache_costs(teacher) == (2 * 2 * 2 * 16 * 2, 0)  # layers, k and v, KV heads, size, bytes
    student = make_student()
    assert cache_costs(student) == (student.config.kv_bytes_per_token(), student.config.state_bytes())


def test_paired_differences():
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(0, 8) == mcnemar(8, 0) == pytest.approx(2 / 2**8)
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    found = paired_difference([1, 1, 0, 1] * 10, [0, 1, 0, 0] * 10)
    assert found["difference"] == 0.5 and found["p"] == mcnemar(20, 0)
    assert 0.3 < found["low"] < 0.5 < found["high"] < 0.7
    same = paired_difference([0.25, 0.5], [0.25, 0.5])
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, None)


@pytest.mark.slow
def test_two_processes_share_the_samples_of_every_cell(finished, folders, texts, tmp_path):
    from hydrahead.tests.evaluation_runs import finish_evaluation

    finish_evaluation(folders, vars(FEW), {name: ids.tolist() for name, ids in texts.items()}, tmp_path, processes=2)
    one, two = (without_clocks(read_report(folder)) for folder in (finished, tmp_path))
    for first, second in zip(one["needles"], two["needles"], strict=True):
        assert first == second
    for first, second in zip(one["text"], two["text"], strict=True):
        assert json.loads(json.dumps(second)) == first | {
            name: pytest.approx(first[name], rel=1e-6) for name in ("loss", "kl", "window_losses") if name in first
        } | {"by_position": second["by_position"]}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["demo"], "--output: a folder for the report is needed"),
        (["nothing", "--output", "out"], "nothing: no model there (no config.json), and no Hub id (OWNER/NAME)"),
        (["runs/demo/finetune/student"], "runs/demo/finetune/student: no model there (no config.json), and no Hub id"),
        (
            ["demo", "--output", "out", "--suite", "needle"],
            "suite needle: there is no such one, only needles, text, lm-",
        ),
        (["demo", "--output", "out", "--tasks", "niah"], "task niah: there is no such one, only niah_single_1, "),
        (["demo", "--output", "out", "--lengths", "0"], "lengths: 0, expected tokens of a prompt"),
        (["demo", "--output", "out", "--rope-scaling", "yarn"], "rope scaling yarn: expected KIND:FACTOR"),
        (["demo", "--output", "out", "--text", "none.txt"], "data: none.txt: no such file or folder of .txt"),
        (["demo", "--output", "out", "--scores", "none.json"], "none.json: no such file"),
        (["demo", "--output", "out", "--lengths", "5"], "length 5: no room for a prompt of niah_single_1: "),
        (["demo", "--output", "out", "--teacher", "demo"], "--teacher is for a lone student: leave it out"),
        (["demo", "--output", "out", "--revision", "v1"], "--revision is for a lone student"),
        (["demo", "--output", "out", "--suite", "text", "--tasks", "vt"], "--tasks is for the suite needles"),
        (["demo", "--output", "out", "--harness-tasks", "general"], "--harness-tasks is for the suite lm-eval"),
        (["demo", "--output", "out", "--template"], "template: none of these models has a chat template"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert result.exit_code == 1 and result.stderr.startswith(f"hydrahead: {line}"), result.stderr
    assert result.stderr.strip().count("\n") == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--trust-remote-code"], "--trust-remote-code is for models side by side: leave it out"),
        (["--output", "out", "--rope-scaling", "yarn:2"], "rope scaling yarn:2: of students only"),
    ],
)
def test_what_is_nothing_to_a_student_is_refused_in_one_line(words, line, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = shutil.copytree(folders[1], "student")
    config = json.dumps(json.loads(Path("student/config.json").read_text()), separators=(",", ":"))
    Path("student/config.json").write_text(config)
    names = [student] if "--output" not in words else [student, folders[1]]
    result = CliRunner().invoke(app, ["evaluate", *names, *words])
    assert result.exit_code == 1 and result.stderr.startswith(f"hydrahead: {line}"), result.stderr
    assert not Path("out").exists()


def test_the_command_compares_models_on_a_folder_of_texts_with_variants_of_each(folders, texts, tokenizer, tmp_path):
    chat = shutil.copytree(folders[0], tmp_path / "chat")
    file = json.loads((chat / "tokenizer_config.json").read_text())
    file["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (chat / "tokenizer_config.json").write_text(json.dumps(file))
    (tmp_path / "texts").mkdir()
    for name in ("books", "code"):
        (tmp_path / "texts" / f"{name}.txt").write_text(tokenizer.decode(texts["library"][:4000]))
    words = ["--output", tmp_path / "out", "--text", tmp_path / "texts", "--rope-scaling", "yarn:2", "--template"]
    words += ["--lengths", 200, "--tasks", "niah_single_1", "--prompts", 1, "--new-tokens", 2, "--text-tokens", 400]
    result = CliRunner().invoke(app, list(map(str, ["evaluate", chat, folders[1], *words])), catch_exceptions=False)
    assert result.exit_code == 0 and "chat / chat, yarn:2 / chat, template / two" in result.stdout
    report = read_report(tmp_path / "out")
    assert [model["template"] for model in report["models"]] == [False, False, True, False]
    assert {(cell["model"], cell["domain"]) for cell in report["text"]} == {
        (model, domain) for model in ("chat", "chat, yarn:2", "two") for domain in ("books", "code")
    }
    assert len(report["needles"]) == 4 and report["text_name"] == "texts"
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()
