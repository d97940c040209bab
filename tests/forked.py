"""Fresh interpreters for snippets of code, forked from one that has imported PyTorch, which takes seconds.

Imports nothing of this project: what a snippet imports, it imports itself.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torchvision"])


def _run(code: str, arguments: tuple[str, ...], env: dict[str, str], cwd: str, output: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def run_code(
    code: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """``python -c code arguments``; output is captured as text. Paths for imports are this process's."""
    with tempfile.TemporaryDirectory() as output:
        settings = (code, arguments, {**os.environ, **(env or {})}, str(cwd or Path.cwd()), output)
        process = _context.Process(target=_run, args=settings)
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(code, 300)
        stdout, stderr = (Path(output, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(code, process.exitcode, stdout, stderr)
