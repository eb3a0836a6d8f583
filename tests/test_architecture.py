"""What holds of the sources as a whole: floors, sizes, forbidden ways, and the tree of errors."""

import ast
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailorstore.domain import errors
from tailorstore.domain.errors import TailorError

CHECKOUT = Path(__file__).parent.parent
MODULES = sorted((CHECKOUT / "tailorstore").rglob("*.py"))
MOST_LINES = 450

UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "yaml"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint"}
UNSAFE_METHODS = {("os", "system"), ("os", "popen"), ("builtins", "eval"), ("builtins", "exec"), ("ast", "unparse")}
LOADERS = {("numpy", "load"), ("np", "load"), ("torch", "load"), ("torch.jit", "load"), ("pd", "read_pickle")}
UNSAFE_ARGUMENTS = {("allow_pickle", True), ("weights_only", False), ("shell", True)}


def name_of(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def test_there_are_modules_to_look_at() -> None:
    assert {"tailorstore/__init__.py", "tailorstore/engine/store.py"} <= {name_of(path) for path in MODULES}


def test_floors_import_downwards_only() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* kept, 0 broken", done.stdout), done.stdout


def test_no_module_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and name of every module that is imported and every function that is called by name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, f"import {one.name.partition('.')[0]}") for one in names)
            case ast.ImportFrom(module=str(module)):
                yield node.lineno, f"import {module.partition('.')[0]}"
            case ast.Call(func=ast.Name(id=name)):
                yield node.lineno, f"call {name}"
            case ast.Call(func=ast.Attribute(value=owner, attr=name), keywords=given):
                yield node.lineno, f"call {ast.unparse(owner)}.{name}"
                # Of PyTorch's own files the loader runs what they say, unless it is told to take tensors alone.
                safe = any(one.arg == "weights_only" and ast.unparse(one.value) == "True" for one in given)
                if (ast.unparse(owner), name) in LOADERS and not safe:
                    yield node.lineno, f"load {ast.unparse(owner)}.{name}"
            case ast.keyword(arg=str(name), value=ast.Constant(value=value)) if (name, value) in UNSAFE_ARGUMENTS:
                yield node.lineno, f"argument {name}={value!r}"


UNSAFE = (
    {f"import {name}" for name in UNSAFE_MODULES}
    | {f"call {name}" for name in UNSAFE_NAMES}
    | {f"call {owner}.{name}" for owner, name in UNSAFE_METHODS}
    | {f"load {owner}.{name}" for owner, name in LOADERS}
    | {f"argument {name}={value}" for name, value in UNSAFE_ARGUMENTS}
)


def test_nothing_that_is_read_is_ever_run() -> None:
    found = [
        f"{name_of(path)}:{line} {use}"
        for path in MODULES
        for line, use in uses(ast.parse(path.read_text()))
        if use in UNSAFE
    ]
    assert found == []


def test_unsafe_uses_would_be_found() -> None:
    source = (
        "import pickle\nfrom dill import loads\ndef f(): return eval('1')\nfrom yaml import safe_load\n"
        "torch.load(x, weights_only=True)\ntorch.load(x)\nnp.load(x, allow_pickle=True)\nrun(x, shell=True)\n"
    )
    found = {use for _, use in uses(ast.parse(source)) if use in UNSAFE}
    assert found == {
        *("import pickle", "import dill", "call eval", "import yaml"),
        *("load torch.load", "load np.load", "argument allow_pickle=True", "argument shell=True"),
    }
    assert [line for line, use in uses(ast.parse(source)) if use == "load torch.load"] == [6]


# --- Errors


ERRORS = [one for _, one in inspect.getmembers(errors, inspect.isclass) if one.__module__ == errors.__name__]


def drawn_tree() -> dict[str, set[str]]:
    """Read the tree in the docstring of the errors' module: class → what it is drawn below, and its built-in base."""
    found: dict[str, set[str]] = {"TailorError": set()}
    names = {one.__name__ for one in ERRORS}
    drawn = re.sub(r"\n│ +", " ", errors.__doc__ or "")  # long lines are continued
    for branch, builtin, rest in re.findall(r"[├└]─ (\w+)(?: \((\w+)\))?[ ]*(.*)", drawn):
        found[branch] = {"TailorError", builtin} - {""}
        leaves = [f"{leaf.strip()}Error" for leaf in rest.partition("→")[0].split("·")]
        # What stands there where a branch has no leaves is prose.
        found |= {leaf: {"TailorError", branch} for leaf in leaves if leaf in names or len(leaves) > 1}
    return found


def test_the_errors_are_those_of_the_drawn_tree() -> None:
    drawn = drawn_tree()
    assert sorted(drawn) == sorted(one.__name__ for one in ERRORS)
    for error in ERRORS:
        above = {base.__name__ for base in error.__mro__[1:]}
        assert drawn[error.__name__] <= above, error
        # Whoever catches a built-in class must find it in the tree.
        builtin = {base.__name__ for base in error.__bases__ if base.__module__ == "builtins"} - {"Exception"}
        assert builtin <= drawn[error.__name__], error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_errors_end_in_error_and_survive_the_way_to_another_process(error: type[TailorError]) -> None:
    assert error.__name__.endswith("Error")
    assert issubclass(error, TailorError)
    assert error.__doc__
    raised = error("step 3 of layer 'a', key x/y: it's gone")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        copy = pickle.loads(pickle.dumps(raised, protocol))  # noqa: S301 - of one's own, as multiprocessing does it
        assert type(copy) is error
        assert copy.args == raised.args
        # Unquoted, also where the base is KeyError.
        assert str(copy) == "step 3 of layer 'a', key x/y: it's gone"
    assert str(error()) == error.__name__
