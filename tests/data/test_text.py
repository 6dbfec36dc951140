"""Tests of zoo.data.text: bytes in and out, streams that cover a text once, blocks that do."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoo.data.text import (
    START,
    StreamBatch,
    StreamSampler,
    TextDataModule,
    _Blocks,
    _Streams,
    decode_bytes,
    encode_bytes,
    read_text,
)
from zoo.errors import DataError, UnknownNameError

# --- bytes ---------------------------------------------------------------------------------------


@given(text=st.text(min_size=1, max_size=30))
def test_text_to_bytes_and_back(text: str) -> None:
    tokens = encode_bytes(text)
    assert bytes(tokens.tolist()) == text.encode()
    assert decode_bytes(tokens) == text


@given(content=st.binary(min_size=1, max_size=30))
def test_any_bytes_of_a_file_have_a_text_that_gives_them_back(content: bytes) -> None:
    tokens = encode_bytes(content.decode("utf-8", "surrogateescape"))
    assert tokens.dtype == torch.uint8
    assert bytes(tokens.tolist()) == content


def test_half_of_a_surrogate_pair_has_no_bytes() -> None:
    with pytest.raises(
        DataError, match=r"Character 2 of the text is '\\ud83d', half of a surrogate"
    ):
        encode_bytes("so\ud83d")


def test_any_seed_that_a_generator_takes_orders_a_text() -> None:
    for seed in (2**62, 2**63 - 1):
        sampler = StreamSampler(100, 2, 5, 0.5, seed)
        first, again = ([step.starts.tolist() for step in sampler] for _ in range(2))
        assert first == again


def test_invalid_bytes_show_as_replacement_characters() -> None:
    assert decode_bytes(torch.tensor([0x61, 0xE9, 0x62])) == "a\ufffdb"
    assert ord("\n") == START


def test_read_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(1, 256))
    (tmp_path / "x.txt").write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "x.txt", str(tmp_path / "x.txt"), "~/x.txt"):
        assert bytes(read_text(path).tolist()) == content


def test_a_text_file_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.txt").touch()
    wide = {}
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        wide[encoding] = tmp_path / f"{encoding}.txt"
        wide[encoding].write_bytes("\ufeff日本".encode(encoding))
    (tmp_path / "bare.txt").write_bytes("ab".encode("utf-16-be"))
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    for path, message in [
        (tmp_path / "no.txt", f"No text file at {tmp_path}/no.txt."),
        (tmp_path / "empty.txt", f"The text file {tmp_path}/empty.txt is empty."),
        (tmp_path, f"Cannot read the text file {tmp_path}: Is a directory."),
        *(
            (path, f"The text file {path} is of UTF-16 or UTF-32; save it as UTF-8.")
            for path in wide.values()
        ),
        *(
            (
                tmp_path / name,
                f"{tmp_path}/{name} is no text file of UTF-8 or Latin-1: byte {at} is zero; save "
                "it as UTF-8.",
            )
            for name, at in (("bare.txt", 0), ("picture.txt", 8))
        ),
    ]:
        with pytest.raises(DataError) as caught:
            read_text(path)
        assert str(caught.value) == message

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"Cannot read the text file .*: Permission denied\."):
        read_text(tmp_path / "empty.txt")


# --- streams -------------------------------------------------------------------------------------


def batches(sampler: StreamSampler, text: Tensor) -> list[StreamBatch]:
    streams = _Streams(text, sampler.step)
    return [streams[step] for step in sampler]


def numbered(length: int) -> Tensor:
    """A text in which every position has a value of its own."""
    return torch.arange(length)


@given(
    length=st.integers(12, 200),
    streams=st.integers(1, 5),
    step=st.integers(1, 7),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
)
def test_each_byte_is_a_target_once_in_an_epoch(
    length: int, streams: int, step: int, seed: int, epoch: int
) -> None:
    sampler = StreamSampler(length, streams, step, 0.1, seed)
    sampler.set_epoch(epoch)
    found = batches(sampler, numbered(length))
    assert len(found) == len(sampler) == length // streams // step
    targets = [int(t) for batch in found for t in batch.tokens[:, 1:].flatten()]
    assert len(targets) == len(set(targets)) == len(found) * streams * step
    # What is left out is less than one step of each stream; the offset moves it around.
    assert length - len(targets) < streams * (step + 1)
    if length % (streams * step) == 0:
        assert sorted(targets) == list(range(length))


@given(
    length=st.integers(12, 200),
    streams=st.integers(1, 5),
    step=st.integers(1, 7),
    epoch=st.integers(0, 3),
)
def test_a_stream_goes_through_the_text_in_order(
    length: int, streams: int, step: int, epoch: int
) -> None:
    sampler = StreamSampler(length, streams, step, 0.0, seed=1)
    sampler.set_epoch(epoch)
    found = batches(sampler, numbered(length))
    if not found:
        return
    for row in range(streams):
        inputs = torch.cat([batch.tokens[row, :-1] for batch in found])
        targets = torch.cat([batch.tokens[row, 1:] for batch in found])
        expected = (int(inputs[0]) + torch.arange(len(inputs) + 1)) % length
        assert torch.equal(inputs, expected[:-1])
        assert torch.equal(targets, expected[1:])


@given(seed=st.integers(0, 5), epoch=st.integers(0, 5))
def test_the_order_is_a_function_of_seed_and_epoch(seed: int, epoch: int) -> None:
    def order(seed: int, epoch: int, before: int = 0) -> list[list[int]]:
        sampler = StreamSampler(97, 3, 4, 0.5, seed)
        for earlier in range(before):  # what came before does not matter
            sampler.set_epoch(earlier)
            list(sampler)
            torch.rand(7)
        sampler.set_epoch(epoch)
        return [[*step.starts.tolist(), *step.reset.tolist()] for step in sampler]

    first = order(seed, epoch)
    assert order(seed, epoch, before=3) == first
    assert order(seed, epoch + 1) != first
    assert order(seed + 1, epoch) != first


def test_the_order_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    list(StreamSampler(97, 3, 4, 0.5, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@given(streams=st.integers(1, 8), world_size=st.integers(1, 4), epoch=st.integers(0, 2))
def test_ranks_share_the_streams_among_them(streams: int, world_size: int, epoch: int) -> None:
    text = numbered(150)

    def found(rank: int, world: int) -> list[StreamBatch]:
        sampler = StreamSampler(len(text), streams, 6, 0.5, 1, rank, world)
        sampler.set_epoch(epoch)
        return batches(sampler, text)

    whole = found(0, 1)
    parts = [found(rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(whole)}
    for index, batch in enumerate(whole):
        rows = {
            tuple(row): bool(reset)
            for part in parts
            for row, reset in zip(part[index].tokens.tolist(), part[index].reset, strict=True)
        }
        expected = zip(batch.tokens.tolist(), batch.reset, strict=True)
        assert rows == {tuple(row): bool(reset) for row, reset in expected}
        assert sum(len(part[index].tokens) for part in parts) == streams


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_streams_forget_as_often_as_they_should(probability: float) -> None:
    steps = list(StreamSampler(40_000, 4, 2, probability, seed=3))
    assert steps[0].reset.all(), "nothing was seen before the first batch"
    resets = torch.stack([step.reset for step in steps[1:]]).double()
    n = resets.numel()
    standard_error = math.sqrt(probability * (1 - probability) / n)
    assert abs(float(resets.mean()) - probability) <= 4 * standard_error


def test_offsets_differ_between_epochs() -> None:
    sampler = StreamSampler(1_000, 2, 10, 0.0, seed=0)
    offsets = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        offsets.add(int(next(iter(sampler)).starts[0]))
    assert len(offsets) > 15


# --- blocks --------------------------------------------------------------------------------------


@given(length=st.integers(2, 120), block=st.integers(1, 9), batch=st.integers(1, 5))
def test_blocks_have_each_byte_but_the_first_as_target_once(
    length: int, block: int, batch: int
) -> None:
    blocks = _Blocks(numbered(length), block, batch)
    found = [blocks[index] for index in range(len(blocks))]
    targets = torch.cat([b.tokens[:, 1:].flatten() for b in found])
    inputs = torch.cat([b.tokens[:, :-1].flatten() for b in found])
    assert targets.tolist() == list(range(1, length))
    assert inputs.tolist() == list(range(length - 1))
    for b in found:
        assert b.reset.all()
        assert len(b.tokens) <= batch
        assert b.tokens.shape[1] <= block + 1
        # Blocks are independent: each begins with a byte of context and no more.
        assert all(int(row[0]) % block == 0 for row in b.tokens)
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@given(
    length=st.integers(2, 120),
    block=st.integers(1, 9),
    batch=st.integers(1, 5),
    processes=st.integers(1, 4),
)
def test_processes_share_the_blocks(length: int, block: int, batch: int, processes: int) -> None:
    """Each target is in one of them, and all have as many batches, of which the last are empty."""
    shares = [_Blocks(numbered(length), block, batch, r, processes) for r in range(processes)]
    assert len({len(share) for share in shares}) == 1
    found = [share[index] for share in shares for index in range(len(share))]
    targets = sorted(t for b in found for t in b.tokens[:, 1:].flatten().tolist())
    assert targets == list(range(1, length))
    whole = len(_Blocks(numbered(length), block, batch))
    assert sum(len(b.tokens) > 0 for b in found) == whole
    assert all(b.tokens.ndim == 2 and len(b.reset) == len(b.tokens) for b in found)


def test_streams_that_processes_cannot_share(text_file: Path) -> None:
    data = TextDataModule(path=str(text_file), segment=8, streams=3)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)  # type: ignore[assignment]
    with pytest.raises(DataError, match="3 streams of text cannot be shared by 2 processes"):
        data.train_dataloader()


# --- the data module -----------------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "my.txt"
    path.write_bytes((bytes(range(1, 256)) * 5)[:1024])
    return path


def test_the_split_of_tiny_shakespeare() -> None:
    """First 90 % and last 10 %: 1,003,854 and 111,540 characters, as nanoGPT's example says."""
    data = TextDataModule()
    data.setup()
    assert (len(data.train_text), len(data.validation_text)) == (1_003_854, 111_540)
    assert torch.equal(torch.cat((data.train_text, data.validation_text)), data.text)
    assert decode_bytes(data.text[:14]) == "First Citizen:"


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_the_parts_of_a_file_of_ones_own(text_file: Path, fraction: float) -> None:
    data = TextDataModule(path=str(text_file), segment=8, validation_fraction=fraction)
    data.setup()
    content = text_file.read_bytes()
    boundary = math.floor((1 - fraction) * len(content))
    assert bytes(data.train_text.tolist()) == content[:boundary]
    assert bytes(data.validation_text.tolist()) == content[boundary:]


def test_loaders(text_file: Path) -> None:
    data = TextDataModule(
        path=str(text_file), segment=8, segments_per_step=3, streams=4, reset_probability=0.0
    )
    data.setup("fit")
    training = list(data.train_dataloader())
    assert len(training) == len(data.train_text) // 4 // 24
    assert {tuple(b.tokens.shape) for b in training} == {(4, 25)}
    assert all(b.tokens.dtype == torch.long for b in training)
    seen = [t for b in training for t in b.tokens[:, 1:].flatten().tolist()]
    assert len(seen) > 0.9 * len(data.train_text)
    targets = [t for b in data.val_dataloader() for t in b.tokens[:, 1:].flatten().tolist()]
    assert targets == data.validation_text[1:].tolist()


@pytest.mark.parametrize("length", [100, 130, 300])
def test_a_short_text_gets_fewer_streams_and_shorter_steps(tmp_path: Path, length: int) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * length)
    data = TextDataModule(path=str(path), segment=32, validation_fraction=0.4, streams=16)
    data.setup()
    found = list(data.train_dataloader())
    assert found
    for batch in found:
        streams, step = batch.tokens.shape[0], batch.tokens.shape[1] - 1
        assert step % 32 == 0
        assert streams * step <= len(data.train_text)


def test_every_epoch_of_a_training_has_an_order_of_its_own(text_file: Path) -> None:
    data = TextDataModule(path=str(text_file), segment=8, streams=4, seed=5)
    firsts: dict[int, list[int]] = {}

    class Recorder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch: StreamBatch, batch_idx: int) -> Tensor:
            if batch_idx == 0:
                firsts[self.current_epoch] = batch.tokens.flatten().tolist()
            return self.weight.square()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", barebones=True, use_distributed_sampler=False
    )
    trainer.fit(Recorder(), datamodule=data)
    assert len(firsts) == 3
    for epoch, first in firsts.items():
        sampler = StreamSampler(len(data.train_text), 4, 16, 0.1, seed=5)
        sampler.set_epoch(epoch)
        expected = batches(sampler, data.train_text)[0]
        assert first == expected.tokens.flatten().tolist()
    assert len({tuple(first) for first in firsts.values()}) == 3


@pytest.mark.parametrize(
    ("length", "fraction", "part"), [(60, 0.1, "validation"), (24, 0.75, "training")]
)
def test_a_text_shorter_than_a_segment(
    tmp_path: Path, length: int, fraction: float, part: str
) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * length)
    data = TextDataModule(path=str(path), segment=32, validation_fraction=fraction)
    with pytest.raises(DataError, match=f"The {part} part of .*short.txt has 6 bytes") as caught:
        data.setup()
    assert "fewer than a segment of 32 and the byte after it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 0}, "streams must be at least 1, got 0"),
        ({"segment": -1}, "segment must be at least 1, got -1"),
        ({"segments_per_step": 0}, "segments_per_step must be at least 1, got 0"),
        ({"validation_fraction": 0.0}, r"validation_fraction must be in \(0, 1\), got 0.0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \(0, 1\), got 1.0"),
        ({"reset_probability": 1.1}, r"reset_probability must be in \[0, 1\], got 1.1"),
        ({"reset_probability": -0.1}, r"reset_probability must be in \[0, 1\], got -0.1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextDataModule(**options)


def test_an_unknown_text() -> None:
    with pytest.raises(UnknownNameError, match="No text 'tiny-shakspeare'") as caught:
        TextDataModule(dataset="tiny-shakspeare")
    assert "Did you mean 'tiny-shakespeare'" in str(caught.value)


def test_nothing_is_read_before_it_is_needed(tmp_path: Path) -> None:
    data = TextDataModule(path=str(tmp_path / "no.txt"))
    with pytest.raises(DataError, match="No text file at"):
        data.setup()
