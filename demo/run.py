"""The main job, small enough to watch: align heads, score, select, convert, distil, evaluate, save, reload, answer."""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..configuration_hydrahead import HydraHeadConfig
from ..convert.calibration import calibrated_forms
from ..convert.forms import Forms, HeadForms, save_forms
from ..convert.migration import convert_model
from ..convert.options import options_of, student_config, teacher_config
from ..convert.scoring.measure import score_heads
from ..convert.scoring.probes import check_length, niah_probe
from ..convert.scoring.scores import HeadScores
from ..convert.selection import select_heads, selection_cost
from ..convert.teachers import EMBEDDED_TEACHER, open_teacher, public_name
from ..data.corpus import encode_corpus, load_corpus
from ..data.mixture import mixture_rows
from ..data.needles import NiahSample, make_niah, needle_text
from ..evaluation.figures import plot_accuracy_over_length, plot_head_map
from ..evaluation.needles import evaluate_niah
from ..evaluation.text import text_loss
from ..files import atomic_file, read_utf8
from ..hub.card import model_card
from ..hub.checkpoint import answer_in_clean_process, save_checkpoint
from ..kernels import use_tuned_kernels
from ..modeling_hydrahead import HydraHeadForCausalLM
from ..provenance import environment
from ..training.align import align_heads
from ..training.distill import distill
from ..training.loop import Schedule

FACTORS = (1, 2, 4, 8)  # evaluated lengths, in multiples of the working length
TASKS = {"single_key": 1, "four_keys": 4}
TEXT_ROWS = 4  # on which what a head is worth to plain text is measured
SCORE_LENGTH = 512  # tokens of a prompt on which what it is worth to needles is: half of 1x, at half the time
ANSWER_WEIGHT = 6.0  # in distillation; the teacher learnt retrieval with more, the student has to keep the text too


@dataclass(frozen=True)
class DemoSettings:
    """
    What the demo runs on, and how much of it.

    Attributes:
        teacher: Hub id or folder of a teacher.
        text: a UTF-8 text file to train and evaluate on; `None` for the Python standard library.
        length: tokens of a prompt at 1x; `None` for the teacher's native length, but 1,024 at the most.
        ratio, strategy: which share of the query heads stays full attention, and how they are chosen.
        pairs: counterfactual pairs per probe.
        train_length, batch_size: shape of a training batch.
        align_steps, distill_steps: optimiser steps.
        samples: prompts per length and task of the evaluation.
        seed: decides everything random.
    """

    teacher: str = str(EMBEDDED_TEACHER)
    text: Path | None = None
    length: int | None = None
    ratio: float = 0.25
    strategy: str = "global"
    pairs: int = 4
    train_length: int = 512
    batch_size: int = 4
    align_steps: int = 100
    distill_steps: int = 200
    samples: int = 20
    seed: int = 0


def condition(settings: DemoSettings) -> str:
    """What the students of a run have practised, and whether their teacher had: needed to read the results."""
    text = settings.text.name if settings.text else "the Python standard library"
    embedded = Path(settings.teacher).resolve() == EMBEDDED_TEACHER.resolve()
    if embedded and settings.text is None:
        mixture = "the teacher's own training mixture"
    elif embedded:
        mixture = f"the teacher's kind of training mixture, made of {text}, which the teacher did not read"
    else:
        mixture = f"the demo's synthetic mixture, made of {text}, which the teacher never saw"
    return (
        f"Alignment and distillation read {mixture}; three of its rows in four hide needles and ask for them: the "
        "hybrid practises what is evaluated. The evaluation's text and its needles are new to it."
    )


class Demo:
    """One run of the main job. Stages leave files, and a run with the same settings resumes after the last of them."""

    def __init__(self, settings: DemoSettings, folder: Path, console: Console):
        """
        Raises:
            ValueError: a teacher that cannot be converted, a length that has no room for needles, or a text that is
                too short; before weights are read.
        """
        self.settings, self.folder, self.console = settings, folder, console
        opened = open_teacher(settings.teacher)
        adapter, native = opened.adapter, opened.config.max_position_embeddings
        self.length = min(1024, native) if settings.length is None else settings.length
        self.lengths = [self.length * factor for factor in FACTORS]
        self.tokenizer = opened.tokenizer()
        check_length(self.tokenizer, min(self.length, SCORE_LENGTH))
        # Only recurrent outputs are normalised: a full-attention head is then exactly its aligned form.
        self.options = {"fusion_norm": "linear", "logit_scale_base": self.length}
        blank = [[0] * adapter.num_heads] * adapter.num_layers
        self.config = student_config(adapter, blank, **self.options)
        self.teacher_config = teacher_config(adapter)

        opened.fetch()
        self.train_ids, self.heldout_ids = self._read_text()
        if len(self.heldout_ids) <= self.lengths[-1]:
            raise ValueError(
                f"the held-out text has {len(self.heldout_ids):,} tokens, prompts of {self.lengths[-1]:,} need more: "
                "give a longer text or a smaller length"
            )
        self.teacher = opened.load(torch.float32, Accelerator().device)
        use_tuned_kernels()
        self.progress = Progress(
            TextColumn("{task.description:<30}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )

    def _read_text(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids to train on and token ids held out."""
        if self.settings.text is None:
            train, heldout = (encode_corpus(self.tokenizer, load_corpus(split)) for split in ("train", "heldout"))
            return train, heldout
        ids = encode_corpus(self.tokenizer, [read_utf8(self.settings.text)])
        cut = int(len(ids) * 0.9)
        return ids[:cut], ids[cut:]

    def run(self) -> dict:
        """All stages; gives the report that they end in."""
        started = time.perf_counter()
        self.console.print(f"[bold]HydraHead[/bold]  teacher {self.teacher_name}, {self.length:,} tokens at 1x")
        self.console.print(f"[dim]{escape(condition(self.settings))}[/dim]\n")
        self._forget_other_settings()
        with self.progress if self.console.is_terminal else contextlib.nullcontext():
            forms = self.align()
            scores = self.score(forms)
            masks = select_heads(scores, self.settings.ratio, self.settings.strategy)
            student = self.distill(masks, forms)
            results = {
                "teacher": self.evaluate("teacher", self.teacher, self.teacher_config),
                "hybrid": self.evaluate("hybrid", student, student.config),
            }
        report = self.report(scores, masks, results)
        self.save(student, scores, report)
        report["reloaded"] = self.reload()
        report["seconds"] = round(time.perf_counter() - started, 1)
        with atomic_file(self.folder / "report.json") as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n")
        self.draw(scores, report)
        self.show(report)
        return report

    @property
    def teacher_name(self) -> str:
        return "embedded" if self.settings.teacher == str(EMBEDDED_TEACHER) else public_name(self.settings.teacher)

    def _forget_other_settings(self) -> None:
        """Leave no file of a run with other settings for this one to resume from."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record, settings = (
            self.folder / "settings.json",
            json.dumps(asdict(self.settings), default=str, indent=2) + "\n",
        )
        if not record.is_file() or record.read_text() != settings:
            for name in ("head_scores.json", "head_forms.safetensors", "distilled.safetensors", "metrics.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            with atomic_file(record) as partial:
                partial.write_text(settings)

    def _stage(self, name: str, total: int) -> Callable[..., None]:
        """
        A progress bar; call what is returned after each of `total` steps, with a note if there is one.

        Where the output is no terminal, ten lines stand for the bar.
        """
        task = self.progress.add_task(name, total=total, note="")
        done = 0

        def advance(note: str = "") -> None:
            nonlocal done
            done += 1
            self.progress.update(task, advance=1, note=note)
            if not self.console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                self.console.print(f"{name}  {done}/{total}  {note}", highlight=False)

        return advance

    def _batch_at(self, stage: int) -> Callable[[int], list[torch.Tensor]]:
        """The training batch of a step: ids and weights `[batch_size, train_length]` of the mixture."""
        settings = self.settings

        def batch_at(step: int) -> list[torch.Tensor]:
            seed = [settings.seed, stage, step]
            rows = mixture_rows(self.tokenizer, self.train_ids, settings.train_length, settings.batch_size, seed)
            return [torch.from_numpy(array) for array in rows]

        return batch_at

    def score(self, forms: Forms) -> HeadScores:
        """What a full-attention slot is worth to each head: for needles with one and with four keys, and for text."""
        file, settings = self.folder / "head_scores.json", self.settings
        if file.is_file():
            return HeadScores.load(file)
        starts = np.linspace(0, len(self.train_ids) - settings.train_length, TEXT_ROWS, dtype=int)
        rows = [self.train_ids[start : start + settings.train_length].tolist() for start in starts]
        advance = self._stage("replace heads one by one", 2 * len(TASKS) * settings.pairs + len(rows))
        probes = [
            niah_probe(
                self.tokenizer,
                self.train_ids,
                min(self.length, SCORE_LENGTH),
                num_keys=keys,
                num_pairs=settings.pairs,
                seed=settings.seed,
            )
            for keys in TASKS.values()
        ]
        scores = score_heads(
            self.teacher,
            self.tokenizer,
            probes,
            on_pair=advance,
            head_forms=HeadForms(self.config, forms).requires_grad_(False),
            text_rows=rows,
            seed=settings.seed,
        )
        scores.save(file)
        return scores

    def align(self) -> Forms:
        """Both forms of every head, fitted one by one to the teacher's."""
        file, settings = self.folder / "head_forms.safetensors", self.settings
        if file.is_file():
            return load_file(file)
        advance = self._stage("align heads before W_o", settings.align_steps)
        set_seed(settings.seed)
        forms = align_heads(
            Accelerator(),
            self.teacher,
            self.config,
            calibrated_forms(self.teacher, self._batch_at(0)(0)[0], self.config),
            self._batch_at(1),
            Schedule(settings.align_steps, learning_rate=6e-3, final_learning_rate=6e-5),
            metrics_file=self.folder / "metrics.jsonl",
            on_step=lambda _, m: advance(f"error: linear {m['linear_loss']:.3f}, full {m['full_loss']:.3f}"),
        )
        save_forms(forms, options_of(self.config), file)
        return forms

    def distill(self, masks: list[list[int]], forms: Forms) -> HydraHeadForCausalLM:
        """The student, converted from the aligned heads and trained as a whole on the teacher's logits."""
        file, settings = self.folder / "distilled.safetensors", self.settings
        student = convert_model(self.teacher, masks, head_forms=forms, **self.options)
        if file.is_file():
            student.load_state_dict(load_file(file), strict=False)
            return student.to(self.teacher.device)
        advance = self._stage("distil the hybrid", settings.distill_steps)
        set_seed(settings.seed)
        mixture = self._batch_at(2)

        def batch_at(step: int) -> list[torch.Tensor]:
            token_ids, weights = mixture(step)
            return [token_ids, weights.clamp_max(ANSWER_WEIGHT)]

        student = distill(
            Accelerator(),
            self.teacher,
            student,
            batch_at,
            Schedule(settings.distill_steps, learning_rate=6e-4, final_learning_rate=3e-5),
            metrics_file=self.folder / "metrics.jsonl",
            on_step=lambda _, m: advance(f"KL {m['kl']:.3f}, CE {m['ce']:.3f}"),
        )
        state = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith("lm_head")}
        with atomic_file(file) as partial:
            save_file(state, partial)
        return student

    def prompts(self, length: int, num_keys: int) -> list[NiahSample]:
        """The evaluation's prompts, hidden in held-out text."""
        return [
            make_niah(self.tokenizer, self.heldout_ids, length, num_keys=num_keys, seed=1_000_000 + index)
            for index in range(self.settings.samples)
        ]

    def evaluate(self, name: str, model: PreTrainedModel, config: HydraHeadConfig) -> dict[str, list[float]]:
        """Accuracy by generation, loss on held-out text in nats, and bf16 cache bytes, at each length."""
        advance = self._stage(f"evaluate the {name}", (len(TASKS) + 1) * len(self.lengths))
        result: dict[str, list[float]] = {name: [] for name in (*TASKS, "text_loss", "cache_bytes")}
        for length in self.lengths:
            batch_size = max(1, 4 * self.length // length)
            for task, num_keys in TASKS.items():
                prompts = self.prompts(length, num_keys)
                found = evaluate_niah(model, prompts, self.tokenizer, batch_size=batch_size, max_new_tokens=16)
                result[task].append(found["exact"])
                advance(f"{length:,} tokens, {task.replace('_', ' ')}: {found['exact']:.2f}")
            result["text_loss"].append(
                text_loss(model, self.heldout_ids, length, windows=max(2, 16 * self.length // length))
            )
            result["cache_bytes"].append(config.kv_bytes_per_token() * length + config.state_bytes())
            advance()
        return result

    def report(self, scores: HeadScores, masks: list[list[int]], results: dict) -> dict:
        """Everything that was set and measured."""
        text = self.settings.text.name if self.settings.text else "Python standard library"
        settings = asdict(self.settings) | {"teacher": self.teacher_name, "text": text}
        cost = selection_cost(scores, masks)
        return {
            "condition": condition(self.settings),
            "settings": settings,
            "options": self.options,
            "head_masks": masks,
            "decided_by_tie_break": cost.decided_by_tie_break,
            "without_evidence": cost.without_evidence,
            "full_attention_share": sum(map(sum, masks)) / sum(map(len, masks)),
            "pairs": {probe.name: {"used": probe.used, "dropped": probe.dropped} for probe in scores.probes},
            "lengths": self.lengths,
            "results": results,
            **environment(),
        }

    def save(self, student: HydraHeadForCausalLM, scores: HeadScores, report: dict) -> None:
        """The Hub-ready folder `hybrid`."""
        training_tokens = self.settings.train_length * self.settings.batch_size
        said = {
            "heads chosen by": _choice(report),
            "trained": f"{self.settings.align_steps * training_tokens:,} tokens of alignment, "
            f"{self.settings.distill_steps * training_tokens:,} of distillation, rows of {self.settings.train_length}",
            "condition": report["condition"],
        }
        stages = [{"stage": name, "summary": words} for name, words in said.items()]
        made_from = {"teacher": self.teacher_name, "revision": None, "masks": {}, "forms": {}, "stages": stages}
        card = model_card(student.config, made_from, _markdown(report))
        files = {
            "README.md": card,
            "head_scores.json": asdict(scores),
            "head_masks.json": report["head_masks"],
            "evaluation.json": report,
        }
        save_checkpoint(student, self.tokenizer, self.folder / "hybrid", files, overwrite=True)

    def reload(self) -> dict[str, str]:
        """Ask the saved folder, in a process without hydrahead, for a needle; gives prompt, answer and expectation."""
        sample = make_niah(self.tokenizer, self.heldout_ids, self.length, seed=2_000_000)
        prompt = self.tokenizer.decode(sample.input_ids)
        answer = answer_in_clean_process(self.folder / "hybrid", prompt)
        needle = needle_text(sample.keys[0], sample.values[0])
        return {
            "needle": needle,
            "question": prompt[prompt.index("What is the special") :],
            "answer": answer.strip(),
            "expected": sample.answers[0],
        }

    def draw(self, scores: HeadScores, report: dict) -> None:
        """The pictures."""
        without = report["without_evidence"]
        title = f"replacement effect of each head, {sum(map(sum, report['head_masks']))} kept"
        title += f", {without} of them without evidence" if without else ""
        plot_head_map(scores.scores, report["head_masks"], title, self.folder / "head_map.png")
        accuracies = {
            name: {task.replace("_", " "): report["results"][name][task] for task in TASKS}
            for name in report["results"]
        }
        plot_accuracy_over_length(
            self.lengths,
            accuracies,
            self.length,
            self.settings.samples,
            f"Needles found by generation, {self.settings.samples} prompts a point, 95% intervals",
            self.folder / "accuracy.png",
        )

    def show(self, report: dict) -> None:
        """The needle prompt as answered after reloading, the table, and where everything is."""
        reloaded = report["reloaded"]
        found = "[green]right" if reloaded["expected"] in reloaded["answer"] else "[red]wrong"
        self.console.print(
            Panel(
                f"[dim]… {self.length:,} tokens of text with, somewhere in it:[/dim]\n{reloaded['needle']}\n"
                f"[dim]…[/dim]\n{reloaded['question']} [bold]{reloaded['answer']}[/bold]   {found}[/]",
                title="reloaded in a fresh process without hydrahead, trust_remote_code=True",
            )
        )
        table = Table(title="teacher | hybrid")
        for column in ("tokens", "single key", "four keys", "loss on held-out text", "cache, KB"):
            table.add_column(column, justify="right")
        for row in _rows(report):
            table.add_row(*row)
        self.console.print(table)
        masks = report["head_masks"]
        self.console.print(
            f"{sum(map(sum, masks))} of {sum(map(len, masks))} heads are full attention: {_choice(report)}.\n"
            f"{report['seconds']:.0f} s. In {self.folder}: hybrid/ (the checkpoint), report.json, head_map.png, "
            "accuracy.png, metrics.jsonl"
        )


def _choice(report: dict) -> str:
    """How the heads were chosen, in words."""
    ties, without = report["decided_by_tie_break"], report["without_evidence"]
    return (
        "kept by replacement effect"
        + (f", {ties} of them by tie-break" if ties else "")
        + (f"; {without} of them without evidence (score 0 or less), to fill the budget" if without else "")
    )


def _rows(report: dict) -> list[list[str]]:
    """The table: for each length, `teacher | hybrid` of everything measured."""
    formats = {"single_key": "{:.2f}", "four_keys": "{:.2f}", "text_loss": "{:.3f}"}
    rows = []
    for index, length in enumerate(report["lengths"]):
        cells = [
            " | ".join(template.format(report["results"][name][key][index]) for name in ("teacher", "hybrid"))
            for key, template in formats.items()
        ]
        cache = " | ".join(
            f"{report['results'][name]['cache_bytes'][index] / 1024:,.0f}" for name in report["results"]
        )
        rows.append([f"{length:,}", *cells, cache])
    return rows


def _markdown(report: dict) -> str:
    head = ["tokens", "single key", "four keys", "text loss", "cache, KB (bf16)"]
    rows = [head, ["---"] * len(head), *([cell.replace("|", "/") for cell in row] for row in _rows(report))]
    return "Teacher / hybrid.\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)
