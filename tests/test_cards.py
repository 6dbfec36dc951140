"""Tests of zoo.cards."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from zoo import cards
from zoo.cards import Card, Control, HubLocation, Measurements, Paper, Reported, Result
from zoo.configs import build, to_json
from zoo.errors import CheckpointError, ConfigError, UnknownNameError, ZooError
from zoo.files import CHECKPOINT_FILES, FileRecord, write_json

REPOSITORY = Path(__file__).parents[1]

BODY = """# A model

<!-- zoo:results --><!-- /zoo:results -->
<!-- zoo:controls --><!-- /zoo:controls -->
<!-- zoo:reported --><!-- /zoo:reported -->
<!-- zoo:files --><!-- /zoo:files -->

Limits: it is | tiny.
"""


def make_result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "metric": "accuracy",
        "value": 81.5,
        "unit": "image",
        "n": 10_000,
        "interval": (80.7, 82.2),
        "interval_method": "Wilson",
        "seeds": (1, 2, 3),
        "seed_spread": 0.2,
        "tolerance": 1e-5,
        "protocol": "whole | test set",
        "dataset": "fashion-mnist",
        "split": "test",
        "command": "zoo evaluate alpha.one",
        "date": "2026-01-31",
        "versions": {"torch": "2.10.0"},
        "primary": True,
    }
    return Result(**{**values, **changes})


def make_card(**changes: Any) -> Card:
    values: dict[str, Any] = {
        "architecture": "alpha",
        "weight": "one",
        "default": True,
        "recipe": "alpha.one.yaml",
        "input": "images: float32 (batch, 3, 32, 32)",
        "output": "logits: float32 (batch, 10)",
        "code_license": "apache-2.0",
        "weights_license": "apache-2.0",
        "data_license": "mit",
        "datasets": ("zalando-datasets/fashion_mnist",),
        "hub": HubLocation(repo_id="someone/alpha", revision="0" * 40),
        "paper": Paper(title="A: paper", authors="A. Author", year=2024, url="https://x.example"),
        "reported": (
            Reported(
                metric="accuracy",
                value=80.0,
                unit="image",
                source="Table 1",
                evidence="verified",
                difference="other augmentation",
            ),
        ),
        "family": "greek",
        "task": "language-modeling",
        "parameters": 1234,
        "config": {"width": 2, "nested": {"rate": 1e-5}},
        "files": (FileRecord(name="config.json", size=3, sha256="a" * 64),),
        "results": (make_result(), make_result(metric="loss", unit="image", primary=False)),
        "training": {"source_commit": "b" * 40},
        "body": BODY,
    }
    return Card(**{**values, **changes})


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four cards that stands for the installation's own."""
    monkeypatch.setattr(cards, "shipped_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(cards, "pretrained_folder", lambda name: tmp_path / "pretrained" / name)
    folder = tmp_path / "model_cards"
    folder.mkdir()
    for card in [
        make_card(),
        make_card(weight="two", default=False, parameters=10, weights_license="mit"),
        make_card(architecture="beta", family="latin", default=False, task="vision"),
        make_card(architecture="beta", weight="two", family="latin", default=False, task="vision"),
    ]:
        (folder / f"{card.name}.md").write_text(cards.render(card))
    return tmp_path


# --- the file ------------------------------------------------------------------------------------


def test_a_card_survives_rendering_and_parsing() -> None:
    card = make_card()
    assert cards.parse(cards.render(card)) == card
    assert cards.render(cards.parse(cards.render(card))) == cards.render(card)


def test_a_card_can_be_typed_without_what_is_computed() -> None:
    typed = make_card()
    block = to_json(typed)
    body = block.pop("body")
    computed = ("family", "task", "parameters", "config", "files", "results", "training")
    for key in [*computed, "controls"]:
        del block[key]
    card = cards.parse(f"---\n{yaml.safe_dump({'zoo': block})}---\n{body}")
    assert card.name == "alpha.one"
    with pytest.raises(ConfigError, match=r"no results: zoo card alpha\.one --update"):
        _ = card.primary


def test_the_front_matter_has_the_keys_of_the_hub() -> None:
    front_matter = yaml.safe_load(cards.render(make_card()).split("---\n")[1])
    assert front_matter["license"] == "apache-2.0"
    assert front_matter["library_name"] == "zoo"
    assert front_matter["pipeline_tag"] == "text-generation"
    assert front_matter["datasets"] == ["zalando-datasets/fashion_mnist"]
    assert {"greek", "language-modeling"} <= set(front_matter["tags"])
    (entry,) = front_matter["model-index"]
    assert entry["name"] == "alpha.one"
    assert [result["metrics"][0]["value"] for result in entry["results"]] == [81.5, 81.5]
    tokens = yaml.scan(cards.render(make_card()).split("---\n")[1])
    assert not any(isinstance(token, (yaml.AliasToken, yaml.AnchorToken)) for token in tokens)


def test_a_weight_that_was_trained_on_from_another_names_it() -> None:
    from huggingface_hub import ModelCard

    card = make_card(base_model="someone/base")
    assert cards.parse(cards.render(card)) == card
    data: Any = ModelCard(cards.render(card)).data
    assert data.base_model == "someone/base"
    assert "base_model" not in cards.render(make_card())


def test_the_model_index_is_what_the_hub_client_reads() -> None:
    from huggingface_hub import ModelCard

    data: Any = ModelCard(cards.render(make_card())).data
    assert data.model_name == "alpha.one"
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("accuracy", 81.5),
        ("loss", 81.5),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("---\nlicense", "license", "begins with YAML front matter"),
        ("zoo:\n", "zooo:\n", "no block 'zoo:'"),
        ("zoo:\n", "zoo: [\n", "not valid YAML"),
        ("  weight: one", "  wieght: one", "unknown key 'wieght'. Did you mean 'weight'?"),
        ("  weights_license: apache-2.0\n", "", "missing key 'weights_license'"),
        ("  data_license: mit\n", "", "missing key 'data_license'"),
        ("  default: true", "  default: 1", "default: expected bool, got 1 (int)"),
        ("a" * 64, "a" * 63, "sha256 of config.json is not 64 hex digits"),
        (f"    sha256: {'a' * 64}\n", "", "files.0: missing key 'sha256'"),
        ("name: config.json", "name: ../config.json", "'../config.json' is not a plain file name"),
        ("name: config.json", "name: /etc/passwd", "'/etc/passwd' is not a plain file name"),
        ("size: 3", "size: -3", "size of config.json is negative"),
        ("'" + "0" * 40 + "'", "main", "revision is not a commit of 40 hex digits: 'main'"),
        ("n: 10000", "n: 0", "n must be at least 1"),
        ("date: '2026-01-31'", "date: 31 Jan", "date must be YYYY-MM-DD"),
        ("- 80.7", "- 99.0", "interval is upside down"),
    ],
)
def test_a_bad_card_is_refused_in_one_line(old: str, new: str, message: str) -> None:
    text = cards.render(make_card())
    assert old in text
    with pytest.raises(ConfigError) as caught:
        cards.parse(text.replace(old, new, 1), where="alpha.one.md")
    assert message in str(caught.value)
    assert str(caught.value).startswith("alpha.one.md: ")
    assert "\n" not in str(caught.value)


def test_yaml_that_constructs_objects_is_refused(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    text = f"---\nzoo: !!python/object/apply:pathlib.Path.touch [{witness}]\n---\n"
    with pytest.raises(ConfigError, match="not valid YAML"):
        cards.parse(text)
    assert not witness.exists()


@pytest.mark.parametrize("flags", [(False,), (True, True)])
def test_exactly_one_result_is_primary(flags: tuple[bool, ...]) -> None:
    results = tuple(make_result(primary=flag) for flag in flags)
    with pytest.raises(ValueError, match="exactly one result must be primary"):
        Measurements(weight="alpha.one", results=results)


# --- finding -------------------------------------------------------------------------------------


def test_find_by_full_name_and_by_architecture(shelf: Path) -> None:
    assert cards.find("alpha.two").weight == "two"
    assert cards.find("alpha") == cards.find("alpha.one") == cards.info("alpha.one")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alhpa", r"Unknown model 'alhpa'\. Did you mean 'alpha'"),
        ("alpha.oen", r"Unknown model 'alpha\.oen'\. Did you mean 'alpha\.one'"),
        ("qqqqqq", r"Unknown model 'qqqqqq'\. `zoo list` shows all there are"),
        ("beta", r"'beta' is not the full name of a weight: say 'beta\.one' or 'beta\.two'"),
        ("two", r"'two' is not the full name of a weight: say 'alpha\.two' or 'beta\.two'"),
    ],
)
def test_a_name_that_fits_none_or_several(shelf: Path, name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        cards.find(name)


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        ({}, ["alpha.one", "alpha.two", "beta.one", "beta.two"]),
        ({"include": "*.two"}, ["alpha.two", "beta.two"]),
        ({"include": ["alpha", "*.two"]}, ["alpha.one", "alpha.two", "beta.two"]),
        ({"include": "*.two", "exclude": "beta*"}, ["alpha.two"]),
        ({"exclude": "*"}, []),
        ({"include": "nothing*"}, []),
        ({"task": "vision"}, ["beta.one", "beta.two"]),
        ({"family": "greek", "max_params": 10}, ["alpha.two"]),
        ({"licence": "mit"}, ["alpha.two"]),
    ],
)
def test_list_models(shelf: Path, conditions: dict[str, Any], names: list[str]) -> None:
    assert cards.list_models(**conditions) == names


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"task": "visoin"}, "No model has the task 'visoin'. Did you mean 'vision'?"),
        ({"family": "x"}, "No model has the family 'x'. There are: greek, latin."),
        ({"licence": "gpl"}, "No model has the licence 'gpl'."),
    ],
)
def test_a_condition_that_no_model_can_meet(
    shelf: Path, conditions: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(message)):
        cards.list_models(**conditions)


def test_a_card_must_be_named_after_its_weight(shelf: Path) -> None:
    (shelf / "model_cards" / "alpha.one.md").rename(shelf / "model_cards" / "alpha.three.md")
    with pytest.raises(ConfigError, match=r"alpha\.three\.md: the card says it is 'alpha\.one'"):
        cards.load_cards()


# --- what is computed ----------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """A checkpoint folder of the card "alpha.one", as far as cards look at it."""
    folder.mkdir(parents=True)
    control = Control(
        name="without",
        differs="no cache",
        recipe="controls/alpha.one/without.yaml",
        parameters=1000,
        macs=2000,
        speed="3 images/s",
        result=make_result(value=0.125, unit="image", primary=False, cpu_minutes=7.6),
        difference=0.5,
        difference_interval=(0.25, 0.75),
    )
    measurements = Measurements(
        weight="alpha.one",
        results=(make_result(value=90.25),),
        controls=(control,),
        training={"steps": 5, "source_commit": "c" * 40},
    )
    config = {
        "format_version": 1,
        "architecture": "alpha",
        "family": "hebrew",
        "task": "vision",
        "network": {"width": 3},
    }
    write_json(folder / "config.json", config)
    write_json(folder / "results.json", to_json(measurements))
    (folder / "recipe.yaml").write_text("zoo: {}\n")
    save_file({"w": torch.zeros(3, 2)}, folder / "model.safetensors", {"parameters": "6"})


def test_update_writes_every_computable_field(shelf: Path) -> None:
    folder = shelf / "pretrained" / "alpha.one"
    make_folder(folder)
    card = cards.update("alpha")
    assert (card.family, card.task, card.config) == ("hebrew", "vision", {"width": 3})
    assert card.parameters == 6
    assert card.primary.value == 90.25
    assert card.source_commit == "c" * 40
    assert {record.name for record in card.files} == set(CHECKPOINT_FILES) - {"README.md"}
    for record in card.files:
        assert record == FileRecord.of(record.name, (folder / record.name).read_bytes())
    # What people typed is kept, but for the commit, which no longer has these files.
    assert (card.paper, card.reported) == (make_card().paper, make_card().reported)
    assert card.hub == dataclasses.replace(make_card().hub, revision=None)
    written = (shelf / "model_cards" / "alpha.one.md").read_text()
    assert written == (folder / "README.md").read_text() == cards.render(card)
    assert cards.find("alpha") == card == cards.computed(card, folder)


def test_update_renders_the_tables(shelf: Path) -> None:
    make_folder(shelf / "pretrained" / "alpha.one")
    body = cards.update("alpha").body
    assert (
        "| accuracy | **90.25** | 80.70 to 82.20 (95%, Wilson) | 10,000 images | 1, 2, 3 |" in body
    )
    assert "whole \\| test set" in body
    assert "| without (`controls/alpha.one/without.yaml`) | no cache |" in body
    assert "| +0.5000 (+0.2500 to +0.7500) | 1,000 | 2,000 | 3 images/s | 8 |" in body
    assert "| accuracy | 80.00 | Table 1 | verified | other augmentation |" in body
    assert body.endswith("Limits: it is | tiny.\n")


def test_a_difference_to_another_control_says_so(shelf: Path) -> None:
    folder = shelf / "pretrained" / "alpha.one"
    make_folder(folder)
    stored = json.loads((folder / "results.json").read_text())
    stored["controls"][0]["against"] = "as long"
    write_json(folder / "results.json", stored)
    assert "| +0.5000 (+0.2500 to +0.7500) against as long | 1,000 |" in cards.update("alpha").body


def test_a_changed_file_makes_the_card_out_of_date(shelf: Path) -> None:
    folder = shelf / "pretrained" / "alpha.one"
    make_folder(folder)
    card = cards.update("alpha")
    (folder / "recipe.yaml").write_text("zoo: {changed: true}\n")
    assert cards.computed(card, folder) != card


@pytest.mark.parametrize("name", sorted(set(CHECKPOINT_FILES) - {"README.md"}))
def test_update_needs_every_file(shelf: Path, name: str) -> None:
    folder = shelf / "pretrained" / "alpha.one"
    make_folder(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        cards.update("alpha")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b'{"architecture": "beta"}', "holds 'beta' with the results"),
        ("config.json", b"[1]", "is not a JSON object"),
        ("config.json", b"{", "is not valid JSON"),
        ("config.json", b"[" * 100_000, "is not valid JSON"),
        ("results.json", b'{"weight": "alpha.one", "result": []}', "unknown key 'result'"),
        ("model.safetensors", b"\x00", "was not written by zoo"),
        ("model.safetensors", b"\xff" * 99, "was not written by zoo"),
        ("model.safetensors", b"\x02" + b"\x00" * 7 + b"{}", "was not written by zoo"),
    ],
)
def test_update_of_a_wrong_folder(shelf: Path, name: str, content: bytes, message: str) -> None:
    folder = shelf / "pretrained" / "alpha.one"
    make_folder(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(ZooError, match=message):
        cards.update("alpha")


def test_update_needs_the_markers(shelf: Path) -> None:
    make_folder(shelf / "pretrained" / "alpha.one")
    card = make_card(body=BODY.replace("<!-- /zoo:controls -->", ""))
    (shelf / "model_cards" / "alpha.one.md").write_text(cards.render(card))
    with pytest.raises(ConfigError, match="expected <!-- zoo:controls --> and then"):
        cards.update("alpha")


def test_the_readme_table_has_a_line_for_each_card(shelf: Path) -> None:
    readme = shelf / "README.md"
    readme.write_text("# zoo\n<!-- zoo:models -->\nold\n<!-- /zoo:models -->\nend\n")
    cards.update_readme(readme)
    text = readme.read_text()
    assert "old" not in text
    assert text.endswith("<!-- /zoo:models -->\nend\n")
    assert text.count("model_cards/") == 4
    assert (
        "| 81.50 accuracy, fashion-mnist test | 80.70 to 82.20 | 10,000 images "
        "| 0.0 MB | apache-2.0 |"
    ) in text


# --- the project's own cards ---------------------------------------------------------------------

EXPECTED_CARDS = [
    "cached-transformer-lm.tiny-shakespeare",
    "continuous-flow.toy",
    "dselect-k-moe.multi-fashion-mnist",
    "dselect-k-moe.multi-mnist",
    "dselect-k-recommender.movielens-100k",
    "latent-ode.spirals-30",
    "latent-ode.spirals-50",
    "latent-ode.spirals",
    "ode-resnet.fashion-mnist",
    "ode-resnet.mnist",
    "online-ensemble.split-cifar100",
    "online-ensemble.split-fashion-mnist",
    "online-ensemble.split-mnist",
    "sau-shufflenet-v2-x0-5.cifar100",
    "sau-shufflenet-v2-x0-5.fashion-mnist",
    "sau-shufflenet-v2-x1.cifar100",
]


def test_the_cards_of_the_zoo_are_the_expected_ones() -> None:
    assert list(cards.load_cards()) == EXPECTED_CARDS


def test_every_architecture_with_weights_has_one_default_weight() -> None:
    shipped = cards.load_cards().values()
    defaults = sorted(card.architecture for card in shipped if card.default)
    assert defaults == sorted({card.architecture for card in shipped})


@pytest.mark.parametrize("name", EXPECTED_CARDS)
def test_a_card_agrees_with_its_checkpoint_folder(name: str) -> None:
    """After a change: `zoo card NAME --update`."""
    card = cards.find(name)
    folder = cards.pretrained_folder(name)
    written = (REPOSITORY / "model_cards" / f"{name}.md").read_text(encoding="utf-8")
    assert cards.render(cards.computed(card, folder)) == written
    assert (folder / "README.md").read_text(encoding="utf-8") == written


@pytest.mark.parametrize("name", EXPECTED_CARDS)
def test_a_card_has_a_recipe_and_a_verdict(name: str) -> None:
    card = cards.find(name)
    assert (cards.shipped_folder("recipes") / card.recipe).is_file()
    assert card.primary.command == f"zoo evaluate {name}"
    assert card.controls


def test_the_table_in_the_readme_is_up_to_date(tmp_path: Path) -> None:
    """After a change: `zoo card --readme`."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    cards.update_readme(copy)
    assert copy.read_text(encoding="utf-8") == text


def test_results_files_are_measurements_and_nothing_else() -> None:
    for name in EXPECTED_CARDS:
        path = cards.pretrained_folder(name) / "results.json"
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert to_json(build(Measurements, stored, str(path))) == stored


def test_a_card_with_the_line_ends_of_windows() -> None:
    text = cards.render(make_card())
    assert cards.parse(text.replace("\n", "\r\n")) == cards.parse(text)
