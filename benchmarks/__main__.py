"""Command line of the benchmarks: `python -m benchmarks`, run in the root of the repository."""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import sys
from typing import Any

import jax

from benchmarks import compilation
from benchmarks.step import Size, bandwidth, limit_seconds, measure, measurement, torch_device

SIZES = ("1x20M", "200x100k", "60x10k", "300x3k", "1000x1k")
QUICK_SIZES = ("1x100k", "20x1k")
LABELS = {
    "init": "init, eager",
    "eager_step": "update + apply_updates, eager",
    "jitted_step": "jitted, donated step",
}


def parse_size(name: str) -> Size:
    """Parses a size: `Size("60x10k", 60, 10_000)` for "60x10k"."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)([kM]?)", name)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{name!r} must be ARRAYSxVALUES, for example 60x10k or 1x20M."
        )
    leaves, values, unit = match.groups()
    return Size(name, int(leaves), int(values) * {"": 1, "k": 1_000, "M": 1_000_000}[unit])


def parse_rounds(text: str) -> int:
    """Parses the number of rounds, an integer of at least 20."""
    rounds = int(text)
    if rounds < 20:
        raise argparse.ArgumentTypeError(
            f"{rounds} must be at least 20: the median of fewer rounds is not reliable. "
            "To check that the benchmarks run, use --quick."
        )
    return rounds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the command line and fills in the defaults that depend on --quick."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares momentum_jax with Optax and PyTorch: init, an eager step, a jitted "
        "step, tracing and compiling, memory, and how often a new learning rate causes a "
        "compilation. In every round, all contestants are timed in random order. The results are "
        "medians with quartiles, and the median ratio within a round with a 95% confidence "
        "interval. Run nothing else on the machine at the same time. Prints a table and writes "
        "JSON.",
    )
    parser.add_argument(
        "--rounds",
        type=parse_rounds,
        default=30,
        metavar="N",
        help="number of rounds, at least 20 (default: %(default)s); compile times use N / 4 "
        "rounds, at least 6",
    )
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        metavar="ARRAYSxVALUES",
        help="sizes of the params: number of arrays and float32 values per array (default: "
        f"{' '.join(SIZES)})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only check that the benchmarks run: 3 rounds, small sizes "
        f"({' '.join(QUICK_SIZES)}), and no JSON unless --out is given; the numbers are not "
        "reliable",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help="JSON file to write (default: benchmarks/results/DEVICE.json)",
    )
    parser.add_argument("--no-torch", action="store_true", help="do not measure PyTorch")
    args = parser.parse_args(arguments)
    if args.sizes is None:
        args.sizes = [parse_size(name) for name in (QUICK_SIZES if args.quick else SIZES)]
    if args.quick:
        args.rounds = 3
    elif args.out is None:
        name = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
        args.out = pathlib.Path(__file__).parent / "results" / f"{name}.json"
    return args


def find_torch(wanted: bool) -> tuple[Any, str]:
    """Returns PyTorch and its version, or None and the reason why it is not measured."""
    if not wanted:
        return None, "not measured: --no-torch"
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None, "not measured: torch is not installed"
    device = torch_device()
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        return None, f"not measured: this torch does not run on {jax.devices()[0].device_kind}"
    torch.set_num_threads(os.cpu_count())
    return torch, torch.__version__


def machine() -> dict[str, Any]:
    """Returns the hardware and the versions that the numbers depend on, without private data."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # More precise than `platform`, where it exists.
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    models = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{
            name: importlib.metadata.version(name)
            for name in ("momentum_jax", "jax", "jaxlib", "optax")
        },
    }


def processor(host: dict[str, Any]) -> str:
    """Returns what computed, by what `machine` returned: the model of the CPU, or the device."""
    return host["cpu"] if host["platform"] == "cpu" else host["device"]


def show_progress(text: str) -> None:
    """Shows a line on stderr, which the next call overwrites."""
    print(f"\r{text:<60}", end="" if text else "\r", file=sys.stderr, flush=True)


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Measures everything and returns the results in the form of the JSON file."""
    sample_seconds = 0.001 if args.quick else 0.005
    torch, torch_version = find_torch(not args.no_torch)
    show_progress("memory bandwidth")
    bytes_per_second = bandwidth(
        1_000_000 if args.quick else 50_000_000, args.rounds, sample_seconds
    )
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "torch": torch_version,
        "rounds": args.rounds,
        "bytes_per_second": bytes_per_second,
        "sizes": {},
    }
    for size in args.sizes:
        show_progress(size.name)
        result: dict[str, Any] = {"leaves": size.leaves, "values": size.values}
        for what, numbers in measure(size, args.rounds, sample_seconds, torch):
            result[what] = numbers
            show_progress(f"{size.name}: {what} done")
        limit, step = limit_seconds(size, bytes_per_second), result["jitted_step"]
        result["limit"] = {"seconds": limit} | {
            name: limit / step[name]["median"] for name in ("ours", "optax")
        }
        results["sizes"][size.name] = result
    size = parse_size("20x1k" if args.quick else "100x100k")
    show_progress(f"{size.name}: diagnostics")
    results["diagnostics"] = {"size": size.name} | measurement(
        size, args.rounds, sample_seconds, target=1.5
    )
    size = parse_size("20x1k" if args.quick else "1000x1k")
    show_progress(f"{size.name}: trace, lower, compile")
    results["compile_times"] = {"size": size.name} | compilation.times(
        size, repeats=max(6, args.rounds // 4)
    )
    results["compiles"] = compilation.counts()
    show_progress("")
    return results


def duration(seconds: float) -> str:
    """Formats seconds with three significant digits and a unit."""
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def verdict(numbers: dict[str, Any]) -> str:
    """Formats the target and whether it was reached."""
    return f"<= {numbers['target']:<5g} {'reached' if numbers['reached'] else 'missed'}"


def in_bytes(of: dict[str, int | None]) -> str:
    """Formats the bytes of a contestant by kind."""
    return ", ".join(
        f"{kind.removesuffix('_bytes')} {'unknown' if count is None else f'{count:,}'}"
        for kind, count in of.items()
    )


def row(what: str, numbers: dict[str, Any], other: str = "optax") -> str:
    """Formats one line of the table: both medians with quartiles, the ratio and the verdict."""

    def cell(name):
        samples = numbers[name]
        low, high = duration(samples["lower_quartile"]), duration(samples["upper_quartile"])
        return f"{duration(samples['median'])} [{low}, {high}]"

    ratio = numbers["ratio"]
    line = f"  {what:<38} {cell('ours'):<28} {cell(other):<28} "
    line += f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    if "target" in numbers:
        noise = ", within noise" if numbers["within_noise"] else ""
        line = f"{line:<126} {verdict(numbers)}{noise}"
    return line


def table(results: dict[str, Any]) -> str:
    """Formats all results as text."""
    host = results["machine"]
    lines = [
        f"{host['device']} x {host['devices']}, {host['cpu']}, {host['cores']} cores; python "
        f"{host['python']}, jax {host['jax']}, optax {host['optax']}; torch {results['torch']}",
        f"memory bandwidth {results['bytes_per_second'] / 1e9:.3g} GB/s; "
        f"medians of {results['rounds']} rounds [quartiles], ratio [95% confidence interval]",
    ]
    heading = f"  {'':<38} {'momentum_jax':<28} {'compared with':<28} {'ratio':<25} target"
    for name, result in results["sizes"].items():
        lines += ["", f"{name} float32 values", heading]
        lines += [row(f"{label}: vs Optax", result[what]) for what, label in LABELS.items()]
        for kind, numbers in result.get("torch", {}).items():
            lines.append(row(f"jitted step: vs PyTorch SGD({kind})", numbers, kind))
        control, limit = result["control"], result["limit"]
        lines += [
            f"  control, Optax's jitted step vs itself: {control['median']:.3f} "
            f"[{control['low']:.3f}, {control['high']:.3f}]",
            f"  minimum time of a step by memory bandwidth: {duration(limit['seconds'])}; "
            f"minimum / time of the jitted step: momentum_jax {limit['ours']:.0%}, "
            f"Optax {limit['optax']:.0%}",
            *(f"  bytes, {name}: {in_bytes(of)}" for name, of in result["memory"].items()),
        ]
    size, numbers = results["diagnostics"]["size"], results["diagnostics"]
    lines += ["", f"{size}: diagnostics", heading]
    lines.append(row("measure, jitted: vs our jitted step", numbers, "step"))
    times = results["compile_times"]
    lines += ["", f"{times['size']}: jitted step, cold caches", heading]
    lines += [row(f"{stage}: vs Optax", times[stage]) for stage in times if stage != "size"]
    lines += ["", "compilations for a new learning_rate and for a new mu"]
    for situation, of in results["compiles"].items():
        each = [
            f"{who} {of[who]['learning_rate']} and {of[who]['mu']}" for who in ("ours", "optax")
        ]
        lines.append(f"  {situation:<38} {'; '.join(each):<30}".rstrip())
        if "target" in of:
            lines[-1] += f"   {verdict(of)}"
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmarks, prints the table and writes the JSON."""
    args = parse(arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    results = measure_all(args)
    print(table(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
