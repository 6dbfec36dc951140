"""Tests of what README, CONTRIBUTING and cards say to type: it runs, or is accounted for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tests.tiny import LESS_DATA, ROOT, SHRUNK, run, write_text
from zoo import cards, cli
from zoo.training import read_recipe

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
CARDS = [f"model_cards/{name}.md" for name in cards.load_cards()]

PROCESSES = "starts processes; tests/tuning/test_finetuning.py does, marked slow"

HUB = "needs a Hub; tests/hub runs it against one"

NOT_RUN_HERE = {
    "bash ci/quickstart.sh": "installs into an environment of its own; CI runs it",
    "bash ci/test.sh": "would run these tests from within themselves; CI runs it",
    "zoo evaluate cached-transformer-lm": "test_wheel.py runs it, marked slow",
    "zoo evaluate sau-shufflenet-v2-x0-5.fashion-mnist --analog bits=4,6 noise=0.2 "
    "--beside ode-resnet.fashion-mnist --figures analog": (
        "measures all test images 14 times; test_analog.py has fewer"
    ),
    "zoo transfer austen": "trains for an hour; test_transfer.py has less to do",
    "zoo finetune cached-transformer-lm --data my.txt --strategy ddp --devices 2 --out runs/ddp": (
        PROCESSES
    ),
    "zoo push cached-transformer-lm --dry-run": HUB,
    "zoo push cached-transformer-lm": HUB,
    "zoo push runs/mine/checkpoint me/my-lm --private": HUB,
    "zoo push --all": HUB,
    "zoo pull me/my-lm@v1": HUB,
    "zoo export cached-transformer-lm --format torch-export": "test_exporting.py, marked slow",
    "zoo export cached-transformer-lm --format onnx": "test_exporting.py, marked slow",
    "zoo reproduce cached-transformer-lm --out runs/reproduction": "trains for hours",
    "zoo controls cached-transformer-lm.tiny-shakespeare": "trains for hours",
    "zoo recovery": "trains for half an hour; test_recovery.py has less to do",
    "zoo memory": "takes a minute; tests/test_memory_table.py, marked slow",
}
"""Commands that take too long: their options are checked, and shorter ones run in test_cli.py."""


LITTLE = ["data.streams=2", "trainer.limit_train_batches=1"]
"""Of a fine-tuning, one small step."""


class Snippet(NamedTuple):
    """One block between fences."""

    document: str
    language: str
    text: str
    line: int


def snippets(document: str) -> Iterator[Snippet]:
    language, lines, start = None, list[str](), 0
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), 1):
        if language is None and line.startswith("```"):
            language, lines, start = line[3:].strip(), [], number
        elif language is not None and line == "```":
            yield Snippet(document, language, "\n".join(lines), start)
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{document}: a fence is not closed"


ALL = [snippet for document in [*DOCUMENTS, *CARDS] for snippet in snippets(document)]
PYTHON = [snippet for snippet in ALL if snippet.language == "python"]
COMMANDS = [
    (snippet.document, line.partition("  #")[0].partition(" #")[0].strip())
    for snippet in ALL
    if snippet.language == "bash"
    for line in snippet.text.splitlines()
    if line.strip() and not line.startswith("#")
]
INLINE = [
    (document, " ".join(found.split()))
    for document in [*DOCUMENTS, *CARDS]
    for found in re.findall(
        r"`(zoo [a-z][^`]*)`",
        re.sub(
            r"^```.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.M | re.S
        ),
    )
]


def test_every_snippet_is_accounted_for() -> None:
    # What has no language needs several machines.
    assert {snippet.language for snippet in ALL} == {"python", "bash", ""}
    unnamed = [snippet.text for snippet in ALL if not snippet.language]
    assert len(unnamed) == 2
    for text in unnamed:
        command = text[text.index("finetune") :].replace("\\\n", " ")
        parsed(shlex.split(command))
    fences = sum(
        line.startswith("```")
        for document in [*DOCUMENTS, *CARDS]
        for line in (ROOT / document).read_text(encoding="utf-8").splitlines()
    )
    assert fences == 2 * len(ALL)
    assert len([s for s in PYTHON if s.document == "README.md"]) >= 4
    assert {s.document for s in PYTHON} >= set(CARDS), "each card shows how to load its weight"
    assert len(COMMANDS) >= 9
    documented = {command for _, command in COMMANDS}
    assert documented >= NOT_RUN_HERE.keys(), "an exception that is no longer needed"


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user's own, with a text of their own."""
    write_text(tmp_path, lines=150).rename(tmp_path / "my.txt")
    for name in ("digit", "picture", "trousers", "new", "other"):
        Image.new("L", (28, 28), len(name)).save(tmp_path / f"{name}.png")
    bundled = cards.pretrained_folder("cached-transformer-lm.tiny-shakespeare")
    (tmp_path / "my-lm").symlink_to(bundled, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("snippet", PYTHON, ids=lambda s: f"{s.document}:{s.line}")
def test_a_python_snippet_runs(
    snippet: Snippet, at_hand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(snippet.text, f"{snippet.document}:{snippet.line}", "exec"), {"__name__": "x"})
    printed = capsys.readouterr().out
    assert bool(printed) == ("print(" in snippet.text)


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_a_command_runs(document: str, command: str, at_hand: Path) -> None:
    words = shlex.split(command)
    if words[0] == "bash":
        assert command.partition(" -m")[0] in NOT_RUN_HERE
        assert subprocess.run(["bash", "-n", str(ROOT / words[1])]).returncode == 0
        assert os.access(ROOT / words[1], os.R_OK)
        return
    assert words[0] == "zoo", f"{document}: {command!r} is not accounted for"
    if command in NOT_RUN_HERE:
        parsed(words[1:])
        return
    if words[1] == "fit":
        recipe = read_recipe(words[2])
        words += SHRUNK[recipe.architecture] + LESS_DATA[recipe.data]
    if words[1] == "finetune":
        words += LITTLE
    if words[1] == "generate" and "tuned" in words[2]:
        tuned = ["--data", "my.txt", "--epochs", "1", "--out", "runs/tuned"]
        assert run("finetune", "cached-transformer-lm", *tuned, *LITTLE).status == 0
    elif words[1] == "generate" and "checkpoint" in words[2]:
        recipe = "cached-transformer-lm.tiny-shakespeare"  # what the snippet before has trained
        mine = ["data.path=my.txt", *SHRUNK["cached-transformer-lm"], "--out", "runs/mine"]
        assert run("fit", recipe, *mine).status == 0
    said = run(*words[1:])
    assert said.status == 0, said.err
    assert said.out


def parsed(words: list[str]) -> None:
    """The command and its options exist."""
    options = cli._parse(words)
    assert options.command == words[0]


@pytest.mark.parametrize(("document", "command"), sorted(set(INLINE)))
def test_a_command_in_a_sentence_has_the_options_it_names(document: str, command: str) -> None:
    words = [re.sub(r"<\w+>", "x", word).strip("…") for word in shlex.split(command)[1:]]
    sub = cli._commands(cli._parser()).get(words[0])
    assert sub is not None, f"{document}: there is no command {words[0]!r}"
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in sub._option_string_actions, f"{document}: {command}"


def test_there_are_commands_in_sentences() -> None:
    assert len(set(INLINE)) >= 10


@pytest.mark.parametrize("document", [*DOCUMENTS, *CARDS])
def test_links_and_paths_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            path = (ROOT / document).parent / target.partition("#")[0]
            assert path.exists(), f"{document}: {target}"


def test_the_scripts_run_from_any_folder(tmp_path: Path) -> None:
    """Their first step: they find the checkout, and the environment that was asked for."""
    common = shlex.quote(str(ROOT / "ci" / "common.sh"))
    script = f'source {common}; test -f pyproject.toml && echo "$venv"'
    env = {**os.environ, "ZOO_VENV": "elsewhere"}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert (done.returncode, done.stdout) == (0, "elsewhere\n")
