"""What int8 weights would save where an LLM writes on this CPU: its matrix products with float32 weights, and with int8 ones.

`python -m tests.bench.int8`; a minute. The shapes are SmolLM2-135M's: a layer's, and the head's. Ways with int8 weights and float32
states (one scale for each row of a matrix): torch's own kernel, and turning the weights back before each product, which any machine can.
Rows are tokens that are read or written at a time: 1 is a single answer, 64 a batch of answers, 512 prompts. What is printed are
times as ratios to float32, medians of turns in one process.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from recbole_llm.artifacts import write_json

RESULTS = Path(__file__).parent / "int8.json"
SHAPES = {"into a layer": (576, 1536), "out of it": (1536, 576), "head": (576, 49152)}
ROWS = (1, 8, 64, 512)
TURNS = 5


def milliseconds(function: Callable[[], object]) -> float:
    """One call."""
    began = perf_counter()
    function()
    return 1e3 * (perf_counter() - began)


def measured(rows: int, width: int, height: int) -> dict[str, float]:
    """Milliseconds of float32, and the ratios of the two ways to it; the largest error of a product, as a share of its largest entry."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, width, generator=generator)
    weight = torch.randn(height, width, generator=generator)
    scale = weight.abs().amax(dim=1) / 127
    small = (weight / scale.unsqueeze(1)).round().to(torch.int8)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "float32": lambda: states @ weight.T,
        "kernel": lambda: torch._weight_int8pack_mm(states, small, scale),
        "turned back": lambda: (states @ small.float().T) * scale,
    }
    exact = ways["float32"]()
    error = {name: float((way() - exact).abs().max() / exact.abs().max()) for name, way in ways.items()}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            spent[name].append(milliseconds(way))
    median = {name: statistics.median(each) for name, each in spent.items()}
    ratios = {name: median[name] / median["float32"] for name in ways if name != "float32"}
    return {"float32 ms": median["float32"], **ratios, "error": max(error.values())}


def main() -> None:
    """Measure every shape, print the table, write the JSON."""
    found: dict[str, dict] = {}
    for what, (width, height) in SHAPES.items():
        for rows in ROWS:
            found[f"{what}, {rows} rows"] = measured(rows, width, height)
    write_json(RESULTS, {"threads": torch.get_num_threads(), "torch": torch.__version__, "products": found})
    print(f"{'product':24s} float32 ms   int8, torch's kernel   int8, turned back   error")
    for name, each in found.items():
        print(
            f"{name:24s} {each['float32 ms']:10.3f} {each['kernel']:20.1f} x {each['turned back']:17.2f} x   {each['error']:.4f}"
        )


if __name__ == "__main__":
    main()
