"""What a user installs: the wheel for Kaggle, the requirements, the README's commands."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "src"  # a build leaves files beside pyproject.toml
    subprocess.run(["git", "-c", "safe.directory=*", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run(["cp", "-r", *(str(ROOT / p) for p in ("charmlib", "notebooks", "params", "pyproject.toml", "README.md")),
                    str(source)], check=True)
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("charmlib-*.whl"))


@pytest.mark.slow
def test_the_wheel_runs_a_grid_where_there_is_no_checkout(wheel, phantoms, tmp_path):
    """As on Kaggle: installed with --no-deps into a folder, started elsewhere, notebooks and params from the wheel."""
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site), str(wheel)],
                   check=True, capture_output=True)
    code = (f"import sys; sys.path.insert(0, {str(site)!r})\n"
            "import charmlib, pathlib; assert charmlib.__file__.startswith(sys.path[0])\n"
            "from charmlib.grid.cells import find_notebooks; from charmlib.grid import load_grid\n"
            "print(find_notebooks()); print(len(load_grid('params/grid_published.yaml').cells))\n"
            "from charmlib.evaluation.published import published_results; assert len(published_results())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout and "26" in done.stdout.split()


@pytest.mark.slow
def test_the_wheel_holds_every_file_that_is_not_python(wheel):
    """A file left out of the wheel is missed first on Kaggle."""
    import zipfile

    held = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "charmlib").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            assert str(path.relative_to(ROOT)) in held, path
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"charmlib/shipped/notebooks/{path.name}" in held, path


@pytest.mark.parametrize("mount", ["charm-wheel", "datasets/me/charm-wheel"])
def test_the_first_cell_installs_the_wheel_from_a_kaggle_mount(wheel, mount, tmp_path):
    """On today's and on the former mount form; what pip is told is recorded, not done to this environment."""
    cell = next(c for c in nbformat.read(ROOT / "notebooks/train.ipynb", as_version=4).cells if c.cell_type == "code")
    folder = tmp_path / "kaggle/input" / mount
    folder.mkdir(parents=True)
    (folder / wheel.name).write_bytes(wheel.read_bytes())
    source = cell.source.replace("/kaggle/input", str(tmp_path / "kaggle/input"))
    code = ("import importlib.util, subprocess\nimportlib.util.find_spec = lambda name: None\n"
            "subprocess.run = lambda args, **k: print(*args)\n" + source)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--no-deps" in done.stdout and done.stdout.strip().endswith(str(folder / wheel.name))
    empty = subprocess.run([sys.executable, "-c", code.replace("kaggle/input", "kaggle/nothing")], capture_output=True,
                           text=True, cwd=tmp_path)
    assert "attach the dataset" in empty.stderr


def test_requirements_are_lower_bounds_only():
    """A pin would replace the torch of Kaggle's image."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w-]+>=[\d.]+", line), line


def listed(path) -> dict[str, Requirement]:
    """The lines of a requirements or constraints file by the package's name."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(need.name): need for need in map(Requirement, lines)}


def needed() -> dict[str, Requirement]:
    """What the library and its suite need on any machine."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    more = [need for need in map(Requirement, extras["suite"] + extras["dicom"]) if need.name != "charmlib"]
    return {**listed("requirements.txt"), **{canonicalize_name(need.name): need for need in more}}


def test_what_pushing_needs_is_listed_and_is_not_torch():
    """In an environment of its own: its bounds are the library's, and it lists all that pushing and merging import."""
    push, library = listed("kaggle_setup/requirements-push.txt"), listed("requirements.txt")
    own = {"kaggle", "six", "setuptools"}
    assert push.keys() - library.keys() == own and all(push[name] == library[name] for name in push.keys() - own)
    code = ("import sys, importlib.metadata as md\nimport kaggle_setup.__main__\nowners = md.packages_distributions()\n"
            "print(*{d for m in sys.modules for d in owners.get(m.partition('.')[0], []) if not d.startswith('nvidia')})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    found = {canonicalize_name(name) for name in done.stdout.split()}
    assert found & library.keys() <= push.keys(), done.stderr


def test_the_table_of_gpu_hours_is_that_of_its_file():
    from benchmarks.gpu_hours import OUT, rows

    made = [list(map(str, row.values())) for row in rows()]
    assert [line.split(",") for line in OUT.read_text().splitlines()[1:]] == made, "say python -m benchmarks.gpu_hours"
    page = (ROOT / "docs/kaggle.md").read_text()
    for grid, cells, trainings, left_out, best, worst in made:
        assert left_out != "0" or f"| `params/{grid}` | {cells} | {trainings} | {best} | {worst} |" in page, grid


@pytest.mark.parametrize("end", ["kaggle", "latest"])
def test_the_lower_bounds_admit_both_ends(end):
    """ipykernel>=6.29 was asked for once, and Kaggle's image holds 6.17.1: pip could not have installed the two together."""
    held = listed(f"kaggle_setup/constraints-{end}.txt")
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in held.values())
    for name, need in needed().items():
        if name in held:
            version = str(held[name].specifier).removeprefix("==")
            assert need.specifier.contains(version), f"{need} refuses the {version} of {end}"
    if end == "kaggle":
        missing = {"pytest-xdist", "python-gdcm"}
        assert needed().keys() - held.keys() == missing, "what Kaggle's image does not hold, or nobody looked up"


def test_what_is_installed_meets_the_requirements():
    for name, need in needed().items():
        assert need.specifier.contains(metadata.version(name), prereleases=True), need


def test_this_environment_is_the_end_that_it_is_taken_for():
    """A `pip install` by hand into one of the two would quietly test something else."""
    path = os.environ.get("CHARM_CONSTRAINTS")
    if not path:
        pytest.skip("neither end: `make test` and `make test-kaggle` set CHARM_CONSTRAINTS")
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions()}
    other = {name: installed[name] for name, pin in listed(path).items()
             if name in installed and not pin.specifier.contains(installed[name], prereleases=True)}
    assert not other, f"installed beside {path}: {other}"


def test_everything_imported_is_required():
    names = {"sklearn": "scikit_learn", "PIL": "pillow", "yaml": "pyyaml"}
    brought = {"scipy", "IPython", "traitlets", "fastcore"}  # by scikit-learn, ipykernel and fastai
    # extras ('dicom', 'export', Voilà's server), a stand-in for a newer kornia_rs, the official client: who lacks them is told
    asked_for = {"pydicom", "cv2", "kaggle", "jupyter_server", "onnxruntime", "onnxscript"}
    found = set()
    for path in (*(ROOT / "charmlib").rglob("*.py"), *(ROOT / "kaggle_setup").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    third = found - set(sys.stdlib_module_names) - {"charmlib", "kaggle_setup"} - brought - asked_for
    assert {canonicalize_name(names.get(n, n)) for n in third} <= listed("requirements.txt").keys(), third


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_files_links_and_commands_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:params|notebooks|benchmarks|kaggle_setup)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\bmake ([\w-]+)(?=`|\n| )", "\n".join(re.findall(r"```.*?```|`[^`]*`", text, re.S))):
        assert re.search(rf"^(?:[\w ]+ )?{target}(?: [\w ]+)?:", (ROOT / "Makefile").read_text(), re.M), target
    for package, line in re.findall(r"^(?:    )?python -m (charmlib|kaggle_setup) (.+?)(?: \\)?$", text, re.M):
        words = line.split()
        command = words[:2] if words[0] == "grid" else words[:1]
        done = subprocess.run([sys.executable, "-m", package, *command, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, line
        options = set(re.findall(r"(?<!\S)(--[\w-]+)", line))
        assert options <= set(re.findall(r"--[\w-]+", done.stdout)), line


def test_the_readme_is_short_and_says_what_it_is_for():
    text = (ROOT / "README.md").read_text()
    assert "research use only" in text.lower() and len(text.splitlines()) <= 150


@pytest.mark.slow
def test_the_readmes_python_runs(phantoms, tmp_path):
    """As it stands, but for the data, a small backbone and one epoch."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    for old, new in (("/data/nih", str(phantoms)), ("image_size=224", "image_size=32"), ("fine_tune(20,", "fine_tune(1,"),
                     ('"efficientnet_v2_s"', '"timm:test_resnet", weights="none"'), ("bs=64", "bs=16"),
                     ("freeze_epochs=3", "freeze_epochs=1")):
        assert old in code, old
        code = code.replace(old, new)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_real_radiograph_and_nothing_large_is_stored():
    files = subprocess.run(["git", "-c", "safe.directory=*", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    for name in files.stdout.splitlines():
        path = ROOT / name
        assert not path.is_file() or path.stat().st_size < 1_000_000, name
        assert not re.search(r"\d{8}_\d{3}\.png$", name), name
