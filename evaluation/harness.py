"""Tasks of lm-eval (EleutherAI's evaluation harness), through its Python API."""

import contextlib
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..console import blaming

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks that lm-eval makes without a network."""
ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
QUESTIONS = ("ruler_qa_squad", "ruler_qa_hotpot")
GROUPS = {
    "offline": OFFLINE,
    "ruler": (*OFFLINE, *ESSAYS, *QUESTIONS),
    "general": (
        *("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "boolq", "lambada_openai"),
        *("mmlu", "gsm8k"),
    ),
}
"""Names that stand for several tasks. All but the first need a network."""
ANSWER_ROOM = 256  # tokens beside a prompt of RULER's for its beginning of the answer, which lm-eval does not count


def expand(names: Sequence[str]) -> list[str]:
    """Tasks by name, with groups replaced by their tasks."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def has_lengths(task: str) -> bool:
    """Whether a task is asked at every length."""
    return task in GROUPS["ruler"]


def check_installed() -> None:
    """
    Raises:
        ValueError: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'lm-eval[ruler]'")


@contextlib.contextmanager
def _without_code(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """
    A folder from which a tokenizer loads: lm-eval's RULER opens one by name, and runs whatever code is there.

    That of a tokenizer whose own code was trusted is its own; any other is written anew, and names none.
    """
    if type(tokenizer).__module__.startswith("transformers_modules."):
        yield tokenizer.name_or_path
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        yield folder


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int | None,
    limit: int | None,
    batch_tokens: int,
    template: bool = False,
) -> dict:
    """
    Ask a model the questions of one task.

    Args:
        length: tokens of a prompt, of tasks that have lengths.
        limit: questions asked; by default all.
        batch_tokens: tokens of the questions that are asked together, one at the least; four questions of tasks
            without a length.
        template: the questions are a user's messages in the chat template.

    Returns:
        `metrics`: by name, the value and its standard error or `None`; `samples`, how many questions were asked;
        `scores`: of each, by the first metric, where every question has one.

    Raises:
        ValueError: lm-eval does not know the task, or cannot do it here; one line.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    size = max(1, batch_tokens // length) if length else 4
    longest = {"max_length": length + ANSWER_ROOM} if length else {}
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, **longest)
    with _without_code(tokenizer) as folder, blaming(f"lm-eval: {task}"):  # for want of a network above all
        # One length a call: a limit counts the first length's questions only.
        metadata = {"max_seq_lengths": [length], "tokenizer": folder} if length else None
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=[task], limit=limit, apply_chat_template=template, metadata=metadata
        )
    results, metrics = found["results"][task], {}
    for name, value in results.items():
        metric, _, kind = name.partition(",")
        if not kind or metric.endswith("_stderr") or value == -1:  # -1: a length that was not asked
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        shown = "accuracy" if metric == str(length) else metric if kind == "none" else name
        metrics[shown] = [float(value), float(error) if isinstance(error, (int, float)) else None]
    samples = found["samples"].get(task, [])
    first = str(length) if length else next(iter(samples[0]["metrics"]), None) if samples else None
    scores = [sample.get(first) for sample in samples]
    asked = sum(each["effective"] for each in found["n-samples"].values())
    numbers = scores and all(isinstance(score, (int, float)) for score in scores)
    return {"metrics": metrics, "samples": asked, **({"scores": list(map(float, scores))} if numbers else {})}
