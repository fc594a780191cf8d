"""Scripts import nothing of each other, and what they repeat is the same to the letter."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATTERNS = ("moma_ppo.py", "world_model.py", "baselines/*.py", "data/collect_*.py")
SCRIPTS = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
# What an algorithm or a dataset is: each script's own.
OWN = {"Args", "Dataset", "Team", "check", "main", "record", "record_dataset", "train"}
HELPERS = {"mamujoco_envs", "coordination_game", "data.offline_dataset", "training_run"}
PROJECT = {path.stem for path in ROOT.rglob("*.py")} | {"baselines", "data", "scripts", "tests"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module


def test_what_several_scripts_repeat_is_the_same_to_the_letter():
    texts = defaultdict(dict)
    for path in SCRIPTS:
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in OWN:
                text = ast.get_source_segment(source, node)
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                texts[node.name][text, *decorators] = path.name
    differing = {name: list(found.values()) for name, found in texts.items() if len(found) > 1}
    assert not differing, f"differs between scripts: {differing}"


def test_the_same_option_has_the_same_type_everywhere():
    types = defaultdict(dict)
    for path in SCRIPTS:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name == "Args":
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                for field in fields:
                    types[field.target.id][ast.unparse(field.annotation)] = path.name
    assert not {name: found for name, found in types.items() if len(found) > 1}


def test_resuming_is_explained_alike_everywhere():
    field = "    resume: Path | None = None\n"
    texts = [path.read_text() for path in SCRIPTS]
    helps = {text.split(field)[1].split("\n")[0] for text in texts if field in text}
    assert len(helps) == 1, helps


def test_scripts_import_only_helpers_of_the_project():
    for path in SCRIPTS:
        own = {name for name in imports_of(path) if name.split(".")[0] in PROJECT}
        assert own <= HELPERS, f"{path.name} imports {own - HELPERS}"


def test_helpers_import_no_script():
    for name in HELPERS:
        path = ROOT / f"{name.replace('.', '/')}.py"
        own = {name for name in imports_of(path) if name.split(".")[0] in PROJECT}
        assert own <= HELPERS, f"{path.name} imports {own - HELPERS}"
