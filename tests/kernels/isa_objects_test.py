#!/usr/bin/env python3
"""Files compiled for one instruction set hand the linker nothing but their one function.

An inline or template function compiled with AVX-512 flags is a weak symbol that the linker may pick for every caller:
a machine without AVX-512 would then die in, say, std::string. Usage: isa_objects_test.py NM OBJECT...
"""

import re
import subprocess
import sys

ISA_OBJECT = re.compile(r"_(avx512bf16|avx512|avx2)\.cc\.o(bj)?$")
# Defined symbols that other files can see: everything that is neither local (lower case) nor undefined (U, w, v).
SHARED = re.compile(r"^[0-9a-f]* ([A-TV-Zu]) (.*)$")


def shared_symbols(nm, path):
    lines = subprocess.run([nm, "-C", path], check=True, capture_output=True, text=True).stdout.splitlines()
    return [match.groups() for match in map(SHARED.match, lines) if match]


def main():
    nm, *objects = sys.argv[1:]
    objects = [path for path in objects if ISA_OBJECT.search(path)]
    if not objects:
        print("no object is compiled for one instruction set: nothing was tested")
        return 1
    breaches = 0
    for path in objects:
        for kind, name in shared_symbols(nm, path):
            if kind != "T" or not name.startswith("kvshare::kernels::"):
                print(f"{path}: shares {name} ({kind})")
                breaches += 1
    return min(breaches, 1)


if __name__ == "__main__":
    sys.exit(main())
