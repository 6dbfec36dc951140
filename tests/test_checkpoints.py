"""Tests of zoo.checkpoints: what is written comes back, and nothing that is unsound is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.payloads import PAYLOADS, payload_in_tensor_storage
from zoo import cards, checkpoints, registry
from zoo.cards import Measurements
from zoo.checkpoints import FORMAT_VERSION, CheckpointConfig, LoadReport, Migration
from zoo.configs import to_json
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError
from zoo.files import (
    CONFIG_FILE,
    LEFT_OVER,
    RESULTS_FILE,
    WEIGHTS_FILE,
    FileRecord,
    write_bytes,
)
from zoo.tasks.base import ZooModule
from zoo.tasks.optimization import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    eps: float = 1e-5
    affine: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyConfig:
    width: int = 4
    num_classes: int = 3
    norm: NormConfig = NormConfig()

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, got {self.width}")


class TinyNetwork(nn.Module):
    """Has all that a state dict can hold: a shared tensor, buffers of two kinds, and a head."""

    count: Tensor

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.body = nn.Linear(config.width, config.width)
        self.tied = nn.Linear(config.width, config.width, bias=False)
        self.tied.weight = self.body.weight
        self.norm = nn.LayerNorm(
            config.width, config.norm.eps, elementwise_affine=config.norm.affine
        )
        self.head = nn.Linear(config.width, config.num_classes)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.tied(self.body(x))))
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyPreprocessing:
    scale: int

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale must be at least 1, got {self.scale}")


class TinyModule(ZooModule):
    network_config: ClassVar[type[Any]] = TinyConfig
    preprocessing_config: ClassVar[type[Any] | None] = TinyPreprocessing
    head_parameters: ClassVar[tuple[str, ...]] = ("head.weight", "head.bias")

    def __init__(
        self, network: TinyConfig, preprocessing: TinyPreprocessing = TinyPreprocessing(scale=2)
    ) -> None:
        super().__init__(network, OptimizerConfig())
        self.network = TinyNetwork(network)
        self.preprocessing = preprocessing


TENSORS = (
    "count",
    "body.weight",
    "body.bias",
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head.bias",
)
"""All that the file holds, in the order of the state dict."""


@pytest.fixture(autouse=True)
def tiny_architecture() -> Iterator[None]:
    before = dict(registry.ARCHITECTURES)
    registry.register("tiny", task="nothing", family="tests")(TinyModule)
    yield
    registry._architectures.clear()
    registry._architectures.update(before)


@pytest.fixture
def module() -> TinyModule:
    module = TinyModule(TinyConfig()).eval()
    module.network.count.fill_(7)  # type: ignore[operator]
    return module


@pytest.fixture
def folder(module: TinyModule, tmp_path: Path) -> Path:
    checkpoints.save(module, tmp_path / "tiny")
    return tmp_path / "tiny"


def records(folder: Path) -> list[FileRecord]:
    return [FileRecord.of(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


# --- what is written comes back ------------------------------------------------------------------


def test_save_and_load(module: TinyModule, folder: Path) -> None:
    loaded = checkpoints.load(folder, files=records(folder))
    assert isinstance(loaded, TinyModule)
    assert not loaded.training
    assert not loaded.network.training
    assert loaded.config == module.config
    assert_same_tensors(loaded.network, module.network)
    assert loaded.load_report == LoadReport(loaded=TENSORS)
    x = torch.randn(5, 4)
    assert torch.equal(loaded.network(x), module.network(x))


def test_a_shared_tensor_is_stored_once_and_stays_shared(folder: Path) -> None:
    assert set(load_file(folder / WEIGHTS_FILE)) == set(TENSORS)
    network: Any = checkpoints.load(folder).network
    assert network.tied.weight is network.body.weight


def test_the_config_is_plain_and_complete(folder: Path) -> None:
    assert json.loads((folder / CONFIG_FILE).read_text()) == {
        "format_version": FORMAT_VERSION,
        "architecture": "tiny",
        "family": "tests",
        "task": "nothing",
        "network": to_json(TinyConfig()),
        "preprocessing": {"scale": 2},
    }
    assert checkpoints.read_config(folder) == CheckpointConfig(
        architecture="tiny",
        family="tests",
        task="nothing",
        network=to_json(TinyConfig()),
        preprocessing={"scale": 2},
    )


def test_the_header_counts_each_parameter_once(module: TinyModule, folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    count = 4 * 4 + 4 + 4 + 4 + 3 * 4 + 3
    assert header["__metadata__"]["parameters"] == str(count)
    assert count == sum(parameter.numel() for parameter in module.parameters())


def test_saving_twice_gives_the_same_bytes(module: TinyModule, tmp_path: Path) -> None:
    checkpoints.save(module, tmp_path / "a")
    checkpoints.save(module, tmp_path / "b")
    assert records(tmp_path / "a") == records(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_weights_stored_in_half_precision_load_as_float32(
    module: TinyModule, tmp_path: Path, dtype: torch.dtype | str
) -> None:
    checkpoints.save(module, tmp_path / "half", dtype=dtype)
    stored = load_file(tmp_path / "half" / WEIGHTS_FILE)
    assert stored["body.weight"].element_size() == 2
    assert stored["count"].dtype == torch.int64
    loaded = checkpoints.load(tmp_path / "half")
    assert loaded.network.body.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(loaded.network.body.weight, stored["body.weight"].float())  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "float64"])
def test_load_in_another_precision(folder: Path, dtype: torch.dtype | str) -> None:
    network: Any = checkpoints.load(folder, dtype=dtype, device="cpu").network
    assert network.body.weight.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    assert network.count.dtype == torch.int64


def test_loading_leaves_the_random_state_alone(folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    checkpoints.load(folder)
    assert torch.equal(torch.rand(4), expected)


def test_card_recipe_and_results_are_written_along(module: TinyModule, tmp_path: Path) -> None:
    card = cards.find("cached-transformer-lm")
    results = Measurements(weight=card.name, results=(), training={"steps": 3})
    checkpoints.save(module, tmp_path / "x", card=card, recipe="zoo: {}\n", results=results)
    assert cards.parse((tmp_path / "x" / "README.md").read_text()) == card
    assert (tmp_path / "x" / "recipe.yaml").read_text() == "zoo: {}\n"
    assert cards.read_measurements(tmp_path / "x" / "results.json") == results
    assert len(records(tmp_path / "x")) == 5


def test_the_language_model_comes_back(tmp_path: Path) -> None:
    from zoo.tasks.language_modeling import LanguageModel

    config = dataclasses.replace(
        LanguageModel.network_config(), dim=16, depth=1, num_heads=2, segment=8, memory="none"
    )
    model = LanguageModel(network=config).eval()
    checkpoints.save(model, tmp_path / "lm", dtype="float32")
    loaded = checkpoints.load(tmp_path / "lm", files=records(tmp_path / "lm"))
    assert isinstance(loaded, LanguageModel)
    assert loaded.config == config
    assert_same_tensors(loaded.network, model.network)
    assert loaded.generate("a", max_new_tokens=5, seed=1) == model.generate(
        "a", max_new_tokens=5, seed=1
    )


# --- writing is all or nothing -------------------------------------------------------------------


def test_a_checkpoint_is_replaced_as_a_whole(module: TinyModule, tmp_path: Path) -> None:
    checkpoints.save(module, tmp_path / "x", recipe="zoo: {}\n")
    module.network.count.fill_(8)  # type: ignore[operator]
    checkpoints.save(module, tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert checkpoints.load(tmp_path / "x").network.count == 8
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own kind")
@pytest.mark.parametrize("renamed", [0, 1])
def test_what_a_killed_process_left_is_removed_when_it_is_old(
    module: TinyModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    """Killed before the earlier checkpoint is put aside, and after."""
    checkpoints.save(module, tmp_path / "x")
    rename, done = Path.rename, []

    def stop(self: Path, target: Path) -> Path:
        if len(done) == renamed:
            (tmp_path / "ready").touch()
            signal.pause()
        done.append(self)
        return rename(self, target)

    child = os.fork()
    if child == 0:
        Path.rename = stop  # type: ignore[assignment, method-assign]
        checkpoints.save(module, tmp_path / "x")
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / "ready").unlink()
    left = {path for path in tmp_path.iterdir() if path.name != "x"}
    assert {path.suffix for path in left} == ({".part", ".old"} if renamed else {".part"})
    # They are young, so they may be of a process that is at work.
    checkpoints.save(module, tmp_path / "x")
    assert left < set(tmp_path.iterdir())
    others = [tmp_path / f".y.{'0' * 32}.part", tmp_path / ".x.mine.part"]
    for other in others:
        other.mkdir()
    later = time.time() + LEFT_OVER + 60
    monkeypatch.setattr("zoo.files.time", SimpleNamespace(time=lambda: later))
    checkpoints.save(module, tmp_path / "x")
    assert set(tmp_path.iterdir()) == {tmp_path / "x", *others}
    assert checkpoints.load(tmp_path / "x").network.count == module.network.count


def test_a_folder_with_anything_else_is_left_alone(module: TinyModule, folder: Path) -> None:
    (folder / "diary.txt").write_text("mine")
    before = records(folder)
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint folder"):
        checkpoints.save(module, folder)
    assert records(folder) == before


def test_what_a_killed_process_left_in_a_checkpoint_is_no_reason_to_keep_it(
    module: TinyModule, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(self: Path, target: Path) -> Path:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            write_bytes(folder / RESULTS_FILE, b"{}")
    assert [path.suffix for path in folder.iterdir() if path.name.startswith(".")] == [".part"]
    checkpoints.save(module, folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    # Of another file than a checkpoint's it would be somebody's own.
    for name in (f".diary.txt.{'0' * 32}.part", f".{RESULTS_FILE}.mine.part"):
        (folder / name).touch()
        with pytest.raises(CheckpointError, match="exists and is not a checkpoint folder"):
            checkpoints.save(module, folder)
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission")]
)
@pytest.mark.parametrize("method", ["write_bytes", "mkdir", "rename"])
def test_a_failed_write_leaves_the_old_checkpoint(
    module: TinyModule,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    code: int,
    text: str,
) -> None:
    import os

    before = records(folder)

    def fail(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        with pytest.raises(CheckpointError, match=f"Cannot write .*tiny: {text}"):
            checkpoints.save(module, folder)
    assert records(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_last_step_puts_the_old_checkpoint_back(
    module: TinyModule, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = records(folder)
    rename = Path.rename

    def fail_for_new(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_for_new)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpoints.save(module, folder)
    assert records(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_class_that_is_not_registered_cannot_be_saved(tmp_path: Path) -> None:
    class Unregistered(TinyModule):
        pass

    with pytest.raises(UnknownNameError, match="Unregistered is not registered"):
        checkpoints.save(Unregistered(TinyConfig()), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_could_not_be_loaded_is_not_saved(
    module: TinyModule, folder: Path, tmp_path: Path
) -> None:
    before = (folder / WEIGHTS_FILE).read_bytes()
    module.network.head = nn.Linear(4, 9)
    for place in (folder, tmp_path / "new"):
        with pytest.raises(
            CheckpointError,
            match=r"^The network of this tiny is not the one of its configuration, so nothing was "
            r"saved: tensor 'head\.weight' has shape \(9, 4\) instead of \(3, 4\); ",
        ):
            checkpoints.save(module, place)
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    assert not (tmp_path / "new").exists()
    module.config = TinyConfig(num_classes=9)
    checkpoints.save(module, folder)
    assert_same_tensors(checkpoints.load(folder).network, module.network)
    module.network.more = nn.Linear(4, 9)
    with pytest.raises(CheckpointError, match=r"tensor 'more\.weight' is unexpected"):
        checkpoints.save(module, folder)


# --- size and sha256 -----------------------------------------------------------------------------


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "trailing byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "swapped": lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
}


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_expected_and_got(
    folder: Path, name: str, damage: str
) -> None:
    expected = records(folder)
    DAMAGES[damage](folder / name)
    (found,) = [record for record in records(folder) if record.name == name]
    (wanted,) = [record for record in expected if record.name == name]
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder, files=expected)
    assert str(caught.value) == (
        f"{folder / name} is damaged or is another file: expected {wanted.size} bytes with sha256 "
        f"{wanted.sha256}, got {found.size} bytes with sha256 {found.sha256}."
    )
    with pytest.raises(CheckpointError):
        checkpoints.verify(folder, expected)


def test_files_swapped_between_two_checkpoints(module: TinyModule, folder: Path) -> None:
    other = TinyModule(TinyConfig())
    with torch.no_grad():
        other.network.head.weight.add_(1)  # type: ignore[operator,union-attr]
    checkpoints.save(other, folder.parent / "other")
    expected = records(folder)
    (folder.parent / "other" / WEIGHTS_FILE).replace(folder / WEIGHTS_FILE)
    assert (folder / WEIGHTS_FILE).stat().st_size == expected[1].size
    with pytest.raises(CheckpointError, match="is damaged or is another file"):
        checkpoints.load(folder, files=expected)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_without_a_record_is_not_loaded(folder: Path, name: str) -> None:
    known = [record for record in records(folder) if record.name != name]
    with pytest.raises(CheckpointError, match=f"no size and sha256 to check .*{name}"):
        checkpoints.load(folder, files=known)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file(folder: Path, name: str) -> None:
    expected = records(folder)
    (folder / name).unlink()
    for files in (None, expected):
        with pytest.raises(CheckpointError, match=f"Cannot read .*{name}: No such file"):
            checkpoints.load(folder, files=files)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "", ".", "..", ".hidden", "a\n"])
def test_a_record_is_of_a_plain_file_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not a plain file name"):
        FileRecord(name=name, size=1, sha256="0" * 64)


def test_what_was_hashed_is_what_is_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is opened once, so nothing can be put in its place after the check."""
    opened: list[str] = []
    read = Path.read_bytes

    def spy(path: Path) -> bytes:
        opened.append(path.name)
        return read(path)

    expected = records(folder)
    monkeypatch.setattr(Path, "read_bytes", spy)
    checkpoints.load(folder, files=expected)
    assert sorted(opened) == [CONFIG_FILE, WEIGHTS_FILE]


# --- no pickle, no code --------------------------------------------------------------------------


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    return tmp_path / "witness"


@pytest.mark.parametrize("make", PAYLOADS)
def test_the_payloads_do_run_where_they_are_unpickled(
    make: Callable[[Path, Path], None], tmp_path: Path, witness: Path
) -> None:
    make(tmp_path / "x", witness)
    with contextlib.suppress(RuntimeError):  # The bare pickle runs before its content is looked at.
        torch.load(tmp_path / "x", weights_only=False)
    assert witness.exists()


@pytest.mark.parametrize("make", PAYLOADS)
def test_a_pickle_under_the_name_of_the_weights(
    folder: Path, witness: Path, make: Callable[[Path, Path], None]
) -> None:
    make(folder / WEIGHTS_FILE, witness)
    for files in (None, records(folder)):
        with pytest.raises(CheckpointError, match=r"is a pickle.*: zoo convert .* FOLDER"):
            checkpoints.load(folder, files=files)
    assert not witness.exists()


@pytest.mark.parametrize("make", PAYLOADS)
@pytest.mark.parametrize("name", ["last.ckpt", "model.pt", "pytorch_model.bin", "x.pth", "x.pkl"])
def test_a_pickle_beside_or_instead_of_the_weights(
    folder: Path, witness: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    (folder / WEIGHTS_FILE).unlink()
    make(folder / name, witness)
    for source in (folder, folder / name):
        with pytest.raises(CheckpointError, match=rf"{name} is a pickle.*zoo convert"):
            checkpoints.load(source)
    assert not witness.exists()


def test_a_pickle_in_the_storage_of_a_tensor(folder: Path, witness: Path) -> None:
    payload_in_tensor_storage(folder / WEIGHTS_FILE, witness)
    with pytest.raises(CheckpointError, match=r"'body\.weight' is missing"):
        checkpoints.load(folder)
    assert not witness.exists()


def test_a_header_that_begins_like_a_pickle_is_no_pickle(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    padded = content[8 : 8 + length].ljust(0x0480)
    path = folder / WEIGHTS_FILE
    path.write_bytes(struct.pack("<Q", 0x0480) + padded + content[8 + length :])
    assert path.read_bytes()[:2] == b"\x80\x04"
    assert checkpoints.load(folder).load_report == LoadReport(loaded=TENSORS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 100,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 20) + b'{"w":{"dtype":"F32"}',
    ],
)
def test_what_is_no_safetensors_file(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or is no safetensors file") as caught:
        checkpoints.load(folder)
    assert "\n" not in str(caught.value)


@given(data=st.data())
def test_damaged_folders_raise_nothing_but_our_errors(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "tiny"
    checkpoints.save(TinyModule(TinyConfig()), folder)
    path = folder / data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    with contextlib.suppress(ZooError):  # Anything else fails the test.
        assert checkpoints.load(folder).load_report.dropped == ()


# --- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"class_path": "os.system"}, "unknown key 'class_path'"),
        ({"format_version": 2}, "has format version 2, and this zoo reads up to 1; update it: pip"),
        ({"format_version": 0}, "format_version must be 1 or more, got 0"),
        ({"format_version": "1"}, "format_version must be 1 or more, got '1'"),
        ({"format_version": True}, "format_version must be 1 or more, got True"),
        ({"architecture": "tinny"}, "Unknown architecture 'tinny'. Did you mean 'tiny'?"),
        ({"architecture": "os:system"}, "Unknown architecture 'os:system'"),
        ({"architecture": 3}, "architecture: expected str, got 3 (int)"),
        ({"task": "something"}, "'tiny' is of family 'tests' and task 'nothing', not 'tests'"),
        ({"network": {"widht": 3}}, "network: unknown key 'widht'. Did you mean 'width'?"),
        ({"network": {"width": True}}, "network: width: expected int, got True (bool)"),
        ({"network": {"width": 0}}, "network: width must be at least 1, got 0"),
        ({"network": {"norm": {"_target_": "os.system"}}}, "norm: unknown key '_target_'"),
        ({"network": []}, "network: expected a mapping, got [] (list)"),
        ({"preprocessing": {"scale": 0}}, "preprocessing: scale must be at least 1, got 0"),
        ({"preprocessing": {"scale": "a"}}, "preprocessing: scale: expected int, got 'a'"),
        ({"preprocessing": {"scale": 2, "x": 1}}, "preprocessing: unknown key 'x'"),
        ({"preprocessing": {}}, "preprocessing: missing key 'scale'"),
    ],
)
def test_a_bad_config_is_refused_in_one_line(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ZooError) as caught:
        checkpoints.load(folder)
    assert message.replace("'tiny' is", "tiny is") in str(caught.value)
    assert str(folder / CONFIG_FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_config_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    for read in (checkpoints.load, checkpoints.read_config):
        with pytest.raises(CheckpointError, match=r"is not (valid JSON|a JSON object)"):
            read(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no checkpoint folder .*nowhere"):
        checkpoints.load(tmp_path / "nowhere")


def test_an_earlier_format_is_migrated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: one renamed an argument, the next a tensor."""

    def rename_width(config: dict[str, Any]) -> dict[str, Any]:
        network = dict(config["network"])
        network["width"] = network.pop("dim")
        return {**config, "network": network}

    def rename_body(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("trunk.", "body."): tensor for name, tensor in tensors.items()}

    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 3)
    monkeypatch.setattr(
        checkpoints,
        "_MIGRATIONS",
        {1: Migration(config=rename_width), 2: Migration(tensors=rename_body)},
    )
    network = to_json(TinyConfig())
    edit_config(folder, network={"dim": network.pop("width"), **network})

    def to_old_names(tensors: dict[str, Tensor]) -> None:
        for name in ("weight", "bias"):
            tensors[f"trunk.{name}"] = tensors.pop(f"body.{name}")

    edit_tensors(folder, to_old_names)
    assert checkpoints.load(folder).load_report == LoadReport(loaded=TENSORS)
    assert checkpoints.read_config(folder).format_version == 3


# --- strict loading ------------------------------------------------------------------------------


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["body.wieght"] = tensors.pop("body.weight")


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["norm.bias"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["spare"] = torch.zeros(1)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["head.weight"] = torch.zeros(5, 4)


def change_kind(tensors: dict[str, Tensor]) -> None:
    tensors["count"] = torch.zeros(())


@pytest.mark.parametrize(
    ("edit", "message", "report"),
    [
        (
            rename,
            "tensor 'body.weight' is missing; tensor 'body.wieght' is unexpected.",
            (("body.wieght",), ("body.weight",)),
        ),
        (drop, "tensor 'norm.bias' is missing.", ((), ("norm.bias",))),
        (add, "tensor 'spare' is unexpected.", (("spare",), ())),
        (
            reshape,
            "tensor 'head.weight' has shape (5, 4) instead of (3, 4).",
            (("head.weight",), ("head.weight",)),
        ),
        (
            change_kind,
            "tensor 'count' is torch.float32 instead of torch.int64.",
            (("count",), ("count",)),
        ),
    ],
)
def test_tensors_that_do_not_fit(
    folder: Path,
    edit: Callable[[dict[str, Tensor]], None],
    message: str,
    report: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(folder)
    assert str(caught.value) == f"{folder / WEIGHTS_FILE} does not fit tiny: {message}"
    relaxed = checkpoints.load(folder, strict=False).load_report
    dropped, initialised = report
    assert (relaxed.dropped, relaxed.initialised) == (dropped, initialised)
    assert relaxed.loaded == tuple(name for name in TENSORS if name not in initialised)


def test_many_faults_are_counted_and_three_are_shown(folder: Path) -> None:
    save_file({"spare": torch.zeros(1)}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"'body\.bias' is missing; 5 more\.$"):
        checkpoints.load(folder)


# --- changes on loading --------------------------------------------------------------------------


def test_a_head_swap_replaces_the_head_and_nothing_else(module: TinyModule, folder: Path) -> None:
    torch.manual_seed(5)
    swapped = checkpoints.load(folder, num_classes=10)
    head = ("head.weight", "head.bias")
    body = tuple(name for name in TENSORS if name not in head)
    assert swapped.load_report.loaded == body
    assert set(swapped.load_report.dropped) == set(swapped.load_report.initialised) == set(head)
    assert swapped.config.num_classes == 10
    state = swapped.network.state_dict()
    assert state["head.weight"].shape == (10, 4)
    for name in body:
        assert torch.equal(state[name], module.network.state_dict()[name]), name
    # The head is what constructing the network at this seed gives, whichever route is taken.
    torch.manual_seed(5)
    fresh = TinyModule(TinyConfig(num_classes=10)).network.state_dict()
    assert torch.equal(state["head.weight"], fresh["head.weight"])


def test_a_head_swap_to_the_same_number_keeps_the_head(module: TinyModule, folder: Path) -> None:
    same = checkpoints.load(folder, num_classes=3)
    assert same.load_report == LoadReport(loaded=TENSORS)
    assert_same_tensors(same.network, module.network)


def test_a_head_swap_excuses_nothing_but_the_head(folder: Path) -> None:
    edit_tensors(folder, rename)
    with pytest.raises(CheckpointError, match=r"'body\.weight' is missing"):
        checkpoints.load(folder, num_classes=10)


def test_a_head_of_the_wrong_shape_can_be_swapped_out(folder: Path) -> None:
    edit_tensors(folder, reshape)
    assert "head.weight" in checkpoints.load(folder, num_classes=10).load_report.initialised


def test_network_arguments_can_be_overridden_in_part(folder: Path) -> None:
    loaded = checkpoints.load(folder, norm={"eps": 0.5})
    assert loaded.config == TinyConfig(norm=NormConfig(eps=0.5))
    assert loaded.network.norm.eps == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widht": 3}, "tiny: network: unknown key 'widht'. Did you mean 'width'?"),
        ({"norm": {"epsilon": 3}}, "tiny: network: norm: unknown key 'epsilon'"),
        ({"width": "3"}, "tiny: network: width: expected int, got '3' (str)"),
        ({"num_classes": "3"}, "tiny: network: num_classes: expected int, got '3' (str)"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": True}, "num_classes must be a whole number, got True"),
        ({"width": 8}, "tensor 'body.weight' has shape (4, 4) instead of (8, 8)"),
        ({"num_classes": 5, "width": 8}, "tensor 'body.weight' has shape (4, 4) instead of"),
        ({"dtype": "flaot32"}, "dtype flaot32 is not a floating point type"),
        ({"dtype": "int8"}, "Choose one of float16, bfloat16, float32, float64."),
        ({"dtype": torch.int32}, "dtype torch.int32 is not a floating point type"),
        ({"device": "tpuu"}, "Device 'tpuu' cannot be used: "),
        ({"device": "cuda:99"}, "Device 'cuda:99' cannot be used: "),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(
    folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ZooError) as caught:
        checkpoints.load(folder, **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_classes_has_none_to_change(tmp_path: Path) -> None:
    from zoo.tasks.language_modeling import LanguageModel

    config = dataclasses.replace(
        LanguageModel.network_config(), dim=16, depth=1, num_heads=2, memory="none"
    )
    checkpoints.save(LanguageModel(network=config), tmp_path / "lm")
    with pytest.raises(ConfigError, match="cached-transformer-lm has no head of classes"):
        checkpoints.load(tmp_path / "lm", num_classes=3)


# --- converting training checkpoints -------------------------------------------------------------


@pytest.fixture
def run_folder(module: TinyModule, tmp_path: Path) -> Path:
    """A run folder as `zoo fit` leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    content: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "optimizer_states": [{"momentum": torch.zeros(3)}],
    }
    module.on_save_checkpoint(content)
    torch.save(content, folder / "last.ckpt")
    (folder / "recipe.yaml").write_text("zoo: {architecture: tiny, data: none}\n")
    return folder


def test_convert(module: TinyModule, run_folder: Path) -> None:
    checkpoints.convert(run_folder / "last.ckpt", run_folder / "checkpoint", dtype="float32")
    loaded = checkpoints.load(run_folder / "checkpoint")
    assert_same_tensors(loaded.network, module.network)
    assert (run_folder / "checkpoint" / "recipe.yaml").exists()


@pytest.mark.parametrize("make", PAYLOADS)
def test_convert_refuses_a_payload(
    run_folder: Path, witness: Path, make: Callable[[Path, Path], None]
) -> None:
    make(run_folder / "last.ckpt", witness)
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        checkpoints.convert(run_folder / "last.ckpt", run_folder / "checkpoint")
    assert not witness.exists()
    assert not (run_folder / "checkpoint").exists()


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x.ckpt", "file:///x.ckpt", "s3://b/x"])
def test_convert_never_opens_an_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(CheckpointError, match="is not a local file; addresses are never opened"):
        checkpoints.convert(address, tmp_path / "x")


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": {}}])
def test_convert_of_another_file(run_folder: Path, content: Any) -> None:
    torch.save(content, run_folder / "last.ckpt")
    with pytest.raises(CheckpointError, match="was not written by `zoo fit`"):
        checkpoints.convert(run_folder / "last.ckpt", run_folder / "checkpoint")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (b"", "names no architecture."),
        (b"zoo: [\n", "names no architecture."),
        (b"zoo: 3\n", "names no architecture."),
        (b"[]", "names no architecture."),
        (b"zoo: {architecture: caf\xe9}\n", "names no architecture."),
        (b"zoo: {architecture: [a]}\n", ": architecture must be a name, got ['a']."),
        (b"zoo: {architecture: null}\n", ": architecture must be a name, got None."),
    ],
)
def test_convert_needs_the_recipe(run_folder: Path, recipe: bytes, message: str) -> None:
    (run_folder / "recipe.yaml").write_bytes(recipe)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.convert(run_folder / "last.ckpt", run_folder / "checkpoint")
    assert "recipe.yaml" in str(caught.value)
    assert str(caught.value).endswith(message)
    assert not (run_folder / "checkpoint").exists()


def test_what_another_thread_builds_meanwhile_is_not_counted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard against a network far larger than its file counts the file's network alone."""
    construct, built = checkpoints._construct, []

    def slow(*arguments: Any) -> ZooModule:
        thread = threading.Thread(
            target=lambda: built.append(nn.Linear(2000, 2000, device="meta").weight.numel())
        )
        thread.start()
        thread.join()
        return construct(*arguments)

    monkeypatch.setattr(checkpoints, "_construct", slow)
    loaded = checkpoints.load(folder)
    assert built == [4_000_000]
    assert built[0] > checkpoints._SMALL_NETWORK
    assert loaded.load_report.initialised == ()


def test_two_processes_load_at_once(tmp_path: Path) -> None:
    from zoo.tasks.language_modeling import LanguageModel

    config = dataclasses.replace(
        LanguageModel.network_config(), dim=16, depth=1, num_heads=2, memory="none"
    )
    checkpoints.save(LanguageModel(network=config), tmp_path / "lm")
    code = "import sys, zoo; print(len(zoo.load(sys.argv[1]).load_report.loaded))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "lm")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
