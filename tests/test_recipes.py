"""Tests of the recipes: each of them trains, is measured and predicts, and agrees with its card."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import example
from tests.tiny import LESS_DATA, OWN_SUITE, SHRUNK
from zoo import cards, checkpoints, controls, evaluation, training
from zoo.configs import build
from zoo.registry import ARCHITECTURES, architecture
from zoo.training import Recipe, read_recipe

FOLDER = cards.shipped_folder("recipes")
ALL = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
RECIPES = [name for name in ALL if read_recipe(FOLDER / name).architecture not in OWN_SUITE]
PUBLISHED = [name for name in RECIPES if "/" not in name]
WEIGHTS = list(cards.load_cards())
STUDIES = {"dselect-k-recommender.movielens-100k-pairs", "dselect-k-recovery.synthetic"}
"""Comparisons that no weight is published of."""
TO_TRAIN = {"sau-shufflenet-v2-x2.cifar100"}
"""Weights that have a recipe and are still to be trained; they have no card before."""


def shrunk(name: str) -> Recipe:
    recipe = read_recipe(FOLDER / name)
    assert recipe.architecture in SHRUNK, f"add {recipe.architecture!r} to tests/tiny.py"
    overrides = [*SHRUNK[recipe.architecture], *LESS_DATA[recipe.data]]
    recipe = read_recipe(FOLDER / name, overrides)
    anchor = recipe.options["model"]["network"].get("anchor", {})
    if anchor.get("projection"):  # where there is none, there shall be none
        anchor["projection"] = 8
    return recipe


def built(recipe: Recipe) -> Any:
    return training.instantiate(recipe, logger=False, enable_progress_bar=False)


# --- every recipe, on little data ----------------------------------------------------------------


def test_every_recipe_is_covered() -> None:
    """One for each weight, and for each weight the model and at least one control."""
    assert not TO_TRAIN & {*WEIGHTS}, "it is trained: take it out of the list"
    assert {Path(name).stem for name in PUBLISHED} == {*WEIGHTS, *TO_TRAIN}
    # Recipes of nets that are not published: there is no weight, and so no card.
    experiments = [name for name in RECIPES if name.startswith("experiments/")]
    assert not any(read_recipe(FOLDER / name).weight for name in experiments)
    others = [name for name in RECIPES if name not in (*PUBLISHED, *experiments)]
    assert {name.split("/")[1] for name in others} == {*WEIGHTS, *TO_TRAIN, *STUDIES}
    assert all(name.split("/")[0] == "controls" and name.count("/") == 2 for name in others)
    assert len(RECIPES) == len(PUBLISHED) + len(experiments) + len(others)
    assert len(RECIPES) >= 3 * len(WEIGHTS) > 0
    used = {read_recipe(FOLDER / name).architecture for name in RECIPES}
    built_in = {name for name, entry in ARCHITECTURES.items() if entry.module[:4] == "zoo."}
    assert used == built_in - {*OWN_SUITE}
    left_out = [name for name in ALL if name not in RECIPES]
    assert {read_recipe(FOLDER / name).architecture for name in left_out} == {*OWN_SUITE}


# Shrunk, the controls of the other streams are those of split-mnist.
ALIKE = tuple(f"controls/online-ensemble.split-{name}/" for name in ("cifar100", "fashion-mnist"))


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(ALIKE)])
def test_fit_evaluate_and_predict(name: str, tmp_path: Path) -> None:
    run = training.fit(shrunk(name), out=tmp_path / "run")
    module = checkpoints.load(run.checkpoint)
    assert module.load_report.dropped == module.load_report.initialised == ()
    for parameter in module.network.parameters():
        assert parameter.isfinite().all()
    facts = training.read_facts(run.folder)
    assert facts["steps"] >= 1
    evaluated = evaluation.evaluate(run.checkpoint)
    measured = [o.protocol for o in evaluated.outcomes]
    assert measured == list(module.protocols_on(run.datamodule))
    for outcome in evaluated.outcomes:
        assert outcome.n > 0
        assert math.isfinite(outcome.value)
        assert outcome.interval[0] <= outcome.value <= outcome.interval[1]
    assert len(module.predict(example(module).predict)) == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_moves_every_parameter(name: str, tmp_path: Path) -> None:
    recipe = shrunk(name)
    recipe.options["trainer"]["limit_train_batches"] = 6
    recipe.options["trainer"]["max_epochs"] = 2
    torch.manual_seed(0)
    before = built(recipe).model.network.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    run = training.fit(recipe, out=tmp_path / "run")
    trained = {n for n, p in run.module.network.named_parameters() if p.requires_grad}
    if recipe.architecture == "online-ensemble":  # behind a frozen encoder, and in closed form
        trained = {n for n in before if n.startswith("learner.") and n.endswith("gram")}
    assert trained
    for key, value in run.module.network.state_dict().items():
        assert key not in trained or not torch.equal(value, before[key]), key


# --- recipes and cards ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_card_and_its_recipe_agree(name: str) -> None:
    card = cards.find(name)
    path = FOLDER / card.recipe
    assert path.name == f"{name}.yaml"
    assert path.read_text(encoding="utf-8").splitlines()[0] == f"# zoo fit {name}"
    recipe = read_recipe(path)
    assert (recipe.weight, recipe.architecture) == (name, card.architecture)
    cli = built(recipe)
    config = build(type(cli.model.config), card.config, name)
    if card.task == "online-learning":  # its classes came with the stream
        known = checkpoints.load(cards.pretrained_folder(name)).preprocessing
        assert config.num_classes == len(known.classes)
        config = dataclasses.replace(config, num_classes=cli.model.config.num_classes)
    assert cli.model.config == config
    assert card.results[0].seeds == (recipe.options["seed_everything"],)
    folder = cards.pretrained_folder(name)
    if folder.is_dir():  # what is stored beside the weights is the recipe, resolved
        stored = training._resolved(built(read_recipe(folder / "recipe.yaml")), recipe)
        resolved = training._resolved(cli, recipe)
        for section in ("zoo", "seed_everything", "model", "data"):
            assert stored[section] == resolved[section], section


@pytest.mark.parametrize("name", WEIGHTS)
def test_controls_differ_from_the_model_in_the_network_alone(name: str) -> None:
    paths = controls.find_recipes(name)
    model, *others = (read_recipe(path) for path in paths)
    assert others
    assert "base:" not in paths[0].read_text(encoding="utf-8")
    trainer = read_recipe(name).options["trainer"]
    as_the_weight = {key: trainer.get(key) for key in ("max_epochs", "precision")}
    of_full_length = {stem for r in others if r.against for stem in (r.path.stem, r.against)}
    for path, recipe in zip(paths, (model, *others), strict=True):
        text = path.read_text(encoding="utf-8")
        assert text.splitlines()[0].split(" --seeds")[0] == f"# zoo controls {name}"
        assert recipe.name
        assert recipe.differs
        assert not recipe.weight, "a control is not published under the name of the weight"
        family = architecture(recipe.architecture).family
        assert family == cards.find(name).family
        for section in ("seed_everything", "data"):
            assert recipe.options[section] == model.options[section], f"{path.name}: {section}"
        # One that is cheaper by the step may have more of them, and says so.
        more = {"max_epochs"} if "times as many steps" in recipe.differs else set()
        if path.stem in of_full_length:  # it is trained as the weight is, on its machine perhaps
            more = {*as_the_weight}
            assert {key: recipe.options["trainer"].get(key) for key in more} == as_the_weight
        trainers = [{k: v for k, v in r.options["trainer"].items() if k not in more}
                    for r in (recipe, model)]  # fmt: skip
        assert trainers[0] == trainers[1], path.name
    for recipe in others:
        the_weight = recipe.path.stem in {r.against for r in others}
        assert (recipe.options["model"] == model.options["model"]) == the_weight, recipe.path
        # What is another kind of network is tuned by itself, and says so.
        kinds, optimizers = (
            [r.options["model"].get(key) for r in (recipe, model)]
            for key in ("network", "optimizer")
        )
        other = recipe.architecture != model.architecture or (
            kinds[0] and kinds[0].get("kind") != kinds[1].get("kind")
        )
        said = re.search("decay|its own learning rate", recipe.differs)
        assert optimizers[0] == optimizers[1] or (other and said), recipe.path
    names = [recipe.name for recipe in (model, *others)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_control_is_on_the_card_with_equal_budget(name: str) -> None:
    card = cards.find(name)
    recorded = {control.recipe for control in card.controls}
    expected = {path.relative_to(FOLDER).as_posix() for path in controls.find_recipes(name)}
    assert recorded == expected
    seeds = card.controls[0].result.seeds
    assert len(seeds) >= 3
    # Controls that a first look with one seed has set aside are not trained with all of them.
    assert all(set(control.result.seeds) <= {*seeds} for control in card.controls)
    for control in card.controls:
        recipe = read_recipe(FOLDER / control.recipe)
        assert (control.name, control.differs) == (recipe.name, recipe.differs)
        network = built(recipe).model.network
        if card.task == "online-learning":
            network.learner.grow(card.config["num_classes"])
        assert control.parameters == sum(p.numel() for p in network.parameters())
