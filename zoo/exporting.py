"""Export a weight for users without this package, and compare the file with the model.

The file takes and returns tensors, with any batch size; what a model carries along (the memory of a
language model) goes in and out as tensors too.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from zoo import checkpoints, hub
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError, nearest

if TYPE_CHECKING:
    from zoo.tasks.base import Exportable, ZooModule

__all__ = ["FORMATS", "Export", "ExportFormat", "export", "export_module", "run"]

ExportFormat = Literal["onnx", "torch-export"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)

_SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference from the model, relative to its largest output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """A file that was written and compared."""

    path: Path
    format: ExportFormat
    inputs: dict[str, tuple[int, ...]]
    """Shapes by name, without the batch, which comes first and is free."""
    outputs: tuple[str, ...]
    difference: float
    """Largest one on random input of another batch size, relative to the largest output."""


def export(
    name: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    format: ExportFormat = "torch-export",
    revision: str | None = None,
) -> Export:
    """Export a weight, in float32, and compare the file with the model.

    Args:
        name: A weight of the zoo, a checkpoint folder, or a repository on the Hub.
        out: The file to write; None: the weight's name with the format's suffix, `.onnx` or `.pt2`.
        format: ONNX, or a program of `torch.export`.
        revision: On the Hub.

    Returns:
        What was written.

    Raises:
        UnknownNameError: There is no such format or weight.
        ConfigError: The weight's card says that it cannot be exported so, and why.
        CheckpointError: The file cannot be written, or computes something else; then it is removed.
    """
    if format not in FORMATS:
        hint = nearest(format, FORMATS) or f" There are: {', '.join(FORMATS)}."
        raise UnknownNameError(f"Unknown format {format!r}.{hint}")
    folder, card = hub.resolve(name, revision)
    if card is not None and format in card.not_exported:
        raise ConfigError(
            f"{card.name} cannot be exported to {format}: {card.not_exported[format]}"
        )
    module = checkpoints.load(folder, files=None if card is None else card.files)
    title = folder.name if card is None else card.name
    path = Path(out) if out is not None else Path(f"{title}{_SUFFIXES[format]}")
    return export_module(module, path, format)


def export_module(module: ZooModule, path: Path, format: ExportFormat) -> Export:
    """As `export`, for a module in memory, whose precision and device do not matter."""
    if format == "onnx":
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ZooError(f"ONNX needs {', '.join(missing)}: pip install 'zoo[export]'")
    parameters = list(module.parameters())
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in parameters):
        module = copy.deepcopy(module).float().cpu()
    module.eval()
    example = module.exportable(2, torch.Generator().manual_seed(0))
    program = _program(example)
    partial = path.with_name(f".{path.name}.part{_SUFFIXES[format]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if format == "onnx":
                _write_onnx(program, example, partial)
            else:
                torch.export.save(program, partial)
        difference = _difference(module, partial, format)
        if not difference <= TOLERANCE:
            raise CheckpointError(
                f"What was exported differs from the model by {difference:.1e} (relative), more "
                f"than {TOLERANCE:.0e}; {path} was not written."
            )
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return Export(
        path=path,
        format=format,
        inputs={name: tuple(tensor.shape[1:]) for name, tensor in example.inputs.items()},
        outputs=example.outputs,
        difference=difference,
    )


def run(
    path: str | os.PathLike[str], format: ExportFormat, inputs: dict[str, Tensor]
) -> Sequence[Tensor]:
    """Compute what an exported file computes, without anything of this package.

    Args:
        path: The file.
        format: Its format.
        inputs: Tensors by name, with any batch size.
    """
    if format == "torch-export":
        loaded = torch.export.load(path).module()
        return cast("Sequence[Tensor]", loaded(*inputs.values()))
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    arrays = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(array) for array in arrays]


class _Positional(nn.Module):
    """Takes all inputs as one packed argument, which has one shape to declare for any network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.network(*inputs)
        return outputs


def _program(example: Exportable) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(
            _Positional(example.network),
            tuple(example.inputs.values()),
            dynamic_shapes=(tuple({0: batch} for _ in example.inputs),),
        )


def _write_onnx(program: torch.export.ExportedProgram, example: Exportable, path: Path) -> None:
    written: Callable[..., Any] = torch.onnx.export
    written(
        program,
        f=os.fspath(path),
        input_names=list(example.inputs),
        output_names=list(example.outputs),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


@torch.no_grad()
def _difference(module: ZooModule, path: Path, format: ExportFormat) -> float:
    """On another batch size than the file was made with, and on one sample."""
    worst = 0.0
    for batch in (3, 1):
        fresh = module.exportable(batch, torch.Generator().manual_seed(batch))
        expected = fresh.network(*fresh.inputs.values())
        found = run(path, format, fresh.inputs)
        for ours, theirs in zip(expected, found, strict=True):
            if ours.shape != theirs.shape:
                return float("inf")
            finite = ours.isfinite()
            if not torch.equal(finite, theirs.isfinite()) or not finite.any():
                return float("inf")
            if not torch.equal(ours[~finite], theirs[~finite]):  # NaN is no answer on either side
                return float("inf")
            ours, theirs = ours[finite], theirs[finite]
            scale = float(ours.abs().max().clamp(min=1e-6))
            worst = max(worst, float((ours - theirs).abs().max()) / scale)
    return worst
