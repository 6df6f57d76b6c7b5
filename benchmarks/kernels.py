"""How long fla's kernels take before they first run here, and what one shape for all heads costs: needs a GPU.

    python benchmarks/kernels.py first [--tuned] [--backward] [--cache DIR]     # in a fresh process
    python benchmarks/kernels.py rows

Prints JSON. `first`: seconds of the first pass over 2,048 tokens, and of one with other heads, rows and a state after
it, and how many configurations were timed; from an empty cache, or from what an earlier run left in DIR. `rows`:
medians of forward and backward, a head as a head and all sequences of all heads in one row of one head.
"""

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version


def first(tuned: bool, backward: bool, cache: str) -> dict:
    os.environ["TRITON_CACHE_DIR"] = os.environ["TILELANG_CACHE_DIR"] = cache
    if not tuned:
        os.environ["FLA_CACHE_MODE"] = "disabled"
    import torch
    from triton.runtime.autotuner import Autotuner

    from hydrahead.kernels import use_tuned_kernels
    from hydrahead.ops_hydrahead import gated_delta_rule

    use_tuned_kernels()
    timed, bench = [], Autotuner._bench
    Autotuner._bench = lambda *args, **kwargs: timed.append(1) or bench(*args, **kwargs)
    torch.zeros(1, device="cuda")
    result = {}
    for batch, heads in ((1, 14), (3, 11)):
        state = None if backward or batch == 1 else torch.zeros(batch, heads, 128, 128, device="cuda")
        began = time.perf_counter()
        timed.clear()
        with torch.set_grad_enabled(backward):
            output, _ = gated_delta_rule(*inputs(batch, heads, backward), state, not backward)
            if backward:
                output.float().square().mean().backward()
        torch.cuda.synchronize()
        name = f"{batch} x {heads} heads" + ("" if state is None else ", from a state")
        result[name] = {"seconds": round(time.perf_counter() - began, 1), "configurations": len(timed)}
    return result


def inputs(batch: int, heads: int, needs_grad: bool):
    """q, k, v `[batch, 2048, heads, 128]` bf16 and g, β fp32, random."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, 2048, heads)
    q, k, v = (torch.randn(*shape, 128, generator=generator, device="cuda").bfloat16() for _ in range(3))
    g, beta = (torch.rand(shape, generator=generator, device="cuda") for _ in range(2))
    return [x.requires_grad_(needs_grad) for x in (q, k, v, -0.1 * g, beta)]


def rows() -> dict:
    import torch
    from triton.testing import do_bench

    from hydrahead.kernels import use_tuned_kernels
    from hydrahead.ops_hydrahead import chunk_gated_delta_rule, gated_delta_rule

    use_tuned_kernels()
    leaves = inputs(4, 14, True)

    def as_heads() -> torch.Tensor:
        q, k, v, g, beta = leaves
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    def step(rule) -> None:
        output = rule()
        output.backward(torch.ones_like(output))

    rules = {"heads": as_heads, "rows": lambda: gated_delta_rule(*leaves, None, False)[0]}
    seconds = {name: [] for name in rules}
    for _ in range(3):  # interleaved
        for name, rule in rules.items():
            seconds[name].append(do_bench(lambda rule=rule: step(rule), return_mode="median"))
    return {f"milliseconds, {name}": round(sorted(times)[1], 3) for name, times in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["first", "rows"])
    parser.add_argument("--tuned", action="store_true", help="with the configurations that hydrahead brings")
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--cache", help="folder of compiled kernels, kept; a new one by default")
    arguments = parser.parse_args()
    is_first = arguments.what == "first"
    with tempfile.TemporaryDirectory() as new:
        found = first(arguments.tuned, arguments.backward, arguments.cache or new) if is_first else rows()
    import torch

    setting = {"tuned": arguments.tuned, "backward": arguments.backward, "kept_cache": bool(arguments.cache)}
    setting = setting if is_first else {}
    hardware = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    versions = {name: version(name) for name in ("triton", "fla-core", "transformers")}
    print(json.dumps({"what": arguments.what} | setting | found | hardware | versions))
