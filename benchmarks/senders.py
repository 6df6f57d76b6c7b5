"""What senders cost on a real teacher, and which ones estimates and the shortlist leave out.

    python benchmarks/senders.py TEACHER --output FILE.json    # a Hub id, a folder, a GGUF file; on a GPU where one is

Eight pairs of each built-in probe in both counterfactuals, and with `--only` others. Each set is measured as `score`
does it, and once more with all of the shortlist in every round and pairs that are recorded each time; with `--every`,
the first three pairs of the sets of needles without a shortlist too. Effects are means over pairs, clamped to 0 … 1.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hydrahead.convert.scoring import senders
from hydrahead.convert.scoring.measure import MIN_READOUT_CHANGE
from hydrahead.convert.scoring.probes import Pair, Probe, built_in_probes
from hydrahead.convert.scoring.receivers import receiver_effects
from hydrahead.convert.scoring.recompute import HeadReader
from hydrahead.convert.scoring.scores import THRESHOLD
from hydrahead.convert.teachers import open_teacher
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.kernels import use_tuned_kernels
from hydrahead.provenance import Record, environment

AS_IT_IS = {"hopeful": senders.HOPEFUL, "room": senders._Recorded.ROOM}
BEFORE = {"hopeful": 0.0, "room": 0.0}
FEW = 3  # pairs that are measured without a shortlist


def clock(call: Callable[[], object]) -> tuple[object, float]:
    """What it gives, and seconds."""
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


class Set:
    """The pairs of a probe that the teacher tells apart, and the receivers on them."""

    def __init__(self, reader: HeadReader, probe: Probe):
        found, self.seconds = clock(lambda: [receiver_effects(reader.model, pair) for pair in probe.pairs])
        kept = [
            (pair, one, one.clean - one.corrupt)
            for pair, one in zip(probe.pairs, found)
            if one.clean - one.corrupt >= MIN_READOUT_CHANGE and one.clean > 0
        ]
        self.reader, self.pairs, self.scales = reader, [pair for pair, *_ in kept], [scale for *_, scale in kept]
        self.receivers: list[tuple[int, int]] = []
        if kept:
            shares = torch.stack([one.drops / scale for _, one, scale in kept]).clamp(0, 1).mean(0)
            self.receivers = [tuple(place) for place in (shares > THRESHOLD).nonzero().tolist()]

    def measured(self, hopeful: float, room: float, pairs: int | None = None, shortlist: int = 32):
        """Mean effects `[L][H]` of the first pairs, and seconds."""
        senders.HOPEFUL, senders._Recorded.ROOM = hopeful, room
        used: list[Pair] = self.pairs[:pairs]
        arguments = (self.reader, used, self.scales[:pairs], self.receivers, THRESHOLD, shortlist)
        effects, seconds = clock(lambda: senders.sender_effects(*arguments))
        return [[round(value, 5) for value in layer] for layer in effects.clamp(0, 1).mean(0).tolist()], seconds


def measure(reader: HeadReader, probe: Probe, every: bool) -> dict:
    """A row of the results."""
    asked = Set(reader, probe)
    row = {"probe": probe.name, "counterfactual": probe.counterfactual, "receiver_s": asked.seconds}
    if not asked.pairs:
        return row
    row |= {"pairs": len(asked.pairs), "receivers": len(asked.receivers)}
    row["new"], row["sender_s"] = asked.measured(**AS_IT_IS)
    row["old"], row["all_32_recorded_again_s"] = asked.measured(**BEFORE)
    if every and probe.name.startswith("niah"):
        row["new_on_3"], _ = asked.measured(**AS_IT_IS, pairs=FEW)
        row["every"], row["every_s"] = asked.measured(**AS_IT_IS, pairs=FEW, shortlist=10**9)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--only", action="append", help="names of probes")
    parser.add_argument("--every", action="store_true", help="needles without a shortlist too")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        use_tuned_kernels()
    opened = open_teacher(arguments.teacher)
    tokenizer, reader = (
        opened.tokenizer(),
        HeadReader(opened.load("bfloat16" if device == "cuda" else "float32", device)),
    )
    text = encode_corpus(tokenizer, load_corpus("train"))
    probes = built_in_probes(tokenizer, text, arguments.length, arguments.pairs, 0, arguments.only or ())
    warm = Set(reader, probes[0])
    warm.measured(**AS_IT_IS, pairs=2)  # kernels are chosen when they first run
    rows = []
    for probe in probes:
        rows.append(measure(reader, probe, arguments.every))
        print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)
        report = {"teacher": opened.public_name, "length": arguments.length, "rows": rows, **environment(device)}
        Record(arguments.output).write(report)


if __name__ == "__main__":
    main()
