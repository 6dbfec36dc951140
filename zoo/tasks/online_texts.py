"""Learning a stream of texts once: as of images, behind an encoder of texts."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zoo.cards import pretrained_folder
from zoo.configs import build
from zoo.data.sources import locate
from zoo.data.streams import kept_encodings
from zoo.data.text_streams import (
    TextStreamBatch,
    TextStreamDataModule,
    WordPieces,
    read_vocabulary,
)
from zoo.errors import ConfigError, ZooError
from zoo.families.online_ensemble import OnlineTextNetworkConfig, convert_minilm
from zoo.families.online_ensemble.texts import PADDING
from zoo.files import CONFIG_FILE, WEIGHTS_FILE, read_json
from zoo.progress import track
from zoo.tasks.base import Exportable, count_macs
from zoo.tasks.image_classification import ImagePrediction
from zoo.tasks.online_learning import OnlineClassifier, encoder_of_a_checkpoint
from zoo.tasks.optimization import OptimizerConfig

__all__ = ["ENCODER", "OnlineTextClassifier"]

ENCODER = "all-MiniLM-L6-v2"
"""The encoder that is known by name; its files are in `zoo.data.sources`."""

_VOCABULARY_FILE = "vocab.txt"
_BATCH = 64


class OnlineTextClassifier(OnlineClassifier):
    """Classifies texts by what it has learned of a stream of them, and goes on learning.

        m = OnlineTextClassifier()
        m.load_encoder("all-MiniLM-L6-v2")
        m.learn(["Rain all day.", "A goal at last!"], [0, 1])
        m.predict("Snow in the evening")

    Args:
        network: the frozen encoder and the learner.
        optimizer: not used; the learner has its own rule.
        preprocessing: vocabulary and class names; None: those that come with the encoder's weights
            and the first data.
        encoder_weights: where a new stream takes its encoder from, see `load_encoder`; None: the
            encoder stays as it is.
        compile: not used; one pass is too short for it.

    Raises:
        ConfigError: the preprocessing does not fit the encoder.
        ZooError: transformers is not installed.
    """

    network_config: ClassVar[type[Any]] = OnlineTextNetworkConfig
    preprocessing_config: ClassVar[type[Any] | None] = WordPieces
    data_class: ClassVar[type[Any]] = TextStreamDataModule
    unit: ClassVar[str] = "text"
    protocols: ClassVar[dict[str, str]] = {
        "test": "share of the test texts of all classes whose best score is that of the right "
        "class, each counted once"
    }

    preprocessing: WordPieces | None  # type: ignore[assignment]

    def __init__(
        self,
        network: OnlineTextNetworkConfig = OnlineTextNetworkConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        preprocessing: WordPieces | None = None,
        encoder_weights: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(network, optimizer, None, encoder_weights, compile)
        if preprocessing is not None:
            self._check_fit(network, preprocessing)
        self.preprocessing = preprocessing

    @staticmethod
    def _check_fit(network: OnlineTextNetworkConfig, preprocessing: WordPieces) -> None:  # type: ignore[override]
        encoder, pieces = network.encoder, len(preprocessing.vocabulary)
        if pieces != encoder.vocabulary or preprocessing.length > encoder.positions:
            raise ConfigError(
                f"The vocabulary has {pieces} pieces and texts have up to {preprocessing.length} "
                f"tokens, but the encoder takes {encoder.vocabulary} and {encoder.positions}."
            )

    # -------------------------------------------------------------------- usage

    def learn(self, texts: Any, labels: Any) -> None:
        """Learn one batch of a stream, in place; new classes may come at any time.

        What is wrong with a batch is found before anything of it is learned.

        Args:
            texts: one text, or a list of them; see `predict`.
            labels: class of each, integers from 0 on.

        Raises:
            DataError: the batch is empty, a text or a label is no such thing, or a class is
                beyond a fixed head.
            ConfigError: there is no vocabulary yet.
        """
        super().learn(texts, labels)

    def predict(self, texts: Any, *, top_k: int = 5) -> list[ImagePrediction]:
        """Name what texts are of, with probabilities.

        Args:
            texts: one text, or a list of them; what is longer than the model reads is cut off.
            top_k: number of classes to name, at most all that were seen.

        Raises:
            ConfigError: `top_k` is no positive whole number, or there is no vocabulary yet.
            DataError: a text is no string or empty, or nothing has been learned yet.
        """
        return super().predict(texts, top_k=top_k)

    def _known_preprocessing(self) -> WordPieces:  # type: ignore[override]
        if self.preprocessing is None:
            raise ConfigError(
                f"There is no vocabulary yet: load_encoder({ENCODER!r}) brings one, or pass "
                "preprocessing."
            )
        return self.preprocessing

    def _encoded(self, texts: Any) -> Tensor:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            texts = [texts]
        return self._encode_tokens(self._known_preprocessing().tokens(texts))

    def _encode_tokens(self, tokens: Sequence[Tensor], what: str = "") -> Tensor:
        """Encodings, N x d; texts of like length go together, so that little is filled up."""
        order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
        parts = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        encoded = [
            self._encode(pad_sequence([tokens[row] for row in part], True, PADDING))
            for part in (track(parts, f"encoding {what}") if what else parts)
        ]
        return torch.cat(encoded)[torch.tensor(order, device=self.device).argsort()]

    def _encode(self, tokens: Tensor) -> Tensor:
        with self.evaluating():
            return self.network.forward_features(tokens.to(self.device))

    # ----------------------------------------------------------------- training

    def load_encoder(self, name: str | os.PathLike[str]) -> None:
        """Take the encoder and its vocabulary.

        Args:
            name: "all-MiniLM-L6-v2", from one commit on the Hub where it is not on this machine; a
                folder of sentence-transformers with `model.safetensors` and the `vocab.txt` of a
                model in lower case; a checkpoint folder; or the name of a bundled weight.

        Raises:
            DataError: a file cannot be read or downloaded.
            ZooError: there is no such folder, or its encoder is another one.
        """
        folder = Path(name)
        convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = convert_minilm
        if str(name) == ENCODER and not folder.is_dir():
            words = self._with_vocabulary(read_vocabulary(locate("minilm-vocabulary")))
            weights = locate("minilm-weights")
        elif (folder / _VOCABULARY_FILE).is_file():
            words = self._with_vocabulary(read_vocabulary(folder / _VOCABULARY_FILE))
            weights = folder / WEIGHTS_FILE
        else:
            if not folder.is_dir():
                folder = pretrained_folder(str(name))
            path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
            stored = read_json(path).get("preprocessing") if path.is_file() else None
            if not stored or not weights.is_file():
                raise ZooError(
                    f"No encoder of texts at {str(name)!r}: neither {ENCODER!r}, nor a folder with "
                    f"{WEIGHTS_FILE} and {_VOCABULARY_FILE}, nor a checkpoint of this architecture."
                )
            words = self._with_vocabulary(build(WordPieces, stored, str(path)).vocabulary)
            convert = encoder_of_a_checkpoint
        self._take_encoder(weights, convert)
        self.preprocessing = words

    def _with_vocabulary(self, vocabulary: tuple[str, ...]) -> WordPieces:
        """What reads with another vocabulary; names of classes that are known stay."""
        network = self.network.config
        assert isinstance(network, OnlineTextNetworkConfig)
        if self.preprocessing is not None:
            words = dataclasses.replace(self.preprocessing, vocabulary=vocabulary)
        else:
            length = min(WordPieces.length, network.encoder.positions)
            classes = ("class 0", "class 1")
            words = WordPieces(vocabulary=vocabulary, length=length, classes=classes)
        self._check_fit(network, words)
        return words

    def bind(self, datamodule: TextStreamDataModule) -> None:  # type: ignore[override]
        """Agree with a data module on the names of classes; those that were learned stay.

        Raises:
            ConfigError: there is no vocabulary yet, or the data call a class by another name than
                the model.
        """
        known = self._known_preprocessing()
        classes = self._all_classes(datamodule.classes)
        self.preprocessing = dataclasses.replace(known, classes=classes)
        self._name_classes()

    def _kept_encodings(self, datamodule: TextStreamDataModule) -> tuple[Tensor, Tensor]:
        encoder = self._encoder_digest()
        return (
            self._kept(datamodule.train_texts, encoder, "training texts"),
            self._kept(datamodule.test_texts, encoder, "test texts"),
        )

    def _kept(self, texts: Sequence[str], encoder: str, what: str) -> Tensor:
        tokens = self._known_preprocessing().tokens(texts)
        digest = hashlib.sha256(encoder.encode())
        for one in tokens:
            digest.update(one.numpy().data)  # each ends with the same token
        return kept_encodings(
            digest.hexdigest(), lambda: self._encode_tokens(tokens, what).float().cpu()
        )

    def _encode_batch(self, batch: TextStreamBatch) -> Tensor:
        return self._encoded(batch.texts)

    @torch.no_grad()
    def exportable(self, batch: int, generator: torch.Generator) -> Exportable:
        """None.

        Raises:
            ConfigError: always; what takes words apart is no part of a network.
        """
        raise ConfigError("it takes words apart, which is no product of tensors")

    # --------------------------------------------------------------- evaluation

    def macs(self, batch: TextStreamBatch) -> int:  # type: ignore[override]
        """Multiply-accumulates of a forward pass of the first text, encoder included."""
        tokens = self._known_preprocessing().tokens(batch.texts[:1])
        return count_macs(self.network, torch.stack(tokens))

    def _encode_test(self, datamodule: TextStreamDataModule) -> Tensor:
        tokens = self._known_preprocessing().tokens(datamodule.test_texts)
        return self._encode_tokens(tokens, "test texts")
