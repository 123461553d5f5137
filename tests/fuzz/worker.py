"""The process that checks hostile folders, with limited memory and CPU time: `python -m tests.fuzz.worker`.

It reads [KIND, PATH] in each line, and writes one JSON document a line: {} when it is ready, then {"error": TEXT} for a
folder that was refused in one line, {} for one that was accepted, and {"bug": TRACEBACK} for everything else.
"""

import json
import logging
import os
import resource
import signal
import sys
import traceback
from pathlib import Path

MAX_MEMORY_BYTES = 3 * 2**29  # more than the program takes before
MAX_CPU_SECONDS = 20


def main() -> None:
    """Check folders until the input ends."""
    from gpt2.errors import MAX_MESSAGE_CHARACTERS, UserError
    from tests.fuzz.checks import CHECKS

    logging.disable()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MAX_MEMORY_BYTES, -1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)  # ends the process
        answer: dict[str, str] = {}
        try:
            kind, path = json.loads(line)
            CHECKS[kind](Path(path))
        except UserError as error:
            answer = {"error": str(error)}
            if not str(error) or "\n" in str(error) or len(str(error)) > MAX_MESSAGE_CHARACTERS:
                answer = {"bug": f"the message is not one line: {error!r:.500}"}
        except BaseException:  # a panic of a Rust library is no Exception
            answer = {"bug": traceback.format_exc()[-2000:]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
