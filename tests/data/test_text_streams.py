"""Tests of streams of texts: word pieces by hand, readers, parts and their order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.texts import PIECES, TOPICS, labelled_texts, write_texts
from zoo.data.streams import StreamConfig
from zoo.data.text_streams import (
    TextStreamDataModule,
    WordPieces,
    read_labelled_texts,
    read_vocabulary,
)
from zoo.errors import DataError, ZooError

WORDS = WordPieces(vocabulary=PIECES, length=12, classes=("a", "b"))

# -------------------------------------------------------------------------------------- word pieces


def by_hand(text: str) -> list[str]:
    """Of ASCII: words and single marks in lower case, each cut greedily from the left."""
    words, word = [], ""
    for character in f"{text.lower()} ":
        if character.isalnum():
            word += character
            continue
        words += [word] if word else []
        words += [] if character.isspace() else [character]
        word = ""
    found = []
    for word in words:
        pieces, rest = [], word
        while rest:
            start = "##" if pieces else ""
            size = next((n for n in range(len(rest), 0, -1) if start + rest[:n] in PIECES), 0)
            if not size:
                pieces = ["[UNK]"]
                break
            pieces.append(start + rest[:size])
            rest = rest[size:]
        found += pieces
    return ["[CLS]", *found[: WORDS.length - 2], "[SEP]"]


SOME = st.sampled_from(["goals", "Player", "PLAYERS", "rainy", "rainier", "the", "zebra", "pad"])


@settings(deadline=None)
@given(st.lists(st.one_of(SOME, st.text("[]., !?sAy", max_size=4)), min_size=1, max_size=9))
def test_words_are_cut_as_by_hand(words: list[str]) -> None:
    text = "a" + " ".join(words)
    (tokens,) = WORDS.tokens([text])
    assert [PIECES[token] for token in tokens] == by_hand(text)


def test_a_text_cannot_contain_padding() -> None:
    (tokens,) = WORDS.tokens(["[PAD] [SEP] goal"])
    named = [PIECES[token] for token in tokens]
    assert named == ["[CLS]", "[", "pad", "]", "[", "[UNK]", "]", "goal", "[SEP]"]


def test_a_vocabulary_is_read(tmp_path: Path) -> None:
    pieces = (*PIECES, "\u2028", "\x85", "é")
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    assert read_vocabulary(tmp_path / "vocab.txt") == pieces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": PIECES[1:]}, r"needs \[PAD\] first"),
        ({"vocabulary": ("a", *PIECES[1:])}, r"needs \[PAD\] first"),
        ({"vocabulary": (*PIECES, "goal")}, "has a piece twice"),
        ({"length": 2}, "length must be at least 3, got 2"),
        ({"classes": ("a", "a")}, "two or more different names"),
    ],
)
def test_bad_word_pieces_are_one_line(change: dict[str, object], message: str) -> None:
    values = {"vocabulary": PIECES, "classes": ("a", "b"), **change}
    with pytest.raises(ValueError, match=message):
        WordPieces(**values)  # type: ignore[arg-type]


def test_without_tokenizers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    words = WordPieces(vocabulary=PIECES, classes=("a", "b"))
    with pytest.raises(ZooError, match=r"needs tokenizers: pip install 'zoo\[text\]'"):
        words.tokens(["goal"])


# ------------------------------------------------------------------------------------------ readers


def test_a_csv_and_a_folder_hold_the_same(tmp_path: Path) -> None:
    texts, labels = labelled_texts(3)
    read = read_labelled_texts(write_texts(tmp_path / "texts.csv", 3))
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        folder = tmp_path / "folder" / tuple(TOPICS)[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"{text}\n")
    for found in (read, read_labelled_texts(tmp_path / "folder")):
        assert found[0] == tuple(texts)
        assert found[1].tolist() == labels
        assert found[2] == tuple(TOPICS)


def test_columns_have_other_names_and_texts_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\ufefftopic,body\n10,"two\nlines, é"\n9,one\n10,more\n', encoding="utf-8")
    texts, labels, classes = read_labelled_texts(path, text_column="body", label_column="topic")
    assert texts == ("two\nlines, é", "one", "more")
    assert classes == ("9", "10")
    assert labels.tolist() == [1, 0, 1]


def test_classes_that_are_one_number_have_an_order(tmp_path: Path) -> None:
    names = ["1", "01", "001", "2", "02"]
    path = tmp_path / "x.csv"
    path.write_text("\n".join(["text,label", *(f"a,{name}" for name in names)]))
    assert read_labelled_texts(path)[2] == ("001", "01", "1", "02", "2")


def _folder(path: Path, content: bytes) -> Path:
    (path / "a").mkdir(parents=True)
    (path / "a" / "1.txt").write_bytes(content)
    return path


def _csv(content: str | bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no file": (lambda path: path, "No texts at"),
    "no column": (_csv("test,label\na,b\n"), "no column 'text'. Did you mean 'test'"),
    "no label": (_csv("text,class\na,b\n"), "no column 'label'.* There are: text, class"),
    "nothing": (_csv(""), "no column 'text'. There are: none"),
    "header alone": (_csv("text,label\n"), "has no texts; it needs texts of two or more classes"),
    "one class": (_csv("text,label\na,x\nb,x\n"), "has one class, 'x'; it needs"),
    "empty text": (_csv('text,label\na,x\n" ",y\n'), "line 3: 'text' is empty"),
    "empty label": (_csv("text,label\na,\n"), "line 2: 'label' is empty"),
    "short row": (_csv("text,label\na\n"), "line 2: 'label' is empty"),
    "huge field": (
        _csv(f"text,label\n{'a' * 200_000},x\n"),
        "row from line 2 on: field larger than",
    ),
    "comma": (_csv("text,label\na,x\nb, c,y\n"), "line 3: more fields than the header; quote"),
    "lone quote": (_csv('text,label\na,x\n"b,y\nc,x\n'), "row from line 3 on: unexpected end"),
    "latin": (_csv("text,label\né,x\n".encode("latin-1")), "is not UTF-8, at byte 11"),
    "empty folder": (lambda path: path.mkdir() or path, "has no texts"),  # type: ignore[func-returns-value]
    "folder of one": (lambda path: _folder(path, b"text"), "has one class, 'a'"),
    "empty file": (lambda path: _folder(path, b" \n"), "1.txt is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line(case: str, tmp_path: Path) -> None:
    write, message = BAD[case]
    with pytest.raises(DataError, match=message) as caught:
        read_labelled_texts(write(tmp_path / "x"))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ streams


def test_each_text_comes_once_and_those_to_test_never(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts.csv", 20)
    everything = sorted(labelled_texts(20)[0])
    stream = StreamConfig(tasks=2, batch_size=5)
    data = TextStreamDataModule(path=str(path), stream=stream)
    batches = list(data.train_dataloader())
    learned = [text for batch in batches for text in batch.texts]
    assert sorted([*learned, *data.test_texts]) == everything
    assert torch.bincount(data.test_labels).tolist() == [4, 4]
    assert torch.bincount(data.train_labels).tolist() == [16, 16]
    assert [batch.ended for batch in batches if batch.ended is not None] == [0, 1]
    known = dict(zip(*labelled_texts(20), strict=True))
    for batch in batches:
        assert len(batch.labels.unique()) == 1
        assert [known[text] for text in batch.texts] == batch.labels.tolist()
        assert batch.texts == [data.train_texts[row] for row in batch.rows.tolist()]
    assert data.classes == tuple(TOPICS)


def test_one_seed_orders_and_another_splits(tmp_path: Path) -> None:
    path = str(write_texts(tmp_path / "texts.csv", 20))
    stream = StreamConfig(tasks=2)
    first, again = (TextStreamDataModule(path, stream=stream) for _ in range(2))
    ordered = TextStreamDataModule(path, stream=stream, seed=1)
    split = TextStreamDataModule(path, stream=stream, split_seed=1)
    assert first.test_texts == again.test_texts == ordered.test_texts != split.test_texts
    assert torch.equal(first.stream.order, again.stream.order)
    assert not torch.equal(first.stream.order, ordered.stream.order)


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set data\.path to a CSV file or a folder"):
        TextStreamDataModule().setup("fit")
    with pytest.raises(ValueError, match=r"test_fraction must be in \(0, 1\), got 1"):
        TextStreamDataModule(test_fraction=1.0)
    with pytest.raises(ValueError, match="seeds must not be negative, got -1 and 0"):
        TextStreamDataModule(seed=-1)
    path = write_texts(tmp_path / "texts.csv", 2)
    with pytest.raises(DataError, match="2 classes, too few for 5 tasks"):
        TextStreamDataModule(str(path)).setup("fit")
    with pytest.raises(DataError, match="too few texts: with 3 held out"):
        TextStreamDataModule(str(path), test_fraction=0.75).setup("fit")
