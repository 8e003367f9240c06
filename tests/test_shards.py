"""Merging folders: the bytes are those of a merge in memory, for every method, and what is beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from shard_folders import LORA, adapter_folder, base_folder, loaded, merged_in_memory, subject, tensors, weights
from test_conformance import SMALL, VARIANTS
from tiny import bits

import peftkit
from peftkit.certificate import MergeReport
from peftkit.errors import CheckpointError, ConfigError, MergeError
from peftkit.shards import merge_shards, plan_shards
from peftkit.testing.backbones import BACKBONES

MERGEABLE = [name for name, method in peftkit.METHODS.items() if method.mergeable]
CASES = [(name, "", SMALL.get(name, {})) for name in MERGEABLE]
CASES += [("lora", label, fields) for label, fields in VARIANTS["lora"].items() if label != "bias"]
BACKBONE_OF = {"head": "bert", "bitfit": "gpt2", "layernorm": "t5", "full": "gpt2", "ia3": "bart"}
"""Where a method finds what it trains, and tied weights beside it."""
APPROXIMATE = ("delta_relative", "error_relative", "effect_kept", "delta_norm")


def agree(found, expected):
    """The same sites in the same order, measured alike; sums over stripes are in another order."""
    assert [s.name for s in found.sites] == [s.name for s in expected.sites]
    for ours, theirs in zip(found.sites, expected.sites, strict=True):
        for key, value in asdict(theirs).items():
            mine = getattr(ours, key)
            assert mine == pytest.approx(value, rel=1e-6, abs=1e-9) if key in APPROXIMATE else mine == value, key


@pytest.mark.parametrize(("method", "label", "fields"), CASES, ids=[f"{m}{'-' * bool(v)}{v}" for m, v, _ in CASES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_files_are_those_of_a_merge_in_memory(tmp_path, method, label, fields, dtype):
    backbone = BACKBONE_OF.get(method, "llama")
    base = base_folder(tmp_path, backbone, dtype)
    adapter = adapter_folder(tmp_path, base, subject(method, backbone, **fields).config)
    memory, expected = merged_in_memory(tmp_path, base, adapter)
    report = peftkit.merge_shards(base, adapter, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(memory)
    assert weights(memory) != weights(base)
    agree(report, expected)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in ("mlp", "llama")])
def test_files_are_those_of_a_merge_in_memory_in_every_family(tmp_path, backbone):
    base = base_folder(tmp_path, backbone, torch.bfloat16)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    memory, expected = merged_in_memory(tmp_path, base, adapter)
    report = merge_shards(base, adapter, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(memory)
    agree(report, expected)


def test_a_third_partys_method_needs_nothing_more(tmp_path):
    """What shards.py knows of a method is what its Method declares."""
    import ast
    from pathlib import Path

    folder = Path(peftkit.shards.__file__).parent
    imported = {
        node.module
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert not [name for name in imported if name and name.startswith("peftkit.methods")]


class Wide(torch.nn.Module):
    """Matrices tall and broad enough for several stripes."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(300, 100)
        self.first = torch.nn.Linear(100, 330)
        self.second = torch.nn.Linear(330, 260, bias=False)

    def forward(self, x):
        return self.second(self.first(self.embed(x)))


STRIPED = {
    "lora": peftkit.LoRA(r=6, lora_alpha=7, target_modules=("embed", "first", "second")),
    "lora-bias": peftkit.LoRA(r=6, lora_bias=True, target_modules=("first",)),
    "dora": peftkit.LoRA(r=6, use_dora=True, target_modules=("first", "second")),
    "adalora": peftkit.AdaLoRA(init_r=6, target_r=3, total_step=100, target_modules=("first", "second")),
    "vera": peftkit.VeRA(r=24, target_modules=("first", "second")),
    "loha": peftkit.LoHa(r=3, target_modules=("first", "second")),
    "ia3": peftkit.IA3(target_modules=("first", "second"), feedforward_modules=("second",)),
    "oft": peftkit.OFT(oft_block_size=10, target_modules=("first", "second")),
    "full": peftkit.FullFineTuning(),
    "bitfit": peftkit.BitFit(),
}


@pytest.mark.parametrize("case", STRIPED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_rows_folded_apart_give_the_bytes_of_the_whole(tmp_path, case, dtype):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = Wide().to(dtype)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    peftkit.wrap(model, STRIPED[case])
    from peftkit.testing.subject import perturb

    perturb(model, noise=0.1)
    adapter = peftkit.save(model, tmp_path / "adapter")
    with torch.device("meta"):
        skeleton, again = Wide(), Wide()
    plan = plan_shards(tmp_path / "base", adapter, tmp_path / "out", model=again, max_memory="420kB")
    assert plan.by_rows >= 1
    assert plan.memory <= 420_000 or plan.memory == 32 * 1024 * 1024  # the buffers of a copy
    report = merge_shards(tmp_path / "base", adapter, tmp_path / "out", model=skeleton, max_memory="420kB")
    expected = peftkit.merge(model)
    peftkit.merge_and_unload(model)
    found = tensors(tmp_path / "out")
    for key, value in model.state_dict().items():
        assert bits(found[key]) == bits(value), key
    agree(report, expected)


def test_stripes_cover_every_row_once():
    from types import SimpleNamespace

    from peftkit.shards import units

    for rows in (1, 2, 63, 64, 65, 127, 128, 129, 1000, 11008):
        for memory in (1, 10_000, 100_000, 10**9):
            entry = SimpleNamespace(shape=(rows, 8), count=rows * 8, size=rows * 16, dtype="BF16")
            unit = SimpleNamespace(sites=[SimpleNamespace(path="m")], keys={"m.weight": ("k",)})
            found = units.stripes(unit, SimpleNamespace(entries={"k": entry}), memory)
            assert [i for start, stop in found for i in range(start, stop)] == list(range(rows))
            assert all(stop - start >= min(rows, units.STRIPE) for start, stop in found)
            assert all(start % units.STRIPE == 0 for start, _ in found)


def test_what_is_not_touched_is_copied_to_the_byte(tmp_path):
    base = base_folder(tmp_path, "llama", torch.bfloat16)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(r=4, target_modules=("q_proj",)))
    plan = plan_shards(base, adapter, tmp_path / "out")
    merge_shards(base, adapter, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {key for key in before if bits(before[key]) != bits(after[key])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert (plan.changed, plan.copied) == (2, len(before) - 2)


@pytest.mark.parametrize("into", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_into_rounds_once_to_the_dtype_asked_for(tmp_path, into, stored):
    base = base_folder(tmp_path, "llama", stored)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    report = merge_shards(base, adapter, tmp_path / "out", into=into)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[into]
    wide = loaded(base).float()
    peftkit.load(wide, adapter)
    peftkit.merge(wide)
    peftkit.merge_and_unload(wide)
    found = tensors(tmp_path / "out")
    for key, value in wide.state_dict().items():
        assert bits(found[key]) == bits(value.to(dtype)), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    bound = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 2**-23}[into]
    assert 0 <= report.error_relative < 30 * bound
    assert all(site.dtype == str(dtype).removeprefix("torch.") for site in report.sites)
    again = loaded(tmp_path / "out")
    assert next(again.parameters()).dtype == dtype


def test_into_refuses_what_overflows(tmp_path):
    base = base_folder(tmp_path, "llama", torch.float32)
    from shard_folders import rewritten

    rewritten(base, lambda found: {**found, "model.norm.weight": found["model.norm.weight"] * 1e6})
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    with pytest.raises(MergeError, match=r"model.norm.weight overflows float16; merge into bf16 or fp32"):
        merge_shards(base, adapter, tmp_path / "out", into="fp16")
    assert not (tmp_path / "out").exists()


def test_a_diverged_adapter_is_refused(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    from safetensors.torch import load_file, save_file

    held = load_file(adapter / "adapter_model.safetensors")
    key = sorted(held)[0]
    held[key][0, 0] = float("nan")
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"the merged value holds values that are not finite.*diverged training"):
        merge_shards(base, adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("base", "adapter")] == []


def test_a_change_too_small_for_the_dtype_is_refused_and_accepted_without_starting_anew(tmp_path):
    base = base_folder(tmp_path, "llama", torch.bfloat16)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA), noise=1e-3)
    with pytest.raises(MergeError, match=r"only [\d.]+% of what the adapters change would be.*goes on from here"):
        merge_shards(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = merge_shards(base, adapter, tmp_path / "out", minimum_effect=0)
    assert report.kept < 0.9
    with pytest.raises(ConfigError, match=r"minimum_effect must lie in \[0, 1\], found 2"):
        merge_shards(base, adapter, tmp_path / "more", minimum_effect=2)


# Several adapters ---------------------------------------------------------------------------------------------------


def test_several_adapters_fold_in_turn_as_in_memory(tmp_path):
    base = base_folder(tmp_path, "llama", torch.bfloat16)
    first = adapter_folder(tmp_path, base, peftkit.IA3(target_modules=("q_proj", "down_proj")), name="first")
    second = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA), name="second", seed=4)
    memory, expected = merged_in_memory(tmp_path, base, first, second)
    report = merge_shards(base, [first, second], tmp_path / "out")
    assert weights(tmp_path / "out") == weights(memory)
    agree(report, expected)
    other = merge_shards(base, [second, first], tmp_path / "other")
    assert weights(tmp_path / "other") != weights(memory)
    assert other.adapters == ("second", "first")


def test_weights_scale_what_each_adapter_adds(tmp_path):
    base = base_folder(tmp_path)
    first = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA), name="first")
    second = adapter_folder(tmp_path, base, peftkit.LoHa(r=2, target_modules=("q_proj", "up_proj")), name="second")
    report = merge_shards(base, {first: 0.25, second: -1.5}, tmp_path / "out")
    start = {k: v.double() for k, v in tensors(base).items()}
    alone = []
    for adapter in (first, second):
        merge_shards(base, adapter, tmp_path / f"{adapter.name}-alone")
        alone.append({k: v.double() - start[k] for k, v in tensors(tmp_path / f"{adapter.name}-alone").items()})
    for key, value in tensors(tmp_path / "out").items():
        meant = start[key] + 0.25 * alone[0][key] - 1.5 * alone[1][key]
        assert torch.allclose(value.double(), meant, atol=4 * 2**-24 * float(1 + meant.abs().max())), key
    assert report.adapters == ("first x 0.25", "second x -1.5")
    assert float((tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]).abs().max()) > 0


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (peftkit.IA3(), "IA3Adapter"),
        (peftkit.LoRA(use_dora=True, r=4), "DoraAdapter"),
        (peftkit.OFT(oft_block_size=8), "OftAdapter"),
        (peftkit.FullFineTuning(), "is trained whole"),
    ],
    ids=["ia3", "dora", "oft", "full"],
)
def test_a_weight_is_refused_where_nothing_is_added(tmp_path, config, word):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, config)
    with pytest.raises(MergeError, match=rf"with weight 0.5: .*{word}.*no sum that a weight could scale"):
        merge_shards(base, {adapter: 0.5}, tmp_path / "out")


def test_adapters_declare_truly_whether_they_add(tmp_path):
    """`additive` over every method: folding into zeros gives what is added to any weight, or it does not."""
    for method in MERGEABLE:
        for label, fields in {"": SMALL.get(method, {}), **VARIANTS.get(method, {})}.items():
            if label in ("bias", "patterns"):
                continue
            backbone = BACKBONE_OF.get(method, "llama")
            model = subject(method, backbone, **fields).adapted(torch.float64)
            for path, adapter in _adapters(model):
                if not (adapter.advises or adapter.replaces):
                    continue
                own = model.get_submodule(path)
                from peftkit.quantization import weights_of

                held = weights_of(own)
                base = held.read()
                turned = {n: held.turn(n, v) if adapter.raw else v for n, v in base.items()}
                nothing = {n: torch.zeros_like(v) for n, v in turned.items()}
                try:
                    full, alone = adapter.merged(turned), adapter.merged(nothing)
                    added = all(torch.allclose(full[n] - turned[n], alone[n], atol=1e-9) for n in full)
                except (ValueError, ZeroDivisionError):
                    added = False
                assert added == adapter.additive, (method, label, path)
                break


def _adapters(model):
    from peftkit.wrap import adapters_of

    return adapters_of(model, "default")


def test_two_trained_heads_are_refused(tmp_path):
    base = base_folder(tmp_path, "bert")
    first = adapter_folder(tmp_path, base, peftkit.LoRA(r=2), name="first")
    second = adapter_folder(tmp_path, base, peftkit.LoRA(r=2), name="second")
    with pytest.raises(MergeError, match=r"classifier.weight is trained whole by .*first and by .*second.*merge one"):
        merge_shards(base, [first, second], tmp_path / "out")


def test_dora_on_top_of_another_adapter_is_refused(tmp_path):
    base = base_folder(tmp_path)
    first = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA), name="first")
    second = adapter_folder(tmp_path, base, peftkit.LoRA(r=2, use_dora=True), name="second")
    with pytest.raises(
        MergeError, match=r"DoraAdapter .*second\) reads the weight beneath it.*give it first, or alone"
    ):
        merge_shards(base, [first, second], tmp_path / "out")
    merge_shards(base, [second, first], tmp_path / "out")


# Beside the weights -------------------------------------------------------------------------------------------------


def test_small_files_are_copied_and_code_and_pickles_are_not(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"):
        (base / name).write_text(f"{{}} of {name}")
    for name in ("modeling_x.py", "pytorch_model.bin", "training_args.bin", "x.pkl", "model.gguf", "README.md"):
        (base / name).write_text("not taken over")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    (base / "onnx").mkdir()
    plan = plan_shards(base, adapter, tmp_path / "out")
    merge_shards(base, adapter, tmp_path / "out")
    out = tmp_path / "out"
    found = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    copied = ["LICENSE", "additional_chat_templates/tool.jinja", "chat_template.jinja", "generation_config.json"]
    copied += ["tokenizer.json", "tokenizer.model", "vocab.txt"]
    assert found == sorted([*copied, "README.md", "config.json", "merge_report.json", "model.safetensors"])
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in [*copied, "config.json"])
    assert dict(plan.left_out)["modeling_x.py"] == "code, which is never taken over"
    assert {"pytorch_model.bin", "training_args.bin", "x.pkl", "model.gguf", "onnx/"} <= set(dict(plan.left_out))


def test_the_certificate_and_the_card_go_into_the_folder(tmp_path):
    base = base_folder(tmp_path)
    model = peftkit.load(loaded(base), adapter_folder(tmp_path, base, peftkit.LoRA(**LORA)))
    adapter = peftkit.save(model, tmp_path / "told", about={"data": "some words", "accuracy": 0.5})
    report = merge_shards(base, adapter, tmp_path / "out")
    stored = MergeReport.from_json((tmp_path / "out" / "merge_report.json").read_text())
    assert stored == report
    card = (tmp_path / "out" / "README.md").read_text()
    for word in ("LlamaForCausalLM", "told, LoRA (Hu et al.", '"some words"', "14 parameters changed", "accuracy: 0.5"):
        assert word in card, word


def test_files_of_another_size(tmp_path):
    base = base_folder(tmp_path, "llama", torch.bfloat16)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    memory, _ = merged_in_memory(tmp_path, base, adapter)
    plan = plan_shards(base, adapter, tmp_path / "out", shard_size="20kB")
    merge_shards(base, adapter, tmp_path / "out", shard_size="20kB")
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 1
    assert files == sorted(set(index["weight_map"].values())) == sorted(name for name, _ in plan.files)
    assert [(f, (out / f).stat().st_size) for f, _ in plan.files] == list(plan.files)
    assert all(sum(t.nbytes for t in _of(out / f).values()) <= 20_000 for f in files)
    ours, theirs = tensors(out), tensors(memory)
    assert {k: bits(v) for k, v in ours.items()} == {k: bits(v) for k, v in theirs.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in theirs.values())
    assert {k: bits(v) for k, v in loaded(out).state_dict().items()} == {k: bits(v) for k, v in theirs.items()}
    back = merge_shards(out, adapter, tmp_path / "one", shard_size="1GB", ignore=("base",))
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert len(back.sites) == 14


def _of(file):
    from safetensors.torch import load_file

    return load_file(file)


def test_several_files_stay_the_files_that_they_are(tmp_path):
    base = base_folder(tmp_path, "bert", torch.bfloat16, max_shard_size="20kB")
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    memory, _ = merged_in_memory(tmp_path, base, adapter, max_shard_size="20kB")
    merge_shards(base, adapter, tmp_path / "out")
    assert len(weights(base)) > 2
    ours, theirs = tensors(tmp_path / "out"), tensors(memory)
    assert {k: bits(v) for k, v in ours.items()} == {k: bits(v) for k, v in theirs.items()}
    name = "model.safetensors.index.json"
    assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    for file in weights(base):
        assert list(_of(tmp_path / "out" / file)) == list(_of(base / file))


def test_out_is_not_overwritten_unasked(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    out = tmp_path / "out"
    merge_shards(base, adapter, out)
    (out / "old.txt").write_text("old")
    with pytest.raises(CheckpointError, match=r"out exists; .*overwrite=True, --overwrite"):
        merge_shards(base, adapter, out)
    merge_shards(base, adapter, out, overwrite=True, into="bf16")
    assert not (out / "old.txt").exists()
    assert next(iter(tensors(out).values())).dtype == torch.bfloat16
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"home is no folder of a model, so it is not overwritten"):
        merge_shards(base, adapter, tmp_path / "home", overwrite=True)
    for wrong in (base, base / "sub", tmp_path, adapter):
        with pytest.raises(CheckpointError, match=r"lie in each other; choose another folder for OUT"):
            merge_shards(base, adapter, wrong, overwrite=True)


def test_a_dry_run_writes_nothing_and_knows_the_size(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    before = sorted(p.as_posix() for p in tmp_path.rglob("*"))
    plan = plan_shards(base, adapter, tmp_path / "out", into="bf16")
    assert sorted(p.as_posix() for p in tmp_path.rglob("*")) == before
    merge_shards(base, adapter, tmp_path / "out", into="bf16")
    assert plan.size == sum(len(content) for content in weights(tmp_path / "out").values())
    assert "14 tensors change, 7 are copied" in str(plan)


def test_progress_counts_every_byte(tmp_path):
    base = base_folder(tmp_path)
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    seen = []
    merge_shards(base, adapter, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in tensors(base).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
