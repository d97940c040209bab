"""Fresh interpreters for snippets of code, forked from one that has imported PyTorch and timm, for seconds.

Imports nothing of this project: what a snippet imports, it imports itself.
"""

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision", "timm"])


def _run(code: str, arguments: tuple[str, ...], env: dict[str, str], cwd: str, output: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    # Imported with timm, when it read the environment of the process that forks.
    hub = importlib.import_module("huggingface_hub.hf_api")
    hub.api.endpoint = importlib.reload(hub.constants).ENDPOINT
    os.chdir(cwd)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Started:
    """A process; ``result`` when it has ended, with its output as text."""

    pid: int
    result: subprocess.CompletedProcess


@contextlib.contextmanager
def started(
    code: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Started]:
    """``python -c code arguments``, and what is done meanwhile. Paths for imports are this process's."""
    found = Started()
    with tempfile.TemporaryDirectory() as output:
        settings = (code, arguments, {**os.environ, **(env or {})}, str(cwd or Path.cwd()), output)
        process = _context.Process(target=_run, args=settings)
        process.start()
        found.pid = process.pid or 0
        try:
            yield found
            process.join(300)
        finally:
            if process.exitcode is None:
                process.kill()
        if process.exitcode is None:
            raise subprocess.TimeoutExpired(code, 300)
        stdout, stderr = (Path(output, name).read_text() for name in ("stdout", "stderr"))
    found.result = subprocess.CompletedProcess(code, process.exitcode, stdout, stderr)


def run_code(
    code: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """``python -c code arguments``; output is captured as text. Paths for imports are this process's."""
    with started(code, *arguments, env=env, cwd=cwd) as process:
        pass
    return process.result
