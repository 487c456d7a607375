#!/usr/bin/env python3
"""No CUDA kernel keeps in memory what its registers should hold: reads what ptxas reported when it was built.

A spill in the attention kernel costs more than any of its tuning gains, and nothing but this report shows it where
there is no GPU. Usage: spills_test.py REPORT KERNEL...: every named kernel (a part of its mangled name, * for anything)
must be in the report, so that an empty or foreign report fails.
"""

import fnmatch
import re
import sys

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def kernels(report):
    """(mangled name, architecture, spilt bytes) of each kernel."""
    found, current = [], None
    for line in report.splitlines():
        entry, spills = ENTRY.search(line), SPILLS.search(line)
        if entry:
            current = entry.groups()
        elif spills and current:
            found.append((*current, int(spills[2]) + int(spills[3])))
            current = None
    return found


def main():
    with open(sys.argv[1], encoding="utf-8") as f:
        found = kernels(f.read())
    failures = [f"{name} for {arch}: {spilt} bytes spilt" for name, arch, spilt in found if spilt > 0]
    failures += [f"the report knows no kernel {wanted}" for wanted in sys.argv[2:]
                 if not any(fnmatch.fnmatchcase(name, f"*{wanted}*") for name, _, _ in found)]
    print("\n".join(failures + [f"{len(found)} kernels of {len({arch for _, arch, _ in found})} architectures"]))
    return 1 if failures or not found else 0


if __name__ == "__main__":
    sys.exit(main())
