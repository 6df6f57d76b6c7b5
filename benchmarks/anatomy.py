"""What are a teacher's heads like, beside what the paper (arXiv 2606.20097) says of Qwen3-1.7B's?

    hydrahead score TEACHER scores-4K --length 4096 --pairs 12 --method receiver --method receiver+sender …
    hydrahead score TEACHER scores-16K --length 16384 …
    python benchmarks/anatomy.py TEACHER scores-4K scores-16K --output anatomy

Score folders, one for each length of prompts, say how few heads carry a capability, whether methods, capabilities and
lengths agree on which, and how stable that is. One forward says how alike layers and heads are: unbiased linear CKA
(arXiv 2010.15327) of what the attention of each layer, and each head, writes at the same positions of a text.

Writes `anatomy.json`, `anatomy.md`, `similarity.png` and, for each length, `capabilities_LENGTH.png`.
"""

import argparse
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from hydrahead.console import one_line_errors
from hydrahead.convert.hooks import record
from hydrahead.convert.scoring.evidence import TOP_SHARE, as_masks, ranking, spearman, stability
from hydrahead.convert.scoring.scores import HeadScores
from hydrahead.convert.teachers import open_teacher
from hydrahead.data.corpus import encode_corpus, load_corpus
from hydrahead.evaluation.figures import plot_head_maps, plot_similarity
from hydrahead.files import atomic_file, read_utf8
from hydrahead.provenance import Record, digest, environment

TOKENS, POSITIONS = 4096, 1024  # of the text that similarity is measured on, and how many of them
CRITICAL = 0.1  # of the best head's score; the paper does not say what it calls critical
PAPER = {"critical": 0.065, "convertible": 0.908, "gini": 0.62, "rho of 6 pairs": 0.92}


def gini(values: np.ndarray) -> float:
    """Of non-negative numbers: 0 where all are equal, towards 1 where one has everything."""
    ordered = np.sort(values.clip(0), axis=None)
    places = np.arange(1, ordered.size + 1)
    return float((2 * places - ordered.size - 1) @ ordered / max(ordered.size * ordered.sum(), 1e-12))


def cka(features: torch.Tensor) -> torch.Tensor:
    """
    Unbiased linear CKA of every two of `N` things, `[N, N]`: about 0 for unrelated ones at any width, 1 for one and
    itself, whatever turns and scales it.

    Args:
        features: `[N, T, D]` at the same `T` positions.
    """
    count = features.shape[1]
    grams = []
    for each in features.double():
        gram = each @ each.mT
        gram.fill_diagonal_(0)
        rows = gram.sum(0) / (count - 2)
        gram -= rows[:, None] + rows[None, :] - gram.sum() / ((count - 1) * (count - 2))
        grams.append(gram.fill_diagonal_(0).flatten().float())
    flat = torch.stack(grams)
    products = flat @ flat.mT
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms)


@torch.no_grad()
def similarity(teacher, ids: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """CKA of what layers `[L, L]` and heads `[L · H, L · H]` write."""
    positions = slice(-POSITIONS, None)
    found = record(teacher, ids, positions)  # the last ones have something to look at
    layers = cka(found.attention.to(device)).cpu()
    heads = cka(found.heads.transpose(1, 2).flatten(0, 1).to(device)).cpu()
    return layers, heads


def means(layers: torch.Tensor, heads: torch.Tensor, groups: int) -> dict[str, float | None]:
    """Of what `similarity` gives: means by how near two are, and how far away each head's most similar one is."""
    depth, width = len(layers), len(heads) // len(layers)
    layer = torch.arange(depth * width) // width
    group = torch.arange(depth * width) // (width // groups)
    itself = torch.eye(depth * width, dtype=torch.bool)
    apart = (layer[:, None] - layer).abs()
    nearest = apart.gather(1, heads.masked_fill(itself, -1).argmax(1, keepdim=True))
    pairs = {
        "heads of one KV group": heads[(group[:, None] == group) & ~itself],
        "other heads of one layer": heads[(apart == 0) & (group[:, None] != group)],
        "heads of neighbouring layers": heads[apart == 1],
        "heads of layers further apart": heads[apart > 1],
        "neighbouring layers": layers.diagonal(1),
        "layers further apart": layers[torch.ones_like(layers).triu(2).bool()],
        "share of heads whose most similar head is in another layer": (nearest > 0).float(),
    }
    return {name: float(values.mean()) if len(values) else None for name, values in pairs.items()}


def best(scores: HeadScores) -> set:
    """The best eighth of all heads."""
    order = ranking(scores.scores, scores.tie_break)
    return set(order[: max(1, round(TOP_SHARE * len(order)))])


def agreement(one: HeadScores, other: HeadScores) -> dict:
    """Of two rankings: Spearman over the heads that take part in either, and the overlap of their best eighths."""
    part = torch.from_numpy(one.active() | other.active())
    values = (torch.tensor(each.scores)[part] for each in (one, other))
    shared = len(best(one) & best(other)) / len(best(one))
    return {"rho": spearman(*values), "overlap": shared, "heads": int(part.sum())}


def few(scores: HeadScores) -> dict:
    """How few heads a ranking calls for."""
    values = np.nan_to_num(np.array(scores.scores))
    return {
        "critical": float((values > CRITICAL * values.max()).mean()),
        "convertible": float(1 - scores.active().mean()),
        "gini": gini(values),
        "stability": stability(scores, scores.method),
    }


def alone(scores: HeadScores, capability: str) -> HeadScores:
    """The ranking by one capability."""
    weights = {name: float(name == capability) for name in scores.capabilities}
    return replace(scores, weights=weights).using(scores.method)


def anatomy(files: dict[int, HeadScores]) -> dict:
    """All that score files of one teacher, by length, say."""
    found: dict[str, dict] = {"few": {}, "capabilities": {}, "methods": {}, "lengths": {}}
    for length, scores in files.items():
        by_method = {method: scores.using(method) for method in scores.methods()}
        by_name = {name: alone(scores, name) for name in scores.capabilities}
        found["few"][length] = {method: few(ranked) for method, ranked in by_method.items()}
        for kind, rankings in (("methods", by_method), ("capabilities", by_name)):
            pairs = combinations(rankings, 2)
            found[kind][length] = {f"{a} / {b}": agreement(rankings[a], rankings[b]) for a, b in pairs}
    for (short, one), (long, other) in combinations(files.items(), 2):
        shared = [method for method in one.methods() if method in other.methods()]
        found["lengths"][f"{short} / {long}"] = {
            method: agreement(one.using(method), other.using(method)) for method in shared
        }
    return found


def page(report: dict) -> str:
    """Tables of a report, in Markdown."""

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    lines = [f"# The heads of {report['teacher']}", ""]
    lines += ["| length | method | critical | convertible | Gini | halves agree, by pairs |"]
    lines += ["| ---: | --- | ---: | ---: | ---: | --- |"]
    for length, by_method in report["few"].items():
        for method, row in by_method.items():
            halves = [f"{count}: {number(each['rho'], '.2f')}" for count, each in row["stability"].items()]
            shares = f"{row['critical']:.1%} | {row['convertible']:.1%} | {row['gini']:.2f}"
            lines += [f"| {length:,} | {method} | {shares} | {', '.join(halves)} |"]
    shares = f"{PAPER['critical']:.1%} | {PAPER['convertible']:.1%} | {PAPER['gini']:.2f}"
    lines += [f"| | the paper, Qwen3-1.7B | {shares} | 6: {PAPER['rho of 6 pairs']:.2f} |", ""]
    lines += [
        f"Critical: a score above {CRITICAL:g} of the best head's. Convertible: an effect of 0.01 or less in every",
        "variant. The paper does not say where it draws these lines. Halves: Spearman of two halves of so many pairs.",
        "",
    ]
    for name, what in (("methods", "Methods"), ("capabilities", "Capabilities"), ("lengths", "Lengths")):
        rows = [(where, pair, each) for where, pairs in report[name].items() for pair, each in pairs.items()]
        if not rows:
            continue
        lines += [f"{what} that rank heads alike: Spearman over those that take part, and what best eighths share."]
        lines += ["", "| | | Spearman | shared |", "| ---: | --- | ---: | ---: |"]
        for where, pair, each in rows:
            lines += [f"| {where} | {pair} | {number(each['rho'], '.2f')} | {each['overlap']:.0%} |"]
        lines += [""]
    lines += [f"Similarity (unbiased linear CKA, {report['positions']:,} positions of {report['text']}):", ""]
    lines += ["| | mean |", "| --- | ---: |"]
    lines += [f"| {name} | {number(value, '.3f')} |" for name, value in report["similarity"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="Hub id, folder or GGUF file")
    parser.add_argument("scores", nargs="*", type=Path, help="folders of hydrahead score, each of another length")
    parser.add_argument("--text", type=Path, help="UTF-8 text for the similarity; else Python's standard library")
    parser.add_argument("--device", help="cpu, cuda, …")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/anatomy"))
    options = parser.parse_args()
    files = {}
    opened, made_from = open_teacher(options.teacher), {}
    shape = (opened.adapter.num_layers, opened.adapter.num_heads)
    for file in (folder / "head_scores.json" for folder in options.scores):
        scores = HeadScores.load(file)
        if (scores.teacher, np.shape(scores.scores)) != (opened.public_name, shape):
            raise ValueError(f"{file}: scores of {scores.teacher}, expected those of {opened.public_name}")
        files[scores.made_from["length"]], made_from[file.parent.name] = scores, digest(file)
    if len(files) < len(options.scores):
        raise ValueError("scores: two folders are of the same length; expected one for each")
    teacher, tokenizer = opened.load(options.dtype, options.device), opened.tokenizer()
    documents = load_corpus("heldout") if options.text is None else [read_utf8(options.text)]
    ids = encode_corpus(tokenizer, documents)[: min(TOKENS, opened.adapter.config.max_position_embeddings)].tolist()
    layers, heads = similarity(teacher, ids, options.device or "cpu")
    alike = {"similarity": means(layers, heads, opened.adapter.num_kv_heads), "layers": layers.tolist()}
    text = options.text.name if options.text else "the Python standard library"
    report = {"teacher": opened.public_name, "revision": opened.revision, "dtype": options.dtype, "text": text}
    report |= {"positions": min(POSITIONS, len(ids)), "scores": made_from, **anatomy(files), **alike}
    options.output.mkdir(parents=True, exist_ok=True)
    Record(options.output / "anatomy.json").write(report | environment(options.device))
    with atomic_file(options.output / "anatomy.md") as partial:
        partial.write_text(page(report), encoding="utf-8")
    title = f"{report['teacher']}: how alike what they write is, CKA"
    plot_similarity(layers.tolist(), heads.tolist(), title, options.output / "similarity.png")
    for length, scores in files.items():
        masks = {name: as_masks(list(best(alone(scores, name))), *shape) for name in scores.capabilities}
        title = f"{report['teacher']}, {length:,} tokens: {scores.method} score by capability; framed: the best eighth"
        plot_head_maps(scores.capabilities, masks, title, options.output / f"capabilities_{length}.png")
    print(page(report))


if __name__ == "__main__":
    with one_line_errors():
        main()
