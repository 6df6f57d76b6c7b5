"""
vLLM against transformers on one GPU: greedy tokens, and log-probabilities against those of transformers in fp32.

    python tests/serving_gpu.py FOLDER                           # every part that the file of results does not hold
    python tests/serving_gpu.py FOLDER --make small              # of a model with random weights, which it makes first
    python tests/serving_gpu.py FOLDER reference graphs --again  # these parts, whether it holds them or not
    python tests/serving_gpu.py FOLDER --make demo server tensor # `vllm serve`; two GPUs. hydrahead is installed

Each part runs in a process of its own and is written as soon as it is done. `reference` comes first: transformers'
tokens, the logits of the best five at every step, and the log-probability of every token of prompts and continuations,
in bf16 and in fp32. The others give each prompt's first token that differs and its margin, by how much transformers
preferred its own, and how far their log-probabilities are from fp32, beside how far transformers' own are in bf16.
A part fails where a margin is wide, or where its error is more than twice that of transformers.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from urllib.request import Request, urlopen

from hydrahead.benchmarks.serving import BESIDE_OTHERS, prepare_vllm
from hydrahead.console import one_line_errors
from hydrahead.files import atomic_file, atomic_folder, read_json
from hydrahead.provenance import digest, environment

DEVICE = "cuda"
PROMPTS, SHORTEST, LONGEST = 32, 16, 8192
EDGES = 8  # prompts that end shortly before the end of a page
ROWS = 8  # prompts that transformers answers at a time
BEST = 5  # logits kept of every step
WIDE = 0.5  # of logits around 16 to 32, whose neighbours in bf16 are 1/8 apart
WORSE = 2  # times the error that transformers makes in bf16: other kernels round elsewhere, but no worse
PARTS = {  # what each does, and the most minutes it is to take on an H100: set, not measured
    "reference": ("transformers", 4),
    "eager": (
        "vLLM without compiler and CUDA graphs, prompts at once; then prompts and continuations read at once",
        2,
    ),
    "graphs": ("compiled, with CUDA graphs: prompts at once; then prompts that come one by one", 4),
    "chunked": ("prompts read 512 tokens at a time, beside others that generate", 2),
    "preempted": ("a cache too small for the prompts: some are preempted", 2),
    "prefix": ("prefix caching, all prompts twice", 2),
    "tensor": ("heads split over two GPUs, as in `graphs`", 5),
    "server": ("`vllm serve`, which finds the plug-in by itself: prompts over HTTP, eight clients at once", 5),
}
NAMED = ("tensor", "server")  # parts that are done when they are asked for
OPTIONS = {
    "eager": {"enforce_eager": True},
    "graphs": {"max_num_seqs": PROMPTS, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32]}},
    "chunked": {"enforce_eager": True, "max_num_batched_tokens": 512, "max_num_seqs": 8},
    "preempted": {"enforce_eager": True, "max_num_seqs": 8},
    "prefix": {"enforce_eager": True, "enable_prefix_caching": True},
}
OPTIONS["tensor"] = OPTIONS["graphs"] | {"tensor_parallel_size": 2}
CLIENTS = 8
SHAPES = {
    "small": {  # an irregular layer, and layers of one kind of heads
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 16384,
        "head_masks": [[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
        "logit_scale_base": 1024,
    },
    "demo": None,  # the demo's teacher, converted and not trained
}


def make_model(folder: Path, shape: str) -> None:
    """A checkpoint with random weights, none at its neutral initial value, or the demo's teacher, converted."""
    import torch

    from hydrahead import HydraHeadConfig, HydraHeadForCausalLM

    torch.manual_seed(0)
    if shape == "demo":
        from transformers import AutoTokenizer

        from hydrahead.convert import convert_model

        teacher = Path(__file__).parents[1] / "demo" / "teacher"
        masks = [[int(head // 2 == layer % 4) for head in range(8)] for layer in range(6)]
        convert_model(teacher, masks, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
        return
    fields = SHAPES[shape]
    spread = 1.25 * fields["hidden_size"] ** -0.5  # attention is sharp and the residual stream is the layers'
    model = HydraHeadForCausalLM(HydraHeadConfig(**fields, initializer_range=spread))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "short_conv" in name or "output_gate" in name:
                parameter.add_(torch.randn_like(parameter) * spread)
            elif "fusion.weight" in name:
                parameter.uniform_(0.3, 1.5)
        model.model.norm.weight *= 4  # logits as far apart as those of trained models
    model.to(torch.bfloat16).save_pretrained(folder)


def prompts_of(folder: Path, config, new_tokens: int) -> dict[str, list[list[int]]]:
    """Token ids: `mixed` of lengths from 16 to 8K, `edges` that end 8 tokens before the end of a page of KV cache."""
    import numpy as np
    from transformers import AutoTokenizer

    from hydrahead.serving.heads import Pages

    page, room = Pages.of(config).tokens, config.max_position_embeddings - new_tokens - 1
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


def scores(model, rows: list[list[int]]) -> list:
    """For each row the log-probability of every token but the first, fp32 `[tokens - 1]`."""
    import torch

    found = []
    for row in rows:
        ids = torch.tensor([row], device=DEVICE)
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            chosen = logits.gather(1, ids[0, 1:, None])[:, 0]
            found.append((chosen - logits.logsumexp(-1)).cpu())
    return found


def reference(folder: Path, prompts: dict, new_tokens: int, attention: str, output: Path) -> dict:
    """
    For every prompt its continuation, and of each step the ids and logits of the best tokens.

    The log-probabilities of `mixed` go into a file of their own, beside the results.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from hydrahead import ops_hydrahead
    from hydrahead.kernels import use_tuned_kernels

    use_tuned_kernels()

    def load(dtype: torch.dtype):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(DEVICE)

    model = load(torch.bfloat16)
    model.generation_config.eos_token_id = None  # all continuations are equally long
    found = {}
    for kind, rows in prompts.items():
        found[kind] = []
        for start in range(0, len(rows), ROWS):  # neighbours are of about one length
            batch = rows[start : start + ROWS]
            longest = max(map(len, batch))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch], device=DEVICE)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=DEVICE)
            generated = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(generated.logits, dim=1).float().topk(BEST)  # [rows, steps, BEST]
            for row, tokens, indices, values in zip(
                batch, generated.sequences[:, longest:].tolist(), best.indices.tolist(), best.values.tolist()
            ):
                found[kind].append({"prompt_tokens": len(row), "tokens": tokens, "best": indices, "logits": values})
            print(f"{kind}: prompts to {longest} tokens", flush=True)
    whole = [row + answer["tokens"] for row, answer in zip(prompts["mixed"], found["mixed"])]
    in_bf16 = scores(model, whole)
    del model
    ops_hydrahead.chunk_gated_delta_rule = None  # fla has nothing tuned for fp32: PyTorch's own form is soon done
    named = {"bf16": in_bf16, "fp32": scores(load(torch.float32), whole)}
    with atomic_file(scores_file(output)) as partial:
        save_file({f"{name}.{place}": row for name, rows in named.items() for place, row in enumerate(rows)}, partial)
    return found


def scores_file(output: Path) -> Path:
    return output.with_suffix(".safetensors")


def errors(given: list[dict[int, float]], held: dict) -> dict:
    """
    How far log-probabilities are from fp32, beside how far transformers' are in bf16 at the same places.

    Args:
        given: of each row the log-probability at some places; place 0 is the row's second token.
        held: by "bf16.ROW" and "fp32.ROW" transformers' own, `[tokens - 1]`.
    """
    ours, theirs = [], []
    for row, values in enumerate(given):
        for place, value in values.items():
            exact = float(held[f"fp32.{row}"][place])
            ours.append(abs(value - exact))
            theirs.append(abs(float(held[f"bf16.{row}"][place]) - exact))
    if not ours:
        return {"places": 0}
    return {
        "places": len(ours),
        "mean_error": sum(ours) / len(ours),
        "mean_error_of_transformers": sum(theirs) / len(theirs),
        "largest_error": max(ours),
        "largest_error_of_transformers": max(theirs),
    }


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


def generate(
    engine, prompts: list[list[int]], new_tokens: int, every: int = 0
) -> list[tuple[list[int], list[float], int]]:
    """
    Greedy continuations, their log-probabilities, and of each prompt the tokens that were found in the cache.

    Args:
        every: one prompt comes after so many steps of the engine; 0: all at once.
    """
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    options = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,  # of the token that is taken
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    waiting, done, steps = list(enumerate(prompts)), {}, 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (steps >= every * waiting[0][0] or not engine.has_unfinished_requests()):
            index, ids = waiting.pop(0)
            engine.add_request(str(index), TokensPrompt(prompt_token_ids=ids), options)
        for output in engine.step():
            if output.finished:
                answer = output.outputs[0]
                tokens = list(answer.token_ids)
                chosen = [step[token].logprob for token, step in zip(tokens, answer.logprobs, strict=True)]
                done[int(output.request_id)] = tokens, chosen, output.num_cached_tokens
        steps += 1
    return [done[index] for index in range(len(prompts))]


def read_at_once(llm, rows: list[list[int]]) -> list[dict[int, float]]:
    """Log-probabilities of every token of some rows, as a prompt."""
    from vllm import SamplingParams, TokensPrompt

    options = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=row) for row in rows], options, use_tqdm=False)
    return [
        {place: output.prompt_logprobs[place + 1][token].logprob for place, token in enumerate(row[1:])}
        for row, output in zip(rows, outputs, strict=True)
    ]


def served(folder: Path, part: str, prompts: dict, expected: dict, held: dict, config, new_tokens: int) -> dict:
    """One of vLLM's parts: how its tokens and log-probabilities compare, and whether it did what it is for."""
    from vllm import LLM

    from hydrahead.serving.heads import Pages

    pages, options = Pages.of(config), OPTIONS[part]
    kind = "edges" if part == "preempted" else "mixed"
    rows, answers = prompts[kind], expected[kind]
    if not rows:
        raise ValueError(f"{part} needs a page of KV cache within the model's positions: take a model with more")
    if part == "preempted":  # four of the prompts that are about to need another page, and no page for that
        options = options | {"num_gpu_blocks_override": 1 + 4 * pages.numbers(pages.tokens)}
    started = time.perf_counter()
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=max(map(len, rows)) + new_tokens + 1,
        disable_log_stats=False,
        **BESIDE_OTHERS,
        **options,
    )
    result = {"options": options, "start_seconds": time.perf_counter() - started}
    turns = {"graphs": (0, 2), "prefix": (0, 0)}.get(part, (0,))
    for number, every in enumerate(turns, start=1):
        started = time.perf_counter()
        given = generate(llm.llm_engine, rows, new_tokens, every)
        turn = {"seconds": time.perf_counter() - started, **compared(answers, [tokens for tokens, *_ in given])}
        turn["prompt_tokens_from_cache"] = sum(cached for *_, cached in given)
        if kind == "mixed":
            turn |= errors(shared_places(answers, given), held)
        result[f"turn {number}"] = turn
    if part == "eager":
        whole = [row + answer["tokens"] for row, answer in zip(rows, answers)]
        result["read at once"] = errors(read_at_once(llm, whole), held)
    # Not its counters of prefixes: what a step adds to them is lost if no token comes of the step before.
    result["preemptions"] = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    return result


def asked(folder: Path, rows: list[list[int]], expected: list[dict], held: dict, new_tokens: int) -> dict:
    """The part `server`: the command of the documentation, and clients that read token ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = BESIDE_OTHERS | {
        "dtype": "bfloat16",
        "max_model_len": max(map(len, rows)) + new_tokens + 1,
        "generation_config": "vllm",  # no sampling that a checkpoint asks for
        "served_model_name": "student",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder), *words]
    started = time.perf_counter()
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)])
    try:
        while not is_up(port):
            if server.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {server.returncode}")
            if time.perf_counter() > started + 60 * PARTS["server"][1]:
                raise TimeoutError("vllm serve is not up")
            time.sleep(1)
        ready = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            given = list(clients.map(lambda row: completion(port, row, new_tokens), rows))
        seconds = time.perf_counter() - ready
    finally:
        server.terminate()
        server.wait(60)
    turn = compared(expected, [tokens for tokens, _ in given]) | errors(shared_places(expected, given), held)
    return {"options": options, "start_seconds": ready - started, "turn 1": turn | {"seconds": seconds}}


def is_up(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def completion(port: int, row: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """A greedy continuation by the server, and the log-probabilities of its tokens."""
    body = {
        "model": "student",
        "prompt": row,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }
    request = Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urlopen(request, timeout=300) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def shared_places(expected: list[dict], given: list[tuple]) -> list[dict[int, float]]:
    """Log-probabilities of tokens that both took, up to the first that differs; places as in `errors`."""
    found = []
    for row, (tokens, chosen, *_) in zip(expected, given, strict=True):
        parting = first_difference(row, tokens)
        shared = chosen[: None if parting is None else parting["step"]]
        found.append({row["prompt_tokens"] - 1 + step: value for step, value in enumerate(shared)})
    return found


def problems(part: str, result: dict) -> list[str]:
    """What is wrong with a part's result, in words."""
    found = []
    for name, turn in result.items():
        if not isinstance(turn, dict):
            continue
        wide = [row for row in turn.get("differences", []) if row["margin"] > WIDE]
        if wide:
            found.append(f"{name}: {len(wide)} of {turn['prompts']} prompts leave by a margin above {WIDE}")
        if turn.get("mean_error", 0) > WORSE * turn.get("mean_error_of_transformers", 0):
            error, theirs = turn["mean_error"], turn["mean_error_of_transformers"]
            found.append(f"{name}: log-probabilities are {error:.4f} from fp32, those of transformers {theirs:.4f}")
    if part == "preempted" and not result["preemptions"]:
        found.append("nothing was preempted")
    if part == "prefix" and not result["turn 2"]["prompt_tokens_from_cache"]:
        found.append("no prefix was found in the cache")
    return found


def run(part: str, folder: Path, output: Path, new_tokens: int, attention: str) -> None:
    """One part, in this process, into the file of results."""
    from hydrahead import HydraHeadConfig

    config = HydraHeadConfig.from_pretrained(folder)
    prompts = prompts_of(folder, config, new_tokens)
    started = time.perf_counter()
    if part == "reference":
        result = reference(folder, prompts, new_tokens, attention, output)
    else:
        from safetensors.torch import load_file

        expected, held = read_json(output)["parts"]["reference"]["result"], load_file(scores_file(output))
        if part == "server":
            os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
            result = asked(folder, prompts["mixed"], expected["mixed"], held, new_tokens)
        else:
            prepare_vllm("HydraHeadForCausalLM")
            result = served(folder, part, prompts, expected, held, config, new_tokens)
    seconds = time.perf_counter() - started
    surroundings = environment()
    if part != "reference":
        surroundings["versions"]["vllm"] = version("vllm")
    held = read_json(output)
    if part == "reference":  # what was compared with the one before
        held["parts"] = {}
    held["parts"][part] = {"seconds": seconds, "environment": surroundings, "result": result}
    write(output, held)


def check_parts(parts: list[str], folder: Path) -> None:
    """Raises `ValueError` where a model cannot do what was asked for by name."""
    from hydrahead import HydraHeadConfig
    from hydrahead.serving.heads import check_served

    if "tensor" in parts:
        check_served(HydraHeadConfig.from_pretrained(folder), OPTIONS["tensor"]["tensor_parallel_size"])
    if "server" in parts and not any(folder.glob("tokenizer*")):
        raise ValueError(f"{folder} has no tokenizer, and vllm serve wants one: take --make demo, or a student")


def write(output: Path, held: dict) -> None:
    with atomic_file(output) as partial:
        partial.write_text(json.dumps(held, indent=1) + "\n")


def main(words: list[str] | None = None) -> int:
    about = "\n".join(f"  {name:10} {what} (at most {minutes} minutes)" for name, (what, minutes) in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"parts:\n{about}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a HydraHead checkpoint")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"default: all but {' and '.join(NAMED)} that the file does not hold"
    )
    parser.add_argument("--make", choices=SHAPES, help="make the model in FOLDER first, if there is none")
    parser.add_argument("--output", type=Path, default=Path("serving-gpu.json"), help="file of results")
    parser.add_argument("--new-tokens", type=int, default=32, help="of every continuation (default: 32)")
    parser.add_argument("--attention", default="sdpa", help="transformers' attention (default: sdpa)")
    parser.add_argument("--again", action="store_true", help="measure parts that the file holds already")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(words)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if options.here:
        (part,) = options.parts
        run(part, options.model, options.output, options.new_tokens, options.attention)
        return 0
    with one_line_errors():
        if options.make and not (options.model / "config.json").exists():
            with atomic_folder(options.model) as partial:
                make_model(partial, options.make)
        made_from = {"weights": digest(options.model), "new_tokens": options.new_tokens}
        held = read_json(options.output) if options.output.exists() else {"made_from": made_from, "parts": {}}
        if held["made_from"] != made_from:
            raise ValueError(f"{options.output} is of other weights or lengths: give another --output")
        check_parts(options.parts, options.model)
        write(options.output, held)
    todo = options.parts or [part for part in PARTS if part not in NAMED]
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
        for name, turn in done["result"].items():
            if name.startswith("turn"):
                print(
                    f"{part}, {name}: {turn['equal']} of {turn['prompts']} equal, margin {turn['widest_margin']:.3f}"
                )
            if isinstance(turn, dict) and "mean_error" in turn:
                error, theirs = turn["mean_error"], turn["mean_error_of_transformers"]
                print(f"{part}, {name}: {error:.5f} from fp32 in the mean, transformers in bf16 {theirs:.5f}")
        print(f"{part}: {done['seconds']:.0f} s" + "".join(f"; {each}" for each in wrong), flush=True)
        failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
