"""Stage 1: fit every head, or every layer's attention, to the teacher's, from the teacher's own input (METHOD §2-3).

    accelerate launch -m hydrahead.training.align --config demo
    accelerate launch -m hydrahead.training.align --config RECIPE.yaml align.learning_rate=2e-3

Writes `OUTPUT/align/head_forms.safetensors`, what distillation starts from. By heads (the default) both forms of every
head are fitted before `W_o`, for all masks at once, and the recipe needs no masks. By layers (`align.mode=layers`, the
paper's way) each layer's attention under the masks is fitted after `W_o`.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..configuration_hydrahead import HydraHeadConfig
from ..console import one_line_errors
from ..convert.forms import build_attention, calibrated_forms, save_forms, with_masks
from ..convert.hooks import visit_heads
from ..convert.migration import Forms, forms_of_attention, options_of
from ..data.batches import Batch
from ..files import atomic_file
from ..modeling_hydrahead import HydraHeadAttention, HydraHeadRotaryEmbedding, log_position_scale
from .cost import print_cost
from .loop import Run, Schedule, train
from .losses import head_matching_loss, mean_square
from .recipe import Recipe, read_arguments
from .stage import Job, Stage

__all__ = ["HeadForms", "LayerForms", "align_heads"]

Autocast = Callable[[], contextlib.AbstractContextManager]


class AlignedLayer(nn.Module):
    """What alignment trains of one layer: what is sharded and gathered as one."""

    def __init__(self, branches: dict[str, HydraHeadAttention]):
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, hidden_states, target, target_square, positions: dict) -> torch.Tensor:
        """Losses `[branches, H]` as in `head_matching_loss`."""
        outputs = (branch.head_outputs(hidden_states, **positions) for branch in self.branches.values())
        return torch.stack([head_matching_loss(output, target, target_square) for output in outputs])


class AlignedAttention(AlignedLayer):
    """The same after the output projection: one branch under the masks, one loss for the whole layer."""

    def forward(self, hidden_states, target, target_square, positions: dict) -> torch.Tensor:
        """Loss `[1, 1]`; `target` is still `[B, T, H, d]`, what the teacher's `W_o` reads."""
        output = self.branches["student"](hidden_states, **positions).unsqueeze(2)  # [B, T, 1, D]
        return head_matching_loss(output, self.target(target), target_square).unsqueeze(0)

    def target(self, heads: torch.Tensor) -> torch.Tensor:
        """What the teacher's attention writes `[B, T, 1, D]`."""
        return self.branches["student"].o_proj(heads.float().flatten(2)).unsqueeze(2)


class HeadForms(nn.Module):
    """
    The attention layers of two students, one of Gated DeltaNet heads only and one of full-attention heads only,
    without their output projections: everything that alignment trains.
    """

    _no_split_modules = ["AlignedLayer"]

    def __init__(self, config: HydraHeadConfig, forms: Forms):
        super().__init__()
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        self.configs = {}
        for branch, value in (("linear", 0), ("full", 1)):
            self.configs[branch] = with_masks(config, [[value] * heads] * layers)
        self.layers = nn.ModuleList(
            AlignedLayer({branch: build_attention(each, layer, forms) for branch, each in self.configs.items()})
            for layer in range(layers)
        )

    @property
    def branches(self) -> dict[str, list[HydraHeadAttention]]:
        """The attention layers of each student."""
        return {branch: [layer.branches[branch] for layer in self.layers] for branch in self.configs}

    def positions(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None) -> dict:
        """Keywords of `head_outputs` for rows `[B, T, D]` that start at position 0."""
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        return {
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
            "query_scale": log_position_scale(next(reversed(self.configs.values())), position_ids),
        }

    def forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        target: torch.Tensor,
        target_square: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Losses `[2, H]` of the linear and the full forms of layer `layer`.

        Inputs as in `teacher_heads`; errors are divided by `target_square` `[H]`, or by the batch's own mean square.
        """
        return self.layers[layer](hidden_states, target, target_square, self.positions(hidden_states))

    def target_square(self, layer: int, target: torch.Tensor) -> torch.Tensor:
        """What errors of a layer are divided by, from a batch of targets: `[H]`."""
        return mean_square(target)

    def record(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses `[L, 2, H]` by their names."""
        linear, full = losses.mean(-1).unbind(1)  # [L]
        return {
            "loss": losses.mean(),
            "linear_loss": linear.mean(),
            "full_loss": full.mean(),
            "linear_layers": linear,
            "full_layers": full,
        }

    def forms(self) -> Forms:
        """The forms as they are now, on the CPU."""
        return {
            name: tensor
            for branch, layers in self.branches.items()
            for name, tensor in forms_of_attention(layers, self.configs[branch], branch).items()
        }


class LayerForms(HeadForms):
    """The attention layers of one student, with the teacher's output projections, which stay as they are."""

    _no_split_modules = ["AlignedAttention"]

    def __init__(self, config: HydraHeadConfig, forms: Forms, outputs: list[torch.Tensor]):
        nn.Module.__init__(self)
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        self.configs = {"student": with_masks(config, config.head_masks)}
        self.start = forms
        self.layers = nn.ModuleList(
            AlignedAttention({"student": build_attention(self.configs["student"], layer, forms, output)})
            for layer, output in enumerate(outputs)
        )
        for layer in self.layers:
            layer.branches["student"].o_proj.requires_grad_(False)

    def target_square(self, layer: int, target: torch.Tensor) -> torch.Tensor:
        """As in `HeadForms`, of the layer's output: `[1]`."""
        return mean_square(self.layers[layer].target(target))

    def record(self, losses: torch.Tensor) -> dict[str, torch.Tensor]:
        """Losses `[L, 1, 1]` by their names."""
        return {"loss": losses.mean(), "layer_loss": losses.mean(), "layers": losses.flatten()}

    def forms(self) -> Forms:
        """All forms: those that the masks chose as they are now, the others as they were."""
        forms = {name: tensor.float().clone() for name, tensor in self.start.items()}
        for layer, attention in enumerate(self.branches["student"]):
            _put_forms(forms, layer, attention, self.configs["student"])
        return forms


def _put_forms(forms: Forms, layer: int, attention: HydraHeadAttention, config: HydraHeadConfig) -> None:
    """Write the heads of an attention layer under `config`'s masks into `forms`: the inverse of `attention_state`."""
    layout, state = config.head_layout(layer), attention.state_dict()
    for branch, heads in (("linear", layout.linear_heads), ("full", layout.full_heads)):
        prefix = f"{branch}_attention."
        for name in (key.removeprefix(prefix) for key in state if key.startswith(prefix)):
            tensor, form = state[prefix + name].cpu(), forms[f"{layer}.{branch}.{name}"]
            if "_norm." in name:
                form.copy_(tensor)
            elif name == "short_conv.weight":
                form[:, list(heads)] = tensor.unflatten(0, (3, len(heads), -1))
            else:
                per_kv_head = branch == "full" and name.startswith(("k_proj", "v_proj"))
                places = layout.kv_heads if per_kv_head else heads
                form[list(places)] = tensor.unflatten(0, (len(places), -1))
        if config.fusion != "concat" and heads:
            forms[f"{layer}.{branch}.gamma"][list(heads)] = state["fusion.weight"].cpu()[list(heads)]


def teacher_heads(teacher: PreTrainedModel, token_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer of a teacher, what its attention reads `[B, T, D]` and its heads' outputs `[B, T, H, d]`."""
    found = []
    visit_heads(teacher, token_ids, lambda _, states, heads: found.append((states, heads)))
    return found


@torch.no_grad()
def target_squares(
    accelerator: Accelerator, teacher: PreTrainedModel, module: HeadForms, batches: list[Batch]
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
    module: HeadForms,
    micro_batches: Callable[[int], list[Batch]],
    schedule: Schedule,
    run: Run | None = None,
    autocast: Autocast = contextlib.nullcontext,
    metrics_file: Path | None = None,
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
    trained = train(accelerator, module, micro_batches, backward, schedule, run, metrics_file, on_step, by_layers=True)
    return accelerator.get_state_dict(trained)


def align_heads(
    accelerator: Accelerator,
    teacher: PreTrainedModel,
    config: HydraHeadConfig,
    forms: Forms,
    batch_at: Callable[[int], Iterable[torch.Tensor]],
    schedule: Schedule,
    metrics_file: Path | None = None,
    on_step: Callable[[int, dict], None] | None = None,
) -> Forms:
    """
    Train both forms of all heads to do what their teacher heads do.

    Args:
        teacher: in eval mode, where it should run: it is not moved, and may be off-loaded or split over devices.
            Only the forms are trained, on the accelerator's device.
        config: a student's configuration; its masks do not matter.
        forms: where to start, from `convert.forms.calibrated_forms`.
        batch_at: token ids `[B, T]` of a step, as the first tensor of a batch.

    Returns:
        the trained forms, on the CPU.
    """

    def micro_batches(step: int) -> list[Batch]:
        token_ids = next(iter(batch_at(step)))
        return [Batch(token_ids, torch.ones(token_ids.shape))]

    module = HeadForms(config, forms)
    module.load_state_dict(
        align(accelerator, teacher, module, micro_batches, schedule, metrics_file=metrics_file, on_step=on_step)
    )
    return module.cpu().forms()


def starting_forms(job: Job, teacher: PreTrainedModel, config: HydraHeadConfig) -> Forms:
    """Forms before training, measured once on held-out text and kept beside the run."""
    file = job.folder / "initial_forms.safetensors"
    if job.accelerator.is_main_process and not file.is_file():
        row = min(512, job.section.length)
        ids = torch.from_numpy(job.data.heldout[: job.section.calibration_tokens].astype("int64"))
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

    job = stage.start()
    teacher = job.load_teacher()
    forms = starting_forms(job, teacher, config)

    def build() -> HeadForms:
        if not by_layers:
            return HeadForms(config, forms)
        return LayerForms(config, forms, [layer.self_attn.o_proj.weight.cpu() for layer in teacher.model.layers])

    module = build().to(job.accelerator.device)
    run = job.run(lambda: evaluate_forms(job, teacher, module))
    state = align(job.accelerator, teacher, module, job.micro_batches, job.schedule(), run, job.autocast)

    def save() -> None:
        trained = build()
        trained.load_state_dict(state)
        save_forms(trained.forms(), options_of(config), stage.output, job.facts())

    job.end(save)


@torch.no_grad()
def evaluate_forms(job: Job, teacher: PreTrainedModel, module: HeadForms) -> dict[str, float]:
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
