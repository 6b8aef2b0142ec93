"""Train over two hosts that this machine makes up, with a link of limited rate between them. Needs root.

example:
  python scripts/two_hosts.py 100mbit experiment=trouble_slow_link run.name=slow     two workers on each host
"""

import os
import signal
import sys

from moetrain.bench.namespaces import Hosts
from moetrain.config import ConfigError
from moetrain.launch.worker import report_bad_input

PER_HOST = 2


def main(arguments: list[str]) -> int:
    """`arguments`: the rate as `tc` writes it, then overrides of `moetrain train`. Returns the exit code."""
    if not arguments or "=" in arguments[0]:
        print(__doc__)
        return 2
    rate, *overrides = arguments
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # hosts are taken down on the way out
    try:
        with Hosts(rate) as hosts:
            codes = [worker.wait() for worker in hosts.start_ranks(["train", *overrides], PER_HOST)]
    except ConfigError as error:
        return report_bad_input(error)
    return max(codes, key=abs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
