"""What is written before anything is sent: notebooks, metadata, wheel."""

import ast
import json
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

import charmlib
from charmlib.grid import load_grid
from charmlib.params import ParameterError
from kaggle_setup.client import KaggleError
from kaggle_setup.kernel import grid_files, id_of, kernel_metadata, pushed_notebook, slug_of
from kaggle_setup.prepare import prepare
from kaggle_setup.redaction import redact

ROOT = Path(__file__).parents[2]


def test_kernel_metadata_has_every_field_and_an_id_that_is_its_title():
    meta = kernel_metadata("anna", "charmlib charm ab12 s1of2 r1", datasets=["anna/charmlib-wheel"], kernels=["anna/cache"])
    assert meta["id"] == "anna/" + slug_of(meta["title"]) == "anna/charmlib-charm-ab12-s1of2-r1"
    assert meta["enable_internet"] is False and meta["is_private"] is True and meta["enable_gpu"] is True
    assert meta["machine_shape"] == "NvidiaTeslaT4" and meta["docker_image_pinning_type"] == "latest"
    for name in ("code_file", "language", "kernel_type", "dataset_sources", "kernel_sources", "model_sources",
                 "competition_sources"):
        assert name in meta
    cpu = kernel_metadata("anna", "charmlib charm", accelerator="none", internet=True)
    assert (cpu["enable_gpu"], cpu["machine_shape"], cpu["enable_internet"]) == (False, "", True)


def test_names_that_kaggle_would_not_take_are_refused_before():
    for wrong in ("Anna B", "anna@x.org", "", "Anna"):
        with pytest.raises(KaggleError, match="kaggle.com/NAME"):
            kernel_metadata(wrong, "charmlib charm")
    for wrong in ("data", "a/b/c/d", "https://www.kaggle.com/datasets/a/b"):
        with pytest.raises(KaggleError, match="--data.*OWNER/NAME"):
            kernel_metadata("anna", "charmlib charm", datasets=[wrong])
        with pytest.raises(KaggleError, match="--notebook-outputs.*OWNER/NAME"):
            kernel_metadata("anna", "charmlib charm", kernels=[wrong])
    for wrong in ("x" * 51, "x" * 5, "charm" + "!" * 5):
        with pytest.raises(KaggleError, match="6 to 50"):
            id_of("anna", wrong)
    assert id_of("anna", "charmlib wheel") == "anna/charmlib-wheel"


@pytest.mark.parametrize("text", ["12h", "0h", "11", "soon", "-1h"])
def test_a_budget_that_a_session_cannot_have_is_refused(small, tmp_path, text):
    with pytest.raises((KaggleError, ParameterError), match="11h"):
        prepare(small, user="anna", out=tmp_path, budget=text)


def test_every_shipped_grid_renders_with_all_its_files(tmp_path):
    for path in sorted((ROOT / "params").glob("grid_*.yaml")):
        files = grid_files(path)
        place = next(iter(files))
        for name, text in files.items():
            (tmp_path / path.stem / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.stem / name).write_text(text)
        assert yaml.safe_load((tmp_path / path.stem / place).read_text()) == yaml.safe_load(path.read_text())
        there = load_grid(tmp_path / path.stem / place)
        assert there.name == load_grid(path).name and there.cells == load_grid(path).cells


def test_bases_of_bases_travel_too(tmp_path):
    """Under names that do not ship with charmlib, so that nothing else could be found in their place."""
    (tmp_path / "here/low").mkdir(parents=True)
    (tmp_path / "here/grid_chain.yaml").write_text("base: first_of_chain.yaml\naxes: {k: [1]}\n")
    (tmp_path / "here/first_of_chain.yaml").write_text("base: low/last_of_chain.yaml\nseed: 3\nanswer: features\n")
    last = tmp_path / "here/low/last_of_chain.yaml"
    last.write_text("bank_size: 7\nanswer: features\n")
    files = grid_files(tmp_path / "here/grid_chain.yaml")
    assert len(files) == 3
    for name, text in files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_text(text)
    (cell,) = load_grid(tmp_path / "there" / next(iter(files))).cells
    assert (cell.params["seed"], cell.params["bank_size"]) == (3, 7)
    last.write_text(f"base: {tmp_path}/x.yaml\n")
    with pytest.raises(KaggleError, match=r"last_of_chain\.yaml.*path of this machine"):
        grid_files(tmp_path / "here/grid_chain.yaml")


def test_a_grid_whose_bases_lie_elsewhere_keeps_its_layout(small):
    deeper = small.parent / "deep/er"
    deeper.mkdir(parents=True)
    (deeper / "grid_x.yaml").write_text("base: ../../bases/tiny.yaml\naxes: {k: [1]}\ncells: [{name: p, base: ../more.yaml}]\n")
    (small.parent / "deep/more.yaml").write_text("k: 2\n")
    files = grid_files(deeper / "grid_x.yaml")
    place = next(iter(files))
    assert place == "params/deep/er/grid_x.yaml" and set(files) == {place, "params/bases/tiny.yaml", "params/deep/more.yaml"}


def test_a_base_that_ships_with_charmlib_goes_where_the_grid_looks_for_it(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params/grid_mine.yaml").write_text("base: charm.yaml\naxes: {k: [1]}\n")
    files = grid_files(tmp_path / "params/grid_mine.yaml")
    assert next(iter(files)) == "params/grid_mine.yaml"
    assert files["params/charm.yaml"] == (ROOT / "params/charm.yaml").read_text()
    (tmp_path / "params/grid_mine.yaml").write_text(f"base: {ROOT}/params/charm.yaml\naxes: {{k: [1]}}\n")
    with pytest.raises(KaggleError, match="relative to the file"):
        grid_files(tmp_path / "params/grid_mine.yaml")


def test_the_rendered_notebook_holds_its_parameters_and_no_output(small):
    files = grid_files(small)
    place = next(iter(files))
    book = pushed_notebook({"grid": place, "shard": "1/2", "overrides": ['csv=a "b" \\ c']}, files)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and isinstance(cell.source, str) for cell in code)
    injected = next(cell for cell in code if "injected-parameters" in cell.metadata.get("tags", []))
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(injected.source).body}
    assert values == {"grid": place, "shard": "1/2", "overrides": ['csv=a "b" \\ c']}
    order = [i for word in ("pip", "required=True", "files = ", "grid: str", "# Parameters", "run_grid(")
             for i, cell in enumerate(code) if word in cell.source][:6]
    assert order == sorted(order)
    assert "required=False" in str(pushed_notebook({"grid": place}, files, gpu=False))


def test_a_parameter_that_the_notebook_does_not_declare_is_refused(small):
    with pytest.raises(KaggleError, match="declares no parameter 'shards'.*Did you mean 'shard'"):
        pushed_notebook({"shards": "1/2"}, grid_files(small))


def test_paths_must_be_kaggles(small, tmp_path):
    given = {"user": "anna", "out": tmp_path / "out"}
    with pytest.raises(KaggleError, match="data_root.*not on Kaggle.*/kaggle/input"):
        prepare(small, assignments=[f"data_root={tmp_path}"], **given)
    state = prepare(small, assignments=["data_root=/kaggle/input/mine", "weights=/kaggle/input/w/x.pth"], **given)
    assert "weights=/kaggle/input/w/x.pth" in (state.folder / "s1-r1/kernel/notebook.ipynb").read_text()
    with pytest.raises(ParameterError, match="Did you mean 'data_root'"):
        prepare(small, assignments=["data_rot=/kaggle/input/mine"], **given)


def test_internet_is_on_only_for_weights_that_must_be_downloaded(small, tmp_path):
    def meta(name, path, **settings):
        state = prepare(path, user="anna", out=tmp_path / name, **settings)
        return json.loads((state.folder / "s1-r1/kernel/kernel-metadata.json").read_text())

    assert meta("a", small)["enable_internet"] is False
    charm = meta("b", "params/grid_charm.yaml", notebook_outputs=["anna/prepare-nih"])
    assert charm["enable_internet"] is True and charm["kernel_sources"] == ["anna/prepare-nih"]
    assert charm["dataset_sources"] == ["anna/charmlib-wheel", "nih-chest-xrays/data"]
    assert meta("c", "params/grid_charm.yaml", internet=False)["enable_internet"] is False
    assert meta("d", "params/grid_demo.yaml")["dataset_sources"] == ["anna/charmlib-wheel"]  # it draws its own data


def test_too_many_shards_and_no_user_are_refused(small, tmp_path):
    with pytest.raises(KaggleError, match="the grid has 4 cells"):
        prepare(small, user="anna", shards=5, out=tmp_path)
    with pytest.raises(KaggleError, match="--user is missing"):
        prepare(small, out=tmp_path)


@pytest.mark.parametrize("text", ["Bearer abcdef0123456789", "{'key': '0123456789abcdef'}", '{"refresh_token": "xyz123456"}',
                                  "KGAT_abcdef", "https://anna:secret12@api.kaggle.com", "x?Signature=ab%2Bcd&y=1"])
def test_what_has_the_shape_of_a_token_is_hidden(text):
    hidden = redact(text)
    assert "[token hidden]" in hidden
    assert not any(secret in hidden for secret in ("abcdef", "xyz123456", "secret12", "ab%2Bcd"))


def test_plain_words_stay_as_they_are():
    text = "Kernel version 1 successfully pushed.  Please check progress at https://www.kaggle.com/code/anna/charmlib-x"
    assert redact(text) == text


@pytest.mark.slow
def test_the_wheels_dataset_is_complete(tmp_path):
    """The wheel as ``kaggle_setup push`` builds it, from a checkout that it leaves as it was."""
    from kaggle_setup.wheel import write_dataset

    before = sorted(path for path in ROOT.iterdir())
    first = write_dataset(tmp_path / "wheel", "anna")
    assert {path.name for path in (tmp_path / "wheel").iterdir()} == {
        f"charmlib-{charmlib.__version__}-py3-none-any.whl", "check_gpu.py", "dataset-metadata.json"}
    meta = json.loads((tmp_path / "wheel/dataset-metadata.json").read_text())
    assert meta["id"] == "anna/charmlib-wheel" and len(meta["licenses"]) == 1 and "MIT" in meta["description"]
    held = set(zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))).namelist())
    assert not any(name.startswith("kaggle_setup") for name in held)
    for path in ROOT.glob("charmlib/**/*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in held, path
    for path in (*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("params/**/*.yaml")):
        assert f"charmlib/shipped/{path.relative_to(ROOT)}" in held, path
    assert sorted(path for path in ROOT.iterdir()) == before
    assert write_dataset(tmp_path / "wheel", "anna") == first  # so an unchanged checkout is not uploaded again
