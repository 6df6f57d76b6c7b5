"""What senders cost on a real teacher, and which ones estimates and the shortlist leave out.

    python benchmarks/senders.py TEACHER --output FILE.json    # a Hub id, a folder, a GGUF file; on a GPU where one is

Eight pairs of each built-in probe in both counterfactuals, or of those that `--only` names. Each set is measured as
`score` does it, and once more with all of the shortlist in every round and pairs that are recorded each time; with
`--every`, the first three pairs of needles without a shortlist too. Effects are means over pairs, clamped to 0 … 1.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hydrahead.convert.scoring import senders
from hydrahead.convert.scoring.measure import score_heads
from hydrahead.convert.scoring.probes import Probe, built_in_probes
from hydrahead.convert.scoring.scores import THRESHOLD, HeadScores
from hydrahead.convert.teachers import open_teacher
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.kernels import use_tuned_kernels
from hydrahead.provenance import Record, environment

AS_IT_IS = {"hopeful": senders.HOPEFUL, "room": senders._Recorded.ROOM}
BEFORE = {"hopeful": 0.0, "room": 0.0}
FEW = 3  # pairs that are measured without a shortlist


def scored(teacher: PreTrainedModel, probe: Probe, hopeful: float, room: float, shortlist: int = 32) -> HeadScores:
    senders.HOPEFUL, senders._Recorded.ROOM = hopeful, room
    return score_heads(teacher, None, [probe], methods=["sender"], sender_shortlist=shortlist)


def effects(scores: HeadScores) -> list[list[float]]:
    """Mean effects of senders `[L][H]`."""
    return scores.probes[0].effect("sender").round(5).tolist()


def measure(teacher: PreTrainedModel, probe: Probe, every: bool) -> dict:
    """
    A row of the results.

    Raises:
        ValueError: the teacher tells no pair apart.
    """
    new, old = (scored(teacher, probe, **way) for way in (AS_IT_IS, BEFORE))
    (result,) = new.probes
    row = {"probe": probe.name, "counterfactual": probe.counterfactual, "pairs": result.used}
    row |= {"receivers": int((result.effect("receiver") > THRESHOLD).sum()), "receiver_s": new.seconds["receiver"]}
    row |= {"new": effects(new), "sender_s": new.seconds["sender"]}
    row |= {"old": effects(old), "all_32_recorded_again_s": old.seconds["sender"]}
    if every and probe.name.startswith("niah"):
        few = replace(probe, pairs=probe.pairs[:FEW])
        whole = scored(teacher, few, **AS_IT_IS, shortlist=10**9)
        row |= {"new_on_3": effects(scored(teacher, few, **AS_IT_IS))}
        row |= {"every": effects(whole), "every_s": whole.seconds["sender"]}
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
    tokenizer, teacher = opened.tokenizer(), opened.load("bfloat16" if device == "cuda" else "float32", device)
    text = encode_corpus(tokenizer, load_corpus("train"))
    probes = built_in_probes(tokenizer, text, arguments.length, arguments.pairs, 0, arguments.only or ())
    scored(
        teacher, replace(probes[0], pairs=probes[0].pairs[:2]), **AS_IT_IS
    )  # kernels are chosen when they first run
    rows = []
    for probe in probes:
        try:
            rows.append(measure(teacher, probe, arguments.every))
        except ValueError as error:
            print(error)
            continue
        print({key: value for key, value in rows[-1].items() if not isinstance(value, list)}, flush=True)
        report = {"teacher": opened.public_name, "length": arguments.length, "rows": rows, **environment(device)}
        Record(arguments.output).write(report)


if __name__ == "__main__":
    main()
