"""Tests of training from recipes: what is read, what is written, and that a run can be resumed."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.payloads import PAYLOADS
from tests.tiny import ROOT, SEGMENT, SHRUNK, run, write_pictures, write_recipe, write_text
from zoo import checkpoints, figures, training
from zoo.cards import shipped_folder
from zoo.errors import CheckpointError, ConfigError, DataError, UnknownNameError, ZooError
from zoo.files import CONFIG_FILE, RECIPE_FILE, WEIGHTS_FILE
from zoo.provenance import machine, source_commit, versions
from zoo.training import DATA_MODULES, find_recipe, fit, read_recipe

NAME = "cached-transformer-lm.tiny-shakespeare"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> training.Run:
    """Three epochs of two steps, uninterrupted, with dropout."""
    folder = tmp_path_factory.mktemp("done")
    return fit(write_recipe(folder), EPOCHS, out=folder / "run")


EPOCHS = ["trainer.max_epochs=3"]


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# --- finding and reading -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, f"{NAME}.yaml", f"recipes/{NAME}.yaml", f"recipes/{NAME}"])
def test_recipes_of_the_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no folder "recipes"
    assert find_recipe(name) == shipped_folder("recipes") / f"{NAME}.yaml"
    control = find_recipe(f"controls/{NAME}/none")
    assert control == shipped_folder("recipes") / "controls" / NAME / "none.yaml"


def test_a_file_is_a_recipe(recipe: Path) -> None:
    assert find_recipe(recipe) == find_recipe(str(recipe)) == recipe


def test_an_unknown_recipe() -> None:
    with pytest.raises(UnknownNameError) as caught:
        find_recipe("cached-transformer-lm.tiny-shakespear")
    assert str(caught.value).startswith(
        "No recipe 'cached-transformer-lm.tiny-shakespear': neither a file nor one of the "
        f"package's. Did you mean '{NAME}'"
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.path=my.txt", "my.txt"),
        ("data.path=a=b.txt", "a=b.txt"),
        ("data.path=null", None),
        ("data.path=", None),
        ("data.x=3", 3),
        ("data.x=1e-3", 1e-3),
        ("data.x=-2.5E+2", -250.0),
        ("data.x=true", True),
        ("data.x=[1, 2]", [1, 2]),
        ("data.x={a: 1}", {"a": 1}),
        ("data.x=no", False),
        # Files and folders may be called anything.
        ("data.path=1984", "1984"),
        ("data.path=1e5", "1e5"),
        ("data.path=nan", "nan"),
        ("data.path=no", "no"),
        ("data.path=2024-01-01", "2024-01-01"),
        ("data.path=a #1.txt", "a #1.txt"),
        ("data.path=#1.txt", "#1.txt"),
        ("data.path=a: b: [.txt", "a: b: [.txt"),
        ("data.path=[1, 2]", "[1, 2]"),
        ("data.path='my own.txt'", "my own.txt"),
        ("data.data_dir=1984", "1984"),
        ("data.data_dir=null", None),
    ],
)
def test_overrides_are_yaml(recipe: Path, override: str, value: object) -> None:
    key = override.partition("=")[0].removeprefix("data.")
    found = read_recipe(recipe, [override]).options["data"][key]
    assert found == value
    assert type(found) is type(value)


def test_overrides_change_one_thing_and_the_last_one_wins(recipe: Path) -> None:
    before = read_recipe(recipe)
    changes = ["model.network.dim=8", "model.network.dim=24", "model.new.key=1", "trainer.x=2"]
    after = read_recipe(recipe, changes)
    expected = before.options
    expected["model"]["network"]["dim"] = 24
    expected["model"]["new"] = {"key": 1}
    expected["trainer"]["x"] = 2
    assert after.options == expected
    assert read_recipe(recipe, ["zoo.weight=a.b"]).weight == "a.b"
    assert (before.architecture, before.data, before.weight) == (
        "cached-transformer-lm",
        "text",
        NAME,
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path", "Cannot read 'data.path'; write section.key=value, as data.path=my.txt."),
        ("=x", "Cannot read '=x'; write section.key=value"),
        ("data..path=x", "Cannot read 'data..path=x'; write section.key=value"),
        ("data.x=[", "Cannot read the value in 'data.x=[' as YAML."),
        ("data.x=2024-13-45", "Cannot read the value in 'data.x=2024-13-45' as YAML."),
        ("dta.path=x", "Unknown section 'dta' in 'dta.path=x'. Did you mean 'data'?"),
        ("seed_everything.x=1", "'seed_everything.x=1': 'seed_everything' is a value"),
        ("model.network.dim.x=1", "'model.network.dim.x=1': 'dim' is a value, not a section."),
        ("zoo=3", "'zoo=3': 'zoo' is a section; name a key in it, as zoo.key=value."),
        ("data=3", "'data=3': 'data' is a section; name a key in it, as data.key=value."),
        ("trainer=", "'trainer=': 'trainer' is a section; name a key in it, as trainer.key=value."),
    ],
)
def test_a_bad_override_is_refused_in_one_line(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(recipe, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


HEADER = "zoo: {architecture: cached-transformer-lm, data: text}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no recipe: it has no section 'zoo' with an architecture."),
        (b"[1, 2]", "is no recipe: it has no section 'zoo'"),
        (b"zoo: 3", "is no recipe: it has no section 'zoo'"),
        (b"zoo: [", "is not readable YAML: "),
        (b"\xff\xfe\xfa", "is not readable YAML: "),
        (HEADER.encode() + b"data: {seed: 2024-13-45}", "is not readable YAML: "),
        (b"zoo: !!python/object/apply:os.getcwd []", "is not readable YAML: "),
        (b"zoo: {data: text}", "section 'zoo' needs 'architecture'."),
        (b"zoo: {architecture: cached-transformer-lm}", "section 'zoo' needs 'data'."),
        (b"zoo: {architecture: 3, data: text}", "section 'zoo' needs 'architecture'."),
        (HEADER.encode() + b"trainr: {}", "unknown section 'trainr'. Did you mean 'trainer'?"),
        (b"zoo: {architecture: cached-transformer-lm, data: text, wight: x}", "zoo.wight. Did you"),
        (b"zoo: {architecture: cached-transformer-ml, data: text}", "Unknown architecture"),
        (b"zoo: {architecture: cached-transformer-lm, data: txt}", "unknown data module 'txt'"),
        (HEADER.encode() + b"1: 2", "keys must be text, got 1; put it in quotes."),
        (HEADER.encode() + b"data: {on: 2}", "keys must be text, got True; put it in quotes."),
        (HEADER.encode() + b"model: {network: {3: 2}}", "keys must be text, got 3"),
        (HEADER.encode() + b"trainer: 3", "section 'trainer' must hold keys."),
        (HEADER.encode() + b"model: [1]", "section 'model' must hold keys."),
        (HEADER.encode() + b"data: ''", "section 'data' must hold keys."),
        (HEADER.encode().replace(b"text}", b"text, 3: x}"), "keys must be text, got 3"),
        (HEADER.encode().replace(b"text}", b"text, weight: 5}"), "zoo.weight must be text, got 5."),
        (
            HEADER.encode().replace(b"text}", b"text, name: [a]}"),
            "zoo.name must be text, got ['a']",
        ),
        (HEADER.encode().replace(b"text}", b"text, differs: 1.5}"), "zoo.differs must be text"),
        (b"zoo: {base: ../x.yaml}", "zoo.base must be the name of another file in its folder."),
        (b"zoo: {base: r.yaml}", "zoo.base must be the name of another file in its folder."),
        (b"zoo: {base: 3}", "zoo.base must be the name of another file in its folder."),
        (b"zoo: {base: no.yaml}", "its base no.yaml is not in "),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ZooError) as caught:
        read_recipe(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_on_top_of_another(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HEADER + "data: {streams: 2, seed: 1}\nseed_everything: 3\n")
    (tmp_path / "b.yaml").write_text("zoo: {base: a.yaml, name: b}\ndata: {seed: 2}\n")
    (tmp_path / "c.yaml").write_text("zoo: {base: b.yaml, differs: more}\ntrainer: {max_epochs: 1}")
    found = read_recipe(tmp_path / "c.yaml")
    assert (found.architecture, found.name, found.differs) == ("cached-transformer-lm", "b", "more")
    assert found.options == {
        "data": {"streams": 2, "seed": 2},
        "seed_everything": 3,
        "trainer": {"max_epochs": 1},
    }


def test_empty_sections_change_nothing(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(HEADER + "trainer:\nmodel:\ndata:\n")
    assert not any(read_recipe(tmp_path / "a.yaml").options.values())
    found = read_recipe(tmp_path / "a.yaml", ["trainer.max_epochs=3"])
    assert found.options["trainer"] == {"max_epochs": 3}
    values = {"zoo": {"architecture": "cached-transformer-lm", "data": "text"}, "data": None}
    made = training.make_recipe(values, [], tmp_path / "made.yaml")
    assert training.data_module(made).segment > 0
    assert training.instantiate(made, accelerator="cpu", logger=False).trainer is not None
    above = f"zoo: {{base: {recipe.name}}}\ntrainer:\nmodel:\ndata:\n"
    (tmp_path / "b.yaml").write_text(above)
    assert read_recipe(tmp_path / "b.yaml").options == read_recipe(recipe).options


def test_recipes_that_are_based_on_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("zoo: {base: b.yaml}\n")
    (tmp_path / "b.yaml").write_text("zoo: {base: a.yaml}\n")
    with pytest.raises(ConfigError, match=r"zoo\.base must be the name of another file"):
        read_recipe(tmp_path / "a.yaml")


def test_every_data_module_can_be_imported() -> None:
    import lightning.pytorch as pl

    for name, reference in DATA_MODULES.items():
        assert issubclass(training._import(reference), pl.LightningDataModule), name
    assert "text" in DATA_MODULES


@pytest.mark.parametrize("name", DATA_MODULES)
def test_a_recipe_can_say_what_every_data_module_is(name: str, recipe: Path) -> None:
    """Its options lead to the same one again, through YAML, and it is set up as others are."""
    data_class = training._import(DATA_MODULES[name])
    made = data_class(seed=3)
    found, options = training.options_of(made)
    assert found == name
    assert options["seed"] == 3
    assert options.keys() == inspect.signature(data_class).parameters.keys()
    stored = yaml.safe_load(yaml.safe_dump(options))
    other = dataclasses.replace(read_recipe(recipe), data=name, options={"data": stored})
    assert training.options_of(training.data_module(other)) == (name, options)
    assert inspect.signature(made.setup).parameters["stage"].default is None
    if name in ("densities", "expert-recovery", "spirals"):  # the others read files
        made.setup()
        assert len(made.train_dataloader()) > 0


def test_a_run_folder_in_a_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    """It would be taken for a class, by a recipe as by a fine-tuning."""
    pictures = write_pictures(tmp_path / "pictures")
    with pytest.raises(ConfigError, match=r"^The run folder .*run lies in the data .*pictures, "):
        fit("ode-resnet.mnist", [f"data.path={pictures}"], out=pictures / "run")
    assert {path.name for path in pictures.iterdir()} == {"dark", "light"}


def test_the_data_of_a_recipe_alone(recipe: Path) -> None:
    data = training.data_module(read_recipe(recipe), data_dir="/elsewhere")
    assert (data.segment, data.data_dir) == (SEGMENT, "/elsewhere")
    for override, message in [
        ("data.stream=3", "unknown option data.stream. Did you mean 'streams'?"),
        ("data.streams=0", "streams must be at least 1, got 0"),
    ]:
        with pytest.raises(ConfigError) as caught:
            training.data_module(read_recipe(recipe, [override]))
        assert str(caught.value).startswith(str(recipe))
        assert message in str(caught.value)


# --- bad options, before anything is written -----------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.network.dmi=3"], "dmi"),
        (["model.optimizer.lrr=3"], "lrr"),
        (["modle.compile=false"], "Did you mean 'model'"),
        (["trainer.max_epoch=3"], "max_epoch"),
        (["data.streems=3"], "streems"),
        (["model.network.dim=abc"], "dim"),
        (["model.network.dim=-1"], "dim must be at least 1, got -1"),
        (["model.network.memory=lots"], "lots"),
        (["model.optimizer.lr=-1"], "lr must be positive and finite, got -1"),
        (["model.optimizer.name=adam"], "adam"),
        (["data.streams=0"], "streams must be at least 1, got 0"),
        (["trainer.max_epochs=many"], "many"),
        (["seed_everything=x"], "seed_everything"),
        (["data.path=no.txt"], "No text file at no.txt."),
        (["data.path=empty.txt"], "The text file empty.txt is empty."),
        (["data.path=short.txt"], "fewer than a segment of 32 and the byte after it"),
        (["data.dataset=tiny-shakespere", "data.path=null"], "Did you mean 'tiny-shakespeare'"),
    ],
)
def test_bad_input_is_one_line_in_python_and_on_the_command_line(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("x" * 20)
    before = tree(tmp_path)
    with pytest.raises(ZooError) as caught:
        fit(recipe, overrides, out=tmp_path / "run")
    assert message in str(caught.value)
    said = run("fit", recipe, *overrides, "--out", tmp_path / "run")
    assert (said.status, said.out) == (2, "")
    lines = [line for line in said.err.splitlines() if line.startswith("zoo: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in said.err
    assert tree(tmp_path) == before, "nothing was written"


# --- a run folder --------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(done: training.Run) -> None:
    assert tree(done.folder) == {
        "recipe.yaml",
        "last.ckpt",
        "logs/part_0/metrics.csv",
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "checkpoint/recipe.yaml",
    }
    assert done.checkpoint == done.folder / "checkpoint"
    assert not done.module.training
    assert 0 < done.cpu_minutes < 5
    assert 0 < done.wall_minutes < 5
    stored = load_file(done.checkpoint / WEIGHTS_FILE)
    for name, tensor in done.module.network.state_dict().items():
        assert torch.equal(stored[name], tensor), name
    loaded = checkpoints.load(done.checkpoint)
    assert loaded.load_report.dropped == loaded.load_report.initialised == ()
    recipes = [(done.folder / "recipe.yaml").read_text(), (done.checkpoint / RECIPE_FILE)]
    assert recipes[0] == recipes[1].read_text()  # type: ignore[union-attr]


def test_what_a_run_knows(done: training.Run) -> None:
    facts = training.read_facts(done.folder)
    assert (facts["seed"], facts["epochs"], facts["steps"]) == (1, 3, 6)
    assert facts["precision"] == "32-true"
    assert facts["cpu_minutes"] == pytest.approx(done.cpu_minutes, abs=0.1)
    assert facts["source_commit"] == source_commit()
    assert (facts["machine"], facts["versions"]) == (machine(), versions())
    metrics = figures.read_metrics(done.folder)
    assert len(metrics["val_loss"]) == 3
    assert metrics["val_loss"][0][1] == pytest.approx(5.5, abs=0.3)  # hardly trained: ln 256


def test_the_machine_is_that_of_the_training(
    done: training.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.provenance.machine", lambda: "another machine")
    assert training.read_facts(done.folder)["machine"] == machine()
    # Runs from before it was kept were recorded where they were made.
    shutil.copytree(done.folder, tmp_path / "old")
    content = torch.load(tmp_path / "old" / "last.ckpt", weights_only=True)
    del content["zoo_machine"], content["zoo_versions"]
    torch.save(content, tmp_path / "old" / "last.ckpt")
    facts = training.read_facts(tmp_path / "old")
    assert facts["machine"] == "another machine"
    assert "versions" not in facts


def test_an_accelerator_is_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    assert machine().endswith(" cores, Card 0, Card 1")


def test_a_training_checkpoint_opens_without_running_code(done: training.Run) -> None:
    content = torch.load(done.folder / "last.ckpt", weights_only=True)
    assert content["zoo_network"]["dim"] == 16
    assert (content["epoch"], content["global_step"]) == (2, 6)


def test_what_is_no_run_folder(done: training.Run, tmp_path: Path) -> None:
    for folder in (tmp_path, done.checkpoint, tmp_path / "no"):
        with pytest.raises(ZooError, match=r"is no run folder: it needs last\.ckpt and recipe"):
            training.read_facts(folder)


def test_it_learns_a_text_of_ones_own(tmp_path: Path) -> None:
    done = fit(
        write_recipe(tmp_path),
        [
            "trainer.max_epochs=6",
            "trainer.limit_train_batches=1.0",
            "model.network.dropout=0.0",
            "model.optimizer.warmup_steps=5",
            "model.optimizer.lr=0.02",
        ],
        out=tmp_path / "run",
    )
    losses = [value for _, value in figures.read_metrics(done.folder)["val_loss"]]
    # What the bytes cost by their frequency in the training text, with one added to each count.
    counts = torch.bincount(done.datamodule.train_text.long(), minlength=256) + 1.0
    by_frequency = -(counts / counts.sum())[done.datamodule.validation_text.long()].log().mean()
    assert losses[-1] < float(by_frequency) - 1.0 < losses[0]


def test_the_resolved_recipe_gives_the_same_weights_again(
    done: training.Run, tmp_path: Path
) -> None:
    again = fit(done.folder / "recipe.yaml", out=tmp_path / "again")
    assert weights(again.checkpoint) == weights(done.checkpoint)
    assert (again.checkpoint / CONFIG_FILE).read_bytes() == (
        done.checkpoint / CONFIG_FILE
    ).read_bytes()
    resolved = (done.folder / "recipe.yaml").read_text()
    assert (again.folder / "recipe.yaml").read_text() == resolved
    # All there is to choose stands in it, also what the recipe left at its default.
    assert yaml.safe_load(resolved)["data"]["validation_fraction"] == 0.1


@pytest.mark.parametrize("override", ["seed_everything=2", "data.seed=7"])
def test_another_seed_gives_other_weights(
    done: training.Run, tmp_path: Path, override: str
) -> None:
    other = fit(done.folder / "recipe.yaml", [override], out=tmp_path / "other")
    assert weights(other.checkpoint) != weights(done.checkpoint)


def test_lightning_advertises_nothing(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addHandler(caplog.handler)  # whether or not it passes its lines on
    try:
        fit(recipe, ["trainer.max_steps=1"], out=tmp_path / "run")
    finally:
        log.removeHandler(caplog.handler)
    assert "GPU available" in caplog.text
    assert "litlogger" not in caplog.text


def test_the_run_folder_has_a_default(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(recipe).folder == Path("runs/tiny")
    assert (tmp_path / "runs/tiny/checkpoint/config.json").is_file()


def test_a_recipe_that_was_read(recipe: Path, done: training.Run, tmp_path: Path) -> None:
    run = fit(read_recipe(recipe, EPOCHS), out=tmp_path / "run")
    assert weights(run.checkpoint) == weights(done.checkpoint)


# --- interrupted and resumed ---------------------------------------------------------------------


def test_an_earlier_run_is_not_overwritten(done: training.Run, recipe: Path) -> None:
    before = {path: (done.folder / path).read_bytes() for path in tree(done.folder)}
    with pytest.raises(ZooError, match="holds an earlier run; add --resume to go on with it"):
        fit(recipe, EPOCHS, out=done.folder)
    assert {path: (done.folder / path).read_bytes() for path in tree(done.folder)} == before


_KILLED = """
import os, shutil, signal, sys
where, recipe, out = sys.argv[1:]
import torch
from zoo import training
from zoo.tasks.language_modeling import LanguageModel
torch.set_num_threads(1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if where == "in an epoch":
    step = LanguageModel.training_step
    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 1):
            die()
        return step(self, batch, batch_idx)
    LanguageModel.training_step = training_step
elif where == "before the first checkpoint":
    LanguageModel.validation_step = lambda self, batch, batch_idx: die()
elif where == "while a checkpoint is written":
    save, calls = torch.save, []
    def dying(content, file, *arguments, **options):
        calls.append(file)
        if len(calls) == 2:
            die()
        return save(content, file, *arguments, **options)
    torch.save = dying
elif where == "while the result is written":
    from pathlib import Path
    Path.mkdir_, Path.mkdir = Path.mkdir, lambda self, *a, **o: (
        Path.mkdir_(self, *a, **o), self.name.endswith(".part") and die())
training.fit(recipe, ["trainer.max_epochs=3"], out=out)
"""


@pytest.mark.parametrize(
    ("where", "epochs_done"),
    [
        ("in an epoch", 1),
        ("while a checkpoint is written", 1),
        pytest.param("before the first checkpoint", 0, marks=pytest.mark.slow),
        pytest.param("while the result is written", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_is_resumed_bit_for_bit(
    done: training.Run, recipe: Path, tmp_path: Path, where: str, epochs_done: int
) -> None:
    out = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, where, str(recipe), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "checkpoint").exists()
    if epochs_done:
        content = torch.load(out / "last.ckpt", weights_only=True)
        assert content["epoch"] + 1 == epochs_done
    else:
        assert not (out / "last.ckpt").exists()
    resumed = fit(recipe, EPOCHS, out=out, resume=True)
    assert weights(resumed.checkpoint) == weights(done.checkpoint)
    a, b = (torch.load(f / "last.ckpt", weights_only=True) for f in (out, done.folder))
    assert_equal(a["optimizer_states"], b["optimizer_states"])
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])
    # What was logged before the interruption is kept, and each epoch is there once.
    found = figures.read_metrics(out)["val_loss"]
    assert [step for step, _ in found] == [
        step for step, _ in figures.read_metrics(done.folder)["val_loss"]
    ][-len(found) :]


@pytest.mark.parametrize("make", PAYLOADS)
def test_a_payload_is_not_resumed(
    recipe: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    out, witness = tmp_path / "run", tmp_path / "witness"
    out.mkdir()
    shutil.copy(recipe, out / "recipe.yaml")
    make(out / "last.ckpt", witness)
    for read in (lambda: fit(recipe, out=out, resume=True), lambda: training.read_facts(out)):
        with pytest.raises(CheckpointError, match="more than tensors and plain values") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not witness.exists()


def assert_equal(a: Any, b: Any) -> None:
    """Nested containers with tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    else:
        assert a == b


def test_each_epoch_is_kept_where_few_are_validated(recipe: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "run", ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"]
    whole = fit(recipe, options, out=tmp_path / "whole")
    content = torch.load(whole.folder / "last.ckpt", weights_only=True)
    assert content["epoch"] + 1 == 3
    checkpoints.convert(whole.folder / "last.ckpt", tmp_path / "converted")
    assert weights(tmp_path / "converted") == weights(whole.checkpoint)
    code = _KILLED.replace('["trainer.max_epochs=3"]', repr(options))
    killed = subprocess.run(
        [sys.executable, "-c", code, "in an epoch", str(recipe), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torch.load(out / "last.ckpt", weights_only=True)["epoch"] + 1 == 1
    assert weights(fit(recipe, options, out=out, resume=True).checkpoint) == weights(
        whole.checkpoint
    )


def test_resuming_a_finished_run_changes_nothing(done: training.Run, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(done.folder, copied)
    again = fit(copied / "recipe.yaml", out=copied, resume=True)
    assert weights(again.checkpoint) == weights(done.checkpoint)
    assert again.cpu_minutes > 0.5 * done.cpu_minutes, "what it cost is not forgotten"


def test_resuming_with_another_way_to_train_is_refused(done: training.Run, recipe: Path) -> None:
    """What `check_finished` compares afterwards; a longer training is asked for on purpose."""
    overrides = [*EPOCHS, f"data.path={done.datamodule.path}"]
    said = rf"trainer\.gradient_clip_val was .* for the run in {done.folder}, and is 0\.125"
    with pytest.raises(ConfigError, match=said):
        fit(recipe, [*overrides, "trainer.gradient_clip_val=0.125"], out=done.folder, resume=True)
    longer = [*overrides, "trainer.max_epochs=9"]
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs was . for the run in .* is 9;"):
        fit(recipe, longer, out=done.folder, resume=True, longer=False)


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("model.network.dim=32", "model"),
        ("model.optimizer.lr=0.5", "model"),
        ("data.seed=9", "data"),
        ("seed_everything=9", "seed_everything"),
        ("zoo.weight=other.one", "zoo"),
    ],
)
def test_resuming_with_other_options_is_refused(
    done: training.Run, recipe: Path, override: str, section: str
) -> None:
    overrides = [*EPOCHS, f"data.path={done.datamodule.path}", override]
    with pytest.raises(ConfigError) as caught:
        fit(recipe, overrides, out=done.folder, resume=True)
    assert f"Section {section!r} differs from that of the run in {done.folder}" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("trainer.max_epochs=2", "epoch 3 already, and max_epochs is 2"),
        ("trainer.max_steps=1", "step {} already, and max_steps is 1"),
    ],
)
def test_resuming_for_less_than_is_done_is_refused(
    done: training.Run, option: str, said: str
) -> None:
    steps = checkpoints.read_training(done.folder / "last.ckpt")["global_step"]
    assert steps > 1
    before = {path: (done.folder / path).read_bytes() for path in tree(done.folder)}
    ran = run("fit", done.folder / "recipe.yaml", option, "--resume", "--out", done.folder)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.splitlines()[-1] == (
        f"zoo: {done.folder} has come to {said.format(steps)}: ask for as many at least, or choose "
        "another --out folder."
    )
    assert {path: (done.folder / path).read_bytes() for path in tree(done.folder)} == before


def test_an_interrupt_says_how_to_go_on(
    recipe: Path, done: training.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.tasks.language_modeling import LanguageModel

    step = LanguageModel.training_step

    def interrupt(self: LanguageModel, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    out, handler = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "training_step", interrupt)
        said = run("fit", recipe, *EPOCHS, "--out", out)
    assert said.status == 130
    assert said.out == ""
    assert said.err.splitlines()[-1] == (
        f"zoo: interrupted; {out} keeps the epochs that are done: repeat the command, fit and "
        "reproduce with --resume"
    )
    assert signal.getsignal(signal.SIGINT) is handler, "a second interrupt is heard"
    assert not (out / "checkpoint").exists()
    resumed = fit(recipe, EPOCHS, out=out, resume=True)
    assert weights(resumed.checkpoint) == weights(done.checkpoint)


# --- no space, no permission ---------------------------------------------------------------------


def test_a_file_in_the_way_of_the_run_folder(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match=r"Cannot write the run folder .*: Not a directory\."):
        fit(recipe, out=tmp_path / "file" / "run")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_run_folder_that_cannot_be_made(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", fail)
    with pytest.raises(ZooError, match=f"Cannot write the run folder .*: {os.strerror(number)}"):
        fit(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_space_for_a_checkpoint_during_training(
    done: training.Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops with one line, and goes on from the last checkpoint when there is room."""
    save, calls = torch.save, []

    def fail(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(content, file, *arguments, **options)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(ZooError, match=r"Cannot write the run folder .*: No space left"):
            fit(recipe, EPOCHS, out=out)
    assert len(calls) == 2
    assert torch.load(out / "last.ckpt", weights_only=True)["epoch"] == 0
    resumed = fit(recipe, EPOCHS, out=out, resume=True)
    assert weights(resumed.checkpoint) == weights(done.checkpoint)


def test_an_error_of_the_data_in_mid_training_stays_what_it_is(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.tasks.language_modeling import LanguageModel

    def fail(*arguments: Any) -> None:
        raise DataError("a file has gone")

    monkeypatch.setattr(LanguageModel, "training_step", fail)
    with pytest.raises(DataError, match="a file has gone"):
        fit(recipe, out=tmp_path / "run")


# --- the recipe of the weight, shrunk ------------------------------------------------------------


def test_the_published_recipe_runs_on_a_text_of_ones_own(tmp_path: Path) -> None:
    """The command of the README, with less to do."""
    words = ["fit", f"recipes/{NAME}.yaml", f"data.path={write_text(tmp_path)}"]
    said = run(*words, *SHRUNK["cached-transformer-lm"], "--out", tmp_path / "mine", "--json")
    assert said.status == 0, said.err
    assert said.json["checkpoint"] == str(tmp_path / "mine" / "checkpoint")
    generated = run("generate", tmp_path / "mine" / "checkpoint", "--prompt", "Once upon")
    assert generated.status == 0
    assert generated.out.startswith("Once upon")
