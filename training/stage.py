"""Start and end of a stage: what can be wrong is refused first, what was done already is not done again."""

import gc
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, set_seed
from transformers import PreTrainedModel

from ..configuration_hydrahead import HydraHeadConfig
from ..convert.masks import read_masks
from ..convert.migration import conversion_record
from ..convert.options import BRANCHES, fitted_kinds, options_of, student_config
from ..convert.teachers import TeacherAdapter, open_teacher
from ..data.batches import Batch
from ..data.ruler import Haystack, Prompt, make_prompts
from ..data.tokens import is_local
from ..evaluation.figures import draw_training
from ..evaluation.needles import FIRST_SEED, answer, score
from ..evaluation.text import text_loss
from ..files import check_writable, read_json
from ..hub.checkpoint import save_checkpoint
from ..hub.folder import read_made_from
from ..kernels import use_tuned_kernels
from ..loading import check_checkpoint, load_student_config
from ..modeling_hydrahead import HydraHeadForCausalLM
from ..provenance import Record, digest, environment, first_difference
from .checkpoints import Checkpoints
from .data import check_stage_data, prepare_tokenizer, public_source, stage_batches, stage_lengths, tokens_before
from .loop import Run, Schedule
from .recipe import Recipe, StageSection, stage_record

WATCHED = ("niah_single_2", "niah_multikey_1")  # RULER's tasks that training asks now and then
WATCHED_TOKENS = 16  # of an answer: they hold a number in any tokenizer
CLOCKS = ("seconds", "tokens_per_second", "memory_gb")  # of a step: how it was run, not what came out
PATHS = ("student", "head_forms", "teacher_cache")  # keys of a stage that say where things lie


class Stage:
    """A stage of a recipe that has been found possible: configs are read, weights and data are not."""

    def __init__(self, recipe: Recipe, name: str):
        """
        Raises:
            ValueError: lengths, batches, masks, data, trackers or an earlier run do not fit; one line.
        """
        self.recipe, self.name = recipe, name
        self.section: StageSection = recipe.stage(name)
        self.folder = Path(recipe.output) / name
        self.teacher = open_teacher(recipe.teacher.name, recipe.teacher.revision)
        self.adapter: TeacherAdapter = self.teacher.adapter
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        check_stage_data(recipe, name, self.teacher.config.max_position_embeddings, self.processes)
        tracker = recipe.run.report_to
        if tracker and tracker not in (known := [each.value for each in get_available_trackers()]):
            raise ValueError(f"run.report_to: {tracker} is not installed; there is {', '.join(known) or 'none'}")
        if recipe.evaluate.every and recipe.data.heldout_tokens <= self.evaluated_length:
            raise ValueError(
                f"evaluate: {recipe.data.heldout_tokens:,} tokens are held out (data.heldout_tokens), a window of "
                f"{self.evaluated_length:,} needs more"
            )
        self._check_engine()
        self.parts = self._check_earlier_run()

    @property
    def evaluated_length(self) -> int:
        """Tokens of an evaluation's prompts and windows."""
        return self.recipe.evaluate.length or self.section.length

    def _check_engine(self) -> None:
        """What Accelerate was launched with, as it tells its processes."""
        for size in ("CP_SIZE", "SP_SIZE", "TP_SIZE"):
            if int(os.environ.get(f"PARALLELISM_CONFIG_{size}", 1)) > 1:
                raise ValueError(
                    f"parallelism_config {size.lower()}: only data can be parallel; a recurrent state does not travel "
                    "between processes"
                )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise ValueError("DeepSpeed is not supported: launch with FSDP2 (training/recipes/accelerate/fsdp2.yaml)")
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            if os.environ.get("FSDP_VERSION") != "2":
                raise ValueError("fsdp_version: 2 is needed in Accelerate's config")
            if self.recipe.evaluate.every:
                raise ValueError(
                    "evaluate.every: weights sharded by FSDP cannot generate; set it to 0 and evaluate checkpoints"
                )

    def _check_earlier_run(self) -> list[int]:
        """
        Steps of the stage's first run, and of what was added each time that its tokens grew.

        Raises:
            ValueError: a run that is there was begun otherwise, or was to be longer.
        """
        steps, before = self.section.tokens // self.section.batch_tokens, self.earlier.read()
        if before is None:
            return [steps]
        now, then = self.record(), before.get(self.name)
        if not isinstance(then, dict) or not all(isinstance(then.get(key), int) for key in ("tokens", "batch_tokens")):
            raise ValueError(f"{self.earlier.path}: not the record of a stage; remove {self.folder} to begin it anew")
        if self.section.tokens > then["tokens"]:
            now[self.name]["tokens"] = then["tokens"]
        # What is gone by now is taken to be what it was, and a run from before these were recorded for one like this.
        now["starts_from"] = before.get("starts_from", {}) | now["starts_from"]
        unknown = {key: now[key] for key in ("text_begins", "starts_from")}
        if "kinds" in now:
            unknown["kinds"] = now["kinds"]
        advice = f"choose another output, or remove {self.folder} to begin the stage anew"
        Record(self.earlier.path, unknown).check(now, advice)
        parts = before.get("parts") or [then["tokens"] // then["batch_tokens"]]
        return [*parts, steps - sum(parts)] if steps > sum(parts) else parts

    @property
    def earlier(self) -> Record:
        """What decides the numbers of the run that is there."""
        return Record(self.folder / "recipe.json")

    def record(self) -> dict:
        """What decides the stage's numbers, whoever runs it."""
        record = stage_record(self.recipe, self.name) | {"text_begins": tokens_before(self.recipe, self.name)}
        record.pop("masks", None)
        if self.kinds:
            record["kinds"] = self.kinds
        return record | {"starts_from": self.starts_from}

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of forms that alignment by heads fits; a run goes on as it was begun."""
        if self.name != "align" or self.section.mode != "heads":
            return []
        before = self.earlier.read()
        if before is None:
            return list(fitted_kinds(self.config()))
        return before.get("kinds") or list(BRANCHES)  # before these were recorded, all were fitted

    @property
    def sources(self) -> dict[str, Path]:
        """What the stage starts from beside the teacher, by kind: a `student` or `forms`; alignment from neither."""
        if self.name == "align":
            return {}
        if self.name == "finetune" or self.section.student:
            return {"student": Path(self.section.student or Path(self.recipe.output) / "distill" / "student")}
        return {"forms": self.recipe.forms}

    @cached_property
    def starts_from(self) -> dict[str, str]:
        """The start of the SHA-256 of what the stage starts from, and of the masks that it makes heads under."""
        found = {kind: digest(path)[:16] for kind, path in self.sources.items() if path.exists()}
        if "forms" in self.sources or getattr(self.section, "mode", None) == "layers":
            found["masks"] = hashlib.sha256(json.dumps(self.masks).encode()).hexdigest()[:16]
        return found

    @property
    def output(self) -> Path:
        """What the stage leaves: a student folder; of alignment, the forms."""
        return self.folder / ("head_forms.safetensors" if self.name == "align" else "student")

    @property
    def is_done(self) -> bool:
        """Whether the stage has left its output, for so many tokens as the recipe asks for."""
        recipe = (Record(self.folder / "facts.json").read() or {}).get("recipe")
        return self.output.exists() and isinstance(recipe, dict) and recipe.get("tokens") == self.section.tokens

    @cached_property
    def options(self) -> dict:
        """Options of the student that the recipe sets."""
        return {key: value for key, value in asdict(self.recipe.student).items() if value is not None}

    @cached_property
    def masks(self) -> list[list[int]]:
        """
        The recipe's head masks.

        Raises:
            ValueError: there are none.
        """
        masks = self.recipe.masks
        if masks is None:
            raise ValueError(f"masks: missing from the recipe; {self.name} needs them (hydrahead score, select)")
        if isinstance(masks, str):
            if not Path(masks).is_file():
                raise ValueError(f"masks: {masks}: no such file; hydrahead score and select write one")
            return read_masks(Path(masks), self.teacher)
        return masks

    def config(self, masks: list[list[int]] | None = None) -> HydraHeadConfig:
        """Configuration of the student under `masks`; of one whose heads are all linear without."""
        return student_config(self.adapter, masks or self.adapter.blank_masks, **self.options)

    def check_student(self, folder: Path) -> HydraHeadConfig:
        """
        Configuration of a student folder.

        Raises:
            ValueError: there is none, or it is not what the recipe's teacher, masks and options make.
        """
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no student there; the stage before this one writes it")
        config = load_student_config(folder)
        check_checkpoint(folder, config)
        self.teacher.check_made_from(folder, read_made_from(folder) or {})
        for field, value in self.adapter.student_fields().items():
            if field not in ("rope_parameters", "use_cache") and (found := getattr(config, field, None)) != value:
                raise ValueError(f"{folder}: not a student of this teacher: {field} is {found}, the teacher's {value}")
        changed = first_difference(options_of(config), options_of(self.config(config.head_masks)))
        if not changed and self.recipe.masks is not None and self.masks != config.head_masks:
            changed = "choice of heads: leave masks out of the recipe, or give those that it was made under"
        if changed:
            raise ValueError(f"{folder}: not a student of this recipe but one of another {changed}")
        return config

    def made_from(self, config: HydraHeadConfig) -> dict:
        """What the student that the stage starts from was made from, as in `hub.checkpoint.save_checkpoint`."""
        student, forms = map(self.sources.get, ("student", "forms"))
        if student is not None and (found := read_made_from(student)):
            return found
        masks = self.recipe.masks if isinstance(self.recipe.masks, str) else None
        made_from = conversion_record(self.teacher, config, masks and Path(masks), forms)
        # Of what version 0.1 wrote, only this says how it was trained.
        if student is not None and (file := student / "training.json").is_file():
            made_from["stages"] = read_json(file, list)
        elif forms is not None and "stage" not in made_from["forms"]:
            made_from["forms"] |= Record(forms.parent / "facts.json").read() or {}
        return made_from


def open_accelerator(accumulated: int = 1, **options) -> Accelerator:
    """What joins this process with those launched beside it, for steps of `accumulated` micro-batches on each."""
    # Where weights are sharded, gradients are too, after every micro-batch: whole ones would be as large as the model.
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return Accelerator(
        # Without this, Accelerate starts processes on a machine without a GPU that know nothing of each other.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # autocast is ours: FSDP's own policy would round gates and decay to bf16
        gradient_accumulation_plugin=GradientAccumulationPlugin(accumulated, sync_each_batch=is_sharded),
        # Of replicas: gradients lie in the buffers that are averaged, instead of beside them.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        **options,
    )


def open_autocast(accelerator: Accelerator, enabled: bool = True) -> Callable[[], torch.autocast]:
    """Computing in bf16; what it casts of sharded weights is not kept, or all of them would be there after all."""
    cached = not accelerator.is_fsdp2
    return partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled, cache_enabled=cached)


class Job:
    """A stage that is running: its data, its processes, and its way of ending."""

    def __init__(self, stage: Stage):
        recipe, section = stage.recipe, stage.section
        self.stage, self.recipe, self.section, self.folder = stage, recipe, section, stage.folder
        check_writable(stage.folder)
        Checkpoints(stage.folder, recipe.run.keep).check()
        stage.teacher.fetch()
        self.tokenizer = prepare_tokenizer(recipe)
        self.data = stage_batches(recipe, stage.name, self.tokenizer, stage.parts)
        self.prompts = self.make_prompts() if stage.name != "align" else {}
        self.accelerator = open_accelerator(
            section.batch_tokens // recipe.run.micro_batch_tokens // stage.processes,
            log_with=recipe.run.report_to,
            project_dir=str(stage.folder),
        )
        if self.accelerator.num_processes != stage.processes:
            raise ValueError(
                f"{stage.processes} processes were launched, Accelerate joined {self.accelerator.num_processes}: "
                "check distributed_type in its config"
            )
        use_tuned_kernels()
        set_seed(recipe.run.seed)
        if self.accelerator.is_main_process:
            stage.earlier.write(stage.record() | {"parts": stage.parts})
        if recipe.run.report_to:
            self.accelerator.init_trackers(stage.name)
        self.autocast = open_autocast(self.accelerator, recipe.run.mixed_precision == "bf16")

    def load_teacher(self) -> PreTrainedModel:
        """The teacher in the recipe's dtype, without gradients, on this process's device."""
        return self.stage.teacher.load(self.recipe.teacher.dtype, self.accelerator.device)

    def micro_batches(self, step: int) -> list[Batch]:
        """What this process accumulates in a step."""
        return self.data.micro_batches(step, self.accelerator.process_index, self.accelerator.num_processes)

    def schedule(self) -> Schedule:
        section = self.section
        steps = section.tokens // section.batch_tokens
        return Schedule(steps, section.learning_rate, section.final_learning_rate, section.warmup_steps)

    def run(self, evaluate: Callable[[], dict[str, float]]) -> Run:
        """How the loop keeps itself and is watched; `evaluate` is the stage's own."""
        run, every = self.recipe.run, self.recipe.evaluate.every
        return Run(self.folder, run.save_every, run.keep, run.spike_factor, self.stage.name, evaluate, every)

    def make_prompts(self) -> dict[str, list[Prompt]]:
        """Needles in held-out text: made before training, so that what cannot be made is known at once."""
        settings, haystack = self.recipe.evaluate, Haystack(self.tokenizer, self.data.heldout)
        count = max(1, settings.niah_prompts // 2) if settings.every and settings.niah_prompts else 0
        length = self.stage.evaluated_length
        return {task: make_prompts(haystack, task, length, count, FIRST_SEED) for task in WATCHED if count}

    def evaluate_student(self, student: HydraHeadForCausalLM) -> dict[str, float]:
        """Loss on held-out text, and shares of needles found by generation with one and with four keys."""
        student.eval()
        length, windows = self.stage.evaluated_length, self.recipe.evaluate.text_windows
        text, together = self.data.heldout.astype("int64"), self.recipe.run.micro_batch_tokens
        with self.autocast():
            result = {"heldout_loss": text_loss(student, text, length, windows, together)}
            for task, prompts in self.prompts.items():
                ids = [prompt.input_ids for prompt in prompts]
                answers = answer(student, self.tokenizer, ids, WATCHED_TOKENS, max(together, 4 * length))
                found = [score(said, prompt.answers) for said, prompt in zip(answers, prompts)]
                result[task] = sum(found) / len(found)
        return result

    def save_student(self, student: HydraHeadForCausalLM, made_from: dict) -> None:
        """The student as a folder for the Hub, in the recipe's dtype, with what it was made from and trained on."""
        dtype = getattr(torch, self.recipe.run.save_dtype)
        for name, parameter in student.named_parameters():
            if not any(part in name for part in student._keep_in_fp32_modules_strict):
                parameter.data = parameter.data.to(dtype)
        student.config.dtype = dtype
        made_from = made_from | {"stages": [*made_from["stages"], self.facts()]} | environment()
        save_checkpoint(student, self.tokenizer, self.stage.output, made_from, overwrite=True)

    def facts(self) -> dict:
        """What this stage trained on, in numbers and in words."""
        recipe, section = self.recipe, self.section
        lengths = " and ".join(f"{length:,}" for length in stage_lengths(section))
        parts = [f"{section.tokens:,} tokens", f"rows of {lengths}", public_source(recipe.data.name)]
        if section.retrieval_share:
            parts.append(f"{section.retrieval_share:.0%} of rows from a mixture with synthetic retrieval")
        if section.long_share:
            parts.append(
                f"{section.long_share:.0%} of rows from long documents ({public_source(recipe.long_data.name)})"
            )
        return {
            "stage": self.stage.name,
            "summary": ", ".join(parts),
            **self.stage.teacher.identity,
            "teacher_dtype": recipe.teacher.dtype,
            "text": public_source(recipe.data.name),
            "datasets": sorted(self.datasets()),
            "steps": section.tokens // section.batch_tokens,
            "mixed_precision": recipe.run.mixed_precision,
            "seed": recipe.run.seed,
            "recipe": {key: value for key, value in asdict(section).items() if key not in PATHS},
            **self.measured(),
            **environment(self.accelerator.device.type),
        }

    def datasets(self) -> set[str]:
        """The data sets on the Hub that the stage's rows come from."""
        names = {self.recipe.data.name, *([self.recipe.long_data.name] if self.section.long_share else [])}
        return {name for name in names if name != "demo" and not is_local(name)}

    def measured(self) -> dict:
        """What the run recorded: how long its steps took, on how many devices, and the numbers of the last one."""
        file = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        last = {name: value for name, value in lines[-1].items() if isinstance(value, float)} if lines else {}
        return {
            "seconds": round(sum(line["seconds"] for line in lines), 1),
            "processes": self.stage.processes,
            "device": self.accelerator.device.type,
            "metrics": {name: value for name, value in last.items() if name not in CLOCKS},
        }

    def end(self, save: Callable[[], None]) -> None:
        """Save the output, draw the run and say that it is done, on the main process; leave the others."""
        # Replicas go before their process group: the last to hold it waits for a thread that waits for Python.
        self.accelerator.free_memory()
        gc.collect()
        if self.accelerator.is_main_process:
            save()
            draw_training(self.folder)
            Record(self.folder / "facts.json").write(self.facts())  # last: it says that the stage is done
            print(f"written to {self.stage.output}")
        self.accelerator.end_training()
