"""The rules of the house, checked from the import graph: imports run downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "zoo"

FLOORS = [
    {"zoo.errors", "zoo.sandbox"},
    {"zoo.configs", "zoo.files", "zoo.intervals", "zoo.progress", "zoo.provenance"},
    {"zoo._card_tables", "zoo.registry"},
    {"zoo.cards", "zoo.families"},
    {"zoo.data", "zoo.timm", "zoo.tuning"},
    {"zoo.tasks"},
    {"zoo.checkpoints", "zoo.hub"},
    {"zoo.adaptation", "zoo.exporting", "zoo.publishing"},
    {"zoo.training"},
    {"zoo.evaluation"},
    {"zoo.analog", "zoo.controls", "zoo.figures", "zoo.finetuning", "zoo.memory_table"},
    {"zoo.recovery"},
    {"zoo.transfer"},
    {"zoo.cli"},
]
"""From the ground up. A room imports from the floors below it, and from its own folder."""

WITHOUT_TORCH = {
    "zoo",
    "zoo._card_tables",
    "zoo.cards",
    "zoo.cli",
    "zoo.configs",
    "zoo.errors",
    "zoo.files",
    "zoo.hub",
    "zoo.intervals",
    "zoo.progress",
    "zoo.publishing",
    "zoo.registry",
    "zoo.sandbox",
}
"""Import no torch at module level, nor anything of ours that does."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    )


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(module: str, at_module_level: bool) -> Iterator[str]:
    """What a module imports when it runs; blocks for type checkers do not count.

    Args:
        module: Its name.
        at_module_level: Whether to leave out imports within functions.
    """
    pending: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending.extend(node.orelse)
            continue
        if at_module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module, f"{module}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        pending.extend(ast.iter_child_nodes(node))


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in MODULES} - {"zoo"}
    assert rooms == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(rooms) == 30


def test_imports_run_downwards() -> None:
    height = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    covered = 0
    for module in MODULES.keys() - {"zoo"}:
        for imported in imports(module, at_module_level=False):
            if not imported.startswith("zoo."):
                continue
            covered += 1
            allowed = (
                room(imported) == room(module) or height[room(imported)] < height[room(module)]
            )
            assert allowed, f"{module} imports {imported}"
    assert covered > 50


def test_light_modules_import_nothing_heavy() -> None:
    for module in WITHOUT_TORCH:
        for imported in imports(module, at_module_level=True):
            package = imported.split(".")[0]
            assert package not in ("torch", "lightning", "timm", "huggingface_hub"), module
            if package == "zoo":
                assert imported in WITHOUT_TORCH, f"{module} imports {imported}"


FAMILIES = sorted(path.parent.name for path in (PACKAGE / "families").glob("*/__init__.py"))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_pure_torch(family: str) -> None:
    for module in MODULES:
        if module.startswith(f"zoo.families.{family}"):
            for imported in imports(module, at_module_level=False):
                assert not imported.startswith(("lightning", "torchvision.datasets")), module


def test_every_name_that_a_module_offers_is_there() -> None:
    covered = 0
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined: set[str] = set()
        offered: list[str] = []
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                defined.update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                defined.update(names)
                if "__all__" in names:
                    assert node.value is not None
                    offered = ast.literal_eval(node.value)
        if module == "zoo":  # imports on first use; see test_public_face.py
            continue
        covered += bool(offered)
        assert set(offered) <= defined, module
        assert len(offered) == len(set(offered)), module
    assert covered >= 15
