#!/usr/bin/env bash
# Several hosts under torchrun: the same line on every host, in any order.
#
#   launch/nodes.sh HEAD[:PORT] NODES WORKERS run.name=NAME [overrides ...]
#   launch/nodes.sh node-1 4 8 run.name=big model=olmoe_1b7b         four hosts, eight workers each
#   launch/nodes.sh node-1 2:4 8 run.name=big model=olmoe_1b7b       elastic: goes on with three or two of them
#
# HEAD is a name or an address of one of the hosts; its rendezvous is what the others look for. Workers that die are
# started again from the newest snapshot, here and on every other host.
set -euo pipefail

if (($# < 4)) || [[ " $* " != *" run.name="* ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
head=$1 nodes=$2 workers=$3
shift 3
host=${head%:*} port=29400
if [[ $head == *:* ]]; then port=${head##*:}; fi
name=$(printf '%s\n' "$@" | sed -n 's/^run\.name=//p' | tail -n 1)
bin=""
here=$(cd "$(dirname "$0")/.." && pwd)
if [[ -x "$here/.venv/bin/torchrun" ]]; then bin="$here/.venv/bin/"; fi

# The address of this host on the way to the head; the head itself finds the head's, or where its name is one of the
# loopback's (127.0.1.1, as Debian has it), that of the way out.
read -r local_address head_address < <("${bin}python" - "$host" <<'PYTHON'
import contextlib, socket, sys
head = socket.gethostbyname(sys.argv[1])
to = "192.0.2.1" if head.startswith("127.") else head  # no packet is sent
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
    with contextlib.suppress(OSError):  # no way out: this host alone
        way.connect((to, 9))
    own = way.getsockname()[0].replace("0.0.0.0", "127.0.0.1")
    print(own, own if head.startswith("127.") else head)
PYTHON
)
is_head=0
if [[ $local_address == "$head_address" ]]; then is_head=1; fi

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else every other restart waits for a store that is gone
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + workers - 1) / workers))}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:glibc.malloc.arena_max=1:glibc.malloc.top_pad=67108864}

exec "${bin}torchrun" --nnodes "$nodes" --nproc-per-node "$workers" --max-restarts 20 --local-addr "$local_address" \
  --rdzv-id "$name" --rdzv-backend c10d --rdzv-endpoint "$head_address:$port" --rdzv-conf "is_host=$is_head" \
  -m moetrain train "$@"
