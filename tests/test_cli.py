"""Tests of the command: every subcommand, its exit status, its one line on bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, save

import zoo
from tests.tiny import ROOT, Said, copy, run, write_recipe
from zoo import cards, checkpoints, cli, controls, evaluation, hub, training
from zoo.files import CONFIG_FILE, RESULTS_FILE, WEIGHTS_FILE

NAME = "cached-transformer-lm.tiny"
HEAVY = ("torch", "lightning", "numpy", "huggingface_hub", "timm", "rich", "jsonargparse")

TESTED_HERE = {
    "card",
    "controls",
    "convert",
    "evaluate",
    "fit",
    "generate",
    "info",
    "list",
    "load-check",
    "predict",
    "reproduce",
}
TESTED_ELSEWHERE = {
    "push",
    "pull",
    "export",
    "hub-sandbox",
    "finetune",
    "memory",
    "recommend",
    "recovery",
    "transfer",
    "learn",
}
"""Where a command has a test file of its own, below tests/hub or beside its task."""


class Shelf:
    """A zoo of one tiny weight, brought about by the command alone; what it said on the way."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, {}
        self.pretrained = folder / "pretrained" / NAME
        self.card = folder / "model_cards" / f"{NAME}.md"
        self.readme = folder / "README.md"

    def patch(self, patched: pytest.MonkeyPatch) -> None:
        """Stand in the place of what the package ships."""
        for module in (cards, controls, training):
            patched.setattr(module, "shipped_folder", lambda name: self.folder / name)
        for module in (cards, hub):
            patched.setattr(module, "pretrained_folder", lambda name: self.pretrained.parent / name)

    def write(self) -> None:
        """What people type: a card, a recipe, the recipes of the controls, a README."""
        real = (ROOT / "model_cards" / "cached-transformer-lm.tiny-shakespeare.md").read_text()
        typed = dataclasses.replace(
            cards.parse(real),
            weight="tiny",
            recipe=f"{NAME}.yaml",
            results=(),
            controls=(),
            files=(),
            training={},
        )
        self.card.parent.mkdir()
        self.card.write_text(cards.render(typed))
        home = self.folder / "recipes" / "controls" / NAME
        home.mkdir(parents=True)
        write_recipe(self.folder, weight=NAME).rename(self.folder / "recipes" / f"{NAME}.yaml")
        write_recipe(self.folder, weight="", name="the model").rename(home / "grc.yaml")
        control = {"zoo": {"base": "grc.yaml", "name": "no cache", "differs": "no cache"}}
        control["model"] = {"network": {"memory": "none"}}  # type: ignore[dict-item]
        (home / "none.yaml").write_text(yaml.safe_dump(control))
        self.readme.write_text("# A zoo\n<!-- zoo:models -->\n<!-- /zoo:models -->\n")

    def make(self) -> None:
        """Steps 5 to 7 of CONTRIBUTING.md."""
        trained = self.folder / "run"
        for step, *words in (
            ("fit", "fit", NAME, "trainer.log_every_n_steps=1", "--out", trained),
            ("convert", "convert", trained / "last.ckpt", self.pretrained, "--dtype", "float16"),
            ("record", "evaluate", self.pretrained, "--record", "--run", trained, "--json"),
            ("controls", "controls", NAME, "--seeds", 1, 2, "--out", self.folder / "controls",
             "--record", self.pretrained),
            ("card", "card", NAME, "--figures", trained, "--update"),
            ("readme", "card", NAME, "--readme", self.readme),
        ):  # fmt: skip
            self.said[step] = run(*words)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_HUB_OFFLINE", "1")
        shelf.write()
        patched.chdir(shelf.folder)  # where figures go to
        shelf.patch(patched)
        shelf.make()
    return shelf


@pytest.fixture
def shelf(made: Shelf, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    made.patch(monkeypatch)
    return made


@pytest.fixture
def mine(made: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A copy of the shelf that a test may damage."""
    shutil.copytree(made.folder, tmp_path / "shelf")
    shelf = Shelf(tmp_path / "shelf")
    shelf.patch(monkeypatch)
    return shelf


def one_line(said: Said, *parts: str) -> None:
    """Exit status 2, nothing on standard output, and one line with all parts."""
    assert said.status == 2, said
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("zoo")
    for part in parts:
        assert part in line


# --- the way of a weight -------------------------------------------------------------------------


def test_every_command_is_tested() -> None:
    assert TESTED_HERE <= set(cli._commands(cli._parser())) <= TESTED_HERE | TESTED_ELSEWHERE


@pytest.mark.parametrize("step", ["fit", "convert", "record", "controls", "card", "readme"])
def test_every_step_of_publishing_passes(shelf: Shelf, step: str) -> None:
    assert shelf.said[step].status == 0, shelf.said[step].err


def test_fit_and_convert_say_what_they_wrote(shelf: Shelf) -> None:
    assert f"Checkpoint folder: {shelf.folder}/run/checkpoint\n" in shelf.said["fit"].out
    assert shelf.said["fit"].out.startswith("Trained in ")
    assert len(shelf.said["fit"].out.splitlines()) == 1
    assert shelf.said["convert"].out == f"Wrote {shelf.pretrained}\n"
    stored = load((shelf.pretrained / WEIGHTS_FILE).read_bytes())
    trained = load((shelf.folder / "run" / "checkpoint" / WEIGHTS_FILE).read_bytes())
    for name, tensor in stored.items():
        assert torch.equal(tensor, trained[name].half()), name
    assert stored.keys() == trained.keys()


def test_recording_writes_results_that_then_come_out(shelf: Shelf) -> None:
    shown = shelf.said["record"].json
    assert shown["passed"] is True
    stored = json.loads((shelf.pretrained / RESULTS_FILE).read_text())
    assert [r["value"] for r in stored["results"]] == [o["value"] for o in shown["outcomes"]]
    assert stored["training"]["epochs"] == 1
    assert len(stored["controls"]) == 4


def test_controls_are_a_table(shelf: Shelf) -> None:
    header, *rows = shelf.said["controls"].out.splitlines()
    assert header.split()[:3] == ["control", "parameters", "protocol"]
    assert [row.split("  ")[0] for row in rows] == ["the model", "no cache"] * 2
    assert header.split()[-2:] == ["difference", "speed"]
    for arm, row in zip(cards.find(NAME).controls, rows, strict=True):
        assert arm.speed in row
        if arm.difference is not None:
            assert f" {arm.difference:+.4f} (" in row


def test_controls_that_are_not_recorded_are_not_timed(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(controls, "_speeds")
    shutil.copytree(shelf.folder / "controls" / "none", tmp_path / "none")
    said = run("controls", NAME, "--seeds", 1, "--only", "none", "--out", tmp_path)
    header, *rows = said.out.splitlines()
    assert header.split()[-1] == "difference"
    assert [row.split("  ")[0] for row in rows] == ["no cache"] * 2
    assert [row.split()[-1] for row in rows] == ["-", "-"]


def test_the_card_is_complete_and_up_to_date(shelf: Shelf) -> None:
    card = cards.find(NAME)
    assert cards.render(cards.computed(card, shelf.pretrained)) == shelf.card.read_text()
    assert shelf.said["card"].out == shelf.card.read_text() + "\n"
    assert (shelf.pretrained / "README.md").read_text() == shelf.card.read_text()
    assert f"[`{NAME}`](model_cards/{NAME}.md)" in shelf.readme.read_text()
    assert (shelf.folder / "model_cards" / "figures" / NAME / "loss.png").is_file()
    assert {record.name for record in card.files} == {
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "results.json",
    }


# --- reading -------------------------------------------------------------------------------------


def test_list(shelf: Shelf) -> None:
    header, row = run("list").out.splitlines()
    assert header.split() == ["name", "task", "parameters", "recorded"]
    card = cards.find(NAME)
    assert row.split()[:3] == [NAME, "language-modeling", f"{card.parameters:,}"]
    assert f"{card.primary.value:.4f} nats_per_character (stream)" in row


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], True),
        (["cached-*"], True),
        (["*.tiny", "other"], True),
        (["sau-*"], False),
        (["--exclude", "cached-*"], False),
        (["--task", "language-modeling", "cached-*"], True),
        (["cached-*", "--task", "language-modeling", "x*"], True),
        (["--family", "cached-transformers", "--licence", "apache-2.0"], True),
        (["--max-params", "100"], False),
        (["--max-params", "10000000"], True),
    ],
)
def test_list_with_conditions(shelf: Shelf, words: list[str], found: bool) -> None:
    said = run("list", *words, "--json")
    assert (said.status, said.json) == (0, [NAME] if found else [])


def test_info(shelf: Shelf) -> None:
    said = run("info", "cached-transformer-lm")
    assert (said.status, said.out) == (0, shelf.card.read_text() + "\n")
    shown = run("info", NAME, "--json").json
    card = cards.find(NAME)
    assert (shown["weight"], shown["parameters"]) == ("tiny", card.parameters)
    assert shown["results"][0]["n"] == card.primary.n
    assert "body" not in shown
    assert run("card", NAME).out == said.out


def test_load_check(shelf: Shelf) -> None:
    tensors = len(load((shelf.pretrained / WEIGHTS_FILE).read_bytes()))
    said = run("load-check", NAME)
    assert said.out == f"{NAME}: {tensors} tensors loaded, 0 dropped, 0 initialised\n"
    shown = run("load-check", NAME, "--json").json
    assert shown == {"loaded": tensors, "dropped": [], "initialised": []}


def test_predict(shelf: Shelf, tmp_path: Path) -> None:
    texts = ["To be, or not to be", "é and more"]
    expected = zoo.load(NAME).predict(texts)  # type: ignore[operator]
    shown = run("predict", NAME, "--text", texts[0], "--text", texts[1], "--json").json
    assert [score["n"] for score in shown] == [19, 11]
    for score, other in zip(shown, expected, strict=True):
        assert score["log_likelihood"] == other.log_likelihood
        assert score["perplexity"] == other.perplexity
        assert score["bits_per_byte"] == other.bits_per_byte
        assert score["nats_per_byte"] == other.nats_per_byte
    path = tmp_path / "latin-1.txt"
    path.write_bytes("caf\xe9\n".encode("latin-1"))  # no UTF-8, and every byte counts
    header, row = run("predict", NAME, "--file", path).out.splitlines()
    assert header.split()[:2] == ["text", "bytes"]
    assert row.split()[:2] == [str(path), "5"]


def test_generate(shelf: Shelf) -> None:
    words = ["generate", NAME, "--prompt", "ROMEO:", "--max-new-tokens", 40]
    first = run(*words, "--seed", 1)
    assert first.status == 0
    assert first.out.startswith("ROMEO:")
    assert run(*words, "--seed", 1).out == first.out
    assert run(*words, "--seed", 2).out != first.out
    shown = run(*words, "--seed", 1, "--json").json
    assert shown["prompt"] + shown["text"] + "\n" == first.out
    model = zoo.load(NAME)
    expected = model.generate(  # type: ignore[operator]
        "ROMEO:", max_new_tokens=40, temperature=1.1, top_k=7, top_p=0.9, seed=1
    )
    options = ["--temperature", 1.1, "--top-k", 7, "--top-p", 0.9, "--seed", 1]
    assert run(*words, *options).out == f"ROMEO:{expected}\n"
    greedy = run(*words, "--temperature", 0)
    assert greedy.out == run(*words, "--temperature", "0", "--seed", 5).out


def test_text_that_the_terminal_cannot_show(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    words = ["generate", NAME, "--prompt", "é€x", "--max-new-tokens", "1", "--temperature", "0"]
    assert cli.main(words) == 0
    assert raw.getvalue().startswith(b"??x")


# --- verdicts ------------------------------------------------------------------------------------


def test_evaluate(shelf: Shelf) -> None:
    said = run("evaluate", NAME)
    assert said.status == 0
    *_, stream, blocks, verdict = said.out.splitlines()
    assert (stream.split()[0], blocks.split()[0]) == ("stream", "blocks")
    assert verdict == f"{NAME}: reproduced"
    shown = run("evaluate", NAME, "--json", "--protocol", "blocks").json
    (outcome,) = shown["outcomes"]
    assert (shown["name"], shown["passed"], outcome["passed"]) == (NAME, True, True)
    assert outcome["value"] == pytest.approx(outcome["recorded"], abs=outcome["tolerance"])
    assert outcome["interval"][0] < outcome["value"] < outcome["interval"][1]


def test_recording_measures_once_and_on_the_data_that_were_given(
    mine: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    measure = evaluation.evaluate_module

    def counted(module: Any, datamodule: Any, *arguments: Any) -> Any:
        seen.append(datamodule.data_dir)
        return measure(module, datamodule, *arguments)

    monkeypatch.setattr(evaluation, "evaluate_module", counted)
    said = run("evaluate", mine.pretrained, "--record", "--data-dir", tmp_path, "--json")
    assert (said.status, said.json["passed"]) == (0, True)
    assert seen == [str(tmp_path)]
    assert said.json["name"] == str(mine.pretrained)
    stored = json.loads((mine.pretrained / RESULTS_FILE).read_text())["results"]
    assert [r["value"] for r in stored] == [o["recorded"] for o in said.json["outcomes"]]


def test_a_number_that_does_not_come_out(mine: Shelf) -> None:
    path = mine.pretrained / RESULTS_FILE
    values = json.loads(path.read_text())
    values["results"][0]["value"] += 0.1
    path.write_text(json.dumps(values))
    said = run("evaluate", mine.pretrained)
    assert said.status == 1
    assert said.out.splitlines()[-1] == f"{mine.pretrained}: NOT reproduced"
    assert said.err == ""
    shown = run("evaluate", mine.pretrained, "--json")
    assert (shown.status, shown.json["passed"]) == (1, False)
    assert [o["passed"] for o in shown.json["outcomes"]] == [False, True]


def test_a_folder_without_records_does_not_pass(shelf: Shelf) -> None:
    said = run("evaluate", shelf.folder / "run" / "checkpoint", "--protocol", "blocks")
    assert said.status == 1
    assert said.out.splitlines()[-1].endswith(": not recorded")


def test_reproduce(shelf: Shelf, tmp_path: Path) -> None:
    said = run("reproduce", NAME, "--out", tmp_path / "same")
    assert said.status == 0, said
    assert said.out.splitlines()[-1] == f"{NAME}: reproduced"
    other = run("reproduce", NAME, "model.optimizer.lr=0.5", "--out", tmp_path / "other", "--json")
    assert (other.status, other.json["passed"]) == (1, False)
    again = run("reproduce", NAME, "--out", tmp_path / "same")
    one_line(again, "holds an earlier run; add --resume")
    assert run("reproduce", NAME, "--out", tmp_path / "same", "--resume").status == 0


def test_controls_that_are_done_are_not_trained_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(training, "fit")
    said = run("controls", NAME, "--seeds", 1, 2, "--out", shelf.folder / "controls", "--json")
    assert said.status == 0, said.err
    names = [(arm["name"], arm["result"]["seeds"]) for arm in said.json]
    assert names == [("the model", [1, 2]), ("no cache", [1, 2])] * 2


def test_controls_of_an_architecture_are_those_of_its_default_weight(shelf: Shelf) -> None:
    words = ["--seeds", 1, 2, "--out", shelf.folder / "controls", "--json"]
    said = run("controls", "cached-transformer-lm", *words)
    assert said.status == 0, said.err
    assert [arm["recipe"] for arm in said.json] == [
        f"controls/{NAME}/{stem}.yaml" for stem in ("grc", "none", "grc", "none")
    ]
    assert said.json[0]["result"]["command"] == f"zoo controls {NAME}"


@pytest.mark.parametrize(
    ("words", "name", "values"),
    [
        (["memory", "a", "--json", "b"], "names", ["a", "b"]),
        (["predict", "x", "--image", "a", "b", "--json", "c"], "image", ["a", "b", "c"]),
        (["evaluate", "x", "--analog", "bits=4", "--json", "noise=0"], "analog",
         ["bits=4", "noise=0"]),
        (["fit", "x", "a.b=1", "--out", "o", "a.c=2"], "overrides", ["a.b=1", "a.c=2"]),
        (["recovery", "a.b=1", "--seeds", "1", "2", "--json", "a.c=2"], "overrides",
         ["a.b=1", "a.c=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_lists_may_come_in_parts(words: list[str], name: str, values: list[str]) -> None:
    assert getattr(cli._parse(words), name) == values


def test_fit_as_json(shelf: Shelf, tmp_path: Path) -> None:
    said = run("fit", NAME, "--json", "seed_everything=2", "--out", tmp_path / "run")
    assert said.json["checkpoint"] == str(tmp_path / "run" / "checkpoint")
    assert said.json["cpu_minutes"] > 0
    assert said.json["wall_minutes"] > 0


def test_convert_as_json(shelf: Shelf, tmp_path: Path) -> None:
    said = run("convert", shelf.folder / "run/last.ckpt", tmp_path / "x", "--json")
    assert said.json == {"folder": str(tmp_path / "x")}
    assert run("load-check", tmp_path / "x").status == 0


def test_card_with_figures(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("card", NAME, "--figures", shelf.folder / "run", "--json")
    assert said.status == 0, said.err
    assert said.json["weight"] == "tiny"
    drawn = [line[5:] for line in said.err.splitlines() if line.startswith("Drew ")]
    assert [Path(path).name for path in drawn] == ["loss.png", "position.png", "mixing.png"]
    assert all(Path(path).is_file() for path in drawn)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["lsit"], ["no command 'lsit'", "Did you mean 'list'", "zoo --help"]),
        (["frobnicate"], ["no command 'frobnicate'"]),
        (["list", "--tsak", "x"], ["no option '--tsak'", "Did you mean '--task'", "list --help"]),
        (["list", "--task=x", "--maxparams=3"], ["no option '--maxparams=3'", "'--max-params'"]),
        (["list", "--max-params", "many"], ["--max-params", "many"]),
        (["list", "--task", "language-modelling"], ["Did you mean 'language-modeling'"]),
        (["list", "--family", "resnets"], ["No model has the family 'resnets'"]),
        (["info"], ["name"]),
        (["info", NAME, "extra"], ["unexpected argument 'extra'", "info --help"]),
        (["controls", NAME, "--only", "grc", "--json", "none"], ["unexpected argument 'none'"]),
        (["predict", NAME, "--image", "a.png", "--json", "b.png"], ["it takes --text or --file"]),
        (["info", "cached-transformr-lm"], ["Did you mean 'cached-transformer-lm"]),
        (["load-check", "cached-transformer-lm.tny"], [f"Did you mean {NAME!r}"]),
        (["predict", "nothing", "--text", "x"], ["Unknown model 'nothing'"]),
        (["evaluate", "cached-transformer"], ["Unknown model", "Did you mean"]),
        (["reproduce", "cached-transformer"], ["Unknown model", "Did you mean"]),
        (
            ["controls", "cached-transformer-lm.x"],
            ["no controls for 'cached-transformer-lm.x'", f"Did you mean {NAME!r}"],
        ),
        (["card", "nothing"], ["Unknown model 'nothing'"]),
        (["fit", "nothing"], ["No recipe 'nothing'"]),
        (["fit", NAME, "dta.path=x"], ["Unknown section 'dta'", "Did you mean 'data'"]),
        (["generate", NAME], ["--prompt"]),
        (["generate", NAME, "--prompt", ""], ["The prompt is empty"]),
        (["generate", NAME, "--prompt", "x", "--temperature", "-1"], ["got -1.0"]),
        (["generate", NAME, "--prompt", "x", "--temperature", "hot"], ["--temperature", "hot"]),
        (["generate", NAME, "--prompt", "x", "--temperature", "nan"], ["got nan"]),
        (["generate", NAME, "--prompt", "x", "--top-k", "0"], ["top_k must be at least 1"]),
        (["generate", NAME, "--prompt", "x", "--top-k", "1.5"], ["--top-k", "1.5"]),
        (["generate", NAME, "--prompt", "x", "--top-p", "2"], ["top_p must be in (0, 1]"]),
        (["generate", NAME, "--prompt", "x", "--max-new-tokens", "0"], ["at least 1, got 0"]),
        (["generate", NAME, "--prompt", "x", "--seed", "-1"], ["from 0 to 2**63 - 1, got -1"]),
        (["generate", NAME, "--prompt", "x", "--seed", "one"], ["--seed", "one"]),
        (["predict", NAME], ["--text"]),
        (["predict", NAME, "--text", "a", "--file", "b"], ["--file", "--text"]),
        (["predict", NAME, "--text", ""], ["empty text"]),
        (["predict", NAME, "--file", "no.txt"], ["No text file at no.txt"]),
        (["predict", NAME, "--file", "empty.txt"], ["The text file empty.txt is empty"]),
        (["predict", NAME, "--file", "."], ["Cannot read the text file .: Is a directory"]),
        (["evaluate", NAME, "--protocol", "blokcs"], ["Unknown protocol 'blokcs'", "blocks"]),
        (["evaluate", "no/such/folder"], ["Unknown model 'no/such/folder'"]),
        (["evaluate", ".", "--record"], [". has no recipe.yaml"]),
        (["evaluate", NAME, "--run", "x"], ["--run and --commit go with --record."]),
        (["evaluate", NAME, "--commit", "x"], ["--run and --commit go with --record."]),
        (
            ["evaluate", ".", "--record", "--protocol", "blocks"],
            ["--protocol does not go with --record."],
        ),
        (
            ["evaluate", "nowhere", "--analog", "bits=4", "--record"],
            ["nowhere has no results: zoo evaluate nowhere --record"],
        ),
        *(
            (
                ["evaluate", NAME, "--analog", "bits=4", *words],
                [f"{words[0]} does not go with --analog."],
            )
            for words in (
                ["--protocol", "blocks"],
                ["--diagnose"],
                ["--run", "x"],
                ["--commit", "x"],
            )
        ),
        (
            ["predict", NAME, "--text", "x", "--top-k", "3"],
            [f"{NAME} scores texts and names no classes; leave out --top-k."],
        ),
        (["convert", "no.ckpt", "x"], ["no.ckpt is not a local file"]),
        (["convert", "http://127.0.0.1:1/a.ckpt", "x"], ["is not a local file", "never opened"]),
        (["convert", "empty.txt", "x"], ["empty.txt is damaged"]),
        (["convert", "a", "b", "--dtype", "int8"], ["--dtype", "int8"]),
        (["card", NAME, "--figures", "."], ["No metrics under ./logs"]),
        (["card", NAME, "--readme", "no.md"], ["No such file", "no.md"]),
        (["card", NAME, "--readme", "empty.txt"], ["empty.txt: expected <!-- zoo:models -->"]),
        (["controls", NAME, "--seeds"], ["--seeds"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(
    shelf: Shelf, tmp_path: Path, monkeypatch: Any, words: list[str], parts: list[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    before = shelf.card.read_text()
    one_line(run(*words), *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
    assert shelf.card.read_text() == before


def test_a_text_shorter_than_a_segment(shelf: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    said = run("fit", NAME, f"data.path={path}", "--out", tmp_path / "run")
    one_line(said, "fewer than a segment of 32 and the byte after it")
    assert not (tmp_path / "run").exists()


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def renamed(content: bytes) -> bytes:
    tensors = load(content)
    tensors["hat.weight"] = tensors.pop("head.weight")
    return save(tensors, {"parameters": "1"})


def newer(content: bytes) -> bytes:
    return json.dumps({**json.loads(content), "format_version": 999}).encode()


def unknown_key(content: bytes) -> bytes:
    values = json.loads(content)
    values["network"]["dmi"] = 3
    return json.dumps(values).encode()


def negative(content: bytes) -> bytes:
    values = json.loads(content)
    values["network"]["dim"] = -3
    return json.dumps(values).encode()


def other_architecture(content: bytes) -> bytes:
    values = json.loads(content)
    values["architecture"] = "os.system"
    return json.dumps(values).encode()


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "truncated": (WEIGHTS_FILE, lambda content: content[: len(content) // 2]),
    "flipped bit": (WEIGHTS_FILE, flip),
    "swapped": (WEIGHTS_FILE, lambda content: bytes(len(content))),
    "pickled": (WEIGHTS_FILE, lambda content: b"PK\x03\x04" + content),
    "renamed tensor": (WEIGHTS_FILE, renamed),
    "newer format": (CONFIG_FILE, newer),
    "unknown key": (CONFIG_FILE, unknown_key),
    "out of range": (CONFIG_FILE, negative),
    "not json": (CONFIG_FILE, lambda content: content[:-3]),
    "unknown architecture": (CONFIG_FILE, other_architecture),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_weight_of_the_zoo(mine: Shelf, damage: str) -> None:
    """Size and sha256 on the card find every change, whatever it is, before anything is parsed."""
    name, change = DAMAGES[damage]
    path = mine.pretrained / name
    path.write_bytes(change(path.read_bytes()))
    for words in (["load-check", NAME], ["evaluate", NAME], ["predict", NAME, "--text", "x"]):
        one_line(run(*words), f"{path} is damaged or is another file: expected ", "sha256")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("truncated", "model.safetensors"),
        ("swapped", "model.safetensors"),
        ("pickled", "is a pickle, which can run any code when it is opened"),
        ("renamed tensor", "hat.weight"),
        ("newer format", "has format version 999, and this zoo reads up to 1; update it"),
        ("unknown key", "unknown key 'dmi'. Did you mean 'dim'?"),
        ("out of range", "dim must be at least 1, got -3"),
        ("not json", "is not valid JSON"),
        ("unknown architecture", "Unknown architecture 'os.system'"),
    ],
)
def test_a_damaged_folder_of_ones_own(shelf: Shelf, tmp_path: Path, damage: str, part: str) -> None:
    """Without a card there is no sha256: what the file is made of must tell."""
    name, change = DAMAGES[damage]
    folder = copy(shelf.pretrained, tmp_path / "damaged", change, name)
    one_line(run("load-check", folder), part)


def test_a_pickle_instead_of_a_folder(shelf: Shelf, tmp_path: Path) -> None:
    path = shelf.folder / "run" / "last.ckpt"
    one_line(run("load-check", path), f"{path} is a pickle", f"zoo convert {path} FOLDER")


def test_a_weight_without_its_files(mine: Shelf) -> None:
    (mine.pretrained / WEIGHTS_FILE).unlink()
    one_line(run("load-check", NAME), f"Cannot read {mine.pretrained / WEIGHTS_FILE}")
    shutil.rmtree(mine.pretrained)
    one_line(run("load-check", NAME), f"{NAME} is neither bundled nor published on the Hub yet")


def test_another_kind_of_model_cannot_generate(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "load", lambda *arguments, **options: SimpleNamespace())
    one_line(run("generate", NAME, "--prompt", "x"), f"{NAME} is no language model")


def test_no_permission_and_no_space(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x"
    one_line(run("fit", NAME, "--out", out), f"Cannot write the run folder {out}: Not a directory")
    last = shelf.folder / "run" / "last.ckpt"
    one_line(run("convert", last, out), f"Cannot write {out}: Not a directory")

    def full(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    one_line(run("convert", last, tmp_path / "y"), "Cannot write", "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_any_other_fault_of_the_system_is_one_line_too(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr(cards, "find", fail)
    one_line(run("info", NAME), "zoo: Permission denied: /some/where")


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "module", "function"),
    [
        (["evaluate", NAME], evaluation, "evaluate"),
        (["reproduce", NAME], evaluation, "reproduce"),
        (["controls", NAME], controls, "run"),
        (["list"], cards, "list_models"),
    ],
)
def test_an_interrupt(
    shelf: Shelf, monkeypatch: Any, words: list[str], module: Any, function: str
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupt)
    said = run(*words)
    assert (said.status, said.out, said.err) == (130, "", "zoo: interrupted\n")


def test_an_error_of_our_own_is_not_hidden(shelf: Shelf, monkeypatch: Any) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("counted 3 characters of 4")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    with pytest.raises(AssertionError, match="counted 3"):
        run("evaluate", NAME)


@pytest.mark.parametrize("command", [None, *sorted(TESTED_HERE)])
def test_help(command: str | None) -> None:
    words = [] if command is None else [command]
    said = run(*words, "--help")
    assert (said.status, said.err) == (0, "")
    assert said.out.startswith(f"usage: {' '.join(['zoo', *words])} ")
    if command is None:
        assert all(name in said.out for name in TESTED_HERE)
        assert run().out == said.out, "no command at all shows the help"


def test_version() -> None:
    assert run("--version").out == f"{zoo.__version__}\n"


# --- as a process --------------------------------------------------------------------------------


def start(*words: str, code: str = "", **options: Any) -> subprocess.Popen[str]:
    """`zoo WORDS...`, after `code`."""
    program = f"{code}\nimport sys\nfrom zoo import cli\nsys.exit(cli.main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


REPORT = f"""
import atexit, sys
atexit.register(lambda: print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr))
"""


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "--json"], ["fit", "--help"]])
def test_what_is_quick_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    process = start(*words, code=REPORT, cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "[]\n")
    assert "cached-transformer-lm" in out or "usage: zoo" in out


def test_the_module_is_the_command(tmp_path: Path) -> None:
    for words, status in ([["--version"], 0], [["lsit"], 2], [["info", "nothing"], 2]):
        done = subprocess.run(
            [sys.executable, "-m", "zoo.cli", *words],  # type: ignore[misc]
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == status
        assert "Traceback" not in done.stderr
        assert len((done.stdout + done.stderr).splitlines()) == 1


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    """`zoo info NAME | head -1`: the card is longer than what a pipe holds back."""
    code = "from zoo import cli\ncli._info = lambda options: print('x' * 300_000) or 0"
    process = start("info", "cached-transformer-lm", code=code, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == "x"
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), err) == (0, "")
    process.stderr.close()


def test_a_reader_that_left_before_anything_was_written(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "zoo.cli", "list"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_runs_in_a_thread(shelf: Shelf) -> None:
    """As from a server or a notebook, where signals cannot be set."""
    found: list[Said] = []
    thread = threading.Thread(target=lambda: found.append(run("list", "--json")))
    thread.start()
    thread.join()
    assert found[0].json == [NAME]


@pytest.fixture(autouse=True)
def no_cache_between_shelves() -> Iterator[None]:
    yield
    cards._read_cards.cache_clear()
