"""Tests of the wheel: built, installed outside of the checkout, and used from another folder."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tiny import ROOT
from zoo import cards
from zoo.data.sources import SOURCES

DEFAULT = "cached-transformer-lm"


class Installed(NamedTuple):
    """A wheel and the folder that it was installed into."""

    wheel: Path
    site: Path
    elsewhere: Path

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A Python process in another folder that finds the installed package alone."""
        return subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            cwd=self.elsewhere,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("ZOO_")},
                "PYTHONPATH": str(self.site),
                "HF_HUB_OFFLINE": "1",
                "HOME": str(self.elsewhere),
                "MPLCONFIGDIR": str(self.site.parent),  # where matplotlib lists the fonts
            },
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    # With the build backend at hand nothing is downloaded.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), *isolation]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    site, elsewhere = folder / "site", folder / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(site)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *install, str(wheel)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Installed(wheel, site, elsewhere)


def below(folder: Path, pattern: str) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if p.is_file()}


def test_everything_a_user_needs_is_inside(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
    package = {f"zoo/{name}" for name in below(ROOT / "zoo", "*") if "__pycache__" not in name}
    assert package <= names
    recipes = {f"zoo/_recipes/{name}" for name in below(ROOT / "recipes", "*.yaml")}
    shipped_cards = {f"zoo/_cards/{name}" for name in below(ROOT / "model_cards", "*.md")}
    assert recipes <= names
    assert shipped_cards <= names
    assert len(shipped_cards) == len(cards.load_cards()) >= 1
    for name in cards.load_cards():
        for path in cards.pretrained_folder(name).glob("*"):
            assert f"zoo/pretrained/{name}/{path.name}" in names
    bundled = [source.bundled for source in SOURCES.values() if source.bundled]
    assert bundled
    assert {f"zoo/data/{path}" for path in bundled} <= names
    assert "zoo/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not any("tests/" in name or name.endswith(".ckpt") for name in names)


_USE = """
import sys, pathlib
site = pathlib.Path(sys.argv[1])
import zoo
assert pathlib.Path(zoo.__file__).is_relative_to(site), zoo.__file__
print(",".join(zoo.list_models()))
from zoo.training import find_recipe, read_recipe
for name in zoo.list_models():
    assert find_recipe(name).is_relative_to(site)
    assert read_recipe(zoo.info(name).recipe).weight == name
from zoo.data.sources import locate
assert locate("tiny-shakespeare").is_relative_to(site)
model = zoo.load(sys.argv[2])
assert len(model.generate("ROMEO:", max_new_tokens=20, seed=1)) > 0
print(model.predict("To be, or not to be")[0].perplexity)
from zoo.data.text import TextDataModule
measured = model.measure(TextDataModule(validation_fraction=0.004), "blocks")
print(measured.n, measured.value)
"""


def test_it_works_from_another_folder(installed: Installed) -> None:
    done = installed.run("-c", _USE, str(installed.site), DEFAULT)
    assert done.returncode == 0, done.stderr
    names, perplexity, measured = done.stdout.splitlines()
    assert names.split(",") == list(cards.load_cards())
    assert 1 < float(perplexity) < 256
    n, value = measured.split()
    assert int(n) == 1_115_394 - int(0.996 * 1_115_394) - 1
    assert 1 < float(value) < 2
    assert below(installed.elsewhere, "*") == set(), "nothing was written"


def test_the_command_of_the_wheel(installed: Installed) -> None:
    scripts = list((installed.site / "bin").iterdir())
    assert [path.name for path in scripts] == ["zoo"]
    done = installed.run(str(scripts[0]), "list", "--json")
    assert done.returncode == 0, done.stderr
    assert all(f'"{name}"' in done.stdout for name in cards.load_cards())
    missing = installed.run(str(scripts[0]), "info", "cached-transformr-lm")
    assert missing.returncode == 2
    assert missing.stderr.startswith("zoo: Unknown model")


@pytest.mark.slow
def test_the_recorded_numbers_come_out_of_the_wheel(installed: Installed) -> None:
    done = installed.run("-m", "zoo.cli", "evaluate", DEFAULT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(": reproduced")
