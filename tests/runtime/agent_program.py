"""What torchrun is to its ranks, for test_lifetime.py: starts two, and signals the other when one has ended."""

import os
import signal
import subprocess
import sys
import time

program, folder = sys.argv[1:]
environment = os.environ | {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2"}
ranks = [
    subprocess.Popen(
        [sys.executable, program, "wait", f"{folder}/rank-{rank}"], env=environment, start_new_session=True
    )
    for rank in range(2)
]
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.02)
for rank in ranks:
    if rank.poll() is None:
        os.killpg(rank.pid, signal.SIGTERM)
        rank.wait()
