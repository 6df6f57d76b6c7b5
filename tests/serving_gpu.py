"""
Greedy tokens of vLLM against those of transformers, on one GPU, from a HydraHead checkpoint.

    python tests/serving_gpu.py FOLDER                              # every part that the file of results does not hold
    python tests/serving_gpu.py FOLDER reference graphs --again     # these parts, whether it holds them or not

Each part runs in a process of its own and is written as soon as it is done. `reference` comes first: transformers'
tokens, with the logits of the best five at every step. The others give each prompt's first token that differs and its
margin, by how much transformers preferred its own; in bf16 close calls differ, so a part fails where a margin is wide.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from hydrahead.console import one_line_errors
from hydrahead.files import atomic_file, read_json
from hydrahead.provenance import digest, environment

PROMPTS, SHORTEST, LONGEST = 32, 16, 8192
EDGES = 8  # prompts that end shortly before the end of a page
BEST = 5  # logits kept of every step
WIDE = 0.5  # of logits around 16 to 32, whose neighbours in bf16 are 1/8 apart
PARTS = {  # what each does, and the most minutes it is to take on an H100: set, not measured
    "reference": ("transformers, prompt by prompt", 9),
    "graphs": ("vLLM, all prompts at once, with CUDA graphs", 4),
    "eager": ("the same without compiler and CUDA graphs", 3),
    "chunked": ("prompts read 512 tokens at a time, beside others that generate", 4),
    "arrivals": ("prompts that come one by one, into a cache too small for them: some are preempted", 4),
    "prefix": ("prefix caching, all prompts twice", 5),
}


def prompts_of(folder: Path, config, new_tokens: int) -> dict[str, list[list[int]]]:
    """Token ids: `mixed` of lengths from 16 to 8K, `edges` that end 8 tokens before the end of a page of KV cache."""
    import numpy as np
    from transformers import AutoTokenizer

    from hydrahead.serving.heads import Pages

    page, room = Pages.of(config).tokens, config.max_position_embeddings - new_tokens
    lengths = np.geomspace(SHORTEST, min(LONGEST, room), PROMPTS).astype(int).tolist()
    edge = page - EDGES if EDGES < page <= room else 0  # for models whose positions end before a page does: none
    if any(folder.glob("tokenizer*")):
        pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
        text = "\n".join(file.read_text() for file in pages)
        ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False, verbose=False).input_ids
    else:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, 2**16).tolist()
    longest = max([*lengths, edge])
    ids *= -(-2 * longest // len(ids))
    starts = np.linspace(0, len(ids) - longest, PROMPTS + EDGES).astype(int).tolist()
    return {
        "mixed": [ids[start : start + length] for start, length in zip(starts, lengths)],
        "edges": [ids[start : start + edge] for start in starts[PROMPTS:] if edge],
    }


def reference(folder: Path, prompts: dict, new_tokens: int, attention: str) -> dict:
    """For every prompt its continuation, and of each step the ids and logits of the best tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from hydrahead.kernels import use_tuned_kernels

    use_tuned_kernels()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention).cuda()
    model.generation_config.eos_token_id = None  # all continuations are equally long
    found = {}
    for kind, rows in prompts.items():
        found[kind] = []
        for row in rows:
            ids = torch.tensor([row], device="cuda")
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.cat(output.logits).float().topk(BEST)
            found[kind].append(
                {
                    "prompt_tokens": len(row),
                    "tokens": output.sequences[0, len(row) :].tolist(),
                    "best": best.indices.tolist(),
                    "logits": best.values.tolist(),
                }
            )
            print(f"{kind} prompt of {len(row)} tokens", flush=True)
    return found


def first_difference(expected: dict, tokens: list[int]) -> dict | None:
    """
    Where a continuation leaves that of transformers: the step, both tokens and the margin; `None` where it does not.

    The margin is at least what stands there if the token is not among the best that were kept (`is_bound`).
    """
    for step, (one, other) in enumerate(zip(expected["tokens"], tokens, strict=True)):
        if one != other:
            best = dict(zip(expected["best"][step], expected["logits"][step]))
            margin = best[one] - best.get(other, min(best.values()))
            return {"step": step, "expected": one, "given": other, "margin": margin, "is_bound": other not in best}
    return None


def compared(expected: list[dict], given: list[list[int]]) -> dict:
    """How many continuations are equal, and the first difference of each other one."""
    found = [first_difference(row, tokens) for row, tokens in zip(expected, given, strict=True)]
    differences = [
        {"prompt_tokens": row["prompt_tokens"], **difference}
        for row, difference in zip(expected, found)
        if difference is not None
    ]
    widest = max((difference["margin"] for difference in differences), default=0.0)
    return {"prompts": len(found), "equal": found.count(None), "widest_margin": widest, "differences": differences}


def generate(engine, prompts: list[list[int]], new_tokens: int, every: int = 0) -> list[list[int]]:
    """Greedy continuations; one prompt comes after every so many steps of the engine, or all at once."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    options = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    waiting, done, steps = list(enumerate(prompts)), {}, 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (steps >= every * waiting[0][0] or not engine.has_unfinished_requests()):
            index, ids = waiting.pop(0)
            engine.add_request(str(index), TokensPrompt(prompt_token_ids=ids), options)
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
    return [done[index] for index in range(len(prompts))]


def served(folder: Path, part: str, prompts: dict, expected: dict, config, new_tokens: int) -> dict:
    """One of vLLM's parts: how its tokens compare, and what tells that it did what it is for."""
    from vllm import LLM

    from hydrahead.serving.heads import Pages

    pages = Pages.of(config)
    longest = max(len(row) for rows in prompts.values() for row in rows) + new_tokens
    options = {
        "graphs": {},
        "eager": {"enforce_eager": True},
        "chunked": {"max_num_batched_tokens": 512, "max_num_seqs": 8},
        # Four of the prompts that are about to need another page, and no page for that.
        "arrivals": {"num_gpu_blocks_override": 1 + 4 * pages.numbers(pages.tokens), "max_num_seqs": 8},
        "prefix": {"enable_prefix_caching": True},
    }[part]
    kind = "edges" if part == "arrivals" else "mixed"
    if not prompts[kind]:
        raise ValueError(f"{part} needs a page of KV cache within the model's positions: take a model with more")
    if part == "arrivals":
        longest = max(map(len, prompts[kind])) + new_tokens
    started = time.perf_counter()
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=longest,
        gpu_memory_utilization=0.8,
        disable_log_stats=False,
        **options,
    )
    result = {"options": options, "start_seconds": time.perf_counter() - started}
    for turn in range(1 + (part == "prefix")):
        started = time.perf_counter()
        given = generate(llm.llm_engine, prompts[kind], new_tokens, every=2 if part == "arrivals" else 0)
        result[f"turn {turn + 1}"] = {"seconds": time.perf_counter() - started, **compared(expected[kind], given)}
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    names = ("vllm:num_preemptions", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
    result["metrics"] = {name: metrics.get(name) for name in names}
    return result


def problems(part: str, result: dict) -> list[str]:
    """What is wrong with a part's result, in words."""
    found = []
    for turn in (value for name, value in result.items() if name.startswith("turn")):
        wide = [row for row in turn["differences"] if row["margin"] > WIDE]
        if wide:
            found.append(f"{len(wide)} of {turn['prompts']} prompts leave transformers by a margin above {WIDE}")
    if part == "arrivals" and not result["metrics"]["vllm:num_preemptions"]:
        found.append("nothing was preempted")
    if part == "prefix" and not result["metrics"]["vllm:prefix_cache_hits"]:
        found.append("no prefix was found in the cache")
    return found


def run(part: str, folder: Path, output: Path, new_tokens: int, attention: str) -> None:
    """One part, in this process, into the file of results."""
    from hydrahead import HydraHeadConfig, serving

    config = HydraHeadConfig.from_pretrained(folder)
    prompts = prompts_of(folder, config, new_tokens)
    started = time.perf_counter()
    if part == "reference":
        result = reference(folder, prompts, new_tokens, attention)
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one step of the engine at a time
        serving.register()  # in this one process the package need not be installed
        expected = read_json(output)["parts"]["reference"]["result"]
        result = served(folder, part, prompts, expected, config, new_tokens)
    seconds = time.perf_counter() - started
    surroundings = environment()
    if part != "reference":
        surroundings["versions"]["vllm"] = version("vllm")
    held = read_json(output)
    if part == "reference":  # what was compared with the one before
        held["parts"] = {}
    held["parts"][part] = {"seconds": seconds, "environment": surroundings, "result": result}
    write(output, held)


def write(output: Path, held: dict) -> None:
    with atomic_file(output) as partial:
        partial.write_text(json.dumps(held, indent=1) + "\n")


def main(words: list[str] | None = None) -> int:
    about = "\n".join(f"  {name:10} {what} (at most {minutes} minutes)" for name, (what, minutes) in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a HydraHead checkpoint")
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all that the file does not hold")
    parser.add_argument("--output", type=Path, default=Path("serving-gpu.json"), help="file of results")
    parser.add_argument("--new-tokens", type=int, default=32, help="of every continuation (default: 32)")
    parser.add_argument("--attention", default="sdpa", help="transformers' attention (default: sdpa)")
    parser.add_argument("--again", action="store_true", help="measure parts that the file holds already")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if options.here:
        (part,) = options.parts
        run(part, options.model, options.output, options.new_tokens, options.attention)
        return 0
    with one_line_errors():
        made_from = {"weights": digest(options.model), "new_tokens": options.new_tokens}
        held = read_json(options.output) if options.output.exists() else {"made_from": made_from, "parts": {}}
        if held["made_from"] != made_from:
            raise ValueError(f"{options.output} is of other weights or lengths: give another --output")
        write(options.output, held)
    todo = options.parts or [part for part in PARTS if part not in held["parts"]]
    if not options.again:
        todo = [part for part in todo if part not in held["parts"]]
    if "reference" not in [*held["parts"], *todo]:
        todo.insert(0, "reference")
    todo.sort(key=list(PARTS).index)
    failed = False
    for part in todo:
        what, minutes = PARTS[part]
        print(f"{part}: {what}, at most {minutes} minutes", flush=True)
        command = [sys.executable, __file__, str(options.model), part, "--here", "--output", str(options.output)]
        command += ["--new-tokens", str(options.new_tokens), "--attention", options.attention]
        if subprocess.run(command).returncode:
            print(f"{part}: ended with an error", flush=True)
            failed = True
            if part == "reference":
                break
            continue
        done = read_json(options.output)["parts"][part]
        wrong = [] if part == "reference" else problems(part, done["result"])
        for turn in (value for name, value in done["result"].items() if name.startswith("turn")):
            print(f"{part}: {turn['equal']} of {turn['prompts']} equal, widest margin {turn['widest_margin']:.3f}")
        print(f"{part}: {done['seconds']:.0f} s" + "".join(f"; {each}" for each in wrong), flush=True)
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
