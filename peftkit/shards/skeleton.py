"""The model of a folder on the meta device, with the adapters attached as in memory, and nothing of it loaded."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peftkit import backbones, checkpoint, folder, targets
from peftkit.errors import BackboneError, BaseMismatchError, CheckpointError, ConfigError, MergeError
from peftkit.fingerprint import CODES, base_tensors
from peftkit.plan import Plan
from peftkit.shards.names import Names
from peftkit.shards.source import DTYPES, FOLDABLE, Source
from peftkit.spec import METADATA_PREFIX, Adapter, Site, State
from peftkit.wrap import adapters_of, attach, fill

Ignorable = Literal["unexpected", "base"]

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task types, as adapter_config.json spells them -> what builds a model for them."""


@dataclass
class Given:
    """One adapter folder and the weight that its effect gets."""

    path: Path
    weight: float
    name: str = ""
    planned: Plan | None = None
    state: State | None = None

    @property
    def label(self) -> str:
        """The folder's name, with the weight where it is not 1."""
        name = self.path.resolve().name
        return name if self.weight == 1 else f"{name} x {self.weight:g}"


def build(source: Source, given: Sequence[Given]) -> nn.Module:
    """The model on the meta device: of the class that the adapters were trained on, else of the folder's own.

    Raises:
        BackboneError: the config cannot be read, needs code of the folder's own, or names no known class.
        MergeError: the base is stored quantized, or the adapters belong to different classes.
    """
    import transformers

    raw = folder.read_json(source.path / "config.json")
    if raw.get("quantization_config"):
        kind = raw["quantization_config"].get("quant_method", "a quantized format")
        raise MergeError(
            f"{source.path} is stored quantized ({kind}), and folding into codes tensor by tensor is not "
            "possible yet. Give "
            "the folder of the original 16-bit weights as BASE, or load the base with transformers and use "
            "peftkit.load "
            "and peftkit.merge"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"{source.path / 'config.json'} describes no model that transformers {transformers.__version__} "
            "has of its own "
            f"({first}); code from a checkpoint is never run. Build the model on the meta device yourself and "
            "give it as "
            "model="
        ) from None
    chosen = {g.path: _class_of(g.path, config) for g in given}
    if len(set(chosen.values())) > 1:
        listed = ", ".join(f"{p} on {c}" for p, c in chosen.items())
        raise MergeError(f"the adapters were trained on different models: {listed}; merge those of one class")
    (name,) = set(chosen.values())
    model = _built(config, name)
    labels = _labels(model, given)
    if labels is not None and labels != getattr(config, "num_labels", None):
        config.num_labels = labels
        model = _built(config, name)
    return model


def _class_of(path: Path, config: Any) -> str:
    """The class that an adapter was trained on, by its own record, its task, or the base's config."""
    import transformers

    own = list(getattr(config, "architectures", None) or ())
    base = checkpoint.provenance(path).get("base")
    words = str(base.get("class") if isinstance(base, dict) else "").split()
    for word in words[:1]:
        cls = getattr(transformers, word, None)
        if inspect.isclass(cls) and getattr(cls, "config_class", None) is type(config):
            return word
    task = folder.read_json(path / folder.CONFIG).get("task_type")
    if task in AUTO_CLASSES and not any(backbones.task_of(name) == task for name in own):
        return AUTO_CLASSES[task]
    return own[0] if own and hasattr(transformers, str(own[0])) else "AutoModel"


def _built(config: Any, name: str) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    try:
        with torch.device("meta"):
            model: nn.Module = cls.from_config(config) if name.startswith("AutoModel") else cls(config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(f"transformers cannot build {name} from the base's config.json: {first}") from None
    return model.eval()


def _labels(model: nn.Module, given: Sequence[Given]) -> int | None:
    """The number of classes of a trained head in the adapters; None without one."""
    heads = backbones.head_names(model)
    last = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and targets.inside(p, heads)][-1:]
    for path in last:
        for adapter in given:
            for key, tensor in folder.read_tensors(adapter.path).items():
                if key.endswith(f"{path}.weight") and tensor.dim() == 2:
                    return int(tensor.shape[0])
    return None


def as_stored(model: nn.Module, source: Source, names: Names) -> None:
    """Gives the model's tensors, still on the meta device, the dtypes that the checkpoint stores them in."""
    stored = {name: source.entries[key].dtype for key, name in names.direct.items()}
    stored |= {name: source.entries[g.keys[0]].dtype for g in names.groups for name in g.names}
    wanted: dict[int, torch.dtype] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if stored.get(name) in FOLDABLE:
            wanted[id(parameter)] = DTYPES[stored[name]]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtype = wanted.get(id(parameter), DTYPES[source.dtype])
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device="meta")


def attached(model: nn.Module, given: Sequence[Given], ignore: Collection[Ignorable]) -> None:
    """Attaches every adapter to the model on the meta device, by the same code as in memory; names them too.

    Raises:
        CheckpointError: an adapter folder is damaged or does not fit.
        MergeError: a method is no change of weights.
        ConfigError: a weight that an adapter cannot have.
    """
    for number, adapter in enumerate(given):
        adapter.name = f"adapter-{number + 1}"
        accepted: list[checkpoint.Ignorable] = ["base", *(i for i in ignore if i == "unexpected")]
        adapter.planned, adapter.state = checkpoint.read(model, adapter.path, accepted)
        method = adapter.planned.method
        if not method.mergeable:
            raise MergeError(
                f"{method.name} ({adapter.path}) cannot be merged: it is no change of weights; use the wrapped "
                "model as "
                "it is"
            )
        with torch.device("meta"):
            attach(model, adapter.planned, name=adapter.name, trainable=False)
        for _, module in adapters_of(model, adapter.name):
            module.check_trained()


class Adapters:
    """The attached adapters, filled with their trained tensors one by one, and emptied again."""

    def __init__(self, model: nn.Module, given: Sequence[Given]) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._of: dict[int, tuple[Given, str]] = {}
        self._first: dict[tuple[str, str, str], tuple[str, str]] = {}
        for adapter in given:
            assert adapter.planned is not None
            for path, module in adapters_of(model, adapter.name):
                self._of[id(module)] = (adapter, path)
            holders: dict[int, tuple[str, str]] = {}
            for site in (*adapter.planned.sites, *adapter.planned.extras):
                for name, _ in site.parameters:
                    own = self._modules[site.path]._parameters[name]
                    holder = holders.setdefault(id(own), (site.path, name))
                    self._first[adapter.name, site.path, name] = holder
            if adapter.planned.method.shared:
                for path, module in adapters_of(model, adapter.name):
                    if path == "" and module.tensors() | dict(module.named_buffers()):
                        self.fill(module)

    def weight(self, module: Adapter) -> float:
        """The weight that the adapter's effect gets."""
        return self._of[id(module)][0].weight

    def source(self, module: Adapter) -> Given:
        """The folder that the adapter comes from."""
        return self._of[id(module)][0]

    def fill(self, module: Adapter) -> None:
        """Gives an adapter its tensors in memory; those that the folder lacks start as in memory.

        Raises:
            MergeError: the start needs a weight that is on the meta device.
        """
        given, path = self._of[id(module)]
        assert given.planned is not None
        values = self._values(given, path, module)
        module.to_empty(device="cpu")
        own = module.tensors()
        if not _covers(module, own, values):
            with torch.random.fork_rng(devices=[]):
                self._initialise(given.planned, path, module)
        fill(module, values)

    def covered(self, module: Adapter) -> bool:
        """Whether the folder has every tensor of an adapter, so that nothing is left to start."""
        given, path = self._of[id(module)]
        values, own = self._values(given, path, module), module.tensors()
        return _covers(module, own, values)

    def empty(self, module: Adapter) -> None:
        """Gives the memory back."""
        module.to(device="meta")

    def _initialise(self, planned: Plan, path: str, module: Adapter) -> None:
        method, site = planned.method, _site(planned, path)
        if site is not None and site.role != "extra":
            method.initialise(module, self._modules[path], site, planned.config)
        elif site is None and method.initialise_shared:
            method.initialise_shared(module, self._model, planned.sites, planned.config)

    def _values(self, given: Given, path: str, module: Adapter) -> dict[str, Tensor]:
        """The trained tensors of one adapter; a copy that tied modules share is stored at the first of them."""
        assert given.state is not None
        assert given.planned is not None
        values = dict(given.state.get(path, {}))
        site = _site(given.planned, path)
        for name, _ in site.parameters if site is not None else ():
            if name not in values:
                first, there = self._first[given.name, path, name]
                if there in given.state.get(first, {}):
                    values[name] = given.state[first][there]
        return values


def _covers(module: Adapter, own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> bool:
    filled = {id(own[name]) for name in values if name in own}
    return {id(t) for t in (*module.parameters(), *module.buffers())} <= filled


def _site(planned: Plan, path: str) -> Site | None:
    return next((s for s in (*planned.sites, *planned.extras) if s.path == path), None)


@dataclass
class Checks:
    """What the base has to be, tensor by tensor, for the adapters to be on the weights that they were trained on."""

    digests: dict[str, list[tuple[Mapping[str, str], Path]]]
    """Name in the model -> digests by dtype, and the adapter that says so."""
    copies: dict[str, list[tuple[Tensor, Path]]]
    """Name in the model -> a copy of the base weight, and the adapter that holds it."""

    def of(self, name: str) -> bool:
        """Whether anything is known of the tensor."""
        return name in self.digests or name in self.copies


def checks_of(model: nn.Module, given: Sequence[Given], names: Names) -> Checks:
    """What the adapters' folders know of their base.

    Raises:
        BaseMismatchError: a folder knows other tensors than the model has.
        CheckpointError: a folder's record is damaged.
    """
    found = Checks({}, {})
    own = dict(model.named_parameters(remove_duplicate=False))
    by_identity: dict[int, list[str]] = {}
    for name, parameter in own.items():
        if ".peftkit." not in f".{name}.":
            by_identity.setdefault(id(parameter), []).append(name)
    provided = names.provided
    for adapter in given:
        assert adapter.planned is not None
        for key, tensor in folder.read_tensors(adapter.path).items():
            if key.endswith(".base_layer.weight"):
                name = key.removeprefix(METADATA_PREFIX).replace(".base_layer.", ".")
                found.copies.setdefault(name, []).append((tensor, adapter.path))
        base = checkpoint.provenance(adapter.path).get("base")
        if base is None:
            continue
        stored = base.get("tensors") if isinstance(base, dict) else None
        if not isinstance(stored, dict) or not all(isinstance(v, dict) for v in stored.values()):
            raise CheckpointError(
                f"{adapter.path / folder.PROVENANCE}: base.tensors is not an object of digests; get the file again"
            )
        expected = base_tensors(model, {}, [s.path for s in adapter.planned.extras])
        held = {n for n in expected if any(o in provided for o in by_identity[id(own[n])])}
        wrong = sorted(set(stored) ^ held)
        if wrong:
            raise BaseMismatchError(
                f"{adapter.path}: the adapter was trained on another base: {len(wrong)} tensors are in one of the two "
                f"only, first {wrong[0]!r}. Give the base that it was trained on ({base.get('class')}), or accept this "
                "one with ignore=('base',), --ignore base"
            )
        coded = [name for name, known in stored.items() if known.get("dtype") == CODES]
        checkpoint.check_start(adapter.planned, coded, adapter.path)
        for name, digests in stored.items():
            found.digests.setdefault(name, []).append((digests, adapter.path))
    return found


def parse(adapters: Any) -> list[Given]:
    """The adapters with their weights: a path, several, or a mapping of paths to weights.

    Raises:
        ConfigError: none, one twice, or a weight that is no finite number other than 0.
        CheckpointError: a path is no adapter folder.
    """
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
    elif isinstance(adapters, str | Path):
        pairs = [(adapters, 1.0)]
    else:
        pairs = [(path, 1.0) for path in adapters]
    if not pairs:
        raise ConfigError("no adapter is given; expected a folder that peftkit.save has written, or several")
    found = []
    for path, weight in pairs:
        usable = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not usable or not (weight != 0 and abs(weight) < float("inf")):
            raise ConfigError(f"the weight of {path} must be a finite number other than 0, found {weight!r}")
        found.append(Given(folder.located(path, "default"), float(weight)))
    if len({g.path.resolve() for g in found}) < len(found):
        raise ConfigError("an adapter is given twice; give it once, with a weight")
    return found
