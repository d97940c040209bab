"""The command ``timm-attn``."""

import errno
import io
import os
import re
import sys
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape

from ..compare import FoldError
from ..errors import UserError
from ..training import Recipe
from ..training.recipe_file import load_recipe
from ..weights import WeightsError
from . import deploy, doctor, hub, look, train  # noqa: F401 (the commands, in the order of the help)
from .console import Stopped, app


def _home_expanded(argument: str) -> str:
    """An argument with the home folder for ~ where shells leave it: --out=~/a, local-dir:~/a."""
    found = re.fullmatch(r"(--[\w-]+=|)((?:[\w-]+:)*)(~(?:/.*)?)", argument, re.DOTALL)
    return found[1] + found[2] + os.path.expanduser(found[3]) if found else argument


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; wrong input ends with one message and exit status 2."""
    arguments = [_home_expanded(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every encoding has a Δ
            stream.reconfigure(errors="replace")
    try:
        arguments, recipe = _take_recipe(arguments)
        app.command(name="train")(partial(train.train, options=recipe))
        app.cli(prog="timm-attn", args=arguments, sort_subcommands=False)
    except Stopped as reason:
        _complain("", str(reason))
        sys.exit(130)  # what a shell expects after Ctrl-C
    except (UserError, WeightsError, FoldError) as error:
        _complain("error: ", str(error))
        sys.exit(2)
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and arguments[:1] == ["train"]
        hint = ": make room on the disk, then resume with `timm-attn train --resume RUN`" if full else ""
        _complain("error: ", f"{error}{hint}")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "can't allocate memory" not in str(error):  # PyTorch's, on CPUs
            raise
        detail = str(error).partition("\n")[0]
        _complain("error: ", f"out of memory ({detail}): lower --batch-size or raise --accumulation")
        sys.exit(2)


def _complain(kind: str, message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]{kind}[/]{escape(message)}")


def _take_recipe(arguments: list[str]) -> tuple[list[str], Recipe]:
    """The arguments of ``train`` without ``--recipe FILE``, and the recipe that the others override."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--recipe=") else [a])]
    if arguments[:1] != ["train"] or "--recipe" not in arguments[:-1]:
        return arguments, Recipe()
    at = arguments.index("--recipe")
    return arguments[:at] + arguments[at + 2 :], load_recipe(arguments[at + 1])
