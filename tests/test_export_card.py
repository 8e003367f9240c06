"""The card of an export, and how an export is put in place: in one step, and never over what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from exported import load_base, save_base, trained
from safetensors.torch import load_file
from tiny import built, logits

import peftkit
from peftkit import folder
from peftkit.certificate import MergeReport, SiteMerge
from peftkit.errors import CheckpointError, ConfigError, ExportError
from peftkit.export import TARGETS, export
from peftkit.export.card import LONGEST_TABLE, base_hash

ABOUT = {"data": "3,000 poems", "metrics": {"accuracy": 0.912, "loss": 1.5}, "seed": 7}
LORA = peftkit.LoRA(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "poems"
    return peftkit.save(trained(load_base("llama", llama), LORA), path, about=ABOUT)


def card_of(path: Path) -> tuple[dict[str, object], str]:
    """The front matter and the text of a card."""
    _, front, text = (path / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("target", TARGETS)
def test_card_says_where_the_adapter_comes_from(target, llama, adapter, tmp_path):
    export(adapter, tmp_path / "out", to=target)
    front, text = card_of(tmp_path / "out")
    assert front["base_model"] == str(llama)
    assert front["base_model_relation"] == ("finetune" if target == "merged" else "adapter")
    assert front["pipeline_tag"] == "text-generation"
    assert front["tags"] == ["peft", "lora"]
    method = peftkit.METHODS["lora"]
    assert f"- method: LoRA ({method.paper.title}. {method.paper})" in text
    assert '"r": 4' in text
    assert f"- base model: {llama} (LlamaForCausalLM)" in text
    digest = base_hash(json.loads((adapter / "peftkit.json").read_text()))
    assert f"- hash of the base weights: {digest}" in text
    assert "## Data\n\n3,000 poems\n" in text
    assert "## Metrics\n\n- accuracy: 0.912\n- loss: 1.5\n" in text
    assert "## Origin\n\n- seed: 7\n" in text
    assert ("## Conversion" in text) == (target != "merged")
    assert ("## Certificate of the merge" in text) == (target == "merged")


def test_code_of_a_peft_card_and_of_a_merged_one_runs(llama, adapter, tmp_path, monkeypatch):
    export(adapter, tmp_path / "merged", to="merged")
    _, text = card_of(tmp_path / "merged")
    (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    scope: dict[str, object] = {}
    exec(code.replace("path/to/this/folder", str(tmp_path / "merged")), scope)
    model = peftkit.load(load_base("llama", llama), adapter)
    expected = logits("llama", model)
    found = logits("llama", scope["model"].eval())
    assert torch.allclose(found, expected, atol=3e-6 * max(1.0, float(expected.abs().max())))


def test_hash_is_that_of_the_weights(llama, adapter, tmp_path):
    known = json.loads((adapter / "peftkit.json").read_text())
    shuffled = {"base": {**known["base"], "tensors": dict(reversed(known["base"]["tensors"].items()))}}
    assert base_hash(known) == base_hash(shuffled)
    other = load_base("llama", llama)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    export(trained(other, LORA), tmp_path / "other", to="peft")
    assert base_hash(json.loads((tmp_path / "other/peftkit.json").read_text())) != base_hash(known)
    assert base_hash({}) == "unknown"


def test_what_is_not_known_is_left_out_or_said(llama, adapter, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in (folder.CONFIG, folder.WEIGHTS):
        (plain / name).write_bytes((adapter / name).read_bytes())
    export(plain, tmp_path / "out", to="peft")
    _, text = card_of(tmp_path / "out")
    assert "- hash of the base weights: unknown" in text
    assert "## Data" not in text
    assert "## Metrics" not in text
    export(trained(built("llama"), LORA), tmp_path / "unnamed", to="peft")
    front, text = card_of(tmp_path / "unnamed")
    assert "base_model" not in front
    assert "# LoRA for LlamaForCausalLM" in text


@pytest.mark.parametrize(
    "origin", [{"base": "x"}, {"base": {"tensors": ["x"]}}, {"base": {"tensors": {"x": 1}}}, {"about": "x"}]
)
def test_origin_that_is_no_object_is_refused(origin, adapter, tmp_path):
    source = tmp_path / "adapter"
    source.mkdir()
    for name in (folder.CONFIG, folder.WEIGHTS):
        (source / name).write_bytes((adapter / name).read_bytes())
    (source / folder.PROVENANCE).write_text(json.dumps(origin))
    with pytest.raises(CheckpointError, match=r"peftkit.json: base, base.tensors or about is not an object"):
        export(source, tmp_path / "out", to="peft")


def test_card_quotes_names_that_yaml_would_read_otherwise(adapter, tmp_path):
    name = 'a: "b" # c'
    export(adapter, tmp_path / "out", to="peft", base_name=name)
    assert card_of(tmp_path / "out")[0]["base_model"] == name


def test_about_can_be_given_and_must_be_plain(adapter, tmp_path):
    export(adapter, tmp_path / "out", to="peft", about={"data": ["a", "b"], "metrics": 0.5})
    _, text = card_of(tmp_path / "out")
    assert "## Data\n\n- a\n- b\n" in text
    assert "## Metrics\n\n0.5\n" in text
    assert "seed" not in text
    assert json.loads((tmp_path / "out/peftkit.json").read_text())["about"] == {"data": ["a", "b"], "metrics": 0.5}
    for wrong in ({"data": {1, 2}}, {"metrics": float("nan")}):
        with pytest.raises(ExportError, match="about must hold plain JSON values"):
            export(adapter, tmp_path / "other", to="peft", about=wrong)
    assert not (tmp_path / "other").exists()


def site(path: str) -> SiteMerge:
    return SiteMerge(
        path=path, parameter="weight", dtype="bfloat16", delta_relative=0.05, error_relative=0.06, changed=0.5,
        effect_kept=0.99, delta_norm=1.0,
    )  # fmt: skip


def test_certificate_that_lies_beside_the_adapter_goes_along(adapter, tmp_path):
    source = tmp_path / "adapter"
    source.mkdir()
    for file in adapter.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    report = MergeReport(adapters=("poems",), sites=(site("model.layers.0.mlp.up_proj"),))
    report.save(source)
    export(source, tmp_path / "out", to="peft")
    assert MergeReport.from_json((tmp_path / "out/merge_report.json").read_text()) == report
    _, text = card_of(tmp_path / "out")
    assert f"## Certificate of the merge\n\n```\n{report}\n```" in text
    many = MergeReport(adapters=("poems",), sites=tuple(site(f"layers.{i}") for i in range(LONGEST_TABLE + 1)))
    many.save(source)
    export(source, tmp_path / "out", to="peft", overwrite=True)
    _, text = card_of(tmp_path / "out")
    assert "layers.3" not in text
    assert f"{str(many).splitlines()[-1]}\n(merge_report.json has every parameter)" in text
    export(adapter, tmp_path / "out", to="peft", overwrite=True)
    assert not (tmp_path / "out/merge_report.json").exists()


def test_conversion_is_said_with_its_error(llama, tmp_path):
    model = trained(load_base("llama", llama), peftkit.LoRA(r=4, use_dora=True))
    made = export(model, tmp_path / "out", to="peft", rank=3)
    _, text = card_of(tmp_path / "out")
    assert f"## Conversion\n\n{made.summary}." in text
    first = made.sites[0]
    assert f"| `{first.path}` | 3 | {first.error_relative:.2e} |" in text
    kept = json.loads((tmp_path / "out/peftkit.json").read_text())["converted"]
    assert kept == {
        "from": "lora", "exact": False, "rank": 3, "error_relative": made.error_relative,
        "largest_error": made.largest_error,
    }  # fmt: skip


# In place -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["peft", "gguf", "vllm", "merged"])
def test_folder_that_holds_files_is_kept_unless_told(target, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises((ExportError, CheckpointError), match=r"overwrite"):
        export(adapter, out, to=target)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    if target == "merged":  # it replaces model folders only
        return
    export(adapter, out, to=target, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "README.md").exists()


def test_empty_folder_is_taken(adapter, tmp_path):
    (tmp_path / "out").mkdir()
    export(adapter, tmp_path / "out", to="peft")
    assert (tmp_path / "out/adapter_config.json").exists()


def test_place_that_is_the_adapter_or_a_file_is_refused(adapter, tmp_path):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    with pytest.raises(ExportError, match=r"poems is the adapter itself; choose another folder"):
        export(adapter, adapter, to="peft", overwrite=True)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"file is a file; choose a folder to export into"):
        export(adapter, tmp_path / "file", to="vllm", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("target", ["peft", "gguf", "vllm"])
def test_write_that_fails_leaves_the_old_export_and_nothing_else(target, adapter, tmp_path, monkeypatch):
    export(adapter, tmp_path / "out", to=target)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "sync", full)
    with pytest.raises(CheckpointError, match=r"could not be written, and is as it was: .*No space left"):
        export(adapter, tmp_path / "out", to=target, overwrite=True)
    with pytest.raises(CheckpointError, match=r"No space left"):
        export(adapter, tmp_path / "new", to=target)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Merged ---------------------------------------------------------------------------------------------------------------


def test_merged_folder_holds_the_weights_of_a_merge_in_memory(llama, adapter, tmp_path):
    made = export(adapter, tmp_path / "out", to="merged", into="bf16")
    assert made.report is not None
    assert made.report == MergeReport.from_json((tmp_path / "out/merge_report.json").read_text())
    assert str(made).startswith(str(made.report))
    found = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    model = peftkit.merge_and_unload(peftkit.load(load_base("llama", llama), adapter))
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], value.bfloat16()), key


def test_merging_needs_folders(llama, adapter, tmp_path):
    model = trained(load_base("llama", llama), LORA)
    with pytest.raises(ExportError, match=r"written from an adapter folder .*peftkit.save.*merge_and_unload"):
        export(model, tmp_path / "out", to="merged")
    for fields, message in (
        ({"to": "merged", "rank": 4}, "rank and error are for conversions to LoRA"),
        ({"to": "peft", "into": "bf16"}, r"into is for to='merged', found to='peft'"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(adapter, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


def test_merging_from_a_name_on_the_hub_is_refused(adapter, tmp_path, monkeypatch):
    config = built("llama").config
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: config)
    with pytest.raises(ExportError, match=r"someone/llama is no folder here.*Download it and give its folder"):
        export(adapter, tmp_path / "out", to="merged", base="someone/llama")
