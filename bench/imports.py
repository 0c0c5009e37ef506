"""What `import erq` and its parts cost a new process: `python bench/imports.py`.

Medians over fresh processes, with the files in the page cache; torch's own import stands apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

PROGRAM = """
import json, sys, time
times = {}
for name in ("torch", "erq", "erq.deployment.checkpoint", "erq.pipeline"):
    start = time.perf_counter()
    __import__(name)
    times[name] = time.perf_counter() - start
heavy = ("timm", "torchvision", "triton", "matplotlib")
print(json.dumps({"seconds": times, "loaded": [name for name in heavy if name in sys.modules]}))
"""


def main() -> None:
    """Print a line of JSON: seconds of each import behind those before it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    found = []
    for _ in range(runs + 1):  # the first one fills the page cache
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout))
    seconds = {n: median(f["seconds"][n] for f in found[1:]) for n in found[0]["seconds"]}
    print(json.dumps({"runs": runs, "seconds": seconds, "loaded": found[-1]["loaded"]}))


if __name__ == "__main__":
    main()
