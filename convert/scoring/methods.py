"""
The methods that score heads, a row each: one more takes a file beside this and a row here, nothing else.

Read without PyTorch, for help and selection; a method's file is imported when it measures.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..forms import HeadForms
    from .probes import Pair
    from .recompute import HeadReader


@dataclass(frozen=True)
class Bench:
    """
    What methods measure with.

    Attributes:
        teacher: in eval mode, where it should run.
        reader: recomputes its heads; keeps the weights that it has read.
        forms: aligned forms of all heads, for methods that need them.
        shortlist, sender_shortlist: as in `score_heads`.
        full_is_teacher: the full form of every head is the teacher's own head (`calibration.full_forms_are_teachers`).
    """

    teacher: "PreTrainedModel"
    reader: "HeadReader"
    forms: "HeadForms | None" = None
    shortlist: int | None = None
    sender_shortlist: int = 32
    full_is_teacher: bool = False


@dataclass(frozen=True)
class UsedPairs:
    """
    The pairs of a probe that the teacher tells apart.

    Attributes:
        pairs: the pairs.
        scales: of each, the clean less the corrupt readout in logits, which effects are shares of.
        receivers: `[pairs, L, H]` fp32, direct effects: measured already, to find out which pairs are usable.
    """

    pairs: "Sequence[Pair]"
    scales: Sequence[float]
    receivers: "torch.Tensor"


@dataclass(frozen=True)
class Method:
    """
    A way to score heads.

    Attributes:
        name, about: what it is asked for by, and its line of help.
        measure: `file.function` in this folder: from a `Bench` and `UsedPairs` to one effect a pair, `[L, H]`, or
            `[len(gives), L, H]`. None for `receiver`, which is always measured, and where there are `parts`.
        measure_text: the same from a `Bench` and rows of token ids, where plain text tells something of its own.
        gives: names of the quantities measured; the method's own by default.
        parts: methods whose quantities it combines, where it measures none itself.
        mean_of: methods whose fused scores it is the mean of, where it has no effects of its own.
        bounds: what a pair's effect is clamped to.
        is_difference: a head's effect is the first quantity less the second, otherwise the largest.
        needs_forms: measures aligned forms of the heads.
        clean_only: never looks at the corrupt text: one counterfactual is enough.
    """

    name: str
    about: str
    measure: str = ""
    measure_text: str = ""
    gives: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    mean_of: tuple[str, ...] = ()
    bounds: tuple[float, float] = (0, math.inf)
    is_difference: bool = False
    needs_forms: bool = False
    clean_only: bool = False

    @property
    def quantities(self) -> tuple[str, ...]:
        """What a probe has to hold of it."""
        return self.parts or self.gives or (self.name,)

    def run(self, function: str, *arguments) -> "Iterator[torch.Tensor]":
        """Call `measure` or `measure_text`."""
        file, _, name = function.partition(".")
        return getattr(import_module(f".{file}", __package__), name)(*arguments)


_ROWS = (
    Method(
        "combined",
        "mean of replacement, which finds heads that nothing stands in for, and receiver+sender, which finds all that "
        "take part",
        mean_of=("replacement", "receiver+sender"),
        needs_forms=True,
    ),
    Method(
        "replacement",
        "readout and text lost to the linear form, less what the full form loses: what a slot is worth",
        measure="replacement.replacement",
        measure_text="replacement.replacement_on_text",
        gives=("linear", "full"),
        bounds=(-math.inf, math.inf),  # a full form may be worse than a linear one
        is_difference=True,
        needs_forms=True,
        clean_only=True,
    ),
    Method(
        "receiver+sender",
        "the paper's: direct effect on the answer, or effect through the heads that have one",
        parts=("receiver", "sender"),
        bounds=(0, 1),
    ),
    Method("receiver", "direct effect on the answer", bounds=(0, 1)),
    Method("sender", "effect through the receivers, by path patching", "senders.senders", bounds=(0, 1)),
    Method("attribution", "first-order estimate of the effect of a corrupted output (AtP)", "attribution.attribution"),
    Method(
        "attribution-qk",
        "the same for queries, keys and values, attention computed exactly (AtP*)",
        "attribution.attribution_qk",
    ),
    Method("attention", "share of attention on what the pair changes", "attribution.attention"),
    Method(
        "logit-contribution",
        "what is written from the needle towards the answer's unembedding (LOCOS)",
        "attribution.contribution",
    ),
    Method("mean-ablation", "readout lost when a head writes its mean", "ablation.mean_ablation", clean_only=True),
)
METHODS = {method.name: method for method in _ROWS}
DEFAULT_METHOD = _ROWS[0].name


def check_methods(names: Sequence[str]) -> None:
    """Raise a one-line `ValueError` for the first name that is no method."""
    for name in names:
        if name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")


def measured_by(names: Sequence[str]) -> list[Method]:
    """The methods that measure what some methods need, each once, without those that are always measured."""
    scored = [part for name in names for part in METHODS[name].mean_of or (name,)]
    parts = [part for name in scored for part in METHODS[name].parts or (name,)]
    return [METHODS[name] for name in dict.fromkeys(parts) if METHODS[name].measure]
