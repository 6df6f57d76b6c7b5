"""Tokens to rows to batches, by the number of the step: a map that does not depend on who reads them.

A row is a slice of a token file, so any process reads any row by its number, and resuming, accumulating or changing
the number of processes cannot change the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from .mixture import mixture_rows
from .tokens import TokenFile


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
        """On a device, but for the numbers of the rows: reading them there would wait for all that it has to do."""
        ids, weights, positions = self.token_ids, self.weights, self.position_ids
        return Batch(
            ids.to(device), weights.to(device), None if positions is None else positions.to(device), self.samples
        )


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


@dataclass(frozen=True)
class Mix:
    """
    What rows are made of.

    Attributes:
        retrieval_share: share of rows from `data.mixture`, three in four of which hide needles and ask for them.
        answer_weight: what a token of such an answer weighs in the loss; a token of text weighs 1.
        long_share: share of rows from long documents; the rest is plain text.
        separate_documents: positions restart at every document, and nothing is predicted across them.
    """

    retrieval_share: float = 0.0
    answer_weight: float = 1.0
    long_share: float = 0.0
    separate_documents: bool = False


@dataclass
class Phase:
    """
    Some steps of a stage, with rows of one length.

    Attributes:
        first_step, first_sample: steps and rows of the phases before it.
        rows, long_rows: plain text, and long documents where rows are made of them.
        seed: of all that is random in it.
    """

    first_step: int
    first_sample: int
    rows: Rows
    long_rows: Rows | None
    seed: list[int]


class Batches:
    """The batches of a stage: a map from a step, and a process's place among all, to rows."""

    def __init__(
        self,
        tokenizer,
        text: TokenFile,
        phases: Sequence[tuple[int, int]],
        batch_tokens: int,
        micro_tokens: int,
        seed: Sequence[int],
        first: int = 0,
        heldout: int = 0,
        mix: Mix | None = None,
        long_text: TokenFile | None = None,
        predicts: bool = True,
    ):
        """
        Args:
            phases: (length, steps) of what follows one another.
            batch_tokens: of a step.
            micro_tokens: of a forward pass on one process.
            first: where the stage's own text begins, in tokens.
            heldout: the first so many tokens are no stage's.
            predicts: rows have a token more than they read, which is only predicted.

        Raises:
            ValueError: the text has not one row.
        """
        self.tokenizer, self.mix, self.predicts = tokenizer, mix or Mix(), predicts
        self.batch_tokens, self.micro_tokens = batch_tokens, micro_tokens
        self.end_tokens = text.end_token, (long_text or text).end_token
        tokens, long_tokens = text.read(), long_text and long_text.read()
        self.heldout = tokens[:heldout]
        self.phases: list[Phase] = []
        step = sample = 0
        for index, (length, steps) in enumerate(phases):
            used, place = steps * batch_tokens, [*seed, index]
            rows = Rows(tokens, first, used, heldout, length, place)
            long_rows = None
            if long_tokens is not None:
                # Never all that is there by now: the file grows with extensions, and with others that share it.
                own, end = (
                    max(length, int(count * batch_tokens * self.mix.long_share)) for count in (steps, step + steps)
                )
                long_rows = Rows(long_tokens, end - own, own, 0, length, [*place, 1])
            self.phases.append(Phase(step, sample, rows, long_rows, place))
            first, step, sample = first + used, step + steps, sample + used // length

    def micro_batches(self, step: int, process: int = 0, processes: int = 1) -> list[Batch]:
        """The batches that one process of several accumulates in a step."""
        phase = next(each for each in reversed(self.phases) if each.first_step <= step)
        rows = self.micro_tokens // phase.rows.length
        step_rows = self.batch_tokens // phase.rows.length
        first = (step - phase.first_step) * step_rows
        starts = range(first + process * rows, first + step_rows, processes * rows)
        return [self._batch(phase, range(start, start + rows)) for start in starts]

    def _batch(self, phase: Phase, samples: range) -> Batch:
        """Rows as tensors; the token after each row only where the stage predicts it."""
        ids, weights, positions = (np.stack(each) for each in zip(*(self._row(phase, each) for each in samples)))
        ids, weights, positions = (torch.from_numpy(each) for each in (ids, weights, positions))
        if not self.predicts:
            ids, weights = ids[:, :-1], torch.ones(ids.shape[0], ids.shape[1] - 1)
        numbers = torch.tensor(samples) + phase.first_sample
        return Batch(ids, weights, positions if self._separates else None, numbers)

    @property
    def _separates(self) -> bool:
        return self.mix.separate_documents and self.predicts

    def _row(self, phase: Phase, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids `[T + 1]`, weights `[T + 1]` and positions `[T]` of row `sample` of a phase."""
        mix, length = self.mix, phase.rows.length
        positions = np.arange(length)
        draw = np.random.default_rng([*phase.seed, sample]).random()
        if draw < mix.retrieval_share:
            ids, weights = mixture_rows(self.tokenizer, phase.rows.text, length + 1, 1, [*phase.seed, sample, 1])
            return ids[0], weights[0].clip(max=mix.answer_weight), positions
        is_long = draw < mix.retrieval_share + mix.long_share
        ids = (phase.long_rows if is_long else phase.rows)[sample]
        weights = np.ones(len(ids), np.float32)
        weights[0] = 0
        if self._separates:
            end = self.end_tokens[is_long]
            positions = document_positions(ids[:-1], end)
            weights[1:][ids[:-1] == end] = 0
        return ids, weights, positions
