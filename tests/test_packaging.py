"""The parts of the package: its folders, its version, its public names."""

import inspect
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import cascadekit

ROOT = Path(__file__).parents[1]
SHIPPED = ("cli", "converters", "parity", "runtime", "schemas", "storage")


def test_every_folder_of_the_package_is_listed_in_pyproject() -> None:
    """A folder with code that is not listed would be missing from the wheel."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    with_code = {path.parent.relative_to(ROOT) for floor in SHIPPED for path in (ROOT / floor).rglob("*.py")}
    found = {"cascadekit", *(f"cascadekit.{'.'.join(folder.parts)}" for folder in with_code)}
    assert {name for name in listed if "data" not in name} == found


def test_every_folder_with_code_is_a_package() -> None:
    for floor in SHIPPED:
        for path in (ROOT / floor).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_version_is_that_of_the_installed_package() -> None:
    assert cascadekit.__version__ == version("cascadekit")


def test_each_public_function_and_value_has_an_example() -> None:
    """A call in its docstring; errors, and what functions return, have none."""
    returned = {"Forecast", "Report", "Stage"}
    for name in cascadekit.__all__:
        found = getattr(cascadekit, name)
        if name not in returned and not (isinstance(found, type) and issubclass(found, Exception)):
            code = r"^(    |```python\n(?:.*\n)*?).*"
            assert re.search(rf"{code}\b{name}(\.open)?\(", str(inspect.getdoc(found)), re.MULTILINE), name


def test_dir_shows_the_public_names_and_each_can_be_had() -> None:
    assert set(dir(cascadekit)) >= {"Cascade", "Settings", "convert", "export", "inspect", "__version__"}
    assert set(cascadekit.__all__) == {name for name in dir(cascadekit) if not name.startswith("_")}
    for name in cascadekit.__all__:
        assert getattr(cascadekit, name).__doc__, name


def test_the_example_model_and_its_loras_stay_small() -> None:
    """The wheel must stay below 20 MB; the example model has 14 MB of that."""
    data = ROOT / "converters" / "checkpoints" / "data"
    files = [path for name in ("example_model", "example_lora") for path in (data / name).rglob("*") if path.is_file()]
    assert len(files) >= 12
    assert sum(path.stat().st_size for path in files) <= 14_000_000
