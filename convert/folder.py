"""Conversion from a teacher's name to a folder on disk: the command `hydrahead convert`."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..configuration_hydrahead import HydraHeadConfig
from ..data.corpus import encode_corpus, load_corpus
from ..files import check_free, read_utf8
from ..hub.checkpoint import save_student
from ..provenance import digest, environment
from .forms import forms_made_from, load_forms
from .masks import read_choice
from .migration import convert_model, options_of, student_config
from .teachers import Teacher, open_teacher

CALIBRATION_ROW = 512


def calibration_ids(tokenizer, text: Path | None, tokens: int) -> torch.Tensor:
    """
    Rows `[B, 512]` (or one shorter row) of a text's first tokens; Python's standard library where no text is given.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    documents = load_corpus("heldout") if text is None else [read_utf8(text)]
    ids = encode_corpus(tokenizer, documents)[:tokens]
    if len(ids) < 2:
        raise ValueError(f"{text}: too short to calibrate on")
    row = min(CALIBRATION_ROW, len(ids))
    return torch.from_numpy(ids[: len(ids) // row * row]).view(-1, row)


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
    masks, _ = read_choice(masks_file)
    if text is not None and not text.is_file():
        raise ValueError(f"{text}: no such file")
    opened = open_teacher(teacher, revision)
    forms = None
    if forms_file is not None:
        forms, options = load_forms(forms_file, opened, options)
    student_config(opened.adapter, masks, **options)

    on_stage("fetching the teacher")
    checkpoint, tokenizer = opened.fetch(), opened.tokenizer()
    on_stage("calibrating and converting")
    ids = calibration_ids(tokenizer, text, calibration_tokens)
    student = convert_model(checkpoint, masks, calibration_ids=ids, head_forms=forms, **options)
    on_stage("saving")
    made_from = conversion_record(opened, student.config, masks_file, forms_file)
    if forms is None:
        words = f"{ids.numel():,} tokens of {text.name if text else 'the Python standard library'}"
        made_from["calibrated_on"] = words
    save_student(student, tokenizer, output, made_from, overwrite)


def conversion_record(
    teacher: Teacher, config: HydraHeadConfig, masks_file: Path | None, forms_file: Path | None
) -> dict:
    """What a student is made from when it is converted, as in `hub.checkpoint.save_student`; no stage yet."""
    files = {"masks": masks_file, "forms": forms_file}
    found = {name: {"sha256": digest(file)} if file else {} for name, file in files.items()}
    found["masks"] |= read_choice(masks_file)[1] if masks_file else {}
    found["forms"] |= forms_made_from(forms_file) if forms_file else {}
    return {**teacher.identity, "options": options_of(config), **found, "stages": [], **environment()}
