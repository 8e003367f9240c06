"""What the tests of the core share: tiny models with random adapters, and bit-exact pictures of a model's state."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit
from peftkit.testing.backbones import BACKBONES
from peftkit.wrap import adapters_of

NOISE = 0.05


def built(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny backbone in evaluation mode, the same weights every time."""
    return BACKBONES[name](dtype)


def batch(name: str, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """The backbone's batch; on the CPU for a model whose weights are offloaded or sharded."""
    reference = next(model.parameters())
    made = BACKBONES[name].make_inputs(torch.Generator().manual_seed(1000 + seed))
    return {key: value.to(reference.dtype) if value.is_floating_point() else value for key, value in made.items()}


def logits(name: str, model: nn.Module, seed: int = 0) -> Tensor:
    """The model's logits on the backbone's batch, without gradients."""
    with torch.no_grad():
        return BACKBONES[name].run(model, batch(name, model, seed))[1]


def loss(name: str, model: nn.Module, seed: int = 0) -> Tensor:
    """The model's loss on the backbone's batch, with gradients."""
    return BACKBONES[name].run(model, batch(name, model, seed))[0]


def randomise(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    """The same model with every trained tensor of an adapter moved off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, adapter in adapters_of(model, name):
            for parameter in adapter.parameters(recurse=False):
                if parameter.is_floating_point():
                    parameter.add_((NOISE * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def checkpointed(model: Any, reentrant: bool = False) -> nn.Module:
    """The same model with gradient checkpointing switched on."""
    # transformers 5.23 renamed the method; earlier versions have the older name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    return model


def bits(tensor: Tensor) -> bytes:
    """The tensor's bytes, so that -0.0 differs from 0.0 and a NaN equals itself."""
    return (
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + str(tensor.dtype).encode()
    )


def _identity(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_identity(v) for v in value)
    return value if isinstance(value, bool | int | float | str | type(None)) else id(value)


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a verb could leave changed: tensors, classes, attributes, flags, modes, generator."""
    attributes = {
        path: {
            key: _identity(value)
            for key, value in module.__dict__.items()
            if key not in ("_parameters", "_buffers", "_modules")
        }
        for path, module in model.named_modules()
    }
    return {
        "bits": {key: bits(value) for key, value in model.state_dict(keep_vars=True).items()},
        "identities": {key: id(value) for key, value in model.named_parameters(remove_duplicate=False)},
        "classes": {path: type(module) for path, module in model.named_modules()},
        "attributes": attributes,
        "flags": {key: value.requires_grad for key, value in model.named_parameters(remove_duplicate=False)},
        "generator": bits(torch.get_rng_state()),
    }


def lora(**fields: Any) -> peftkit.LoRA:
    """A LoRA on every projection, of a size that fits tiny models."""
    return peftkit.LoRA(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **fields})


def fitted(model: nn.Module, **fields: Any) -> nn.Module:
    """The same model with a random adapter that changes its output, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(peftkit.wrap(model, lora(**fields)))


def adapted(name: str, **fields: Any) -> nn.Module:
    """A tiny model with a random adapter that changes its output, the same every time."""
    return fitted(built(name), **fields)


def ddp_worker(rank: int, folder: str) -> None:
    """One of two processes that train together, each on its half of the batch; here, where nothing slow is imported."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = adapted("mlp")
    runner = nn.parallel.DistributedDataParallel(model)
    half = {key: value[3 * rank : 3 * rank + 3] for key, value in batch("mlp", model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(runner(half["x"]), half["labels"]).backward()
    optimizer.step()
    torch.save({key: parameter.detach() for key, parameter in model.named_parameters()}, f"{folder}/rank{rank}.pt")
    # Not destroyed: see `alone`.
    os._exit(0)


def fsdp_worker(rank: int, folder: str) -> None:
    """One of two processes that share a tiny Llama's weights; both save, and then the first alone."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    import peftkit.training

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    model = adapted("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    half = {key: value[rank::2] for key, value in batch("llama", model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    value = BACKBONES["llama"].run(model, half)[0]
    value.backward()
    optimizer.step()
    peftkit.save(model, f"{folder}/rank{rank}")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    dist.barrier()
    if rank == 0:
        # As transformers.Trainer does: the state dict is gathered by all, written by one.
        peftkit.training.save_pretrained(None, model, f"{folder}/trainer", state_dict=state)
        with torch.no_grad():
            torch.save([p.to_local().shape for p in model.parameters()], f"{folder}/shapes.pt")
    # Not destroyed: see `alone`.
    os._exit(0)


def alone(body: Callable[..., None], *arguments: object) -> None:
    """Runs a function of a test module in a process of its own, which ends without taking its process group apart.

    A gloo group that is destroyed waits for its thread, which may wait for the interpreter's lock to drop its last
    work; in the process of the tests that would hang the run, now and then.
    """
    code = (
        "import importlib, os, sys, traceback\n"
        "try:\n"
        "    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])\n"
        "except BaseException:\n"
        "    traceback.print_exc()\n"
        "    os._exit(1)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, body.__module__, body.__name__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
