"""Files of head masks, and masks from score files: `hydrahead select`, which without exchanges needs no PyTorch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..files import atomic_file, check_writable, read_json
from ..provenance import digest
from .scoring.scores import HeadScores
from .scoring.settings import Exchange
from .selection import (
    BY_SCORE,
    STRATEGIES,
    Head,
    Masks,
    same_cache_in_other_unit,
    select_heads,
    selection_cost,
)

if TYPE_CHECKING:  # choosing heads needs no PyTorch
    from .teachers import Teacher


def read_choice(path: Path) -> tuple[Masks, dict]:
    """
    Head masks `[L][H]` from a JSON file, and what the file says of how they were chosen: nothing, for a bare list.

    Raises:
        ValueError: the file is missing, or holds neither masks nor what `select_to_file` writes.
    """
    found = read_json(path, (dict, list))
    masks, facts = (found.pop("masks", None), found) if isinstance(found, dict) else (found, {})
    if not isinstance(masks, list) or not all(isinstance(row, list) for row in masks):
        raise ValueError(f"{path}: expected a list of layers, each a list of 0 and 1, alone or under `masks`")
    return masks, facts


def read_masks(path: Path, teacher: "Teacher | None" = None) -> Masks:
    """
    The masks of `read_choice` alone.

    Raises:
        ValueError: as `read_choice`; or they were chosen for another teacher than this one.
    """
    masks, facts = read_choice(path)
    if teacher is not None:
        teacher.check_made_from(path, facts)
    return masks


def parse_heads(texts: Sequence[str]) -> list[tuple[int, int]]:
    """
    Heads from `LAYER.HEAD` words, separated by commas or spaces: `3.5,3.7`.

    Raises:
        ValueError: one is not of this form.
    """
    heads = []
    for word in ",".join(texts).replace(",", " ").split():
        layer, _, head = word.partition(".")
        if not (layer.isdigit() and head.isdigit()):
            raise ValueError(f"{word!r}: expected LAYER.HEAD, such as 3.5")
        heads.append((int(layer), int(head)))
    return heads


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """
    Weights of capabilities from `NAME=NUMBER` words.

    Raises:
        ValueError: one is not of this form, or negative.
    """
    weights = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"{text!r}: expected NAME=NUMBER, such as language=0.5") from None
        if not 0 <= weights[name] < float("inf"):
            raise ValueError(f"{text!r}: a weight must be 0 or more")
    return weights


def read_scores(files: Sequence[Path], method: str | None, weights: Mapping[str, float]) -> HeadScores:
    """
    One ranking from one or several score files of the same teacher.

    Args:
        method: of those measured; `None` for the first file's.
        weights: of capabilities, in place of those in the files.

    Raises:
        ValueError: see `HeadScores.load`, `merge` and `using`; or a weight for a capability that was not measured.
    """
    scores = HeadScores.load(files[0])
    for file in files[1:]:
        scores = scores.merge(HeadScores.load(file))
    known = sorted({probe.capability for probe in scores.probes})
    if unknown := sorted(weights.keys() - known):
        raise ValueError(f"no capability {unknown[0]!r} was measured; measured: {', '.join(known)}")
    scores = replace(scores, weights=scores.weights | weights)
    return scores.using(method or scores.method) if method or weights else scores


def _picture_beside(output: Path) -> Path:
    """The file of a choice's picture; raises where the two cannot be written."""
    if output.suffix != ".json":
        raise ValueError(f"{output}: expected a name that ends in .json")
    picture = output.with_suffix(".png")
    for path in (output, picture):
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, expected a file to write")
    check_writable(output.parent)
    return picture


def _check_exchange(strategy: str, tensor_parallel: int) -> None:
    is_bound = strategy in STRATEGIES and STRATEGIES[strategy].bounded
    if tensor_parallel > 1 or not strategy.startswith("global") or is_bound:
        raise ValueError(
            "greedy exchange moves heads between layers: it cannot keep equal shares for tensor parallelism, nor "
            "what a strategy by layers gives each; choose a global strategy and no tensor parallelism"
        )


def _exchanged(
    scores: HeadScores,
    masks: Masks,
    exchange: Exchange,
    strategy: str,
    budget_unit: str,
    decided: set[Head],
    seed: int,
) -> tuple[Masks, list[str]]:
    """Masks improved by greedy exchange, and what it found, line by line."""
    from .search import exchange_heads

    every_layer = STRATEGIES[strategy].every_layer
    masks, history = exchange_heads(scores, masks, exchange, budget_unit, decided, seed, every_layer)
    return masks, [
        f"after {record['trials']} conversions: needles {record['accuracy']:.2f}, answer loss "
        f"{record['answer_loss']:.3f}, text divergence {record['divergence']:.3f} (untrained)"
        for record in (history[0], history[-1])
    ]


def select_to_file(
    files: Sequence[Path],
    output: Path,
    ratio: float,
    strategy: str = "global",
    budget_unit: str = "kv_groups",
    *,
    method: str | None = None,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    tensor_parallel: int = 1,
    seed: int = 0,
    weights: Sequence[str] = (),
    exchange: Exchange | None = None,
) -> tuple[Masks, list[str]]:
    """
    Choose heads and write `output` (JSON: masks, and how they were chosen) and, beside it, a picture of the choice.

    Args:
        exchange: improve the choice by greedy exchange.

    Returns:
        the masks, and what they keep and cost, line by line.

    Raises:
        ValueError: see `read_scores`, `select_heads` and `exchange_heads`.
    """
    picture = _picture_beside(output)
    if exchange is not None:
        _check_exchange(strategy, tensor_parallel)
    scores = read_scores(files, method, parse_weights(weights))
    kept, dropped = parse_heads(keep), parse_heads(drop)
    masks = select_heads(
        scores, ratio, strategy, budget_unit, seed, keep=kept, drop=dropped, tensor_parallel=tensor_parallel
    )
    lines = []
    if exchange is not None:
        masks, lines = _exchanged(scores, masks, exchange, strategy, budget_unit, {*kept, *dropped}, seed)
    lines += describe_choice(scores, masks, strategy, budget_unit)
    cost = selection_cost(scores, masks)
    facts = {
        "teacher": scores.teacher,
        "revision": scores.revision,
        "scores": {file.name: digest(file) for file in files},
        "method": scores.method,
        "strategy": strategy,
        "ratio": ratio,
        "budget_unit": budget_unit,
        "seed": seed,
        "by_score": strategy in BY_SCORE,
        "keep": [f"{layer}.{head}" for layer, head in kept],
        "drop": [f"{layer}.{head}" for layer, head in dropped],
        "kept": cost.full_attention_heads,
        "without_evidence": cost.without_evidence,
        "improved_by": None if exchange is None else {"exchanges": exchange.rounds, "forms": digest(exchange.forms)},
        "scored": scores.brief(),
        "version": __version__,
    }
    from ..evaluation.figures import plot_head_map

    title = (
        f"{scores.teacher}: {scores.method} score, {strategy}, {ratio:g} of {budget_unit}, "
        f"{cost.full_attention_heads} kept, {cost.without_evidence} of them without evidence"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as partial:  # which appears after the picture, and not without it
        partial.write_text(json.dumps({"masks": masks} | facts) + "\n")
        plot_head_map(scores.scores, masks, title, picture)
    return masks, lines


def describe_choice(scores: HeadScores, masks: Masks, strategy: str, budget_unit: str) -> list[str]:
    """What a choice keeps and costs, what the same cache would buy otherwise, and warnings: lines of text."""
    cost = selection_cost(scores, masks)
    lines = [
        f"full attention: {cost.full_attention_heads} of {cost.heads} query heads "
        f"({cost.full_attention_heads / cost.heads:.1%}), in {cost.kv_heads} of {cost.all_kv_heads} KV heads",
        f"cache: {cost.kv_bytes_per_token:,} bytes per token in bf16 (teacher {cost.teacher_kv_bytes_per_token:,}: "
        f"{cost.kv_bytes_per_token / cost.teacher_kv_bytes_per_token:.1%}), {cost.state_bytes:,} bytes of state",
    ]
    if cost.padded_kv_bytes_per_token > cost.kv_bytes_per_token:
        lines.append(
            f"in vLLM, where every layer keeps as many KV heads as the fullest: {cost.padded_kv_bytes_per_token:,} "
            f"bytes per token ({cost.padded_kv_bytes_per_token / cost.teacher_kv_bytes_per_token:.1%}), or more"
        )
    if strategy in BY_SCORE:
        unit, other = same_cache_in_other_unit(scores, masks, strategy, budget_unit)
        count = sum(map(sum, other))
        lines.append(f"the same cache, budgeted in {unit}: {count} query heads ({count / cost.heads:.1%})")
        if cost.without_evidence:
            lines.append(
                f"warning: {cost.without_evidence} of the {cost.full_attention_heads} heads score 0 or less: what "
                "was measured speaks no more for keeping them than against it; a smaller ratio drops them first"
            )
        if cost.decided_by_tie_break > cost.full_attention_heads / 2:
            lines.append(
                f"warning: {cost.decided_by_tie_break} of the {cost.full_attention_heads} heads were decided by "
                f"tie-break (attention distance), not by their {scores.method} score"
            )
    return lines + [f"warning: {warning}" for warning in scores.warnings]
