"""Recipes as YAML files: those of the package by name, and a user's own."""

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import yaml

from ..errors import UserError
from ..files import replace_file
from .recipe import Recipe


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    found = (files("timm_attn") / "recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in found if f.name.endswith(".yaml"))


def recipe_arguments(path: str | Path) -> list[str]:
    """The fields of a YAML recipe as command-line arguments, so that one parser checks both.

    Args:
        path: A file, or the name of a recipe in the package.

    Raises:
        UserError: The file is missing, is not a YAML mapping, or names an unknown field.
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
    kinds = {f.name: f.type for f in dataclasses.fields(Recipe)}
    arguments = []
    for name, value in fields.items():
        if name not in kinds:
            raise UserError(f"recipe {path}: unknown field {name!r}; the fields are {', '.join(kinds)}")
        flag = str(name).replace("_", "-")
        if kinds[name] is bool:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            arguments += [f"--{flag}", *(f"{key}={json.dumps(item)}" for key, item in value.items())]
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{flag}", *map(str, values)]
    return arguments


def load_recipe(path: str | Path) -> Recipe:
    """A recipe from a YAML file.

    Raises:
        UserError: As ``recipe_arguments``, or a value is out of range.
        SystemExit: A value is of the wrong type; the parser has printed which.
    """
    import tyro  # slow to import, and only commands need it

    return tyro.cli(Recipe, args=recipe_arguments(path), prog=str(path))


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write all fields of a recipe as YAML."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe).items()}
    replace_file(Path(path), yaml.safe_dump(fields, sort_keys=False).encode())
