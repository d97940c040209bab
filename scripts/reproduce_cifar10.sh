#!/bin/sh
# All of the CIFAR-10 zoo from nothing: seven networks, seeds 0, 1 and 2, and of these the weights with their folded
# forms, cards, index, tables and picture, in a folder laid out as hub/. On two CPU cores this takes half a day to a
# day; stopped, it goes on where it was.
#
#     scripts/reproduce_cifar10.sh [DATA] [OUT]
#
# DATA is a Hub id (uoft-cs/cifar10) or a folder of parquet files, OUT a folder (runs/reproduced of the checkout).
set -eu
usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; }
case ${1:-} in
-h | --help) usage && exit 0 ;;
-*) usage && exit 2 ;;
esac
data=${1:-uoft-cs/cifar10}
if [ -d "$data" ]; then data=$(cd "$data" && pwd); fi
case ${2:-} in
'') ;;
/*) out=$2 ;;
*) out=$PWD/$2 ;;
esac
cd "$(dirname "$0")/.."
out=${out:-runs/reproduced}
make .venv.ok
.venv/bin/python scripts/train_zoo.py --data "$data" --runs "$out/runs" --results "$out/hub/results/zoo" || {
    status=$?
    [ $status -eq 1 ] || exit $status # 1: a run broke off, the others are exported
}
.venv/bin/python scripts/export_zoo.py --data "$data" --dataset uoft-cs/cifar10 --tag cpu_c10 \
    --runs "$out/hub/results/zoo" --hub "$out/hub"
