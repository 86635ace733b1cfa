"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import inspect
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "accord_shared": ROOT / "shared",
    "accord_server": ROOT / "server",
    "accord_client": ROOT / "client",
    "accord_simulations": ROOT / "simulations",
}
ALLOWED = {
    "accord_shared": {"accord_shared"},
    "accord_server": {"accord_server", "accord_shared"},
    "accord_client": {"accord_client", "accord_shared"},
    "accord_simulations": set(PACKAGES),
}


def sources(package: str) -> list[Path]:
    return sorted((PACKAGES[package] / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in sources(package):
        strangers = {name for name in imports(path) if name.startswith("accord_")} - ALLOWED[package]
        assert not strangers, f"{path.name} imports {strangers}"


@pytest.mark.parametrize("package", ["accord_shared", "accord_server"])
def test_no_torch_where_nothing_is_trained(package: str) -> None:
    for path in sources(package):
        assert not imports(path) & {"torch", "transformers", "peft"}, path.name


def test_protocol_modules_have_no_io_and_no_clock() -> None:
    shared = PACKAGES["accord_shared"] / "accord_shared"
    plain = ("plan", "messages", "vectors", "canonical", "dp/events", "dp/accounting", "wire")
    secured = ("frames", "identity", "roster", "pkcs8", "quantize")
    paths = [*(shared / f"{name}.py" for name in (*plain, *secured)), *sorted((shared / "secagg").glob("*.py"))]
    assert len(paths) >= len(plain) + len(secured) + 8
    for path in paths:
        found = imports(path) & {"os", "time", "datetime", "socket", "random", "secrets", "threading"}
        assert not found, path.name


def test_a_member_draws_from_one_generator_that_callers_may_replace() -> None:
    text = (PACKAGES["accord_shared"] / "accord_shared" / "secagg" / "member.py").read_text()
    assert text.count("fresh_bytes") == 2  # imported, and the default
    assert "random: Random = fresh_bytes" in text


@pytest.mark.parametrize("package", ["accord_shared", "accord_server", "accord_client"])
def test_no_check_is_an_assert(package: str) -> None:
    for path in sources(package):
        assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)], path.name


def test_every_version_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in line and "://" not in line for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {d.split("[")[0].split("=")[0].split(">")[0].split("<")[0].strip().lower() for d in wanted}
    assert names - {"accord-federated"} <= pinned


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make simulate" in readme
    assert "make test" in readme


def test_flowers_delivery_loop_is_the_one_that_the_simulation_replaces() -> None:
    vce_api = pytest.importorskip("flwr.server.superlink.fleet.vce.vce_api")
    parameters = inspect.signature(vce_api.add_messages_to_queue).parameters
    assert list(parameters) == ["state", "queue", "nodes_mapping", "f_stop"]
    assert "target=add_messages_to_queue" in inspect.getsource(vce_api.run_api)
