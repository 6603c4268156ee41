"""The plan of the house, held: imports run one way, nothing unsafe, no star imports."""

import ast
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
GROUND = {"nih", "params", "param_rows", "param_sources", "systems", "session", "files", "gpu_support"}
ALLOWED = {"nn": {"nn"}, "models": {"models", "nn", "params", "systems"}, "data": {"data"} | GROUND,
           "evaluation": {"evaluation"} | GROUND, "viz": {"viz", "data", "evaluation"} | GROUND,
           "grid": {"grid", "data", "evaluation", "viz"} | GROUND,
           "training": {"training", "models", "nn", "data", "evaluation", "viz"} | GROUND,
           "kaggle_setup": {"grid"} | GROUND}
PLANS = "charmlib.training.recipes"  # imports no torch, so a grid may plan with it
FILES = [*sorted((HOUSE / "charmlib").rglob("*.py")), *sorted((HOUSE / "kaggle_setup").glob("*.py"))]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_run_one_way(path):
    package, room = path.relative_to(HOUSE).parts[:2]
    room = room if package == "charmlib" else package
    for module, names in imports(path):
        assert "*" not in names, f"star import of {module}"
        assert package == "kaggle_setup" or not module.startswith("kaggle_setup"), "the wheel does not carry it"
        if room in ALLOWED and module.startswith("charmlib."):
            assert module.split(".")[1] in ALLOWED[room] or (room == "grid" and module == PLANS), f"{room} imports {module}"
        if room == "nn" or room == "models":
            assert not module.startswith("fastai")
        alone = room in ("grid", "evaluation", "viz", "kaggle_setup") or path.stem in {*GROUND - {"gpu_support"}, "recipes"}
        if alone:
            assert not module.startswith(("torch", "fastai")), module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_nothing_unpickles(path):
    text = path.read_text()
    for unsafe in ("import pickle", "load_learner", "allow_pickle=True", "weights_only=False", "yaml.load("):
        assert unsafe not in text
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(call)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    if path.name != "__main__.py":
        assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), node.name
