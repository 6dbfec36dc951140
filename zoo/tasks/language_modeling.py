"""Language modelling over bytes: training on streams, generation, and scoring of texts."""

from __future__ import annotations

import codecs
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.data.text import START, StreamBatch, TextDataModule, encode_bytes
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.cached_transformers import (
    AttentionState,
    CachedTransformerLM,
    CachedTransformerLMConfig,
    LanguageModelState,
)
from zoo.progress import track
from zoo.tasks.base import Exportable, Measurement, ZooModule, count_macs
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["LanguageModel", "TextPreprocessing", "TextScore", "TextStream", "sample_token"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPreprocessing:
    """How a text becomes tokens: its UTF-8 bytes, after a line feed."""

    tokenizer: Literal["bytes"]
    start: Literal[10]
    """The token that stands before the first of a text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """How likely a text is under a model.

    Attributes:
        text: the text.
        n: bytes of it; each was predicted once, the first after a line feed.
        log_likelihood: natural logarithm of its probability.
    """

    text: str
    n: int
    log_likelihood: float

    @property
    def nats_per_byte(self) -> float:
        """Mean negative log-likelihood of a byte, natural logarithm."""
        return -self.log_likelihood / self.n

    @property
    def bits_per_byte(self) -> float:
        """The same in bits."""
        return self.nats_per_byte / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp of `nats_per_byte`."""
        return math.exp(self.nats_per_byte)


def sample_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw tokens from B x V logits; B integers.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens.
        top_p: keep the likeliest tokens whose probability, after temperature and `top_k`, reaches
            p together (nucleus sampling, arXiv:1904.09751); at least one.
        generator: source of randomness; None for the global one.
    """
    # Below the normal numbers of float32 there is nothing to divide by.
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if not scaled.isfinite().all():
        # Distances from the likeliest token cannot overflow but to minus infinity.
        scaled = (logits.float() - logits.float().amax(-1, keepdim=True)) / temperature
    logits = scaled
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k)  # k of them, also where more are as likely as the last
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1.0:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0.0
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


class TextStream(Iterator[str]):
    """Text that is written while it is iterated over; `state` and `text` tell how far it is.

    Made by `LanguageModel.stream`.

    Attributes:
        text: what has been written so far, without the prompt.
        state: what the model remembers after `text`, at any moment; hand it to the next call to go
            on.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Tensor,
        state: LanguageModelState | None,
        **sampling: Any,
    ) -> None:
        self._model, self._state, self._sampling = model, state, sampling
        self._left: int = sampling.pop("max_new_tokens")
        seed = sampling.pop("seed")
        self._generator = None
        if seed is not None:
            self._generator = torch.Generator(model.device).manual_seed(seed)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unread: Tensor | None = prompt.to(model.device).long()[None]
        self._logits = torch.empty(0)
        self.text = ""

    def __iter__(self) -> TextStream:
        return self

    @torch.no_grad()
    def _read(self) -> None:
        """Let the model read what is written and it has not read; logits of the next byte stay."""
        if self._unread is None:
            return
        with self._model.evaluating():
            logits, self._state = self._model.network(self._unread, self._state)
        self._logits, self._unread = logits[:, -1], None

    @property
    def state(self) -> LanguageModelState:
        """What the model remembers after the prompt and `text`."""
        self._read()
        assert self._state is not None
        return self._state

    def __next__(self) -> str:
        while self._left > 0:
            self._read()
            token = sample_token(self._logits, generator=self._generator, **self._sampling)
            self._unread = token[:, None]
            self._left -= 1
            piece = self._decoder.decode(bytes(token.tolist()), final=self._left == 0)
            if piece:  # empty in the middle of a character of several bytes
                self.text += piece
                return piece
        raise StopIteration


class _OneSegment(nn.Module):
    """A network whose state goes in and out as tensors, one whole segment at a time."""

    def __init__(self, network: CachedTransformerLM) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, *memories: Tensor) -> tuple[Tensor, ...]:
        state = self.network.initial_state()
        if memories:
            state = LanguageModelState(tuple(AttentionState(memory=m) for m in memories))
        logits, state = self.network(tokens, state)
        return logits, *(layer.memory for layer in state.layers if layer.memory is not None)


class LanguageModel(ZooModule):
    """A language model over bytes.

    Args:
        network: shape of the network.
        optimizer: how it is trained.
        detach_every: segments after which the gradient through the memory is cut, within a
            training step; None: only between steps.
        compile: compile the network's blocks for training.
        preprocessing: how a text becomes tokens, of which there is one way.
    """

    network_config: ClassVar[type[Any]] = CachedTransformerLMConfig
    preprocessing_config: ClassVar[type[Any] | None] = TextPreprocessing
    head_parameters: ClassVar[tuple[str, ...]] = ("head.weight",)
    protocols: ClassVar[dict[str, str]] = {
        "stream": "the whole text in order, memory carried along, every character counted once",
        "blocks": "independent blocks of one segment without memory (the protocol of nanoGPT)",
    }

    network: CachedTransformerLM

    def __init__(
        self,
        network: CachedTransformerLMConfig = CachedTransformerLMConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        detach_every: int | None = None,
        compile: bool = False,
        preprocessing: TextPreprocessing = TextPreprocessing(tokenizer="bytes", start=10),
    ) -> None:
        super().__init__(network, optimizer, compile)
        self.network = CachedTransformerLM(network)
        self.preprocessing = preprocessing
        self.detach_every = detach_every
        self.val_loss = MeanMetric()
        self._stream_state: LanguageModelState | None = None

    # ---------------------------------------------------------------- training

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._stream_state = None

    def training_step(self, batch: StreamBatch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of a byte, in nats."""
        tokens, reset = batch
        state = self._stream_state
        if state is not None:
            state = state.reset(reset)
        logits, state = self.network(tokens[:, :-1], state, detach_every=self.detach_every)
        self._stream_state = state.detach()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: StreamBatch, batch_idx: int) -> None:
        if len(batch.tokens):  # this process's share may be over before the others'
            losses = self._losses(batch.tokens, None)[0]
            self.val_loss.update(losses.double().mean(), losses.numel())
        self.log("val_loss", self.val_loss, prog_bar=True)

    def _losses(
        self, tokens: Tensor, state: LanguageModelState | None
    ) -> tuple[Tensor, LanguageModelState]:
        """Negative log-likelihood of tokens 1.. given those before, B x (n - 1), in nats."""
        logits, state = self.network(tokens[:, :-1], state)
        losses = F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")
        return losses, state

    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """One segment: tokens and the memory of each block in, logits and the new memories out.

        Fresh streams begin with memories of zeros.
        """
        if self.config.memory == "xl":
            raise ConfigError(
                "a Transformer-XL memory begins empty and then has a length, which one program "
                "cannot both take"
            )
        segment = (batch, self.config.segment)
        tokens = torch.randint(self.config.vocab_size, segment, generator=generator)
        with torch.no_grad():
            _, state = self.network(tokens)
        memories = {
            f"memory_{index}": torch.randn(layer.memory.shape, generator=generator)
            for index, layer in enumerate(state.layers)
            if layer.memory is not None
        }
        return Exportable(
            network=_OneSegment(self.network),
            inputs={"tokens": tokens, **memories},
            outputs=("logits", *(f"new_{name}" for name in memories)),
        )

    # -------------------------------------------------------------- evaluation

    def samples(self, batch: StreamBatch) -> int:
        return batch.tokens[:, 1:].numel()

    def macs(self, batch: StreamBatch) -> int:
        """Multiply-accumulates per token of a forward pass over a segment with memory."""
        tokens = torch.zeros(1, self.config.segment, dtype=torch.long, device=self.device)
        with torch.no_grad():
            _, state = self.network(tokens)
        segment: int = self.config.segment
        return round(count_macs(self.network, tokens, state) / segment)

    @torch.no_grad()
    def measure(self, datamodule: TextDataModule, protocol: str) -> Measurement:  # type: ignore[override]
        """Nats per character of the validation text, by one of `protocols`.

        Sampling units are blocks of one segment.

        Raises:
            ZooError: there is no such protocol.
        """
        if protocol not in self.protocols:
            raise ZooError(
                f"Unknown protocol {protocol!r}; choose one of {', '.join(self.protocols)}."
            )
        datamodule.setup()
        sums, counts = [], []
        if protocol == "blocks":
            for batch in track(datamodule.blocks(), "blocks"):
                with self.evaluating():
                    losses = self._losses(batch.tokens.to(self.device), None)[0]
                sums.append(losses.double().sum(1).cpu())
                counts.append(torch.full((len(losses),), losses.shape[1]))
            expected = len(datamodule.validation_text) - 1
        else:
            text = datamodule.validation_text.long()
            expected = len(text)
            segments = -(-len(text) // self.config.segment)
            for losses in track(self._stream_losses(text), "stream", segments):
                sums.append(losses.double().sum().cpu()[None])
                counts.append(torch.tensor([losses.numel()]))
        measurement = Measurement(
            metric="nats_per_character",
            unit="character",
            sums=torch.cat(sums),
            counts=torch.cat(counts),
        )
        if measurement.n != expected:
            raise AssertionError(f"counted {measurement.n} characters of {expected}")
        return measurement

    def _stream_losses(
        self, text: Tensor, state: LanguageModelState | None = None
    ) -> Iterator[Tensor]:
        """Losses of one text in order, a segment at a time; the first byte follows `START`."""
        segment = self.config.segment
        tokens = torch.cat((torch.tensor([START]), text)).to(self.device)
        for start in range(0, len(text), segment):
            with self.evaluating():  # not around the loop, in the middle of which others run
                losses, state = self._losses(tokens[None, start : start + segment + 1], state)
            yield losses[0]

    # ------------------------------------------------------------------- usage

    @torch.no_grad()
    def predict(self, texts: str | Sequence[str]) -> list[TextScore]:
        """Log-likelihood and perplexity of texts, each on its own, memory included.

        Args:
            texts: one text or several, of any length.

        Raises:
            DataError: there are no texts, or one is empty or not a string.
        """
        if not isinstance(texts, (str, Sequence)):
            raise DataError(f"predict takes texts, got {type(texts).__name__}.")
        if not isinstance(texts, str) and not len(texts):
            raise DataError("predict got no texts.")
        scores = []
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise DataError(f"predict takes texts, got {type(text).__name__}.")
            if not text:
                raise DataError("predict got an empty text; there is nothing to score.")
            tokens = encode_bytes(text).long()
            total = sum(float(losses.double().sum()) for losses in self._stream_losses(tokens))
            scores.append(TextScore(text=text, n=len(tokens), log_likelihood=-total))
        return scores

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 300,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        state: LanguageModelState | None = None,
    ) -> str:
        """Continue a text.

        Args:
            prompt: what comes before.
            max_new_tokens: bytes to write.
            temperature: randomness; 0 takes the likeliest byte each time.
            top_k: choose among the k likeliest bytes; None for all.
            top_p: choose among the likeliest bytes that reach probability p together.
            seed: makes the result repeatable; None draws from the global generator.
            state: the `state` of an earlier `TextStream`, which the prompt then goes on from.

        Returns:
            The new text, without the prompt.

        Raises:
            ConfigError: the prompt is empty, or an option is of the wrong type or out of range.
        """
        return "".join(
            self.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                state=state,
            )
        )

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 300,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        state: LanguageModelState | None = None,
    ) -> TextStream:
        """As `generate`, but an iterator over pieces of text as they are written."""
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }
        sampling = _checked_sampling(prompt, sampling)
        if state is not None and not isinstance(state, LanguageModelState):
            raise ConfigError(
                f"state must be the state of an earlier TextStream, or None, got {state!r:.60}."
            )
        tokens = encode_bytes(prompt)
        if state is None:
            tokens = torch.cat((torch.tensor([START], dtype=torch.uint8), tokens))
        return TextStream(self, tokens, state, **sampling)


def _checked_sampling(prompt: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as plain numbers, which those of arrays are not."""
    if not isinstance(prompt, str):
        raise ConfigError(f"The prompt must be a text, got {prompt!r}.")
    if not prompt:
        raise ConfigError("The prompt is empty; give at least one character to continue from.")
    checked: dict[str, Any] = {}
    for name, value in options.items():
        checked[name] = value
        if value is None and name in ("top_k", "top_p", "seed"):
            continue
        whole = name in ("max_new_tokens", "top_k", "seed")
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            kind = "whole number" if whole else "number"
            raise ConfigError(f"{name} must be a {kind}, got {value!r}.")
        plain: Any = int if whole else float
        checked[name] = plain(value)
        allowed, in_range = _SAMPLING_RANGES[name]
        if not in_range(value):
            raise ConfigError(f"{name} must be {allowed}, got {value}.")
    return checked


_SAMPLING_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": ("at least 1", lambda value: value >= 1),
    "temperature": ("0 (greedy) or positive", lambda value: 0 <= value < math.inf),
    "top_k": ("at least 1", lambda value: value >= 1),
    "top_p": ("in (0, 1]", lambda value: 0 < value <= 1),
    "seed": ("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63),
}
"""What each option may be, in words and as a test."""
