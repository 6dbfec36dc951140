"""What all LightningModules of the zoo have in common."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.configs import to_json
from zoo.errors import ConfigError, DataError, ZooError
from zoo.provenance import machine, source_commit, versions
from zoo.tasks.optimization import OptimizerConfig, build_optimizer

if TYPE_CHECKING:
    from typing_extensions import Self

    from zoo.cards import Card, Measurements

__all__ = [
    "Exportable",
    "Measurement",
    "ZooModule",
    "as_numbers",
    "check_count",
    "check_positive",
    "compile_network",
    "count_macs",
    "finite",
    "seeded_generator",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A metric as sums over sampling units, so that an interval can be computed from it.

    The value is `sums.sum() / counts.sum()`. Units (blocks of text, images, users) are what is
    resampled; each sample is counted in exactly one of them.

    Attributes:
        metric: name of the metric.
        unit: what one sample is ("character", "image").
        sums: one float64 per unit.
        counts: samples per unit, int64.
        kind: "mean" of real values, or "proportion" of zeros and ones.
        split: part of the data set that was measured.
    """

    metric: str
    unit: str
    sums: Tensor
    counts: Tensor
    kind: Literal["mean", "proportion"] = "mean"
    split: str = "validation"

    @property
    def n(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    @property
    def value(self) -> float:
        """The metric over all samples."""
        return float(self.sums.sum() / self.counts.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exportable:
    """A network as a function from tensors to tensors, and an example of what it takes.

    Attributes:
        network: takes the inputs by position, and returns a tuple of tensors.
        inputs: random tensors by name; the first dimension of each is the batch.
        outputs: names of what it returns.
    """

    network: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


class ZooModule(pl.LightningModule):
    """Base of the zoo's LightningModules: a network, how it is trained, and how it is measured.

    Subclasses set the class attributes, build `network` in their constructor, whose arguments
    `network` and `optimizer` are the two frozen configurations (and `preprocessing` a third, where
    there is one), and implement `training_step`, `validation_step`, `measure`, `predict`, `samples`
    and `macs`. The state dict of `published_network` is what a checkpoint folder holds.
    """

    network_config: ClassVar[type[Any]]
    """Frozen dataclass of the network's arguments."""
    preprocessing_config: ClassVar[type[Any] | None] = None
    """Frozen dataclass of what turns a user's input into tensors; None where nothing does."""
    head_parameters: ClassVar[tuple[str, ...]] = ()
    """Names of the network's tensors that a head swap replaces."""
    protocols: ClassVar[Mapping[str, str]] = {}
    """Evaluation protocols by name, with what they do; the first is the primary one."""

    network: nn.Module
    preprocessing: Any = None
    """An instance of `preprocessing_config`, kept in `config.json`; None while it is not known."""
    load_report: Any = None
    """Set by `zoo.load`: what was loaded, dropped and initialised."""
    loaded_from: str | None = None
    """Set by `zoo.load`: the name that the weights are known by."""
    finetuned: Any = None
    """Set by `zoo.finetune`: what was measured before and after."""
    _fit_seed: int | None = None

    def __init__(self, network: Any, optimizer: OptimizerConfig, compile: bool = False) -> None:
        super().__init__()
        self.config = network
        self.optimizer_config = optimizer
        self.compile_network = compile

    @property
    def published_network(self) -> nn.Module:
        """The network that is measured, used and published: an average of weights, perhaps."""
        return self.network

    @property
    def published_config(self) -> Any:
        """What `published_network` is rebuilt from; `config` unless the network has changed."""
        return self.config

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode for a while; then each module is in the mode that it was in.

        A model that is in the middle of a training, or fresh from one, is used and measured like
        any other, and batch normalisation keeps its statistics.
        """
        # Each by itself: frozen parts may be in eval mode within a network that is trained.
        trained = [module for module in self.modules() if module.training]
        if trained:
            self.eval()
        try:
            yield
        finally:
            for module in trained:
                module.training = True

    @classmethod
    def swap_head(cls, preprocessing: Any, num_classes: int) -> Any:
        """What `preprocessing` becomes with a new head of `num_classes` classes."""
        return preprocessing

    def take_preprocessing(self, preprocessing: Any, datamodule: Any) -> None:
        """Agree with a data module before a fine-tuning: go on with the base's `preprocessing`."""
        if preprocessing is not None:
            self.preprocessing = preprocessing

    def _agree_with(self, datamodule: Any) -> None:
        """Take a data module's preprocessing; or keep one's own, all but the names of the classes,
        and tell the data module so."""
        data = datamodule.preprocessing
        if self.preprocessing is not None:
            data = dataclasses.replace(self.preprocessing, classes=data.classes)
            datamodule.preprocessing = data
        self.preprocessing = data

    def carried_rows(self, base: ZooModule) -> dict[str, tuple[Tensor, Tensor]]:
        """Tensors of which a fine-tuning carries over some rows: name -> rows here, rows in `base`;
        the others stay as they were drawn."""
        return {}

    def protocols_on(self, datamodule: Any) -> tuple[str, ...]:
        """Names of the protocols that the model can be measured by on data as they are split."""
        return tuple(self.protocols)

    def samples(self, batch: Any) -> int:
        """How many samples a training batch has, as `macs` and the speed of training count them;
        the sampling units of `measure` may be others, as users are other than pairs."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a sample is")

    def macs(self, batch: Any) -> int:
        """Multiply-accumulates of a forward pass per sample, on input like that of a training
        batch; see `count_macs`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a sample is")

    def measure(self, datamodule: pl.LightningDataModule, protocol: str) -> Measurement:
        """Measure the network by one of `protocols`; each sample is counted exactly once."""
        raise NotImplementedError(f"{type(self).__name__} has no evaluation protocol {protocol!r}")

    @property
    def has_diagnostics(self) -> bool:
        """Whether `diagnose` is more than an error."""
        return type(self).diagnose is not ZooModule.diagnose

    def diagnose(self, datamodule: pl.LightningDataModule) -> dict[str, Any]:
        """Figures on robustness, as plain JSON, where a family has any; see `zoo evaluate`.

        Raises:
            ZooError: the model has none.
        """
        raise ZooError(f"{type(self).__name__} has no diagnostics.")

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """The network as `zoo export` writes it, with random inputs.

        Args:
            batch: size of the first dimension of each input.
            generator: what the inputs are drawn from.

        Raises:
            ConfigError: this kind of model, or its configuration, cannot be exported; the text has
                the reason.
        """
        raise ConfigError(f"{type(self).__name__} does not say how it is exported.")

    # The Hub's two verbs. Its own mixin would fit here, but loads without a word what does not
    # match, and takes its files for a pickle where there are no safetensors.

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        strict: bool = True,
        **network_overrides: Any,
    ) -> Self:
        """Load a model as `zoo.load` does, and insist on its class.

        Args:
            pretrained_model_name_or_path: a weight of the zoo, a checkpoint folder, or a repository
                on the Hub.
            revision: commit, tag or branch on the Hub.
            local_files_only: never to use the network.
            strict: whether the names and shapes of all tensors must agree.
            network_overrides: arguments of the network, or others of `zoo.load`.

        Raises:
            ZooError: as `zoo.load`; or the model is of another class.
        """
        import zoo

        module = zoo.load(
            pretrained_model_name_or_path,
            revision,
            local_files_only=local_files_only,
            strict=strict,
            **network_overrides,
        )
        if not isinstance(module, cls):
            raise ConfigError(
                f"{pretrained_model_name_or_path} holds a {type(module).__name__}, not a "
                f"{cls.__name__}; use zoo.load for either."
            )
        return module

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: Card | str,
        recipe: str,
        results: Measurements,
        commit_message: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Publish this model as `zoo.push` does: complete, in one commit, with a tag.

        Args:
            repo_id: `owner/name`.
            card: the card, or its Markdown; what can be computed is.
            recipe: text of the recipe that trained it.
            results: what was measured of it.
            commit_message: of the commit.
            private: to make the repository private.
            token: a token of the Hub; None: that of the client.

        Returns:
            The address of the commit.

        Raises:
            ZooError: something is missing, or the Hub refuses.
        """
        from huggingface_hub import constants

        import zoo

        done = zoo.push(
            self,
            repo_id,
            card=card,
            recipe=recipe,
            results=results,
            message=commit_message,
            private=private,
            token=token,
        )
        return f"{constants.ENDPOINT}/{done.repo_id}/commit/{done.commit}"

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        return build_optimizer(self.network, self.optimizer_config, total)

    def on_fit_start(self) -> None:
        if self.compile_network:
            compile_network(self.network)

    def on_train_epoch_start(self) -> None:
        # Dropout then depends on (seed, epoch, process) alone, and a run that is resumed at an
        # epoch boundary draws what the uninterrupted run draws.
        if self._fit_seed is None:
            self._fit_seed = torch.initial_seed()
        mixed = (self._fit_seed * 1_000_003 + self.current_epoch * 1_009 + self.global_rank) % 2**63
        torch.manual_seed(mixed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Plain JSON: the file stays loadable with weights_only=True and says how to rebuild.
        checkpoint["zoo_network"] = to_json(self.published_config)
        checkpoint["zoo_seed"] = self._fit_seed
        if self.preprocessing is not None:
            checkpoint["zoo_preprocessing"] = to_json(self.preprocessing)
        checkpoint["zoo_published"] = next(
            name for name, part in self.named_modules() if part is self.published_network
        )
        checkpoint["zoo_commit"] = source_commit()
        # What is recorded of a training may be recorded elsewhere.
        checkpoint["zoo_machine"], checkpoint["zoo_versions"] = machine(), versions()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("zoo_seed") is not None:
            self._fit_seed = checkpoint["zoo_seed"]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number that a user has given.

    Args:
        name: what it is, for messages.
        value: what was given.
        least: the smallest that is allowed.

    Raises:
        ConfigError: it is no whole number, or is smaller.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {value!r:.60}") from None
    if isinstance(value, bool):
        raise ConfigError(f"{name} must be a whole number, got {value}")
    if count < least:
        raise ConfigError(f"{name} must be at least {least}, got {count}")
    return count


def check_positive(name: str, value: Any) -> float:
    """A finite number above 0 that a user has given.

    Args:
        name: what it is, for messages.
        value: what was given.

    Raises:
        ConfigError: it is no number, not finite, or not above 0.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} must be a number, got {value!r:.60}")
    number = float(value)
    if not 0 < number < math.inf:
        raise ConfigError(f"{name} must be positive and finite, got {value}")
    return number


def as_numbers(given: Any, what: str) -> Tensor:
    """What a user has given as numbers, float64.

    Args:
        given: numbers, in lists or a tensor of any shape.
        what: what they are, for messages.

    Raises:
        DataError: it is something else.
    """
    try:
        return torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{what} must be numbers, got {given!r:.60}.") from None


def finite(outputs: Tensor, what: str = "outputs") -> Tensor:
    """The outputs of a network, of which the largest can be told.

    Args:
        outputs: logits or scores.
        what: what they are, for messages.

    Raises:
        ZooError: one is not finite. No number is above NaN, so it would be the best of all.
    """
    if not bool(outputs.isfinite().all()):
        raise ZooError(
            f"The model's {what} are not finite: its training diverged, or its weights are damaged."
        )
    return outputs


def seeded_generator(seed: Any) -> torch.Generator:
    """A generator on the CPU with a seed that a user has given; None: with one of the system's.

    Raises:
        ConfigError: the seed is no whole number, or has more than 64 bits.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    least, largest = -(2**63), 2**64 - 1  # what PyTorch takes
    if (number := check_count("seed", seed, least)) > largest:
        raise ConfigError(f"seed must be at most {largest}, got {number}")
    return generator.manual_seed(number)


def count_macs(network: nn.Module, *inputs: Any) -> int:
    """Multiply-accumulates of a forward pass in eval mode, by `torch.utils.flop_counter`.

    Products of matrices and convolutions are counted; causal attention is counted in full.
    """
    trained = [module for module in network.modules() if module.training]
    network.eval()
    # The counter follows what requires a gradient, and fails where a module returns a view of a
    # parameter without one being recorded.
    detached = {name: tensor.detach() for name, tensor in network.named_parameters()}
    # Fused attention on the CPU is not counted at all; its plain form is.
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            functional_call(network, detached, inputs)
    finally:
        for module in trained:
            module.training = True
    total: int = counter.get_total_flops()
    return total // 2


def compile_network(network: nn.Module) -> bool:
    """Compile the repeated blocks of a network in place, where a compiler is at hand.

    Compiling the blocks (`network.blocks`, else its children) costs one compilation of each kind,
    and leaves parameter names as they are.

    Returns:
        Whether the network was compiled.
    """
    compilers: Sequence[str] = ("cl",) if sys.platform == "win32" else ("c++", "g++", "clang++")
    on_cpu = all(p.device.type == "cpu" for p in network.parameters())
    if on_cpu and not any(shutil.which(name) for name in compilers):
        warnings.warn("No C++ compiler was found; training goes on uncompiled.", stacklevel=2)
        return False
    for block in getattr(network, "blocks", network.children()):
        block.compile()
    return True
