"""Stage 3: next-token prediction at long length, on rows packed with text (docs/method.md §3).

    accelerate launch -m hydrahead.training.finetune --config demo
    accelerate launch -m hydrahead.training.finetune --config RECIPE.yaml finetune.learning_rate=2e-5

Starts from the student that distillation wrote, or from `finetune.student`. `finetune.curriculum` grows the length in
steps; every step has the same number of tokens. Writes `OUTPUT/finetune/student`, a folder for the Hub.
"""

from functools import partial

import torch

from ..console import one_line_errors
from ..modeling_hydrahead import HydraHeadForCausalLM
from .plan import print_cost
from .recipe import Recipe, read_arguments
from .stage import Job, Stage
from .student import check_adapters, train_and_save


def run_finetune(recipe: Recipe, dry_run: bool = False) -> None:
    """The whole stage, from a recipe to a student folder; nothing where that is there already."""
    stage = Stage(recipe, "finetune")
    folder = stage.sources["student"]
    if dry_run:
        return print_cost(recipe, stage.name, stage.adapter, stage.config(stage.masks))
    config = stage.check_student(folder)
    check_adapters(config, stage.section.lora)
    if stage.is_done:
        return print(f"{stage.output} is there already")

    load = partial(HydraHeadForCausalLM.from_pretrained, folder, config=config, dtype=torch.float32)
    train_and_save(Job(stage), config, load)


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        run_finetune(*read_arguments(arguments, __doc__))


if __name__ == "__main__":
    main()
