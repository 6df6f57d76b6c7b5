"""
Any models, asked the same questions and given the same text: `evaluate` leaves one report (`evaluation/report.py`).

What is measured falls into cells: one model, one task or domain of text, one length. Every cell is written whole when
it is done, so that work which was killed goes on after the last one. Launched through Accelerate, each process holds
the model and takes its share of prompts and windows.
"""

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel

from ..console import progress
from ..data.ruler import NEEDLES, TASKS, Haystack, Prompt, check_lengths, make_prompts
from ..kernels import use_tuned_kernels
from ..provenance import environment
from . import harness
from .cells import Cells
from .models import Model, facts
from .needles import FIRST_SEED, answer, as_asked, same_vocabulary, score
from .report import build_report, write_report
from .statistics import wilson_interval
from .text import Window, count_windows, position_buckets, read_windows

LEAST_WINDOWS = 2  # of text that a loss is measured on
ALONE = 16  # prompts that a process asks alone too, a pass through the model for every token of their answers
GPU_TOKENS = 65_536  # that a GPU is given at once
EXAMPLES = 3  # questions and answers of a cell that the report shows
SUITES = ("needles", "text", "lm-eval")


@dataclass(frozen=True)
class Settings:
    """
    What is measured, and how.

    Attributes:
        suites: of `SUITES`.
        tasks: of RULER's, keys of `data.ruler.TASKS`.
        lengths: tokens of a prompt with its answer, and of a window of text.
        prompts: of each task at each length.
        depths: see `data.ruler.make_prompts`.
        new_tokens: that a model may answer with; by default as many as RULER gives for the task.
        text_tokens: that the loss is measured on at each length, in each domain: two windows at the least.
        batch_tokens: of prompts that are answered, or windows that are read, together; by default `GPU_TOKENS` on a
            GPU, more of prompts, and 4,096 elsewhere.
        harness_tasks: of lm-eval, or names of `harness.GROUPS`.
        harness_limit: questions that are asked of each of them; by default all.
    """

    suites: Sequence[str] = ("needles", "text")
    tasks: Sequence[str] = NEEDLES
    lengths: Sequence[int] = (1024, 2048, 4096)
    prompts: int = 20
    depths: int = 0
    new_tokens: int | None = None
    text_tokens: int = 16_384
    batch_tokens: int | None = None
    harness_tasks: Sequence[str] = ("offline",)
    harness_limit: int | None = None

    def __post_init__(self):
        for what, given, known in (("suite", self.suites, SUITES), ("task", self.tasks, TASKS)):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"{what} {unknown[0]}: there is no such one, only {', '.join(known)}")
        if min(self.lengths, default=1) < 1:
            raise ValueError(f"lengths: {min(self.lengths)}, expected tokens of a prompt")

    def identity(self) -> dict:
        """What decides the numbers of a cell, beside the model, the text and the cell's own name."""
        names = ("prompts", "depths", "new_tokens", "text_tokens", "harness_limit")
        return {name: getattr(self, name) for name in names}


def text_needed(lengths: Sequence[int], text_tokens: int) -> int:
    """Tokens of text that an evaluation at these lengths reads; `text_tokens` as in `Settings`."""
    return max(text_tokens, LEAST_WINDOWS * max(lengths)) + 1


def evaluate(
    models: Sequence[Model],
    settings: Settings,
    texts: Mapping[str, Sequence[int]],
    output: Path,
    made_from: Mapping,
    heads: Mapping | None = None,
) -> None:
    """
    Measure models side by side, and write the report into a folder (`evaluation/report.py`).

    Interrupted, the same call goes on; with further models, tasks or lengths it measures those. A cell that cannot be
    measured, because the text, the model or the memory is too small for it, says why, and is tried again next time.

    Args:
        models: the first is the reference of all comparisons.
        texts: by domain, text that no model was trained on, in tokens of the reference's tokenizer. Needles are hidden
            in all of it.
        made_from: what else the report is to say of itself, such as the name of the text.
        heads: what is known of a student's heads, see `evaluation/report.py`; by default what it knows already.

    Raises:
        ValueError: the folder holds a report made otherwise, or a length has no room for the prompts of a task; one
            line, before anything is measured.
    """
    if "needles" in settings.suites and settings.lengths:
        check_lengths(models[0].tokenizer(), settings.tasks, settings.lengths)
    if "lm-eval" in settings.suites:
        harness.check_installed()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("lm-eval runs in one process: leave it out of the suites, or start it without accelerate")
    use_tuned_kernels()
    # Without this, Accelerate starts processes on a machine without a GPU that know nothing of each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    made = {**made_from, **settings.identity()}
    cells = Cells(output, made, models)
    run = _Run(models, settings, texts, cells, state)
    if "text" in settings.suites:  # the quickest first: what is cut off has it
        run.text()
    if "needles" in settings.suites:
        run.needles()
    if "lm-eval" in settings.suites:
        run.harness()
    known = (cells.report or {}).get("heads")
    heads = known if heads is None else dict(heads)
    if state.is_main_process and (cells.news or cells.report is None or heads != known):
        hides = "needles" in settings.suites
        held = len(run.haystack.ids) if hides else (cells.report or {}).get("haystack_tokens", 0)
        write_report(build_report(made | {"haystack_tokens": held} | environment(), cells.all(), heads), output)
        cells.remove()
    state.wait_for_everyone()


@dataclass
class _Run:
    models: Sequence[Model]
    settings: Settings
    texts: Mapping[str, Sequence[int]]
    cells: Cells
    state: PartialState  # the processes of this run: one, unless Accelerate launched several

    @cached_property
    def tokenizer(self):
        """The reference's, which all prompts are written with."""
        return self.models[0].tokenizer()

    @cached_property
    def haystack(self) -> Haystack:
        return Haystack(self.tokenizer, torch.cat([torch.as_tensor(ids) for ids in self.texts.values()]).numpy())

    def needles(self) -> None:
        settings = self.settings
        names = [(task, length) for length in settings.lengths for task in settings.tasks]
        for model in self.models:
            if todo := self.todo("needles", model, names):
                self._needles_of(model, todo)

    def _needles_of(self, model: Model, todo: Sequence[tuple]) -> None:
        settings, loaded, tokenizer = self.settings, self.open(model), model.tokenizer()
        total = sum(length for _, length in todo) * settings.prompts
        with progress(f"{model.label}: tokens of prompts", total, active=self.state.is_main_process) as advance:
            for task, length in todo:
                cell = _NeedleCell(self, model, loaded, tokenizer, task, length, advance)
                self.measure("needles", {"model": model.label, "task": task, "length": length}, cell)
        shortest = min(settings.lengths)
        is_batched = self.prompt_tokens >= 2 * shortest  # else nothing is answered beside anything
        if is_batched and loaded.dtype != torch.float32 and self.todo("batching", model, [()]):
            cell = _BatchingCell(self, model, loaded, tokenizer, settings.tasks[0], shortest, lambda count: None)
            self.measure("batching", {"model": model.label}, cell)

    def text(self) -> None:
        first, reference = self.models[0], None
        names = [(domain, length) for domain in self.texts for length in self.settings.lengths]
        for model in self.models:
            todo = self.todo("text", model, names)
            if not todo or model.template:  # which asks the same weights another way
                continue
            comparable = same_vocabulary(model.tokenizer(), self.tokenizer)
            if reference is None and (model is first or comparable):
                reference = self.open(first)
            self._text_of(model, todo, reference if comparable else None)

    def _text_of(self, model: Model, todo: Sequence[tuple], reference: PreTrainedModel | None) -> None:
        """Args: reference: the first model, where its vocabulary is this one's."""
        is_first, tokenizer = model is self.models[0], model.tokenizer()
        loaded = reference if is_first else self.open(model)
        total = sum(max(self.settings.text_tokens, LEAST_WINDOWS * length) for _, length in todo)
        with progress(f"{model.label}: tokens of text", total, active=self.state.is_main_process) as advance:
            for domain, length in todo:
                ids = self.texts[domain]
                if reference is None:
                    ids = tokenizer(self.tokenizer.decode(ids), add_special_tokens=False, verbose=False).input_ids
                cell = _TextCell(self, loaded, tokenizer, None if is_first else reference, ids, length, advance)
                self.measure("text", {"model": model.label, "domain": domain, "length": length}, cell)

    def harness(self) -> None:
        lengths = self.settings.lengths
        names = [
            (task, length)
            for task in harness.expand(self.settings.harness_tasks)
            for length in (lengths if harness.has_lengths(task) else [None])
        ]
        for model in self.models:
            if todo := self.todo("lm_eval", model, names):
                self._harness_of(model, todo)

    def _harness_of(self, model: Model, todo: Sequence[tuple]) -> None:
        loaded, tokenizer = self.open(model), model.tokenizer()
        with progress(f"{model.label}: tasks of lm-eval", len(todo)) as advance:
            for task, length in todo:
                cell = _HarnessCell(self, model, loaded, tokenizer, task, length)
                self.measure("lm_eval", {"model": model.label, "task": task, "length": length}, cell)
                advance()

    def todo(self, kind: str, model: Model, names: Sequence[tuple]) -> list[tuple]:
        """Those of a model's cells that are not measured yet, as the first process sees it."""
        found = [[name for name in names if not self.cells.is_done(kind, model.label, *name)]]
        return broadcast_object_list(found)[0]

    @property
    def batch_tokens(self) -> int:
        """Tokens of prompts that are answered, and of windows that are read, together."""
        return self.settings.batch_tokens or (GPU_TOKENS if torch.cuda.is_available() else 4096)

    @property
    def prompt_tokens(self) -> int:
        """
        Tokens of prompts that are answered together: answers are written token by token, so that few large batches
        take a fraction of the time of many. What does not fit is divided (`needles.answer`).
        """
        on_gpu = self.settings.batch_tokens is None and torch.cuda.is_available()
        return 4 * GPU_TOKENS if on_gpu else self.batch_tokens

    def open(self, model: Model) -> PreTrainedModel:
        """A model on this process's device; what the report says of it is kept."""
        gc.collect()  # the one before it leaves the GPU first
        loaded = model.load(self.state.device if self.state.num_processes > 1 else None)
        if self.state.is_main_process and not self.cells.is_done("models", model.label):
            self.cells.keep("models", {"label": model.label, **model.identity(), **facts(loaded)})
        return loaded

    def share(self, items: Sequence) -> list:
        """This process's part of what all have to do."""
        return list(items)[self.state.process_index :: self.state.num_processes]

    def measure(self, kind: str, names: dict, cell) -> None:
        """
        Have every process do its share of a cell, and keep what comes out, be it why nothing does.

        Args:
            cell: `do()` gives the results of this process's share, each after its place; `finish` makes the cell's
                values of all results in order.
        """
        started = time.monotonic()
        try:
            part = cell.do()
        except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
            full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if isinstance(error, RuntimeError) and not full:
                raise
            part = "out of memory" if full else str(error).strip().splitlines()[0]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        parts = gather_object([part])
        if not self.state.is_main_process:
            return
        seconds = time.monotonic() - started
        errors = [part for part in parts if isinstance(part, str)]
        if errors:
            values = {"error": errors[0]}
        else:
            results = [result for _, result in sorted(pair for part in parts for pair in part)]
            values = cell.finish(results) | {"seconds": round(seconds, 3)}
        self.cells.keep(kind, names | values)


@dataclass
class _NeedleCell:
    run: _Run
    model: Model
    loaded: PreTrainedModel
    tokenizer: object
    task: str
    length: int
    advance: Callable

    @cached_property
    def prompts(self) -> list[Prompt]:
        settings, haystack = self.run.settings, self.run.haystack
        return make_prompts(haystack, self.task, self.length, settings.prompts, FIRST_SEED, settings.depths)

    def answers(self, places: Sequence[int], batch_tokens: int) -> list[str]:
        new_tokens = self.run.settings.new_tokens or TASKS[self.task].new_tokens
        asked = [self.prompts[place] for place in places]
        prompts = as_asked(asked, self.run.tokenizer, self.tokenizer, self.model.template)
        on_answers = partial(self._on_answers, self.run.state.num_processes * self.length)
        return answer(self.loaded, self.tokenizer, prompts, new_tokens, batch_tokens, on_answers)

    def _on_answers(self, tokens: int, count: int) -> None:
        self.advance(count * tokens)

    def do(self) -> list[tuple[int, str]]:
        places = self.run.share(range(len(self.prompts)))
        return list(zip(places, self.answers(places, self.run.prompt_tokens)))

    def finish(self, answers: list[str]) -> dict:
        scores = [score(answer, prompt.answers) for answer, prompt in zip(answers, self.prompts)]
        accuracy = sum(scores) / len(scores)
        low, high = wilson_interval(accuracy, len(scores))
        examples = [
            {"question": prompt.question.strip(), "expected": prompt.answers, "answer": answer, "score": found}
            for prompt, answer, found in list(zip(self.prompts, answers, scores))[:EXAMPLES]
        ]
        depths = [prompt.depth if prompt.depth is None else round(prompt.depth, 4) for prompt in self.prompts]
        return {
            "prompts": len(scores),
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "scores": scores,
            "depths": depths,
            "examples": examples,
        }


@dataclass
class _HarnessCell:
    run: _Run
    model: Model
    loaded: PreTrainedModel
    tokenizer: object
    task: str
    length: int | None

    def do(self) -> list[tuple[int, dict]]:
        settings = self.run.settings
        limits = (self.length, settings.harness_limit, self.run.batch_tokens)
        return [(0, harness.run_task(self.loaded, self.tokenizer, self.task, *limits, self.model.template))]

    def finish(self, results: list[dict]) -> dict:
        return results[0]


class _BatchingCell(_NeedleCell):
    """Whether answers depend on what is answered beside them: all at once, and one by one from the last."""

    def do(self) -> list[tuple[int, bool]]:
        places = self.run.share(range(min(ALONE * self.run.state.num_processes, len(self.prompts))))
        together = self.answers(places, self.length * len(places))
        alone = self.answers(places[::-1], 1)[::-1]
        return [(place, one != other) for place, one, other in zip(places, together, alone)]

    def finish(self, changed: list[bool]) -> dict:
        asked = {"task": self.task, "length": self.length, "prompts": len(changed)}
        return asked | {"changed": sum(changed) / len(changed)}


@dataclass
class _TextCell:
    run: _Run
    loaded: PreTrainedModel
    tokenizer: object
    reference: PreTrainedModel | None
    ids: Sequence[int]
    length: int
    advance: Callable

    @cached_property
    def windows(self) -> range:
        wanted = max(LEAST_WINDOWS, self.run.settings.text_tokens // self.length)
        return range(min(wanted, count_windows(self.ids, self.length)))

    def do(self) -> list[tuple[int, Window]]:
        places, found = self.run.share(self.windows), []
        together = self.run.batch_tokens
        for window in read_windows(self.loaded, self.ids, self.length, places, self.reference, together):
            found.append(window)
            self.advance(self.length * self.run.state.num_processes)
        return list(zip(places, found))

    def finish(self, windows: list[Window]) -> dict:
        count, tokens = len(windows), len(windows) * self.length
        buckets = position_buckets(self.length)
        sums = [sum(losses) for losses in zip(*(window.losses for window in windows))]
        values = {
            "tokens": tokens,
            "bytes": len(self.tokenizer.decode(self.ids[:tokens]).encode()),
            "loss": sum(sums) / tokens,
            "by_position": [[start, end, total / (end - start) / count] for (start, end), total in zip(buckets, sums)],
            "window_losses": [sum(window.losses) / self.length for window in windows],
        }
        if self.reference is not None:
            values |= {
                "kl": sum(window.kl for window in windows) / tokens,
                "agreement": sum(window.agreed for window in windows) / tokens,
            }
        return values
