"""How Gated DeltaNet heads should start: alignment error after 0, 50 and 200 steps for several initialisations.

    python benchmarks/initialisation.py     # the shipped teacher; about half an hour on one CPU core

All start from the teacher's own q, k and v rows and an identity convolution; they differ in decay, writing strength
and output scale. `fla`: flash-linear-attention's own (random decay rates and time steps, random small gates). `naive`:
every parameter of the gates 0, which forgets half of everything at each token. `half-life`: decay from each head's
mean attention distance. `+ entropy`: β from its entropy as well. `+ least squares`: the output's scale as well, which
otherwise makes the output as loud as the teacher's. Errors are squared, over the teacher's mean square, averaged over
all heads, on rows that training does not read.

Writes `initialisation.json`.
"""

import argparse
import math
from pathlib import Path

import torch

from hydrahead.convert.calibration import HeadStatistics, initial_forms, measure_heads
from hydrahead.convert.forms import Forms, HeadForms
from hydrahead.convert.options import student_config
from hydrahead.convert.teachers import open_teacher, read_model
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.data.mixture import mixture_rows
from hydrahead.provenance import Record, environment
from hydrahead.training.align import teacher_heads
from hydrahead.training.loop import Schedule
from hydrahead.training.losses import head_matching_loss

STEPS = (0, 50, 200)
LENGTH = 512
VARIANTS = ("fla", "naive", "half-life", "+ entropy", "+ least squares")


class Study:
    def __init__(self, rows: int):
        self.rows = rows
        teacher = open_teacher("demo")
        self.teacher, self.tokenizer = teacher.load("float32", "cpu"), teacher.tokenizer()
        self.text = encode_corpus(self.tokenizer, load_corpus("train"))
        self.adapter = teacher.adapter
        self.layers, self.heads = self.adapter.num_layers, self.adapter.num_heads
        self.config = student_config(self.adapter, self.adapter.blank_masks, fusion_norm="linear")

    def batch(self, *seed: int) -> torch.Tensor:
        ids, _ = mixture_rows(self.tokenizer, self.text, LENGTH, self.rows, list(seed))
        return torch.from_numpy(ids)

    def forms(self, variant: str, seed: int) -> Forms:
        """Untrained forms under an initialisation."""
        read, ids = read_model(self.teacher), self.batch(seed, 0, 0)
        statistics = measure_heads(self.adapter, read, ids)
        if variant == "half-life":
            statistics = HeadStatistics(statistics.rms, statistics.distance, torch.full_like(statistics.entropy, 0.5))
        forms, generator = {}, torch.Generator().manual_seed(seed)
        for layer in range(self.layers):
            forms |= initial_forms(self.adapter.attention(read, layer), statistics, layer, self.config)
            gates = f"{layer}.linear.gates."
            if variant == "naive":
                for name in ("b_proj.bias", "A_log", "dt_bias"):
                    forms[gates + name] = torch.zeros(self.heads, 1)
            elif variant == "fla":
                # As in fla.layers.GatedDeltaNet: A in (0, 16), time steps log-uniform in [0.001, 0.1], default Linear.
                rates = torch.rand(self.heads, 1, generator=generator) * 16
                span = math.log(0.1) - math.log(0.001)
                steps = torch.exp(torch.rand(self.heads, 1, generator=generator) * span + math.log(0.001))
                forms[gates + "A_log"] = rates.clamp_min(1e-4).log()
                forms[gates + "dt_bias"] = steps + torch.log(-torch.expm1(-steps))
                forms[gates + "b_proj.bias"] = torch.zeros(self.heads, 1)
                bound = self.config.hidden_size**-0.5
                for name in ("a_proj.weight", "b_proj.weight"):
                    shape = forms[gates + name].shape
                    forms[gates + name] = (torch.rand(shape, generator=generator) * 2 - 1) * bound
        if variant == "+ least squares":
            self.fit_scales(forms, ids)
        return forms

    @torch.no_grad()
    def fit_scales(self, forms: Forms, ids: torch.Tensor) -> None:
        """γ of every linear head that brings it nearest to its teacher head."""
        running = HeadForms(self.config, forms)
        for layer, (states, target) in enumerate(teacher_heads(self.teacher, ids)):
            (output,) = running.outputs(layer, states, ("linear",))
            scale = (output * target).sum((0, 1, 3)) / output.square().sum((0, 1, 3))
            forms[f"{layer}.linear.gamma"] = forms[f"{layer}.linear.gamma"] * scale

    @torch.no_grad()
    def error(self, running: HeadForms) -> float:
        """Mean over heads and layers, on rows that are the same for all."""
        losses = []
        for seed in range(4):
            for layer, (states, target) in enumerate(teacher_heads(self.teacher, self.batch(999_983, seed))):
                (output,) = running.outputs(layer, states, ("linear",))
                losses.append(head_matching_loss(output, target).mean())
        return torch.stack(losses).mean().item()

    def train(self, variant: str, seed: int) -> dict[int, float]:
        """Errors by steps done."""
        running = HeadForms(self.config, self.forms(variant, seed))
        parameters = [p for layer in running.layers for p in layer.branches["linear"].parameters()]
        schedule = Schedule(STEPS[-1], learning_rate=6e-3, final_learning_rate=6e-5)
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
        errors = {}
        for step in range(STEPS[-1] + 1):
            if step in STEPS:
                errors[step] = self.error(running)
                print(f"{variant:16} seed {seed} step {step:3} error {errors[step]:.4f}", flush=True)
            if step == STEPS[-1]:
                break
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate_at(step)
            for layer, (states, target) in enumerate(teacher_heads(self.teacher, self.batch(seed, 1, step))):
                (output,) = running.outputs(layer, states, ("linear",))
                head_matching_loss(output, target).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2, help=f"of {LENGTH} tokens in a step")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "initialisation.json")
    arguments = parser.parse_args()
    study = Study(arguments.rows)
    errors = {v: [study.train(v, seed) for seed in range(arguments.seeds)] for v in VARIANTS}
    print(f"\n{'error after':16}" + "".join(f"{step:>20}" for step in STEPS))
    for variant, runs in errors.items():
        cells = [[run[step] for run in runs] for step in STEPS]
        print(f"{variant:16}" + "".join(f"{sum(c) / len(c):10.4f} ({min(c):.3f}-{max(c):.3f})" for c in cells))
    report = {"errors": errors, "tokens_per_step": arguments.rows * LENGTH, **environment()}
    Record(arguments.output).write(report)


if __name__ == "__main__":
    main()
