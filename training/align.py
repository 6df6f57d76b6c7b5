"""Stage 1: fit both forms of every head to its teacher head, before `W_o`, for all masks at once (METHOD §2-3)."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from ..configuration_hydrahead import HydraHeadConfig
from ..convert.migration import Forms, attention_state, forms_of_attention, load_meta
from ..modeling_hydrahead import HydraHeadAttention, HydraHeadRotaryEmbedding, log_position_scale
from .loop import Schedule, train
from .losses import head_matching_loss

__all__ = ["HeadForms", "align_heads", "alignment_errors"]


class HeadForms(nn.Module):
    """
    The attention layers of two students, one of Gated DeltaNet heads only and one of full-attention heads only,
    without their output projections: everything that alignment trains.
    """

    def __init__(self, config: HydraHeadConfig, forms: Forms):
        super().__init__()
        self.rotary_emb = HydraHeadRotaryEmbedding(config)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        self.branches = nn.ModuleDict()
        self.configs = {}
        for branch, value in (("linear", 0), ("full", 1)):
            branch_config = HydraHeadConfig(**config.to_dict() | {"head_masks": [[value] * heads] * layers})
            branch_config._attn_implementation = "sdpa"
            self.configs[branch] = branch_config
            self.branches[branch] = nn.ModuleList(
                self._attention(branch_config, layer, forms) for layer in range(layers)
            )

    @staticmethod
    def _attention(config: HydraHeadConfig, layer: int, forms: Forms) -> HydraHeadAttention:
        with init_empty_weights(include_buffers=False):
            attention = HydraHeadAttention(config, layer)
        attention.o_proj = nn.Identity()
        return load_meta(attention, attention_state(forms, layer, config), torch.float32)

    def positions(self, hidden_states: torch.Tensor) -> dict:
        """Keywords of `head_outputs` for rows `[B, T, D]` that start at position 0."""
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        return {
            "position_embeddings": self.rotary_emb(hidden_states, position_ids),
            "query_scale": log_position_scale(self.configs["full"], position_ids),
        }

    def forward(self, layer: int, hidden_states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Losses `[2, H]` of the linear and the full forms of layer `layer`; inputs as in `teacher_heads`."""
        positions = self.positions(hidden_states)
        return torch.stack(
            [
                head_matching_loss(self.branches[branch][layer].head_outputs(hidden_states, **positions), target)
                for branch in ("linear", "full")
            ]
        )

    def forms(self) -> Forms:
        """The forms as they are now, on the CPU."""
        return forms_of_attention(self.branches["linear"], self.configs["linear"], "linear") | forms_of_attention(
            self.branches["full"], self.configs["full"], "full"
        )


@torch.no_grad()
def teacher_heads(teacher: PreTrainedModel, token_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each layer of a teacher, what its attention reads `[B, T, D]` and its heads' outputs `[B, T, H, d]`."""
    inputs, heads, hooks = [], [], []
    for layer in teacher.model.layers:
        hooks += [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            ),
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0])),
        ]
    try:
        teacher.model(token_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    shape = (teacher.config.num_attention_heads, -1)
    return [(states, output.unflatten(-1, shape)) for states, output in zip(inputs, heads)]


@torch.no_grad()
def alignment_errors(
    teacher: PreTrainedModel, config: HydraHeadConfig, forms: Forms, token_ids: torch.Tensor
) -> torch.Tensor:
    """
    Errors `[2, L, H]` of the linear and the full forms on a text `[B, T]`, as `head_matching_loss` defines them.

    Their difference says what a head's full-attention slot is worth, as far as its output goes.
    """
    module = HeadForms(config, forms).to(token_ids.device)
    inputs = teacher_heads(teacher.to(token_ids.device), token_ids)
    return torch.stack([module(layer, *pair) for layer, pair in enumerate(inputs)], dim=1).cpu()


def align_heads(
    accelerator: Accelerator,
    teacher: PreTrainedModel,
    config: HydraHeadConfig,
    forms: Forms,
    batch_at: Callable[[int], Iterable[torch.Tensor]],
    schedule: Schedule,
    metrics_file: Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Forms:
    """
    Train both forms of all heads to do what their teacher heads do.

    Every layer reads the teacher's own input and is trained on its own, one after the other, so that the memory of the
    backward pass does not grow with the number of layers. Labels are not needed, only inputs that exercise the heads.

    Args:
        teacher: in eval mode; moved to the accelerator's device.
        config: a student's configuration; its masks do not matter.
        forms: where to start, from `convert.migration.initial_forms`.
        batch_at: token ids `[B, T]` of a step, as the first tensor of a batch.

    Returns:
        the trained forms, on the CPU.
    """
    teacher = teacher.to(accelerator.device)
    module = HeadForms(config, forms)

    def backward(model: nn.Module, batch: Iterable[torch.Tensor]) -> dict[str, float]:
        losses = []
        for layer, (states, target) in enumerate(teacher_heads(teacher, next(iter(batch)))):
            loss = model(layer, states, target)
            accelerator.backward(loss.sum())
            losses.append(loss.detach())
        linear, full = torch.stack(losses).mean((0, 2)).tolist()
        return {"linear_loss": linear, "full_loss": full}

    # The loss is a sum over heads that share no parameters but norms: clipping their joint gradient would make each
    # head's step depend on all others.
    schedule = replace(schedule, max_grad_norm=float("inf"))
    trained = train(accelerator, module, batch_at, backward, schedule, metrics_file, on_step)
    return accelerator.unwrap_model(trained).forms()
