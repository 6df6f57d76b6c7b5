"""A teacher's likeliest tokens on disk, for further epochs and for other students of the same teacher."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from ..data.batches import Batch
from ..files import force_to_disk
from ..provenance import Record
from .losses import CHUNK_TOKENS, TeacherChunk


class TeacherCache:
    """
    Log probabilities and ids of the `top_k` likeliest tokens at each position of each row of a stage.

    8 bytes each: 64 of them for a billion tokens are half a terabyte. Rows are filled as they are first read; a row
    counts once it is whole. Processes write rows of their own into the same files.
    """

    DECIDES: ClassVar = ("tokens", "batch_tokens", "length", "temperature", "retrieval_share", "long_share")

    def __init__(self, folder: Path, rows: int, length: int, top_k: int, vocab_size: int, settings: dict):
        """
        Args:
            settings: teacher, data and seed, by which a cache is known.

        Raises:
            ValueError: the folder holds another run's, or `top_k` is not within the vocabulary.
        """
        if not 1 <= top_k <= vocab_size:
            raise ValueError(f"distill.teacher_cache.top_k must be 1 … {vocab_size}, got {top_k}")
        folder.mkdir(parents=True, exist_ok=True)
        settings = settings | {"top_k": top_k}
        # Caches from before these were recorded are taken for this text's.
        record = Record(
            folder / "cache.json", {key: settings[key] for key in ("text_begins", "parts") if key in settings}
        )
        record.check(settings, "choose another folder")
        if int(os.environ.get("RANK", 0)) == 0 and not record.matches(settings):
            record.write(settings)
        shape = (rows, length, top_k)
        self.top_k = top_k
        self.log_probs = self._open(folder / "log_probs.bin", "<f4", shape)
        self.indices = self._open(folder / "indices.bin", "<i4", shape)
        self.done = self._open(folder / "done.bin", "u1", (rows,))
        force_to_disk(folder)

    @staticmethod
    def _open(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        with path.open("ab") as file:
            file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)  # sparse until written
        return np.memmap(path, dtype, mode="r+", shape=shape)

    def chunks(self, batch: Batch, compute: Callable[[], TeacherChunk]) -> TeacherChunk:
        """The teacher's view of a batch, read from the files; computed and written first where a row is missing."""
        samples = batch.samples.numpy()
        if not self.done[samples].all():
            self._fill(samples, compute(), batch.token_ids.shape[1] - 1)
        device = batch.token_ids.device
        log_probs = torch.from_numpy(self.log_probs[samples]).flatten(0, 1).to(device)
        indices = torch.from_numpy(self.indices[samples]).flatten(0, 1).long().to(device)
        return lambda part: (log_probs[part], indices[part])

    def _fill(self, samples: np.ndarray, teacher: TeacherChunk, length: int) -> None:
        for place, sample in enumerate(samples):
            for start in range(0, length, CHUNK_TOKENS):
                end = min(start + CHUNK_TOKENS, length)
                logits, _ = teacher(slice(place * length + start, place * length + end))
                values, indices = F.log_softmax(logits.float(), dim=-1).topk(self.top_k, dim=-1)
                self.log_probs[sample, start:end] = values.cpu().numpy()
                self.indices[sample, start:end] = indices.cpu().numpy()
        # What says that rows are there goes to the disk after them.
        self.log_probs.flush()
        self.indices.flush()
        self.done[samples] = 1
        self.done.flush()
