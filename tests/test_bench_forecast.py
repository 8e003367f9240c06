"""What a cell is predicted to take: by hand where a model is one layer, and against a cell that is really run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from peftkit_bench import forecast as module
from peftkit_bench import measure, subjects
from peftkit_bench.forecast import Speed, forecast, machine_speed
from peftkit_bench.spec import Contender
from peftkit_bench.tasks import TASKS, task_class
from peftkit_bench.tasks.causal_lm import CausalLM
from peftkit_bench.tasks.contract import Prepared, Split
from peftkit_bench.tasks.sequence_classification import SequenceClassification
from peftkit_bench.tracing import Work, traced
from torch import nn
from transformers import BertConfig, LlamaConfig

CPU = torch.device("cpu")
SPEED = Speed(
    device="cpu",
    flops_per_second={torch.float32: 1e11, torch.bfloat16: 2e11},
    bytes_per_second=1e10,
    operation_seconds=1e-5,
)
TASK = SequenceClassification()
ROWS = {"train": 96, "tune": 40, "stop": 24, "test": 56}
MEASURED = """
import json, sys, time
import torch
from peftkit_bench import measure, subjects
from peftkit_bench.cell import train
from peftkit_bench.forecast import forecast, machine_speed
from peftkit_bench.spec import Contender
from peftkit_bench.suite import Training
from test_bench_forecast import TASK, prepared, resolved

folder, method = sys.argv[1:]
torch.set_num_threads(1)
data = prepared(folder, tokens=48)
contender = Contender(method=method)
found = resolved(data, contender)
speed = machine_speed()
predicted = forecast(
    TASK, data, subjects.subject("peftkit"), contender, found, batch_size=32, steps=4, evaluations=1,
    evaluated_rows={"stop": 24}, speed=speed,
)
subject = subjects.subject("peftkit")
memory = measure.PeakMemory(torch.device("cpu"))
model = subject.attach(TASK.model(folder, data.facts), method, found.fields)
memory.start()
start = time.process_time()  # of one thread: how long it takes where nothing else runs
train(TASK, subject, model, data, Training(steps=4, evaluations=1), 1e-3, seed=0, memory=memory)
seconds = time.process_time() - start
print(json.dumps([predicted.peak_bytes, memory.peak_bytes(), predicted.seconds, seconds]))
"""


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8, bias=False)


class OneTask:
    """The sum of what one layer computes: 1024 rows of 16 numbers become 1024 rows of 8."""

    def loss(self, model, batch):
        return F.linear(batch["x"], model.linear.weight).sum()


class Masked(OneTask):
    def loss(self, model, batch):
        out = F.linear(batch["x"], model.linear.weight)
        return out[batch["x"][:, 0] > 0].sum()


class OneSubject:
    def parameters(self, model):
        return [model.linear.weight], []

    def begin(self, model, steps):
        pass

    def penalty(self, model):
        return None


def one_layer(task, rows=1024):
    with torch.device("meta"):
        model = OneLayer()
    batch = {"x": torch.zeros(rows, 16)}
    return traced(task, OneSubject(), model, batch, batch, device=CPU)


def prepared(folder, *, tokens=24, padding=0):
    """Rows of numbers as a tokenizer would give them, of lengths from half of `tokens` to `tokens`."""
    splits = {}
    for name, count in ROWS.items():
        lengths = [tokens // 2 + i % (tokens // 2 + 1) for i in range(count)]
        encoded = tuple({"input_ids": [5 + (i + k) % 40 for k in range(n)], "label": i % 2, "start": 1}
                        for i, n in enumerate(lengths))  # fmt: skip
        splits[name] = Split(rows=({},) * count, encoded=encoded, groups=tuple(range(count)))
    return Prepared(folder=str(folder), backbone={}, data={}, facts={"classes": ["a", "b"]}, splits=splits,
                    padding=padding)  # fmt: skip


def resolved(data, contender, task=TASK):
    skeleton = task.skeleton(data.folder, data.facts)
    return subjects.subject(contender.subject).resolve(skeleton, contender, None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    ).save_pretrained(folder)
    return folder


def predicted(folder, method="lora", *, task=TASK, subject=None, quantization=None, **changes):
    data = prepared(folder)
    contender = Contender(method=method, quantization=quantization)
    options = {"batch_size": 8, "steps": 10, "evaluations": 2, "evaluated_rows": ROWS, "speed": SPEED, **changes}
    found = resolved(data, contender, task)
    return forecast(task, data, subject or subjects.subject("peftkit"), contender, found, **options)


def test_memory_of_one_layer_is_that_by_hand():
    step, evaluation = one_layer(OneTask())
    weight, batch, out, state = 16 * 8 * 4, 1024 * 16 * 4, 1024 * 8 * 4, 2 * 16 * 8 * 4 + 4
    assert (step.weights_bytes, step.trained_bytes, step.state_bytes) == (weight, weight, state)
    # The output and its sum; the gradient of the sum comes when the output is gone.
    assert step.peak_bytes == weight + state + batch + out + 4
    assert evaluation.peak_bytes == weight + batch + out + 4


def test_computation_of_one_layer_is_that_by_hand():
    step, evaluation = one_layer(OneTask())
    product = 2 * 1024 * 16 * 8
    # Forward, and the gradient of the weight; nothing asks for that of the input.
    assert [w.flops for w in step.passes.elements() if w.flops] == [product, product]
    assert [w.flops for w in evaluation.work.elements() if w.flops] == [product]
    moved = {w.bytes for w in evaluation.work if w.flops}
    assert moved == {4 * (1024 * 16 + 16 * 8 + 1024 * 8)}


def test_rows_that_a_mask_chooses_count_as_all():
    step, evaluation = one_layer(Masked())
    assert evaluation.peak_bytes >= 512 + 1024 * 16 * 4 + 2 * 1024 * 8 * 4
    assert step.peak_bytes > one_layer(OneTask())[0].peak_bytes


def test_optimizer_and_gradients_count_where_they_outweigh_the_rows():
    step, _ = one_layer(OneTask(), rows=1)
    # Weight, gradient, two moments, the two temporaries of the division by the second, the row, and single numbers.
    assert 6 * 512 + 64 <= step.peak_bytes <= 6 * 512 + 64 + 32


def test_seconds_are_those_of_the_slowest_limit():
    work = Counter(
        {
            Work(10**11, 8, torch.float32): 2,
            Work(10**11, 8, torch.bfloat16): 1,
            Work(0, 10**10, torch.float32): 3,
            Work(0, 8, torch.int64): 1000,
        }
    )
    speed = dataclasses.replace(SPEED, device="cuda")
    assert speed.seconds(work) == pytest.approx(2 * 1 + 0.5 + 3 * 1 + 1000 * 1e-5)
    assert speed.seconds(work, 0.5) == pytest.approx(1 + 0.25 + 1.5 + 1000 * 1e-5)
    assert SPEED.seconds(work) == pytest.approx(module.OVERHEAD * speed.seconds(work))


def test_more_rows_take_more(bert):
    found = [predicted(bert, batch_size=size) for size in (4, 16, 64)]
    assert not any(each.approximate for each in found)
    for less, more in itertools.pairwise(found):
        assert less.peak_bytes < more.peak_bytes
        assert less.seconds < more.seconds
        assert less.steady_bytes == more.steady_bytes


def test_full_fine_tuning_holds_more_than_lora_than_head(bert):
    full, lora, head = (predicted(bert, method) for method in ("full", "lora", "head"))
    assert full.steady_bytes > lora.steady_bytes > head.steady_bytes
    assert full.seconds > lora.seconds > head.seconds
    count = resolved(prepared(bert), Contender(method="full"))
    # A trained copy, two moments, and the best weights so far, beside the frozen weights; buffers are small.
    expected = 5 * 4 * count.total_parameters + module.TOUCHED_BYTES
    assert full.steady_bytes == pytest.approx(expected, rel=0.01)


def test_every_evaluation_takes_as_long(bert):
    seconds = [predicted(bert, evaluations=n, evaluated_rows={"stop": 24}).seconds for n in (2, 3, 7)]
    one = seconds[1] - seconds[0]
    assert one > 0
    assert seconds[2] - seconds[1] == pytest.approx(4 * one)
    twice = predicted(bert, evaluations=2, evaluated_rows={"stop": 48}).seconds
    assert twice - seconds[0] == pytest.approx(2 * one)


def test_the_larger_of_tune_and_test_is_predicted_once(bert):
    both = predicted(bert, evaluations=1, evaluated_rows={"stop": 24, "tune": 40, "test": 56})
    assert both == predicted(bert, evaluations=1, evaluated_rows={"stop": 24, "test": 56})
    assert both.seconds > predicted(bert, evaluations=1, evaluated_rows={"stop": 24, "tune": 40}).seconds


@pytest.mark.parametrize("quantization", ["nf4", "int8", "bnb-nf4"])
def test_quantized_weights_take_fewer_bytes(bert, quantization):
    plain, quantized = predicted(bert), predicted(bert, quantization=quantization)
    assert not quantized.approximate
    projections = 3 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64
    bits = 8.5 if quantization == "int8" else 4.5
    saved = projections * (4 - bits / 8)
    assert plain.steady_bytes - quantized.steady_bytes == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_products_with_quantized_weights_take_time(bert, quantization):
    products = dataclasses.replace(SPEED, bytes_per_second=1e15, operation_seconds=0.0)
    seconds = [
        predicted(bert, quantization=each, speed=products).seconds - module.START_SECONDS
        for each in (None, quantization)
    ]
    assert seconds[1] == pytest.approx(seconds[0], rel=0.1)


def test_bfloat16_takes_less_memory_than_float32(bert):
    options = {"batch_size": 64}
    assert predicted(bert, precision="bfloat16", **options).peak_bytes < predicted(bert, **options).peak_bytes


class Untraceable:
    """A subject whose method needs values."""

    def attach(self, model, method, fields):
        raise RuntimeError("values are needed")


def test_what_cannot_be_traced_is_estimated_and_marked(bert):
    traced_one, rough = predicted(bert), predicted(bert, subject=Untraceable())
    assert rough.approximate
    assert not traced_one.approximate
    for name in ("peak_bytes", "steady_bytes", "seconds"):
        assert 1 / 2 < getattr(rough, name) / getattr(traced_one, name) < 2


def test_logits_of_a_language_model_count(tmp_path):
    peaks = []
    for vocabulary in (1000, 50_000):
        LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=4).save_pretrained(tmp_path)  # fmt: skip
        peaks.append(predicted(tmp_path, task=CausalLM()))
    assert not any(each.approximate for each in peaks)
    held = [each.peak_bytes - each.steady_bytes for each in peaks]
    # At least the logits and their gradient, for 8 rows of at least 12 tokens.
    assert held[1] - held[0] > 2 * 8 * 12 * 49_000 * 4


def test_generating_takes_longer_than_reading(tmp_path):
    LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4).save_pretrained(tmp_path)  # fmt: skip
    reads, writes = (predicted(tmp_path, task=CausalLM(metric=metric)) for metric in ("perplexity", "exact match"))
    more = predicted(tmp_path, task=CausalLM(metric="exact match", max_new_tokens=128))
    assert reads.seconds < writes.seconds < more.seconds


def test_every_task_says_how_many_rows_it_predicts_at_a_time():
    told = {name for name in TASKS if "EVALUATION_ROWS" in vars(sys.modules[task_class(name).__module__])}
    assert told >= {"seq-cls", "token-cls", "causal-lm", "seq2seq"}
    for name, option in module.GENERATES.items():
        assert option in {field.name for field in dataclasses.fields(task_class(name))}


@pytest.mark.skipif(not measure.CAN_RESET, reason="the kernel's high-water mark cannot be reset here")
def test_nothing_of_a_large_model_is_allocated(tmp_path):
    LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=12,
                num_attention_heads=32, num_key_value_heads=32).save_pretrained(tmp_path)  # fmt: skip
    predicted(tmp_path, task=CausalLM(), batch_size=1)
    memory = measure.PeakMemory(CPU)
    memory.start()
    found = predicted(tmp_path, task=CausalLM(), batch_size=64)
    assert found.steady_bytes > 10e9
    assert memory.peak_bytes() < 100e6


def test_random_numbers_go_on_as_if_nothing_was_forecast(bert):
    torch.manual_seed(0)
    predicted(bert, "vera")
    assert torch.initial_seed() == 0
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_speed_of_this_machine_is_measured_in_a_moment():
    threads = torch.get_num_threads()
    start = time.process_time()
    found = machine_speed(1)
    assert time.process_time() - start < 10
    assert torch.get_num_threads() == threads
    assert found.flops_per_second[torch.float32] > 1e8
    assert found.bytes_per_second > 1e7
    assert 1e-7 < found.operation_seconds < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(not measure.CAN_RESET, reason="the kernel's high-water mark cannot be reset here")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_forecast_is_near_what_is_measured(tmp_path, method):
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=5000, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
                        intermediate_size=1024, num_labels=2)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), method], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    peak, measured_peak, seconds, measured_seconds = json.loads(done.stdout.splitlines()[-1])
    assert 1 / 1.5 < peak / measured_peak < 1.5
    # Twice that of the documentation: others may use the machine's memory meanwhile.
    assert 1 / 4 < (seconds - module.START_SECONDS) / measured_seconds < 4
