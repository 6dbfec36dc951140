"""Model cards: what the Hub shows as README.md, and the registry that the code reads.

A card is a Markdown file with YAML front matter. The front matter has the Hub's own keys and one
`zoo:` block; the Hub's keys are written from the block, so there is one source for each fact. What
can be computed from a checkpoint folder is written by `update`, never typed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import statistics
import struct
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from zoo import _card_tables, files
from zoo.configs import build, omit_default, to_json
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, nearest
from zoo.files import FileRecord
from zoo.intervals import student_quantile

# The loader and dumper in C are ten times faster, and not in every build of PyYAML.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):  # type: ignore[misc]
    """Writes out again what stands in several places, in place of `*id001`."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_PIPELINE_TAGS = {
    "image-classification": "image-classification",
    "image-pair-classification": "image-classification",
    "language-modeling": "text-generation",
    "online-learning": "image-classification",
    "online-text-learning": "text-classification",
}
"""Our task -> the Hub's name for it. A task that is not here gets no tag."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""`owner/name` on the Hub."""

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubLocation:
    """Where a weight is published."""

    repo_id: str
    """`owner/name`."""
    revision: str | None = None
    """The commit, 40 hex digits; None until published."""

    def __post_init__(self) -> None:
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            raise ValueError(f"revision is not a commit of 40 hex digits: {self.revision!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One measured number, with all that is needed to doubt it or to get it again."""

    metric: str
    """`"nats_per_character"`, `"accuracy"` ..."""
    value: float
    unit: str
    """What one sample is: `"character"`, `"image"` ..."""
    n: int
    """How many samples were measured, each counted once."""
    interval: tuple[float, float]
    """For the sampling of the `n` samples; says nothing about seeds."""
    interval_method: str
    confidence: float = 0.95
    seeds: tuple[int, ...]
    """The training seeds behind the value."""
    seed_spread: float | None = None
    """Standard deviation over the seeds; None with a single seed."""
    tolerance: float
    """How far a re-measurement of the same weight may be off."""
    protocol: str
    """How it was measured, in a few words."""
    dataset: str
    split: str
    command: str
    """Passes or fails on this number."""
    date: str
    """YYYY-MM-DD."""
    versions: dict[str, str]
    """Package -> version."""
    cpu_minutes: float | None = None
    """What the training behind the value cost; None when unknown."""
    primary: bool = False
    """The number that stands for the weight; exactly one of its results is."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"interval is upside down: {list(self.interval)}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {self.confidence}")
        if self.tolerance < 0:
            raise ValueError(f"tolerance must be at least 0, got {self.tolerance}")
        if not _DATE.fullmatch(self.date):
            raise ValueError(f"date must be YYYY-MM-DD, got {self.date!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """A net that differs in the mechanism alone, trained and tuned with the same budget.

    The model itself, at that budget, is one of the list.
    """

    name: str
    differs: str
    """In what it differs from the model, in a few words."""
    recipe: str
    """Its file under `recipes/`."""
    parameters: int
    macs: int | None = None
    """Multiply-accumulates of one forward pass, per token or sample; None when not counted."""
    speed: str = ""
    """Measured training speed, with its unit."""
    result: Result
    difference: float | None = None
    """Mean of its value less the model's at the same budget, over the seeds that both have, or over
    all of each where there are none; None for the model itself."""
    difference_interval: tuple[float, float] | None = None
    """Of the difference, paired over the samples."""
    against: str = omit_default("")
    """Name of the control that the difference is to; "" for the model."""
    values: tuple[float, ...] = omit_default(())
    """Of each seed, in the order of `result.seeds`; () where they were not kept."""

    def seed_error(self, other: Control) -> float | None:
        """Half of Student's 95 % interval of the difference to another control, over seeds.

        `difference_interval` is for other samples of the test set, with these seeds; this is for
        other seeds. It is paired over the seeds that both have, where their values were kept, and
        Welch's otherwise (1947, Biometrika 34:28). None where there are too few seeds.
        """
        seeds = [dict(zip(c.result.seeds, c.values, strict=False)) for c in (self, other)]
        pairs = [value - seeds[1][seed] for seed, value in seeds[0].items() if seed in seeds[1]]
        if len(pairs) > 1:
            degrees: float = len(pairs) - 1
            variance = statistics.variance(pairs) / len(pairs)
        else:
            spreads = [(c.result.seed_spread, len(c.result.seeds)) for c in (self, other)]
            errors = [(s**2 / n, n - 1) for s, n in spreads if s is not None and n > 1]
            if len(errors) < 2:
                return None
            variance = sum(error for error, _ in errors)
            weight = sum(error**2 / free for error, free in errors)
            degrees = variance**2 / weight if weight else 1.0
        return student_quantile(degrees) * math.sqrt(variance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported:
    """A number from the paper or another project, to be read beside ours."""

    metric: str
    value: float
    unit: str
    source: str
    evidence: str
    """How sure we are that the source says so."""
    difference: str
    """How its protocol differs from ours."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paper:
    """Where the mechanism comes from."""

    title: str
    authors: str
    year: int
    url: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurements:
    """The content of `results.json`, the machine-readable file that all tables come from."""

    weight: str
    """The full name, `"architecture.tag"`."""
    results: tuple[Result, ...]
    controls: tuple[Control, ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the training was and cost; plain JSON."""
    diagnostics: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Figures on robustness that `zoo evaluate --diagnose` computed; plain JSON."""
    analog: dict[str, Any] | None = omit_default(None)
    """What `zoo evaluate --analog ... --record` measured; plain JSON."""

    def __post_init__(self) -> None:
        primary = sum(result.primary for result in self.results)
        if self.results and primary != 1:
            raise ValueError(f"exactly one result must be primary, got {primary}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """A registry entry: one published weight.

    The fields with a default at the end are computed: `update` writes them.
    """

    architecture: str
    """Its name in `zoo.registry`."""
    weight: str
    """The tag after the dot: `"tiny-shakespeare"`."""
    default: bool
    """Whether the bare architecture name means this weight."""
    recipe: str
    """File name under `recipes/`."""
    input: str
    """Type and shape of what goes in."""
    output: str
    """Type and shape of what comes out."""
    code_license: str
    weights_license: str
    data_license: str
    datasets: tuple[str, ...]
    """Names on the Hub."""
    hub: HubLocation
    paper: Paper
    reported: tuple[Reported, ...] = ()
    not_exported: dict[str, str] = dataclasses.field(default_factory=dict)
    """Formats that `zoo export` cannot write of this weight -> the reason."""
    base_model: str = ""
    """What it was fine-tuned from: a weight of the zoo, a repository on the Hub, or in words."""

    family: str = ""
    task: str = ""
    parameters: int = 0
    """Each shared parameter is counted once."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The network's arguments."""
    files: tuple[FileRecord, ...] = ()
    """All of the checkpoint folder but the card itself."""
    results: tuple[Result, ...] = ()
    controls: tuple[Control, ...] = ()
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the training was and cost."""
    body: str
    """The Markdown below the front matter; `update` fills the tables between its markers."""

    @property
    def name(self) -> str:
        """The full name, `"architecture.tag"`."""
        return f"{self.architecture}.{self.weight}"

    @property
    def source_commit(self) -> str | None:
        """The commit of this project that trained the weight."""
        return self.training.get("source_commit")

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(record.size for record in self.files)

    @property
    def primary(self) -> Result:
        """The result that stands for the weight.

        Raises:
            ConfigError: When nothing was measured yet.
        """
        for result in self.results:
            if result.primary:
                return result
        raise ConfigError(f"The card of {self.name} has no results: zoo card {self.name} --update")


# --- finding -------------------------------------------------------------------------------------


def holds(card: Card, folder: Path) -> bool:
    """Whether a checkpoint folder has the network of a card, byte for byte."""
    records = [r for r in card.files if r.name in (files.CONFIG_FILE, files.WEIGHTS_FILE)]
    try:
        for record in records:
            record.read(folder)
    except CheckpointError:
        return False
    return bool(records)


def shipped_folder(name: str) -> Path:
    """Where this installation has its `model_cards` or `recipes`.

    In a source checkout they lie beside the package, in a wheel inside of it.
    """
    package = Path(__file__).parent
    if (package.parent / "pyproject.toml").is_file():
        return package.parent / name
    return package / {"model_cards": "_cards", "recipes": "_recipes"}[name]


def pretrained_folder(name: str) -> Path:
    """Where the bundled checkpoint folder of a weight is, or would be."""
    return Path(__file__).parent / "pretrained" / name


def load_cards(folder: Path | None = None) -> Mapping[str, Card]:
    """Read all cards.

    Args:
        folder: Where the cards are; by default this installation's own.

    Returns:
        The cards by full name, in alphabetical order.

    Raises:
        ConfigError: When a card is not valid or its file is not named after it.
    """
    return _read_cards(folder or shipped_folder("model_cards"))


@functools.cache
def _read_cards(folder: Path) -> Mapping[str, Card]:
    cards = {}
    for path in sorted(folder.glob("*.md")):
        card = parse(path.read_text(encoding="utf-8"), where=str(path))
        if card.name != path.stem:
            raise ConfigError(f"{path}: the card says it is {card.name!r}; rename one of them")
        cards[card.name] = card
    return MappingProxyType(cards)


def find(name: str) -> Card:
    """Look up the card of a weight.

    Args:
        name: `"architecture.tag"`, or the bare architecture, which means its default weight.

    Returns:
        Everything that is known about the weight, without importing torch.

    Raises:
        UnknownNameError: When the name fits no weight (the text has the nearest) or several (the
            text has each spelling).
    """
    cards = load_cards()
    if name in cards:
        return cards[name]
    siblings = [card for card in cards.values() if card.architecture == name]
    defaults = [card for card in siblings if card.default]
    if len(defaults) == 1:
        return defaults[0]
    candidates = siblings or [card for card in cards.values() if card.weight == name]
    if candidates:
        spellings = " or ".join(repr(card.name) for card in candidates)
        raise UnknownNameError(f"{name!r} is not the full name of a weight: say {spellings}.")
    architectures = [card.architecture for card in cards.values()]
    hint = nearest(name, [*cards, *architectures]) or " `zoo list` shows all there are."
    raise UnknownNameError(f"Unknown model {name!r}.{hint}")


info = find


def list_models(
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    *,
    task: str | None = None,
    family: str | None = None,
    licence: str | None = None,
    max_params: int | None = None,
) -> list[str]:
    """List the weights that fit every given condition, without importing torch.

    Args:
        include: Shell wildcards; a weight is listed when its full or its architecture's name
            matches one of them.
        exclude: Shell wildcards for names to leave out.
        task: Such as `"language-modeling"`.
        family: Such as `"cached-transformers"`.
        licence: The licence of the weights, such as `"apache-2.0"`.
        max_params: Largest number of parameters.

    Returns:
        Full names in alphabetical order.

    Raises:
        UnknownNameError: When no weight has that task, family or licence at all.
    """
    cards = load_cards()
    for condition, value, known in [
        ("task", task, {card.task for card in cards.values()}),
        ("family", family, {card.family for card in cards.values()}),
        ("licence", licence, {card.weights_license for card in cards.values()}),
    ]:
        if value is not None and value not in known:
            hint = nearest(value, known) or f" There are: {', '.join(sorted(known))}."
            raise UnknownNameError(f"No model has the {condition} {value!r}.{hint}")
    return [
        card.name
        for card in cards.values()
        if (include is None or _matches(card, include))
        and not (exclude is not None and _matches(card, exclude))
        and task in (None, card.task)
        and family in (None, card.family)
        and licence in (None, card.weights_license)
        and (max_params is None or card.parameters <= max_params)
    ]


def _matches(card: Card, patterns: str | Sequence[str]) -> bool:
    if isinstance(patterns, str):
        patterns = [patterns]
    return any(
        fnmatchcase(name, pattern)
        for pattern in patterns
        for name in (card.name, card.architecture)
    )


# --- the file ------------------------------------------------------------------------------------


def parse(text: str, where: str = "card") -> Card:
    """Read a card.

    Args:
        text: The whole Markdown file.
        where: Its path, for error messages.

    Returns:
        The card; `render` is the inverse.

    Raises:
        ConfigError: When the front matter is missing or its `zoo:` block is not valid.
    """
    text = text.replace("\r\n", "\n")  # as an editor or a checkout on Windows leaves it
    if not text.startswith("---\n") or "\n---\n" not in text:
        raise ConfigError(f"{where}: a card begins with YAML front matter between two lines '---'")
    front_matter, _, body = text.removeprefix("---\n").partition("\n---\n")
    try:
        values = yaml.load(front_matter, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        # Of what looks like a date or a number and is none, the parser raises what Python does.
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    block = values.get("zoo") if isinstance(values, dict) else None
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: the front matter has no block 'zoo:'")
    if "body" in block:
        raise ConfigError(f"{where}: unknown key 'body'")
    return build(Card, {**block, "body": body}, where)


def render(card: Card) -> str:
    """Write a card as Markdown with front matter, the inverse of `parse`."""
    block = to_json(card)
    body = block.pop("body")
    if not card.base_model:
        del block["base_model"]
    front_matter = yaml.dump(
        {**_hub_keys(card), "zoo": block},
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    return f"---\n{front_matter}---\n{body}"


def _hub_keys(card: Card) -> dict[str, Any]:
    """The front matter that the Hub itself reads."""
    pipeline_tag = _PIPELINE_TAGS.get(card.task)
    task = {"type": pipeline_tag or card.task}
    keys = {
        "license": card.weights_license,
        "library_name": "zoo",
        "pipeline_tag": pipeline_tag,
        "datasets": list(card.datasets),
        "base_model": _base_repository(card),
        "tags": ["zoo", "pytorch-lightning", card.family, card.task],
        "model-index": [
            {
                "name": card.name,
                "results": [
                    {
                        "task": task,
                        "dataset": {
                            "type": result.dataset,
                            "name": result.dataset,
                            "split": result.split,
                        },
                        "metrics": [
                            {
                                "type": result.metric,
                                "name": f"{result.metric} ({result.protocol})",
                                "value": result.value,
                            }
                        ],
                    }
                    for result in card.results
                ],
            }
        ],
    }
    return {key: value for key, value in keys.items() if value}


def _base_repository(card: Card) -> str | None:
    """The repository on the Hub of what a weight was fine-tuned from, where it has one."""
    known = load_cards().get(card.base_model) if card.base_model else None
    name = card.base_model.removeprefix("hf://").partition("@")[0] if known is None else ""
    if known is not None:
        return known.hub.repo_id
    # A path of the same form would be a folder on this machine, which the Hub has nothing of.
    return name if REPO_ID.fullmatch(name) and not Path(name).exists() else None


# --- what is computed ----------------------------------------------------------------------------


def update(name: str, folder: Path | None = None) -> Card:
    """Write every computable field of a card, and a copy of the card into its checkpoint folder.

    Args:
        name: The weight or the architecture.
        folder: The checkpoint folder; by default the bundled one.

    Returns:
        The card as written.

    Raises:
        CheckpointError: When the folder lacks a file or holds another weight.
        ConfigError: When `results.json` is not valid, or the card lacks a marker for a table.
    """
    typed = find(name)
    folder = folder or pretrained_folder(typed.name)
    card = computed(typed, folder)
    text = render(card)
    for path in (shipped_folder("model_cards") / f"{card.name}.md", folder / files.CARD_FILE):
        files.write_bytes(path, text.encode())
    _read_cards.cache_clear()
    return card


def computed(card: Card, folder: Path) -> Card:
    """Return the card with every computable field taken from its checkpoint folder.

    Args:
        card: The card, of which only what people typed is kept.
        folder: The checkpoint folder.

    Returns:
        The card as `update` writes it; equal to `card` when that is up to date.

    Raises:
        CheckpointError: When the folder lacks a file or holds another weight.
        ConfigError: When `results.json` is not valid, or the card lacks a marker for a table.
    """
    config = files.read_json(folder / files.CONFIG_FILE)
    measured = read_measurements(folder / files.RESULTS_FILE)
    if (config["architecture"], measured.weight) != (card.architecture, card.name):
        raise CheckpointError(
            f"{folder} holds {config['architecture']!r} with the results of {measured.weight!r}, "
            f"not {card.name!r}."
        )
    found = tuple(
        FileRecord.of(name, files.read_bytes(folder / name))
        for name in files.CHECKPOINT_FILES
        if name != files.CARD_FILE
    )
    if card.files and found != card.files:
        # What is on the Hub at that commit is no longer this.
        card = dataclasses.replace(card, hub=dataclasses.replace(card.hub, revision=None))
    card = dataclasses.replace(
        card,
        family=config["family"],
        task=config["task"],
        config=config["network"],
        parameters=_parameters(folder / files.WEIGHTS_FILE),
        files=found,
        results=measured.results,
        controls=measured.controls,
        training=measured.training,
    )
    body = _card_tables.fill_all(card, measured.diagnostics, measured.analog)
    return dataclasses.replace(card, body=body)


def record_revision(name: str, revision: str) -> None:
    """Write the commit that a weight was published as into its card, in a source checkout.

    In any other installation the card is not the user's to change, and nothing happens.

    Args:
        name: The full name of the weight.
        revision: 40 hex digits.
    """
    shelf = shipped_folder("model_cards")
    if shelf.name != "model_cards":
        return
    card = find(name)
    card = dataclasses.replace(card, hub=dataclasses.replace(card.hub, revision=revision))
    for path in (shelf / f"{name}.md", pretrained_folder(name) / files.CARD_FILE):
        if path.exists():
            files.write_bytes(path, render(card).encode())
    _read_cards.cache_clear()


def update_readme(path: Path) -> None:
    """Write the table of models into a README, between its markers `zoo:models`.

    Raises:
        ConfigError: When it lacks the markers.
    """
    _card_tables.fill_file(path, "models", render_readme_table(load_cards().values()))


def render_readme_table(cards: Iterable[Card]) -> str:
    """Render the README's table of models in Markdown, one line for each card."""
    return _card_tables.models(cards)


def read_measurements(path: Path) -> Measurements:
    """Read a `results.json`.

    Raises:
        CheckpointError: When it cannot be read.
        ConfigError: When it does not have the fields of `Measurements`.
    """
    return build(Measurements, files.read_json(path), str(path))


def _parameters(path: Path) -> int:
    """Read the number of parameters that `zoo.checkpoints.save` put into the header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        return int(header["__metadata__"]["parameters"])
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise CheckpointError(f"{path} was not written by zoo.checkpoints.save.") from error
