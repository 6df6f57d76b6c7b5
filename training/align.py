"""Stage 1: fit every head, or every layer's attention, to the teacher's, from its own input (docs/method.md §3).

    accelerate launch -m hydrahead.training.align --config demo
    accelerate launch -m hydrahead.training.align --config RECIPE.yaml align.learning_rate=2e-3

Writes `OUTPUT/align/head_forms.safetensors`, what distillation starts from. By heads (the default) both forms of every
head are fitted before `W_o`, for all masks at once, and the recipe needs no masks; full forms that are the teacher's
own heads stay as they are. By layers (`align.mode=layers`, the
paper's way) each layer's attention under the masks is fitted after `W_o`.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..configuration_hydrahead import HydraHeadConfig
from ..console import one_line_errors
from ..convert.calibration import calibrated_forms
from ..convert.forms import Forms, HeadForms, save_forms
from ..convert.hooks import visit_heads
from ..convert.options import fitted_kinds, options_of
from ..data.batches import Batch
from ..files import atomic_file
from .loop import Run, Schedule, train
from .losses import head_matching_loss, mean_square
from .plan import print_cost
from .recipe import Recipe, read_arguments
from .stage import Job, Stage

Autocast = Callable[[], contextlib.AbstractContextManager]


class FittedHeads(HeadForms):
    """
    The forms of every head, each fitted to what its teacher head writes before `W_o`.

    Of the kinds that run, as `HeadForms` is told. A full form that starts as the teacher's own head is best left as it
    is (`convert.options.fitted_kinds`): there is nothing to fit, and rounding would only move it away.
    """

    def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        target: torch.Tensor,
        target_square: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Losses `[kinds, H]` of layer `layer`: of the linear and, where they are fitted, of the full forms.

        Inputs as in `teacher_heads`; errors are divided by `target_square` `[H]`, or by the batch's own mean square.
        """
        outputs = self.layers[layer](hidden_states, self.positions(hidden_states))
        return torch.stack([head_matching_loss(output, target, target_square) for output in outputs])

    def target_square(self, layer: int, target: torch.Tensor) -> torch.Tensor:
        """What errors of a layer are divided by, from a batch of targets: `[H]`."""
        return mean_square(target)

    def record(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses `[L, kinds, H]` by their names."""
        found = {"loss": losses.mean()}
        for kind, layers in zip(self.configs, losses.mean(-1).unbind(1)):  # [L] each
            found |= {f"{kind}_loss": layers.mean(), f"{kind}_layers": layers}
        return found


class FittedLayers(FittedHeads):
    """The heads of one student, fitted layer by layer to what the teacher's attention writes after its `W_o`."""

    def __init__(self, config: HydraHeadConfig, forms: Forms, output_weights: Iterable[torch.Tensor]):
        super().__init__(config, forms, {"student": config.head_masks})
        # The teacher's own, `[D, H * d]`: no buffers, which DDP would send from process to process in every step.
        self.output_weights = [weight.detach().float() for weight in output_weights]

    def written(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """What `W_o` makes of heads `[B, T, H, d]`: `[B, T, 1, D]`."""
        self.output_weights[layer] = weight = self.output_weights[layer].to(heads.device)
        return F.linear(heads.float().flatten(2), weight).unsqueeze(2)

    def forward(self, layer, hidden_states, target, target_square=None) -> torch.Tensor:
        """Loss `[1, 1]` of the layer; as in `FittedHeads`."""
        (heads,) = self.layers[layer](hidden_states, self.positions(hidden_states))
        return head_matching_loss(self.written(layer, heads), self.written(layer, target), target_square).unsqueeze(0)

    def target_square(self, layer: int, target: torch.Tensor) -> torch.Tensor:
        """As in `FittedHeads`, of the layer's output: `[1]`."""
        return mean_square(self.written(layer, target))

    def record(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses `[L, 1, 1]` by their names."""
        return {"loss": losses.mean(), "layer_loss": losses.mean(), "layers": losses.flatten()}


def teacher_heads(teacher: PreTrainedModel, token_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer of a teacher, what its attention reads `[B, T, D]` and its heads' outputs `[B, T, H, d]`."""
    found = []
    visit_heads(teacher, token_ids, lambda _, states, heads: found.append((states, heads)))
    return found


@torch.no_grad()
def target_squares(
    accelerator: Accelerator, teacher: PreTrainedModel, module: FittedHeads, batches: list[Batch]
) -> torch.Tensor:
    """
    What a run's errors are divided by `[L, H]` or `[L, 1]`: mean squares of the teacher's heads over a step's batches.

    Fixed for the whole run, so that a step's loss is a sum over its tokens, however they are divided.
    """
    squares: dict[int, torch.Tensor] = {}

    def visit(layer: int, _, heads: torch.Tensor) -> None:
        squares[layer] = squares.get(layer, 0) + module.target_square(layer, heads.to(accelerator.device))

    for batch in batches:
        visit_heads(teacher, batch.token_ids, visit)
    return accelerator.reduce(torch.stack(list(squares.values())) / len(batches), "mean")


def align(
    accelerator: Accelerator,
    teacher: PreTrainedModel,
    module: FittedHeads,
    micro_batches: Callable[[int], list[Batch]],
    schedule: Schedule,
    run: Run | None = None,
    autocast: Autocast = contextlib.nullcontext,
    on_step: Callable[[int, dict], None] | None = None,
) -> dict[str, torch.Tensor]:
    """
    Train `module` to do what the teacher's heads do.

    Every layer reads the teacher's own input and is trained on its own, while the teacher's forward pass stands at
    that layer: activations are never those of more than one layer. Labels are not needed, only inputs that exercise
    the heads.

    Returns:
        the trained module's state dict, whole on the main process.
    """
    module = module.to(accelerator.device)
    squares = target_squares(accelerator, teacher, module, micro_batches(0))

    def backward(model: nn.Module, batch: Batch, scale: float) -> dict[str, torch.Tensor]:
        tokens, losses = batch.weights.numel(), []

        def visit(layer: int, states: torch.Tensor, target: torch.Tensor) -> None:
            # The layer may run elsewhere, if the teacher is split over devices.
            states, target = states.to(accelerator.device), target.to(accelerator.device)
            with torch.enable_grad():
                with autocast():
                    loss = model(layer, states.float(), target, squares[layer])
                accelerator.backward(loss.sum() * (tokens * scale))
            losses.append(loss.detach())

        visit_heads(teacher, batch.token_ids, visit)
        return {
            name: value * tokens for name, value in accelerator.unwrap_model(model).record(torch.stack(losses)).items()
        }

    # The loss is a sum over heads that share no parameters but norms: clipping their joint gradient would make each
    # head's step depend on all others.
    schedule = replace(schedule, max_grad_norm=float("inf"))
    trained = train(accelerator, module, micro_batches, backward, schedule, run, on_step, by_layers=True, replays=True)
    return accelerator.get_state_dict(trained)


def align_heads(
    accelerator: Accelerator,
    teacher: PreTrainedModel,
    config: HydraHeadConfig,
    forms: Forms,
    batch_at: Callable[[int], torch.Tensor],
    schedule: Schedule,
    on_step: Callable[[int, dict], None] | None = None,
) -> Forms:
    """
    Train the forms of all heads to do what their teacher heads do.

    Args:
        teacher: in eval mode, where it should run: it is not moved, and may be off-loaded or split over devices.
            Only the forms are trained, on the accelerator's device.
        config: a student's configuration; its masks do not matter.
        forms: where to start, from `convert.forms.calibrated_forms`.
        batch_at: token ids `[B, T]` of a step.

    Returns:
        the trained forms, on the CPU.
    """

    def micro_batches(step: int) -> list[Batch]:
        token_ids = batch_at(step)
        return [Batch(token_ids, torch.ones(token_ids.shape))]

    module = FittedHeads(config, forms, fitted_kinds(config))
    module.load_state_dict(align(accelerator, teacher, module, micro_batches, schedule, on_step=on_step))
    return module.cpu().forms()


def starting_forms(job: Job, teacher: PreTrainedModel, config: HydraHeadConfig) -> Forms:
    """Forms before training, measured once on held-out text and kept beside the run."""
    file = job.folder / "initial_forms.safetensors"
    if job.accelerator.is_main_process and not file.is_file():
        ids = torch.from_numpy(job.data.heldout[: job.section.calibration_tokens].astype("int64"))
        row = min(512, job.section.length, len(ids))
        forms = calibrated_forms(teacher, ids[: len(ids) // row * row].view(-1, row), config)
        with atomic_file(file) as partial:
            save_file(forms, partial)
    job.accelerator.wait_for_everyone()
    return load_file(file)


def run_align(recipe: Recipe, dry_run: bool = False) -> None:
    """The whole stage, from a recipe to `head_forms.safetensors`; nothing where that is there already."""
    stage = Stage(recipe, "align")
    by_layers = stage.section.mode == "layers"
    config = stage.config(stage.masks if by_layers else None)
    if recipe.data.heldout_tokens < 2:
        raise ValueError("data.heldout_tokens: alignment measures heads on held-out text, which needs some")
    if dry_run:
        return print_cost(recipe, stage.name, stage.adapter, config)
    if stage.is_done:
        return print(f"{stage.output} is there already")

    job = Job(stage)
    teacher = job.load_teacher()
    forms = starting_forms(job, teacher, config)

    def build() -> FittedHeads:
        if not by_layers:
            return FittedHeads(config, forms, stage.kinds)
        return FittedLayers(config, forms, [layer.self_attn.o_proj.weight.cpu() for layer in teacher.model.layers])

    module = build().to(job.accelerator.device)
    run = job.run(lambda: evaluate_forms(job, teacher, module))
    state = align(job.accelerator, teacher, module, job.micro_batches, job.schedule(), run, job.autocast)

    def save() -> None:
        trained = build()
        trained.load_state_dict(state)
        save_forms(trained.forms(), options_of(config), stage.output, job.facts())

    job.end(save)


@torch.no_grad()
def evaluate_forms(job: Job, teacher: PreTrainedModel, module: FittedHeads) -> dict[str, float]:
    """Alignment errors on held-out text, against that text's own mean squares."""
    length, losses = job.stage.evaluated_length, []
    ids = torch.from_numpy(job.data.heldout[: job.recipe.evaluate.text_windows * length].astype("int64"))
    for row in ids[: len(ids) // length * length].view(-1, 1, length).to(job.accelerator.device):
        of_row = []

        def visit(layer, states, target, of_row=of_row):
            with job.autocast():
                of_row.append(module(layer, states.float(), target, module.target_square(layer, target)))

        visit_heads(teacher, row, visit)
        losses.append(torch.stack(of_row))
    record = module.record(torch.stack(losses).mean(0))
    return {f"heldout_{name}": float(value) for name, value in record.items() if value.ndim == 0 and name != "loss"}


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        run_align(*read_arguments(arguments, __doc__))


if __name__ == "__main__":
    main()
