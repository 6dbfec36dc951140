"""Tests of fine-tuning whole models: what comes of it, what is kept, what is refused beforehand."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import zoo
from tests.hub import published
from tests.tiny import ROOT, run, write_text
from tests.tiny_images import CLASSES, SIZE, registered, write_folder, write_recipe
from zoo import (
    adaptation,
    cards,
    checkpoints,
    evaluation,
    figures,
    files,
    finetuning,
    intervals,
    publishing,
    training,
)
from zoo.adaptation import ADAPTER_FILE
from zoo.configs import build, to_json
from zoo.errors import ConfigError, DataError, ZooError
from zoo.files import CARD_FILE, CHECKPOINT_FILES, RESULTS_FILE, WEIGHTS_FILE
from zoo.tuning import memory
from zoo.tuning.config import FineTuning
from zoo.tuning.freezing import freeze
from zoo.tuning.lora import load_lora, lora_layers
from zoo.tuning.memory.convolutions import SavingConv2d

QUICK: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "progress_bar": False}
IMAGES: dict[str, Any] = {**QUICK, "epochs": 3, "lr": 0.05, "overrides": ["data.batch_size=8"]}
HEAD = ("head.weight", "head.bias")


@pytest.fixture(scope="module", autouse=True)
def architecture() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three classes, hardly trained."""
    folder = tmp_path_factory.mktemp("base")
    return training.fit(write_recipe(folder), ["trainer.max_epochs=1"], out=folder / "r").checkpoint


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of four classes with names of their own."""
    folder = write_folder(tmp_path_factory.mktemp("four"), 60, seed=1)
    for index, name in enumerate(CLASSES):
        (folder / name).rename(folder / f"new {index}")
    (folder / "white").mkdir()
    for index in range(20):
        Image.new("RGB", SIZE[::-1], (255 - index,) * 3).save(folder / "white" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def done(base: Path, four: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("done") / "run"
    return zoo.finetune(base, four, out=out, **IMAGES)


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


# --- what comes of it ----------------------------------------------------------------------------


def test_an_ordinary_checkpoint_folder(done: Any) -> None:
    checkpoint = done.finetuned.checkpoint
    assert {path.name for path in checkpoint.iterdir()} == set(CHECKPOINT_FILES)
    loaded = zoo.load(checkpoint)
    assert loaded.load_report.dropped == loaded.load_report.initialised == ()
    assert loaded.preprocessing.classes == ("new 0", "new 1", "new 2", "white")
    assert not done.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.rand(3, 3, *SIZE)
    assert [p.classes for p in loaded.predict(images)] == [p.classes for p in done.predict(images)]


def test_it_learned_on_samples_that_were_held_out(done: Any) -> None:
    (before,), (after,) = done.finetuned.before, done.finetuned.after
    assert before.n == after.n == 16  # a fifth of 80
    assert after.value > before.value + 0.2
    for outcome in (before, after):
        assert outcome.interval == intervals.wilson_interval(outcome.value * 16, 16)


def test_it_evaluates_to_what_was_recorded(done: Any) -> None:
    again = evaluation.evaluate(done.finetuned.checkpoint)
    assert again.passed
    assert again.value == done.finetuned.after[0].value


def test_the_card_names_base_and_data_and_what_was_measured(
    done: Any, base: Path, four: Path
) -> None:
    text = (done.finetuned.checkpoint / CARD_FILE).read_text()
    card = cards.parse(text)
    assert card.base_model == "tiny-classifier.made"
    assert "\nbase_model:" not in text, "a folder of this machine is none of the Hub's business"
    assert card.results[0].dataset == four.name
    assert card.results[0].value == done.finetuned.after[0].value
    assert str(four) not in text
    assert str(base) not in text
    for row in finetuning.rows(done.finetuned):
        assert f"| {' | '.join(row)} |" in card.body
    stored = json.loads((done.finetuned.checkpoint / RESULTS_FILE).read_text())["training"]
    assert stored["finetune"]["base_model"] == "tiny-classifier.made"
    assert stored["before"][0]["value"] == done.finetuned.before[0].value
    assert cards.computed(card, done.finetuned.checkpoint) == card


def test_the_recipe_gives_the_same_weights_again(done: Any, tmp_path: Path) -> None:
    again = training.fit(done.finetuned.checkpoint / "recipe.yaml", out=tmp_path / "again")
    assert weights(again.checkpoint) == weights(done.finetuned.checkpoint)


def test_a_base_with_a_card_is_published(tmp_path: Path) -> None:
    lm = published.write_weight(tmp_path / "lm")
    text = write_text(tmp_path, 60)
    module = zoo.finetune(
        lm, text, epochs=1, out=tmp_path / "run", data_license="public domain", **QUICK
    )
    found = publishing.push(module.finetuned.checkpoint, "me/mine", dry_run=True)
    assert set(found.sent) >= set(CHECKPOINT_FILES)
    card = cards.parse((module.finetuned.checkpoint / CARD_FILE).read_text())
    assert card.name == "cached-transformer-lm.text"
    assert card.weights_license == "apache-2.0"


def test_the_hub_is_told_the_repository_of_a_base() -> None:
    from dataclasses import replace

    card = published.card(base_model="cached-transformer-lm.tiny-shakespeare")
    assert "\nbase_model: zoo-models/cached-transformer-lm.tiny-shakespeare\n" in cards.render(card)
    assert "\nbase_model: me/mine\n" in cards.render(replace(card, base_model="hf://me/mine@v1"))
    assert cards.parse(cards.render(card)) == card
    assert "base_model" not in cards.render(published.card())


# --- heads ---------------------------------------------------------------------------------------


def test_a_new_head_is_the_same_whichever_way_it_is_asked_for(
    base: Path, four: Path, tmp_path: Path
) -> None:
    loaded = zoo.load(base, num_classes=4, seed=5)
    torch.manual_seed(5)
    from_global = zoo.load(base, num_classes=4)
    still = {**IMAGES, "epochs": 1, "freeze": ["head"]}
    by_name = zoo.finetune(base, four, seed=5, out=tmp_path / "a", **still)
    in_memory = zoo.finetune(loaded, four, seed=7, out=tmp_path / "b", **still)
    asked = zoo.finetune(base, four, num_classes=4, seed=5, out=tmp_path / "c", **still)
    other = zoo.load(base, num_classes=4, seed=6)
    for name in HEAD:
        expected = loaded.network.state_dict()[name]
        for module in (from_global, by_name, in_memory, asked):
            assert torch.equal(module.network.state_dict()[name], expected), name
        assert not torch.equal(other.network.state_dict()[name], expected)


def test_the_same_classes_keep_their_head(base: Path, tmp_path: Path) -> None:
    same = write_folder(tmp_path / "same", 30, seed=4)
    module = zoo.finetune(
        base, same, out=tmp_path / "run", freeze="*.bias", **{**IMAGES, "epochs": 1}
    )
    assert torch.equal(module.network.head.bias, tensors(base)["head.bias"])


# --- frozen, adapted -----------------------------------------------------------------------------


def test_a_frozen_encoder_is_the_base_bit_for_bit(base: Path, four: Path, tmp_path: Path) -> None:
    module = zoo.finetune(base, four, out=tmp_path / "run", freeze="encoder", **IMAGES)
    before, after = tensors(base), tensors(module.finetuned.checkpoint)
    assert before.keys() == after.keys()
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= before.keys()
    for name in before.keys() - set(HEAD):
        assert torch.equal(before[name], after[name]), name
    fresh = zoo.load(base, num_classes=4, seed=0).network.state_dict()
    for name in HEAD:
        assert not torch.equal(fresh[name], after[name]), name


@pytest.mark.parametrize("frozen", [["conv.weight"], ["conv.weight", "norm"]])
def test_saving_memory_changes_memory_alone(
    frozen: list[str], base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, bit for bit where no BatchNorm is folded; a folder like any other."""
    reports: list[memory.Report] = []

    def saving(network: torch.nn.Module) -> memory.Report:
        reports.append(save_memory(network))
        return reports[-1]

    save_memory = memory.save_memory
    monkeypatch.setattr(memory, "save_memory", saving)
    found = []
    for saves in (True, False):
        out = tmp_path / str(saves)
        module = zoo.finetune(base, four, out=out, freeze=frozen, save_memory=saves, **IMAGES)
        assert {path.name for path in module.finetuned.checkpoint.iterdir()} == set(
            CHECKPOINT_FILES
        )
        assert "save_memory: " + str(saves).lower() in (out / "recipe.yaml").read_text()
        found.append((module.finetuned, tensors(module.finetuned.checkpoint)))
    (report,) = reports
    assert report.converted == {"conv": "Conv2d", "norm": "BatchNorm2d"}
    assert type(report.model.conv) is torch.nn.Conv2d, "what was trained is plain again"
    (ours, saved), (theirs, plain) = found
    assert ours.after == theirs.after
    rounding = 0.0 if len(frozen) == 1 else 1e-4
    torch.testing.assert_close(saved, plain, rtol=rounding, atol=rounding)
    assert not torch.equal(saved["conv.bias"], tensors(base)["conv.bias"])


def test_blocks_computed_again_change_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights after two steps; an ordinary network and an ordinary recipe."""
    from zoo.families.cached_transformers import language_model

    again: list[torch.nn.Module] = []

    def checkpoint(block: torch.nn.Module, *inputs: Any, **options: Any) -> Any:
        again.append(block)
        return recompute(block, *inputs, **options)

    recompute = language_model.checkpoint
    monkeypatch.setattr(language_model, "checkpoint", checkpoint)
    lm = published.write_weight(tmp_path / "lm")
    text = write_text(tmp_path, 60)
    few = ["data.streams=4", "trainer.max_steps=2"]
    found = []
    for on in (False, True):
        out = tmp_path / str(on)
        zoo.finetune(lm, text, epochs=1, out=out, recompute_blocks=on, overrides=few, **QUICK)
        found.append(tensors(out / "checkpoint"))
        assert bool(again) == on
        assert ("recompute_blocks: true" in (out / "recipe.yaml").read_text()) == on
    plain, recomputed = found
    for name, tensor in plain.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(tensor, tensors(lm)[name]) for name, tensor in plain.items())


def test_blocks_are_kept_again_after_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch as pl

    seen: list[Any] = []

    def fit(trainer: Any, model: Any, **options: Any) -> None:
        assert model.network.recompute_blocks
        seen.append(model.network)
        raise ZooError("Enough.")

    lm = published.write_weight(tmp_path / "lm")
    text = write_text(tmp_path, 60)
    monkeypatch.setattr(pl.Trainer, "fit", fit)
    with pytest.raises(ZooError, match="Enough"):
        zoo.finetune(lm, text, out=tmp_path / "run", recompute_blocks=True, **QUICK)
    assert not seen[0].recompute_blocks


def test_memory_is_plain_again_after_an_error(
    base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.nn.Module] = []

    def stop(self: Any, batch: Any, index: int) -> None:
        seen.append(self.network)
        assert type(self.network.conv) is SavingConv2d
        raise ZooError("Enough.")

    monkeypatch.setattr("tests.tiny_images.TinyClassifier.training_step", stop)
    with pytest.raises(ZooError, match="Enough"):
        zoo.finetune(base, four, out=tmp_path / "run", **IMAGES)
    assert type(seen[0].conv) is torch.nn.Conv2d


@pytest.mark.parametrize("variant", ["lora", "lora-fa"])
def test_adapters_are_merged_and_saved_alone(variant: Any, tmp_path: Path) -> None:
    lm = published.write_weight(tmp_path / "lm")
    text = write_text(tmp_path, 60)
    options = {"epochs": 2, "lr": 0.02, "adapters": variant, "rank": 2, "target": "mlp_in"}
    module = zoo.finetune(lm, text, out=tmp_path / "run", **options, **QUICK)
    before, after = tensors(lm), tensors(module.finetuned.checkpoint)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.0.mlp_in.weight"}
    stored = load_file(tmp_path / "run" / ADAPTER_FILE)
    a, b = (stored[f"blocks.0.mlp_in.lora_{part}"] for part in "ab")
    torch.testing.assert_close(
        after["blocks.0.mlp_in.weight"], before["blocks.0.mlp_in.weight"] + b @ a
    )
    adapted = zoo.load(lm)
    load_lora(adapted.network, tmp_path / "run" / ADAPTER_FILE)
    score = adapted.predict("line 1")[0].log_likelihood
    assert score == pytest.approx(module.predict("line 1")[0].log_likelihood, rel=1e-5)
    assert module.finetuned.after[0].value < module.finetuned.before[0].value


def test_processes_but_the_first_get_a_plain_network_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch as pl

    lm = published.write_weight(tmp_path / "lm")
    text = write_text(tmp_path, 60)
    options: dict[str, Any] = {"epochs": 1, "adapters": "lora", "rank": 2, **QUICK}
    zoo.finetune(lm, text, out=tmp_path / "one", overrides=["trainer.max_steps=1"], **options)
    assert (tmp_path / "one" / ADAPTER_FILE).is_file()
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    other = training.fit(tmp_path / "one" / "recipe.yaml", out=tmp_path / "other")
    assert not (tmp_path / "other" / ADAPTER_FILE).exists()
    assert not other.checkpoint.exists()
    assert not lora_layers(other.module.network)
    theirs, ours = other.module.network.state_dict(), tensors(tmp_path / "one" / "checkpoint")
    assert ours.keys() <= theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


def test_adapters_beside_a_new_head(base: Path, four: Path, tmp_path: Path) -> None:
    """The tiny classifier has no layer for one but its head, which is new and learns whole."""
    with pytest.raises(
        ConfigError, match="TinyNet has no layer for an adapter beside its new head"
    ):
        zoo.finetune(base, four, out=tmp_path / "run", adapters="lora", rank=1, **IMAGES)
    assert not (tmp_path / "run").exists()


# --- other kinds of data -------------------------------------------------------------------------


def test_the_command_on_a_text(tmp_path: Path) -> None:
    lm = published.write_weight(tmp_path / "lm")
    text = write_text(tmp_path, 60)
    words = ["finetune", lm, "--data", text, "--epochs", 1, "--out", tmp_path / "run"]
    words += ["--layer-decay", 0.5, "--freeze", "embedding", "--accelerator", "cpu"]
    words += ["--no-save-memory", "--recompute-blocks"]
    said = run(*words, "data.streams=4", "--json")
    assert said.status == 0, said.err
    assert {o["protocol"] for o in said.json["after"]} == {"stream", "blocks"}
    assert said.json["before"][0]["n"] == said.json["after"][0]["n"] > 100
    recipe = training.read_recipe(Path(said.json["checkpoint"]) / "recipe.yaml")
    assert recipe.options["model"]["optimizer"]["layer_decay"] == 0.5
    assert recipe.options["data"]["streams"] == 4
    assert recipe.finetune is not None
    assert recipe.finetune.freeze == "embedding"
    assert not recipe.finetune.save_memory
    assert recipe.finetune.recompute_blocks
    again = run(*words, "data.streams=4")
    assert again.status == 0, again.err
    assert again.out.startswith("protocol  metric")
    assert f"{said.json['after'][0]['value']:.4f}" in again.out
    assert run("evaluate", said.json["checkpoint"]).status == 0
    assert run("generate", said.json["checkpoint"], "--prompt", "line").out.startswith("line")


def recommender(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    path = folder / "ratings.csv"
    lines = [f"{user},{item},{1 + index % 5}" for index, (user, item) in enumerate(pairs)]
    path.write_text("\n".join(["user,item,rating", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recommender of users u0 to u4 and items i0 to i5."""
    folder = tmp_path_factory.mktemp("rated")
    old = recommender(folder, [(f"u{u}", f"i{i}") for i in range(6) for u in range(5)])
    recipe = training.read_recipe(
        "dselect-k-recommender.movielens-100k",
        [
            f"data.path={old}",
            "data.batch_size=16",
            "trainer.max_epochs=1",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            "model.network.num_users=5",
            "model.network.num_items=6",
            "model.network.embedding_dim=4",
            "model.network.expert_widths=[8]",
            "model.network.tower_widths=[4]",
        ],
    )
    return training.fit(recipe, out=folder / "base").checkpoint


def ratings_of(folder: Path, users: tuple[str, ...], items: tuple[str, ...]) -> Path:
    return recommender(folder, [(user, item) for item in items for user in users])


def test_users_and_items_keep_their_vectors_by_id(rated: Path, tmp_path: Path) -> None:
    new = ratings_of(tmp_path, ("u3", "v0", "v1"), ("i5", "i9", "i2", "i3"))
    # A learning rate with which nothing moves far.
    still = {"freeze": ["moe", "towers"], "epochs": 1, "lr": 1e-9, **QUICK}
    module: Any = zoo.finetune(rated, new, out=tmp_path / "run", **still)
    before, after = tensors(rated), tensors(module.finetuned.checkpoint)
    assert module.catalogue.users == ("u3", "v0", "v1")
    assert module.catalogue.items == ("i2", "i3", "i5", "i9")
    near = {"rtol": 0.0, "atol": 1e-6}
    torch.testing.assert_close(after["users.weight"][0], before["users.weight"][3], **near)
    torch.testing.assert_close(after["items.weight"][:3], before["items.weight"][[2, 3, 5]], **near)
    far = after["users.weight"][1] - before["users.weight"]
    assert far.abs().amax(1).min() > 1e-3
    assert module.watch_weight == 0.5
    kept = training.read_recipe(module.finetuned.checkpoint / "recipe.yaml")
    assert kept.options["model"]["watch_weight"] == 0.8, "it is trained as the base was"
    assert {outcome.protocol for outcome in module.finetuned.after} == {"ndcg", "recall", "rating"}
    assert module.recommend(user="u3") == [], "it has rated all four items"
    assert len(module.recommend(user="u3", exclude_seen=False)) == 4


@pytest.mark.parametrize(
    ("users", "items", "freeze", "message"),
    [
        (("u1", "v0", "v1"), ("i1", "i2", "i3"), "encoder",
         "2 users the base does not know; leave users trainable: freeze=['items', 'moe', "
         "'towers']."),
        (("u1", "u2", "u3"), ("i1", "i2", "i9"), ["items", "towers"],
         "1 item the base does not know; leave items trainable: freeze=['towers']."),
        (("u1", "v0", "v1"), ("i1", "i8", "i9"), ["users", "items"],
         "2 users and 2 items the base does not know; leave users and items trainable: leave out "
         "freeze."),
    ],
)  # fmt: skip
def test_what_the_base_does_not_know_is_not_frozen_as_it_was_drawn(
    users: Any, items: Any, freeze: Any, message: str, rated: Path, tmp_path: Path
) -> None:
    new = ratings_of(tmp_path, users, items)
    with pytest.raises(ConfigError) as caught:
        zoo.finetune(rated, new, out=tmp_path / "run", freeze=freeze, epochs=1, **QUICK)
    assert str(caught.value) == f"The data have {message}"
    assert not (tmp_path / "run").exists()


def test_adapters_leave_unchanged_what_the_base_does_not_know(
    rated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a recommender with features; this one has no layer for an adapter."""
    module = zoo.load(rated)
    one = torch.arange(1)
    monkeypatch.setattr(type(module), "carried_rows", lambda *_: {"users.weight": (one, one)})
    freeze(module.network, "*")
    how = FineTuning(base_model="a", adapters="lora")
    with pytest.raises(
        ConfigError, match=r"4 users .* freeze=\['items', .*\] in place of adapters"
    ):
        adaptation._check_new_rows(module, module, how)


def test_users_and_items_that_the_base_knows_can_be_frozen(rated: Path, tmp_path: Path) -> None:
    new = ratings_of(tmp_path, ("u1", "u2", "u4"), ("i1", "i2", "i3"))
    module: Any = zoo.finetune(
        rated, new, out=tmp_path / "run", freeze=["users", "items"], epochs=1, **QUICK
    )
    before, after = tensors(rated), tensors(module.finetuned.checkpoint)
    assert torch.equal(after["users.weight"], before["users.weight"][[1, 2, 4]])
    assert torch.equal(after["items.weight"], before["items.weight"][[1, 2, 3]])


def test_a_data_module(base: Path, four: Path, done: Any, tmp_path: Path) -> None:
    from zoo.data.augmentation import AugmentConfig
    from zoo.data.images import ImageDataModule

    data = ImageDataModule(
        path=str(four), size=SIZE, batch_size=8, augment=AugmentConfig(flip=True)
    )
    module = zoo.finetune(base, data, out=tmp_path / "run", epochs=1, **QUICK)
    recipe = training.read_recipe(module.finetuned.checkpoint / "recipe.yaml")
    assert recipe.options["data"]["augment"]["flip"] is True
    assert recipe.options["data"]["batch_size"] == 8
    assert evaluation.evaluate(module.finetuned.checkpoint).passed
    columns = {"user_column": "u", "item_column": "i", "time_column": "t"}
    ratings: Any = training._import(training.DATA_MODULES["ratings"])(path="r.csv", **columns)
    name, options = training.options_of(ratings)
    assert name == "ratings"
    assert {key: options[key] for key in columns} == columns


@pytest.mark.parametrize("name", ["continuous-flow", "latent-ode"])
def test_models_of_made_data(name: str, tmp_path: Path) -> None:
    from zoo.data.densities import DensityDataModule
    from zoo.data.spirals import SpiralDataModule
    from zoo.registry import architecture

    module_class = architecture(name).module_class()
    if name == "continuous-flow":
        data: Any = DensityDataModule(batch_size=12, steps=2, test_points=20)
        network = module_class.network_config(hidden=6, conditions=6)
    else:
        data = SpiralDataModule(count=8, batch_size=4)
        network = module_class.network_config(hidden=6)
    base = module_class(network=network)
    module = zoo.finetune(base, data, epochs=1, out=tmp_path / "run", **QUICK)
    assert evaluation.evaluate(module.finetuned.checkpoint).passed
    old, new = base.network.state_dict(), module.network.state_dict()
    assert any(not torch.equal(tensor, new[key]) for key, tensor in old.items())
    again = zoo.finetune(base, data, epochs=1, out=tmp_path / "run", **QUICK)
    assert again.finetuned.after == module.finetuned.after


def test_the_solver_of_a_module_is_the_one_that_is_trained_with(tmp_path: Path) -> None:
    from zoo.data.spirals import SpiralDataModule
    from zoo.registry import architecture

    module_class = architecture("latent-ode").module_class()
    base: Any = module_class(network=module_class.network_config(hidden=6))
    base.solver, base.steps = "midpoint", 2
    data = SpiralDataModule(count=8, batch_size=4)
    module: Any = zoo.finetune(base, data, epochs=1, out=tmp_path / "run", **QUICK)
    stored: Any = zoo.load(module.finetuned.checkpoint)
    for found in (module, stored):
        assert (found.solver, found.steps) == ("midpoint", 2)
        assert found.config.solver.method == "midpoint"


def test_a_data_module_with_a_path_object(tmp_path: Path) -> None:
    from zoo.data.text import TextDataModule
    from zoo.tasks.language_modeling import LanguageModel

    lm: Any = zoo.load(published.write_weight(tmp_path / "lm"))
    assert isinstance(lm, LanguageModel)
    data = TextDataModule(path=write_text(tmp_path, 60), segment=lm.config.segment, streams=4)  # type: ignore[arg-type]
    module = zoo.finetune(lm, data, epochs=1, out=tmp_path / "run", **QUICK)
    recipe = training.read_recipe(module.finetuned.checkpoint / "recipe.yaml")
    assert recipe.options["data"]["path"] == str(tmp_path / "text.txt")


# --- interrupted and resumed ---------------------------------------------------------------------

_KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tests.tiny_images import TinyClassifier, registered
import zoo
base, data, out, kill = sys.argv[1:]
step = TinyClassifier.training_step
def training_step(self, batch, batch_idx):
    if kill == "kill" and (self.current_epoch, batch_idx) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
TinyClassifier.training_step = training_step
with registered():
    zoo.finetune(base, data, out=out, epochs=3, lr=0.05, overrides=["data.batch_size=8"],
                 accelerator="cpu", devices=1, progress_bar=False)
"""


def test_killed_in_mid_epoch_and_resumed_by_the_same_call(
    base: Path, four: Path, done: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(base), str(four), str(out), "kill"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (out / "checkpoint").exists()
    assert not list(out.rglob("*.part"))
    assert torch.load(out / "last.ckpt", weights_only=True)["epoch"] == 0
    resumed = zoo.finetune(base, four, out=out, **IMAGES)
    assert weights(resumed.finetuned.checkpoint) == weights(done.finetuned.checkpoint)
    assert resumed.finetuned.before == done.finetuned.before
    assert resumed.finetuned.after == done.finetuned.after


def test_another_fine_tuning_does_not_go_on_with_it(done: Any, base: Path, four: Path) -> None:
    before = weights(done.finetuned.checkpoint)
    with pytest.raises(ConfigError, match="Section 'zoo' differs from that of the run in"):
        zoo.finetune(base, four, out=done.finetuned.folder, freeze="encoder", **IMAGES)
    assert weights(done.finetuned.checkpoint) == before


def test_other_epochs_are_another_fine_tuning(done: Any, base: Path, four: Path) -> None:
    before = weights(done.finetuned.checkpoint)
    for epochs in (1, 4):
        with pytest.raises(ConfigError) as caught:
            zoo.finetune(base, four, out=done.finetuned.folder, **{**IMAGES, "epochs": epochs})
        assert str(caught.value) == (
            f"trainer.max_epochs was 3 for the run in {done.finetuned.folder}, and is {epochs}; "
            "resume with the same options, or choose another --out folder."
        )
    assert weights(done.finetuned.checkpoint) == before
    assert training.read_facts(done.finetuned.folder)["epochs"] == 3


def test_a_folder_whose_weights_have_changed_since_is_another_base(
    base: Path, four: Path, tmp_path: Path
) -> None:
    short = {**IMAGES, "epochs": 1}
    folder, out = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    first = zoo.finetune(folder, four, out=out, **short).finetuned
    assert zoo.finetune(folder, four, out=out, **short).finetuned.before == first.before
    changed = zoo.load(base)
    with torch.no_grad():
        changed.network.conv.weight += 1.0
    shutil.rmtree(folder)
    checkpoints.save(changed, folder)
    trained = weights(first.checkpoint)
    with pytest.raises(ConfigError, match="holds a fine-tuning of other weights; choose another"):
        zoo.finetune(folder, four, out=out, **short)
    assert weights(first.checkpoint) == trained
    # Where no epoch came to its end, there is nothing to go on with, and nothing to lose.
    (out / "last.ckpt").unlink()
    shutil.rmtree(first.checkpoint)
    assert weights(zoo.finetune(folder, four, out=out, **short).finetuned.checkpoint) != trained


def repainted(folder: Path) -> None:
    Image.new("RGB", SIZE[::-1], (9, 8, 7)).save(next((folder / "white").iterdir()))


def longer(path: Path) -> None:
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")


def rated_anew(path: Path) -> None:
    path.write_text(path.read_text().replace(",5\n", ",1\n"))


def test_the_digest_of_a_folder_is_of_the_names_and_contents_of_its_visible_pictures(
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path / "a", 6)
    found = files.digest(folder, [".png"])
    assert found == files.digest(shutil.copytree(folder, tmp_path / "b"), [".png"])
    (folder / ".cache").mkdir()
    (folder / ".cache" / "a.png").touch()
    (folder / "notes.md").write_text("Mine.")
    assert files.digest(folder, [".png"]) == found
    assert files.digest(folder) != found
    picture = folder / "left" / "001.png"
    picture.rename(picture.with_name("renamed.png"))
    seen = {found, files.digest(folder, [".png"])}
    shutil.copy(folder / "dark" / "000.png", picture)
    seen.add(files.digest(folder, [".png"]))
    picture.write_bytes(b"other")
    seen.add(files.digest(folder, [".png"]))
    assert len(seen) == 4


def test_the_digest_follows_links_as_the_reader_does(tmp_path: Path) -> None:
    from zoo.data.pictures import read_image_folder

    real = write_folder(tmp_path / "real", 6)
    plain = shutil.copytree(real, tmp_path / "plain")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in CLASSES:
        (linked / name).symlink_to(real / name)
    (real / "left" / "back").symlink_to(linked)
    (real / "left" / "itself").symlink_to(real / "left")
    assert files.digest(linked, [".png"]) == files.digest(plain, [".png"])
    split, classes = read_image_folder(linked, SIZE)
    assert classes == CLASSES
    assert torch.equal(split.images, read_image_folder(plain, SIZE)[0].images)
    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(next((real / "dark").iterdir()), more / "x.png")
    (plain / "dark" / "more").symlink_to(more)
    assert files.digest(plain, [".png"]) != files.digest(linked, [".png"])
    assert len(read_image_folder(plain, SIZE)[0].images) == 7


def test_the_digest_of_plain_folders_is_that_of_runs_that_have_begun(tmp_path: Path) -> None:
    """It is kept in run folders: another one would refuse to go on with them."""
    for name, content in (("b/2.png", b"two"), ("b/sub/1.png", b"one"), ("a b/3.PNG", b"3")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    parts = [b"a b/3.PNG 1 3", b"b/2.png 3 two", b"b/sub/1.png 3 one"]
    assert files.digest(tmp_path, [".png"]) == hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize(
    ("kind", "change"), [("images", repainted), ("text", longer), ("ratings", rated_anew)]
)
def test_data_that_have_changed_since_are_refused(
    kind: str, change: Any, base: Path, four: Path, rated: Path, tmp_path: Path
) -> None:
    short: dict[str, Any] = {"epochs": 1, "out": tmp_path / "run", **QUICK}
    if kind == "images":
        start, data = base, shutil.copytree(four, tmp_path / "data")
    elif kind == "text":
        start, data = published.write_weight(tmp_path / "lm"), write_text(tmp_path, 60)
    else:
        start, data = rated, ratings_of(tmp_path, ("u1", "u2", "u4"), ("i1", "i2", "i3", "i4"))
    first = zoo.finetune(start, data, **short).finetuned
    assert zoo.finetune(start, data, **short).finetuned.after == first.after
    change(data)
    trained, said = weights(first.checkpoint), (first.folder / "before.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        zoo.finetune(start, data, **short)
    assert str(caught.value) == (
        f"The data have changed since the fine-tuning in {first.folder} began; choose another "
        "`out`."
    )
    assert weights(first.checkpoint) == trained
    assert (first.folder / "before.json").read_bytes() == said
    # A run from before this was kept goes on.
    older = {key: value for key, value in json.loads(said).items() if key != "data"}
    (first.folder / "before.json").write_text(json.dumps(older))
    zoo.finetune(start, data, **short)


def test_a_module_in_memory_goes_on_with_its_own_run_alone(
    base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is named after the data, whichever weights the module has."""
    monkeypatch.chdir(tmp_path)
    short = {**IMAGES, "epochs": 1, "lr": 0.01}
    module = zoo.load(base, num_classes=4, seed=1)
    first = zoo.finetune(module, four, **short).finetuned
    trained = weights(first.checkpoint)
    again = zoo.finetune(zoo.load(base, num_classes=4, seed=1), four, **short).finetuned
    assert (again.folder, again.before) == (first.folder, first.before)
    with torch.no_grad():
        module.network.conv.weight += 1.0
    for other in (module, zoo.load(base, num_classes=4, seed=2)):
        with pytest.raises(ConfigError) as caught:
            zoo.finetune(other, four, **short)
        assert str(caught.value) == (
            f"{first.folder} holds a fine-tuning of other weights; choose another `out`."
        )
    assert weights(first.checkpoint) == trained
    moved = zoo.finetune(module, four, out="other", **short).finetuned
    assert weights(moved.checkpoint) != trained


def test_a_run_from_before_an_option_existed_goes_on() -> None:
    before = {"model": {"lr": 1.0}, "x": None}
    assert training._agree(before, {"model": {"lr": 1.0, "layer_decay": None}, "x": None})
    assert not training._agree(before, {"model": {"lr": 1.0, "layer_decay": 0.5}, "x": None})
    stored = to_json(FineTuning(base_model="a"))
    assert "recompute_blocks" not in stored, "a recipe without it is that of a run without it"
    assert training._agree(stored, to_json(FineTuning(base_model="a", recompute_blocks=False)))
    assert not training._agree(stored, to_json(FineTuning(base_model="a", recompute_blocks=True)))
    assert not training._agree(before, {"model": {"lr": 2.0}, "x": None})
    assert not training._agree({"model": {"lr": 1.0, "gone": 1}}, {"model": {"lr": 1.0}})


# --- bad input -----------------------------------------------------------------------------------


def pictures(folder: Path, *names: str) -> Path:
    for name in names:
        write = folder / name
        write.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(write / "1.png")
        Image.new("RGB", (4, 4)).save(write / "2.png")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def damaged(folder: Path) -> Path:
    pictures(folder, "a", "b")
    (folder / "a" / "1.png").write_bytes(b"not a picture")
    return folder


def linked_to_nothing(folder: Path) -> Path:
    pictures(folder, "a", "b")
    (folder / "a" / "3.png").symlink_to(folder / "gone.png")
    return folder


def file(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


PICTURES = {
    "empty": (empty, {}, "is empty; give one of: a folder with one folder of pictures"),
    "one class": (lambda f: pictures(f, "a"), {}, "has one folder, 'a'; it needs one folder"),
    "no picture": (lambda f: (pictures(f, "a", "b"), (f / "c").mkdir(), f)[2], {},
                   "c has no pictures."),
    "unreadable": (damaged, {}, "1 of 4 pictures cannot be read: "),
    "missing": (lambda f: f / "no", {}, "There is no file or folder "),
    "a text": (lambda f: file(f, "a.txt", b"text"), {},
               "learns from a folder with one folder of pictures for each class, but "),
    "one picture": (lambda f: pictures(f, "a") / "a" / "1.png", {},
                    "1.png is one picture; give a folder with one folder of pictures for each"),
    "classes": (lambda f: pictures(f, "a", "b"), {"num_classes": 3},
                "The data have 2 classes (a, b), but the head is for 3: give num_classes=2, or"),
    "pattern": (lambda f: pictures(f, "a", "b"), {"freeze": ["nrom"]},
                "Nothing in TinyNet is called 'nrom'. Did you mean 'norm'"),
    "nothing left": (lambda f: pictures(f, "a", "b"), {"freeze": "*"},
                     "freeze='*' leaves nothing to train."),
    "adapters": (lambda f: pictures(f, "a", "b"), {"adapters": "lora", "target": "haed"},
                 "No layer 'haed' for an adapter. Did you mean 'head'? There are: head."),
    "kind": (lambda f: pictures(f, "a", "b"), {"adapters": "dora"}, "zoo.finetune: adapters: "),
    "both": (lambda f: pictures(f, "a", "b"), {"adapters": "lora", "freeze": "encoder"},
             "adapters freeze everything else, so freeze must be left out"),
    "target": (lambda f: pictures(f, "a", "b"), {"target": "head"}, "target is for adapters"),
    "nothing to freeze": (lambda f: pictures(f, "a", "b"), {"freeze": []},
                          "freeze is an empty list; name something, or leave it out"),
    "no target": (lambda f: pictures(f, "a", "b"), {"adapters": "lora", "target": []},
                  "target is an empty list; name something, or leave it out"),
    "rank": (lambda f: pictures(f, "a", "b"), {"rank": 8}, "rank is for adapters; choose lora"),
    "no rank": (lambda f: pictures(f, "a", "b"), {"rank": 0}, "rank is for adapters; choose lora"),
    "alpha": (lambda f: pictures(f, "a", "b"), {"alpha": -1.0}, "alpha is for adapters; choose"),
    "blocks": (lambda f: pictures(f, "a", "b"), {"recompute_blocks": True},
               "recompute_blocks: TinyNet has no blocks that can be computed again; a network "),
    "epochs": (lambda f: pictures(f, "a", "b"), {"epochs": 0},
               "epochs must be an integer of at least 1, got 0"),
    "half an epoch": (lambda f: pictures(f, "a", "b"), {"epochs": 1.5},
                      "epochs must be an integer of at least 1, got 1.5"),
    "epochs in words": (lambda f: pictures(f, "a", "b"), {"epochs": "3"},
                        "epochs must be an integer of at least 1, got '3'"),
    "no number": (lambda f: pictures(f, "a", "b"), {"epochs": True},
                  "epochs must be an integer of at least 1, got True"),
    "rate": (lambda f: pictures(f, "a", "b"), {"lr": math.inf}, "lr must be positive and finite"),
    "weights": (lambda f: pictures(f, "a", "b"), {"weight_decay": math.nan},
                "weight_decay must be finite and not negative, got nan"),
    "decay": (lambda f: pictures(f, "a", "b"), {"layer_decay": 2.0}, "layer_decay must be in (0"),
    "no number of classes": (lambda f: pictures(f, "a", "b"), {"num_classes": "2"},
                             "num_classes must be a whole number, got '2'"),
    "one of a kind": (lambda f: pictures(f, "a", "b"), {"num_classes": 1},
                      "num_classes must be at least 2, got 1"),
    "name": (lambda f: pictures(f, "a", "b"), {"name": 5}, "name must be a text, or None for one "),
    "folder": (lambda f: pictures(f, "a", "b"), {"out": 5},
               "out must be the path of a folder, or None, got 5"),
    "override": (lambda f: pictures(f, "a", "b"), {"overrides": ["dta.x=1"]},
                 "Unknown section 'dta'"),
    "one override": (lambda f: pictures(f, "a", "b"), {"overrides": "data.batch_size=8"},
                     "overrides must be a list, as ['data.batch_size=16'], got 'data.batch_size"),
    "no weight": (lambda f: pictures(f, "a", "b"), {"overrides": ["zoo.weight=foo"]},
                  "The weight cannot be called 'foo': zoo.weight must be tiny-classifier.NAME, "),
    "weight": (lambda f: pictures(f, "a", "b"), {"overrides": ["zoo.weight=tiny-classifier.x y"]},
               "The weight cannot be called 'tiny-classifier.x y': zoo.weight must be "),
    "nothing kept": (lambda f: pictures(f, "a", "b"), {"overrides": ["trainer.fast_dev_run=true"]},
                     "trainer.fast_dev_run keeps no weights, so nothing could be measured: "),
    "no batch": (lambda f: pictures(f, "a", "b"), {"overrides": ["trainer.limit_train_batches=0"]},
                 "trainer.limit_train_batches=0 leaves nothing to train; leave it out."),
    "no step": (lambda f: pictures(f, "a", "b"), {"overrides": ["trainer.max_steps=0"]},
                "trainer.max_steps=0 leaves nothing to train; leave it out."),
    "no time": (lambda f: pictures(f, "a", "b"), {"overrides": ["trainer.max_time=00:00:00:00"]},
                "trainer.max_time=00:00:00:00 leaves nothing to train; leave it out."),
    "other classes": (lambda f: pictures(f, "a", "b"),
                      {"overrides": ["model.network.num_classes=7"]},
                      "model.network.num_classes=7: the data have 2, and they decide; leave it"),
    "channels": (lambda f: pictures(f, "a", "b"), {"overrides": ["data.channels=1"]},
                 "The pictures have 1 channels, and tiny-classifier.made takes 3: set data.channe"),
    "encoder and more": (lambda f: pictures(f, "a", "b"), {"freeze": ["encoder", "norm"]},
                         "'encoder' stands for all but the head where it is given alone, and "),
    "nothing to read": (lambda f: "", {}, "The path of the data is empty; give a file or a folder"),
    "frozen number": (lambda f: pictures(f, "a", "b"), {"freeze": 5},
                      "freeze must be a text or a list of texts, got 5"),
    "target number": (lambda f: pictures(f, "a", "b"), {"adapters": "lora", "target": 5},
                      "target must be a text or a list of texts, got 5"),
    "seed in words": (lambda f: pictures(f, "a", "b"), {"seed": "1"},
                      "seed must be a whole number, got '1'"),
    "seed": (lambda f: pictures(f, "a", "b"), {"seed": -1}, "seed must be at least 0, got -1"),
    "large seed": (lambda f: pictures(f, "a", "b"), {"seed": 2**32},
                   "seed must be less than 2**32, got 4294967296"),
    "bar": (lambda f: pictures(f, "a", "b"), {"progress_bar": "no"},
            "progress_bar must be True or False, got 'no'"),
    "licence": (lambda f: pictures(f, "a", "b"), {"data_license": None},
                "data_license must be a text, got None"),
    "dangling": (lambda f: linked_to_nothing(f), {}, "1 of 5 pictures cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("case", PICTURES)
def test_bad_input_is_one_line_before_anything_starts(
    case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightning.pytorch as pl

    def started(*arguments: Any, **options: Any) -> None:
        raise AssertionError("training has started")

    monkeypatch.setattr(pl.Trainer, "fit", started)
    write, options, message = PICTURES[case]
    data = write(tmp_path / "data")
    with pytest.raises(ZooError) as caught:
        zoo.finetune(base, data, **{**QUICK, "out": tmp_path / "run", **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".yaml" not in str(caught.value), "there is no such file"
    assert not (tmp_path / "run").exists()


def test_a_module_whose_head_is_for_other_classes(base: Path, four: Path, tmp_path: Path) -> None:
    """It gets a fresh head as a name does, and the card says how many logits there are."""
    still = {**IMAGES, "epochs": 1, "freeze": ["head"]}
    module = zoo.load(base)
    with pytest.raises(
        ConfigError, match=r"The data have 4 classes .* but the head is for 7: give"
    ):
        zoo.finetune(module, four, num_classes=7, out=tmp_path / "run", **QUICK)
    found = zoo.finetune(module, four, out=tmp_path / "run", **still)
    assert found.config.num_classes == 4
    fresh = zoo.load(base, num_classes=4, seed=0).network.state_dict()
    for name in HEAD:
        assert torch.equal(found.network.state_dict()[name], fresh[name]), name


@pytest.mark.parametrize(
    ("before", "classes", "after"),
    [
        ("names, or logits B x 10", (10, 2), "names, or logits B x 2"),
        ("names, or logits B x 2 x 10", (10, 3), "names, or logits B x 2 x 3"),
        ("names, or logits B x 2 x 2", (2, 7), "names, or logits B x 2 x 7"),
        ("logits B x 10 of 10 x 10 pixels", (10, 4), "logits B x 4 of 10 x 10 pixels"),
        ("names, or logits B x 100", (10, 2), "names, or logits B x 100"),
    ],
)
def test_a_card_says_how_many_logits_there_are(
    before: str, classes: tuple[int, int], after: str
) -> None:
    from dataclasses import replace

    from tests.tiny_images import TinyClassifier, TinyNetConfig

    old, new = (TinyClassifier(TinyNetConfig(num_classes=count)) for count in classes)
    card = replace(published.card(), output=before)
    assert finetuning._resized(card, old, new).output == after


def test_no_card_is_written_of_a_training_that_diverged(
    base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Any) -> None:
        with torch.no_grad():
            self.network.head.bias.fill_(math.nan)

    monkeypatch.setattr("tests.tiny_images.TinyClassifier.on_train_epoch_end", diverge)
    with pytest.raises(
        ZooError, match=r"^The model's logits are not finite: its training diverged"
    ):
        zoo.finetune(base, four, out=tmp_path / "run", **{**IMAGES, "epochs": 1})
    assert not (tmp_path / "run" / "checkpoint" / CARD_FILE).exists()
    assert not (tmp_path / "run" / "checkpoint" / RESULTS_FILE).exists()


def test_a_checkpoint_folder_is_no_run_folder(base: Path, four: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ZooError) as caught:
        zoo.finetune(folder, four, out=folder, **IMAGES)
    assert str(caught.value) == (
        f"{folder} is a checkpoint folder; choose another --out folder for the run."
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_folder_may_be_in_the_home_and_data_be_called_null(
    base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(four, "null")
    module = zoo.finetune(base, "null", out="~/run", **{**IMAGES, "epochs": 1})
    assert module.finetuned.folder == tmp_path / "home" / "run"
    assert {path.name for path in tmp_path.iterdir()} == {"home", "null"}
    assert {"last.ckpt", "before.json", "checkpoint"} <= {
        path.name for path in module.finetuned.folder.iterdir()
    }
    assert module.preprocessing.classes == ("new 0", "new 1", "new 2", "white")
    assert evaluation.evaluate(module.finetuned.checkpoint).passed


def test_a_recommender_has_no_classes(tmp_path: Path) -> None:
    base = _untrained("dselect-k-recommender", tmp_path)
    new = ratings_of(tmp_path, ("a", "b"), ("1", "2", "3"))
    with pytest.raises(ConfigError, match=r"^Recommender has no classes; leave out num_classes\.$"):
        zoo.finetune(base, new, num_classes=4, out=tmp_path / "run", **QUICK)


def test_a_stored_recipe_names_a_rank_without_adapters() -> None:
    stored = {"base_model": "a", "freeze": None, "adapters": None, "rank": 8, "alpha": None}
    assert build(FineTuning, stored, "recipe.yaml") == FineTuning(base_model="a")


def test_a_csv_without_the_columns(tmp_path: Path) -> None:
    shutil.copytree(_untrained("dselect-k-recommender", tmp_path), tmp_path / "base")
    data = file(tmp_path / "data", "r.csv", b"user,film,rating\n1,2,3\n")
    said = run("finetune", tmp_path / "base", "--data", data, "--out", tmp_path / "run")
    assert said.status == 2
    (line,) = said.err.splitlines()
    assert line.endswith("r.csv has no column 'item'. There are: user, film, rating.")
    assert not (tmp_path / "run").exists()


def _untrained(name: str, folder: Path) -> Path:
    from tests.examples import give_preprocessing
    from zoo.registry import architecture

    module = architecture(name).module_class()()
    give_preprocessing(module)
    checkpoints.save(module, folder / name)
    return folder / name


def test_models_that_are_not_fine_tuned_by_gradient(tmp_path: Path) -> None:
    from zoo.tasks.online_learning import OnlineClassifier

    with pytest.raises(ConfigError, match=r"learns a stream in place: call its learn\("):
        zoo.finetune(OnlineClassifier(), tmp_path, **QUICK)
    with pytest.raises(ConfigError, match="A list is no model of the zoo"):
        zoo.finetune([], tmp_path, **QUICK)  # type: ignore[arg-type]
    flow = _untrained("continuous-flow", tmp_path)
    with pytest.raises(ConfigError, match=r"is for density-estimation; give a data module of zoo"):
        zoo.finetune(flow, tmp_path, **QUICK)


def test_the_seed_of_an_override_is_the_one_that_is_recorded(
    base: Path, four: Path, tmp_path: Path
) -> None:
    changed = [*IMAGES["overrides"], "seed_everything=5"]
    short = {**IMAGES, "epochs": 1, "overrides": changed}
    module = zoo.finetune(base, four, out=tmp_path / "run", **short)
    measured = cards.read_measurements(module.finetuned.checkpoint / RESULTS_FILE)
    assert {result.seeds for result in measured.results} == {(5,)}
    assert measured.training["seed"] == 5


def test_a_run_that_no_fine_tuning_began(base: Path, four: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"of another training")
    with pytest.raises(ConfigError, match=r"a training that no fine-tuning began, without before"):
        zoo.finetune(base, four, out=tmp_path / "run", **IMAGES)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("out", [None, "new 0/run", "white", "."])
def test_a_run_folder_among_the_classes_is_refused(
    out: str | None, base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a class without pictures to the next who reads the folder."""
    monkeypatch.chdir(shutil.copytree(four, tmp_path / "mine"))
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError, match=r"^The run folder .* lies in the data \., of which it"):
        zoo.finetune(base, ".", out=out, **IMAGES)
    assert sorted(Path().rglob("*")) == before


def test_a_run_folder_beside_train_and_test_or_hidden_is_read_by_nobody(
    base: Path, tmp_path: Path
) -> None:
    for part in ("train", "test"):
        write_folder(tmp_path / part, 12)
    write_folder(tmp_path / "classes", 12)
    for data, out in ((tmp_path, "run"), (tmp_path / "classes", ".run")):
        short = {**IMAGES, "epochs": 1, "out": data / out}
        module = zoo.finetune(base, data, **short)
        assert evaluation.evaluate(module.finetuned.checkpoint).passed
        assert zoo.finetune(base, data, **short).finetuned.after == module.finetuned.after


def test_data_of_a_folder_without_a_name_are_called_after_it(
    base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(four, tmp_path / "mine"))
    short = {**IMAGES, "epochs": 1}
    module = zoo.finetune(base, ".", out=tmp_path / "run", **short)
    card = cards.parse((module.finetuned.checkpoint / CARD_FILE).read_text())
    assert (card.name, card.results[0].dataset) == ("tiny-classifier.mine", "mine")
    assert finetuning._source({"path": "new 0/.."}) == "mine"


def test_names_in_other_scripts_stay_apart() -> None:
    names = [
        "\u043a\u043e\u0448\u043a\u0438",
        "\u0441\u043e\u0431\u0430\u043a\u0438",
        "\u732b",
        "mine",
    ]
    slugs = [finetuning._slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(finetuning._TAG.fullmatch(slug) for slug in slugs)
    assert finetuning._slug("Caf\u00e9 2024") == "cafe-2024"
    assert finetuning._slug("v1.2") == "v1-2"


# --- names of the zoo ----------------------------------------------------------------------------

OURS = "cached-transformer-lm.tiny-shakespeare"


def test_the_name_of_a_weight_of_the_zoo_stays_its_own(tmp_path: Path) -> None:
    lm = published.write_weight(tmp_path / "lm")
    data = write_text(tmp_path, 60).rename(tmp_path / "tiny-shakespeare.txt")
    short: dict[str, Any] = {**QUICK, "epochs": 1, "overrides": ["data.streams=4"]}
    for named in ({"name": "tiny-shakespeare"}, {"overrides": [f"zoo.weight={OURS}"]}):
        with pytest.raises(ConfigError) as caught:
            zoo.finetune(lm, data, out=tmp_path / "run", **{**short, **named})
        assert str(caught.value) == (
            f"{OURS} is a weight of the zoo; choose another name for yours."
        )
        assert not (tmp_path / "run").exists()
    module = zoo.finetune(lm, data, out=tmp_path / "run", **short)
    card = cards.parse((module.finetuned.checkpoint / CARD_FILE).read_text())
    assert card.name == f"{OURS}-tuned"


def test_a_folder_is_the_weight_of_the_zoo_with_its_files_only(tmp_path: Path) -> None:
    from tests.tiny import write_recipe as write_recipe_of_text

    other = training.fit(write_recipe_of_text(tmp_path), out=tmp_path / "run").checkpoint
    assert training.read_recipe(other / "recipe.yaml").weight == OURS
    copied = shutil.copytree(cards.pretrained_folder(OURS), tmp_path / "copied")
    assert finetuning._base(other).title == "cached-transformer-lm"
    assert finetuning._base(copied).title == OURS


# --- measured again ------------------------------------------------------------------------------


def test_a_record_made_anew_tells_no_more_than_the_first(
    done: Any, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where folders lie, nor a command that measures another weight."""
    first = cards.read_measurements(done.finetuned.checkpoint / RESULTS_FILE)
    folder = shutil.copytree(done.finetuned.checkpoint, tmp_path / "runs" / "checkpoint")
    evaluation.record(folder)
    text = (folder / RESULTS_FILE).read_text()
    assert str(tmp_path) not in text
    assert str(four) not in text
    (found,) = cards.read_measurements(folder / RESULTS_FILE).results
    assert found.dataset == first.results[0].dataset == four.name
    assert found.command == "zoo evaluate runs/checkpoint"
    monkeypatch.chdir(tmp_path / "runs")
    evaluation.record("checkpoint")
    (found,) = cards.read_measurements(folder / RESULTS_FILE).results
    assert found.command == "zoo evaluate checkpoint"
    assert first.results[0].command == "zoo evaluate run/checkpoint"


def test_data_that_have_moved_are_found_in_the_folder_that_is_given(
    base: Path, four: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(four, tmp_path / "mine")
    short = {**IMAGES, "epochs": 1, "out": tmp_path / "run"}
    checkpoint = zoo.finetune(base, data, **short).finetuned.checkpoint
    (tmp_path / "moved").mkdir()
    data.rename(tmp_path / "moved" / "mine")
    assert evaluation.evaluate(checkpoint, tmp_path / "moved").passed
    for elsewhere in (None, tmp_path):
        with pytest.raises(DataError) as caught:
            evaluation.evaluate(checkpoint, elsewhere)
        assert str(caught.value) == (
            f"There is no {data}, which the recipe says this weight was trained on; give as "
            "--data-dir a folder that has 'mine'."
        )


def test_a_run_folder_says_where_its_weights_are(done: Any, four: Path, tmp_path: Path) -> None:
    folder = done.finetuned.folder
    for use in (zoo.load, lambda model: zoo.finetune(model, four, out=tmp_path / "run", **QUICK)):
        with pytest.raises(ZooError) as caught:
            use(folder)
        assert str(caught.value) == (
            f"{folder} is a run folder; its weights are in {folder / 'checkpoint'}."
        )


def test_a_data_module_of_ones_own(base: Path, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Mine(pl.LightningDataModule):
        pass

    with pytest.raises(ConfigError, match=r"Mine is no data module of the zoo, .* use zoo\.tuning"):
        zoo.finetune(base, Mine(), out=tmp_path / "run", **QUICK)


def test_a_base_of_another_architecture(four: Path, done: Any, tmp_path: Path) -> None:
    recipe = done.finetuned.checkpoint / "recipe.yaml"
    other = published.write_weight(tmp_path / "lm")
    text = recipe.read_text().replace(
        str(training.read_recipe(recipe).finetune.base_model), str(other)
    )  # type: ignore[union-attr]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is a LanguageModel, and the recipe is for a TinyClass"):
        training.fit(tmp_path / "r.yaml", out=tmp_path / "run")


@pytest.mark.parametrize(("name", "kind"), [("a.csv", "ratings"), ("a.CSV", "ratings"),
                                            ("a.txt", "text"), ("a", "text")])  # fmt: skip
def test_kinds_of_data(name: str, kind: str, tmp_path: Path) -> None:
    assert finetuning.detect(file(tmp_path, name, b"x")) == kind
    assert finetuning.detect(tmp_path) == "images"
    with pytest.raises(DataError, match="There is no file or folder"):
        finetuning.detect(tmp_path / "b" / "c")


def test_a_name_is_kept_whole_and_data_lend_theirs(
    base: Path, four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a file has a suffix to leave out."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(four, "data.2024")
    assert finetuning._source({"path": "data.2024"}) == "data.2024"
    assert finetuning._source({"path": str(file(tmp_path / "x", "v1.2.csv", b"x"))}) == "v1.2"
    assert finetuning._source({"path": None, "dataset": "mnist"}) == "mnist"
    assert finetuning._source({"path": None}) == ""
    short = {**IMAGES, "epochs": 1}
    for name, tag in (("v1.2", "v1-2"), (None, "data-2024")):
        module = zoo.finetune(base, "data.2024", name=name, **short)
        assert module.finetuned.folder == Path(f"runs/tiny-classifier.{tag}")


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """The validation loss after every step, and the weights, at equal global batch."""
    lm = published.write_weight(tmp_path / "lm")
    text = write_text(tmp_path, 60)
    said = {}
    for name, words in {
        "one": ["--devices", "1"],
        "two": ["--devices", "2", "--strategy", "ddp"],
    }.items():
        command = [
            "finetune",
            lm,
            "--data",
            text,
            "--epochs",
            "2",
            "--out",
            tmp_path / name,
            *words,
        ]
        options = ["--accelerator", "cpu", "data.streams=4", "trainer.val_check_interval=1"]
        done = subprocess.run(
            [sys.executable, "-m", "zoo.cli", *map(str, command), *options, "--json"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said[name] = json.loads(done.stdout)
    curves = {name: figures.read_metrics(tmp_path / name)["val_loss"] for name in said}
    assert len(curves["one"]) >= 10
    assert [step for step, _ in curves["two"]] == [step for step, _ in curves["one"]]
    values = [[value for _, value in curves[name]] for name in ("one", "two")]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[0][-1] < values[0][0]
    one, two = (tensors(tmp_path / name / "checkpoint") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    for key in ("n", "protocol"):
        assert [o[key] for o in said["one"]["after"]] == [o[key] for o in said["two"]["after"]]
