"""Stage 2: train the whole student on the teacher's logits and on the text (docs/method.md §3).

    accelerate launch -m hydrahead.training.distill --config demo
    accelerate launch -m hydrahead.training.distill --config RECIPE.yaml distill.temperature=2 distill.lora.r=16

Starts from the teacher, the recipe's masks and the aligned heads, or from a student folder (`distill.student`). Writes
`OUTPUT/distill/student`, a folder for the Hub.
"""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..console import one_line_errors
from ..convert.forms import check_forms
from ..convert.migration import convert_model
from ..convert.options import options_of
from ..data.batches import Batch
from ..modeling_hydrahead import HydraHeadForCausalLM
from .losses import TeacherChunk, teacher_chunks
from .plan import print_cost
from .recipe import Recipe, read_arguments
from .stage import Job, Stage
from .student import check_adapters, train_and_save
from .teacher_cache import TeacherCache

WEIGHTS = ("kl_weight", "ce_weight", "temperature")  # of the loss, in the recipe


@torch.no_grad()
def read_teacher(teacher: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> TeacherChunk:
    """A teacher's view of a batch: its final hidden states now, its logits in chunks when the loss asks for them."""
    states = teacher.model(batch.token_ids[:, :-1], position_ids=batch.position_ids, use_cache=False).last_hidden_state
    return teacher_chunks(states.flatten(0, 1), teacher.lm_head.weight, temperature)


def compiled_layers(teacher: PreTrainedModel) -> PreTrainedModel:
    """A teacher whose layers run compiled on a GPU: all are alike, so that one is compiled for each length of rows."""
    if teacher.device.type == "cuda":
        for layer in teacher.model.layers:
            layer.compile(dynamic=False)
    return teacher


def run_distill(recipe: Recipe, dry_run: bool = False) -> None:
    """The whole stage, from a recipe to a student folder; nothing where that is there already."""
    stage = Stage(recipe, "distill")
    student, forms = map(stage.sources.get, ("student", "forms"))
    config = stage.check_student(student) if student else stage.config(stage.masks)
    check_adapters(config, stage.section.lora)
    if dry_run:
        return print_cost(recipe, stage.name, stage.adapter, config)
    if forms:
        check_forms(forms, stage.teacher, options_of(config))
    if stage.is_done:
        return print(f"{stage.output} is there already")

    def load() -> HydraHeadForCausalLM:
        if student:
            return HydraHeadForCausalLM.from_pretrained(student, config=config, dtype=torch.float32)
        return convert_model(
            stage.teacher.fetch(), stage.masks, head_forms=load_file(forms), dtype=torch.float32, **stage.options
        )

    cache, job = open_cache(stage), Job(stage)
    teacher = compiled_layers(job.load_teacher())
    weights = {key: getattr(stage.section, key) for key in WEIGHTS}

    def teacher_of(batch: Batch) -> TeacherChunk:
        read = partial(read_teacher, teacher, batch, stage.section.temperature)
        return cache.chunks(batch, read) if cache else read()

    train_and_save(job, config, load, teacher_of, **weights)


def open_cache(stage: Stage) -> TeacherCache | None:
    """The teacher's likeliest tokens on disk, where the recipe has a place for them; raises as `TeacherCache`."""
    section, cache = stage.section, stage.section.teacher_cache
    if cache is None:
        return None
    settings = stage.record() | {"distill": {key: getattr(section, key) for key in TeacherCache.DECIDES}}
    settings = {key: settings[key] for key in ("teacher", "data", "long_data", "distill", "text_begins")}
    settings |= {"seed": stage.recipe.run.seed, "parts": stage.parts}
    rows, vocab_size = section.tokens // section.length, stage.teacher.config.vocab_size
    return TeacherCache(Path(cache.folder), rows, section.length, cache.top_k, vocab_size, settings)


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        run_distill(*read_arguments(arguments, __doc__))


if __name__ == "__main__":
    main()
