"""Golden outputs: a few thousand numbers of each bundled weight that must come out everywhere.

After a change that is meant, look at what it did and accept it:

    python -m tests.golden                  # how far each weight is from its golden outputs
    python -m tests.golden --accept NAME    # write them anew

The outputs are computed in float64. Processors order the sums of a matrix product differently,
which changes a float64 result by about 1e-15 of its size; the few float32 constants in a network
(tables of positions) limit the agreement to about 1e-6. What is stored is float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import zoo
from tests.examples import example, first_tensor
from zoo import cards

FOLDER = Path(__file__).parent / "golden_outputs"
TOLERANCE = 1e-4
"""Largest deviation that passes, in standard deviations of the outputs."""
LARGEST_FILE = 50_000
_VALUES = 4096


def bundled() -> list[str]:
    """Names of the weights whose files come with the package."""
    return [name for name in cards.load_cards() if cards.pretrained_folder(name).is_dir()]


def outputs(module: Any) -> Tensor:
    """Evenly spaced values of the network's output on the example of its task, float64."""
    inputs = [x.double() if x.is_floating_point() else x for x in example(module).inputs]
    with torch.no_grad():
        flat = first_tensor(module.double().network(*inputs)).flatten()
    index = torch.linspace(0, len(flat) - 1, min(_VALUES, len(flat)), dtype=torch.float64)
    return flat[index.long()]


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in standard deviations of what is expected."""
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    return float((found.double() - expected).abs().max() / expected.std())


def path(name: str) -> Path:
    """Where the golden outputs of a weight are."""
    return FOLDER / f"{name}.safetensors"


def expected(name: str) -> Tensor:
    """The golden outputs of a weight."""
    return load_file(path(name))["outputs"]


def accept(name: str) -> Path:
    """Write the golden outputs of a weight."""
    found = outputs(zoo.load(name, local_files_only=True)).float()
    target = path(cards.find(name).name)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(save({"outputs": found}))
    return target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Golden outputs.")
    parser.add_argument("--accept", metavar="NAME", action="append", default=[])
    options = parser.parse_args(arguments)
    try:
        for name in options.accept:
            print(f"wrote {accept(name)}")
    except zoo.ZooError as error:
        print(error, file=sys.stderr)
        return 2
    if options.accept:
        return 0
    worst = 0.0
    for name in bundled():
        if not path(name).is_file():
            print(f"{name}: has no golden outputs; python -m tests.golden --accept {name}")
            worst = float("inf")
            continue
        found = deviation(outputs(zoo.load(name, local_files_only=True)), expected(name))
        print(f"{name}: {found:.1e} standard deviations off, {TOLERANCE:.1e} allowed")
        worst = max(worst, found)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
