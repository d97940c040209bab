#!/bin/sh
# All of the CIFAR-10 zoo from nothing: seven networks, seeds 0, 1 and 2, the weights under hub/, cards, tables and the
# picture. On two CPU cores this takes some thirty hours; stopped, it goes on where it was.
#
#     scripts/reproduce_cifar10.sh [DATA]     # a Hub id (default) or a folder of parquet files
set -eu
cd "$(dirname "$0")/.."
data=${1:-uoft-cs/cifar10}
make .venv.ok
.venv/bin/python scripts/train_zoo.py --data "$data"
.venv/bin/python scripts/export_zoo.py --data "$data" --dataset uoft-cs/cifar10 --tag cpu_c10
