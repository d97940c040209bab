"""Recipes as YAML files: those of the package by name, and a user's own."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from ..files import replace_file
from ..load import RECIPE
from .recipe import Recipe


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    found = (files("timm_attn") / "recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in found if f.name.endswith(".yaml"))


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML file.

    Args:
        path: A file, or the name of a recipe in the package. ``model_kwargs`` and ``opt_args`` may be
            mappings.

    Raises:
        UserError: The file is missing or is not a YAML mapping, a field is unknown, or a value is of the
            wrong type or out of range.
    """
    if str(path) in recipe_names():
        path = str(files("timm_attn") / "recipes" / f"{path}.yaml")
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe {path} is no file, and not one of {', '.join(recipe_names())}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f"recipe {path} must be a mapping of field to value, got {type(fields).__name__}")
    kinds = {field.name: field.type for field in dataclasses.fields(Recipe)}
    for name, value in fields.items():
        if name not in kinds:
            raise UserError(f"recipe {path}: unknown field {name!r}; the fields are {', '.join(kinds)}")
        if isinstance(value, bool) and bool not in (kinds[name], *get_args(kinds[name])):
            # YAML takes no, off, yes and on for these; Pydantic would take them for 0 and 1.
            raise UserError(
                f"recipe {path}: {name} is no switch, got {str(value).lower()}: put words in quotes"
            )
    try:
        return TypeAdapter(Recipe).validate_python({k: _listed(v, kinds[k]) for k, v in fields.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise UserError(f"recipe {path}: {name} {problem['input']!r}: {problem['msg']}") from None
    except UserError as error:
        raise UserError(f"recipe {path}: {error}") from None


def own_recipe(source: str) -> Recipe | None:
    """The recipe of a run or hub folder; None if the source has none, or one of other software."""
    try:
        return load_recipe(Path(source.removeprefix("local-dir:")) / RECIPE)
    except UserError:
        return None


def _listed(value: Any, kind: Any) -> Any:
    """A field's value as its type has it: lists may be written as one value, ``key=value`` as a mapping."""
    if get_origin(kind) is not tuple or isinstance(value, list):
        return value
    if isinstance(value, dict):
        return [f"{key}={json.dumps(item)}" for key, item in value.items()]
    return [value]


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write all fields of a recipe as YAML."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe).items()}
    replace_file(Path(path), yaml.safe_dump(fields, sort_keys=False).encode())
