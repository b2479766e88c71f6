"""Imports point down the house: no room imports one that stands later in the chain."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mlx_fish"
# From the ground up; a room may import those of earlier lines.
FLOORS = [
    {"errors", "blas", "__init__"},
    {"files", "config", "schedule", "signals", "deadline", "machine"},
    {"tensors", "dataset_info", "report"},
    {"model_folder", "rows", "gguf_reader"},
    {"data"},
    {"template", "gguf_model", "gguf_tokenizer", "adapter_formats"},
    {"adapter"},
    {"batches", "run_folder", "hub"},
    {"source"},
    {"merge", "model_card", "checkpoint", "backends", "backends.mlx", "backends.torch", "memory"},
    {"export", "session", "job", "roofline"},
    {"export.hf", "export.gguf_types", "export.gguf_vocab", "export.modelfile", "export.go_template"},
    {"export.gguf", "export.mlx_lm", "export.ollama"},
    {"export.gguf_adapter", "resume", "record"},
    {"targets", "outlook"},
    {"plan"},
    {"train", "generate", "convert", "fuse", "readers"},
    {"verify"},
    {"evaluate"},
    {"cli.options"},
    {"cli.training", "cli.answering", "cli.fusing"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def room_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[:2] in (("backends", "mlx"), ("backends", "torch")):
        return ".".join(parts[:2])
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_the_import_graph_points_down():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        for name in imports(path):
            target = name.removeprefix("mlx_fish.") if name.startswith("mlx_fish.") else None
            if target and target.startswith(("backends.mlx.", "backends.torch.")):
                target = ".".join(target.split(".")[:2])
            if target in HEIGHT and target != room and HEIGHT[target] > HEIGHT[room]:
                wrong.append(f"{room} imports {target}")
    assert not wrong


def test_every_room_has_a_floor():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == set(HEIGHT)


BORDER = {"backends.mlx": {"mlx", "mlx_lm"}, "backends.torch": {"torch", "peft"}}


def test_frameworks_stay_behind_the_border():
    for path in PACKAGE.rglob("*.py"):
        frameworks = {name.split(".")[0] for name in imports(path)} & {"mlx", "mlx_lm", "torch", "peft"}
        # the readers are other programs, each run in a process of its own
        assert frameworks <= BORDER.get(room_of(path), set()) or room_of(path) == "readers", path
