"""``afresh-train VERB``, or ``python -m train VERB``."""

from __future__ import annotations

import atexit
import os
import sys

from train.cli import main
from train.stopping import listen


def end(code: int) -> None:
    """End this process with a code; one of several without taking the interpreter apart.

    The threads of a process group outlive it (torch keeps it for DDP and FSDP after it was destroyed). One that lets go
    of a tensor while the interpreter is taken apart is ended in the midst of C++, and the process with it by SIGABRT.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "torch.distributed" in sys.modules:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def script() -> None:
    """Run this process's command line, and end with its exit code."""
    if sys.argv[1:2] == ["finetune"]:
        listen()
    end(main())


if __name__ == "__main__":
    script()
