"""A tiny weight with all that publishing asks for, and cards of made-up ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo import cards
from zoo.cards import Card, HubLocation, Measurements, Paper, Result
from zoo.files import CARD_FILE, CONFIG_FILE, RECIPE_FILE, RESULTS_FILE, WEIGHTS_FILE, FileRecord

ROOT = Path(__file__).parents[2]
REPO = "sandbox/tiny"
NAME = "cached-transformer-lm.tiny"

BODY = """# cached-transformer-lm.tiny

![loss](figures/cached-transformer-lm.tiny/loss.png)
![badge](https://badge.example/a.png)

<!-- zoo:results -->
<!-- /zoo:results -->
<!-- zoo:controls -->
<!-- /zoo:controls -->
<!-- zoo:reported -->
<!-- /zoo:reported -->
<!-- zoo:files -->
<!-- /zoo:files -->
"""
FIGURE = "figures/cached-transformer-lm.tiny/loss.png"

RECIPE = """# zoo fit cached-transformer-lm.tiny
zoo: {architecture: cached-transformer-lm, data: text, weight: cached-transformer-lm.tiny}
seed_everything: 1
"""

CONTENTS = {
    CONFIG_FILE: b"{}",
    RECIPE_FILE: b"zoo: {}",
    RESULTS_FILE: b"{ }",
    WEIGHTS_FILE: b"weights",
}
"""Of a folder that is never parsed, only carried."""


def result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "metric": "nats_per_character",
        "value": 2.345678,
        "unit": "nats/character",
        "n": 1000,
        "interval": (2.3, 2.4),
        "interval_method": "bootstrap over 10 blocks",
        "seeds": (1,),
        "tolerance": 5e-4,
        "protocol": "stream",
        "dataset": "tiny-shakespeare",
        "split": "validation",
        "command": f"zoo evaluate {NAME}",
        "date": "2026-01-31",
        "versions": {"torch": "2.10.0"},
        "primary": True,
    }
    return Result(**{**values, **changes})


def card(**changes: Any) -> Card:
    values: dict[str, Any] = {
        "architecture": "cached-transformer-lm",
        "weight": "tiny",
        "default": True,
        "recipe": f"{NAME}.yaml",
        "input": "text, or integers B x T",
        "output": "logits B x T x 256",
        "code_license": "apache-2.0",
        "weights_license": "apache-2.0",
        "data_license": "public domain",
        "datasets": ("karpathy/tiny_shakespeare",),
        "hub": HubLocation(repo_id=REPO),
        "paper": Paper(title="A: paper", authors="A", year=2024, url="https://paper.example"),
        "task": "language-modeling",
        "family": "cached-transformers",
        "body": BODY,
    }
    return Card(**{**values, **changes})


def card_of(contents: Mapping[str, bytes], **changes: Any) -> Card:
    """A card of the weight "alpha.one" with the records of some contents."""
    records = tuple(FileRecord.of(name, content) for name, content in contents.items())
    return card(architecture="alpha", weight="one", files=records, **changes)


def with_card(contents: Mapping[str, bytes], **changes: Any) -> dict[str, bytes]:
    """What a repository of these contents holds."""
    return {**contents, CARD_FILE: cards.render(card_of(contents, **changes)).encode()}


def measurements() -> Measurements:
    return Measurements(
        weight=NAME,
        results=(result(), result(protocol="blocks", value=2.5, primary=False)),
        training={"source_commit": "b" * 40},
    )


def module(seed: int = 0) -> Any:
    import torch

    from zoo.families.cached_transformers import CachedTransformerLMConfig
    from zoo.tasks.language_modeling import LanguageModel

    torch.manual_seed(seed)
    grc = CachedTransformerLMConfig().grc
    import dataclasses

    network = CachedTransformerLMConfig(
        dim=16,
        depth=1,
        num_heads=2,
        segment=16,
        grc=dataclasses.replace(grc, segment=16, slots=4),
    )
    built = LanguageModel(network=network).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # the head starts at zero
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return built


def write_weight(folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder with card, recipe, results and the figure that the card shows."""
    from zoo import checkpoints

    checkpoints.save(
        module(seed), folder, card=card(), recipe=RECIPE, results=measurements(), dtype="float32"
    )
    (folder / FIGURE).parent.mkdir(parents=True)
    (folder / FIGURE).write_bytes(b"\x89PNG loss")
    return folder


def bundle(weight: Path, installation: Path) -> Path:
    """Make the weight one of the installation's own; returns its card's path."""
    folder = installation / "pretrained" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    for path in weight.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    figure = installation / "model_cards" / FIGURE
    figure.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(weight / FIGURE, figure)
    path = installation / "model_cards" / f"{NAME}.md"
    path.write_text(cards.render(cards.computed(card(), folder)), encoding="utf-8")
    cards._read_cards.cache_clear()
    return path


def environment(url: str, home: Path, **changes: str) -> dict[str, str]:
    """Of a process whose client talks to the server at `url` and keeps everything in `home`."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_TOKEN": "sandbox",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **changes,
    }


def start(code: str, environ: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start Python on some code."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environ),
    )


def run(code: str, environ: Mapping[str, str], *arguments: str) -> str:
    """Run Python on some code in a new process; what it prints."""
    process = start(code, environ, *arguments)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip()
