"""Checkpoint folders: written whole, read strictly, and never by a pickle.

A folder holds `config.json`, `model.safetensors`, and for a published weight also its card, recipe
and results. The weights are read once: the bytes that were hashed are the bytes that are parsed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from zoo.cards import Card, Measurements, render
from zoo.configs import build, to_json
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError, nearest
from zoo.files import (
    CARD_FILE,
    CHECKPOINT_FILES,
    CONFIG_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    WEIGHTS_FILE,
    FileRecord,
    format_json,
    is_leftover,
    parse_json,
    partial_path,
    read_bytes,
    remove_leftovers,
)
from zoo.registry import architecture, architecture_of
from zoo.tasks.base import check_count

if TYPE_CHECKING:
    from zoo.tasks.base import ZooModule

__all__ = [
    "FORMAT_VERSION",
    "RESULTS_FILE",
    "CheckpointConfig",
    "LoadReport",
    "Migration",
    "convert",
    "digest",
    "load",
    "read_config",
    "read_training",
    "save",
    "start_from",
    "verify",
]

FORMAT_VERSION = 1

_PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
"""Of what torch.save writes now (a zip archive) and wrote formerly (a bare pickle)."""

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


_SMALL_NETWORK = 1_000_000
"""Parameters and buffers that any network may have, however small its file."""

_REGISTRATIONS: tuple[Callable[[Any], Any], ...] = (
    torch.nn.modules.module.register_module_parameter_registration_hook,
    torch.nn.modules.module.register_module_buffer_registration_hook,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The content of `config.json`."""

    format_version: int = FORMAT_VERSION
    architecture: str
    """A name in `zoo.registry`; a file cannot name a class."""
    family: str
    task: str
    network: dict[str, Any]
    """Arguments of the network, checked against the architecture's dataclass."""
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What turns a user's input into tensors, checked against the architecture's dataclass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load` did to each tensor of the file and of the network, by name."""

    loaded: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    """In the file, and not used."""
    initialised: tuple[str, ...] = ()
    """In the network, and drawn at random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Migration:
    """How a folder of one format version becomes one of the next."""

    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    """Applied to `config.json`."""
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    """Applied to the content of `model.safetensors`."""


_MIGRATIONS: dict[int, Migration] = {}
"""Format version -> what leads to the next one. Old folders stay loadable for ever."""


# --- writing -------------------------------------------------------------------------------------


def save(
    module: ZooModule,
    folder: str | os.PathLike[str],
    *,
    card: Card | None = None,
    recipe: str | None = None,
    results: Measurements | None = None,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Write a checkpoint folder: all of it, or nothing.

    Args:
        module: An instance of a registered class; its `config`, its `preprocessing` and the state
            of its `published_network` are written, no state of an optimizer.
        folder: Where to; an earlier checkpoint there is replaced.
        card: For `README.md`.
        recipe: For `recipe.yaml`, as text.
        results: For `results.json`.
        dtype: What floating point tensors are stored in, but float32 for half precision of those
            that are double; None keeps theirs.

    Raises:
        UnknownNameError: When the class is not registered.
        CheckpointError: When the folder holds something else, or cannot be written; or when the
            module does not know its preprocessing yet, or its network is no longer one that its
            configuration describes.
    """
    if module.preprocessing_config is not None and module.preprocessing is None:
        raise CheckpointError(
            f"This {architecture_of(type(module)).name} does not know its preprocessing: train it, "
            f"or pass preprocessing."
        )
    _check_rebuilt(module)
    contents = {
        CONFIG_FILE: format_json(to_json(_config(module))),
        WEIGHTS_FILE: _serialised(module.published_network, _dtype(dtype)),
    }
    if recipe is not None:
        contents[RECIPE_FILE] = recipe.encode()
    if results is not None:
        contents[RESULTS_FILE] = format_json(to_json(results))
    if card is not None:
        contents[CARD_FILE] = render(card).encode()
    _write_folder(Path(folder), contents)


def _config(module: ZooModule) -> CheckpointConfig:
    entry = architecture_of(type(module))
    return CheckpointConfig(
        architecture=entry.name,
        family=entry.family,
        task=entry.task,
        network=to_json(module.published_config),
        preprocessing={} if module.preprocessing is None else to_json(module.preprocessing),
    )


def _check_rebuilt(module: ZooModule) -> None:
    """Check that a network of the module's configuration takes the module's tensors.

    Raises:
        CheckpointError: It does not, so that what was saved could never be loaded.
    """
    name = architecture_of(type(module)).name
    # Built as `load` builds it, since not every network can be built without values.
    other = _construct(type(module), module.published_config, module.preprocessing, name)
    own, stored = _tensors(other.network), _tensors(module.published_network)
    for tensor in dict.fromkeys([*own, *stored]):
        if fault := _fault(own.get(tensor), stored.get(tensor)):
            raise CheckpointError(
                f"The network of this {name} is not the one of its configuration, so nothing was "
                f"saved: tensor {tensor!r} {fault}; set its config, or undo what changed it."
            )


def _serialised(network: nn.Module, dtype: torch.dtype | None) -> bytes:
    def kept_in(tensor: Tensor) -> torch.dtype:
        if dtype is None or not tensor.is_floating_point():
            return tensor.dtype
        # Sums in double precision do not survive half of it.
        double = tensor.dtype == torch.float64 and dtype.itemsize < 4
        return torch.float32 if double else dtype

    tensors = {
        name: tensor.detach().to("cpu", kept_in(tensor)).contiguous()
        for name, tensor in _tensors(network).items()
    }
    parameters = sum(parameter.numel() for parameter in network.parameters())
    # One key only: the order of several differs from run to run, and with it the sha256.
    return safetensors.torch.save(tensors, {"parameters": str(parameters)})


def _write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    if folder.exists() and not _replaceable(folder):
        raise CheckpointError(f"{folder} exists and is not a checkpoint folder; choose another.")
    folder = folder.absolute()
    partial = partial_path(folder)
    replaced = partial.with_suffix(".old")
    try:
        partial.mkdir(parents=True)
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        remove_leftovers(folder)
    except OSError as error:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise CheckpointError(f"Cannot write {folder}: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    """Whether the path is a folder of which nothing but a checkpoint would be lost.

    Of a process that was killed while it wrote a file, a part of it may lie there too.
    """
    return folder.is_dir() and all(
        path.is_file()
        and any(name == path.name or is_leftover(path.name, name) for name in CHECKPOINT_FILES)
        for path in folder.iterdir()
    )


# --- reading -------------------------------------------------------------------------------------


def verify(folder: str | os.PathLike[str], records: Iterable[FileRecord]) -> None:
    """Check the size and the sha256 of files.

    Raises:
        CheckpointError: For the first file that is missing or differs.
    """
    for record in records:
        record.read(Path(folder))


def read_config(folder: str | os.PathLike[str]) -> CheckpointConfig:
    """Read the `config.json` of a checkpoint folder, of this or an earlier format version.

    Raises:
        CheckpointError: When the folder is no checkpoint, or one of a newer format version.
        ConfigError: When a key is unknown or missing, or a value has the wrong type.
        UnknownNameError: When there is no such architecture.
    """
    path = _checked_folder(folder) / CONFIG_FILE
    return _parse_config(read_bytes(path), path)[0]


def digest(module: ZooModule) -> str:
    """SHA-256 of the configuration and the weights that `save` would write now, in hexadecimal."""
    found = hashlib.sha256(format_json(to_json(_config(module))))
    found.update(_serialised(module.published_network, None))
    return found.hexdigest()


@torch.inference_mode(False)  # of tensors made in that mode no gradient could be taken later
def load(
    folder: str | os.PathLike[str],
    *,
    files: Iterable[FileRecord] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    num_classes: int | None = None,
    seed: int | None = None,
    **network_overrides: Any,
) -> ZooModule:
    """Load a checkpoint folder.

    The global random state is left as it is; a new head is drawn from it, or from `seed`, as
    constructing the whole network at this point would.

    Args:
        folder: A checkpoint folder.
        files: What its files must be, checked before anything is parsed; None checks nothing.
        device: Where to put the module; None is the CPU.
        dtype: Floating point type of the network; None is float32, whatever the file stores.
        strict: Whether the names and shapes of all tensors must agree. If not, what does not fit
            is left out, and the report names it.
        num_classes: For a new number of classes: the head is replaced by a fresh one.
        seed: Of a fresh head, which is then that of `zoo.finetune` with this seed.
        network_overrides: Arguments of the network to be other than in the checkpoint.

    Returns:
        The LightningModule in eval mode; its `load_report` says what happened to each tensor.

    Raises:
        CheckpointError: When the folder is missing, damaged, unsafe, newer than this version of
            the zoo, or its tensors do not fit the network.
        ConfigError: For an argument that is unknown or out of range.
        UnknownNameError: When there is no such architecture.
    """
    wanted_dtype = _dtype(dtype)
    folder = _checked_folder(folder)
    contents = _read(folder, files)
    where = folder / CONFIG_FILE
    config, migrations = _parse_config(contents[CONFIG_FILE], where)
    module_class = architecture(config.architecture).module_class()
    stored = build(module_class.network_config, config.network, f"{where}: network")
    if num_classes is not None and not (
        hasattr(stored, "num_classes") and module_class.head_parameters
    ):
        raise ConfigError(
            f"{config.architecture} has no head of classes to replace, so num_classes does not "
            "apply."
        )
    if isinstance(num_classes, int):
        num_classes = check_count("num_classes", num_classes, 2)
    network = _overridden(stored, network_overrides, num_classes, config.architecture)
    preprocessing = _preprocessing(module_class, config.preprocessing, f"{where}: preprocessing")
    tensors = _parse_weights(contents[WEIGHTS_FILE], folder / WEIGHTS_FILE)
    with _no_larger_than(tensors.values(), where):
        module = _construct(module_class, stored, preprocessing, where)
    new_head = num_classes is not None and num_classes != stored.num_classes
    if new_head:
        preprocessing = module_class.swap_head(preprocessing, network.num_classes)
    if network != stored:
        module = _construct(module_class, network, preprocessing, where, seed)
    for migration in migrations:
        tensors = migration.tensors(tensors)
    module.load_report = _fill(
        module.network,
        tensors,
        replaced=module_class.head_parameters if new_head else (),
        strict=strict,
        where=f"{folder / WEIGHTS_FILE} does not fit {config.architecture}",
    )
    return _placed(module.eval(), device, wanted_dtype)


@torch.no_grad()
def start_from(module: ZooModule, base: ZooModule, *, replaced: Sequence[str] = ()) -> LoadReport:
    """Give a module the weights of another of its architecture, in place.

    Args:
        module: What is to be trained.
        base: What it starts from.
        replaced: Names of tensors that stay as they were drawn, as of a new head.

    Returns:
        What was loaded, dropped and initialised.

    Raises:
        CheckpointError: When the networks differ in more than that.
    """
    stored = _tensors(base.published_network)
    own = _tensors(module.network)
    rows = module.carried_rows(base)
    for name, (here, there) in rows.items():
        own[name][here] = stored[name][there].to(own[name].dtype)
    where = f"The base does not fit this {type(module).__name__}"
    return _fill(module.network, stored, replaced=(*replaced, *rows), where=where)


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
) -> None:
    """Make a checkpoint folder of a training checkpoint of this project.

    Args:
        checkpoint: A local `.ckpt`, read with `weights_only=True`; in the run folder that
            `zoo fit` made, with its `recipe.yaml` beside it.
        folder: Where to; see `save`.
        dtype: What floating point tensors are stored in; None keeps theirs.

    Raises:
        CheckpointError: When the file is missing, not such a checkpoint, or holds anything but
            tensors and plain values.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is not a local file; addresses are never opened.")
    content = read_training(path)
    recipe = path.with_name(RECIPE_FILE)
    try:
        recipe_text = read_bytes(recipe).decode()
        name = yaml.safe_load(recipe_text)["zoo"]["architecture"]
    except (ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise CheckpointError(f"{recipe} names no architecture.") from error
    if not isinstance(name, str):
        raise CheckpointError(f"{recipe}: architecture must be a name, got {name!r}.")
    module_class = architecture(name).module_class()
    module = _construct(
        module_class,
        build(module_class.network_config, content["zoo_network"], str(path)),
        _preprocessing(module_class, content.get("zoo_preprocessing"), str(path)),
        path,
    )
    prefix = content.get("zoo_published", "network") + "."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(prefix)
    }
    for alias in _aliases(module.network):
        tensors.pop(alias, None)
    _fill(module.network, tensors, where=f"{path} does not fit {name}")
    save(module, folder, recipe=recipe_text, dtype=dtype)


def read_training(path: Path) -> dict[str, Any]:
    """Read a training checkpoint of this project, `last.ckpt`.

    Raises:
        CheckpointError: When it is not such a file, or holds anything but tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and plain values; it was not opened."
        ) from error
    if not isinstance(content, dict) or not {"zoo_network", "state_dict"} <= content.keys():
        raise CheckpointError(f"{path} was not written by `zoo fit`.")
    return content


def _checked_folder(folder: str | os.PathLike[str]) -> Path:
    """Refuse what is not a checkpoint folder, and above all what is a pickle."""
    folder = Path(folder)
    if folder.suffix in _PICKLE_SUFFIXES and folder.is_file():
        raise _pickle_error(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {folder}.")
    if not (folder / WEIGHTS_FILE).exists():
        if (folder / "checkpoint" / WEIGHTS_FILE).is_file():
            raise CheckpointError(
                f"{folder} is a run folder; its weights are in {folder / 'checkpoint'}."
            )
        for path in sorted(folder.iterdir()):
            if path.suffix in _PICKLE_SUFFIXES:
                raise _pickle_error(path)
    return folder


def _pickle_error(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which can run any code when it is opened. If it is a training "
        f"checkpoint of your own, convert it: zoo convert {path} FOLDER"
    )


def _read(folder: Path, records: Iterable[FileRecord] | None) -> dict[str, bytes]:
    """Contents of at least the configuration and the weights, checked against the records."""
    if records is None:
        return {name: read_bytes(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    contents = {record.name: record.read(folder) for record in records}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in contents:
            raise CheckpointError(f"There is no size and sha256 to check {folder / name} against.")
    return contents


def _parse_config(content: bytes, path: Path) -> tuple[CheckpointConfig, list[Migration]]:
    """The configuration in today's format, and the migrations that brought it there."""
    values = parse_json(content, str(path))
    version = values.get("format_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path}: format_version must be 1 or more, got {version!r}.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, and this zoo reads up to {FORMAT_VERSION}; "
            f"update it: pip install -U zoo"
        )
    migrations = [_MIGRATIONS[earlier] for earlier in range(version, FORMAT_VERSION)]
    for migration in migrations:
        values = migration.config(values)
    config = build(CheckpointConfig, {**values, "format_version": FORMAT_VERSION}, str(path))
    try:
        entry = architecture(config.architecture)
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: {error}") from None
    if (config.family, config.task) != (entry.family, entry.task):
        raise CheckpointError(
            f"{path}: {entry.name} is of family {entry.family!r} and task {entry.task!r}, "
            f"not {config.family!r} and {config.task!r}."
        )
    return config, migrations


def _parse_weights(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # The parser raises many kinds, and each means the same to us.
        # Only now: eight bytes of a sound header can look like the start of a pickle.
        if content.startswith(_PICKLE_STARTS):
            raise _pickle_error(path) from None
        raise CheckpointError(
            f"{path} is truncated or is no safetensors file: {str(error).splitlines()[0]}."
        ) from error


def _preprocessing(module_class: type[ZooModule], values: Any, where: str) -> Any:
    """The stored preprocessing as the class's dataclass; None where there is none."""
    if module_class.preprocessing_config is not None:
        # Training checkpoints of the first version have none; the class then has a default.
        return None if values is None else build(module_class.preprocessing_config, values, where)
    if values:
        raise CheckpointError(f"{where}: {module_class.__name__} has none, but it says {values}.")
    return None


def _construct(
    module_class: type[ZooModule],
    network: Any,
    preprocessing: Any,
    where: Path | str,
    seed: int | None = None,
) -> ZooModule:
    arguments = {} if preprocessing is None else {"preprocessing": preprocessing}
    try:
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            return module_class(network=network, **arguments)
    except ZooError:
        raise
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        # Values that each are of the declared type and range can be impossible together.
        raise CheckpointError(
            f"{where}: no network can be built of these arguments: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def _no_larger_than(tensors: Iterable[Tensor], where: Path) -> Iterator[None]:
    """Stop the construction of a network that is far larger than the file of its weights.

    A configuration is untrusted, and a number in it could take all memory. Tensors are registered
    before they are filled, so what is refused was not touched yet.
    """
    allowed = 4 * sum(tensor.numel() for tensor in tensors) + _SMALL_NETWORK
    total = 0
    owner = threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal total
        # Hooks are of the whole process: another thread may be building a network of its own.
        if threading.get_ident() != owner:
            return
        total += 0 if tensor is None else tensor.numel()
        if total > allowed:
            raise CheckpointError(f"{where} asks for a far larger network than the weights are.")

    hooks = [register(count) for register in _REGISTRATIONS]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _overridden(
    stored: Any, overrides: Mapping[str, Any], num_classes: int | None, name: str
) -> Any:
    """The network's arguments with changes; nested ones may be given in part."""
    if num_classes is not None:
        overrides = {**overrides, "num_classes": num_classes}
    if not overrides:
        return stored
    return build(type(stored), _merged(to_json(stored), overrides), f"{name}: network")


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        before = values.get(key)
        if isinstance(before, Mapping) and isinstance(change, Mapping):
            change = _merged(before, change)
        merged[key] = change
    return merged


# --- tensors -------------------------------------------------------------------------------------


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each shared one under its first name only."""
    state, aliases = network.state_dict(keep_vars=True), _aliases(network)
    return {name: tensor for name, tensor in state.items() if name not in aliases}


def _aliases(network: nn.Module) -> dict[str, str]:
    """Further names of shared tensors -> the first name."""
    first_names: dict[int, str] = {}
    aliases = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
    return aliases


def _fill(
    network: nn.Module,
    stored: Mapping[str, Tensor],
    *,
    replaced: Sequence[str] = (),
    strict: bool = True,
    where: str,
) -> LoadReport:
    """Copy stored tensors into a network, all of them unless a head is replaced or not strict."""
    own = _tensors(network)
    faults = {}
    for name in dict.fromkeys([*own, *stored]):
        fault = _fault(own.get(name), stored.get(name))
        if fault and name not in replaced:
            faults[name] = f"tensor {name!r} {fault}"
    if strict and faults:
        shown = list(faults.values())[:3]
        more = [f"{len(faults) - 3} more"] if len(faults) > 3 else []
        raise CheckpointError(f"{where}: {'; '.join(shown + more)}.")
    loaded = [
        name for name in own if name in stored and name not in faults and name not in replaced
    ]
    names = {name: name for name in loaded}
    names |= {alias: first for alias, first in _aliases(network).items() if first in names}
    network.load_state_dict({name: stored[first] for name, first in names.items()}, strict=False)
    return LoadReport(
        loaded=tuple(loaded),
        dropped=tuple(name for name in stored if name not in loaded),
        initialised=tuple(name for name in own if name not in loaded),
    )


def _fault(own: Tensor | None, stored: Tensor | None) -> str | None:
    """Why a stored tensor cannot stand for the network's own, in words."""
    if stored is None:
        return "is missing"
    if own is None:
        return "is unexpected"
    if own.shape != stored.shape:
        return f"has shape {tuple(stored.shape)} instead of {tuple(own.shape)}"
    # Precision may differ, kind may not: a float copied into an int buffer would be truncated.
    if own.is_floating_point() != stored.is_floating_point():
        return f"is {stored.dtype} instead of {own.dtype}"
    return None


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        hint = nearest(str(dtype), _DTYPES) or f" Choose one of {', '.join(_DTYPES)}."
        raise ConfigError(f"dtype {dtype} is not a floating point type of the zoo.{hint}")
    return found


def _placed(
    module: ZooModule, device: torch.device | str | None, dtype: torch.dtype | None
) -> ZooModule:
    if dtype is not None:
        module = module.to(dtype)
    if device is not None:
        try:
            module = module.to(device)
        except (RuntimeError, AssertionError) as error:  # What torch raises for an absent GPU.
            reason = str(error).splitlines()[0]
            raise ConfigError(f"Device {str(device)!r} cannot be used: {reason}") from error
    return module
