"""Which text a stage of a recipe reads, and in what rows.

python -m hydrahead.training.data --config RECIPE.yaml        # tokenise ahead, on a machine without a GPU
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..console import one_line_errors
from ..convert.teachers import open_teacher
from ..data.batches import Batches, Mix
from ..data.tokens import DataSection, check_source, is_local, ready_tokens
from .recipe import STAGES, Recipe, StageSection, read_arguments

logger = logging.getLogger(__name__)


def prepare_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """
    The teacher's tokenizer.

    Raises:
        ValueError: it is not a fast one, or has no end-of-text token to part documents with.
    """
    tokenizer = open_teacher(recipe.teacher.name, recipe.teacher.revision).tokenizer()
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"{recipe.teacher.name}: training needs a fast tokenizer with an end-of-text token")
    return tokenizer


def public_source(name: str) -> str:
    """A source of text as records name it: without the folders of this machine."""
    return "the Python standard library" if name == "demo" else Path(name).name if is_local(name) else name


def token_folder(recipe: Recipe, data: DataSection, name: str) -> Path:
    """Where the token file of a source is or will be."""
    return Path(data.cache) if data.cache else Path(recipe.output) / name


def tokens_before(recipe: Recipe, stage: str) -> int:
    """
    Where a stage's own text begins: after what is held out and what the stages before it read.

    A stage before it that grows moves it. One that has begun would then read other rows than those it began with: its
    record says where its text begins, so that it is refused (`Stage`).
    """
    earlier = (getattr(recipe, name) for name in STAGES[: STAGES.index(stage)])
    return recipe.data.heldout_tokens + sum(section.tokens for section in earlier if section is not None)


def stage_phases(section: StageSection, parts: Sequence[int] = ()) -> list[tuple[int, int]]:
    """
    (length, steps) of the phases of a stage, one after the other.

    Args:
        parts: steps of its first run and of what each extension added; one run of all by default. What was added is
            text of its own at the last length, so that an extension never changes the rows before it.
    """
    steps, *added = parts or [section.tokens // section.batch_tokens]
    curriculum = getattr(section, "curriculum", None) or [[section.length, 1.0]]
    phases = [(int(length), round(steps * share)) for length, share in curriculum[:-1]]
    last = int(curriculum[-1][0])
    return [*phases, (last, steps - sum(count for _, count in phases)), *((last, count) for count in added)]


def stage_lengths(section: StageSection) -> list[int]:
    """Tokens of a row, phase by phase."""
    return [length for length, _ in stage_phases(section)]


def stage_batches(
    recipe: Recipe, stage: str, tokenizer: PreTrainedTokenizerBase, parts: Sequence[int] = ()
) -> Batches:
    """
    The batches of a stage, after its text has been tokenised as far as it reads it.

    Args:
        parts: as in `stage_phases`.

    Raises:
        ValueError: as `ready_tokens` and `Batches`.
    """
    section, data, long_data = recipe.stage(stage), recipe.data, recipe.long_data
    first = tokens_before(recipe, stage)
    longest = max(stage_lengths(section))
    needed, long_needed = first + section.tokens + 1, max(longest, int(section.tokens * section.long_share)) + 1
    text, long_text = ready_tokens(token_folder(recipe, data, "tokens"), data, tokenizer, needed), None
    if section.long_share:
        long_text = ready_tokens(token_folder(recipe, long_data, "long_tokens"), long_data, tokenizer, long_needed)
        _warn_of_reuse(stage, "long_data", long_data, long_text.state()["tokens"], long_needed)
    batches = Batches(
        tokenizer,
        text,
        stage_phases(section, parts),
        section.batch_tokens,
        recipe.run.micro_batch_tokens,
        [recipe.run.seed, STAGES.index(stage)],
        first,
        data.heldout_tokens,
        Mix(section.retrieval_share, section.answer_weight, section.long_share, data.separate_documents),
        long_text,
        predicts=stage != "align",
    )
    _warn_of_reuse(stage, "data", data, text.state()["tokens"], needed)
    return batches


def _warn_of_reuse(stage: str, key: str, data: DataSection, tokens: int, needed: int) -> None:
    """Say once, not on every process, that a stage reads text again, or text of other stages."""
    if tokens < needed and int(os.environ.get("RANK", 0)) == 0:
        logger.warning(
            f"{stage}: {key} ({data.name}) has {tokens:,} tokens, {needed:,} are needed to read each once and in one "
            "stage only: rows are read again"
        )


def check_stage_data(recipe: Recipe, stage: str, max_length: int, processes: int = 1) -> None:
    """
    Raise a one-line `ValueError` where lengths, batches and sources of a stage do not fit together.

    Args:
        max_length: positions that the teacher knows; only finetuning goes beyond them.
    """
    check_rows(recipe, stage, max_length, processes)
    section = recipe.stage(stage)
    if section.long_share and recipe.long_data is None:
        raise ValueError(f"{stage}.long_share needs a section long_data")
    if section.retrieval_share + section.long_share > 1:
        raise ValueError(f"{stage}: retrieval_share and long_share add up to more than 1")
    for data, folder in ((recipe.data, "tokens"), (recipe.long_data if section.long_share else None, "long_tokens")):
        if data is not None and not (token_folder(recipe, data, folder) / "tokens.json").is_file():
            check_source(data)


def check_rows(recipe: Recipe, stage: str, max_length: int, processes: int = 1) -> None:
    """The same for lengths and batches alone."""
    section, micro = recipe.stage(stage), recipe.run.micro_batch_tokens
    curriculum = getattr(section, "curriculum", None)
    if curriculum is not None and not (
        all(isinstance(each, list) and len(each) == 2 for each in curriculum)
        and all(
            type(part) in (int, float) and part >= least for each in curriculum for part, least in zip(each, (1, 0))
        )
        and abs(sum(share for _, share in curriculum) - 1) < 1e-6
    ):
        raise ValueError(f"{stage}.curriculum: expected [length, share] pairs whose shares add up to 1")
    if curriculum is not None and getattr(section, "teacher_cache", None):
        raise ValueError(f"{stage}.teacher_cache: its rows are all of one length; leave out {stage}.curriculum")
    for length in stage_lengths(section):
        if length > max_length and stage != "finetune":  # which the teacher does not read
            raise ValueError(
                f"{stage}{'.curriculum' if curriculum else ''}: rows of {length:,} tokens, the teacher's "
                f"max_position_embeddings is {max_length:,}: choose shorter rows or another teacher"
            )
        if micro % length:
            raise ValueError(f"run.micro_batch_tokens ({micro}) must be a multiple of the {stage} length ({length})")
    if section.batch_tokens % (micro * processes):
        raise ValueError(
            f"{stage}.batch_tokens ({section.batch_tokens}) must be a multiple of run.micro_batch_tokens ({micro}) "
            f"times the processes ({processes})"
        )
    if section.tokens < section.batch_tokens:
        raise ValueError(f"{stage}.tokens ({section.tokens}) must be at least one batch ({section.batch_tokens})")


def main(arguments: list[str] | None = None) -> None:
    """Tokenise all that a recipe's stages will read."""
    with one_line_errors():
        recipe, _ = read_arguments(arguments, __doc__)
        tokenizer = prepare_tokenizer(recipe)
        for stage in STAGES:
            if getattr(recipe, stage) is not None:
                stage_batches(recipe, stage, tokenizer)


def tokenise_beside(parent: int, arguments: list[str]) -> None:
    """As `main`, as long as the process that asked for it lives, however that ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    main(arguments)


if __name__ == "__main__":
    main()
