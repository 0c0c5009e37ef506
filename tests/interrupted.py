"""The command `erq`, hit by something at a given moment: what the tests of failing runs start.

python tests/interrupted.py ACTION FUNCTION CALL RANK [ERQ ARGUMENTS…]

ACTION (kill: SIGKILL, raise: a ValueError, hang: an hour of sleep) happens when the process of that
rank calls FUNCTION, as module:name, for the CALL-th time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from importlib import import_module
from typing import Any

from erq import cli


def act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise ValueError("an image of this rank alone is damaged")
    time.sleep(3600)


def arm(action: str, name: str, call: int) -> None:
    """Let `action` happen at the given call of the function `name`."""
    module, _, rest = name.partition(":")
    *owners, leaf = rest.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, leaf), 0

    def hit(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act(action)
        return original(*args, **kwargs)

    setattr(owner, leaf, hit)


if __name__ == "__main__":
    action, function, call, rank, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        arm(action, function, int(call))
    sys.argv = ["erq", *arguments]
    cli.main()
