"""The base model of an adapter folder: its modules without weights, and its weights one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from peftkit import backbones, folder
from peftkit.errors import ExportError
from peftkit.spec import METADATA_PREFIX

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
IN_MEMORY = "load the model in Python, peftkit.load the adapter into it, and export from the model"

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def skeleton(
    name: str, fields: Mapping[str, Any], origin: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The model that the adapter was trained on, on the meta device.

    Its class is the one that the adapter's folder names (by provenance, auto_mapping or task_type), else the one that
    the base's own config names.

    Args:
        name: folder with config.json, or a name on the hub.
        fields: of adapter_config.json.
        origin: of peftkit.json.
        tensors: of the adapter, which say how many classes a head has.

    Raises:
        ExportError: the config cannot be read, or transformers has no such model. No code of a checkpoint is run.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"cannot read the config of the base model {name!r}: expected a folder with a transformers config.json or "
            f"a name on the hub; {_first_line(error)}. Give another with --base, or base=... in Python"
        ) from None
    labels = _labels(tensors)
    if labels:
        config.num_labels = labels
    try:
        with torch.device("meta"):
            return _builder(config, fields, origin)(config)  # type: ignore[no-any-return]  # transformers is untyped
    except (ValueError, KeyError) as error:
        raise ExportError(
            f"transformers cannot build the {config.model_type} model that the adapter was trained on: "
            f"{_first_line(error)}. Instead {IN_MEMORY}"
        ) from None


def _builder(config: Any, fields: Mapping[str, Any], origin: Mapping[str, Any]) -> Any:
    import transformers

    mapping = fields.get("auto_mapping")
    names = [
        str(origin.get("base", {}).get("class") or "").partition(" ")[0],
        str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else "",
    ]
    task = fields.get("task_type")
    auto = _AUTO_CLASSES.get(task) if isinstance(task, str) else None
    if auto is None:
        names += list(getattr(config, "architectures", None) or ())
    for name in names:
        found = getattr(transformers, name, None) if name else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return getattr(transformers, auto or "AutoModel").from_config


def _labels(tensors: Mapping[str, Tensor]) -> int | None:
    """Classes of a head that was trained whole; None without one."""
    heads = [
        tensor.shape[0]
        for key, tensor in tensors.items()
        for path in [key.removeprefix(METADATA_PREFIX)]
        if path.split(".")[0] in backbones.HEAD_NAMES and path.endswith(".weight") and ".lora_" not in path
    ]
    return min(heads, default=None)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _opened(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return read(file)
    except Exception as error:  # the reader raises whatever its header parser meets
        raise ExportError(f"{path} is not a complete safetensors file ({error}); get the file again") from None


class BaseFolder:
    """The weights of a base model, read from its safetensors files by the names that the modules have."""

    def __init__(self, place: str, model: nn.Module) -> None:
        self.place = place
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self._aliases = {n: names for names in backbones.tied(model).values() for n in names}
        self._files: dict[str, Path] | None = None

    def read(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of a parameter.

        Raises:
            ExportError: the folder holds no safetensors, no tensor of that name, or one of another shape or kind.
        """
        files = self._indexed()
        stored = next((n for n in self._candidates(key) if n in files), None)
        if stored is None:
            raise ExportError(
                f"{self.place} holds no tensor {key!r}: the checkpoint names or fuses its weights otherwise than the "
                f"model does. Instead {IN_MEMORY}"
            )
        tensor: Tensor = _opened(files[stored], lambda file: file.get_tensor(stored))
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ExportError(
                f"{self.place}: {stored} is {tuple(tensor.shape)} of {tensor.dtype}, expected {shape} of a "
                f"floating-point dtype. Instead {IN_MEMORY}"
            )
        return tensor

    def _candidates(self, key: str) -> list[str]:
        """Names under which a checkpoint may hold a parameter: with or without the prefix of its base model."""
        found = []
        for name in (key, *(n for n in self._aliases.get(key, ()) if n != key)):
            found += [name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]
        return found

    def _indexed(self) -> dict[str, Path]:
        """The file of each tensor.

        Raises:
            ExportError: there are no safetensors files.
        """
        if self._files is None:
            index = self._file(INDEX)
            if index is not None:
                held = folder.read_json(index).get("weight_map")
                names = {str(k): str(v) for k, v in held.items()} if isinstance(held, dict) else {}
                paths = {name: self._file(name) for name in set(names.values())}
                self._files = {k: path for k, v in names.items() if (path := paths[v]) is not None}
            else:
                single = self._file(WEIGHTS)
                if single is None:
                    raise ExportError(
                        f"{self.place} holds no {WEIGHTS} or {INDEX}, and the base weights are needed. Give a base "
                        f"with safetensors files (--base, or base=... in Python), or {IN_MEMORY}"
                    )
                self._files = dict.fromkeys(_opened(single, lambda file: list(file.keys())), single)
        return self._files

    def _file(self, name: str) -> Path | None:
        """The path of a file of the base, downloaded if the base is a name on the hub; None where there is none."""
        local = Path(self.place)
        if local.is_dir():
            return local / name if (local / name).is_file() else None
        from transformers.utils import cached_file

        found = cached_file(
            self.place,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None
