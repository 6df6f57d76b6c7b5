"""Tune fla's kernels for linear heads on this GPU, and write what was found as the tables that fla reads.

    python benchmarks/tune_kernels.py tune OUT.json --head-dim 128 --dtype bfloat16
    python benchmarks/tune_kernels.py merge OUT_1.json OUT_2.json … kernels/hopper

All rows and heads of all layers, packed or not, have one shape (`ops_hydrahead.gated_delta_rule`): one run per head
size and dtype serves every mask. Where entries are equally near to what is asked for, fla takes the first: merge the
commonest size first.
"""

import argparse
import gc
import json
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path


def tune(output: Path, head_dim: int, dtype: str) -> None:
    import torch
    import triton
    from fla.ops.utils.cache import AutotuneKey, CachedAutotuner

    from hydrahead.ops_hydrahead import gated_delta_rule

    began = time.perf_counter()
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (4, 2048, 12)

    def leaf(kind: torch.dtype, *more: int) -> torch.Tensor:
        return torch.randn(*shape, *more, generator=generator, device="cuda", dtype=kind).requires_grad_()

    q, k, v = (leaf(getattr(torch, dtype), head_dim) for _ in range(3))
    g, beta = (leaf(torch.float32) for _ in range(2))
    gated_delta_rule(q, k, v, -g.exp(), beta.sigmoid(), None, False)[0].float().square().mean().backward()
    # As generation does: the first tokens, and those that go on from a state.
    state = torch.zeros(shape[0], shape[2], head_dim, head_dim, device="cuda")
    with torch.no_grad():
        for start in (None, state):
            gated_delta_rule(q, k, v, -g.exp(), beta.sigmoid(), start, True)
    torch.cuda.synchronize()
    tables = {}
    # fla keeps no list of its tuners: each is the module-level object that a kernel's name stands for.
    for tuner in (each for each in gc.get_objects() if isinstance(each, CachedAutotuner) and each.cache):
        entries = {}
        for key, config in tuner.cache.items():
            entries[AutotuneKey.key_hash(key)] = {
                "autotune_key": AutotuneKey.normalize_autotune_key(key),
                "config": {
                    "kwargs": config.kwargs,
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                    "num_ctas": config.num_ctas,
                },
            }
        tables[tuner.kernel_name] = entries
    seconds = time.perf_counter() - began
    device = torch.cuda.get_device_name()
    made_from = {
        "device": device,
        "torch": torch.__version__,
        "triton_version": triton.__version__,
        "fla": version("fla-core"),
        "date": date.today().isoformat(),
    }
    output.write_text(json.dumps(made_from | {"tables": tables}))
    print(
        f"{output}: {sum(map(len, tables.values()))} entries of {len(tables)} kernels in {seconds:.0f} s on {device}"
    )


def merge(inputs: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    merged: dict[str, dict] = {}
    for file in inputs:
        found = json.loads(file.read_text())
        for kernel, entries in found["tables"].items():
            made_from = {name: value for name, value in found.items() if name != "tables"}
            table = merged.setdefault(kernel, {"kernel_name": kernel} | made_from | {"autotune_entries": {}})
            for key, entry in entries.items():
                table["autotune_entries"].setdefault(key, entry)
    for kernel, table in merged.items():
        (folder / f"{kernel}.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{folder}: {len(merged)} tables")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    tuning = commands.add_parser("tune")
    tuning.add_argument("output", type=Path)
    tuning.add_argument("--head-dim", type=int, default=128)
    tuning.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    merging = commands.add_parser("merge")
    merging.add_argument("inputs", type=Path, nargs="+")
    merging.add_argument("folder", type=Path)
    arguments = vars(parser.parse_args())
    {"tune": tune, "merge": merge}[arguments.pop("command")](**arguments)
