import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

import airl_fast

ROOT = Path(__file__).parents[1]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_the_package_imports_nothing_heavy():
    loaded = set(run("import sys, airl_fast; print(*sys.modules)").stdout.split())
    assert loaded & {"transformers", "datasets", "triton", "pydantic", "peft", "rich"} == set()


def test_importing_the_operators_imports_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import airl_fast; airl_fast.explain();"
    added = set(run(code + "print(*set(sys.modules) - before)").stdout.split())
    assert added & {"transformers", "datasets", "pydantic", "peft", "rich"} == set()


@pytest.mark.parametrize("name", airl_fast.__all__)
def test_public_names_resolve(name):
    value = getattr(airl_fast, name)
    if name != "__version__":
        assert value.__module__.startswith("airl_fast.")
        assert value.__doc__
        home = import_module(f"airl_fast.{airl_fast._HOME[name]}")
        assert getattr(home, name) is value
    assert name in dir(airl_fast)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'linear_logprobs'"):
        airl_fast.linear_logprobs  # noqa: B018


def test_a_source_tree_that_was_not_built_says_what_to_do(tmp_path):
    (tmp_path / "airl_fast").mkdir()
    (tmp_path / "airl_fast" / "__init__.py").write_bytes(Path(airl_fast.__file__).read_bytes())
    call = [sys.executable, "-S", "-c", "import airl_fast"]  # -S: nothing installed is in sight
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "install the tree itself" in done.stderr


def test_kernels_are_installed_under_the_package_and_nowhere_else():
    spec = util.find_spec("airl_fast.kernels")
    if spec is None:
        pytest.skip("airl_fast is not installed; kernels/ is mapped to its name by setuptools")
    kernels = import_module("airl_fast.kernels")
    assert Path(kernels.__file__).parent.name == "kernels"
    outside = "import importlib.util as u; print(u.find_spec('kernels'))"
    found = subprocess.run(
        [sys.executable, "-I", "-c", outside], capture_output=True, text=True, check=True
    ).stdout
    assert str(ROOT) not in found


def test_version_is_that_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert airl_fast.__version__ == project["version"]


def test_every_package_folder_is_listed_for_installation():
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "airl_fast").rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == folders | {"airl_fast.kernels"}
