"""Fine-tune any weight on your own data, and say what came of it.

The training itself is that of `zoo.training`: a run folder with a resolved recipe, resumed by the
same call. What comes out is an ordinary checkpoint folder, with its results and a card that names
the base, the data, and what was measured before and after on samples that were held out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from zoo import cards, checkpoints, evaluation, files, hub, training
from zoo.cards import Card, HubLocation, Measurements, Paper
from zoo.configs import build, to_json
from zoo.errors import ConfigError, DataError, nearest
from zoo.evaluation import Outcome
from zoo.registry import Architecture, architecture_of
from zoo.tasks.base import check_count

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

    from zoo.tasks.base import ZooModule

__all__ = ["FineTuned", "detect", "finetune", "rows"]

_BASE = "base"
"""In a run folder: the base, where it came from memory."""

_BEFORE = "before.json"
_KINDS = {
    "images": "a folder with one folder of pictures for each class",
    "ratings": "a CSV file of ratings",
    "text": "a text file",
}
_TASKS = {
    "image-classification": "images",
    "recommendation": "ratings",
    "language-modeling": "text",
}
"""Task -> the kind of data that it is fine-tuned on."""

_SEEDS = 2**32
"""How many seeds Lightning knows."""

_TAG = re.compile(r"[A-Za-z0-9]+(?:[-._][A-Za-z0-9]+)*")

_NULLS = ("null", "Null", "NULL", "~")
"""Words that YAML reads as nothing."""

_BATCHES = {"images": {"batch_size": 32}, "ratings": {"batch_size": 256}, "text": {"streams": 8}}
"""Smaller than when training from scratch, since there is less data; overrides change it."""

_NOT_INHERITED = ("network", "optimizer", "compile", "ema_decay", "encoder_weights")
"""Options of a base's training that fine-tuning does not go on with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuned:
    """A finished fine-tuning.

    Attributes:
        folder: the run folder.
        checkpoint: the checkpoint folder in it.
        before, after: what was measured on the samples that were held out, by the same protocols.
    """

    folder: Path
    checkpoint: Path
    before: tuple[Outcome, ...]
    after: tuple[Outcome, ...]


def finetune(
    model: str | os.PathLike[str] | ZooModule,
    data: str | os.PathLike[str] | LightningDataModule,
    *,
    epochs: int = 3,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    freeze: str | Sequence[str] | None = None,
    layer_decay: float | None = None,
    adapters: Literal["lora", "lora-fa"] | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    target: str | Sequence[str] | None = None,
    save_memory: bool = True,
    recompute_blocks: bool = False,
    num_classes: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    name: str | None = None,
    data_license: str = "",
    accelerator: str | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    strategy: str | None = None,
    progress_bar: bool = True,
    overrides: Sequence[str] = (),
) -> ZooModule:
    """Fine-tune a model, measure it before and after, and write a checkpoint folder with a card.

    An interrupted run goes on by the same call. At an epoch boundary it then equals the
    uninterrupted one, bit for bit on a CPU.

    Args:
        model: a name, a checkpoint folder, a repository on the Hub, or a loaded module.
        data: a folder of class folders (or of `train` and `test` with such), a CSV of ratings, a
            text file, or a data module of the zoo. Part of it is held out, as the data module says.
        epochs: passes over the data.
        lr: peak learning rate of AdamW.
        weight_decay: of matrices, decoupled.
        freeze: "encoder" for all but the head, or shell wildcards on names of parts and tensors;
            what is frozen stays as it is, BatchNorm statistics included. None: everything learns.
        layer_decay: factor of the learning rate from a group of layers to the one before it.
        adapters: learn low-rank adapters alone, and a head that is new. They are merged in the end,
            and also saved alone, as `<out>/adapter.safetensors`.
        rank, alpha, target: of the adapters, with which alone they go; see
            `zoo.tuning.lora.add_lora`. A rank of None is 8.
        save_memory: keep no more for the backward pass than it needs, while it trains; see
            `zoo.tuning.memory.save_memory`. The results stay the same to rounding. Not with
            strategy fsdp, where it changes nothing.
        recompute_blocks: keep the input of each block alone for the backward pass, at one more
            forward pass per step; for transformers, see `zoo.tuning.memory.checkpoint_blocks`.
        num_classes: how many classes the data must have; None: as many as they have.
        seed: of a new head, of adapters, and of the order of the data.
        out: run folder; None: `runs/<name>`.
        name: of the new weight, after the dot; None: after the data.
        data_license: for the card; `zoo push` wants it.
        accelerator, devices, num_nodes, strategy: of Lightning's Trainer.
        progress_bar: whether to show one.
        overrides: `section.key=value`, changes to the recipe that comes of all this.

    Returns:
        The fine-tuned module, in eval mode; its `finetuned` says what was measured before and after
        (None in all processes but the first), and where its checkpoint folder is.

    Raises:
        ConfigError: an argument is wrong, or model and data do not fit each other.
        DataError: the data are missing, damaged or too few.
        ZooError: the run folder cannot be used.
        KeyboardInterrupt: the training was interrupted.
    """
    from zoo.tasks.recommendation import Recommender  # here, since few need it

    _check_arguments(seed, freeze, target, progress_bar, overrides, data_license)
    if type(epochs) is not int or epochs < 1:
        raise ConfigError(f"epochs must be an integer of at least 1, got {epochs!r}")
    if num_classes is not None:
        num_classes = check_count("num_classes", num_classes, 2)
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"name must be a text, or None for one after the data, got {name!r:.60}")
    if out is not None and not isinstance(out, (str, os.PathLike)):
        raise ConfigError(f"out must be the path of a folder, or None, got {out!r:.60}")
    if rank is not None and adapters is None:
        # Stored recipes name a rank always, so that FineTuning cannot tell.
        raise ConfigError("rank is for adapters; choose lora or lora-fa")
    base, source, label, card, inherited = _base(model)
    entry = architecture_of(type(base))
    if entry.task in ("online-learning", "online-text-learning"):
        raise ConfigError(
            f"{label} learns a stream in place: call its learn({base.unit}s, labels), which takes "
            f"new classes at any time."
        )
    kind, options = _described(data, base, entry, label, seed)
    if str(options.get("path")).strip() in _NULLS:  # which a recipe would take for none
        options["path"] = f"./{options['path']}"
    tag = _slug(name or _source(options) or kind)
    if name is None and f"{entry.name}.{tag}" in cards.load_cards():
        tag = f"{tag}-tuned"  # the data are those of a weight of the zoo, which keeps its name
    folder = Path("runs") / f"{entry.name}.{tag}" if out is None else Path(out).expanduser()
    in_memory = not isinstance(model, (str, os.PathLike))
    trainer = {
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": num_nodes,
        "strategy": strategy,
    }
    values = {
        "zoo": {
            "architecture": entry.name,
            "data": kind,
            "weight": f"{entry.name}.{tag}",
            "finetune": {
                "base_model": str(folder / _BASE) if in_memory else source,
                "freeze": freeze if freeze is None or isinstance(freeze, str) else list(freeze),
                "adapters": adapters,
                "rank": 8 if rank is None else rank,
                "alpha": alpha,
                "target": [target] if isinstance(target, str) else target and list(target),
                "save_memory": save_memory,
                "recompute_blocks": recompute_blocks,
            },
        },
        "seed_everything": seed,
        "trainer": {
            "max_epochs": epochs,
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 10,
            "enable_model_summary": False,
            "enable_progress_bar": progress_bar,
            **{key: value for key, value in trainer.items() if value is not None},
        },
        "model": {
            **inherited,
            "network": _network(base),
            "optimizer": {
                "name": "adamw",
                "lr": lr,
                "weight_decay": weight_decay,
                "schedule": "one-cycle",
                "warmup_fraction": 0.1,
                "layer_decay": layer_decay,
            },
        },
        "data": options,
    }
    recipe = training.make_recipe(values, overrides, Path(f"{tag}.yaml"), is_file=False)
    _check_recipe(recipe, entry)
    training.check_apart(folder, recipe)
    begun = (folder / "last.ckpt").exists()
    if begun and not (folder / _BEFORE).is_file():
        raise ConfigError(
            f"{folder} holds a training that no fine-tuning began, without {_BEFORE}; choose "
            f"another `out`."
        )
    datamodule = training.data_module(recipe)
    datamodule.setup("fit")
    _check_channels(base, datamodule, label)
    sizes = _sizes(base, datamodule, num_classes)
    for override in overrides:
        key = override.partition("=")[0].removeprefix("model.network.")
        if key in sizes and recipe.options["model"]["network"].get(key) != sizes[key]:
            raise ConfigError(
                f"{override}: the data have {sizes[key]}, and they decide; leave it out."
            )
    recipe.options["model"]["network"].update(sizes)

    # The recipe says where base and data are, and not what is there.
    own, learned = checkpoints.digest(base), _digest_of_data(recipe)
    known = files.read_json(folder / _BEFORE) if begun else {}
    if known.get("base", own) != own:
        raise ConfigError(f"{folder} holds a fine-tuning of other weights; choose another `out`.")
    if known.get("data", learned) != learned:
        raise ConfigError(
            f"The data have changed since the fine-tuning in {folder} began; choose another `out`."
        )

    def prepared(module: ZooModule, datamodule: Any) -> None:
        if _is_first_process():
            if in_memory:
                checkpoints.save(base, folder / _BASE)
            found = evaluation.evaluate_module(module, datamodule)
            outcomes = [_plain(outcome) for outcome in found]
            values = {"base": own, "data": learned, "outcomes": outcomes}
            files.write_json(folder / _BEFORE, values)

    # The learning rate follows the number of epochs: with more of them the first would be others.
    done = training.fit(recipe, out=folder, resume=True, base=base, prepared=prepared, longer=False)
    first = _is_first_process()
    module: ZooModule = checkpoints.load(done.checkpoint) if first else done.module
    if isinstance(module, Recommender):
        module.attach(datamodule.ratings)
    if not first:
        return module
    recipe = training.read_recipe(done.checkpoint / files.RECIPE_FILE)
    after = evaluation.evaluate_module(module, datamodule)
    stored = files.read_json(folder / _BEFORE)["outcomes"]
    before = tuple(build(Outcome, outcome, str(folder / _BEFORE)) for outcome in stored)
    finished = FineTuned(folder=folder, checkpoint=done.checkpoint, before=before, after=after)
    _record(finished, recipe, label, card and _resized(card, base, module), data_license)
    module.finetuned = finished
    return module


def _check_arguments(
    seed: Any, freeze: Any, target: Any, progress_bar: Any, overrides: Any, data_license: Any
) -> None:
    """Check what no recipe would check, or would check too late.

    Raises:
        ConfigError: an argument is of another kind, or the seed out of range.
    """
    if check_count("seed", seed, 0) >= _SEEDS:
        raise ConfigError(f"seed must be less than 2**32, got {seed}")
    for key, value in (("freeze", freeze), ("target", target)):
        if value is not None and not isinstance(value, str) and not _is_texts(value):
            raise ConfigError(f"{key} must be a text or a list of texts, got {value!r:.60}")
    if not isinstance(progress_bar, bool):
        raise ConfigError(f"progress_bar must be True or False, got {progress_bar!r:.60}")
    if not _is_texts(overrides):
        raise ConfigError(
            f"overrides must be a list, as ['data.batch_size=16'], got {overrides!r:.60}"
        )
    if not isinstance(data_license, str):
        raise ConfigError(f"data_license must be a text, got {data_license!r:.60}")


def _is_texts(value: Any) -> bool:
    """Whether something is a list or a tuple of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _check_recipe(recipe: training.Recipe, entry: Architecture) -> None:
    """Check what overrides have made of the recipe.

    Raises:
        ConfigError: the weight would have a name that is none or of the zoo's, or nothing would be
            trained.
    """
    tag = recipe.weight.removeprefix(f"{entry.name}.")
    if tag == recipe.weight or not _TAG.fullmatch(tag):
        raise ConfigError(
            f"The weight cannot be called {recipe.weight!r}: zoo.weight must be "
            f"{entry.name}.NAME, with a name such as my-data."
        )
    if recipe.weight in cards.load_cards():
        raise ConfigError(f"{recipe.weight} is a weight of the zoo; choose another name for yours.")
    trainer = recipe.options.get("trainer", {})
    if trainer.get("fast_dev_run"):
        raise ConfigError(
            "trainer.fast_dev_run keeps no weights, so nothing could be measured: leave it out, or "
            "set trainer.max_steps."
        )
    for key in ("max_epochs", "max_steps", "max_time", "limit_train_batches"):
        if key in trainer and _is_nothing(trainer[key]):
            raise ConfigError(
                f"trainer.{key}={trainer[key]} leaves nothing to train; leave it out."
            )


def _is_nothing(length: Any) -> bool:
    """Whether a number, or a time as Lightning takes it, is zero."""
    if isinstance(length, dict):
        return not any(length.values())
    if isinstance(length, str):
        return not length.strip("0: ")
    return length is not None and not isinstance(length, bool) and length == 0


def _is_first_process() -> bool:
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


# --- the model -----------------------------------------------------------------------------------


class _Base(NamedTuple):
    """What is fine-tuned."""

    module: ZooModule
    source: str
    """Where to find it again."""
    title: str
    """What it is called; of a folder not where it is, which is nobody's business."""
    card: Card | None
    inherited: dict[str, Any]
    """Options of its training to go on with."""


def _base(model: str | os.PathLike[str] | ZooModule) -> _Base:
    if not isinstance(model, (str, os.PathLike)):
        from zoo.tasks.base import ZooModule

        given: Any = model
        if not isinstance(given, ZooModule):
            raise ConfigError(
                f"A {type(given).__name__} is no model of the zoo, nor a name of one."
            )
        title = model.loaded_from or architecture_of(type(model)).name
        known = cards.load_cards().get(title)
        if known is None and Path(title).is_dir():
            title = architecture_of(type(model)).name
        return _Base(model, "", title, known, {})
    folder, card = hub.resolve(model)
    module = checkpoints.load(folder, files=None if card is None else card.files)
    source = title = os.fspath(model)
    if card is None and (folder / files.CARD_FILE).is_file():
        text = files.read_bytes(folder / files.CARD_FILE).decode("utf-8", errors="replace")
        card = cards.parse(text, where=str(folder / files.CARD_FILE))
    elif card is not None and card.name in cards.load_cards():
        source = title = card.name
    weight, inherited = "", dict[str, Any]()
    if (folder / files.RECIPE_FILE).is_file():
        trained = training.read_recipe(folder / files.RECIPE_FILE)
        weight, options = trained.weight, trained.options.get("model", {})
        inherited = {key: options[key] for key in options if key not in _NOT_INHERITED}
    if Path(source).is_dir():
        ours = cards.load_cards().get(weight)
        # The name of a weight of the zoo is believed of its very files only.
        believed = weight if ours is None or cards.holds(ours, folder) else ""
        title = believed or architecture_of(type(module)).name
    return _Base(module, source, title, card, inherited)


def _network(base: ZooModule) -> dict[str, Any]:
    """Arguments of the base's network, with the solver that is chosen now."""
    from zoo.families.continuous_depth import ODEBlock  # here, since few need it

    values = to_json(base.config)
    blocks = [block for block in base.published_network.modules() if isinstance(block, ODEBlock)]
    return {**values, "solver": to_json(blocks[0].solver)} if blocks else values


def _sizes(base: ZooModule, datamodule: Any, num_classes: int | None) -> dict[str, int]:
    """Arguments of the network that the data decide.

    Raises:
        ConfigError: the data have other classes than were asked for.
    """
    if not hasattr(base.config, "num_classes") and num_classes is not None:
        raise ConfigError(f"{type(base).__name__} has no classes; leave out num_classes.")
    if hasattr(datamodule, "ratings"):
        ratings = datamodule.ratings
        return {"num_users": len(ratings.user_ids), "num_items": len(ratings.item_ids)}
    if not hasattr(base.config, "num_classes"):
        return {}
    have = len(datamodule.preprocessing.classes)
    if num_classes not in (None, have):
        names = ", ".join(datamodule.preprocessing.classes[:5]) + (", ..." if have > 5 else "")
        raise ConfigError(
            f"The data have {have} classes ({names}), but the head is for {num_classes}: give "
            f"num_classes={have}, or none."
        )
    return {"num_classes": have}


def _check_channels(base: ZooModule, datamodule: Any, label: str) -> None:
    """Check that pictures have as many channels as the base takes, which no option can change.

    Raises:
        ConfigError: they have others.
    """
    takes = getattr(base.config, "in_channels", None)
    have = getattr(getattr(datamodule, "preprocessing", None), "channels", None)
    if None not in (takes, have) and takes != have:
        advice = f"set data.channels={takes}" if datamodule.path else "take others"
        raise ConfigError(
            f"The pictures have {have} channels, and {label} takes {takes}: {advice}."
        )


# --- the data ------------------------------------------------------------------------------------


def detect(path: str | os.PathLike[str]) -> str:
    """What kind of data a path holds: "images", "ratings" or "text".

    Raises:
        DataError: there is nothing, or nothing that is known.
    """
    from zoo.data.pictures import IMAGE_SUFFIXES  # here, since it imports torch

    path = Path(path).expanduser()
    kinds = "; ".join(_KINDS.values())
    if path.is_dir():
        if not any(path.iterdir()):
            raise DataError(f"The folder {path} is empty; give one of: {kinds}.")
        return "images"
    if not path.exists():
        near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file or folder {path}.{nearest(str(path), near)}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{path} is one picture; give {_KINDS['images']}.")
    return "ratings" if path.suffix.lower() == ".csv" else "text"


def _described(
    data: Any, base: ZooModule, entry: Architecture, label: str, seed: int
) -> tuple[str, dict[str, Any]]:
    """Name and options of the data module."""
    if not isinstance(data, (str, os.PathLike)):
        return training.options_of(data)
    if not os.fspath(data):
        raise ConfigError("The path of the data is empty; give a file or a folder.")
    if entry.task not in _TASKS:
        raise ConfigError(
            f"{label} is for {entry.task}; give a data module of zoo.data, since no file or folder "
            f"says what it learns from."
        )
    kind, wanted = detect(data), _TASKS[entry.task]
    if kind != wanted:
        raise DataError(
            f"{label} is for {entry.task} and learns from {_KINDS[wanted]}, but {data} is "
            f"{'a folder' if kind == 'images' else _KINDS[kind]}."
        )
    options: dict[str, Any] = {"path": os.fspath(data), "seed": seed, **_BATCHES[kind]}
    if kind == "text":
        options["segment"] = base.config.segment
    elif base.preprocessing is None:
        raise ConfigError(f"{label} was not trained, so it does not know what its input is.")
    elif kind == "ratings":
        options["scale"] = list(base.preprocessing.scale)
    else:
        known = base.preprocessing
        options |= {"size": list(known.size), "channels": known.channels}
    return kind, options


def _digest_of_data(recipe: training.Recipe) -> str | None:
    """SHA-256 of the user's own data; None for those of the zoo, which never change."""
    from zoo.data.pictures import IMAGE_SUFFIXES  # here, since it imports torch

    path = recipe.options["data"].get("path")
    return files.digest(Path(path).expanduser(), IMAGE_SUFFIXES) if path else None


def _slug(name: str) -> str:
    """A name in kebab case; one in another script keeps apart from others by its digest."""
    name = unicodedata.normalize("NFKD", name.lower())  # letters apart from their accents
    name = "".join(letter for letter in name if not unicodedata.combining(letter))
    plain = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    if not any(letter.isalnum() and not letter.isascii() for letter in name):
        return plain or "mine"
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{plain or 'mine'}-{digest}"


def _source(options: dict[str, Any]) -> str:
    """What the data are called: a file without its suffix, a folder or a known set; "" if nothing.

    A folder has no suffix: in `data.2024` the year belongs to the name.
    """
    if not options.get("path"):
        return str(options.get("dataset") or "")
    path = files.named(options["path"])
    return path.name if path.is_dir() else path.stem


# --- what came of it -----------------------------------------------------------------------------


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {key: value for key, value in to_json(outcome).items() if value is not None}


def _record(
    done: FineTuned,
    recipe: training.Recipe,
    base_model: str,
    base_card: Card | None,
    data_license: str,
) -> None:
    """Write results and card into the checkpoint folder."""
    facts = training.read_facts(done.folder)
    command = evaluation.command_of(done.checkpoint, recipe, recipe.weight)
    results = tuple(
        evaluation.as_result(
            outcome,
            recipe,
            seeds=(int(facts["seed"]),),
            command=command,
            cpu_minutes=facts["cpu_minutes"],
            primary=index == 0,
        )
        for index, outcome in enumerate(done.after)
    )
    assert recipe.finetune is not None
    how = {**to_json(recipe.finetune), "base_model": base_model}
    facts |= {"finetune": how, "before": [_plain(outcome) for outcome in done.before]}
    measured = Measurements(weight=recipe.weight, results=results, training=facts)
    files.write_json(done.checkpoint / files.RESULTS_FILE, to_json(measured))
    name, _, tag = recipe.weight.partition(".")
    empty = Paper(title="", authors="", year=0, url="")
    card = Card(
        architecture=name,
        weight=tag,
        default=False,
        recipe=f"{recipe.weight}.yaml",
        input=base_card.input if base_card else "",
        output=base_card.output if base_card else "",
        code_license=base_card.code_license if base_card else "",
        weights_license=base_card.weights_license if base_card else "",
        data_license=data_license,
        datasets=(),
        hub=HubLocation(repo_id=f"your-name/{recipe.weight}"),
        paper=base_card.paper if base_card else empty,
        base_model=base_model,
        body=_body(done, recipe, base_model),
    )
    text = cards.render(cards.computed(card, done.checkpoint))
    files.write_bytes(done.checkpoint / files.CARD_FILE, text.encode())


def _resized(card: Card, base: ZooModule, module: ZooModule) -> Card:
    """The card of a base with as many logits as the fine-tuned module has."""
    if not hasattr(base.config, "num_classes"):
        return card
    before, now = base.config.num_classes, module.config.num_classes
    logits = rf"(\blogits B x (?:\d+ x )*){before}\b(?! x)"
    return dataclasses.replace(card, output=re.sub(logits, rf"\g<1>{now}", card.output))


def rows(done: FineTuned) -> list[list[str]]:
    """What was measured before and after, in words, one row for each protocol."""
    table = []
    for before, after in zip(done.before, done.after, strict=True):
        cells = [
            f"{o.value:.4f} ({o.interval[0]:.4f} to {o.interval[1]:.4f})" for o in (before, after)
        ]
        table.append([after.protocol, after.metric.replace("_", " "), f"{after.n:,}", *cells])
    return table


def _body(done: FineTuned, recipe: training.Recipe, base_model: str) -> str:
    how = recipe.finetune
    assert how is not None
    learned = "everything was trained"
    if how.adapters is not None:
        learned = f"{how.adapters} adapters of rank {how.rank} were trained and merged"
    elif how.freeze is not None:
        kept = [how.freeze] if isinstance(how.freeze, str) else how.freeze
        learned = f"all was trained but {', '.join(f'`{part}`' for part in kept)}"
    header = ["protocol", "metric", "samples", "before", "after"]
    lines = [header, ["---"] * len(header), *rows(done)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""
# {recipe.weight}

Fine-tuned from `{base_model}` on `{training.data_name(recipe)}`: {learned}.

On what was held out, with 95 % intervals for its sampling; before means the base, with a fresh head
where the classes are others.

{table}

```python
import zoo

model = zoo.load("path/to/this/folder")
```

## Results

<!-- zoo:results -->
<!-- /zoo:results -->

## Controls

<!-- zoo:controls -->
<!-- /zoo:controls -->

## Reported elsewhere

<!-- zoo:reported -->
<!-- /zoo:reported -->

## Files

<!-- zoo:files -->
<!-- /zoo:files -->
"""
