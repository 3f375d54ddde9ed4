"""What a command costs: seconds from its start to its end, and its peak of resident memory, children included.

    cost_of.py SECONDS COMMAND…

Linux counts what a process held before it became the command, which a large process leaves to those that it starts; so
this small one starts it. The command is stopped after SECONDS; what it says goes to standard error. Prints one line of
JSON: `seconds`, `cpu_seconds` (of all threads), `peak_mb` (10^6 bytes) and `code`, 124 for a command that was stopped.
"""

import json
import os
import subprocess
import sys
import time

started = time.perf_counter()
process = subprocess.Popen(["timeout", *sys.argv[1:]], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
seconds = time.perf_counter() - started
found = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6}
print(json.dumps(found | {"code": process.returncode}))
