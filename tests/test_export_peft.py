"""Plain LoRA folders: Hugging Face peft reads them and computes what the adapter computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import pytest
import torch
import transformers
from exported import deltas, load_base, save_base, trained
from safetensors.torch import load_file, save_file
from tiny import built, logits, picture

import peftkit
from peftkit.errors import BaseMismatchError, ConfigError, ExportError, StateError
from peftkit.export import export
from peftkit.export.factors import _nearest

# peft's own use of transformers, which is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EVERY = "all-linear"
EXACT = {
    "lora": peftkit.LoRA(r=4, lora_alpha=16, target_modules=EVERY),
    "rslora": peftkit.LoRA(r=4, lora_alpha=16, use_rslora=True, target_modules=EVERY),
    "patterns": peftkit.LoRA(
        r=2, lora_alpha=3, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 9}, target_modules=EVERY
    ),
    "gaussian": peftkit.LoRA(r=4, init_lora_weights="gaussian"),
    "pissa": peftkit.LoRA(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=EVERY),
    "olora": peftkit.LoRA(r=4, lora_alpha=4, init_lora_weights="olora"),
    "embedding": peftkit.LoRA(r=3, target_modules=["embed_tokens", "q_proj"]),
    "adalora": peftkit.AdaLoRA(init_r=4, target_r=2, total_step=10, target_modules=EVERY),
    "vera": peftkit.VeRA(r=6, target_modules=EVERY),
    "vera-regenerated": peftkit.VeRA(r=6, save_projection=False, projection_prng_key=5),
    "loha": peftkit.LoHa(r=2, alpha=3, target_modules=EVERY),
    "lokr": peftkit.LoKr(r=2, alpha=3, decompose_factor=2, target_modules=EVERY),
}
RANKS = {"lora": 4, "rslora": 4, "patterns": 5, "gaussian": 4, "pissa": 8, "olora": 8, "embedding": 3, "adalora": 4,
         "vera": 6, "vera-regenerated": 6, "loha": 4, "lokr": 4}  # fmt: skip
DENSE = {
    "dora": peftkit.LoRA(r=4, use_dora=True),
    "loha": peftkit.LoHa(r=8, alpha=3),
    "lokr": peftkit.LoKr(r=64, alpha=3),
    "oft": peftkit.OFT(oft_block_size=8),
    "ia3": peftkit.IA3(),
    "vera": peftkit.VeRA(r=64),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base") / "llama")


def in_peft(name: str, base: Path, folder: Path):
    """The base with the folder in it, as peft loads it."""
    return peft.PeftModel.from_pretrained(load_base(name, base), folder).eval()


def bound(expected: torch.Tensor) -> float:
    # Sums of products in float32, ordered differently.
    return 3e-6 * max(1.0, float(expected.abs().max()))


def assert_same(name: str, expected: torch.Tensor, found: torch.Tensor, base: torch.Tensor) -> None:
    assert float((expected - found).abs().max()) <= bound(expected)
    assert float((expected - base).abs().max()) > 1e-2, "an adapter without effect shows nothing"


def product(folder: Path, path: str) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    down, up = (tensors[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
    return fields["lora_alpha"] / fields["r"] * up @ down


@pytest.mark.parametrize("label", list(EXACT))
def test_peft_computes_the_same_from_the_export_of_a_model_and_of_its_folder(label, llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT[label])
    peftkit.save(model, tmp_path / "adapter")
    expected = logits("llama", model)
    made = export(model, tmp_path / "from model", to="peft")
    again = export(tmp_path / "adapter", tmp_path / "from folder", to="peft")
    assert (made.rank, made.exact, made.target) == (RANKS[label], True, "peft")
    # A product of factors that were rounded to float32 once more.
    assert made.error_relative <= 1e-6
    assert made.sites == again.sites
    base = logits("llama", load_base("llama", llama))
    for folder in ("from model", "from folder"):
        assert_same("llama", expected, logits("llama", in_peft("llama", llama, tmp_path / folder)), base)
    one, two = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("from model", "from folder"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert_same(
        "llama", expected, logits("llama", peftkit.load(load_base("llama", llama), tmp_path / "from model")), base
    )


@pytest.mark.parametrize("label", list(EXACT))
def test_folder_has_one_rank_and_scale_one(label, llama, tmp_path):
    export(trained(load_base("llama", llama), EXACT[label]), tmp_path / "out", to="peft")
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    assert fields["r"] == fields["lora_alpha"] == RANKS[label]
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert (fields["use_rslora"], fields["use_dora"], fields["init_lora_weights"]) == (False, False, True)
    assert fields["base_model_name_or_path"] == str(llama)
    assert fields["task_type"] == "CAUSAL_LM"
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {RANKS[label]}


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_other_architectures_and_their_heads(name, tmp_path):
    base = save_base(name, tmp_path / "base")
    model = trained(load_base(name, base), peftkit.LoHa(r=2, alpha=6))
    peftkit.save(model, tmp_path / "adapter")
    made = export(tmp_path / "adapter", tmp_path / "out", to="peft")
    assert made.exact
    assert made.extras == (("classifier",) if name == "bert" else ())
    expected = logits(name, model)
    assert_same(
        name, expected, logits(name, in_peft(name, base, tmp_path / "out")), logits(name, load_base(name, base))
    )
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert fields["task_type"] == {"gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}[name]
    assert fields["fan_in_fan_out"] == (name == "gpt2")


def test_modules_trained_whole_are_kept(llama, tmp_path):
    model = trained(load_base("llama", llama), peftkit.LoRA(r=2, modules_to_save=["lm_head"]))
    made = export(model, tmp_path / "out", to="peft")
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (made.extras, fields["modules_to_save"]) == (("lm_head",), ["lm_head"])
    expected = logits("llama", model)
    assert_same("llama", expected, logits("llama", in_peft("llama", llama, tmp_path / "out")), 0 * expected)


def test_folder_that_peft_wrote_is_exported(llama, tmp_path):
    theirs = peft.get_peft_model(
        load_base("llama", llama), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], use_rslora=True)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    made = export(tmp_path / "theirs", tmp_path / "out", to="peft")
    assert made.exact
    expected = logits("llama", theirs.eval())
    found = logits("llama", in_peft("llama", llama, tmp_path / "out"))
    assert_same("llama", expected, found, logits("llama", load_base("llama", llama)))


def test_head_with_more_classes_than_the_base_says(tmp_path):
    base = save_base("bert", tmp_path / "base")
    (base / "config.json").write_text(
        json.dumps({**json.loads((base / "config.json").read_text()), "id2label": None, "num_labels": 2})
    )
    model = trained(built("bert"), peftkit.LoRA(r=2))
    peftkit.save(model, tmp_path / "adapter")
    made = export(tmp_path / "adapter", tmp_path / "out", to="peft", base=base)
    assert load_file(tmp_path / "out/adapter_model.safetensors")["base_model.model.classifier.weight"].shape[0] == 3
    assert made.extras == ("classifier",)


@pytest.mark.parametrize("from_folder", [False, True], ids=["model", "folder"])
@pytest.mark.parametrize("label", list(DENSE))
def test_dense_update_is_refused_until_a_rank_or_an_error_is_chosen(label, from_folder, llama, tmp_path):
    model = trained(load_base("llama", llama), DENSE[label])
    peftkit.save(model, tmp_path / "adapter")
    given = tmp_path / "adapter" if from_folder else model
    with pytest.raises(ExportError, match=r"not low-rank.*\(--rank 16\) or an error \(--error 0.01") as caught:
        export(given, tmp_path / "out", to="peft")
    assert "Hugging Face peft reads the adapter folder itself" in str(caught.value)
    assert not (tmp_path / "out").exists()
    meant = deltas(model)
    made = export(given, tmp_path / "out", to="peft", rank=6)
    assert made.rank == 6
    assert not made.exact
    for site in made.sites:
        singular = torch.linalg.svdvals(meant[site.path])
        least = float(singular[6:].norm() / singular.norm())
        truly = float((meant[site.path] - product(tmp_path / "out", site.path)).norm() / meant[site.path].norm())
        # The reported error is the true one, and no product of rank 6 is nearer; float32 carries 6e-8 an element.
        assert site.error_relative == pytest.approx(truly, rel=1e-4, abs=2e-7)
        assert site.error_relative == pytest.approx(least, rel=1e-4, abs=2e-7)
    parts = [(float(meant[s.path].norm()), s.error) for s in made.sites]
    total = math.sqrt(sum(e**2 for _, e in parts) / sum(n**2 for n, _ in parts))
    assert made.error_relative == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("label", ["dora", "oft", "loha"])
def test_error_is_kept_by_the_smallest_rank(label, llama, tmp_path):
    model = trained(load_base("llama", llama), DENSE[label])
    made = export(model, tmp_path / "out", to="peft", error=0.2)
    meant = deltas(model)
    for site in made.sites:
        assert site.error_relative <= 0.2
        singular = torch.linalg.svdvals(meant[site.path])
        assert float(singular[site.rank - 1 :].norm() / singular.norm()) > 0.2
    assert made.largest_error == max(s.error_relative for s in made.sites)


@pytest.mark.parametrize("shape", [(300, 520), (520, 300)], ids=["wide", "tall"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_factors_of_larger_updates_are_as_near_as_can_be(decay, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(n, 300, dtype=torch.float64)).Q for n in shape)
    values = torch.arange(1, 301, dtype=torch.float64) ** -decay
    update = left * values @ right.T
    size = values.norm()
    down, up = _nearest(update, 20, None)
    assert down.shape == (20, shape[1])
    assert float((update - up @ down).norm()) <= 1.001 * float(values[20:].norm())
    for error in (0.05, 0.51):
        down, up = _nearest(update, None, error)
        assert float((update - up @ down).norm()) <= error * float(size)
        least = 1 + int((values.flip(0).square().cumsum(0).flip(0).sqrt() > error * size)[1:].sum())
        assert least <= down.shape[0] <= least + 1 + least // 50
    down, up = _nearest(update[:, :5] @ update[:, :5].T, 20, None)
    assert down.shape[0] == 5


def test_low_rank_update_is_cut_to_a_smaller_rank_as_near_as_can_be(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["loha"])
    meant = deltas(model)
    made = export(model, tmp_path / "out", to="peft", rank=2)
    assert (made.rank, made.exact) == (2, False)
    for site in made.sites:
        singular = torch.linalg.svdvals(meant[site.path])
        assert site.error_relative == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-4)
        truly = float((meant[site.path] - product(tmp_path / "out", site.path)).norm() / meant[site.path].norm())
        assert site.error_relative == pytest.approx(truly, rel=1e-4)
    assert export(model, tmp_path / "same", to="peft", rank=4).exact
    assert export(model, tmp_path / "tight", to="peft", error=1e-9).exact


def test_half_precision_is_said_in_the_error(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["lora"])
    made = export(model, tmp_path / "out", to="peft", dtype="bfloat16")
    # Two roundings to 8 bits.
    assert 1e-4 < made.error_relative < 2 * 2**-8
    assert {t.dtype for t in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {torch.bfloat16}
    site = made.sites[0]
    meant = deltas(model)[site.path]
    truly = float((meant - product(tmp_path / "out", site.path)).norm() / meant.norm())
    assert site.error_relative == pytest.approx(truly, rel=1e-3)


def test_factors_that_overflow_or_diverged_are_refused(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["lora"])
    adapter = model.model.layers[0].mlp.up_proj.peftkit["default"]
    with torch.no_grad():
        adapter.lora_B[0, 0] = 1e6
    with pytest.raises(ExportError, match=r"factors of model.layers.0.mlp.up_proj overflow float16; use float32"):
        export(model, tmp_path / "out", to="peft", dtype="float16")
    with torch.no_grad():
        adapter.lora_B[0, 0] = float("nan")
    with pytest.raises(ExportError, match=r"up_proj holds values that are not finite; check it for a diverged"):
        export(model, tmp_path / "out", to="peft")
    assert not (tmp_path / "out").exists()


def test_adapter_without_effect_becomes_zeros_of_rank_one(llama, tmp_path):
    model = peftkit.wrap(load_base("llama", llama), peftkit.AdaLoRA(init_r=4, target_r=2, total_step=10))
    made = export(model, tmp_path / "out", to="peft", error=0.1)
    assert made.rank == 0
    assert made.error_relative == made.largest_error == 0.0
    found = logits("llama", in_peft("llama", llama, tmp_path / "out"))
    assert torch.equal(found, logits("llama", load_base("llama", llama)))


def test_update_that_reads_the_weight_needs_the_base(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["pissa"])
    peftkit.save(model, tmp_path / "adapter")
    (tmp_path / "config only").mkdir()
    (tmp_path / "config only/config.json").write_bytes((llama / "config.json").read_bytes())
    message = r"config only holds no model.safetensors or .*the base weights are needed. Give a base .*--base"
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "adapter", tmp_path / "out", to="peft", base=tmp_path / "config only")
    additive = trained(load_base("llama", llama), DENSE["loha"])
    peftkit.save(additive, tmp_path / "additive")
    made = export(tmp_path / "additive", tmp_path / "out", to="peft", base=tmp_path / "config only", rank=8)
    assert made.rank == 8


def test_base_whose_weights_are_others_is_refused(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["pissa"])
    peftkit.save(model, tmp_path / "adapter")
    other = load_base("llama", llama)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[3, 4] += 0.5
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match=r"layers.1.self_attn.q_proj.weight of .*other is not the weight that"):
        export(tmp_path / "adapter", tmp_path / "out", to="peft", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [EXACT["pissa"], DENSE["oft"]], ids=["pissa", "oft"])
def test_adapter_of_a_quantized_base_is_exported_from_the_model(config, llama, tmp_path):
    model = trained(peftkit.quantize(load_base("llama", llama), "nf4"), config)
    peftkit.save(model, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match=r"another way \(quantized\).*Instead load the model in Python"):
        export(tmp_path / "adapter", tmp_path / "out", to="peft", rank=32)
    expected = logits("llama", model)
    made = export(model, tmp_path / "out", to="peft", rank=32)
    assert made.error_relative <= 1e-6
    base = peftkit.quantize(load_base("llama", llama), "nf4")
    without = logits("llama", base)
    assert_same("llama", expected, logits("llama", peftkit.load(base, tmp_path / "out")), without)


def test_base_in_several_files_and_of_other_names(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["pissa"])
    peftkit.save(model, tmp_path / "adapter")
    load_base("llama", llama).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    load_base("llama", llama).model.save_pretrained(tmp_path / "inner")
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "inner/config.json").write_text(json.dumps(config))
    folders = []
    for base in ("shards", "inner"):
        export(tmp_path / "adapter", tmp_path / f"out {base}", to="peft", base=tmp_path / base)
        folders.append((tmp_path / f"out {base}/adapter_model.safetensors").read_bytes())
    export(tmp_path / "adapter", tmp_path / "out", to="peft")
    assert set(folders) == {(tmp_path / "out/adapter_model.safetensors").read_bytes()}


def test_base_on_the_hub_is_fetched_file_by_file(llama, tmp_path, monkeypatch):
    model = trained(load_base("llama", llama), EXACT["pissa"])
    peftkit.save(model, tmp_path / "adapter")
    asked = []

    def fetched(place, name, **options):
        assert place == "someone/llama"
        asked.append(name)
        return str(llama / name) if (llama / name).is_file() else None

    config = load_base("llama", llama).config
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: config)
    monkeypatch.setattr(transformers.utils, "cached_file", fetched)
    export(tmp_path / "adapter", tmp_path / "out", to="peft", base="someone/llama")
    assert asked == ["model.safetensors.index.json", "model.safetensors"]
    asked.clear()
    lora = trained(load_base("llama", llama), EXACT["lora"])
    peftkit.save(lora, tmp_path / "lora")
    export(tmp_path / "lora", tmp_path / "from lora", to="peft", base="someone/llama")
    assert asked == []  # no weight of the base is needed


def test_base_without_the_tensor_is_refused_with_a_way_out(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["pissa"])
    peftkit.save(model, tmp_path / "adapter")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_bytes((llama / "config.json").read_bytes())
    tensors = load_file(llama / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({("fused" if k == key else k): v for k, v in tensors.items()}, tmp_path / "odd/model.safetensors")
    with pytest.raises(ExportError, match=rf"holds no tensor '{key}': .*Instead load the model in Python"):
        export(tmp_path / "adapter", tmp_path / "out", to="peft", base=tmp_path / "odd")
    save_file({k: v[:3] if k == key else v for k, v in tensors.items()}, tmp_path / "odd/model.safetensors")
    with pytest.raises(ExportError, match=rf"{key} is \(3, 32\) of torch.float32, expected \(32, 32\)"):
        export(tmp_path / "adapter", tmp_path / "out", to="peft", base=tmp_path / "odd")
    (tmp_path / "odd/model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ExportError, match=r"odd/model.safetensors is not a complete safetensors file"):
        export(tmp_path / "adapter", tmp_path / "out", to="peft", base=tmp_path / "odd")


def test_base_that_is_not_named_or_not_there(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    peftkit.save(trained(built("llama"), EXACT["lora"]), tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"names no base model; .*--base, or base=... in Python"):
        export(tmp_path / "adapter", tmp_path / "out", to="peft")
    with pytest.raises(ExportError, match=r"cannot read the config of the base model .*nowhere'.*Give another with"):
        export(tmp_path / "adapter", tmp_path / "out", to="peft", base=tmp_path / "nowhere")
    made = export(tmp_path / "adapter", tmp_path / "out", to="peft", base=llama)
    fields = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert made.path == tmp_path / "out"
    assert fields["base_model_name_or_path"] == str(llama)


def test_base_can_be_called_by_another_name(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["lora"])
    export(model, tmp_path / "out", to="peft", base_name="someone/llama")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "someone/llama"
    assert 'base_model: "someone/llama"' in (tmp_path / "out/README.md").read_text()


NO_WEIGHT_CHANGE = [n for n, m in peftkit.METHODS.items() if not m.mergeable]
OWN_PARAMETERS = ["bitfit", "layernorm", "full", "head"]


@pytest.mark.parametrize("method", NO_WEIGHT_CHANGE)
def test_method_that_changes_no_weight_is_refused(method, tmp_path):
    model = peftkit.wrap(built("bert"), peftkit.METHODS[method].config())
    with pytest.raises(ExportError, match=rf"{method} is no change of weights, so no LoRA computes it"):
        export(model, tmp_path / "out", to="peft", rank=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", OWN_PARAMETERS)
def test_method_that_trains_parameters_is_refused(method, tmp_path):
    model = peftkit.wrap(built("bert"), peftkit.METHODS[method].config())
    with pytest.raises(ExportError, match=rf"{method} trains the model's own parameters .*--to merged"):
        export(model, tmp_path / "out", to="peft", rank=4)


def test_biases_that_would_be_lost_are_refused(tmp_path):
    model = trained(built("bert"), peftkit.IA3())
    message = r"ia3 changes bert.encoder.layer.0.attention.self.key.bias too, .*Export with --to merged"
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "out", to="peft", rank=4)
    biased = trained(built("bert"), peftkit.LoRA(r=2, lora_bias=True))
    with pytest.raises(ExportError, match=r"lora changes bert.encoder.layer.0.attention.self.query.bias too"):
        export(biased, tmp_path / "out", to="peft", rank=4)


def test_arguments_that_contradict_each_other(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["lora"])
    for fields, message in (
        ({"to": "pefft"}, r"to='pefft' is nobody to export for; did you mean 'peft'"),
        ({"rank": 2, "error": 0.1}, "rank and error each choose"),
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"error": 1.5}, r"error must lie between 0 and 1 .*found 1.5"),
        ({"error": 0.0}, r"error must lie between 0 and 1 .*found 0.0"),
        ({"dtype": "int8"}, r"dtype must be one of float32, float16, bfloat16, found 'int8'"),
        ({"max_lora_rank": 16}, r"max_lora_rank is for to='vllm', found to='peft'"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(model, tmp_path / "out", **{"to": "peft", **fields})
    with pytest.raises(ExportError, match=r"base is for adapter folders: a wrapped model brings its own"):
        export(model, tmp_path / "out", to="peft", base=llama)
    assert not (tmp_path / "out").exists()


def test_merged_adapter_is_refused(llama, tmp_path):
    model = trained(load_base("llama", llama), EXACT["lora"])
    peftkit.merge(model)
    with pytest.raises(StateError, match=r"default is merged into the weights; call peftkit.unmerge\(model\) first"):
        export(model, tmp_path / "out", to="peft")
    peftkit.unmerge(model)
    export(model, tmp_path / "out", to="peft")


def test_export_leaves_the_model_as_it_was(llama, tmp_path):
    model = trained(load_base("llama", llama), DENSE["dora"])
    before = picture(model)
    export(model, tmp_path / "out", to="peft", rank=2)
    assert picture(model) == before
