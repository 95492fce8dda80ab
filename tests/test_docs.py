"""What the documents say is true of the code: error codes, the annotated tree, quoted commands."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("photon", "pipelines", "flows")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
ERROR_ROW = re.compile(r"^\| `([A-Z0-9_]+)` \| (.+) \| (.+) \|$", re.MULTILINE)


def source_trees() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def code_positions(trees: list[ast.Module]) -> dict[str, int]:
    """Functions that take an error code, by name, and where among their arguments."""
    positions = {"PhotonError": 0}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                names = [argument.arg for argument in node.args.args if argument.arg not in ("self", "cls")]
                if "code" in names:
                    positions[node.name] = names.index("code")
    return positions


def constants_of(tree: ast.Module) -> dict[str, object]:
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def error_codes() -> dict[str, str]:
    """Every error code in the source and a place where it is used."""
    trees = list(source_trees())
    positions = code_positions([tree for _, tree in trees])
    found: dict[str, str] = {}
    for path, tree in trees:
        constants = constants_of(tree)
        returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
        pairs = [value.elts[0] for value in returned if isinstance(value, ast.Tuple) and value.elts]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in calls:
            name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
            if name in positions:
                by_name = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
                pairs += by_name or call.args[positions[name] : positions[name] + 1]
        for value in pairs:
            code = value.value if isinstance(value, ast.Constant) else constants.get(getattr(value, "id", ""))
            if isinstance(code, str) and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", code):
                found[code] = f"{path.relative_to(ROOT)}:{value.lineno}"
    return found


def documented_codes() -> list[str]:
    return [row[0] for row in ERROR_ROW.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))]


def test_every_error_code_is_documented_once_and_exists() -> None:
    used, documented = error_codes(), documented_codes()
    assert len(used) > 40, "the search for codes is broken"
    assert len(documented) == len(set(documented))
    missing = {code: place for code, place in used.items() if code not in documented}
    assert not missing, "describe these in docs/errors.md"
    assert not set(documented) - set(used), "docs/errors.md lists codes that no source raises"


def test_error_table_has_no_malformed_row() -> None:
    lines = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| `") for line in lines) == len(documented_codes())


def fenced_lines() -> list[str]:
    return [line for block in FENCED.findall(README) for line in block.splitlines()]


def tree_paths() -> list[str]:
    """Paths of the README's annotated tree: indented lines `name   what it is` under `folder/   what it is`."""
    block = next((b for b in FENCED.findall(README) if re.search(r"^photon/\s", b, re.MULTILINE)), "")
    paths: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        if not line.strip() or re.match(r"\s{12,}", line):
            continue
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        parent = "".join(name for _, name in folders)
        words = re.split(r"\s{2,}", line.strip())[0].split()
        paths += [parent + word for word in words]
        if words[-1].endswith("/"):
            folders.append((indent, words[-1]))
    return paths


def test_annotated_tree_is_true() -> None:
    paths = tree_paths()
    if not paths:
        pytest.skip("README.md has no annotated tree yet")
    made_at_run_time = ("data/", "out/", ".state/", ".venv/")
    missing = [
        path for path in paths if not path.startswith(made_at_run_time) and not list(ROOT.glob(path.rstrip("/")))
    ]
    assert not missing


def quoted_commands(program: str) -> list[list[str]]:
    """Commands of a program in the README's code blocks and code spans, as words."""
    spans = re.findall(r"`([^`\n]+)`", FENCED.sub("", README)) + fenced_lines()
    commands = [span.strip().removeprefix("$ ").split("  #")[0] for span in spans]
    return [shlex.split(command) for command in commands if re.match(rf"{program}( |$)", command)]


def test_quoted_photon_commands_exist() -> None:
    from typer.main import get_command

    from flows.cli import app

    known = {command.__name__: command for command in COMMANDS}
    options = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in get_command(app).commands.items()
    }
    assert set(options) == set(known)
    for words in quoted_commands("photon"):
        name = next((word for word in words[1:] if not word.startswith("-")), None)
        flags = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
        allowed = {"--help", "--version", "--debug"} | (options.get(name, set()) if name else set())
        assert name is None or name in known, f"README: {' '.join(words)}"
        assert flags <= allowed, f"README: {' '.join(words)}"


def test_quoted_make_targets_exist() -> None:
    makefile = ROOT / "Makefile"
    if not makefile.is_file():
        pytest.skip("there is no Makefile yet")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile.read_text(encoding="utf-8"), re.MULTILINE))
    for words in quoted_commands("make"):
        named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
        assert named <= targets, f"README: {' '.join(words)}"
