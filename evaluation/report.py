"""A student against its teacher, length by length: `report.json`, and the table and the picture made of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from .figures import plot_accuracy_over_length
from .needles import TASKS, answer_cell, niah_cells
from .text import text_loss

LEAST_WINDOWS = 2  # of text that a loss is measured on


def text_needed(lengths: Sequence[int], text_tokens: int) -> int:
    """Tokens of text that an evaluation at these lengths reads; `text_tokens` as in `evaluate_at`."""
    return max(text_tokens, LEAST_WINDOWS * max(lengths)) + 1


def evaluate_at(
    model: PreTrainedModel,
    tokenizer,
    text_ids: Sequence[int],
    length: int,
    prompts: int,
    text_tokens: int,
    on_cell: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """
    What a model finds and predicts in prompts and windows of `length` tokens.

    Args:
        text_ids: text that it was not trained on, as much as `text_needed` says.
        prompts: of each task.
        text_tokens: that the loss is measured on, in windows of `length`, two at the least.

    Returns:
        by task in `TASKS`, in how many prompts the needle was found; and `text_loss` in nats per token.
    """
    found = {}
    for cell in niah_cells(tokenizer, text_ids, [length], prompts):
        found[cell.task] = answer_cell(model, tokenizer, cell)
        on_cell()
    return found | {"text_loss": text_loss(model, text_ids, length, max(LEAST_WINDOWS, text_tokens // length))}


def report_rows(report: Mapping) -> list[list[str]]:
    """The table of a report, heads of columns first: at each length, `teacher / student` of all that was measured."""
    rows = [["tokens", "single key", "four keys", "text loss", "cache, KB (bf16)"]]
    formats = [(task, ".2f", report["prompts"]) for task in TASKS]
    formats += [("text_loss", ".3f", 1), ("cache_bytes", ",.0f", 1024)]
    for length in report["lengths"]:
        cells = [report["results"][model][str(length)] for model in ("teacher", "student")]
        row = [" / ".join(f"{cell[key] / unit:{form}}" for cell in cells) for key, form, unit in formats]
        rows.append([f"{length:,}", *row])
    return rows


def draw_report(report: Mapping, native_length: int, path: Path) -> None:
    """Needles found over length, of teacher and student."""
    lengths, prompts = report["lengths"], report["prompts"]
    shares = {
        model: {task.removeprefix("niah_"): [cells[str(each)][task] / prompts for each in lengths] for task in TASKS}
        for model, cells in report["results"].items()
    }
    title = f"Needles found by generation, {prompts} prompts a point, 95% intervals"
    plot_accuracy_over_length(lengths, shares, native_length, prompts, title, path)
