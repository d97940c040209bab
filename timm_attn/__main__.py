"""``python -m timm_attn``: the command line, or a script that sees this package's models.

If the first argument ends in ``.py`` it is run as a script with the models registered, e.g.
``python -m timm_attn validate.py --model resnet50_dia ...`` for timm's own scripts.
"""

import runpy
import sys
from pathlib import Path

from timm_attn.errors import extra


def main() -> None:
    """Run the command line, or say which extra it needs."""
    try:
        with extra("train"):
            from timm_attn.cli import main as command
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    command()


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].endswith(".py"):
        import timm_attn  # noqa: F401 (registers the models)

        del sys.argv[0]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as `python script.py` does
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
