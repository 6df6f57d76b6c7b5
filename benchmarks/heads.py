"""Which ranking of heads is true? Every method's, by conversion and by mean ablation, in four conditions.

    python benchmarks/heads.py      # the shipped teacher; about an hour on one CPU core

Conditions: full-attention heads without position (`nope`) or with the teacher's rotary embedding (`rope`), both forms
of every head aligned on text three rows in four of which hide needles (`needles`) or on plain text (`plain`). Students
are converted from the aligned heads and not trained any further. Scores are measured on the training text, accuracy
(greedy generation, one and four keys) and text loss on held-out text.

Writes `heads.json` and `../docs/heads.png`.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from hydrahead.configuration_hydrahead import HydraHeadConfig
from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import Forms, HeadForms, linear_heads
from hydrahead.convert.hooks import visited_heads
from hydrahead.convert.migration import convert_model
from hydrahead.convert.options import student_config
from hydrahead.convert.scoring.ablation import constant_heads, mean_heads
from hydrahead.convert.scoring.evidence import Order, as_masks, random_orders, ranking, stability
from hydrahead.convert.scoring.measure import score_heads
from hydrahead.convert.scoring.methods import METHODS
from hydrahead.convert.scoring.probes import Pair, built_in_probes, niah_probe
from hydrahead.convert.scoring.readout import answers_found
from hydrahead.convert.scoring.scores import HeadScores
from hydrahead.convert.search import search_masks
from hydrahead.convert.teachers import open_teacher
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.data.mixture import mixture_rows
from hydrahead.evaluation.figures import plot_conditions
from hydrahead.evaluation.statistics import wilson_interval
from hydrahead.evaluation.text import text_loss
from hydrahead.provenance import Record, environment
from hydrahead.training.align import align_heads
from hydrahead.training.loop import Schedule

POSITIONS = {
    "nope": {"fusion_norm": "linear", "logit_scale_base": 1024},
    "rope": {"fusion_norm": "linear", "full_attention_position": "rope"},
}
DATA = ("needles", "plain")
LENGTH, ROWS, PAIRS = 512, 4, 8
KEPT = {"keep 1/2": 1 / 2, "keep 1/4": 1 / 4, "keep 1/6": 1 / 6}
RANDOM = 5


class Bench:
    """The teacher, its texts, and the two ways to judge a ranking."""

    def __init__(self, prompts: int, steps: int):
        self.steps = steps
        teacher = open_teacher("demo")
        self.teacher, self.tokenizer = teacher.load("float32", Accelerator().device), teacher.tokenizer()
        self.train, self.heldout = (encode_corpus(self.tokenizer, load_corpus(s)) for s in ("train", "heldout"))
        self.adapter = teacher.adapter
        self.layers, self.width = self.adapter.num_layers, self.adapter.num_heads
        self.heads = self.layers * self.width
        self.pairs = self.needles(self.heldout, prompts // 2, seed=7)
        self.text_loss = text_loss(self.teacher, self.heldout, LENGTH, 8)
        self.means = mean_heads(self.teacher, [pair.clean for pair in self.pairs[:4]])

    def needles(self, text: np.ndarray, count: int, seed: int) -> list[Pair]:
        """Pairs with one key and as many with four."""
        probes = (niah_probe(self.tokenizer, text, LENGTH, num_keys=k, num_pairs=count, seed=seed) for k in (1, 4))
        return [pair for probe in probes for pair in probe.pairs]

    def rows(self, first: int) -> list[list[int]]:
        """Four rows of the training text."""
        return self.train[first : first + 4 * LENGTH].reshape(4, LENGTH).tolist()

    def config(self, position: str) -> HydraHeadConfig:
        return student_config(self.adapter, self.adapter.blank_masks, **POSITIONS[position])

    def align(self, data: str) -> Forms:
        """Both forms of every head, without position in the full one."""
        config = self.config("nope")

        def batch_at(step: int) -> torch.Tensor:
            if data == "needles":
                ids, _ = mixture_rows(self.tokenizer, self.train, LENGTH, ROWS, [0, step])
            else:
                starts = np.random.default_rng([0, step]).integers(len(self.train) - LENGTH, size=ROWS)
                ids = np.stack([self.train[start : start + LENGTH] for start in starts])
            return torch.from_numpy(ids)

        start = head_forms_of(self.teacher, batch_at(2**31), config)
        schedule = Schedule(self.steps, learning_rate=6e-3, final_learning_rate=6e-5)
        return align_heads(Accelerator(), self.teacher, config, start, batch_at, schedule)

    def in_position(self, forms: Forms, position: str) -> Forms:
        """The same linear forms beside the full ones of a position: with rotary embedding the teacher's own heads."""
        if position == "nope":
            return forms
        own = head_forms_of(self.teacher, torch.tensor(self.rows(0)[:2]), self.config("rope"))
        return {name: own[name] if ".full." in name else tensor for name, tensor in forms.items()}

    def running(self, forms: Forms, position: str) -> HeadForms:
        return HeadForms(self.config(position), forms).requires_grad_(False)

    def score(self, forms: HeadForms, methods: list[str]) -> HeadScores:
        probes = built_in_probes(self.tokenizer, self.train, LENGTH, PAIRS)
        shared = {"methods": methods, "head_forms": forms, "text_rows": self.rows(0)}
        return score_heads(self.teacher, self.tokenizer, probes, **shared)

    def converted(self, kept: Order, forms: Forms, position: str) -> dict[str, float]:
        """A student's accuracy and text loss beyond the teacher's."""
        masks = as_masks(kept, self.layers, self.width)
        student = convert_model(self.teacher, masks, head_forms=forms, **POSITIONS[position])
        return self.judge(student.to(self.teacher.device))

    def judge(self, model) -> dict[str, float]:
        found = answers_found(model, self.pairs)
        loss = text_loss(model, self.heldout, LENGTH, 8) - self.text_loss
        return {"accuracy": sum(found) / len(found), "text": loss}

    def converted_alone(self, heads: Order, forms: HeadForms) -> dict[str, float]:
        """Some heads replaced by their linear forms, all others the teacher's own."""
        with visited_heads(self.teacher, linear_heads(forms, as_masks(heads, self.layers, self.width))):
            return self.judge(self.teacher)

    def ablated(self, heads: Order) -> dict[str, float]:
        with visited_heads(self.teacher, constant_heads(self.means, as_masks(heads, self.layers, self.width))):
            return self.judge(self.teacher)

    def row(self, order: Order, forms: Forms, running: HeadForms, position: str) -> dict[str, dict]:
        """Everything that is measured of one ranking, best head first."""
        half, tenth = self.heads // 2, round(self.heads / 10)
        row = {
            name: self.converted(order[: round(share * self.heads)], forms, position) for name, share in KEPT.items()
        }
        row["top 10% converted"] = self.converted(order[tenth:], forms, position)
        row["bottom half converted alone"] = self.converted_alone(order[-half:], running)
        row["top 10% converted alone"] = self.converted_alone(order[:tenth], running)
        return row

    def ablations(self, order: Order) -> dict[str, dict]:
        half, tenth = self.heads // 2, round(self.heads / 10)
        return {"bottom half ablated": self.ablated(order[-half:]), "top 10% ablated": self.ablated(order[:tenth])}


def run(prompts: int, steps: int) -> dict:
    bench = Bench(prompts, steps)
    results: dict[str, dict] = {}
    first: HeadScores | None = None
    for data in DATA:
        aligned = bench.align(data)
        for position in POSITIONS:
            started = time.perf_counter()
            forms = bench.in_position(aligned, position)
            running = bench.running(forms, position)
            scores = bench.score(running, ["combined"] if first else list(METHODS))
            if first is None:
                first, ablated = scores, {}
            rankings = {}
            for method in METHODS:
                found = (scores if METHODS[method].needs_forms else first).using(method)
                rankings[method] = ranking(found.scores, found.tie_break)
                if method in ("combined", "replacement", "receiver+sender"):
                    found = replace(found, weights={"language": 0.0}).using(method)
                    rankings[f"{method}, needles only"] = ranking(found.scores, found.tie_break)
            table = {}
            for method, order in rankings.items():
                table[method] = bench.row(order, forms, running, position)
                if METHODS[method.split(",")[0]].needs_forms or method not in ablated:
                    ablated[method] = bench.ablations(order)
                table[method] |= ablated[method]
                show(f"{data} {position}", method, table[method])
            orders = random_orders(scores.scores, RANDOM)
            table["random"] = []
            for index, order in enumerate(orders):
                row = bench.row(order, forms, running, position)
                if f"random {index}" not in ablated:
                    ablated[f"random {index}"] = bench.ablations(order)
                table["random"].append(row | ablated[f"random {index}"])
            show(f"{data} {position}", "random, mean", mean_row(table["random"]))
            table["replacement + exchange"] = exchange(bench, rankings["replacement"], running, forms, position)
            show(f"{data} {position}", "replacement + exchange", table["replacement + exchange"])
            results[f"{data}, {position}"] = {
                "table": table,
                "stability": stability(scores, "replacement"),
                "seconds": time.perf_counter() - started,
            }
    return {
        "results": results,
        "stability": {method: stability(first, method) for method in METHODS},
        "stability, needles only": {
            method: stability(replace(first, weights={"language": 0.0}), method) for method in METHODS
        },
        "warnings": first.warnings,
        "probes": [replace(probe, effects={}, readouts=[]).__dict__ for probe in first.probes],
        "prompts": len(bench.pairs),
        "intact": bench.judge(bench.teacher),
        "interval_of_1": wilson_interval(1.0, len(bench.pairs)),
    }


def exchange(bench: Bench, order: Order, running: HeadForms, forms: Forms, position: str) -> dict[str, dict]:
    """Greedy exchange from the best quarter, judged on pairs and text of the training split."""
    start = as_masks(order[: round(bench.heads / 4)], bench.layers, bench.width)
    pairs, rows = bench.needles(bench.train, 4, seed=3), bench.rows(20_000)
    masks, history = search_masks(bench.teacher, running, start, pairs, rows, max_exchanges=8)
    kept = [(layer, head) for layer, row in enumerate(masks) for head, one in enumerate(row) if one]
    return {"keep 1/4": bench.converted(kept, forms, position), "history": history}


def mean_row(rows: list[dict]) -> dict[str, dict]:
    return {
        name: {key: sum(row[name][key] for row in rows) / len(rows) for key in ("accuracy", "text")}
        for name in rows[0]
    }


def show(condition: str, method: str, row: dict) -> None:
    cells = [f"{name} {cell['accuracy']:.2f}/{cell['text']:+.2f}" for name, cell in row.items() if name != "history"]
    print(f"{condition:13} {method:22} " + "  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="of alignment")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "heads.json")
    arguments = parser.parse_args()
    report = run(arguments.prompts, arguments.steps) | environment()
    Record(arguments.output).write(report)
    tables = {name: result["table"] for name, result in report["results"].items()}
    plot_conditions(tables, list(KEPT), arguments.output.parent.parent / "docs" / "heads.png")


if __name__ == "__main__":
    main()
