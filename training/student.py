"""Training a whole student: its loss as a module, adapters, and the loop that distillation and finetuning share."""

import contextlib
import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn

from ..configuration_hydrahead import HydraHeadConfig
from ..data.batches import Batch
from ..modeling_hydrahead import HydraHeadForCausalLM
from .loop import Run, Schedule, train
from .losses import CHUNK_TOKENS, TeacherChunk, distillation_loss
from .recipe import LoraSection
from .stage import Job


class StudentLoss(nn.Module):
    """
    A student and its loss in one forward pass, which is where sharded weights are gathered.

    Args:
        kl_weight, ce_weight, temperature, chunk_tokens: as in `distillation_loss`.
    """

    _no_split_modules = ["HydraHeadDecoderLayer"]

    def __init__(
        self,
        student: HydraHeadForCausalLM,
        kl_weight: float = 0.0,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
        chunk_tokens: int = CHUNK_TOKENS,
    ):
        super().__init__()
        self.student, self.settings = student, (kl_weight, ce_weight, temperature, chunk_tokens)

    def forward(self, batch: Batch, teacher: TeacherChunk | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            batch: rows `[B, T + 1]`: the student reads all tokens but the last and predicts all but the first.
            teacher: of the `B * T` predictions, row by row.

        Returns:
            the loss, summed over tokens by their weights, and sums of KL and cross entropy `[2]`.
        """
        states = self.student.model(
            batch.token_ids[:, :-1], position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        labels, weights = batch.token_ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
        return distillation_loss(
            states.flatten(0, 1), self.student.lm_head.weight, labels, weights, teacher, *self.settings
        )


def train_student(
    accelerator: Accelerator,
    model: StudentLoss,
    micro_batches: Callable[[int], list[Batch]],
    schedule: Schedule,
    teacher_of: Callable[[Batch], TeacherChunk | None] = lambda batch: None,
    run: Run | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    on_step: Callable[[int, dict], None] | None = None,
) -> nn.Module:
    """
    Train a student's parameters that require a gradient.

    Args:
        teacher_of: the teacher's view of a batch, without gradient.

    Returns:
        the trained `StudentLoss`, as prepared by `accelerator`.
    """

    def backward(model: nn.Module, batch: Batch, scale: float) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            teacher = teacher_of(batch)
        with autocast():
            loss, sums = model(batch, teacher)
        accelerator.backward(loss * scale)
        return {"loss": loss.detach(), "ce": sums[1]} | ({} if teacher is None else {"kl": sums[0]})

    def predicted(step: int) -> list[Batch]:
        batches = micro_batches(step)
        for batch in batches:
            batch.weights[:, 0] = 0  # nothing predicts the first token: it must not count in the mean
        return batches

    return train(accelerator, model, predicted, backward, schedule, run, on_step)


def prepare_student(
    student: HydraHeadForCausalLM, lora: LoraSection | None, checkpointing: bool
) -> Callable[[], HydraHeadForCausalLM]:
    """
    Decide what is trained: everything, or low-rank adapters, put into the student, and the modules that are named.

    Returns:
        what gives the plain student after training: adapters become part of its weights.

    Raises:
        ValueError: PEFT does not find the modules.
    """
    student.train()
    # Renamed in transformers 5.23; the old name is the one that all supported versions know, PEFT among its users.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing")
    if checkpointing:
        # The state of the generator of random numbers is asked for, and waited for, only where something is drawn.
        settings = {"use_reentrant": False, "preserve_rng_state": student.config.attention_dropout > 0}
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if lora is None:
        return lambda: student
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, settings).merge_and_unload


def check_adapters(config: HydraHeadConfig, lora: LoraSection | None) -> None:
    """Raise what `prepare_student` would, before weights are read and anything is written."""
    if lora is None:
        return
    try:
        with torch.device("meta"):
            prepare_student(HydraHeadForCausalLM(config), lora, checkpointing=False)
    except ValueError as error:
        raise ValueError(f"lora.target_modules {lora.target_modules}: {error}") from None


def train_and_save(
    job: Job,
    config: HydraHeadConfig,
    load: Callable[[], HydraHeadForCausalLM],
    teacher_of: Callable[[Batch], TeacherChunk | None] = lambda batch: None,
    **weights: float,
) -> None:
    """
    Train a stage's student and write it from the main process, whole whatever its weights were sharded into.

    Args:
        config: of the student.
        load: gives it as the stage starts from it, in fp32.
        weights: of the losses, as in `StudentLoss`.
    """
    made_from = job.stage.made_from(config)

    def build() -> tuple[HydraHeadForCausalLM, Callable[[], HydraHeadForCausalLM]]:
        student = load()
        return student, prepare_student(student, job.section.lora, job.section.gradient_checkpointing)

    student, _ = build()
    model, run = StudentLoss(student, **weights), job.run(lambda: job.evaluate_student(student))
    trained = train_student(job.accelerator, model, job.micro_batches, job.schedule(), teacher_of, run, job.autocast)
    state = job.accelerator.get_state_dict(trained)
    del trained  # for `end` to let go of it

    def save() -> None:
        student, merge = build()
        student.load_state_dict({name.removeprefix("student."): tensor for name, tensor in state.items()})
        job.save_student(merge().eval(), made_from)

    job.end(save)
