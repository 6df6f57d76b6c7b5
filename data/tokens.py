"""Text to training rows: documents, a token file, and a map from steps to rows that does not depend on who reads them.

    python -m hydrahead.training.data --config RECIPE.yaml        # tokenise ahead, on a machine without a GPU

Documents are tokenised once, in the order of their source, into one file of token ids (`tokens.bin`, 4 bytes each,
memory-mapped), as far as the recipe needs it. A row is a slice of that file, so any process reads any row by its
number, and resuming, accumulating or changing the number of processes cannot change the data. The price is disk (23 GB
for 5.8 billion tokens), a wait before the first step unless the file is made ahead, and a folder that all nodes see.
"""

import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..console import one_line_errors, progress
from ..data.corpus import load_corpus
from ..data.mixture import mixture_rows
from ..files import read_utf8
from ..provenance import Record
from .recipe import STAGES, DataSection, Recipe, StageSection, read_arguments

logger = logging.getLogger(__name__)

DOCUMENTS_AT_A_TIME = 256
# A chat tokenizer's own end token ends a turn: Qwen3's is <|im_end|>, Llama 3's <|eot_id|>.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>")
FILE_KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class Batch:
    """
    Rows of one forward pass.

    Attributes:
        token_ids: `[B, T]` int64; where a stage predicts, the last column is only predicted.
        weights: `[B, T]` fp32: what the prediction *of* the token that stands there weighs.
        position_ids: of the columns that are read, `[B, T - 1]`, restarting at documents; `None` where rows are one
            sequence.
        samples: `[B]` int64, the rows' numbers in the stage; `None` where nobody asks.
    """

    token_ids: torch.Tensor
    weights: torch.Tensor
    position_ids: torch.Tensor | None = None
    samples: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return Batch(**tensors)


def find_files(name: str) -> list[Path] | None:
    """
    The files that a data set's name stands for, or `None` where it is an id on the Hub.

    Raises:
        ValueError: it is a path, and there is nothing, or files of different kinds.
    """
    path = Path(name)
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix in FILE_KINDS)
    else:
        found = sorted(Path(each) for each in glob.glob(name, recursive=True) if Path(each).is_file())
    if not found and (name.startswith((".", "/", "~")) or path.suffix in FILE_KINDS or path.is_dir() or "*" in name):
        raise ValueError(f"data: {name}: no such file or folder of {', '.join(FILE_KINDS)}")
    if len(kinds := {FILE_KINDS.get(each.suffix) for each in found}) > 1 or None in kinds:
        raise ValueError(f"data: {name}: expected files of one kind out of {', '.join(FILE_KINDS)}")
    return found or None


def open_source(data: DataSection):
    """
    The documents of a source: a list of texts or files, or a streamed `datasets.IterableDataset`; nothing is read yet.

    Raises:
        ValueError: there is no such file, data set, part or column; one line.
    """
    if data.name == "demo":
        return load_corpus("heldout") + load_corpus("train")
    files = find_files(data.name)
    if files and FILE_KINDS[files[0].suffix] == "text":
        return files
    import datasets  # takes seconds to import

    try:
        if files:
            names = [str(file) for file in files]
            stream = datasets.load_dataset(
                FILE_KINDS[files[0].suffix], data_files=names, split="train", streaming=True
            )
        else:
            stream = datasets.load_dataset(data.name, data.subset, split=data.split, streaming=True)
    except Exception as error:  # the library has a dozen kinds, of several lines each
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"data: {data.name}: cannot be opened ({reason[0]})") from None
    if stream.column_names is not None and data.column not in stream.column_names:
        raise ValueError(f"data.column: {data.name} has no {data.column}, only {', '.join(stream.column_names)}")
    return stream


def read_documents(source, column: str, position: dict | int | None) -> Iterator[tuple[list[str], dict | int]]:
    """Texts of a source, some at a time, each time with the position to go on from."""
    if isinstance(source, list):
        for start in range(position or 0, len(source), DOCUMENTS_AT_A_TIME):
            part = source[start : start + DOCUMENTS_AT_A_TIME]
            texts = [read_utf8(each) if isinstance(each, Path) else each for each in part]
            yield texts, start + len(part)
        return
    if position is not None:
        source.load_state_dict(position)
    texts = []
    for example in source:
        if column not in example:
            raise ValueError(f"data.column: there is no {column}, only {', '.join(example)}")
        texts.append(example[column])
        if len(texts) == DOCUMENTS_AT_A_TIME:
            yield texts, source.state_dict()
            texts = []
    if texts:
        yield texts, source.state_dict()


def separator_of(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    The token that ends a document: the recipe's, or the tokenizer's (see `DataSection`).

    Raises:
        ValueError: the tokenizer does not know the recipe's.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    default = next((token for token in END_OF_DOCUMENT if token in special), tokenizer.eos_token)
    if data.separator and tokenizer.backend_tokenizer.token_to_id(data.separator) is None:
        raise ValueError(
            f"data.separator: {data.separator!r} is not in the tokenizer's vocabulary; leave it out for {default!r}"
        )
    return data.separator or default


class TokenFile:
    """
    The tokens of a source, in a folder: `tokens.bin`, and `tokens.json` that says whose and how many they are.

    A document is what the tokenizer makes of it, ended by the separator. Filling can be stopped at any
    moment: what `tokens.json` does not count yet is cut off and done again.
    """

    def __init__(self, folder: Path, data: DataSection, tokenizer: PreTrainedTokenizerBase):
        """
        Raises:
            ValueError: the tokenizer does not know the separator; or the folder holds tokens of another source or
                tokenizer, or documents separated by another token.
        """
        self.folder, self.data, self.tokenizer = folder, data, tokenizer
        digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
        separator = separator_of(data, tokenizer)
        self.end_token: int = tokenizer.backend_tokenizer.token_to_id(separator)
        self.whose = {
            "source": [data.name, data.subset, data.split, data.column],
            "tokenizer": digest,
            "separator": separator,
        }
        # Files from before it was recorded are separated by the tokenizer's own end token.
        self.record = Record(folder / "tokens.json", {"separator": tokenizer.eos_token})
        self.record.check(self.whose, "choose another data.cache")

    def state(self) -> dict:
        """What is in the file by now."""
        return self.record.read() or self.whose | {"tokens": 0, "complete": False, "position": None}

    def holds(self, tokens: int) -> bool:
        """Whether there are so many tokens, or no more to be had."""
        state = self.state()
        return state["tokens"] >= tokens or state["complete"]

    def fill(self, tokens: int, on_tokens: Callable[[int], None] = lambda count: None) -> None:
        """
        Tokenise until `holds(tokens)`; told how many each time. Only one process writes, others wait for it.

        Raises:
            ValueError: the system has no file locks (Windows).
        """
        try:
            import fcntl
        except ImportError:
            raise ValueError(
                "training locks the file of tokens with fcntl, which Windows lacks: train on Linux, macOS or in WSL"
            ) from None
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.holds(tokens):
                return
            state = self.state()
            source = open_source(self.data)
            with (self.folder / "tokens.bin").open("ab") as file:
                file.truncate(state["tokens"] * 4)
                for texts, position in read_documents(source, self.data.column, state["position"]):
                    ids = self._encode(texts)
                    file.write(ids.tobytes())
                    state["tokens"] += len(ids)
                    state["position"] = position
                    self._write_state(file, state)
                    on_tokens(len(ids))
                    if state["tokens"] >= tokens:
                        return
                state["complete"] = True
                self._write_state(file, state)

    def _encode(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False).input_ids
        end = self.end_token
        return np.array([each for ids in encoded for each in (ids if ids[-1:] == [end] else [*ids, end])], "<u4")

    def _write_state(self, file, state: dict) -> None:
        file.flush()
        os.fsync(file.fileno())
        self.record.write(state)

    def read(self) -> np.ndarray:
        """All tokens, memory-mapped: uint32 `[N]`."""
        return np.memmap(self.folder / "tokens.bin", "<u4", mode="r", shape=(self.state()["tokens"],))


def token_folder(recipe: Recipe, data: DataSection, name: str) -> Path:
    """Where the token file of a source is or will be."""
    return Path(data.cache) if data.cache else Path(recipe.output) / name


def ready_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: DataSection, folder: str, tokens: int
) -> tuple[np.ndarray, int]:
    """
    The tokens of a source, at least `tokens` if it has them: the first process fills the file, others wait for it.

    Returns:
        all tokens, and the one that ends documents.

    Raises:
        ValueError: as `TokenFile`.
    """
    file = TokenFile(token_folder(recipe, data, folder), data, tokenizer)
    if int(os.environ.get("RANK", 0)) == 0:
        if not file.holds(tokens):
            with progress("tokens", tokens, file.state()["tokens"]) as advance:
                file.fill(tokens, advance)
    else:
        while not file.holds(tokens):
            time.sleep(1)
    return file.read(), file.end_token


def tokens_before(recipe: Recipe, stage: str) -> int:
    """Tokens that are not a stage's own: held out, or read by the stages before it."""
    earlier = (getattr(recipe, name) for name in STAGES[: STAGES.index(stage)])
    return recipe.data.heldout_tokens + sum(section.tokens for section in earlier if section is not None)


class Rows:
    """
    Rows of `length` tokens out of a token file, and the token after each; shuffled anew in every epoch.

    Where the file is too short for a stage to have text of its own (`is_shared`), every stage reads all of it but the
    held-out part.
    """

    def __init__(self, tokens: np.ndarray, first: int, wanted: int, heldout: int, length: int, seed: list[int]):
        """
        Raises:
            ValueError: there is not one row.
        """
        self.is_shared = len(tokens) <= first + wanted
        if self.is_shared:
            first, wanted = heldout, len(tokens) - heldout - 1
        self.tokens, self.first, self.length, self.seed = tokens, first, length, seed
        self.count = wanted // length
        if self.count < 1:
            raise ValueError(
                f"data: {len(tokens):,} tokens, {heldout:,} of them held out: too few for a row of {length:,}"
            )
        self.order = lru_cache(maxsize=1)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([*self.seed, epoch]).permutation(self.count)

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index`, counted over all epochs: int64 `[length + 1]`."""
        row = self.order(index // self.count)[index % self.count]
        start = self.first + int(row) * self.length
        return self.tokens[start : start + self.length + 1].astype(np.int64)

    @property
    def text(self) -> np.ndarray:
        """All tokens that rows are cut from."""
        return self.tokens[self.first : self.first + self.count * self.length]


def document_positions(inputs: np.ndarray, end_token: int) -> np.ndarray:
    """Positions `[T]` that restart after every `end_token`."""
    places = np.arange(len(inputs))
    starts = np.concatenate([[0], np.where(inputs[:-1] == end_token, places[1:], 0)])
    return places - np.maximum.accumulate(starts)


class Phase:
    """The rows of some steps of a stage: one length, text, and, where asked for, long documents and retrieval."""

    def __init__(
        self,
        section: StageSection,
        rows: Rows,
        long_rows: Rows | None,
        tokenizer: PreTrainedTokenizerBase,
        seed: list[int],
        end_tokens: tuple[int, int] | None,
    ):
        """
        Args:
            end_tokens: of documents in `rows` and in `long_rows`, where these are separate.
        """
        self.section, self.rows, self.long_rows = section, rows, long_rows
        self.tokenizer, self.seed, self.end_tokens = tokenizer, seed, end_tokens

    def row(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids `[T + 1]`, weights `[T + 1]` and positions `[T]` of sample `sample`."""
        section, length = self.section, self.rows.length
        positions = np.arange(length)
        draw = np.random.default_rng([*self.seed, sample]).random()
        if draw < section.retrieval_share:
            seed = [*self.seed, sample, 1]
            ids, weights = mixture_rows(self.tokenizer, self.rows.text, length + 1, 1, seed)
            return ids[0], weights[0].clip(max=section.answer_weight), positions
        is_long = draw < section.retrieval_share + section.long_share
        ids = (self.long_rows if is_long else self.rows)[sample]
        weights = np.ones(len(ids), np.float32)
        weights[0] = 0
        if self.end_tokens:
            end = self.end_tokens[is_long]
            positions = document_positions(ids[:-1], end)
            weights[1:][ids[:-1] == end] = 0
        return ids, weights, positions

    def batch(self, samples: range, predicts: bool) -> Batch:
        """Rows as tensors; the token after each row only where the stage predicts it."""
        ids, weights, positions = (np.stack(each) for each in zip(*(self.row(sample) for sample in samples)))
        ids, weights, positions = (torch.from_numpy(each) for each in (ids, weights, positions))
        if not predicts:
            ids, weights = ids[:, :-1], torch.ones(ids.shape[0], ids.shape[1] - 1)
        return Batch(ids, weights, positions if self.end_tokens else None, torch.tensor(list(samples)))


class StageData:
    """The batches of a stage: a map from a step, and a process's place among all, to rows."""

    def __init__(self, recipe: Recipe, stage: str, tokenizer: PreTrainedTokenizerBase):
        """
        Raises:
            ValueError: as `ready_tokens`.
        """
        section, seed = recipe.stage(stage), [recipe.run.seed, STAGES.index(stage)]
        self.section, self.predicts, self.micro_tokens = section, stage != "align", recipe.run.micro_batch_tokens
        first, heldout = tokens_before(recipe, stage), recipe.data.heldout_tokens
        needed = first + section.tokens + 1
        tokens, end = ready_tokens(recipe, tokenizer, recipe.data, "tokens", needed)
        long_tokens, long_end = None, end
        if section.long_share:
            wanted = int(section.tokens * section.long_share) + 1
            long_tokens, long_end = ready_tokens(recipe, tokenizer, recipe.long_data, "long_tokens", wanted)
            if len(long_tokens) < wanted:
                _warn_of_reuse(stage, "long_data", recipe.long_data, len(long_tokens), wanted)
        self.heldout = tokens[:heldout]
        self.phases: list[tuple[int, Phase]] = []  # the first step of each
        step = 0
        for index, (length, steps) in enumerate(stage_phases(section)):
            used = steps * section.batch_tokens
            rows = Rows(tokens, first, used, heldout, length, [*seed, index])
            long_rows = None
            if long_tokens is not None:
                long_rows = Rows(long_tokens, 0, len(long_tokens) - 1, 0, length, [*seed, index, 1])
            ends = (end, long_end) if recipe.data.separate_documents and self.predicts else None
            self.phases.append((step, Phase(section, rows, long_rows, tokenizer, [*seed, index], ends)))
            first, step = first + used, step + steps
        if any(phase.rows.is_shared for _, phase in self.phases):
            _warn_of_reuse(stage, "data", recipe.data, len(tokens), needed)

    def micro_batches(self, step: int, process: int = 0, processes: int = 1) -> list[Batch]:
        """The batches that one process of several accumulates in a step."""
        begin, phase = next(each for each in reversed(self.phases) if each[0] <= step)
        rows = self.micro_tokens // phase.rows.length
        step_rows = self.section.batch_tokens // phase.rows.length
        first = (step - begin) * step_rows
        starts = range(first + process * rows, first + step_rows, processes * rows)
        return [phase.batch(range(start, start + rows), self.predicts) for start in starts]


def _warn_of_reuse(stage: str, key: str, data: DataSection, tokens: int, needed: int) -> None:
    """Say once, not on every process, that a stage reads text again, or text of other stages."""
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(
            f"{stage}: {key} ({data.name}) has {tokens:,} tokens, {needed:,} are needed to read each once and in one "
            "stage only: rows are read again"
        )


def stage_phases(section: StageSection) -> list[tuple[int, int]]:
    """(length, steps) of the parts of a stage, one after the other."""
    steps = section.tokens // section.batch_tokens
    curriculum = getattr(section, "curriculum", None) or [[section.length, 1.0]]
    phases = [(int(length), round(steps * share)) for length, share in curriculum[:-1]]
    return [*phases, (int(curriculum[-1][0]), steps - sum(count for _, count in phases))]


def check_stage_data(recipe: Recipe, stage: str, max_length: int, processes: int = 1) -> None:
    """
    Raise a one-line `ValueError` where lengths, batches and sources of a stage do not fit together.

    Args:
        max_length: positions that the teacher knows.
    """
    section, micro = recipe.stage(stage), recipe.run.micro_batch_tokens
    curriculum = getattr(section, "curriculum", None)
    if curriculum is not None and not (
        all(isinstance(each, list) and len(each) == 2 for each in curriculum)
        and abs(sum(share for _, share in curriculum) - 1) < 1e-6
    ):
        raise ValueError(f"{stage}.curriculum: expected [length, share] pairs whose shares add up to 1")
    for length, _ in stage_phases(section):
        if length > max_length:
            raise ValueError(
                f"{stage}: rows of {length:,} tokens, the teacher's max_position_embeddings is {max_length:,}: "
                "choose shorter rows or another teacher"
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
    if section.long_share and recipe.long_data is None:
        raise ValueError(f"{stage}.long_share needs a section long_data")
    if section.retrieval_share + section.long_share > 1:
        raise ValueError(f"{stage}: retrieval_share and long_share add up to more than 1")
    for data, folder in ((recipe.data, "tokens"), (recipe.long_data if section.long_share else None, "long_tokens")):
        if data is not None and not (token_folder(recipe, data, folder) / "tokens.json").is_file():
            open_source(data)


def main(arguments: list[str] | None = None) -> None:
    """Tokenise all that a recipe's stages will read."""
    from .stage import prepare_tokenizer

    with one_line_errors():
        recipe, _ = read_arguments(arguments, __doc__)
        tokenizer = prepare_tokenizer(recipe)
        for stage in STAGES:
            if getattr(recipe, stage) is not None:
                StageData(recipe, stage, tokenizer)


if __name__ == "__main__":
    main()
