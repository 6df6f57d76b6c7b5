"""lm-eval's tasks in the same report, and the same score for the same samples."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.evaluation import harness
from hydrahead.evaluation.evaluator import Settings, evaluate
from hydrahead.evaluation.models import Model
from hydrahead.evaluation.needles import answer, score
from hydrahead.evaluation.report import markdown, read_report

LENGTH, COUNT = 1024, 3


def test_groups_stand_for_their_tasks():
    assert harness.expand(["offline", "piqa", "niah_single_1"]) == [*harness.OFFLINE, "piqa"]
    assert harness.has_lengths("niah_single_1") and not harness.has_lengths("piqa")


@pytest.fixture
def nothing_to_download(tmp_path, monkeypatch):
    """lm-eval would fetch a splitter of sentences, and ask for long, for haystacks that it does not split."""
    nltk = pytest.importorskip("nltk")
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])


def test_without_lm_eval_its_suite_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    settings = Settings(suites=("lm-eval",))
    with pytest.raises(ValueError, match=r"^lm-eval is not installed: pip install"):
        evaluate([Model("demo", str(EMBEDDED_TEACHER), "demo")], settings, {}, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3"])
def test_answers_and_scores_are_lm_evals_for_the_same_model_and_samples(task, nothing_to_download):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_TEACHER, dtype=torch.float32).eval()
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=LENGTH + harness.ANSWER_ROOM),
        tasks=[task],
        limit=COUNT,
        metadata={"max_seq_lengths": [LENGTH], "tokenizer": str(EMBEDDED_TEACHER)},
    )
    samples = found["samples"][task]
    prompts = [tokenizer(sample["arguments"][0][0]).input_ids for sample in samples]
    answers = answer(model, tokenizer, prompts, 128)
    assert answers == [sample["resps"][0][0] for sample in samples]
    scores = [score(said, sample["doc"]["outputs"]) for said, sample in zip(answers, samples)]
    assert scores == [sample[str(LENGTH)] for sample in samples]
    assert sum(scores) / COUNT == found["results"][task][f"{LENGTH},none"]
    # And a cell of our report is that number.
    cell = harness.run_task(model, tokenizer, task, LENGTH, COUNT, 3 * LENGTH)
    assert cell["metrics"]["accuracy"][0] == sum(scores) / COUNT
    assert cell["samples"] == COUNT and cell["scores"] == scores


@pytest.mark.slow
def test_a_task_that_cannot_be_had_says_so_and_the_others_stand(tmp_path, nothing_to_download):
    pytest.importorskip("lm_eval")
    tasks = ("niah_single_1", "nothing_like_it")
    settings = Settings(suites=("lm-eval",), lengths=(1024,), harness_tasks=tasks, harness_limit=2)
    models = [Model("demo", str(EMBEDDED_TEACHER), "demo", dtype="float32")]
    evaluate(models, settings, {}, tmp_path, {"text_name": "none"})
    report = read_report(tmp_path)
    cells = {cell["task"]: cell for cell in report["lm_eval"]}
    assert cells["niah_single_1"]["samples"] == 2 and cells["niah_single_1"]["length"] == 1024
    assert cells["nothing_like_it"]["error"].startswith("lm-eval: nothing_like_it (")
    assert "| niah_single_1 | 1,024 | accuracy | " in markdown(report)
