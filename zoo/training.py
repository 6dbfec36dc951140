"""Training from a recipe: LightningCLI underneath, plain keys and one run folder on top.

A recipe is YAML with a `zoo:` block (`architecture`, `data`, the `weight` it is for, and, where it
does not start from scratch, `finetune`) beside the `seed_everything`, `trainer`, `model` and `data`
of LightningCLI. Architectures and data modules
are named from closed lists; a recipe of this project never names a class.

A run folder holds `recipe.yaml` (resolved, usable as is), `metrics.csv`, `last.ckpt` to resume
from, and, when training has finished, `checkpoint/`, an ordinary checkpoint folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import signal
import sys
import threading
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from zoo.cards import shipped_folder
from zoo.configs import build, to_json
from zoo.errors import ConfigError, UnknownNameError, ZooError, nearest
from zoo.files import CONFIG_FILE, NO_ROOM, WEIGHTS_FILE, is_hidden, named, write_bytes
from zoo.registry import architecture
from zoo.tuning.config import FineTuning

__all__ = [
    "DATA_MODULES",
    "Recipe",
    "Run",
    "check_apart",
    "check_finished",
    "data_module",
    "data_name",
    "find_recipe",
    "fit",
    "instantiate",
    "make_recipe",
    "options_of",
    "read_facts",
    "read_recipe",
]

DATA_MODULES: dict[str, str] = {
    "densities": "zoo.data.densities:DensityDataModule",
    "encoder-images": "zoo.data.encoder_images:EncoderImages",
    "expert-recovery": "zoo.data.expert_recovery:ExpertRecoveryDataModule",
    "image-pairs": "zoo.data.image_pairs:ImagePairDataModule",
    "images": "zoo.data.images:ImageDataModule",
    "ratings": "zoo.data.ratings:RatingsDataModule",
    "spirals": "zoo.data.spirals:SpiralDataModule",
    "streams": "zoo.data.streams:StreamDataModule",
    "text": "zoo.data.text:TextDataModule",
    "text-streams": "zoo.data.text_streams:TextStreamDataModule",
}
"""Data modules that a recipe can name."""

_SECTIONS = ("zoo", "seed_everything", "trainer", "model", "data")
_OF_KEYS = ("trainer", "model", "data")
"""Sections that hold keys, and that may be left empty."""

_DECISIVE = (
    "accumulate_grad_batches",
    "fast_dev_run",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "overfit_batches",
)
"""Options of the trainer that decide what is learned; of the others, the machine and its owner."""

_LENGTH = ("max_epochs", "max_steps", "max_time", "min_epochs", "min_steps")
"""Those of them that a run may be resumed with others of."""

_FOR_SPEED = ("channels_last", "compile")
"""Options of a module that suit a machine, and decide nothing of what is learned."""

_ZOO_KEYS = ("architecture", "data", "weight", "base", "name", "differs", "against", "finetune")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as read: which classes it is for, and the options for LightningCLI.

    Attributes:
        architecture: name of an architecture.
        data: key of `DATA_MODULES`.
        weight: name of the weight that the recipe made, or "" for none.
        name, differs: of a control: what it is called, and in what it differs from the model.
        against: of a control: the control that it is compared with, as the name of its file
            without suffix; "" for the model.
        finetune: which weights to start from; None: from scratch.
        options: sections `seed_everything`, `trainer`, `model`, `data`.
        path: where it was read.
        where: what messages about it begin with.
    """

    architecture: str
    data: str
    weight: str
    options: dict[str, Any]
    path: Path
    name: str = ""
    differs: str = ""
    against: str = ""
    finetune: FineTuning | None = None
    where: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training.

    Attributes:
        module: the trained LightningModule, in eval mode.
        datamodule: what it was trained on.
        folder: the run folder.
        checkpoint: the checkpoint folder in it.
        cpu_minutes: processor time of this process over all parts of the run, in minutes.
        wall_minutes: time that passed, likewise.
    """

    module: Any
    datamodule: Any
    folder: Path
    checkpoint: Path
    cpu_minutes: float
    wall_minutes: float


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """Path of a recipe: a file, or the name of one that comes with the package.

    Raises:
        UnknownNameError: there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    folder = shipped_folder("recipes")
    known = {
        file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")
    }
    name = str(name_or_path).removesuffix(".yaml")
    for candidate in (name, name.removeprefix("recipes/")):
        if candidate in known:
            return known[candidate]
    raise UnknownNameError(
        f"No recipe {str(name_or_path)!r}: neither a file nor one of the package's."
        f"{nearest(name, known)}"
    )


def read_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    Args:
        name_or_path: a file or the name of a recipe of the package.
        overrides: values in YAML, as in `trainer.max_epochs=3`; those of keys that end in `path`
            or `data_dir`, as in `data.path=my.txt`, are text, or null.

    Raises:
        ConfigError: the file is no recipe, or an override is malformed.
        UnknownNameError: no such recipe, architecture or data module.
    """
    path = find_recipe(name_or_path)
    return make_recipe(_read_yaml(path), overrides, path)


def make_recipe(
    values: dict[str, Any], overrides: Sequence[str], path: Path, *, is_file: bool = True
) -> Recipe:
    """A recipe of what its file would hold.

    Args:
        values: the sections; they are changed.
        overrides: as of `read_recipe`.
        path: where they come from, for messages and for the name of the run folder.
        is_file: whether there is such a file; else messages do not begin with it.

    Raises:
        ConfigError: these are no sections of a recipe, or an override is malformed.
        UnknownNameError: no such architecture or data module.
    """
    where = f"{path}: " if is_file else ""
    _drop_empty(values)
    for override in overrides:
        _apply(values, override)
    _check_keys(values, where)
    header = values.pop("zoo")
    for key in values:
        if key not in _SECTIONS:
            raise ConfigError(f"{where}unknown section {key!r}.{nearest(key, _SECTIONS)}")
    for key in header:
        if key not in _ZOO_KEYS:
            raise ConfigError(f"{where}unknown key zoo.{key}.{nearest(key, _ZOO_KEYS)}")
    for section in _OF_KEYS:
        if not isinstance(values.get(section, {}), dict):
            raise ConfigError(f"{where}section {section!r} must hold keys.")
    for key in ("architecture", "data"):
        if not isinstance(header.get(key), str):
            raise ConfigError(f"{where}section 'zoo' needs {key!r}.")
    for key in ("weight", "name", "differs", "against"):
        if not isinstance(header.get(key), (str, type(None))):
            raise ConfigError(f"{where}zoo.{key} must be text, got {header[key]!r}.")
    architecture(header["architecture"])
    if header["data"] not in DATA_MODULES:
        raise UnknownNameError(
            f"{where}unknown data module {header['data']!r}."
            f"{nearest(header['data'], DATA_MODULES)}"
            f" There are: {', '.join(DATA_MODULES)}."
        )
    finetune = header.get("finetune")
    return Recipe(
        finetune=finetune and build(FineTuning, finetune, f"{where}zoo.finetune"),
        architecture=header["architecture"],
        data=header["data"],
        weight=header.get("weight") or "",
        options=values,
        path=path,
        where=where,
        name=header.get("name") or "",
        differs=header.get("differs") or "",
        against=header.get("against") or "",
    )


def _drop_empty(values: dict[str, Any]) -> None:
    """Remove sections of which no more is there than `data:`."""
    for section in _OF_KEYS:
        if values.get(section, {}) is None:
            del values[section]


def _check_keys(values: dict[Any, Any], where: str) -> None:
    """Check that all keys are text: YAML makes numbers, dates and truth values of what looks so."""
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{where}keys must be text, got {key!r}; put it in quotes.")
        if isinstance(value, dict):
            _check_keys(value, where)


def _read_yaml(path: Path, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Values of a recipe, on top of those of the recipe beside it that `zoo.base` names."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # as of no UTF-8, or of a date that is none
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is not readable YAML: {reason}") from None
    if not isinstance(values, dict) or not isinstance(values.get("zoo"), dict):
        raise ConfigError(f"{path} is no recipe: it has no section 'zoo' with an architecture.")
    _drop_empty(values)  # which change nothing of what the base says
    base = values["zoo"].pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or Path(base).name != base or base in (*above, path.name):
        raise ConfigError(f"{path}: zoo.base must be the name of another file in its folder.")
    if not (path.parent / base).is_file():
        raise ConfigError(f"{path}: its base {base} is not in {path.parent}.")
    return _merge(_read_yaml(path.parent / base, (*above, path.name)), values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"Cannot read {override!r}; write section.key=value, as data.path=my.txt."
        )
    if parts[0] not in _SECTIONS:
        raise ConfigError(
            f"Unknown section {parts[0]!r} in {override!r}.{nearest(parts[0], _SECTIONS)}"
            f" There are: {', '.join(_SECTIONS)}."
        )
    is_path = parts[-1].endswith(("path", "data_dir"))
    value = _text_of_path(text) if is_path else _value(text, override)
    if len(parts) == 1 and (key in _OF_KEYS or isinstance(values.get(key), dict)):
        raise ConfigError(
            f"{override!r}: {key!r} is a section; name a key in it, as {key}.key=value."
        )
    node = values
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{override!r}: {part!r} is a value, not a section.")
        node = child
    node[parts[-1]] = value


def _value(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter of what looks like a date and is none
        raise ConfigError(f"Cannot read the value in {override!r} as YAML.") from None
    if isinstance(value, str):
        # YAML 1.1 takes 1e-3 for a string; people mean a number.
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _text_of_path(text: str) -> str | None:
    """The text as it is, since 1984, no and 1e5 are names of files too; None for null.

    Quotes are those of YAML, of people who know that other values are YAML.
    """
    if text.strip() in ("", "null", "~"):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _import(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def instantiate(recipe: Recipe, **trainer: Any) -> Any:
    """LightningCLI of a recipe, with model, data module and trainer built and nothing run.

    Args:
        recipe: what `read_recipe` gave.
        trainer: default trainer arguments that the recipe may override.

    Raises:
        ConfigError: an option is unknown or has a wrong value.
    """
    return _cli(recipe, trainer)


def _cli(recipe: Recipe, trainer: dict[str, Any], *, build: bool = True) -> Any:
    """LightningCLI of a recipe; without `build` it has parsed the options and done no more."""
    from lightning.pytorch.cli import LightningCLI

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.exit_on_error = False

        def _set_seed(self) -> None:
            if build:
                super()._set_seed()

        def instantiate_classes(self) -> None:
            if build:
                super().instantiate_classes()

    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(_is_no_advertisement)
    module_class = architecture(recipe.architecture).module_class()
    data_class = _import(DATA_MODULES[recipe.data])
    try:
        with warnings.catch_warnings():
            # The options are passed as values; the words of the command are ours.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
            return CLI(
                module_class,
                data_class,
                args=_with_usable_precision(recipe.options) if build else recipe.options,
                run=False,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults=trainer,
                parser_kwargs={"exit_on_error": False},
            )
    except ZooError:
        raise
    except Exception as error:  # jsonargparse raises its own and passes on the classes' errors
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ZooError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(f"{recipe.where}{_one_line(error)}") from error


def check_apart(folder: Path, recipe: Recipe) -> None:
    """Check that a run folder does not lie among classes of pictures, of which it would be one.

    Raises:
        ConfigError: it does.
        DataError: the pictures lie in no such folders as are read.
    """
    path = recipe.options.get("data", {}).get("path")
    if not path or not Path(path).expanduser().is_dir():
        return
    from zoo.data.images import class_roots  # here, since it imports torch

    roots = [Path(path).expanduser()] if recipe.data == "text-streams" else class_roots(path)
    own = folder.resolve()
    for root in (root.resolve() for root in roots):
        if own.is_relative_to(root) and not is_hidden(own, root):
            raise ConfigError(
                f"The run folder {folder} lies in the data {path}, of which it would become a "
                f"part; choose another `out`."
            )


def check_finished(recipe: Recipe, folder: Path) -> None:
    """Check that a finished run was made with the options of a recipe, where it says with which.

    What may differ is what the run is called, where its data lie and what machine it is for.

    Raises:
        ConfigError: an option differs, or the recipe is not usable.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    now = _decisive(_resolved(_cli(recipe, {}, build=False), recipe))
    before = _decisive(_read_yaml(path))
    if before != now:
        # An option that came after the run has the default that the run had without it.
        stored = read_recipe(path)
        before = _decisive(_resolved(_cli(stored, {}, build=False), stored))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{folder} was made with other options ({key} was {before.get(key)!r}, not "
                f"{now.get(key)!r}); choose another --out."
            )


def _decisive(resolved: dict[str, Any]) -> dict[str, Any]:
    """The options that decide what comes of a training, by their full names."""
    header = resolved["zoo"]
    found = {key: header.get(key) for key in ("architecture", "data")}
    found["seed_everything"] = resolved.get("seed_everything")
    trainer = resolved.get("trainer", {})
    _flatten(found, "trainer", {key: trainer.get(key) for key in _DECISIVE})
    _flatten(found, "model", {**(resolved.get("model") or {}), **dict.fromkeys(_FOR_SPEED)})
    _flatten(found, "data", {**resolved.get("data", {}), "data_dir": None})
    return {key: value for key, value in found.items() if value is not None}


def _flatten(found: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(found, f"{name}.{key}", item)
    else:
        found[name] = value


def _with_usable_precision(options: dict[str, Any]) -> dict[str, Any]:
    """The options, in float32 where bfloat16 was asked of a processor that can only emulate it.

    Without bfloat16 instructions matrix products are about a hundred times slower than in float32.
    """
    import torch

    trainer = options.get("trainer", {})
    on_cpu = trainer.get("accelerator", "auto") == "cpu" or not torch.accelerator.is_available()
    if (
        trainer.get("precision") != "bf16-mixed"
        or not on_cpu
        or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return options
    print("This processor has no bfloat16 arithmetic: training in float32.", file=sys.stderr)
    return {**options, "trainer": {**trainer, "precision": "32-true"}}


def data_module(recipe: Recipe, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """The data module of a recipe, on its own.

    Args:
        recipe: what `read_recipe` gave.
        data_dir: folder to look for the data in first; for the user's own, where they are no more
            at the path of the recipe.

    Raises:
        ConfigError: an option of the section `data` is unknown or has a wrong value.
    """
    options = dict(recipe.options.get("data", {}))
    if data_dir is not None:
        options["data_dir"] = os.fspath(data_dir)
        path = options.get("path")
        if path and not Path(path).expanduser().exists():
            moved = Path(data_dir).expanduser() / data_name(recipe)
            options["path"] = str(moved) if moved.exists() else path
    data_class = _import(DATA_MODULES[recipe.data])
    known = inspect.signature(data_class).parameters
    for key in options:
        if key not in known:
            raise ConfigError(f"{recipe.where}unknown option data.{key}.{nearest(key, known)}")
    hints = typing.get_type_hints(data_class.__init__)
    for key, value in options.items():
        if dataclasses.is_dataclass(hints.get(key)):
            options[key] = build(hints[key], value, f"{recipe.where}data.{key}")
    try:
        return data_class(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{recipe.where}{error}") from None


def data_name(recipe: Recipe) -> str:
    """The data of a recipe in a word; of a path its last part, since the others are nobody's
    business."""
    options = recipe.options.get("data", {})
    path = options.get("path")
    return (path and named(path).name) or str(options.get("dataset", recipe.data))


def options_of(datamodule: Any) -> tuple[str, dict[str, Any]]:
    """Name and options of a data module of the zoo, as the section `data` of a recipe has them.

    Raises:
        ConfigError: it is another one, which a recipe cannot name.
    """
    for name, reference in DATA_MODULES.items():
        if reference.partition(":")[2] == type(datamodule).__name__:
            known = inspect.signature(type(datamodule)).parameters
            return name, {key: _option(datamodule, key) for key in known}
    raise ConfigError(
        f"{type(datamodule).__name__} is no data module of the zoo, so a recipe cannot name it; "
        f"use zoo.tuning in a Trainer of your own."
    )


def _option(datamodule: Any, key: str) -> Any:
    """An option of a data module as plain values; `stream` is kept as `stream_config`, since the
    name is that of what it describes."""
    configured = f"{key}_config"
    value = getattr(datamodule, configured if hasattr(datamodule, configured) else key)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # jsonargparse tells the value last, after all types that it is none of.
    shown = lines[:3] + [line for line in lines[3:] if line.startswith("Given value:")]
    return " ".join(shown) if shown else type(error).__name__


def fit(
    recipe: str | os.PathLike[str] | Recipe,
    overrides: Sequence[str] = (),
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    base: Any = None,
    prepared: Callable[[Any, Any], None] | None = None,
    longer: bool = True,
) -> Run:
    """Train from a recipe and write a checkpoint folder.

    Args:
        recipe: a file, the name of a recipe of the package, or one that was read.
        overrides: `section.key=value`, see `read_recipe`; not together with a `Recipe`.
        out: run folder; None: `runs/<name of the recipe>`.
        resume: go on from `last.ckpt` in the run folder, where there is one. At an epoch boundary
            the result equals that of an uninterrupted run bit for bit on a CPU.
        base: the module that a fine-tuning starts from, where it is at hand; None: what the recipe
            says.
        prepared: is called with the module and the data module before the first step of all.
        longer: whether a run may be resumed for more epochs, steps or time than it was begun for.

    Raises:
        ConfigError: the recipe is not usable, differs from the one that is resumed, or asks for
            fewer epochs or steps than that one has.
        DataError: the data are missing or too small.
        ZooError: the run folder holds a run and `resume` is False, is a checkpoint folder, or
            cannot be written.
        CheckpointError: `last.ckpt` is damaged, or holds more than tensors and plain values.
        KeyboardInterrupt: the training was interrupted; its text says how to go on.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.strategies import FSDPStrategy

    from zoo import checkpoints
    from zoo.tuning.memory import checkpoint_blocks, restore_memory, save_memory

    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    folder = Path("runs") / recipe.path.stem if out is None else Path(out).expanduser()
    check_apart(folder, recipe)
    last = folder / "last.ckpt"
    if not last.exists() and all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        raise ZooError(f"{folder} is a checkpoint folder; choose another --out folder for the run.")
    if last.exists() and not resume:
        raise ZooError(
            f"{folder} holds an earlier run; add --resume to go on with it, or choose another "
            "--out folder."
        )
    # Lightning refuses what is unsafe too, in many lines.
    reached = checkpoints.read_training(last) if last.exists() else {}
    with warnings.catch_warnings():
        _quieten()
        bar = recipe.options.get("trainer", {}).get("enable_progress_bar", True)
        cli = instantiate(
            recipe,
            callbacks=_callbacks(folder, bar),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data modules share batches out themselves
        )
        resolved = _resolved(cli, recipe)
        if last.exists():
            _check_same(resolved, folder / "recipe.yaml", longer=longer)
            for what, done, most in (
                ("epoch", reached.get("epoch", -1) + 1, cli.trainer.max_epochs),
                ("step", reached.get("global_step", 0), cli.trainer.max_steps),
            ):
                if most is not None and -1 < most < done:
                    raise ConfigError(
                        f"{folder} has come to {what} {done} already, and max_{what}s is {most}: "
                        f"ask for as many at least, or choose another --out folder."
                    )
        cli.datamodule.setup("fit")
        sharded = isinstance(cli.trainer.strategy, FSDPStrategy)
        recomputes = recipe.finetune is not None and recipe.finetune.recompute_blocks
        if recipe.finetune is not None:
            from zoo import adaptation

            if sharded and recipe.finetune.adapters is not None:
                raise ConfigError("Adapters do not go with strategy fsdp; choose ddp.")
            seed = int(resolved["seed_everything"])
            adaptation.prepare(cli.model, cli.datamodule, recipe.finetune, seed=seed, base=base)
        if recomputes:
            try:
                checkpoint_blocks(cli.model.network)
            except ValueError as error:
                raise ConfigError(f"recompute_blocks: {error}.") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / "recipe.yaml", _to_yaml(resolved).encode())
        except OSError as error:
            raise ZooError(f"Cannot write the run folder {folder}: {error.strerror}.") from None
        if prepared is not None and not last.exists():
            prepared(cli.model, cli.datamodule)
            cli.model.train()
        part = len(list((folder / "logs").glob("part_*")))
        if cli.trainer.logger is not None:
            cli.trainer.logger = CSVLogger(folder, name="logs", version=f"part_{part}")
        if recipe.finetune is not None and recipe.finetune.save_memory and not sharded:
            save_memory(cli.model.network)
        try:
            with _explained(folder):
                cli.trainer.fit(
                    cli.model,
                    datamodule=cli.datamodule,
                    ckpt_path=str(last) if last.exists() else None,
                    weights_only=True,
                )
        finally:
            restore_memory(cli.model.network)
            if recomputes:
                checkpoint_blocks(cli.model.network, on=False)

    cli.model.eval()
    checkpoint = folder / "checkpoint"
    first = cli.trainer.is_global_zero
    if recipe.finetune is not None:
        adaptation.finish(cli.model, folder if first else None)
    if first:
        if sharded:
            checkpoints.convert(last, checkpoint)  # each process has a part of the weights only
        else:
            checkpoints.save(cli.model, checkpoint, recipe=_to_yaml(resolved))
    cli.trainer.strategy.barrier("checkpoint")  # no process reads it before it is there
    watch = next(c for c in cli.trainer.callbacks if type(c).__name__ == "Stopwatch")
    assert isinstance(cli.trainer, pl.Trainer)
    return Run(
        module=cli.model,
        datamodule=cli.datamodule,
        folder=folder,
        checkpoint=checkpoint,
        cpu_minutes=watch.cpu_s / 60,
        wall_minutes=watch.wall_s / 60,
    )


def read_facts(run: Path) -> dict[str, Any]:
    """What a run folder knows about its training, as plain JSON.

    Raises:
        ZooError: there is no sound training checkpoint and recipe in the folder.
    """
    from zoo import checkpoints
    from zoo.provenance import machine

    last = run / "last.ckpt"
    if not last.is_file() or not (run / "recipe.yaml").is_file():
        raise ZooError(f"{run} is no run folder: it needs last.ckpt and recipe.yaml.")
    content = checkpoints.read_training(last)
    recipe = read_recipe(run / "recipe.yaml")
    # The key is the qualified name, which says in which function the class stands.
    watch = next(s for key, s in content["callbacks"].items() if key.endswith("Stopwatch"))
    averaged = content.get("zoo_published", "network") != "network"
    return {
        "seed": recipe.options.get("seed_everything"),
        "epochs": content["epoch"] + 1,
        "steps": content["global_step"],
        "precision": recipe.options.get("trainer", {}).get("precision"),
        "cpu_minutes": round(watch["cpu_s"] / 60, 1),
        "wall_minutes": round(watch["wall_s"] / 60, 1),
        "machine": content.get("zoo_machine") or machine(),
        "source_commit": content.get("zoo_commit"),
        **({"versions": content["zoo_versions"]} if "zoo_versions" in content else {}),
        **({"weights": "exponential moving average"} if averaged else {}),
    }


def _callbacks(folder: Path, progress_bar: bool) -> list[Any]:
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar

    class Stopwatch(Callback):
        """Processor and wall time of the training, kept in the checkpoint over interruptions."""

        def __init__(self) -> None:
            self.cpu_s = self.wall_s = 0.0
            self._cpu = self._wall = 0.0

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self._cpu, self._wall = time.process_time(), time.perf_counter()

        def _lap(self) -> None:
            cpu, wall = time.process_time(), time.perf_counter()
            self.cpu_s, self.wall_s = self.cpu_s + cpu - self._cpu, self.wall_s + wall - self._wall
            self._cpu, self._wall = cpu, wall

        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            self._lap()

        def state_dict(self) -> dict[str, float]:
            self._lap()
            return {"cpu_s": self.cpu_s, "wall_s": self.wall_s}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.cpu_s, self.wall_s = state["cpu_s"], state["wall_s"]

    refresh_rate = 1 if sys.stderr.isatty() else 50
    bars = [TQDMProgressBar(refresh_rate=refresh_rate)] if progress_bar else []
    return [
        # Without a monitored value the newest checkpoint replaces the one before.
        ModelCheckpoint(
            dirpath=folder,
            filename="last",
            save_top_k=1,
            # Else it is written where validation is, which may be every fifth epoch.
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
        *bars,
        Stopwatch(),
    ]


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Say what to do when a training is interrupted or has no room."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:  # Lightning's answer to an interrupt; it also ignores further ones
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt(
            f"; {folder} keeps the epochs that are done: repeat the command, fit and reproduce "
            "with --resume"
        ) from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise ZooError(f"Cannot write the run folder {folder}: {error.strerror}.") from error


def _quieten() -> None:
    """Hide advice that does not apply: data are in memory, and runs are resumed on purpose."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*number of training batches .* is smaller than.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*tensorboardX.*")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's log is more than a tip to install a service."""
    return "Tip:" not in record.getMessage()


def _resolved(cli: Any, recipe: Recipe) -> dict[str, Any]:
    config = yaml.safe_load(cli.parser.dump(cli.config))
    header: dict[str, Any] = {"architecture": recipe.architecture, "data": recipe.data}
    for key in ("weight", "name", "differs"):
        if getattr(recipe, key):
            header[key] = getattr(recipe, key)
    if recipe.finetune is not None:
        header["finetune"] = to_json(recipe.finetune)
    return {"zoo": header, **{key: config[key] for key in _SECTIONS if key in config}}


def _check_same(resolved: dict[str, Any], path: Path, *, longer: bool) -> None:
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    trainers = [values.get("trainer") or {} for values in (before, resolved)]
    for key in _DECISIVE:
        was, now = (trainer.get(key) for trainer in trainers)
        if was != now and not (longer and key in _LENGTH):
            raise ConfigError(
                f"trainer.{key} was {was!r} for the run in {path.parent}, and is {now!r}; resume "
                "with the same options, or choose another --out folder."
            )
    for section in ("zoo", "seed_everything", "model", "data"):
        if not _agree(before.get(section), resolved.get(section)):
            raise ConfigError(
                f"Section {section!r} differs from that of the run in {path.parent}; resume with "
                f"the same options, or choose another --out folder."
            )


def _agree(before: Any, now: Any) -> bool:
    """Whether options are the same; one that the earlier run did not know yet must be null."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return bool(before == now)
    return before.keys() <= now.keys() and all(
        _agree(before[key], value) if key in before else value is None for key, value in now.items()
    )


def _to_yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)
