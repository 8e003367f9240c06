"""The documentation: its code runs, its generated parts agree with the code, its links and commands exist."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from peftkit import METHODS, cli
from peftkit.methods import BUILT_IN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
RUN = [page for page in PAGES if "```python" in page.read_text() and page.name != "add-a-method.md"]
"""Pages whose code runs here; adding a method is tried out from a package of its own, in another test."""


def names(pages):
    return [page.relative_to(ROOT).as_posix() for page in pages]


def fences(page: Path) -> list[tuple[int, str]]:
    """Line number and text of each block of Python."""
    text = page.read_text()
    return [
        (text[: match.start()].count("\n") + 2, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", RUN, ids=names(RUN))
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, code in fences(page):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), scope)


def test_pages_that_teach_have_code_that_runs():
    assert {"README.md", "quickstart.md", "concepts.md"} <= {page.name for page in RUN}


def test_generated_parts_agree_with_the_code(generate):
    assert generate.stale() == [], "run make docs"


def test_a_page_that_is_edited_by_hand_counts_as_stale(generate, tmp_path, monkeypatch):
    for page in generate.pages():
        copy = tmp_path / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(page.read_text())
    for folder in ("peftkit", "kernels", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "PAGES", tmp_path / "docs" / "methods")
    assert generate.stale() == []
    page = tmp_path / "docs" / "methods" / "lora.md"
    page.write_text(page.read_text().replace("arxiv.org/abs/2106.09685", "arxiv.org/abs/2106.00000"))
    assert generate.stale() == ["docs/methods/lora.md"]
    page.write_text("# LoRA\n")
    with pytest.raises(ValueError, match=r"lora.md: expected <!-- facts -->"):
        generate.stale()


def test_every_method_of_the_package_has_a_page_with_an_example():
    pages = {page.stem for page in (DOCS / "methods").glob("*.md")}
    assert pages == {method.name for method in BUILT_IN}
    for method in BUILT_IN:
        code = "".join(text for _, text in fences(DOCS / "methods" / f"{method.name}.md"))
        assert f"peftkit.{method.config.__name__}(" in code, f"{method.name}.md shows no config of the method"


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_every_field_of_a_config_is_documented(generate, method):
    documented = generate.field_docs(method.config)
    undocumented = [name for name, (_, text) in documented.items() if not text]
    assert undocumented == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_readme_opens_with_the_two_commands():
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line]
    assert lines[:5] == ["# peftkit", "```", "make demo", "make test", "```"]


def test_readme_maps_files_that_exist():
    text = (ROOT / "README.md").read_text()
    files = re.findall(r"^\| `([^`]+)` \|", text[text.index("\n## Files") :], re.MULTILINE)
    assert [name for name in files if not (ROOT / name).exists()] == []
    assert {"Makefile", "pyproject.toml", "peftkit/wrap.py"} <= set(files)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)(?=`|$| {2,})", text, re.MULTILINE)) <= targets
    top = get_command(cli.app).commands
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    shell = "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])
    for word, following in re.findall(r"^peftkit ([a-z]+)(?: ([a-z]+))?", shell, re.MULTILINE):
        assert word in top, f"{page.name}: peftkit {word}"
        if word == "bench":
            assert following in top["bench"].commands, f"{page.name}: peftkit bench {following}"


def test_the_example_takes_an_adapter_through_every_route(tmp_path):
    program = [sys.executable, str(DOCS / "examples" / "routes.py"), "--steps", "2", "--texts", "32"]
    done = subprocess.run([*program, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = done.stdout
    assert [int(n) for n in re.findall(r"^== route (\d+)", text, re.MULTILINE)] == list(range(1, 12))
    assert text.count("merged default into") >= 6, "a certificate for each of the six merges"
    assert len(list(tmp_path.glob("certificate-*.json"))) == 6
    fused = text[text.index("== route 3") : text.index("== route 4")]
    assert "logits off by 0.0%" in fused
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    assert "refused: llama.cpp" in text
