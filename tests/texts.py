"""Texts of made topics, and a tiny BERT that reads them: shared by the tests."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from safetensors.torch import save_file

TOPICS = {
    "sport": ("ball", "goal", "team", "match", "player", "referee"),
    "weather": ("rain", "snow", "wind", "storm", "cloud", "sunny"),
}
"""Topic -> the words that it alone has."""

PIECES = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "and", ".", ",", "!", "[", "]", "pad"),
    *(word for words in TOPICS.values() for word in words),
    *("##s", "##er", "##y"),
)
"""The vocabulary of the tiny BERT."""

TINY_BERT = {
    "dim": 32,
    "layers": 2,
    "heads": 2,
    "hidden": 48,
    "vocabulary": len(PIECES),
    "positions": 24,
}
"""Its shape, as of `TextEncoderConfig`."""


def labelled_texts(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """So many texts of each topic, of two to nine words, with the number of the topic."""
    source = random.Random(seed)
    texts, labels = [], []
    for label, words in enumerate(TOPICS.values()):
        for _ in range(count):
            chosen = [source.choice((*words, *words, "the", "a")) for _ in range(8)]
            texts.append(" ".join([source.choice(words), *chosen[: source.randint(1, 8)]]))
            labels.append(label)
    return texts, labels


def write_texts(path: Path, count: int = 30) -> Path:
    """A CSV file of so many texts of each topic."""
    topics = tuple(TOPICS)
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "label", "text"])
        for number, (text, label) in enumerate(zip(*labelled_texts(count), strict=True)):
            rows.writerow([number, topics[label], text])
    return path


def write_encoder(folder: Path) -> Path:
    """A folder as of sentence-transformers: a random BERT with a pooler, and its vocabulary."""
    import torch
    from transformers import BertConfig, BertModel

    folder.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = BertModel(
            BertConfig(
                vocab_size=TINY_BERT["vocabulary"],
                hidden_size=TINY_BERT["dim"],
                num_hidden_layers=TINY_BERT["layers"],
                num_attention_heads=TINY_BERT["heads"],
                intermediate_size=TINY_BERT["hidden"],
                max_position_embeddings=TINY_BERT["positions"],
                initializer_range=0.1,  # mostly a mean of words, which are told apart with ease
            )
        )
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES), encoding="utf-8")
    return folder
