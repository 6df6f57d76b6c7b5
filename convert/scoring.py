"""Head scores: how much each query head of a teacher matters, with what they were measured on."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from ..hub.checkpoint import whole_file
from .migration import measure_heads
from .patching import receiver_effects
from .probes import Probe
from .teachers import adapter_for, public_name, read_model

MIN_READOUT_CHANGE = 0.1  # logits: a pair that moves the readout less says nothing about heads
TIE_BREAK_TOKENS = 512
THRESHOLD = 0.01  # effect above which a head counts as taking part


@dataclass
class ProbeResult:
    """
    What one probe gave.

    Attributes:
        name, capability: as in `Probe`.
        effects: `[pairs used][L][H]` raw effects, 1 where replacing the head alone does what the corrupt text does.
        used, dropped: pairs that counted, and pairs whose readout the corruption did not move.
    """

    name: str
    capability: str
    effects: list[list[list[float]]]
    used: int
    dropped: int

    def mean_effect(self) -> torch.Tensor:
        """`[L, H]`: mean of the effects, each clamped to [0, 1]."""
        return torch.tensor(self.effects).clamp(0, 1).mean(0)


@dataclass
class HeadScores:
    """
    A ranking of all query heads of a teacher, `[L][H]`, and how it came about.

    Attributes:
        scores: the fused score, in [0, 1].
        tie_break: orders heads of equal score, larger first; the mean distance that a head attends over, in tokens.
        num_key_value_heads: KV heads per layer, for budgets in KV groups.
        probes: what every probe gave.
        capabilities: score of each capability before fusion.
        method: how effects were measured.
        teacher, revision, versions, seconds: provenance and cost.
    """

    scores: list[list[float]]
    tie_break: list[list[float]]
    num_key_value_heads: int
    probes: list[ProbeResult]
    capabilities: dict[str, list[list[float]]]
    method: str
    teacher: str
    revision: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        with whole_file(path) as partial:
            partial.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """
        Read what `save` wrote.

        Raises:
            ValueError: the file is not a score file.
        """
        try:
            data = json.loads(Path(path).read_text())
            data["probes"] = [ProbeResult(**probe) for probe in data["probes"]]
            return cls(**data)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a head score file ({error})") from None


def score_heads(
    teacher: PreTrainedModel,
    tokenizer,
    probes: Sequence[Probe],
    on_pair: Callable[[], None] | None = None,
) -> HeadScores:
    """
    Score every query head of a teacher by its direct effect on the probes (METHOD §2).

    A head's score for a capability is its mean effect over the capability's probes times κ, the share of these probes
    in which it passes 0.01; scores of a capability are scaled to [0, 1] and capabilities averaged.

    Args:
        teacher: a model of a supported family, in eval mode.
        tokenizer: the teacher's; this method needs only the token ids that the probes hold.
        probes: what to measure on.
        on_pair: called after each pair.

    Raises:
        ValueError: no probes, an unsupported teacher, or a probe none of whose pairs the teacher tells apart.
    """
    if not probes:
        raise ValueError("no probes to score heads on")
    adapter = adapter_for(teacher.config)
    started = time.perf_counter()
    results = []
    for probe in probes:
        effects, dropped = [], 0
        for pair in probe.pairs:
            drops, clean, corrupt = receiver_effects(teacher, pair)
            if clean - corrupt < MIN_READOUT_CHANGE:
                dropped += 1
            else:
                effects.append((drops / (clean - corrupt)).tolist())
            if on_pair is not None:
                on_pair()
        if not effects:
            raise ValueError(
                f"{probe.name}: the teacher tells none of its {len(probe.pairs)} pairs apart; it lacks this "
                "capability at this length, use a shorter or easier probe"
            )
        results.append(ProbeResult(probe.name, probe.capability, effects, len(effects), dropped))

    capabilities = {}
    for capability in dict.fromkeys(result.capability for result in results):
        means = torch.stack([result.mean_effect() for result in results if result.capability == capability])
        score = means.mean(0) * (means > THRESHOLD).float().mean(0)
        spread = score.max() - score.min()
        capabilities[capability] = (score - score.min()) / spread if spread > 0 else score
    # Most heads score 0. Those that look far are the harder ones to replace by a state that forgets.
    text = torch.tensor([pair.clean[:TIE_BREAK_TOKENS] for pair in probes[0].pairs[:2]])
    return HeadScores(
        scores=torch.stack(list(capabilities.values())).mean(0).tolist(),
        tie_break=measure_heads(adapter, read_model(teacher), text).distance.tolist(),
        num_key_value_heads=adapter.num_kv_heads,
        probes=results,
        capabilities={name: score.tolist() for name, score in capabilities.items()},
        method="receiver",
        teacher=public_name(teacher.config.name_or_path),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        seconds=time.perf_counter() - started,
    )
