"""The method of docs/add-a-method.md, installed as a package of its own and checked there with the conformance kit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add-a-method.md"


def files_of_page() -> dict[str, str]:
    """File name in a block's first line -> the block."""
    blocks = re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return dict(blocks)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder as pip leaves it: the module, and a dist-info with the entry points that pyproject.toml names."""
    files = files_of_page()
    project = tomllib.loads(files["pyproject.toml"])["project"]
    installed = tmp_path / "site"
    about = installed / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (installed / "peftkit_ssf.py").write_text(files["peftkit_ssf.py"])
    (tmp_path / "test_ssf.py").write_text(files["test_ssf.py"])
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_page_holds_the_files_of_a_package() -> None:
    assert set(files_of_page()) == {"peftkit_ssf.py", "pyproject.toml", "test_ssf.py"}


def test_installed_method_is_registered_and_wraps(package: Path) -> None:
    code = """
import peftkit, peftkit_ssf
from peftkit.testing import BACKBONES
assert peftkit.METHODS["ssf"] is peftkit_ssf.METHOD
assert "lora" in peftkit.METHODS
model = BACKBONES["bert"]()
planned = peftkit.plan(model, peftkit_ssf.SSF())
assert len(planned.sites) == 6 and planned.adapter_parameters == 6 * 2 * 32, str(planned)
peftkit.wrap(model, peftkit_ssf.SSF())
peftkit.merge(model)
"""
    done = run(package, "-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr


def test_kit_passes_over_the_installed_method(package: Path) -> None:
    done = run(package, "-m", "pytest", "test_ssf.py", "-q", "-W", "error", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) > 50
    assert "skipped" not in done.stdout


def test_kit_fails_over_the_installed_method_when_it_merges_with_the_wrong_sign(package: Path) -> None:
    module = package / "site" / "peftkit_ssf.py"
    right = 'new = {"weight": scale[:, None] * base["weight"]}'
    assert right in module.read_text()
    module.write_text(module.read_text().replace(right, right.replace("scale[", "-scale[")))
    done = run(package, "-m", "pytest", "test_ssf.py", "-q", "-k", "merge and llama", "-p", "no:cacheprovider")
    assert done.returncode == 1, done.stdout
    assert re.findall(r"FAILED test_ssf.py::(\S+)", done.stdout) == [
        "test_ssf_keeps_law[ssf-check_merge_matches_forward-llama]"
    ]


def test_name_that_differs_from_the_entry_point_is_refused(package: Path) -> None:
    points = next((package / "site").glob("*.dist-info")) / "entry_points.txt"
    points.write_text(points.read_text().replace("ssf = ", "sff = "))
    done = run(package, "-c", "import peftkit; peftkit.METHODS['sff']")
    assert done.returncode != 0
    assert "entry point 'sff' gives a method named 'ssf'; the names must agree" in done.stderr
