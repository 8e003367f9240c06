from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_suites import changed
from peftkit_bench import merge_suite, merging, record
from peftkit_bench.engine import BenchError
from peftkit_bench.merge_suite import Route
from peftkit_bench.merge_tools import Bases, merged
from peftkit_bench.merge_yardstick import Sums, bytes_per_weight, reference, stored_weights
from peftkit_bench.record import MergeRecord
from peftkit_bench.spec import SuiteError
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import peftkit
from peftkit.quantization import QuantizedLinear

with warnings.catch_warnings():
    # On some processors bitsandbytes looks for a package of compiled code and warns when there is none.
    warnings.simplefilter("ignore")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning"),
]

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with a tokenizer of letters, saved as a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def suite_path(backbone: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTKIT_CACHE", str(cache))
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(changed("backbone", {"path": str(backbone)}), sort_keys=False))
    return path


@dataclasses.dataclass(frozen=True)
class Bench:
    bases: Bases
    folder: Path
    judged: dict[str, torch.Tensor]
    shown: list[dict[str, torch.Tensor]]

    def reference(self, base: str = "nf4") -> Any:
        plain = self.bases.plain(torch.float64)
        return reference(plain, self.bases.weights[base], self.folder, self.judged, self.shown)

    def merged(self, **route: Any) -> Any:
        return merged(Route(**route), self.bases, self.folder, self.shown, 0.0)


@pytest.fixture(scope="module")
def bench(backbone: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A LoRA with a change of 5 % of the weights, and rows to judge it by."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTKIT_CACHE", str(cache))
        made = merge_suite.parse(changed("backbone", {"path": str(backbone)}))
        prepared = merging.prepared_for(made)
    bases = Bases(made.task, prepared)
    torch.manual_seed(0)
    model = peftkit.wrap(bases.native(torch.float32), peftkit.LoRA(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
            if name.endswith("classifier.weight"):
                parameter.normal_()
    folder = peftkit.save(model, tmp_path_factory.mktemp("adapter"))
    judged = merging.batches(made.task, prepared.splits["test"], 8, prepared.padding, 8)[0]
    judged["attention_mask"][0, 10:] = 0
    return Bench(bases, folder, judged, merging.batches(made.task, prepared.splits["train"], 16, prepared.padding))


# The yardstick ------------------------------------------------------------------------------------------------------


def test_effect_and_error_of_known_changes() -> None:
    before, delta = torch.randn(5, 4), torch.randn(5, 4)
    noise = torch.randn(5, 4).double()
    noise -= delta * (noise * delta).sum() / (delta * delta).sum()
    for found, effect, error in (
        (before + delta, 1.0, 0.0),
        (before, 0.0, 1.0),
        (before + 2 * delta, 2.0, 1.0),
        (before - delta, -1.0, 2.0),
        (before + delta + noise * (delta.norm() / noise.norm()), 1.0, 1.0),
    ):
        kept = Sums().add(before, before + delta, found)
        assert (kept.effect, kept.error) == pytest.approx((effect, error), abs=1e-6)
    sums = Sums()
    sums.add(torch.zeros(1), torch.tensor([3.0]), torch.tensor([3.0]))
    sums.add(torch.ones(1), torch.tensor([5.0]), torch.ones(1))
    assert (sums.kept().effect, sums.kept().error) == pytest.approx((9 / 25, 4 / 5))
    assert sums.size() == pytest.approx(5.0)
    assert Sums().add(before, before, before).effect == 1.0


def test_reference_reads_the_meant_weights_off_the_layers(bench: Bench) -> None:
    judge = bench.reference()
    tensors = load_file(bench.folder / "adapter_model.safetensors")
    scale = json.loads((bench.folder / "adapter_config.json").read_text())["lora_alpha"] / 2
    assert len(judge.meant) == 4
    for path, meant in judge.meant.items():
        down, up = (tensors[f"base_model.model.{path}.lora_{part}.weight"].double() for part in "AB")
        expected = judge.base[path][0] + scale * up @ down
        assert (meant - expected).norm() < 1e-12 * expected.norm()
    assert judge.plain.classifier.weight.equal(tensors["base_model.model.classifier.weight"])
    tokens = int(bench.judged["attention_mask"].sum())
    assert {tuple(x.shape) for x in judge.inputs.values()} == {(tokens, 64)}
    shown = sum(int(batch["attention_mask"].sum()) for batch in bench.shown)
    assert {tuple(x.shape) for x in judge.calibration.values()} == {(shown, 64)}


def test_reference_counts_no_change_as_none_and_the_whole_as_all(bench: Bench) -> None:
    judge = bench.reference()
    whole = {path: (judge.meant.get(path, weight), bias) for path, (weight, bias) in judge.base.items()}
    for measure in (lambda w: judge.weights(w)[0], lambda w: judge.activations(w)[0], judge.outputs):
        none, all_ = measure(judge.base), measure(whole)
        assert (none.effect, none.error) == pytest.approx((0.0, 1.0), abs=1e-4)
        assert (all_.effect, all_.error) == pytest.approx((1.0, 0.0), abs=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_stored_weights_are_what_the_layers_compute_with(bench: Bench, kind: str) -> None:
    unit = torch.eye(64)
    own = peftkit.quantize(bench.bases.plain(torch.float32), kind)
    layer: Any = own.bert.encoder.layer[0].attention.self.query
    path = "bert.encoder.layer.0.attention.self.query"
    layer.residual_down, layer.residual_up = torch.randn(1, 64), torch.randn(64, 1)
    weight, bias = stored_weights(own, [path])[path]
    assert bias is not None
    torch.testing.assert_close(layer(unit), weight.float().t() + bias.float(), atol=1e-5, rtol=1e-5)
    other = bench.bases.bitsandbytes(kind)
    weight, bias = stored_weights(other, [path])[path]
    with torch.no_grad():
        made = other.get_submodule(path)(unit.bfloat16()).float()
    # bfloat16 outputs, and for int8 rows of the input in codes too, which hold the unit vectors exactly.
    torch.testing.assert_close(made, (weight.float().t() + bias.float()), atol=2e-3, rtol=1e-2)


def test_bases_of_all_tools_hold_the_same_codes(bench: Bench) -> None:
    own = bench.bases.weights["nf4"]
    other = stored_weights(bench.bases.bitsandbytes("nf4"), bench.bases.paths)
    linear = [p for p, m in bench.bases.plain().named_modules() if isinstance(m, nn.Linear) and p != "classifier"]
    assert sorted(bench.bases.paths) == sorted(linear)
    for path in bench.bases.paths:
        assert torch.equal(own[path][0], other[path][0])


def test_bytes_per_weight_count_codes_scales_and_residual(bench: Bench) -> None:
    path = "bert.encoder.layer.0.attention.self.query"
    assert bytes_per_weight(bench.bases.plain(), [path]) == 2
    model = bench.bases.native()
    assert bytes_per_weight(model, [path]) == 0.5 + 4 / 64
    layer: Any = model.get_submodule(path)
    layer.residual_down, layer.residual_up = torch.zeros(1, 64).bfloat16(), torch.zeros(64, 1).bfloat16()
    assert bytes_per_weight(model, [path]) == 0.5 + 4 / 64 + 2 * 2 * 64 / 64**2


# The tools ----------------------------------------------------------------------------------------------------------


def test_each_tool_stores_what_its_name_says(bench: Bench) -> None:
    judge = bench.reference()
    path = next(iter(judge.meant))
    found = {}
    for name, route in {
        "own": {"tool": "peftkit", "base": "nf4", "into": "bf16"},
        "fold": {"tool": "dequantize", "base": "nf4", "into": "bf16"},
        "round": {"tool": "bitsandbytes", "base": "nf4", "into": "nf4"},
        "round int8": {"tool": "bitsandbytes", "base": "nf4", "into": "int8"},
        "peft": {"tool": "peft", "base": "nf4", "into": "nf4"},
    }.items():
        outcome = bench.merged(**route)
        assert outcome.refused is None
        found[name] = stored_weights(outcome.model, bench.bases.paths)[path][0].float()
    meant, base = judge.meant[path].float(), judge.base[path][0].float()
    assert torch.equal(found["own"], meant.bfloat16().float())
    twice = (base.bfloat16().float() + (meant - base)).bfloat16().float()
    torch.testing.assert_close(found["fold"], twice, atol=1e-6, rtol=2**-8)
    assert not torch.equal(found["fold"], found["own"])
    nearest = QuantizedLinear.of(meant, kind="nf4").dequantized(torch.float32)
    # The meant weights differ in their last bits, and so do the scales.
    assert (found["round"] - nearest).abs().gt(1e-6).float().mean() < 0.01
    nearest = QuantizedLinear.of(meant, kind="int8").dequantized(torch.float32)
    torch.testing.assert_close(found["round int8"], nearest, atol=float(meant.abs().max()) / 127, rtol=0.01)
    assert (found["peft"] - found["round"]).abs().gt(1e-3).float().mean() < 0.05  # it rounds the sum to bfloat16 first


def test_peft_on_the_original_base_adds_to_the_original_weights(bench: Bench) -> None:
    judge = bench.reference("bf16")
    outcome = bench.merged(tool="peft", base="bf16", into="bf16")
    kept, _ = judge.weights(stored_weights(outcome.model, bench.bases.paths))
    assert kept.effect == pytest.approx(1, abs=0.02)
    assert kept.error < 0.2
    other, _ = bench.reference("nf4").weights(stored_weights(outcome.model, bench.bases.paths))
    assert other.error > 2 * kept.error


def test_what_another_tool_raises_is_its_answer(bench: Bench, tmp_path: Path) -> None:
    broken = dataclasses.replace(bench, folder=tmp_path)
    outcome = broken.merged(tool="peft", base="nf4", into="nf4")
    assert outcome.model is None
    assert outcome.refused is not None
    assert "adapter_config.json" in outcome.refused


def test_what_is_raised_without_a_message_is_an_answer_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def refusing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", refusing)
    outcome = bench.merged(tool="peft", base="bf16", into="bf16")
    assert outcome.refused == "NotImplementedError: without a message"


def test_refusal_for_too_little_effect_is_told_and_the_merge_is_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = peftkit.merge, []

    def refusing(model: nn.Module, **settings: Any) -> Any:
        asked.append(settings["minimum_effect"])
        if settings["minimum_effect"] > 0:
            raise peftkit.errors.MergeError("only 3 % of what the adapter changes would be stored")
        return real(model, **settings)

    monkeypatch.setattr(peftkit, "merge", refusing)
    outcome = merged(
        Route(tool="peftkit", base="nf4", into="nf4"), bench.bases, bench.folder, bench.shown, minimum_effect=0.9
    )
    assert asked == [0.9, 0.0]
    assert outcome.model is not None
    assert outcome.refused == "only 3 % of what the adapter changes would be stored"

    def broken(model: nn.Module, **settings: Any) -> Any:
        asked.append(settings["minimum_effect"])
        raise peftkit.errors.MergeError("the update is no product")

    monkeypatch.setattr(peftkit, "merge", broken)
    outcome = merged(Route(tool="peftkit", base="nf4", into="nf4"), bench.bases, bench.folder, bench.shown, 0.9)
    assert outcome.model is None
    assert outcome.refused == "MergeError: the update is no product"
    assert asked[2:] == [0.9], "nothing but too little effect is asked for again"


def test_certificate_agrees_with_the_yardstick_and_a_wrong_one_does_not(bench: Bench) -> None:
    judge = bench.reference()
    outcome = bench.merged(tool="peftkit", base="nf4", into="nf4", calibrated=True)
    found = stored_weights(outcome.model, bench.bases.paths)
    weights, shown = judge.weights(found)[1], judge.activations(found, calibration=True)[1]
    agreed = merging.compared(outcome.report, weights, shown)
    assert max(agreed["effect_difference"], agreed["error_difference"]) < 1e-3
    # The certificate's inputs are those of a model that computes in bfloat16.
    assert max(agreed["input_effect_difference"], agreed["input_error_difference"]) < 0.05
    first, *rest = (site for site in outcome.report.sites if site.parameter == "weight" and site.path in weights)
    lying = dataclasses.replace(first, effect_kept=first.effect_kept + 0.5, activation_error=9.0)
    wrong = merging.compared(dataclasses.replace(outcome.report, sites=(lying, *rest)), weights, shown)
    assert wrong["effect_difference"] == pytest.approx(0.5, abs=1e-2)
    assert wrong["input_error_difference"] > 5


def test_scaling_multiplies_one_parameter(bench: Bench, tmp_path: Path) -> None:
    size = bench.reference().size
    folder = merging.scaled(bench.folder, tmp_path / "scaled", "lora_B", 0.02 / size)
    assert dataclasses.replace(bench, folder=folder).reference().size == pytest.approx(0.02, rel=1e-6)
    with pytest.raises(SuiteError, match=r"scaled: the adapter has no parameter 'lora_E'; it has lora_A, lora_B"):
        merging.scaled(bench.folder, tmp_path / "other", "lora_E", 2.0)


# Running ------------------------------------------------------------------------------------------------------------


def test_run_records_every_merge_resumes_and_reports(
    suite_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, ran = merging.run_cell, []

    def counted(made: Any, cell: merging.Cell, *rest: Any) -> MergeRecord:
        if len(ran) == 2:
            ran.append("interrupted")
            raise KeyboardInterrupt
        ran.append(cell.route)
        return real(made, cell, *rest)

    monkeypatch.setattr(merging, "run_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        merging.run(suite_path, out, progress=False)
    assert len(record.read(out)) == 2
    trained = {path: path.stat().st_mtime_ns for path in (out / merging.ADAPTERS).rglob("*.safetensors")}
    assert len(trained) == 1
    before = (out / record.FILE).read_bytes()
    page = merging.run(suite_path, out, progress=False)
    assert (out / record.FILE).read_bytes().startswith(before)
    assert all(path.stat().st_mtime_ns == time for path, time in trained.items()), "an adapter was trained again"
    found = record.read(out)
    assert [(r.adapter, r.asked_size, r.contender) for r in found] == [
        (adapter, size, route)
        for adapter, size in (("LoRA", 0.02), ("LoRA", 0.1), ("(IA)³", None))
        for route in ("own", "own nf4", "own fused", "peft")
    ]
    assert len(ran) == 13
    merging.run(suite_path, out, progress=False)
    assert len(ran) == 13
    assert all(isinstance(r, MergeRecord) for r in found)
    by_name = {(r.adapter, r.asked_size, r.contender): r for r in found}
    exact, coded = by_name["LoRA", 0.1, "own"], by_name["LoRA", 0.1, "own nf4"]
    assert exact.size == pytest.approx(0.1, rel=1e-3)
    assert exact.kept["nf4"]["weights"] == pytest.approx([1, 0], abs=0.05)
    assert exact.kept["nf4"]["activations"] == pytest.approx([1, 0], abs=0.05)
    assert exact.as_run is not None
    assert exact.bytes_per_weight == 2
    assert set(exact.kept) == {"nf4", "bf16"}
    assert len(exact.sites) == 4
    assert coded.bytes_per_weight == pytest.approx(0.5625 + 2 * 2 / 64)
    assert coded.certificate is not None
    assert coded.certificate["effect_difference"] < 1e-3
    fused = by_name["(IA)³", None, "own fused"]
    assert (fused.kept, fused.certificate, fused.as_run) == ({}, None, None)
    assert fused.refused is not None
    assert fused.refused.startswith("MergeError: ")
    markdown = (out / "report.md").read_text()
    assert page == out / "index.html"
    for name in ("index.html", "merges.png", "merges.svg"):
        assert (out / name).stat().st_size > 0
    assert "own fused cannot merge (IA)³" in markdown
    assert "## Logits, merged into 4 bits (NF4): effect kept / error" in markdown


def test_merge_that_cannot_be_measured_does_not_stop_the_others(
    suite_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merging.run_cell

    def broken(made: Any, cell: merging.Cell, *rest: Any) -> MergeRecord:
        if (cell.route, cell.size) == ("own", 0.1):
            raise ZeroDivisionError("planted")
        return dataclasses.replace(template, key=cell.key)

    made = yaml.safe_load(suite_path.read_text())
    del made["adapters"]["(IA)³"]
    suite_path.write_text(yaml.safe_dump({**made, "routes": {"own": made["routes"]["own"]}}, sort_keys=False))
    monkeypatch.setattr(merging, "run_cell", lambda *given: real(*given))
    merging.run(suite_path, tmp_path / "whole", progress=False)
    template = record.read(tmp_path / "whole")[0]
    monkeypatch.setattr(merging, "run_cell", broken)
    with pytest.raises(BenchError, match=r"1 of 2 merges could not be measured(.|\n)*LoRA, 0\.1, own: (.|\n)*planted"):
        merging.run(suite_path, tmp_path / "out", progress=False)
    assert len(record.read(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("key", "rows", "there", "split"), [("calibration_rows", 33, 32, "train"), ("judged_rows", 25, 24, "test")]
)
def test_more_rows_than_there_are_is_refused(
    suite_path: Path, tmp_path: Path, key: str, rows: int, there: int, split: str
) -> None:
    suite_path.write_text(yaml.safe_dump({**yaml.safe_load(suite_path.read_text()), key: rows}))
    message = f"{key}: expected 1 to {there}, the rows of the {split} split, found {rows}"
    with pytest.raises(SuiteError, match=message):
        merging.run(suite_path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SuiteError, match=message):
        merging.dry_run(suite_path)


def test_more_than_one_job_is_refused(suite_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="one merge at a time, found --jobs 2; leave it out, or give 1"):
        merging.run(suite_path, tmp_path / "out", jobs=2, progress=False)
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_would_be_merged(suite_path: Path) -> None:
    lines = merging.dry_run(suite_path).splitlines()
    assert lines[0] == "Smoke: 12 merges"
    assert lines[1] == "adapter LoRA: 1,024 parameters; change / weight 0.02, 0.1"
    assert lines[2].endswith("change / weight as trained")
    assert lines[4] == "route own nf4: peftkit merges nf4 into nf4, calibrated, residual of rank 1"


def test_what_decides_the_result_makes_another_key(suite_path: Path) -> None:
    made = merge_suite.load(suite_path)
    prepared = merging.prepared_for(made)

    def keys(other: merge_suite.MergeSuite) -> set[str]:
        return {cell.key for cell in merging.cells(other, prepared)}

    assert len(keys(made)) == 12
    lora = made.adapters["LoRA"]
    for other in (
        dataclasses.replace(made, judged_rows=7),
        dataclasses.replace(made, calibration_rows=7),
        dataclasses.replace(made, minimum_effect=0.5),
        dataclasses.replace(made, seed=1),
        dataclasses.replace(made, training=dataclasses.replace(made.training, steps=4)),
    ):
        assert not keys(made) & keys(other)
    other = dataclasses.replace(made, adapters={"LoRA": dataclasses.replace(lora, sizes=(0.02, 0.2))})
    assert len(keys(made) & keys(other)) == 4


def test_calibration_and_judged_rows_come_from_different_files(suite_path: Path) -> None:
    splits = merging.prepared_for(merge_suite.load(suite_path)).splits
    assert not set(splits["train"].groups) & set(splits["test"].groups)
    shown, judged = ({tuple(row["input_ids"]) for row in splits[name].encoded} for name in ("train", "test"))
    assert not shown & judged
