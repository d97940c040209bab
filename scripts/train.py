"""``timm-attn train`` for ``accelerate launch scripts/train.py MODEL --data DATA ...``."""

import sys

from timm_attn.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
