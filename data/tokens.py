"""Text to tokens: the documents of a source, in one file of token ids that any process reads anywhere.

Documents are tokenised once, in the order of their source, into `tokens.bin` (4 bytes each, memory-mapped), as far as
someone needs it. The price is disk (23 GB for 5.8 billion tokens), a wait before the first step unless the file is
made ahead, and a folder that all nodes see.
"""

import glob
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..console import blaming, progress
from ..files import read_utf8
from ..provenance import Record
from .corpus import load_corpus

DOCUMENTS_AT_A_TIME = 256
WAIT = 0.2  # seconds between two looks at what another process writes
# A chat tokenizer's own end token ends a turn: Qwen3's is <|im_end|>, Llama 3's <|eot_id|>.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>")
FILE_KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class DataSection:
    """
    Attributes:
        name: a data set on the Hub, `demo` (the Python standard library), or files: `.txt`, `.jsonl`, `.parquet`,
            a folder of them or a pattern.
        subset, split, column: which part of a data set, and the column that holds the text.
        cache: folder of the token file; `tokens` in the output by default. Runs may share it.
        heldout_tokens: the first so many tokens are kept for evaluation.
        separate_documents: positions restart at every document, and none sees another. Not in alignment.
        separator: the token that ends a document; by default `<|endoftext|>` or `<|end_of_text|>`, whichever the
            tokenizer has as a special token, else its own end token, which in chat models may end a turn.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    cache: str | None = None
    heldout_tokens: int = 262_144
    separate_documents: bool = False
    separator: str | None = None


def is_local(name: str) -> bool:
    """Whether a data set's name stands for files, be they there or not, and is no id on the Hub."""
    path = Path(name)
    return name.startswith((".", "/", "~")) or path.suffix in FILE_KINDS or "*" in name or path.exists()


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
    if not found and is_local(name):
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
        train = load_corpus("train")
        return load_corpus("heldout") + random.Random(0).sample(train, len(train))  # any part is of all its subjects
    files = find_files(data.name)
    if files and FILE_KINDS[files[0].suffix] == "text":
        return files
    import datasets  # takes seconds to import

    with blaming(f"data: {data.name}: cannot be opened"):
        if files:
            names = [str(file) for file in files]
            kind = FILE_KINDS[files[0].suffix]
            stream = datasets.load_dataset(kind, data_files=names, split="train", streaming=True)
        else:
            stream = datasets.load_dataset(data.name, data.subset, split=data.split, streaming=True)
    if stream.column_names is not None and data.column not in stream.column_names:
        raise ValueError(f"data.column: {data.name} has no {data.column}, only {', '.join(stream.column_names)}")
    return stream


def check_source(data: DataSection) -> None:
    """
    Open a source and read its first documents.

    Raises:
        ValueError: as `open_source` and `read_documents`; or it is empty.
    """
    first, _ = next(read_documents(open_source(data), data, None), ([], None))
    if not any(text.strip() for text in first):
        raise ValueError(f"data: {data.name}: holds no text")


def read_documents(source, data: DataSection, position: dict | int | None) -> Iterator[tuple[list[str], dict | int]]:
    """
    Texts of a source, some at a time, each time with the position to go on from.

    Raises:
        ValueError: a document cannot be read, or is no text.
    """
    if isinstance(source, list):
        for start in range(position or 0, len(source), DOCUMENTS_AT_A_TIME):
            part = source[start : start + DOCUMENTS_AT_A_TIME]
            texts = [read_utf8(each) if isinstance(each, Path) else each for each in part]
            yield texts, start + len(part)
        return
    if position is not None:
        source.load_state_dict(position)
    texts, examples = [], iter(source)
    while True:
        with blaming(f"data: {data.name}: cannot be read"):
            example = next(examples, None)
        if example is None:
            break
        if data.column not in example:
            raise ValueError(f"data.column: there is no {data.column}, only {', '.join(example)}")
        if not isinstance(text := example[data.column], str):
            raise ValueError(f"data: {data.name}: its column {data.column} holds {text!r:.20}, expected text")
        texts.append(text)
        if len(texts) == DOCUMENTS_AT_A_TIME:
            yield texts, source.state_dict()
            texts = []
    if texts:
        yield texts, source.state_dict()


def separator_of(data: DataSection, tokenizer) -> str:
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
    The tokens of a source, in a folder: `tokens.bin`, and `tokens.json` that says what they are of and how many.

    A document is what the tokenizer makes of it, ended by the separator. Filling can be stopped at any moment: what
    `tokens.json` does not count yet is cut off and done again.
    """

    def __init__(self, folder: Path, data: DataSection, tokenizer):
        """
        Raises:
            ValueError: the tokenizer does not know the separator; or the folder holds tokens of another source or
                tokenizer, or documents separated by another token, or is damaged.
        """
        self.folder, self.data, self.tokenizer = folder, data, tokenizer
        digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
        separator = separator_of(data, tokenizer)
        self.end_token: int = tokenizer.backend_tokenizer.token_to_id(separator)
        self.settings = {
            "source": [data.name, data.subset, data.split, data.column],
            "tokenizer": digest,
            "separator": separator,
        }
        # Files from before it was recorded are separated by the tokenizer's own end token.
        self.record = Record(folder / "tokens.json", {"separator": tokenizer.eos_token})
        self.record.check(self.settings, "choose another data.cache")
        tokens, held = self.state().get("tokens"), folder / "tokens.bin"
        size = held.stat().st_size if held.is_file() else 0
        if not isinstance(tokens, int) or not 0 <= 4 * tokens <= size or "complete" not in self.state():
            raise ValueError(f"{folder}: damaged: {size:,} bytes for {tokens} tokens; remove it to have it made anew")

    def state(self) -> dict:
        """What is in the file by now."""
        return self.record.read() or self.settings | {"tokens": 0, "complete": False, "position": None}

    def holds(self, tokens: int) -> bool:
        """Whether there are so many tokens, or no more to be had."""
        state = self.state()
        return state["tokens"] >= tokens or state["complete"]

    def fill(self, tokens: int, on_tokens: Callable[[int], None] = lambda count: None) -> None:
        """
        Tokenise until `holds(tokens)`; told how many each time. Only one process writes; another waits until there are
        enough, or writes on.

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
        told = self.state()["tokens"]
        with (self.folder / "lock").open("w") as lock:
            while True:
                enough, now = self.holds(tokens), self.state()["tokens"]
                on_tokens(now - told)
                told = now
                if enough:
                    return
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(WAIT)
                else:
                    on_tokens(self.state()["tokens"] - told)
                    return self._write(tokens, on_tokens)

    def _write(self, tokens: int, on_tokens: Callable[[int], None]) -> None:
        """Tokenise until `holds(tokens)`; the lock is held."""
        if self.holds(tokens):
            return
        state = self.state()
        source = open_source(self.data)
        with (self.folder / "tokens.bin").open("ab") as file:
            file.truncate(state["tokens"] * 4)
            for texts, position in read_documents(source, self.data, state["position"]):
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


def ready_tokens(folder: Path, data: DataSection, tokenizer, tokens: int) -> TokenFile:
    """
    A token file that holds so many tokens, or all there are: the first process fills it, others wait for it.

    Raises:
        ValueError: as `TokenFile`.
    """
    file = TokenFile(folder, data, tokenizer)
    if int(os.environ.get("RANK", 0)) == 0:
        if not file.holds(tokens):
            with progress("tokens", tokens, file.state()["tokens"]) as advance:
                file.fill(tokens, advance)
    else:
        while not file.holds(tokens):
            time.sleep(1)
    return file
