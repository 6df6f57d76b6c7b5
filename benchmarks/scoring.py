"""What scoring costs: receivers, senders and the replacement effect, in plain forwards, beside the naive way.

    python benchmarks/scoring.py                               # CPU, the shipped teacher, real needles
    python benchmarks/scoring.py --device cuda --shape 1.7b    # a GPU, Qwen3-1.7B's shape, random weights and tokens

Writes `scoring-<device>.json` beside itself, with the cost that operation counts give for Qwen3-1.7B, 8B and 32B at
4,096 tokens. Time does not depend on the values of the weights; how many senders a real teacher's rounds find does.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hydrahead.convert.calibration import head_forms_of
from hydrahead.convert.forms import HeadForms
from hydrahead.convert.hooks import record, visited_heads
from hydrahead.convert.options import student_config
from hydrahead.convert.scoring.evidence import spearman
from hydrahead.convert.scoring.measure import score_heads
from hydrahead.convert.scoring.probes import Pair, Probe, niah_probe
from hydrahead.convert.scoring.readout import answer_positions, first_change, readout, readout_direction
from hydrahead.convert.scoring.receivers import receiver_effects
from hydrahead.convert.scoring.recompute import HeadReader
from hydrahead.convert.scoring.replacement import answer_effects, answer_estimates
from hydrahead.convert.scoring.senders import sender_effects
from hydrahead.convert.teachers import adapter_for, open_teacher
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.provenance import Record, environment
from hydrahead.training.quick import quick_forms

QWEN3_17B = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
}  # fmt: skip
# layers, hidden, intermediate, query heads, KV heads, head size
SHAPES = {
    "Qwen3-1.7B": (28, 2048, 6144, 16, 8, 128),
    "Qwen3-8B": (36, 4096, 12288, 32, 8, 128),
    "Qwen3-32B": (64, 5120, 25600, 64, 8, 128),
}
PAIRS, ANSWER, SHORTLIST, ROUNDS, SWAPS = 8, 8, 32, 2, 6
RECEIVER_SHARE = 0.065  # of all heads, as the paper reports, where random weights have no receivers of their own


def forward_flops(layers, hidden, inner, heads, kv_heads, dim, tokens) -> float:
    """Of one forward without the language-model head; attention over half of all pairs of positions."""
    weights = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
    return layers * (2 * weights * tokens + 2 * tokens**2 * heads * dim)


def extrapolate(shape, tokens: int) -> dict[str, float]:
    """
    Costs in plain forwards of `tokens` tokens for one pair.

    Senders: the shortlist is spread evenly over the layers below receivers at two thirds of the depth, the first
    changed token stands in the middle of the text; a round records anew, and estimates on two of eight pairs.
    """
    layers, hidden, inner, heads, _, dim = shape
    forward = forward_flops(*shape, tokens)
    mlp = 6 * hidden * inner  # of one token in one layer
    output = 2 * heads * dim * hidden
    replay = heads * ANSWER * (mlp * layers * (layers + 1) / 2 + output * layers)
    reach = layers * 2 / 3
    path = tokens / 2 * mlp * reach
    rounds = ROUNDS * (2 * forward + SHORTLIST * path / 2 + 4 * path * 2 / PAIRS)
    swap = 2 * heads * (layers + 1) / 2  # both forms of every head enter at their layer
    return {
        "forward_tflop": forward / 1e12,
        "receivers": 2 + replay / forward,
        "senders": rounds / forward,
        "replacement": swap,
        "naive": heads * layers,
    }


def random_pairs(vocab: int, length: int) -> list[Pair]:
    """Pairs of random tokens that differ in eight tokens halfway."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(PAIRS):
        clean, answer, wrong = (
            rng.integers(100, vocab, count).tolist() for count in (length - ANSWER, ANSWER, ANSWER)
        )
        middle = length // 2
        corrupt = [*clean[:middle], *rng.integers(100, vocab, ANSWER).tolist(), *clean[middle + ANSWER :]]
        pairs.append(Pair(clean + answer, corrupt + answer, len(clean), answer, wrong))
    return pairs


def load(shape: str, device: str, length: int) -> tuple[PreTrainedModel, list[Pair]]:
    """Teacher and pairs."""
    if shape == "1.7b":
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_17B, dtype="bfloat16")).to(torch.bfloat16).eval()
        model.requires_grad_(False)
        return model, random_pairs(QWEN3_17B["vocab_size"], length)
    teacher = open_teacher("demo")
    model, tokenizer = teacher.load("float32", device), teacher.tokenizer()
    text = encode_corpus(tokenizer, load_corpus("heldout"))
    return model, list(niah_probe(tokenizer, text, length, num_keys=4, num_pairs=PAIRS).pairs)


def clock(device: str, action: Callable[[], object]) -> tuple[float, float]:
    """Seconds and, on a GPU, peak GiB of what it does."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**30  # 0 where there is none


@torch.no_grad()
def naive_receivers(model: PreTrainedModel, pair: Pair) -> torch.Tensor:
    """Drops `[L, H]` by one forward per head over the whole text, later attention frozen."""
    everywhere, direction = slice(0, len(pair.clean)), readout_direction(model, pair)
    clean, corrupt = (record(model, ids, everywhere) for ids in (pair.clean, pair.corrupt))
    answer, frozen = answer_positions(pair), {"above": len(clean.heads)}
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(
            lambda _, args, output, index=index: clean.attention[index][None] if index > frozen["above"] else output
        )
        for index, layer in enumerate(model.model.layers)
    ]
    intact, drops = readout(clean.states[answer], direction), torch.empty(clean.heads.shape[0], clean.heads.shape[2])
    for layer in range(drops.shape[0]):
        frozen["above"] = layer
        for head in range(drops.shape[1]):

            def patch(index, _, heads, layer=layer, head=head):
                if index == layer:
                    heads = heads.clone()
                    heads[0, answer, head] = corrupt.heads[layer, answer, head]
                return heads

            with visited_heads(model, patch):
                states = model.model(
                    torch.tensor([pair.clean], device=model.device), use_cache=False
                ).last_hidden_state
            drops[layer, head] = intact - readout(states[0, answer], direction)
    for hook in hooks:
        hook.remove()
    return drops


def measure(model: PreTrainedModel, pairs: list[Pair], device: str, repeats: int, naive: bool) -> dict:
    """Seconds and peak memory for one pair, median over pairs and repeats, interleaved."""
    timed, reader, adapter = partial(clock, device), HeadReader(model), adapter_for(model.config)
    heads = adapter.num_layers * adapter.num_heads
    found = [receiver_effects(model, pair) for pair in pairs]
    effects = torch.stack([one.drops / (one.clean - one.corrupt) for one in found]).clamp(0, 1).mean(0)
    count = max(2, round(RECEIVER_SHARE * heads))
    order = effects.flatten().argsort(descending=True)[:count].tolist()
    receivers = [(place // adapter.num_heads, place % adapter.num_heads) for place in order]
    first_round = sender_effects(reader, pairs[:2], [1.0] * 2, receivers, 0.01, SHORTLIST, rounds=1).mean(0)
    # What makes a quarter of the shortlist pass, so that there is a second round whatever the weights.
    threshold = first_round.flatten().sort(descending=True).values[SHORTLIST // 4].clamp_min(1e-9).item()

    def plain(pair: Pair) -> None:
        with torch.no_grad():
            for ids in (pair.clean, pair.corrupt):
                model.model(torch.tensor([ids], device=model.device), use_cache=False)

    def senders() -> None:
        sender_effects(reader, pairs, [1.0] * len(pairs), receivers, threshold, SHORTLIST, ROUNDS)

    plain(pairs[0])
    times: dict[str, list[tuple[float, float]]] = {"two plain forwards": [], "receivers": []}
    for _ in range(repeats):
        for pair in pairs:
            times["two plain forwards"].append(timed(partial(plain, pair)))
            times["receivers"].append(timed(partial(receiver_effects, model, pair)))
    seconds, peak = timed(senders)
    times["receivers + senders"] = [(seconds / len(pairs) + statistics.median(t for t, _ in times["receivers"]), peak)]
    if naive:
        times["naive receivers"] = [timed(partial(naive_receivers, model, pairs[0]))]
        exact = receiver_effects(model, pairs[0]).drops
        times["naive receivers, difference"] = [((naive_receivers(model, pairs[0]) - exact).abs().max().item(), 0.0)]
    config = student_config(adapter, adapter.blank_masks, fusion_norm="linear")
    ids = torch.tensor([pairs[0].clean[:512], pairs[1].clean[:512]])
    forms = HeadForms(config, head_forms_of(model, ids, config)).to(device).requires_grad_(False)
    wanted = {(layer, 0) for layer in range(0, adapter.num_layers, max(1, adapter.num_layers // SWAPS))}
    answer_effects(model, forms, pairs[0], {(0, 0)})  # kernels are tuned when they first run
    answer_estimates(model, forms, pairs[0])
    part = timed(partial(answer_effects, model, forms, pairs[0], wanted))
    whole = None if device == "cuda" else timed(partial(answer_effects, model, forms, pairs[0]))
    times[f"replacement, {len(wanted)} heads"] = [part]
    times["replacement, all heads"] = [whole or (part[0] * heads / len(wanted), part[1])]
    times["replacement, estimates"] = [timed(partial(answer_estimates, model, forms, pairs[0]))]
    return {
        name: {"seconds": statistics.median(t for t, _ in values), "peak_gib": max(p for _, p in values)}
        for name, values in times.items()
    } | {"receivers_used": len(receivers), "first_change_share": first_change(pairs[0]) / len(pairs[0].clean)}


def shortlist_errors(model: PreTrainedModel, pairs: list[Pair], tokenizer, text: np.ndarray, steps: int) -> dict:
    """What the cheap forms miss: shortlisted against exact replacement effects and senders, on real needles."""
    adapter = adapter_for(model.config)
    options = {"fusion_norm": "linear", "logit_scale_base": 1024}
    tensors = quick_forms(model, tokenizer, text, options, steps)
    config = student_config(adapter, adapter.blank_masks, **options)
    forms = HeadForms(config, tensors).to(model.device).requires_grad_(False)
    probe = [Probe("needles", "retrieval", tuple(pairs))]
    shared = {"head_forms": forms, "text_rows": [text[index : index + 512].tolist() for index in (0, 9999)]}
    exact = score_heads(model, None, probe, **shared)
    everyone = adapter.num_layers * adapter.num_heads
    found: dict[str, dict] = {"replacement": {}, "senders": {}}
    for count in (everyone // 8, everyone // 4, everyone // 2):
        short = score_heads(model, None, probe, shortlist=count, **shared)
        one, other = (torch.tensor(scores.scores).flatten() for scores in (exact, short))
        best = [set(values.argsort(descending=True)[: everyone // 4].tolist()) for values in (one, other)]
        found["replacement"][count] = {
            "spearman": spearman(one, other),
            "overlap_of_best_quarter": len(best[0] & best[1]) / len(best[0]),
            "seconds_over_exact": short.seconds["replacement"] / exact.seconds["replacement"],
        }
    exact = score_heads(model, None, probe, methods=["sender"], sender_shortlist=everyone)
    effect = exact.probes[0].effect("sender")
    for count in (everyone // 8, everyone // 4, everyone // 2):
        short = score_heads(model, None, probe, methods=["sender"], sender_shortlist=count)
        missed = (effect - short.probes[0].effect("sender")).flatten()
        found["senders"][count] = {
            "senders": int((effect > 0.01).sum()),
            "missed": int(((effect > 0.01).flatten() & (missed > 0.005)).sum()),
            "largest_missed": missed.max().item(),
            "seconds_over_exact": short.seconds["sender"] / exact.seconds["sender"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=("demo", "1.7b"), default="demo")
    parser.add_argument("--length", type=int, help="tokens of a text; 1,024 for the demo's teacher, else 4,096")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--align-steps", type=int, default=50, help="for the shortlists' errors, with the demo's")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    length = arguments.length or (1024 if arguments.shape == "demo" else 4096)
    model, pairs = load(arguments.shape, arguments.device, length)
    demo = arguments.shape == "demo"
    measured = measure(model, pairs, arguments.device, arguments.repeats, naive=demo)

    plain = measured["two plain forwards"]["seconds"]
    print(f"{'per pair':34} {'seconds':>9} {'x 2 plain forwards':>20} {'peak GiB':>9}")
    for name, entry in measured.items():
        if isinstance(entry, dict):
            print(f"{name:34} {entry['seconds']:9.4f} {entry['seconds'] / plain:20.2f} {entry['peak_gib']:9.2f}")
    print(f"\n{'by operation count, forwards':34} " + " ".join(f"{name:>12}" for name in SHAPES))
    computed = {name: extrapolate(shape, 4096) for name, shape in SHAPES.items()}
    for key in next(iter(computed.values())):
        print(f"{key:34} " + " ".join(f"{entry[key]:12.2f}" for entry in computed.values()))

    errors = {}
    if demo:
        tokenizer = open_teacher("demo").tokenizer()
        text = encode_corpus(tokenizer, load_corpus("train"))
        short = list(niah_probe(tokenizer, text, 512, num_keys=4, num_pairs=4).pairs)
        errors = shortlist_errors(model, short, tokenizer, text, arguments.align_steps)
        print("\n" + json.dumps(errors, indent=1))
    report = {
        "shape": arguments.shape,
        "length": length,
        "pairs": PAIRS,
        "measured": measured,
        "shortlist_errors": errors,
        "computed_at_4096": computed,
        **environment(arguments.device),
    }
    output = arguments.output or Path(__file__).parent / f"scoring-{arguments.device}.json"
    Record(output).write(report)
    print(f"\nwritten to {output.name}")


if __name__ == "__main__":
    main()
