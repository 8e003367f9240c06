"""The command line: what it prints, how it fails, and that it imports only what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig

import peftkit
from peftkit import cli
from peftkit.cli import bench, plan, skeleton
from peftkit.errors import ConfigError


@pytest.fixture
def command(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def bert_folder(tmp_path: Path) -> str:
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def bert_model(folder: str):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(BertConfig.from_pretrained(folder))


# methods


def test_methods_lists_every_registered_method(command):
    code, out, _ = command("methods")
    assert code == 0
    for name, method in peftkit.METHODS.items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert method.title in line
        assert method.paper is None or f"arXiv:{method.paper.arxiv}" in line


def test_methods_as_json_carries_the_declared_facts(command):
    code, out, _ = command("methods", "--json")
    assert code == 0
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert set(found) == set(peftkit.METHODS)
    lora = found["lora"]
    assert (lora["config"], lora["attach"], lora["knob"], lora["peft_type"]) == ("LoRA", "weight", "r", "LORA")
    assert (lora["mergeable"], lora["quantized_base"]) == (True, True)
    assert lora["default_targets"] == ["attention.query", "attention.value"]
    assert found["full"]["paper"] is None
    assert found["full"]["quantized_base"] is False


# plan


def test_plan_prints_the_table_of_the_plan(command, bert_folder):
    code, out, _ = command("plan", bert_folder, "--method", "lora", "-o", "r=4", "-o", "target_modules=all-linear")
    assert code == 0
    expected = peftkit.plan(bert_model(bert_folder), peftkit.LoRA(r=4, target_modules="all-linear"))
    assert out.strip() == str(expected)
    assert f"{expected.trainable:,} trainable" in out


def test_plan_as_json_counts_what_wrapping_trains(command, bert_folder):
    _, out, _ = command("plan", bert_folder, "-m", "lora", "-o", "r=3", "--json")
    model = peftkit.wrap(bert_model(bert_folder), peftkit.LoRA(r=3))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = json.loads(out)
    assert found["trainable"] == trained
    assert sum(s["trainable"] for s in (*found["sites"], *found["extras"])) == trained


def test_plan_solves_for_a_budget(command, bert_folder):
    code, out, _ = command("plan", bert_folder, "--method", "lora", "--budget", "2000")
    config = peftkit.fit_budget(bert_model(bert_folder), "lora", parameters=2000)
    assert code == 0
    assert out.startswith(f"budget 2,000: r={config.r}, ")
    _, tighter, _ = command("plan", bert_folder, "--method", "lora", "--budget", "1000")
    assert tighter.splitlines()[0] != out.splitlines()[0]


def test_plan_says_when_the_budget_is_too_small(command, bert_folder):
    code, out, err = command("plan", bert_folder, "--method", "lora", "--budget", "10")
    assert (code, out) == (2, "")
    assert "over the budget of 10" in err


@pytest.mark.parametrize(
    ("task", "head"), [("auto", "classifier"), ("seq-cls", "classifier"), ("qa", "qa_outputs"), ("base", None)]
)
def test_plan_builds_the_class_of_the_task(command, bert_folder, task, head):
    _, out, _ = command("plan", bert_folder, "--task", task, "--json")
    assert [extra["path"] for extra in json.loads(out)["extras"]] == ([head] if head else [])


def test_plan_takes_the_number_of_classes(command, bert_folder):
    _, out, _ = command("plan", bert_folder, "--labels", "7", "--json")
    assert json.loads(out)["extras"][0]["shape"] == "7x32, 7"


def test_plan_builds_the_model_without_memory_for_weights(tmp_path):
    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)  # as wide as a 7B model
    model = skeleton.load_skeleton(str(tmp_path), skeleton.Task.causal_lm, None)
    assert all(p.is_meta for p in model.parameters())
    assert peftkit.plan(model, peftkit.LoRA(r=16)).trainable == 2 * 2 * 16 * (4096 + 4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lroa"), "no method 'lroa'; did you mean 'lora'"),
        (("-o", "rank=4"), "LoRA has no field 'rank'"),
        (("-o", "r"), "-o r: expected KEY=VALUE, such as -o r=16"),
        (("-o", "r=4", "-o", "r=8"), "r is given twice"),
        (("-o", "r=sixteen"), "r must be int, found 'sixteen'"),
        (("-o", "r=[1"), "is not a YAML value"),
        (("-o", "target_modules=[qurey]"), "'qurey' matches no module; did you mean 'query'"),
        (("--task", "causal-lm", "--labels", "0", "-o", "r=0"), "r must be at least 1, found 0"),
        (("--task", "seq2seq"), "transformers cannot build a bert model for task 'seq2seq'"),
    ],
)
def test_plan_fails_with_one_message_and_code_2(command, bert_folder, arguments, message):
    code, out, err = command("plan", bert_folder, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("peftkit: ")
    assert "Traceback" not in err


def test_plan_names_a_model_that_cannot_be_read(command, tmp_path):
    code, _, err = command("plan", str(tmp_path / "nothing"))
    assert code == 2
    assert "cannot read the config of" in err
    assert "expected a folder with a transformers config.json" in err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16", 16),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("true", True),
        ("null", None),
        ("all-linear", "all-linear"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{query: 4}", {"query": 4}),
        (".*layer\\.1\\..*query", ".*layer\\.1\\..*query"),
        ("a=b", "a=b"),
        ("'16'", "16"),
    ],
)
def test_options_are_read_as_yaml_values(text, value):
    parsed = plan.parse_options([f"key={text}"])["key"]
    assert parsed == value
    assert type(parsed) is type(value)


# doctor


def test_doctor_shows_versions_devices_and_what_is_missing(command, monkeypatch):
    import torch

    from peftkit import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "bitsandbytes" else real(name))
    code, out, _ = command("doctor")
    assert code == 0
    assert f"peftkit {peftkit.__version__}" in out
    assert torch.__version__ in out
    assert "bitsandbytes is not installed: needed for backbones stored in 8 or 4 bits" in out
    assert "merge_lora" in out
    assert "datasets is not installed" not in out


def test_doctor_as_json_names_the_devices_of_torch(command):
    import peftkit_kernels
    import torch

    code, out, _ = command("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["devices"][0]["name"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["built"] == [f"{s.op} ({s.device})" for s in peftkit_kernels.status() if s.runnable]
    assert {p["name"] for p in found["packages"] if p["required"]} >= {"torch", "transformers", "safetensors"}


# bench


@pytest.fixture
def engine(monkeypatch):
    """A recording stand-in for the engine, so that only the command line is tested here."""
    calls = []
    fake = types.SimpleNamespace(
        run=lambda path, out, *, jobs=0, progress=True, ray=None: calls.append((path, out, jobs, progress, ray)) or out,
        text=lambda path: f"would run {path.name}",
        suite=lambda **options: types.SimpleNamespace(name="mine", options=options),
        write=lambda folders, out: calls.append((folders, out)) or out,
        runner=lambda path: "engine",
    )
    monkeypatch.setattr(bench, "_bench_module", lambda name: fake)
    return calls


def test_bench_run_hands_the_suite_to_the_engine(command, engine, tmp_path):
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\n")
    code, out, _ = command("bench", "run", str(suite), "--out", str(tmp_path / "r"), "--jobs", "2", "--quiet")
    assert code == 0
    assert engine == [(suite, tmp_path / "r", 2, False, None)]
    assert str(tmp_path / "r") in out


@pytest.mark.parametrize(
    ("arguments", "address"),
    [(["--ray"], "auto"), (["--ray", "--quiet"], "auto"), (["--ray", "10.0.0.1:6379"], "10.0.0.1:6379"), ([], None)],
)
def test_bench_run_takes_ray_with_and_without_an_address(command, engine, tmp_path, arguments, address):
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\n")
    code, _, _ = command("bench", "run", str(suite), *arguments)
    assert code == 0
    assert engine[0][4] == address


def test_bench_run_makes_a_suite_of_options(command, engine):
    code, out, _ = command(
        "bench", "run", "--model", "some/model", "--data", "train.jsonl", "--data", "test.jsonl", "--task", "token-cls",
        "--methods", "lora,peft:boft", "--budget", "0.5%,74000", "--seeds", "5", "--learning-rates", "1e-3,1e-4",
        "--column", "tokens=words",
    )  # fmt: skip
    assert code == 0
    ((suite,), written, *_) = engine[0]
    assert str(written) == "reports/mine"
    assert {name: suite.options[name] for name in ("model", "data", "task", "methods", "budgets", "seeds")} == {
        "model": "some/model", "data": ["train.jsonl", "test.jsonl"], "task": "token-cls",
        "methods": ["lora", "peft:boft"], "budgets": ["0.5%", "74000"], "seeds": 5,
    }  # fmt: skip
    assert suite.options["learning_rates"] == [1e-4, 1e-3]
    assert suite.options["columns"] == ["tokens=words"]
    assert "reports/mine" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a suite, such as `peftkit bench run quick`, or --model and --data"),
        (["quick", "--model", "x"], "give either a suite"),
        (["quick", "--data", "x.csv"], "--data goes with --model; a suite names its own data"),
        (["--model", "x", "--learning-rates", "fast"], "--learning-rates: expected numbers by commas"),
    ],
)
def test_bench_run_refuses_what_cannot_be_meant(command, engine, arguments, message):
    code, _, err = command("bench", "run", *arguments)
    assert code == 2
    assert message in err
    assert engine == []


def test_bench_compare_reads_the_folders_it_is_given(command, monkeypatch, tmp_path):
    seen = []
    fake = types.SimpleNamespace(
        text=lambda folders, first, second, *, budget=None: seen.append((folders, first, second, budget)) or "A wins",
        json_text=lambda folders, first, second, *, budget=None: '{"winner": "A"}',
    )
    monkeypatch.setattr(bench, "_bench_module", lambda name: fake)
    code, out, _ = command("bench", "compare", "A", "B", str(tmp_path), "--budget", "100")
    assert (code, out.strip(), seen) == (0, "A wins", [([tmp_path], "A", "B", 100)])
    code, out, _ = command("bench", "compare", "A", "B", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (0, {"winner": "A"})
    code, _, err = command("bench", "compare", "A", "B", str(tmp_path / "none"))
    assert code == 2
    assert "is not a folder; expected one that `peftkit bench run --out` has written" in err
    monkeypatch.chdir(tmp_path)
    code, _, err = command("bench", "compare", "A", "B")
    assert code == 2
    assert "no records in reports/*; name the folders" in err


def test_bench_pack_says_what_it_wrote_and_how_large_it_is(command, monkeypatch, tmp_path):
    def pack(folder, out):
        if folder.name == "empty":
            raise ValueError("expected records, found none")
        out.mkdir()
        (out / "report.md").write_bytes(b"x" * 1500)
        return out

    monkeypatch.setattr(bench, "_bench_module", lambda name: types.SimpleNamespace(pack=pack))
    for name in ("in", "empty"):
        (tmp_path / name).mkdir()
    code, out, _ = command("bench", "pack", str(tmp_path / "in"), str(tmp_path / "out"))
    assert (code, out.replace("\n", "")) == (0, f"packed: {tmp_path / 'out'}, 2 kB")
    for folder, message in (("none", "is not a folder; expected one that"), ("empty", "expected records, found none")):
        code, _, err = command("bench", "pack", str(tmp_path / folder), str(tmp_path / "out"))
        assert code == 2
        assert message in err


def test_bench_run_dry_runs_nothing(command, engine, tmp_path):
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\n")
    code, out, _ = command("bench", "run", str(suite), "--dry-run")
    assert (code, out.strip(), engine) == (0, "would run mine.yaml", [])


def test_bench_run_names_a_suite_that_does_not_exist(command, engine):
    code, _, err = command("bench", "run", "nowhere.yaml")
    assert code == 2
    assert "no suite 'nowhere.yaml': expected a YAML file or a suite's name" in err


def test_bench_run_finds_the_suites_that_come_with_peftkit():
    names = set(bench._own_suites())
    on_disk = {p.stem for p in (Path(__file__).parents[1] / "benchmarks" / "suites").glob("*.yaml")}
    assert names == on_disk
    assert bench.find_suite("quick").name == "quick.yaml"


def test_bench_run_says_how_to_go_on_when_interrupted(command, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        bench, "_bench_module", lambda name: types.SimpleNamespace(run=interrupted, runner=lambda path: "engine")
    )
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\n")
    code, _, err = command("bench", "run", str(suite))
    assert code == 130
    assert "the same command goes on where it was" in err


def test_bench_report_writes_into_the_first_folder(command, engine, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    code, _, _ = command("bench", "report", *map(str, folders))
    assert code == 0
    assert engine == [(folders, folders[0])]


def test_bench_report_refuses_a_folder_that_does_not_exist(command, engine, tmp_path):
    code, _, err = command("bench", "report", str(tmp_path / "none"))
    assert code == 2
    assert "is not a folder" in err
    assert engine == []


def test_bench_says_when_the_benchmarks_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "peftkit_bench", None)
    monkeypatch.delitem(sys.modules, "peftkit_bench.engine", raising=False)
    with pytest.raises(ConfigError, match="is not installed, which `peftkit bench` needs"):
        bench._bench_module("engine")


# the program


def test_version_is_printed(command):
    code, out, _ = command("--version")
    assert (code, out.strip()) == (0, f"peftkit {peftkit.__version__}")


def test_an_unknown_command_is_a_usage_error(command):
    code, _, err = command("trian")
    assert code == 2
    assert "trian" in err


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after a statement."""
    program = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


HEAVY = {"transformers", "peft", "bitsandbytes", "datasets", "accelerate", "scipy", "matplotlib", "jinja2", "pandas"}


def test_importing_peftkit_pulls_in_no_heavy_package():
    loaded = loaded_after("import peftkit")
    assert "torch" in loaded
    assert not loaded & {*HEAVY, "peftkit_kernels"}, "compiled code is loaded when it is first used"


def test_importing_the_command_line_pulls_in_no_heavy_package():
    loaded = loaded_after("import peftkit.cli")
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_the_module_runs_as_a_program_and_fails_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "peftkit.cli", "plan", "x", "-m", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("peftkit: no method 'nothing'")
    assert "Traceback" not in done.stderr
