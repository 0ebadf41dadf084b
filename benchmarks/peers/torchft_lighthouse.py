"""torchft's lighthouse, which knows who is there, as a process of its own: it logs several lines a step.

python benchmarks/peers/torchft_lighthouse.py PORT JOIN_TIMEOUT_MS
"""

from __future__ import annotations

import signal
import sys

from torchft.coordination import LighthouseServer

if __name__ == "__main__":
    server = LighthouseServer(bind=f"127.0.0.1:{sys.argv[1]}", min_replicas=1, join_timeout_ms=int(sys.argv[2]))
    signal.pause()
