"""Tests of online learning of texts in hand: predict, learn, store, fit, measure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.texts import PIECES, TINY_BERT, TOPICS, labelled_texts, write_encoder, write_texts
from tests.tiny import SHRUNK, run
from zoo import checkpoints, training
from zoo.data.text_streams import TextStreamBatch, TextStreamDataModule, WordPieces
from zoo.errors import ConfigError, DataError, ZooError
from zoo.families.online_ensemble import (
    GateConfig,
    OnlineTextNetworkConfig,
    RidgeEnsembleConfig,
    TextEncoderConfig,
)
from zoo.tasks.online_texts import OnlineTextClassifier

RECIPE = "experiments/online-ensemble.text-minilm"
NETWORK = OnlineTextNetworkConfig(
    encoder=TextEncoderConfig(**TINY_BERT),  # type: ignore[arg-type]
    ridge_ensemble=RidgeEnsembleConfig(classifiers=4, features=2, gate=GateConfig(k=2)),
)
WORDS = WordPieces(vocabulary=PIECES, length=12, classes=("class 0", "class 1"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("bert") / "encoder")


def module(**changes: Any) -> OnlineTextClassifier:
    torch.manual_seed(3)
    network = dataclasses.replace(NETWORK, **changes)
    return OnlineTextClassifier(network, preprocessing=WORDS).eval()


def same_state(a: OnlineTextClassifier, b: OnlineTextClassifier) -> bool:
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_it_learns_in_place_and_names_what_it_has_seen(encoder: Path) -> None:
    m = module()
    m.load_encoder(encoder)
    texts, labels = labelled_texts(30)
    m.learn(texts[:30], labels[:30])  # one topic after the other
    assert m.predict("a goal")[0].classes == ("class 0",)
    m.learn(texts[30:], labels[30:])
    asked, truth = labelled_texts(40, seed=1)
    predictions = m.predict(asked)
    right = [p.label == f"class {c}" for p, c in zip(predictions, truth, strict=True)]
    assert sum(right) / len(right) > 0.95
    for prediction in predictions:
        assert sum(prediction.probabilities) == pytest.approx(1.0, abs=1e-5)
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)
    assert len(m.predict(asked, top_k=1)[0].classes) == 1


def test_what_comes_along_and_what_is_cut_off_play_no_part(encoder: Path) -> None:
    m = module()
    m.load_encoder(encoder)
    m.learn(*labelled_texts(30))
    texts = labelled_texts(50, seed=2)[0]
    together = m.predict(texts)
    for text, found in list(zip(texts, together, strict=True))[::7]:
        (alone,) = m.predict(text)
        assert alone.classes == found.classes
        assert alone.probabilities == pytest.approx(found.probabilities, abs=1e-4)
    long = "rain " * 10
    assert m.predict(long) == m.predict(f"{long} goal goal goal")


def test_the_encoder_never_changes_and_the_global_state_neither() -> None:
    m = module()
    before, random = copy.deepcopy(m.network.encoder.state_dict()), torch.get_rng_state()
    m.learn(*labelled_texts(5))
    m.predict("rain")
    assert all(torch.equal(v, before[k]) for k, v in m.network.encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(p.requires_grad for p in m.network.encoder.parameters())


def test_a_checkpoint_in_mid_stream_goes_on_bit_for_bit(tmp_path: Path, encoder: Path) -> None:
    m = module()
    m.load_encoder(encoder)
    m.learn(*labelled_texts(5))
    checkpoints.save(m, tmp_path / "stored")
    loaded = checkpoints.load(tmp_path / "stored")
    assert isinstance(loaded, OnlineTextClassifier)
    assert loaded.config == m.config
    assert loaded.config.num_classes == 2
    for one in (m, loaded):
        one.learn(["snow pad", "a ball", "[ ]"], [0, 1, 3])
    assert same_state(m, loaded)
    texts = labelled_texts(5, seed=4)[0]
    assert m.predict(texts) == loaded.predict(texts)
    assert m.preprocessing == loaded.preprocessing
    assert m.preprocessing is not None
    assert m.preprocessing.classes == ("class 0", "class 1", "class 2", "class 3")


BAD: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "float labels": (lambda: ("goal", torch.tensor([1.0])), "Labels must be integers"),
    "names for labels": (lambda: ("goal", ["sport"]), "Labels must be integers, got"),
    "beyond a fixed head": (lambda: ("goal", [3]), "Class 3 is beyond the 3 classes"),
    "another number of labels": (lambda: ("goal", [0, 1]), "Expected 1 labels"),
    "empty text": (lambda: (["goal", " \n"], [0, 1]), "Text 1 of 2 is empty"),
    "empty list": (lambda: ([], []), "batch is empty"),
    "no text": (lambda: (["goal", 3], [0, 1]), r"must be strings, got 3 \(int\)"),
    "nothing": (lambda: (None, [0]), r"must be strings, got None \(NoneType\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_leaves_the_state(case: str) -> None:
    m = module(num_classes=3, grows=False)
    m.learn(*labelled_texts(3))
    before, named = copy.deepcopy(m.network.state_dict()), m.preprocessing
    make, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        m.learn(*make())
    assert "\n" not in str(caught.value)
    after = m.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert m.preprocessing == named


def test_other_mistakes_are_one_line(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(DataError, match="Nothing has been learned yet"):
        module().predict("goal")
    with pytest.raises(ConfigError, match="top_k must be at least 1, got 0"):
        module().predict("goal", top_k=0)
    with pytest.raises(ConfigError, match=r"no vocabulary yet: load_encoder\('all-MiniLM-L6-v2'\)"):
        OnlineTextClassifier(NETWORK).learn("goal", [0])
    words = dataclasses.replace(WORDS, length=25)
    with pytest.raises(ConfigError, match=r"up to 25 tokens, but the encoder takes \d+ and 24"):
        OnlineTextClassifier(NETWORK, preprocessing=words)
    with pytest.raises(ZooError, match="No encoder of texts at 'nowhere': neither 'all-MiniLM"):
        module().load_encoder("nowhere")
    other = dataclasses.replace(NETWORK.encoder, hidden=40)
    with pytest.raises(ZooError, match="has no encoder of this kind") as caught:
        module(encoder=other).load_encoder(encoder)
    assert "\n" not in str(caught.value)
    m = module()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "vocab.txt").write_text("\n".join(reversed(PIECES[1:])))
    with pytest.raises(ValueError, match=r"needs \[PAD\] first"):
        m.load_encoder(tmp_path / "bare")
    pieces = (PIECES[0], *reversed(PIECES[1:]))
    (tmp_path / "bare" / "vocab.txt").write_text("\n".join(pieces))
    with pytest.raises(ZooError, match=r"Cannot read .*model\.safetensors"):
        m.load_encoder(tmp_path / "bare")
    assert m.preprocessing == WORDS, "the vocabulary comes with the weights or not at all"
    (encoder / "vocab.txt").rename(tmp_path / "vocab.txt")
    with pytest.raises(ZooError, match=r"nor a folder with model\.safetensors and vocab\.txt"):
        module().load_encoder(encoder)
    (tmp_path / "vocab.txt").rename(encoder / "vocab.txt")


def test_classes_that_were_learned_keep_their_names(tmp_path: Path) -> None:
    data = TextStreamDataModule(str(write_texts(tmp_path / "texts.csv", 10)))
    m = module()
    m.learn(["rain", "goal", "snow"], [0, 1, 2])
    m.bind(data)
    assert m.preprocessing is not None
    assert m.preprocessing.classes == (*TOPICS, "class 2")
    m.preprocessing = dataclasses.replace(WORDS, classes=("a", "b", "c"))
    with pytest.raises(ConfigError, match=f"The data's class 0 is '{next(iter(TOPICS))}', the mod"):
        m.bind(data)
    assert m.preprocessing.classes == ("a", "b", "c")


def test_fit_runs_a_stream_of_a_file_and_again_bit_for_bit(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "cache"))
    data = f"data.path={write_texts(tmp_path / 'texts.csv', 50)}"
    options = [*SHRUNK["online-ensemble-text"], data, f"model.encoder_weights={encoder}"]
    # The recipe's penalty is for real texts, whose encodings are less far apart.
    options.append("model.network.ridge_ensemble.ridge=1e-3")
    first = training.fit(RECIPE, options, out=tmp_path / "first")
    monkeypatch.setenv("ZOO_CACHE_DIR", str(tmp_path / "another"))  # encodes anew
    second = training.fit(RECIPE, options, out=tmp_path / "second")
    assert same_state(first.module, second.module)
    m = checkpoints.load(first.checkpoint)
    assert isinstance(m, OnlineTextClassifier)
    assert m.preprocessing is not None
    assert m.preprocessing.classes == tuple(TOPICS)
    assert m.preprocessing.vocabulary == PIECES
    record = first.module.record
    assert record.final_accuracy > 0.95
    assert record.per_task[0].tolist()[1] == 0.0, "the second topic had not come yet"
    measured = m.measure(first.datamodule, "test")
    assert (measured.n, measured.unit) == (20, "text")
    assert measured.value == pytest.approx(record.final_accuracy)
    # The same stream by hand, of which nothing is encoded before it comes.
    by_hand = OnlineTextClassifier(first.module.network.config)
    by_hand.load_encoder(first.checkpoint)
    for batch in first.datamodule.train_dataloader():
        by_hand.learn(list(batch.texts), batch.labels)
    ours, theirs = by_hand.network.learner, m.network.learner
    torch.testing.assert_close(ours.gram, theirs.gram, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.counts, theirs.counts)
    metrics = (tmp_path / "first" / "logs" / "part_0" / "metrics.csv").read_text()
    assert "stream_final_accuracy" in metrics
    assert "membership/weather/0" in metrics


def test_the_command_names_topics(tmp_path: Path, encoder: Path) -> None:
    m = module()
    m.load_encoder(encoder)
    m.learn(*labelled_texts(50))
    checkpoints.save(m, tmp_path / "stored")
    texts = ["goal match referee", "snow rain wind"]
    said = run("predict", tmp_path / "stored", "--json", *(f"--text={text}" for text in texts))
    assert [one["text"] for one in said.json] == texts
    assert [one["classes"][0] for one in said.json] == ["class 0", "class 1"]
    (tmp_path / "my.txt").write_text("snow rain wind")
    said = run("predict", tmp_path / "stored", "--file", tmp_path / "my.txt", "--top-k", "1")
    assert said.status == 0
    assert said.out.splitlines()[0].split() == ["text", "class", "probability"]
    assert "class 1" in said.out
    said = run("predict", tmp_path / "stored", "--image", "x.png")
    assert said.status == 2
    assert "it takes --text or --file" in said.err


def test_products_are_those_of_the_first_text() -> None:
    m = module()
    m.learn(*labelled_texts(3))
    m.predict("goal")  # solves for the weights, once
    macs = [
        m.macs(TextStreamBatch(torch.arange(2), [text, "goal " * 9], torch.tensor([0, 0]), None))
        for text in ("goal", "goal goal goal")
    ]
    # Per token and block: four products of the attention and two of the MLP. Between tokens, two.
    d, hidden, layers = TINY_BERT["dim"], TINY_BERT["hidden"], TINY_BERT["layers"]
    encoder = [
        layers * (tokens * (4 * d * d + 2 * d * hidden) + 2 * tokens * tokens * d)
        for tokens in (3, 5)
    ]
    assert macs[1] - macs[0] == encoder[1] - encoder[0]
    assert encoder[0] <= macs[0] < 2 * encoder[0]


@pytest.mark.network
def test_minilm_encodes_what_it_is_known_to() -> None:
    """The first numbers for the example of its page, as they are widely quoted."""
    m = OnlineTextClassifier()
    m.load_encoder("all-MiniLM-L6-v2")
    found = m._encoded(["This is an example sentence", "Each sentence is converted"])
    expected = [0.06765693, 0.06349593, 0.04871314, 0.07930495, 0.03744806, 0.00265273]
    torch.testing.assert_close(found[0, :6], torch.tensor(expected), rtol=0, atol=1e-5)
    assert found.shape == (2, 384)
