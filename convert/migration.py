"""From a teacher's weights, head masks and forms of its heads to a HydraHead student."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import GenerationConfig, PreTrainedModel

from ..configuration_hydrahead import HydraHeadConfig
from ..files import check_free
from ..hub.checkpoint import save_checkpoint
from ..hub.metadata import inherited
from ..modeling_hydrahead import HydraHeadForCausalLM
from ..provenance import digest, environment
from .calibration import (
    HeadStatistics,
    check_calibration_ids,
    initial_forms,
    measure_heads,
    random_calibration_ids,
    read_calibration_ids,
)
from .forms import Forms, check_forms_fit, forms_made_from, layer_state, load_forms, load_meta
from .hooks import input_device
from .masks import read_choice, read_masks
from .options import options_of, student_config
from .teachers import Teacher, adapter_for, open_teacher, read_model, read_safetensors

logger = logging.getLogger(__name__)


def convert_model(
    teacher: PreTrainedModel | str | Path,
    head_masks: list[list[int]],
    *,
    calibration_ids: torch.Tensor | None = None,
    head_forms: Forms | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    **options,
) -> HydraHeadForCausalLM:
    """
    Convert a pretrained transformer into a HydraHead student, on the CPU. Its heads are measured where the teacher is,
    or on an accelerator if there is one.

    A teacher given by name or folder is read one tensor at a time: the memory needed is that of the student and one
    layer. A teacher in memory is copied, so that training the student leaves it as it is.

    Args:
        teacher: a model, a folder, or a Hub id, of a family in `teachers.ADAPTERS`.
        head_masks: `[L][H]`, 1 for heads that stay full attention.
        calibration_ids: `[B, T]` token ids of a text on which the teacher's heads are measured, for the scales and
            gates of the new heads. Random tokens where none are given: good enough to start training from, not better.
        head_forms: trained forms of all heads (from alignment) to use instead of the teacher's rows.
        dtype: of the student; the teacher's by default. Gates and fusion are always fp32.
        revision: of a teacher given by Hub id.
        **options: fields of `HydraHeadConfig` that describe the heads (`OPTIONS`); see `student_config`.

    Returns:
        the student, in eval mode.

    Raises:
        ValueError: the teacher cannot be represented, or options, masks or forms do not fit; before any weight is
            read.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    opened = None if isinstance(teacher, PreTrainedModel) else open_teacher(teacher, revision)
    adapter = adapter_for(teacher.config) if opened is None else opened.adapter
    config = student_config(adapter, head_masks, **options)
    if calibration_ids is not None:
        check_calibration_ids(calibration_ids, config.vocab_size)
    if head_forms is not None:
        check_forms_fit(head_forms, config)

    if opened is None:
        read, device = read_model(teacher), input_device(teacher)
        generation_config = copy.deepcopy(teacher.generation_config)
    else:
        folder = opened.fetch()
        read = read_safetensors(folder)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        has_file = (folder / "generation_config.json").is_file()
        generation_config = GenerationConfig.from_pretrained(folder) if has_file else None

    if head_forms is None and (config.full_attention_share < 1 or config.fusion != "concat"):
        if calibration_ids is None:
            logger.warning("No calibration text given: the new heads are scaled on random tokens.")
            calibration_ids = random_calibration_ids(config.vocab_size)
        statistics = measure_heads(adapter, read, calibration_ids, device)
    else:  # which nothing reads
        statistics = HeadStatistics(*torch.ones(3, config.num_hidden_layers, config.num_attention_heads))

    outer = adapter.embedding_and_head(read)
    dtype = dtype or outer["model.norm.weight"].dtype
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        student = HydraHeadForCausalLM(config).eval()
    for layer, module in enumerate(student.model.layers):
        attention = adapter.attention(read, layer)
        forms = initial_forms(attention, statistics, layer, config) if head_forms is None else head_forms
        load_meta(module, layer_state(adapter, read, layer, attention, forms, config), dtype)
    student.load_state_dict({name: tensor.to(dtype) for name, tensor in outer.items()}, strict=False, assign=True)
    student.tie_weights()
    if generation_config is not None:
        student.generation_config = generation_config
    return student


def convert_to_folder(
    teacher: str,
    output: Path,
    masks_file: Path,
    text: Path | None = None,
    calibration_tokens: int = 2048,
    revision: str | None = None,
    overwrite: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    forms_file: Path | None = None,
    **options,
) -> None:
    """
    Convert a teacher and write the student as a folder, whole or not at all.

    Args:
        teacher: Hub id or folder.
        masks_file: what `hydrahead select` writes, or a JSON list of head masks `[L][H]`.
        text: UTF-8 text to calibrate on.
        on_stage: told what begins.
        forms_file: aligned forms of the heads, with the options that they were aligned under.
        **options: as of `convert_model`; where forms are given, none that contradicts theirs.

    Raises:
        ValueError: anything that can be known to be wrong before weights are read is refused before.
    """
    check_free(output, overwrite)
    opened = open_teacher(teacher, revision)
    masks = read_masks(masks_file, opened)
    forms = None
    if forms_file is not None:
        forms, options = load_forms(forms_file, opened, options)
    student_config(opened.adapter, masks, **options)

    on_stage("fetching the teacher")
    checkpoint, tokenizer = opened.fetch(), opened.tokenizer()
    on_stage("calibrating and converting")
    ids = read_calibration_ids(tokenizer, text, calibration_tokens)
    student = convert_model(checkpoint, masks, calibration_ids=ids, head_forms=forms, **options)
    on_stage("saving")
    made_from = conversion_record(opened, student.config, masks_file, forms_file)
    if forms is None:
        words = f"{ids.numel():,} tokens of {text.name if text else 'the Python standard library'}"
        made_from["calibrated_on"] = words
    save_checkpoint(student, tokenizer, output, made_from, overwrite)


def conversion_record(
    teacher: Teacher, config: HydraHeadConfig, masks_file: Path | None, forms_file: Path | None
) -> dict:
    """What a student is made from when it is converted, as in `hub.checkpoint.save_checkpoint`; no stage yet."""
    masks = {"sha256": digest(masks_file), **read_choice(masks_file)[1]} if masks_file else {}
    forms = {"sha256": digest(forms_file), **forms_made_from(forms_file)} if forms_file else {}
    sources = {"inherited": inherited(teacher.fetch()), "options": options_of(config), "masks": masks, "forms": forms}
    return {**teacher.identity, **sources, "stages": [], **environment()}
