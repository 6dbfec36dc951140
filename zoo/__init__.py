"""A PyTorch Lightning model zoo of differentiable mechanisms.

Importing this package imports neither torch nor lightning; the first call that needs them does.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from zoo.cards import info, list_models
    from zoo.errors import ZooError
    from zoo.evaluation import evaluate, reproduce
    from zoo.finetuning import finetune
    from zoo.publishing import push
    from zoo.registry import register
    from zoo.tasks.base import ZooModule
    from zoo.training import fit

__version__ = "0.1.0"

__all__ = [
    "ZooError",
    "evaluate",
    "finetune",
    "fit",
    "info",
    "list_models",
    "load",
    "push",
    "register",
    "reproduce",
]

_MODULES = {
    "ZooError": "zoo.errors",
    "evaluate": "zoo.evaluation",
    "finetune": "zoo.finetuning",
    "fit": "zoo.training",
    "info": "zoo.cards",
    "list_models": "zoo.cards",
    "push": "zoo.publishing",
    "register": "zoo.registry",
    "reproduce": "zoo.evaluation",
}
"""Public name -> where it is, imported on first use."""


def load(
    name: str | os.PathLike[str],
    revision: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    num_classes: int | None = None,
    seed: int | None = None,
    local_files_only: bool = False,
    **network_overrides: Any,
) -> ZooModule:
    """Load a pretrained model: bundled, from a local folder, from the cache, or from the Hub.

    Args:
        name: A weight (`"architecture.tag"`), an architecture, which means its default weight, a
            checkpoint folder, or a repository on the Hub (`"owner/name"`, `"owner/name@tag"`,
            `"hf://owner/name"`).
        revision: A commit, tag or branch on the Hub; by default the commit in the model's card.
        device: Where to put the model; None is the CPU.
        dtype: Floating point type of the network, as `torch.bfloat16` or `"bfloat16"`; None is
            float32, whatever the file stores.
        strict: Whether the names and shapes of all tensors must agree.
        num_classes: For a new number of classes: the head is replaced by a fresh one.
        seed: Of a fresh head; None draws it from the global random state.
        local_files_only: Never to use the network.
        network_overrides: Arguments of the network to be other than in the checkpoint.

    Returns:
        The LightningModule in eval mode; its `load_report` says which tensors were loaded, dropped
        and initialised.

    Raises:
        ZooError: In one line: the name is unknown, a file is damaged or unsafe, an argument is
            wrong.
    """
    from zoo import checkpoints, hub
    from zoo.errors import ConfigError

    given: Any = name
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            f"load takes the name of a weight, a checkpoint folder or owner/name on the Hub, got "
            f"{given!r:.60}."
        )
    folder, card = hub.resolve(name, revision, local_files_only)
    module = checkpoints.load(
        folder,
        files=None if card is None else card.files,
        device=device,
        dtype=dtype,
        strict=strict,
        num_classes=num_classes,
        seed=seed,
        **network_overrides,
    )
    module.loaded_from = os.fspath(name) if card is None else card.name
    return module


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
