"""Write cards, ``.eval_results``, results.csv and the README's tables anew from hub/.

python scripts/render_hub.py            # write
python scripts/render_hub.py --check    # exit 1 if one of them differs
"""

import argparse
import shutil
import sys
from pathlib import Path

from readme_tables import DOCUMENTS, tables

from timm_attn.publish.render import render

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hub", type=Path, default=ROOT / "hub")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    changed = render(arguments.hub, DOCUMENTS, write=not arguments.check, tables=tables())
    for name in ("zoo.png", "bench_infer.png", "tiny_differences.png"):  # a page shows what lies beside it
        source, copy = ROOT / "hub" / "results" / name, ROOT / "docs" / "gallery" / name
        if not copy.is_file() or source.read_bytes() != copy.read_bytes():
            changed.append(copy)
            if not arguments.check:
                shutil.copyfile(source, copy)
    print("\n".join(map(str, changed)) or "nothing differs from the index")
    sys.exit(bool(changed) and arguments.check)


if __name__ == "__main__":
    main()
