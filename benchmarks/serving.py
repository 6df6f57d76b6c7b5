"""Speed and room of a teacher and its hybrid in vLLM on one GPU, in bf16; needles of a real one.

    python benchmarks/serving.py                        # every cell that serving-cuda.json does not hold
    python benchmarks/serving.py hybrid --tokens 32K    # these cells
    python benchmarks/serving.py needles --model FOLDER # a checkpoint is asked for needles, as the evaluation asks
    python benchmarks/serving.py --teacher FOLDER --model FOLDER --output FILE.json  # real models

Qwen3-1.7B's shape with random weights: vLLM's own Qwen3, and a hybrid of an eighth of its KV groups; or real models,
which may be asked for more positions than they were trained on: time does not depend on what they say. A cell is one
length of prompts: `one` is a single sequence, `full` as many as the cache has room for, all of them generating. Time
per token is that of steps in which every sequence gets one token and no prompt is read; what it took to read the
prompts stands beside it.

Each model runs in a process of its own, which starts vLLM once, and begins no cell that `--minutes` have no room for:
the next call does what is left. Every cell is written as soon as it is measured; calls on several GPUs
(`CUDA_VISIBLE_DEVICES`) may share the file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from hydrahead.console import one_line_errors
from hydrahead.files import atomic_file, read_json
from hydrahead.provenance import environment

K = 1024
MODELS = {"teacher": "teacher", "hybrid": "12.5% kv_groups"}  # by their names in decode.py
LENGTHS = {"one": (2 * K, 8 * K, 32 * K, 128 * K), "full": (8 * K, 32 * K, 128 * K)}
MOST = 512  # sequences at a time: the largest batch that vLLM captures as a CUDA graph
STEPS = 64  # measured, after as many that are not
PROFILED, NAMED = 8, 16  # steps of one sequence, and kernels that are named
SPARE = 4 * K  # tokens that the first sequences may generate while the prompts of the last are read
NEEDLES = {"task": "niah_single_2", "count": 24}
# Where the GPU is shared: vLLM wants room for the states of as many sequences as it may run.
BESIDE_OTHERS = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 4 << 30, "max_num_seqs": NEEDLES["count"]}
FOLDER = Path(__file__).parent
RESULTS = FOLDER / "serving-cuda.json"  # of random weights


def cells(kinds: list[str], tokens: list[int]) -> list[tuple[str, int]]:
    """What to measure, the quick cells first."""
    return sorted(
        ((kind, length) for kind in kinds for length in LENGTHS[kind] if not tokens or length in tokens),
        key=lambda cell: (cell[1], cell[0] == "full"),
    )


def config_of(name: str):
    """The configuration of a model, with positions for the longest prompt."""
    from hydrahead.benchmarks.decode import config_of
    from hydrahead.benchmarks.gpu import QWEN3_1_7B

    config = config_of(MODELS[name], QWEN3_1_7B)
    config.architectures = ["Qwen3ForCausalLM" if name == "teacher" else "HydraHeadForCausalLM"]
    return config


def room_for(config, blocks: int, tokens: int, block_size: int) -> int:
    """Sequences of so many tokens that fit vLLM's numbered pages, of which it keeps one for itself."""
    from hydrahead.serving.heads import Pages

    each = Pages.of(config).numbers(tokens) if config.model_type == "hydrahead" else -(-tokens // block_size)
    return min(MOST, (blocks - 1) // each)


def begin(llm, length: int, count: int) -> tuple[list[str], dict]:
    """Reads the prompts of so many sequences, and some steps more: their names, and what the reading took."""
    import numpy as np
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    engine, ids = llm.llm_engine, np.random.default_rng(0)
    options = SamplingParams(
        temperature=0.0,
        max_tokens=SPARE - 1,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    vocabulary = llm.model_config.get_vocab_size()
    names = [f"{length}-{count}-{index}" for index in range(count)]
    prompts = [TokensPrompt(prompt_token_ids=ids.integers(0, vocabulary, length).tolist()) for _ in names]
    started = time.perf_counter()
    for name, prompt in zip(names, prompts):
        engine.add_request(name, prompt, options)
    begun, first = set(), None
    while len(begun) < count:
        begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        first = first or (time.perf_counter() - started if begun else None)
    prompts_read = time.perf_counter() - started
    for _ in range(STEPS):
        engine.step()
    return names, {
        "sequences": count,
        "first_token_seconds": first,
        "prompts_read_seconds": prompts_read,
        "prompt_tokens_per_second": count * length / prompts_read,
    }


def end(engine, names: list[str]) -> None:
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()


def run_cell(llm, length: int, count: int) -> dict:
    """Reads the prompts of so many sequences, then measures steps in which each gets a token."""
    engine, (names, found) = llm.llm_engine, begin(llm, length, count)
    seconds, given = [], 0
    for _ in range(STEPS):
        before = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - before)
        given += sum(len(output.outputs[0].token_ids) for output in outputs)
    end(engine, names)
    return found | {
        "ms_per_token": 1e3 * statistics.median(seconds),
        "ms_per_token_of_each_step": [1e3 * each for each in seconds],
        "tokens_per_second": given / sum(seconds),
        "tokens_given": given,  # fewer than sequences times steps where one was preempted
        "steps": STEPS,
    }


def profiled(llm, length: int) -> dict:
    """What the GPU does in a step of one sequence, as `gpu.py` says it."""
    names, _ = begin(llm, length, 1)
    kernels = kernels_of_steps(llm.llm_engine)
    end(llm.llm_engine, names)
    most = Counter()
    for event in kernels:
        most[event.name[:100]] += event.device_time / 1e3 / PROFILED
    return {
        "kernels_per_token": len(kernels) / PROFILED,
        "ms_in_kernels": sum(most.values()),
        "ms_of_longest_kernels": dict(most.most_common(NAMED)),
    }


def kernels_of_steps(engine) -> list:
    import torch

    from hydrahead.benchmarks.gpu import kernels_of

    return kernels_of(lambda: [engine.step() for _ in range(PROFILED)], torch.device("cuda"))


def prepare_vllm(architecture: str) -> None:
    """Sets vLLM up to run all of itself, and a model of this architecture, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one step of the engine at a time
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Greedy tokens need no sampler of FlashInfer's, and vLLM imports the package only for this.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    from vllm import ModelRegistry

    from hydrahead import serving

    serving.register()  # in this one process the package need not be installed
    # As a class: of a name vLLM learns what kind of model it is in another process, which imports everything again.
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def start(model: str | Path, architecture: str, **options):
    """vLLM in this process."""
    prepare_vllm(architecture)
    from vllm import LLM

    options = {"max_num_seqs": MOST, "enable_prefix_caching": False} | options
    return LLM(str(model), dtype="bfloat16", **options)


def surroundings() -> dict:
    """`environment`, with vLLM's version."""
    from vllm import __version__

    found = environment()
    found["versions"]["vllm"] = __version__
    return found


def measure(name: str, model: str | None, todo: list[tuple[str, int]], output: Path, deadline: float) -> None:
    """A model's cells, in this process, into the file of results. Its weights are random where no `model` is named."""
    started, longest = time.perf_counter(), max(length for _, length in todo) + SPARE
    options = {"max_model_len": longest, "max_num_batched_tokens": 16 * K, "gpu_memory_utilization": 0.9}
    with tempfile.TemporaryDirectory() as where:
        if model:
            from transformers import AutoConfig

            from hydrahead.convert.teachers import open_teacher

            where = open_teacher(model).fetch() if name == "teacher" else model
            config = AutoConfig.from_pretrained(where)
            how = {"hf_overrides": {"max_position_embeddings": max(longest, config.max_position_embeddings)}}
        else:
            config, how = config_of(name), {"load_format": "dummy"}
            config.save_pretrained(where)
        llm = start(where, config.architectures[0], skip_tokenizer_init=True, **how, **options)
    of_all = {
        **({"model": Path(model).name} if model else {}),
        "options": {"max_num_seqs": MOST} | options,
        "start_seconds": time.perf_counter() - started,
        "num_gpu_blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        # vLLM has two, and gives a model with states the older one.
        "model_runner": 2 if llm.llm_engine.vllm_config.use_v2_model_runner else 1,
    }
    print(f"{name}: started in {of_all['start_seconds']:.0f} s", flush=True)
    block = llm.llm_engine.vllm_config.cache_config.block_size
    for _ in range(2):  # kernels compile, or are tuned; then how fast prompts are read
        row = run_cell(llm, read := 2 * K, 1)
    for kind, length in todo:
        count = 1 if kind == "one" else room_for(config, of_all["num_gpu_blocks"], length + SPARE, block)
        if count == 0:
            print(f"{name}: the cache has no room for {length} tokens", flush=True)
            continue
        if count > 1 and read != length:  # short prompts are read more slowly
            row = run_cell(llm, length, 1)
        read = length
        if time.time() + count * length / row["prompt_tokens_per_second"] > deadline:
            print(f"{name}: the time is up before {kind} {length}", flush=True)
            return
        before = time.perf_counter()
        row = run_cell(llm, length, count)
        row |= of_all | {"seconds": time.perf_counter() - before, "environment": surroundings()}
        keep(output, f"{name} {kind} {length}", row)
        print(
            f"{name} {kind} {length}: {count} at a time, {row['ms_per_token']:.2f} ms a token, "
            f"{row['tokens_per_second']:.0f} tokens/s, prompts read in {row['prompts_read_seconds']:.1f} s",
            flush=True,
        )
    for kind, length in todo:  # after all that is timed: where a profiler has been, launches may take longer
        cell = f"{name} {kind} {length}"
        if kind == "one" and cell in cells_in(output) and time.time() < deadline:
            keep(output, cell, cells_in(output)[cell] | profiled(llm, length))


def needles(model: Path, length: int, output: Path) -> None:
    """
    A checkpoint's share of answers found, of prompts that the evaluation makes, into the file of results; beside it
    the share in transformers, of the same prompts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import SamplingParams, TokensPrompt

    from hydrahead.data.ruler import TASKS, Haystack, make_prompts
    from hydrahead.evaluation.needles import FIRST_SEED, answer, score

    started, tokenizer = time.perf_counter(), AutoTokenizer.from_pretrained(model)
    text = "\n".join(file.read_text() for file in sorted((FOLDER.parent / "docs").glob("*.md")))
    haystack = Haystack(tokenizer, tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    prompts = make_prompts(haystack, NEEDLES["task"], length, NEEDLES["count"], FIRST_SEED)
    asked, new_tokens = [prompt.input_ids for prompt in prompts], TASKS[NEEDLES["task"]].new_tokens
    llm = start(model, "HydraHeadForCausalLM", max_model_len=length + 256, **BESIDE_OTHERS)
    options = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in asked], options)

    def scored(answers: list[str]) -> dict:
        found = (score(given, prompt.answers) for given, prompt in zip(answers, prompts))
        return {"score": statistics.mean(found), "answers": answers}

    row = {**NEEDLES, "tokens": length, **scored([output.outputs[0].text for output in outputs])}
    row |= {"seconds": time.perf_counter() - started, "environment": surroundings()}
    cell = f"needles {model.name} {length}"
    keep(output, cell, row)
    print(f"needles at {length} tokens: {row['score']:.2f}", flush=True)
    beside = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="cuda")
    row["transformers"] = scored(answer(beside, tokenizer, asked, new_tokens, NEEDLES["count"] * length))
    keep(output, cell, row)
    same = sum(one == other for one, other in zip(row["answers"], row["transformers"]["answers"], strict=True))
    print(f"in transformers: {row['transformers']['score']:.2f}, {same} of {len(asked)} answers equal")


def summary(rows: dict) -> list[str]:
    """Hybrid against teacher, where both were measured on one kind of GPU."""
    lines = []
    for kind, length in cells(list(LENGTHS), []):
        pair = [rows.get(f"{name} {kind} {length}") for name in MODELS]
        if None in pair or len({row["environment"]["hardware"] for row in pair}) > 1:
            continue
        teacher, hybrid = pair
        what = "ms_per_token" if kind == "one" else "tokens_per_second"
        lines.append(
            f"{kind} {length}: {what} {teacher[what]:.2f} and {hybrid[what]:.2f}, {hybrid[what] / teacher[what]:.2f}×"
        )
    return lines


def keep(output: Path, cell: str, row: dict) -> None:
    """Adds a cell to the file of results, which processes on other GPUs may be writing too."""
    import fcntl

    folder = os.open(output.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        held = cells_in(output)
        held[cell] = row
        with atomic_file(output) as partial:
            partial.write_text(json.dumps({"cells": held}, indent=1) + "\n")
    finally:
        os.close(folder)


def cells_in(output: Path) -> dict:
    return read_json(output)["cells"] if output.exists() else {}


def number(text: str) -> int:
    return int(text[:-1]) * K if text[-1:] in "kK" else int(text)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help="teacher, hybrid or needles (default: both models)")
    parser.add_argument(
        "--kind", choices=LENGTHS, action="append", help="one sequence, or a full cache (default: both)"
    )
    parser.add_argument(
        "--tokens", type=number, nargs="+", default=[], help="of a prompt: 2K 8K 32K 128K; needles: one"
    )
    parser.add_argument("--model", type=Path, help="folder of a real hybrid, measured or asked for needles")
    parser.add_argument("--teacher", help="a real one beside it: Hub id, folder or GGUF file")
    parser.add_argument("--minutes", type=float, default=9, help="time for each model (default: 9)")
    parser.add_argument("--output", type=Path, help="file of results (default: serving-cuda.json beside this script)")
    parser.add_argument("--again", action="store_true", help="measure cells that the file holds already")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    what = options.what or list(MODELS)
    if unknown := set(what) - {*MODELS, "needles"}:
        parser.error(f"{', '.join(sorted(unknown))}: expected teacher, hybrid or needles")
    if "needles" in what and (options.model is None or len(options.tokens) != 1):
        parser.error("needles need --model FOLDER and the length of one prompt, --tokens 1K")
    real = {"teacher": options.teacher, "hybrid": options.model and str(options.model)}
    if "needles" in what and len(what) > 1:
        parser.error("needles are asked in a call of their own")
    if "needles" not in what and any(real.values()):
        if missing := [name for name in what if not real[name]]:
            parser.error(f"no real {missing[0]}: name both, --teacher and --model, or ask for the other alone")
        if options.output is None or options.output.absolute() == RESULTS.absolute():
            parser.error("real models are none of serving-cuda.json: say with --output where to")
    options.output = options.output or RESULTS
    with one_line_errors():
        held = cells_in(options.output)
        if not options.output.absolute().parent.is_dir():
            raise ValueError(f"{options.output}: there is no such folder; make it, or give another --output")
    deadline, failed = time.time() + 60 * options.minutes, False
    if options.here and what == ["needles"]:
        needles(options.model, options.tokens[0], options.output)
        return 0
    wanted = cells(options.kind or list(LENGTHS), options.tokens)
    for name in what:
        todo = [] if name == "needles" else wanted
        if not options.again:
            named = real.get(name) and Path(real[name]).name
            todo = [
                (kind, length)
                for kind, length in todo
                if (row := held.get(f"{name} {kind} {length}")) is None or row.get("model") != named
            ]
        if options.here:
            measure(name, real[name], todo, options.output, deadline)
        elif todo or name == "needles":
            print(f"{name}: at most {options.minutes:g} minutes", flush=True)
            failed |= bool(subprocess.run([sys.executable, __file__, name, *passed_on(options), "--here"]).returncode)
    if not options.here:
        print("\n".join(summary(cells_in(options.output))))
    return int(failed)


def passed_on(options: argparse.Namespace) -> list[str]:
    """Options for the process of one model."""
    words = ["--output", str(options.output), "--minutes", str(options.minutes), *["--again"] * options.again]
    words += [word for kind in options.kind or [] for word in ("--kind", kind)]
    if options.tokens:
        words += ["--tokens", *map(str, options.tokens)]
    words += ["--teacher", options.teacher] if options.teacher else []
    return words + (["--model", str(options.model)] if options.model else [])


if __name__ == "__main__":
    sys.exit(main())
