"""Every block of README and docs runs; every command in them is one; README is short."""

import functools
import re
import shlex

import pytest
import tyro
from forked import run_code
from helpers import ROOT

from timm_attn import cli
from timm_attn.cli.console import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Pages whose blocks another test runs.
ELSEWHERE = {"attach.md"}  # tests/test_backbones.py


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, block)
        for page in PAGES
        if language != "python" or page.name not in ELSEWHERE
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]


NO_NETWORK = """
import socket


def refuse(*arguments, **options):
    raise OSError("there is no network")


socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


def test_the_blocks_run_in_a_process_of_their_own():
    """Each with its own names, without network."""
    found = blocks("python")
    assert len(found) >= 10
    code = NO_NETWORK + "".join(
        f"exec(compile({block!r}, {name!r}, 'exec'), {{}})\n" for name, block in found
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr[-3000:]


def commands() -> list[str]:
    lines = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        text = re.sub(r"```python\n.*?```", "", text, flags=re.DOTALL)
        lines += re.findall(r"^(?:    )?(timm-attn [^\n]*)", text, re.MULTILINE)
        lines += re.findall(r"`(timm-attn [a-z]+ [^`\n]*)`", text)
    lines = [line.split("  #")[0].strip() for line in lines if "--help" not in line]
    return list(dict.fromkeys(lines))


@pytest.mark.parametrize("line", commands())
def test_the_commands_are_taken(line, monkeypatch):
    """Each is parsed as it stands; what it would do is not done."""
    called = []

    def stub(function):
        @functools.wraps(function)
        def stands_in(*args, **kwargs):
            called.append(function.__name__)

        return stands_in

    stubbed = tyro.extras.SubcommandApp()
    for name, command in app._subcommands.items():
        stubbed.command(stub(command.target), name=name)
    monkeypatch.setattr(cli, "app", stubbed)
    monkeypatch.setattr(cli.train, "train", stub(cli.train.train))  # which main() puts into the app anew
    words = [word for word in shlex.split(line)[1:] if word not in ("[MODEL", "...]")]
    words = ["stripes" if word == "WHAT" else word for word in words]
    cli.main(words)
    assert len(called) == 1


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    here = "https://github.com/timm-attn/timm_attn/blob/main/"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = target.partition("#")
        if target.startswith(here):
            assert (ROOT / target.removeprefix(here)).exists(), target
        elif not target.startswith("http"):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
