from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Mapping
from typing import Literal

import pytest

import peftkit
from peftkit.errors import ConfigError
from peftkit.methods import method_of
from peftkit.spec import Config, config

METHOD_NAMES = sorted(peftkit.METHODS)


@config
class Example(Config):
    """A config with one field of every kind that the methods use."""

    size: int = 1
    rate: float = 0.5
    flag: bool = False
    mode: Literal["a", "b"] = "a"
    either: bool | Literal["x"] = True
    names: tuple[str, ...] | str | None = None
    pair: tuple[int, str] | None = None
    by_name: Mapping[str, int] | None = None


@pytest.mark.parametrize(
    ("fields", "expected", "found"),
    [
        ({"size": "8"}, "size must be int", "'8' (str)"),
        ({"size": True}, "size must be int", "True (bool)"),
        ({"size": 8.0}, "size must be int", "8.0 (float)"),
        ({"size": None}, "size must be int", "None (NoneType)"),
        ({"rate": "a"}, "rate must be finite float", "'a' (str)"),
        ({"rate": False}, "rate must be finite float", "False (bool)"),
        ({"rate": float("nan")}, "rate must be finite float", "nan (float)"),
        ({"rate": float("inf")}, "rate must be finite float", "inf (float)"),
        ({"flag": 1}, "flag must be bool", "1 (int)"),
        ({"mode": "c"}, "mode must be 'a' or 'b'", "'c' (str)"),
        ({"either": 1}, "either must be bool or 'x'", "1 (int)"),
        ({"names": ["q", 3]}, "names must be a list of str or str or None", "('q', 3) (tuple)"),
        ({"names": 3}, "names must be a list of str or str or None", "3 (int)"),
        ({"pair": [1, 2]}, "pair must be a list of int or str or None", "(1, 2) (tuple)"),
        ({"pair": [1]}, "pair must be a list of int or str or None", "(1,) (tuple)"),
        ({"by_name": {"q": 1.5}}, "by_name must be a mapping of str to int or None", "{'q': 1.5} (dict)"),
        ({"by_name": {1: 1}}, "by_name must be a mapping of str to int or None", "{1: 1} (dict)"),
        ({"by_name": ["q"]}, "by_name must be a mapping of str to int or None", "('q',) (tuple)"),
    ],
)
def test_config_refuses_value_of_wrong_type(fields, expected, found):
    with pytest.raises(ConfigError) as caught:
        Example(**fields)
    assert str(caught.value) == f"Example: {expected}, found {found}"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"rate": 1}, 1),
        ({"names": ["q", "v"]}, ("q", "v")),
        ({"names": {"v", "q"}}, ("q", "v")),
        ({"names": "all"}, "all"),
        ({"layers_to_transform": range(3)}, (0, 1, 2)),
        ({"layers_to_transform": 2}, 2),
        ({"pair": [1, "a"]}, (1, "a")),
        ({"by_name": {"q": 3}}, {"q": 3}),
        ({"either": "x"}, "x"),
        ({"either": False}, False),
    ],
)
def test_config_takes_value_of_right_type(fields, kept):
    made = Example(**fields)
    (name,) = fields
    assert getattr(made, name) == kept
    assert type(getattr(made, name)) is type(kept)


def test_config_keeps_no_reference_to_a_mapping_that_can_change():
    patterns = {"q": 3}
    made = Example(by_name=patterns)
    patterns["q"] = 9
    assert made.by_name == {"q": 3}


def test_config_error_shortens_a_huge_value():
    with pytest.raises(ConfigError) as caught:
        Example(size="x" * 10_000)
    assert len(str(caught.value)) < 300


def test_config_refuses_positional_arguments():
    with pytest.raises(ConfigError, match=r"LoRA takes keyword arguments only, such as LoRA\(target_modules=\.\.\.\)"):
        peftkit.LoRA(16)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_config_refuses_unknown_field_with_suggestion(name):
    with pytest.raises(ConfigError, match="has no field 'target_module'; did you mean 'target_modules'"):
        peftkit.METHODS[name].config(target_module=["q"])


def test_config_error_is_a_type_error_and_a_value_error():
    with pytest.raises(TypeError):
        peftkit.LoRA(rank=3)
    with pytest.raises(ValueError, match="r must be at least 1"):
        peftkit.LoRA(r=0)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_config_is_frozen_and_survives_copy_pickle_and_json(name):
    made = peftkit.METHODS[name].config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.target_modules = ("q",)
    assert copy.deepcopy(made) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert type(made)(**json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_config_refuses_a_wrong_type_in_every_field(name):
    kind = peftkit.METHODS[name].config
    for field in dataclasses.fields(kind):
        with pytest.raises(ConfigError, match=f"{kind.__name__}: {field.name} must be"):
            kind(**{field.name: object()})


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_config_documents_every_field(name):
    import ast
    import inspect

    kind = peftkit.METHODS[name].config
    body = ast.parse(inspect.getsource(kind)).body[0].body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert documented, f"{kind.__name__}.{statement.target.id} has no docstring"


def test_methods_is_read_only_and_names_agree():
    with pytest.raises(TypeError):
        peftkit.METHODS["mine"] = peftkit.METHODS["lora"]
    assert all(method.name == name for name, method in peftkit.METHODS.items())


def test_method_of_refuses_what_is_no_config():
    with pytest.raises(ConfigError, match=r"expected a configuration such as peftkit\.LoRA\(r=16\), found dict"):
        method_of({"r": 8})
    with pytest.raises(ConfigError, match="found Example"):
        method_of(Example())
