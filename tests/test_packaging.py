"""The wheel is complete: installed alone it makes stores; and importing the package costs nothing."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tailorstore

CHECKOUT = Path(__file__).parent.parent

EXPORTS = [
    "AccessDeniedError",
    "AlreadyExistsError",
    "Bounds",
    "Checkpoint",
    "Commit",
    "CompositeWarning",
    "ConflictError",
    "IntegrityError",
    "InvalidInputError",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepTagged",
    "KeepWithin",
    "LazyTensor",
    "LightSettings",
    "MaskContext",
    "NotFoundError",
    "PendingCommit",
    "Store",
    "Strategy",
    "TailorError",
    "UnavailableError",
    "VersionError",
    "open_store",
    "parse_strategy",
    "strategies",
]
"""Frozen: what is added here must be kept for good."""


def run(command: Sequence[str | Path], cwd: Path, **env: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TAILORSTORE", "PIP"))}
    done = subprocess.run(
        command, cwd=cwd, env=clean | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as ``make build`` does."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, CHECKOUT], CHECKOUT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the interpreter of a new environment: the wheel, and beside it what this one has of other packages."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    interpreter = Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"
    run([sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel], folder)
    # After the wheel's own folder; path files in there, such as that of an editable install, are not followed.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in sorted(here)))
    return interpreter


def test_the_wheel_has_every_module_the_migrations_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition("/")[2] for name in archive.namelist() if ".dist-info/" in name}
        (points,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt"))
    here = [path for path in (CHECKOUT / "tailorstore").rglob("*") if "__pycache__" not in path.parts]
    results = CHECKOUT / "tailorstore" / "study" / "results"  # to be read here, of no use to programs
    expected = {str(path.relative_to(CHECKOUT)) for path in here if path.is_file() and path.parent != results}
    migrations = [path for path in (CHECKOUT / "migrations").rglob("*") if path.is_file()]
    expected |= {f"tailorstore/{path.relative_to(CHECKOUT)}" for path in migrations if path.suffix in (".py", ".mako")}
    assert found == expected
    assert "tailorstore/py.typed" in found
    assert {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"} == about
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    declared = {**project["scripts"], **project["entry-points"]["zarr.data_type"]}
    assert len(declared) > 5
    for name, target in declared.items():
        assert f"{name} = {target}" in points


def test_the_installed_wheel_makes_stores(python: Path, tmp_path: Path) -> None:
    program = """
        import json, sys
        import tailorstore as ts
        from tailorstore.catalog.schema import migrations_folder
        from tailorstore.storage.dtypes import register
        import torch, zarr
        register()
        with ts.open_store(sys.argv[1]) as store:
            store.commit(1, {"a.w": torch.arange(4).to(torch.bfloat16)})
            version = next(layer.version_id for layer in store.layers() if layer.name == "a")
        with ts.open_store(sys.argv[1], create=False) as store:
            values = store.checkout().model_state_dict()["a.w"].tolist()
            stored = str(zarr.open_group(f"{sys.argv[1]}/layers/a/{version}", mode="r")["a.w"].dtype)
        print(json.dumps([ts.__file__, str(migrations_folder()), values, stored, ts.__version__]))
    """
    lines = [line.removeprefix("        ") for line in program.splitlines()]
    said = run([python, "-I", "-c", "\n".join(lines), tmp_path / "root"], tmp_path)
    module, migrations, values, stored, version = json.loads(said.splitlines()[-1])
    assert Path(module).is_relative_to(python.parent.parent)
    assert Path(migrations).is_relative_to(python.parent.parent)
    assert values == [0.0, 1.0, 2.0, 3.0]
    assert stored == "bfloat16"
    assert version == tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    assert "tailorstore" in run([python.with_name("tailorstore"), "--help"], tmp_path).lower()


def test_the_public_names_are_the_frozen_ones() -> None:
    assert sorted(tailorstore.__all__) == EXPORTS
    assert dir(tailorstore) == sorted([*EXPORTS, "__version__"])
    for name in EXPORTS:
        assert getattr(tailorstore, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tailorstore.nothing


def modules_after(statement: str) -> set[str]:
    """Return the packages that are loaded in a fresh interpreter after a statement."""
    program = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    said = run([sys.executable, "-c", program], CHECKOUT)
    loaded: Any = json.loads(said.splitlines()[-1])
    return {name.partition(".")[0] for name in loaded}


HEAVY = {"alembic", "fsspec", "numcodecs", "numpy", "obstore", "psycopg", "s3fs", "sqlalchemy", "torch", "zarr"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert modules_after("import tailorstore; tailorstore.parse_strategy('parity() | top_k(3)')") & HEAVY == set()


def test_opening_a_store_imports_what_it_needs() -> None:
    assert {"torch", "sqlalchemy"} <= modules_after("from tailorstore import open_store")
