"""Published folders in the hands of others: without this package, and in the Hub's own tools."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.hub import published
from tests.hub.published import NAME, REPO, ROOT
from zoo import cards
from zoo.publishing import push
from zoo.sandbox import Sandbox

_WITHOUT_US = """
import sys
sys.modules["zoo"] = sys.modules["torch"] = None  # an import of either fails
"""


def documented_lines() -> str:
    """The snippet of the README that opens a folder without this package."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (found,) = [block for block in blocks if "safetensors.numpy" in block]
    return str(found)


def test_a_published_folder_opens_in_ten_lines_without_this_package(
    sandbox: Sandbox, weight: Path, installation: Path, tmp_path: Path
) -> None:
    push(weight, REPO)
    lines = documented_lines()
    code = [line for line in lines.splitlines() if line.strip() and not line.startswith("#")]
    assert len(code) == 9
    download = "from huggingface_hub import snapshot_download\nimport sys\n"
    changed = re.sub(r'Path\("my-lm"\)', f'Path(snapshot_download("{REPO}", revision="v1"))', lines)
    assert changed != lines
    environ = published.environment(sandbox.url, tmp_path / "home")
    printed = subprocess.run(
        [sys.executable, "-c", _WITHOUT_US + download + changed],
        env=environ,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    parameters = cards.parse(sandbox.repositories[REPO].contents()["README.md"].decode()).parameters
    assert printed.splitlines() == [
        f"cached-transformer-lm {parameters}",
        "2.345678 nats/character",
    ]


@pytest.mark.parametrize("name", sorted(cards.load_cards()))
def test_the_hubs_own_parser_reads_our_cards(name: str, tmp_path: Path) -> None:
    card = cards.find(name)
    path = tmp_path / "README.md"
    path.write_text(cards.render(card), encoding="utf-8")
    loaded = ModelCard.load(path)
    assert loaded.text.strip() == card.body.strip()
    data = loaded.data
    assert data.license == card.weights_license
    assert data.library_name == "zoo"
    assert (data.datasets or []) == list(card.datasets)
    found = data.eval_results or []
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in found] == [
        (result.metric, result.value, result.dataset) for result in card.results
    ]
    if found:
        assert data.model_name == card.name
    assert ModelCard(str(loaded)).data.to_dict() == data.to_dict()


def test_every_card_was_read_above() -> None:
    assert len(cards.load_cards()) >= 1


def test_timm_says_what_the_readme_says(sandbox: Sandbox, weight: Path, installation: Path) -> None:
    """Its `hf-hub:` reads our config.json, and does not know the architecture."""
    import timm

    push(weight, REPO)
    with pytest.raises(RuntimeError, match=r"Unknown model \(cached-transformer-lm\)"):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    assert 'timm.create_model("hf-hub:...")` does not open' in (ROOT / "README.md").read_text()
    assert NAME.startswith("cached-transformer-lm")
