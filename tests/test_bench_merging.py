from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bench_records import made_up
from peftkit_bench import engine, merge_suite, merging, record, report, suite
from peftkit_bench.engine import BenchError
from peftkit_bench.merge_suite import Route
from peftkit_bench.merge_tools import Bases, merged
from peftkit_bench.merge_yardstick import Sums, bytes_per_weight, reference, stored_weights
from peftkit_bench.record import MergeRecord
from peftkit_bench.report import merges
from peftkit_bench.spec import SuiteError
from peftkit_bench.task import SequenceClassification
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

SUITES = Path(__file__).parents[1] / "benchmarks" / "suites"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GOOD: dict[str, Any] = {
    "kind": "merge",
    "name": "smoke",
    "title": "Smoke",
    "backbone": {"path": "somewhere"},
    "data": {"origins": ["python", "numpy"], "train": 32, "validation": 8, "test": 24, "max_tokens": 16},
    "training": {"steps": 3, "batch_size": 8},
    "calibration_rows": 16,
    "judged_rows": 8,
    "adapters": {
        "LoRA": {"method": "lora", "learning_rate": 0.01, "config": {"r": 2}, "scaled": "lora_B", "sizes": [0.02, 0.1]},
        "(IA)³": {"method": "ia3", "learning_rate": 0.1},
    },
    "routes": {
        "own": {"tool": "peftkit", "base": "nf4", "into": "bf16"},
        "own nf4": {"tool": "peftkit", "base": "nf4", "into": "nf4", "calibrated": True, "residual_rank": 1},
        "own fused": {"tool": "peftkit", "base": "nf4", "into": "fused"},
        "peft": {"tool": "peft", "base": "nf4", "into": "nf4"},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one value replaced or added; "/" between keys."""
    made = copy.deepcopy(GOOD)
    *parents, last = path.split("/")
    place = made
    for key in parents:
        place = place[key]
    place[last] = value
    return made


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
        prepared = SequenceClassification().prepare(made.comparison())
    bases = Bases(prepared)
    torch.manual_seed(0)
    model = peftkit.wrap(bases.native(torch.float32), peftkit.LoRA(r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
            if name.endswith("classifier.weight"):
                parameter.normal_()
    folder = peftkit.save(model, tmp_path_factory.mktemp("adapter"))
    judged = merging.batches(prepared.evaluated, 8, prepared.padding, 8)[0]
    judged["attention_mask"][0, 10:] = 0
    return Bench(bases, folder, judged, merging.batches(prepared.train, 16, prepared.padding))


# The suite ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("route", {}, r"the suite: unknown key 'route'; did you mean 'routes'"),
        ("routes/own/inn", "bf16", r"routes.own: unknown key 'inn'; did you mean 'into'"),
        ("adapters/LoRA/size", 1, r"adapters.LoRA: unknown key 'size'; did you mean 'sizes'"),
        ("kind", "comparison", r"kind: expected 'merge', found 'comparison'"),
        ("backbone", {}, r"backbone: give either package or path"),
        ("training/steps", 0, r"training, steps: expected at least 1, found 0"),
        ("training/batch_size", 0, r"training, batch_size: expected at least 1, found 0"),
        ("calibration_rows", 33, r"calibration_rows: expected 1 to 32, the rows of its split, found 33"),
        ("judged_rows", 0, r"judged_rows: expected 1 to 24, the rows of its split, found 0"),
        ("minimum_effect", 1.5, r"minimum_effect: expected a share in \[0, 1\], found 1.5"),
        ("adapters", {}, r"adapters: expected at least one"),
        ("routes", {}, r"routes: expected at least one"),
        ("adapters/LoRA/method", "loral", r"adapters, LoRA, method: did you mean 'lora'"),
        ("adapters/LoRA/method", "prefix", r"adapters, LoRA, method: prefix cannot be merged"),
        ("adapters/LoRA/learning_rate", 0, r"adapters, LoRA, learning_rate: expected a positive number"),
        ("adapters/LoRA/sizes", [0.1, 0], r"adapters, LoRA, sizes: expected positive shares"),
        ("adapters/LoRA/sizes", [], r"adapters, LoRA: sizes go with scaled"),
        ("adapters/(IA)³/sizes", [0.1], r"adapters, \(IA\)³: sizes go with scaled"),
        ("routes/own/tool", "axolotl", r"routes, own, tool: choices: bitsandbytes, dequantize, peft, peftkit"),
        ("routes/own/base", "fp4", r"routes, own, base: peftkit starts from bf16 or nf4 or int8, found 'fp4'"),
        ("routes/peft/into", "bf16", r"routes, peft, into: peft merges a base in nf4 into nf4, found 'bf16'"),
        ("routes/peft/calibrated", True, r"routes, peft, calibrated: peft merges without inputs"),
        ("routes/own/residual_rank", 2, r"routes, own, residual_rank: a positive rank goes beside peftkit's"),
        ("routes/peft/residual_rank", 2, r"routes, peft, residual_rank: a positive rank goes beside peftkit's"),
    ],
)
def test_suite_that_cannot_be_meant_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        merge_suite.parse(changed(path, value))


def test_suite_file_is_named_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump(changed("kin", 1)))
    with pytest.raises(SuiteError, match=r"some\.yaml: the suite: unknown key 'kin'; did you mean 'kind'"):
        merge_suite.load(path)


def test_kind_decides_who_runs_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    for content, expected in (("kind: merge", "merging"), ("name: x", "engine"), ("kind: comparison", "engine")):
        path.write_text(content)
        assert suite.runner(path) == expected
    path.write_text("kind: merges")
    with pytest.raises(SuiteError, match=r"some\.yaml: kind: did you mean 'merge'"):
        suite.runner(path)
    path.write_text("- a list")
    assert suite.runner(path) == "engine"


def test_comparison_takes_no_other_kind() -> None:
    with pytest.raises(SuiteError, match="unknown key 'calibration_rows'"):
        suite.parse(copy.deepcopy(GOOD))
    good = {
        key: value for key, value in GOOD.items() if key in ("kind", "name", "title", "backbone", "data", "training")
    }
    with pytest.raises(SuiteError, match="kind: expected 'comparison', found 'merge'"):
        suite.parse({**good, "seeds": [0], "contenders": {"LoRA": {"method": "lora"}}})


def test_suite_that_comes_with_peftkit_has_every_tool_format_and_method() -> None:
    found = merge_suite.load(SUITES / "merge.yaml")
    assert {route.tool for route in found.routes.values()} == set(merge_suite.ROUTES)
    assert {route.into for route in found.routes.values()} == set(merge_suite.FORMATS)
    assert {adapter.method for adapter in found.adapters.values()} == {"lora", "adalora", "loha", "oft", "ia3"}
    assert found.adapters["LoRA"].sizes == (0.01, 0.02, 0.05, 0.1)
    for adapter in found.adapters.values():
        peftkit.METHODS[adapter.method].config(**adapter.config)


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
    prepared = SequenceClassification().prepare(made.comparison())

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
    prepared = SequenceClassification().prepare(merge_suite.load(suite_path).comparison())
    assert not set(prepared.train.groups) & set(prepared.evaluated.groups)
    assert not set(prepared.train.tokens) & set(prepared.evaluated.tokens)


# The report ---------------------------------------------------------------------------------------------------------


def made(contender: str, size: float | None = 0.02, **changes: Any) -> MergeRecord:
    """A made-up record; `changes` replace fields."""
    pairs = {"weights": [0.5, 0.25], "activations": [0.625, 0.375], "logits": [0.75, 0.125]}
    fields: dict[str, Any] = {
        "key": f"{contender} {size}", "suite": "made-up", "title": "Made up", "adapter": "LoRA", "method": "lora",
        "config": {}, "learning_rate": 0.1, "seed": 0, "scaled": "lora_B", "asked_size": size, "size": size or 0.3,
        "contender": contender, "tool": "peftkit", "base": "nf4", "into": "nf4", "calibrated": False,
        "residual_rank": 0, "calibration_rows": 4, "judged_rows": 2, "minimum_effect": 0.9, "refused": None,
        "kept": {"nf4": pairs, "bf16": pairs}, "as_run": [0.75, 0.125], "sites": {}, "bytes_per_weight": 0.5,
        "certificate": None, "merge_seconds": 1.0, "training": {"steps": 1, "batch_size": 2},
        "data": made_up("x", 0.5, 1).data, "backbone": made_up("x", 0.5, 1).backbone, "threads": 1,
        "environment": made_up("x", 0.5, 1).environment, "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return MergeRecord(**{**fields, **changes})


def test_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    both = [made("a"), made_up("LoRA", 0.5, 10)]
    with record.writer(tmp_path) as writer:
        for each in both:
            writer.append(each)
    found = record.read(tmp_path)
    assert [type(each) for each in found] == [type(each) for each in both]
    assert found[0] == both[0]
    assert MergeRecord.from_line(both[0].to_line()) == both[0]
    with pytest.raises(record.RecordError, match=r"misses fields \['tool'\] and has unknown fields \['tol'\]"):
        record.parsed(both[0].to_line().replace('"tool"', '"tol"'))


def test_report_shows_numbers_refusals_and_the_certificate(tmp_path: Path) -> None:
    certificate = {"effect_difference": 2e-5, "error_difference": 1e-6, "input_effect_difference": 0.003,
                   "input_error_difference": 0.001, "kept": 1.0}  # fmt: skip
    records = [
        made("own", certificate=certificate),
        made("own", None, adapter="OFT", refused="only 3 % would be stored"),
        made("theirs", tool="peft"),
        made("theirs", None, adapter="OFT", tool="peft", kept={}, as_run=None, refused="ValueError: not so"),
        made("dense", into="bf16", kept={"nf4": {"logits": [1.0, 0.004], "weights": [1, 0], "activations": [1, 0]},
                                         "bf16": {"logits": [0.9, 3.0]}}),
        made("fused", into="fused"),
    ]  # fmt: skip
    with record.writer(tmp_path / "in") as writer:
        for each in [made("own", kept={}, started="2025-01-01T00:00:00+00:00"), *records, made_up("A", 0.5, 10)]:
            writer.append(each)
    page = report.write([tmp_path / "in"], tmp_path / "out")
    markdown, html = (tmp_path / "out" / "report.md").read_text(), page.read_text()
    for text in (
        "| Adapter | own | theirs | fused |\n|---|--:|--:|--:|",
        "| LoRA, 2 % | 0.75 / 0.12 | 0.75 / 0.12 | 0.75 / 0.12 |",
        "| OFT, 30 % as trained | 0.75 / 0.12 † | – | – |",
        "## Weights, merged into 4 bits (NF4): effect kept / error",
        "| LoRA, 2 % | 0.50 / 0.25 |",
        "| LoRA, 2 % | 1.00 / 0.004 |",
        "† own refuses OFT, 30 % as trained at minimum_effect=0.9; the numbers are those of minimum_effect=0.",
        "– theirs cannot merge OFT, 30 % as trained: ValueError: not so",
        "differ from these numbers by at most 2e-05 at any site of 1 merges, effect or error, on weights, and 0.003",
        "own 0.75 to 0.75 (error 0.12)",
        "# A made-up comparison",
    ):
        assert text in markdown
    assert "<td>0.75 / 0.12 †</td>" in html
    assert html.count("<svg") == 3
    assert "into 8 bits" not in markdown
    assert merges.tables(merges.merges(records))[-1].rows[0][:6] == (
        "dense",
        "16 bits",
        "1.00",
        "1.00",
        "0.004",
        "0.004",
    )


def test_report_takes_the_newest_record_of_a_merge() -> None:
    old = made("own", started="2025-01-01T00:00:00+00:00", merge_seconds=9.0)
    assert merges.merges([made("own"), old]).first.merge_seconds == 1.0


def test_committed_results_can_be_read_and_are_those_of_the_suite() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "merge"
    found = record.read(folder)
    wanted = merge_suite.load(SUITES / "merge.yaml")
    assert {r.contender for r in found} == set(wanted.routes)
    assert {(r.adapter, r.asked_size) for r in found} == {
        (name, size) for name, adapter in wanted.adapters.items() for size in adapter.sizes or (None,)
    }


def test_engine_still_runs_comparisons_through_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from peftkit.cli.app import app

    seen = []
    for module in (engine, merging):
        monkeypatch.setattr(module, "dry_run", lambda path, name=module.__name__: seen.append((name, path.stem)) or "")
    for name in ("quick", "merge"):
        assert CliRunner().invoke(app, ["bench", "run", name, "--dry-run"]).exit_code == 0
    assert seen == [("peftkit_bench.engine", "quick"), ("peftkit_bench.merging", "merge")]
