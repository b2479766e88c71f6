"""Imports point down the list of packages, and frameworks stay behind the backends."""

import ast
from pathlib import Path

import mlx_fish

PACKAGE = Path(mlx_fish.__file__).parent
# From the top down: a package imports from itself and from those below it.
PACKAGES = [
    "cli", "api", "training", "evaluation", "inference", "export", "runs", "planning", "tracking", "backends", "objectives",
    "adapters", "data", "models", "storage", "signals", "config", "errors",
]  # fmt: skip
ROOT_MODULES = {"__init__", "__main__", "api", "config", "errors", "signals"}
BORDER = {
    "mlx": ("backends", "mlx"),
    "mlx_lm": ("backends", "mlx"),
    "torch": ("backends", "torch"),
    "peft": ("backends", "torch"),
}
OTHER_PROGRAMS = ("export", "verify", "readers.py")  # each reader runs in a process of its own


def modules():
    """(the parts of its path inside the package, the names it imports) of every module."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        names += [
            f"{node.module}.{name.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for name in node.names
        ]
        names += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        yield path.relative_to(PACKAGE).parts, names


def test_imports_point_down():
    height = {name: len(PACKAGES) - number for number, name in enumerate(PACKAGES)}
    wrong = []
    for parts, names in modules():
        package = parts[0].removesuffix(".py")
        for name in names:
            target = name.split(".")[1] if name.startswith("mlx_fish.") else ""
            if package in height and target in height and height[target] > height[package]:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong


def test_every_package_is_in_the_list():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(PACKAGES)
    assert len(folders) <= 16
    assert {path.stem for path in PACKAGE.glob("*.py")} <= ROOT_MODULES


def test_every_package_says_its_job():
    for path in PACKAGE.rglob("__init__.py"):
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        assert first.endswith("."), path


def test_frameworks_stay_behind_the_border():
    for parts, names in modules():
        for framework in {name.split(".")[0] for name in names} & set(BORDER):
            assert parts[:2] == BORDER[framework] or parts == OTHER_PROGRAMS, f"{'/'.join(parts)} imports {framework}"
