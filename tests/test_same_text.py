"""Scripts import nothing of each other, and what stands in several under one name is the same to the letter."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path
    for pattern in ("*.py", "baselines/*.py", "data/collect_*.py")
    for path in ROOT.glob(pattern)
]
OWN = {
    "Args",
    "Dataset",
    "Team",
    "main",
    "record_dataset",
    "train",
}  # what an algorithm or a dataset is: each script's own
LIBRARIES = {"mamujoco_envs", "coordination_game", "data", "data.offline_dataset"}
MODULES = {path.stem for path in SCRIPTS} | {"data", "baselines"}


def test_what_several_scripts_repeat_is_the_same_to_the_letter():
    texts = defaultdict(dict)
    for path in SCRIPTS:
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                texts[node.name][ast.get_source_segment(source, node)] = path.name
    repeated = {name: list(places.values()) for name, places in texts.items() if len(places) > 1}
    assert not repeated, f"differs between scripts: {repeated}"


def test_scripts_never_import_each_other():
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in MODULES or name in LIBRARIES, (
                    f"{path.name} imports {name}"
                )
