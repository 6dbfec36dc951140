"""What fine-tuning does to a module before and after its training.

Before: the weights of the base, a new head where the classes are others, what is frozen, adapters.
After: adapters are saved alone, and merged. The training in between is any other's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo import checkpoints, hub
from zoo.errors import ConfigError
from zoo.tasks.base import ZooModule
from zoo.tuning.config import FineTuning
from zoo.tuning.freezing import freeze, unfreeze
from zoo.tuning.lora import (
    adaptable_layers,
    add_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    save_lora,
)

__all__ = ["ADAPTER_FILE", "finish", "needs_new_head", "prepare"]

ADAPTER_FILE = "adapter.safetensors"
"""In a run folder: adapters alone, and the new head where there is one."""


def prepare(
    module: ZooModule,
    datamodule: Any,
    how: FineTuning,
    *,
    seed: int = 0,
    base: ZooModule | None = None,
) -> None:
    """Make a fresh module of the recipe's into what its training starts from, in place.

    Args:
        module: as constructed; of a new head, what was drawn stays.
        datamodule: what it is to be trained on.
        how: which base, and what may change.
        seed: of the adapters.
        base: the base, where it is at hand.

    Raises:
        ZooError: the base is not to be had or of another kind, data and network do not fit, a
            pattern matches nothing, nothing would be trained, or what the base does not know of
            the data would stay as it was drawn.
    """
    if base is None:
        folder, card = hub.resolve(how.base_model)
        base = checkpoints.load(folder, files=None if card is None else card.files)
    if type(base) is not type(module):
        raise ConfigError(
            f"{how.base_model} is a {type(base).__name__}, and the recipe is for a "
            f"{type(module).__name__}."
        )
    averaged = module.published_network is not module.network
    if averaged and how.adapters is not None:
        raise ConfigError(
            "Adapters and an average of weights do not go together: set model.ema_decay=null."
        )
    module.take_preprocessing(base.preprocessing, datamodule)
    new_head = needs_new_head(module, base)
    head = module.head_parameters
    checkpoints.start_from(module, base, replaced=head if new_head else ())
    if averaged:
        module.published_network.load_state_dict(module.network.state_dict())
    network = module.network
    if how.freeze is not None:
        freeze(network, how.freeze, head=head)
    if how.adapters is not None:
        target = how.target
        if target is None and new_head:
            target = tuple(n for n in adaptable_layers(network) if f"{n}.weight" not in head)
            if not target:
                raise ConfigError(
                    f"{type(network).__name__} has no layer for an adapter beside its new head; "
                    f"use freeze='encoder'."
                )
        add_lora(
            network,
            rank=how.rank,
            alpha=how.alpha,
            target=target,
            variant=how.adapters,
            seed=seed,
        )
        if new_head:
            unfreeze(network, head)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(f"freeze={how.freeze!r} leaves nothing to train.")
    _check_new_rows(module, base, how)


def _check_new_rows(module: ZooModule, base: ZooModule, how: FineTuning) -> None:
    """Check that what the base does not know of the data, and was drawn, will be learned.

    Raises:
        ConfigError: it is frozen.
    """
    network = module.network
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    sizes = {name: len(parameter) for name, parameter in network.named_parameters()}
    rows = module.carried_rows(base)
    new = {n: sizes[n] - len(here) for n, (here, _) in rows.items() if n in frozen}
    unknown = {name.partition(".")[0]: count for name, count in new.items() if count}
    if not unknown:
        return
    said = " and ".join(f"{n} {what if n > 1 else what[:-1]}" for what, n in unknown.items())
    rest = dict.fromkeys(name.partition(".")[0] for name in sizes if name in frozen)
    parts = [part for part in rest if part not in unknown]
    advice = f"freeze={parts}" if parts else "leave out freeze"
    raise ConfigError(
        f"The data have {said} the base does not know; leave {' and '.join(unknown)} trainable: "
        f"{advice}{' in place of adapters' if how.adapters else ''}."
    )


def needs_new_head(module: ZooModule, base: ZooModule) -> bool:
    """Whether the classes of a module are others than those that the base knows.

    A head for as many classes that have numbers for names, as `zoo.load(name, num_classes=...)`
    makes it, is waiting for names and stays.
    """
    now, before = module.config, base.config
    if not hasattr(now, "num_classes") or now.num_classes != before.num_classes:
        return hasattr(now, "num_classes")
    if module.preprocessing is None or base.preprocessing is None:
        return False
    numbered = base.swap_head(base.preprocessing, before.num_classes)
    known = (module.preprocessing.classes, numbered.classes)
    return base.preprocessing.classes not in known


def finish(module: ZooModule, folder: Path | None) -> None:
    """Save adapters alone into a run folder, and merge them, so that the network is a plain one.

    Args:
        module: as trained.
        folder: the run folder; None, in all processes but the first, saves nothing.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    network = module.network
    if not lora_layers(network):
        return
    if folder is not None:
        parameters = dict(network.named_parameters())
        beside = [name for name in module.head_parameters if parameters[name].requires_grad]
        save_lora(network, folder / ADAPTER_FILE, beside=beside)
    merge_lora(network)
    remove_lora(network)
