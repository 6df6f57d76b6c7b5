"""Which heads a student keeps, what for and on what evidence: a section of its card, and a page of its own."""

from collections.abc import Mapping
from pathlib import Path

from ..evaluation.figures import plot_head_map, plot_knockout
from ..evaluation.markdown import escaped, table
from .facts import Facts

PAGE = "heads.md"
REPLACED = {"ablation": "writing their mean", "conversion": "replaced by their linear forms"}


def pictures(facts: Facts) -> dict[str, str]:
    """Of the heads, what there is to be drawn: names of files and what they show."""
    if not facts.scored:
        return {}
    shown = {"head_map.png": "Score of every head, those that stay full attention framed"}
    for kind, curves in facts.scored.get("knockout", {}).items():
        if curves:
            shown[f"knockout_{kind}.png"] = f"Accuracy when heads are knocked out, {REPLACED.get(kind, kind)}"
    return shown


def draw_heads(facts: Facts, folder: Path) -> None:
    """Draw `pictures` into a folder, and remove those of other scores."""
    for path in (folder / "head_map.png", *folder.glob("knockout_*.png")):
        path.unlink(missing_ok=True)
    scored, teacher = facts.scored, facts.made_from["teacher"]
    if scored:
        title = f"{teacher}: {scored['method']} score"
        plot_head_map(scored["scores"], facts.config.head_masks, title, folder / "head_map.png")
    for kind, curves in scored.get("knockout", {}).items():
        if curves:
            title = f"{teacher}: accuracy by generation, heads {REPLACED.get(kind, kind)}"
            plot_knockout(curves, title, folder / f"knockout_{kind}.png")


def chosen_heads(facts: Facts) -> list[tuple[int, int]]:
    """Layer and number of every full-attention head."""
    return [
        (layer, head) for layer, row in enumerate(facts.config.head_masks) for head in range(len(row)) if row[head]
    ]


def _speaks(score: float | None) -> bool:
    return score is not None and score > 0  # without a finite effect there is none


def heads_section(facts: Facts) -> list[str]:
    """The section of the card, paragraph by paragraph."""
    choice, scored, heads = facts.made_from["masks"], facts.scored, chosen_heads(facts)
    if not scored and not choice.get("by_score", True):
        return [_how_chosen(choice, {})]
    if not scored and "method" not in choice:
        return [
            "Which heads stay full attention was given by hand, or in a file that does not say how they were chosen."
        ]
    parts = [_how_chosen(choice, scored)]
    if not scored:  # masks from before they took their scores along
        words = f"{choice['without_evidence']} of the {choice['kept']} chosen heads score 0 or less: what was measured"
        return [
            *parts,
            f"**Without evidence:** {words} speaks no more for them than against them. "
            "The scores are not recorded here.",
        ]
    parts += [f"![{words}]({name})" for name, words in pictures(facts).items() if name == "head_map.png"]
    if scored.get("probes"):
        parts += ["Capabilities that the heads were scored for:", table(_capabilities(facts))]
    missing = [name for name in scored.get("not_probed", ()) if name not in scored["capabilities"]]
    words = f"**Never probed:** {', '.join(map(escaped, [*missing, 'whatever else the teacher can do']))}. "
    words += "What no probe asked for may have lost its heads without anybody noticing."
    without = sum(not _speaks(scored["scores"][layer][head]) for layer, head in heads)
    if without:
        words += f" **Without evidence:** {without} of the {len(heads)} chosen heads score 0 or less: what was"
        words += " measured speaks no more for them than against them."
    else:
        words += f" All {len(heads)} chosen heads score above 0."
    parts += [words]
    parts += [line for line in [_stability(scored)] if line]
    parts += [f"![{words}]({name})" for name, words in pictures(facts).items() if name != "head_map.png"]
    if scored.get("warnings"):
        parts += ["Warnings of the scoring:\n\n" + "\n".join(f"- {escaped(line)}" for line in scored["warnings"])]
    layer, head = heads[0] if heads else (0, 0)
    return [*parts, f"Why head {layer}.{head} stays, and every other one: [{PAGE}]({PAGE})."]


def _how_chosen(choice: Mapping, scored: Mapping) -> str:
    if choice.get("by_score", True):
        words = f"Chosen by their {escaped(choice.get('method') or scored['method'])} score"
    else:
        words = "Chosen without regard to scores, as a control"
    if "strategy" in choice:
        words += f", strategy {escaped(choice['strategy'])}, {choice['ratio']:g} of {escaped(choice['budget_unit'])}"
    for name, done in (("keep", "kept"), ("drop", "converted")):
        if choice.get(name):
            words += f"; {done} by name: {escaped(', '.join(choice[name]))}"
    if choice.get("improved_by"):
        words += f"; then improved by {choice['improved_by']['exchanges']} greedy exchanges"
    made = scored.get("measured_on", {})
    if made.get("length"):
        words += f". Measured on prompts of {made['length']:,} tokens in {escaped(made['text'])}"
    return words + "."


def _capabilities(facts: Facts) -> list[list[str]]:
    """One row a capability: its probes, what counted, and how many of the chosen heads it speaks for."""
    scored, heads = facts.scored, chosen_heads(facts)
    rows = [["capability", "probes", "pairs that count", "answered by the teacher", "chosen heads it speaks for"]]
    for name in dict.fromkeys(probe["capability"] for probe in scored["probes"]):
        probes = [probe for probe in scored["probes"] if probe["capability"] == name]
        scores = scored["capabilities"].get(name)
        pairs = sum(probe["pairs"] for probe in probes)
        names = ", ".join(dict.fromkeys(probe["name"] for probe in probes))
        count = "not scored: no pair counts"
        if scores is not None:
            count = f"{sum(_speaks(scores[layer][head]) for layer, head in heads)} of {len(heads)}"
        # One that counts although the teacher wrote no answer is not asked for any: text that is only continued.
        asked = [probe for probe in probes if probe["answered"] or not probe["used"]]
        answers = f"{sum(probe['answered'] for probe in asked)} of {sum(probe['pairs'] for probe in asked)}"
        used = sum(probe["used"] for probe in probes)
        rows.append([name, names, f"{used} of {pairs}", answers if asked else "not asked", count])
    return rows


def _stability(scored: Mapping) -> str:
    """How well halves of the pairs agree on the ranking, in words; nothing where it was not measured."""
    found = scored.get("stability", {}).get(scored["method"], {})
    most = found[max(found, key=int)] if found else {}
    if most.get("rho") is None:
        return ""
    return (
        f"Rankings by halves of {max(found, key=int)} pairs of each probe agree with Spearman {most['rho']:.2f} "
        f"({most['rho_low']:.2f} to {most['rho_high']:.2f}, 95% of the splits) over {most['heads']} heads."
    )


def heads_page(facts: Facts) -> str | None:
    """Every full-attention head with its scores, best first, as Markdown; `None` where nothing was scored."""
    scored, choice = facts.scored, facts.made_from["masks"]
    if not scored:
        return None
    names = list(scored["capabilities"])
    ranked = sorted(chosen_heads(facts), key=lambda place: -(scored["scores"][place[0]][place[1]] or 0.0))
    rows = [["head", "score", *names, "stays because"]]
    for layer, head in ranked:
        values = [scored["scores"][layer][head], *(scored["capabilities"][name][layer][head] for name in names)]
        because = ", ".join(name for name, value in zip(names, values[1:]) if _speaks(value)) or "nothing measured"
        if f"{layer}.{head}" in choice.get("keep", ()):
            because += "; kept by name"
        shown = ["–" if value is None else f"{value:.3f}".replace("-0.000", "0.000") for value in values]
        rows.append([f"{layer}.{head}", *shown, because])
    return (
        "\n\n".join(
            [
                "# Why these heads stay full attention",
                f"LAYER.HEAD, counted from 0, with the {escaped(scored['method'])} score that ranked it and the "
                "capabilities that the score is made of. 1 is a head's that is best at everything by every score; 0 "
                "or less means that what was measured speaks no more for the head than against it, which stays to "
                "meet the budget or the strategy. `replacement` is what a head's linear form loses beyond its "
                "full-attention form, when each takes its place in the otherwise intact teacher, `receiver+sender` "
                "the paper's effect on the answer, `combined` the mean of the two; docs/method.md of hydrahead "
                "describes every method.",
                table(rows),
            ]
        )
        + "\n"
    )
