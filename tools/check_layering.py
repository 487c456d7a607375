#!/usr/bin/env python3
"""Holds the house's two rules about #include (docs/ARCHITECTURE.md): who may see whom, and one door per library.

ROOMS maps a folder or file to its room (the longest prefix wins) and MAY_SEE says which rooms a room may include
besides itself. DOORS says where an outside library's headers may be included. tests/, bench/ and tools/ stand outside
the house and may see every room; the doors hold for tools/ too.

  tools/check_layering.py [--root DIR]     prints one line per breach; exit 1 if there is any
  tools/check_layering.py --self-test      checks the checker
"""

import argparse
import os
import re
import sys

ROOMS = {
    "protocol/": "protocol",
    "libkvshare/include/kvshare/": "core",
    "libkvshare/core/": "core",
    "libkvshare/codec/": "codec",
    "libkvshare/client/": "client",
    "libkvshare/capi/": "capi",
    "kernels/": "kernels",
    "kernels/cpu/": "kernels/cpu",
    "kernels/cuda/": "kernels/cuda",
    "runtime/": "runtime",
    "anchors/": "anchors",
    "agentd/config/": "agentd/config",
    "agentd/pool/": "agentd/pool",
    "agentd/tiers/": "agentd/tiers",
    "agentd/repair/": "agentd/repair",
    "agentd/engine/": "agentd/engine",
    "agentd/": "agentd/service",
    "agentd/service.h": "agentd/interface",
    "agentd/server/": "agentd/server",
    "agentd/program/": "agentd/main",
    "agentd/main.cc": "agentd/main",
    "tools/": "outside",
    "tests/": "outside",
    "bench/": "outside",
}

_LIBRARY = {"core", "kernels", "runtime", "anchors"}
MAY_SEE = {
    "protocol": set(),
    "core": set(),
    "codec": {"protocol", "core"},
    "client": {"protocol", "core", "codec"},
    "capi": {"core"},
    "kernels": {"core"},
    "kernels/cpu": {"core", "kernels"},
    "kernels/cuda": {"core", "kernels"},
    "runtime": {"core", "kernels"},
    "anchors": {"core", "kernels"},
    "agentd/config": {"core"},
    "agentd/pool": _LIBRARY,
    "agentd/tiers": _LIBRARY | {"agentd/pool"},
    # The interface that the engine answers to and that server and in-process client call: it names no room of agentd.
    "agentd/interface": {"core", "runtime"},
    "agentd/repair": _LIBRARY,
    "agentd/engine": _LIBRARY | {"agentd/pool", "agentd/tiers", "agentd/repair", "agentd/interface"},
    "agentd/service": _LIBRARY | {"agentd/pool", "agentd/tiers", "agentd/engine", "agentd/interface"},
    "agentd/server": {"core", "protocol", "codec", "agentd/interface"},
    "agentd/main": {"core", "kernels", "runtime", "agentd/interface", "agentd/server", "agentd/config"},
}

# library: (its headers, the places that may include them). A place is a path prefix.
DOORS = {
    "ZeroMQ": (r"zmq(\.h|\.hpp|_addon\.hpp)$", ("libkvshare/client/", "agentd/server/")),
    "RocksDB": (r"rocksdb/", ("agentd/tiers/",)),
    "CUDA": (r"(cuda|cublas|nvml|nvtx|cooperative_groups|device_launch)", ("kernels/cuda/",)),
    "oneDNN": (r"(oneapi/)?dnnl", ("kernels/cpu/linear",)),
    "OpenMP": (r"omp\.h$", ("kernels/cpu/linear",)),
    "OpenSSL": (r"openssl/", ("libkvshare/core/hash.cc",)),
    "PCRE2": (r"pcre2", ("runtime/pre_tokenizer.cc",)),
    "utf8proc": (r"utf8proc", ("runtime/unicode.cc",)),
    "FlatBuffers": (r"(flatbuffers/|.*_generated\.h$)", ("protocol/", "libkvshare/codec/")),
    "CLI11": (r"CLI/", ("tools/", "agentd/main.cc")),
    "libyaml": (r"yaml\.h$", ("agentd/config/yaml_reader.cc",)),
    "xxHash": (r"xxh", ("agentd/tiers/record.cc",)),
    "zlib": (r"zlib\.h$", ("tools/",)),
}
# Libraries whose own documentation writes their headers in quotes.
QUOTED_LIBRARIES = ("absl/", "benchmark/", "flatbuffers/", "gmock/", "gtest/", "nlohmann/")
SOURCES = (".cc", ".h", ".cu", ".cuh")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]')


def room_of(path):
    """The room of a file, given its path from the root; None when it lies in no room."""
    best = max((prefix for prefix in ROOMS if path.startswith(prefix)), key=len, default=None)
    return None if best is None else ROOMS[best]


def included_path(target):
    """An include as written -> path from the root. Public headers are included as "kvshare/...". """
    return "libkvshare/include/" + target if target.startswith("kvshare/") else target


def check_line(path, room, line):
    match = INCLUDE.match(line)
    if match is None:
        return None
    quoted, target = match.group(1) == '"', match.group(2)
    if room != "outside" or path.startswith("tools/"):
        for library, (pattern, places) in DOORS.items():
            if re.match(pattern, target) and not path.startswith(places):
                return f"{library} has one door, {' and '.join(places)}; this file includes {target}"
    is_header = path.endswith((".h", ".cuh"))
    if target.startswith("absl/") and is_header:
        return f"Abseil stays inside .cc files; this header includes {target}"
    if target.startswith("nlohmann/") and path.startswith("libkvshare/include/"):
        return f"a public header includes {target}"
    if not quoted or target.startswith(QUOTED_LIBRARIES):
        return None
    seen = room_of(included_path(target))
    if seen is None:
        return f'"{target}" is not a path from the root of the repository'
    if room == "outside" or seen == room or seen in MAY_SEE[room]:
        return None
    if seen == "outside":
        return f"{room} includes {target}, which is not part of the product"
    return f"{room} may not see {seen} ({target})"


def check_file(path, text):
    """[(line number, what is wrong)] of one source file; `path` counts from the root."""
    room = room_of(path)
    if room is None:
        return [(1, "lies in no room that this check knows (ROOMS)")]
    found = ((number, check_line(path, room, line)) for number, line in enumerate(text.splitlines(), 1))
    return [(number, what) for number, what in found if what is not None]


def source_files(root):
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("build", "models"))
        for name in sorted(files):
            if name.endswith(SOURCES):
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def self_test():
    cases = [  # path, line, a word of the finding or None
        ("runtime/a.cc", '#include "kernels/backend.h"', None),
        ("runtime/a.cc", '#include "kvshare/status.h"', None),
        ("runtime/a.cc", '#include "libkvshare/core/hash.h"', None),
        ("runtime/a.cc", '#include "anchors/selector.h"', "may not see anchors"),
        ("anchors/a.h", '#include "runtime/model.h"', "may not see runtime"),
        ("kernels/a.h", '#include "runtime/model.h"', "may not see runtime"),
        ("kernels/backend.h", '#include "kernels/cpu/pool.h"', "may not see kernels/cpu"),
        ("kernels/cpu/a.cc", '#include "kernels/backend.h"', None),
        ("kernels/cpu/a.cc", '#include "kernels/cuda/a.h"', "may not see kernels/cuda"),
        ("runtime/a.cc", '#include "kernels/cpu/pool.h"', "may not see kernels/cpu"),
        ("libkvshare/core/a.h", '#include "libkvshare/codec/codec.h"', "may not see codec"),
        ("libkvshare/codec/a.cc", '#include "protocol/limits.h"', None),
        ("libkvshare/client/a.cc", '#include "agentd/service.h"', "may not see agentd/interface"),
        ("protocol/a.h", '#include "kvshare/status.h"', "may not see core"),
        ("agentd/pool/a.cc", '#include "agentd/engine/engine.h"', "may not see agentd/engine"),
        ("agentd/engine/a.cc", '#include "agentd/pool/kv_pool.h"', None),
        ("agentd/engine/a.cc", '#include "agentd/server/router_server.h"', "may not see agentd/server"),
        ("agentd/service.cc", '#include "agentd/engine/engine.h"', None),
        ("agentd/service.h", '#include "agentd/engine/engine.h"', "may not see agentd/engine"),
        ("agentd/engine/a.cc", '#include "agentd/service.h"', None),
        ("agentd/engine/a.cc", '#include "agentd/in_process_client.h"', "may not see agentd/service"),
        ("agentd/pool/a.cc", '#include "agentd/service.h"', "may not see agentd/interface"),
        ("agentd/server/a.cc", '#include "agentd/service.h"', None),
        ("agentd/server/a.cc", '#include "agentd/engine/engine.h"', "may not see agentd/engine"),
        ("agentd/server/a.cc", '#include "libkvshare/codec/codec.h"', None),
        ("agentd/engine/a.cc", '#include "libkvshare/codec/codec.h"', "may not see codec"),
        ("agentd/main.cc", '#include "agentd/server/router_server.h"', None),
        ("agentd/program/a.cc", '#include "agentd/server/router_server.h"', None),
        ("agentd/engine/a.cc", '#include "agentd/program/exit_code.h"', "may not see agentd/main"),
        ("agentd/engine/a.cc", '#include "tests/testing/tiny_model.h"', "not part of the product"),
        ("agentd/engine/a.cc", '#include "planner.h"', "not a path from the root"),
        ("tests/runtime/a_test.cc", '#include "kernels/cpu/pool.h"', None),
        ("tests/runtime/a_test.cc", '#include "gtest/gtest.h"', None),
        ("tests/agentd/a_test.cc", "#include <zmq.h>", None),
        ("libkvshare/client/a.cc", "#include <zmq.hpp>", None),
        ("agentd/engine/a.cc", "#include <zmq.h>", "ZeroMQ"),
        ("agentd/pool/a.cc", "#include <rocksdb/db.h>", "RocksDB"),
        ("kernels/cpu/linear_dnnl.cc", "#include <dnnl.hpp>", None),
        ("kernels/cpu/linear.cc", "#include <omp.h>", None),
        ("kernels/cpu/attention.cc", "#include <oneapi/dnnl/dnnl.hpp>", "oneDNN"),
        ("kernels/cpu/attention.cc", "#include <omp.h>", "OpenMP"),
        ("kernels/cpu/a.cc", "#include <cuda_runtime.h>", "CUDA"),
        ("libkvshare/core/hash.cc", "#include <openssl/evp.h>", None),
        ("libkvshare/core/hash.h", "#include <openssl/evp.h>", "OpenSSL"),
        ("runtime/tokenizer.cc", "#include <pcre2.h>", "PCRE2"),
        ("agentd/server/a.cc", "#include <flatbuffers/flatbuffers.h>", "FlatBuffers"),
        ("agentd/server/a.cc", '#include "protocol/kvshare_generated.h"', "FlatBuffers"),
        ("tools/kvctl/a.cc", "#include <CLI/CLI.hpp>", None),
        ("tools/kvctl/a.cc", "#include <zmq.h>", "ZeroMQ"),
        ("agentd/service.cc", "#include <CLI/CLI.hpp>", "CLI11"),
        ("agentd/config/yaml_reader.cc", "#include <yaml.h>", None),
        ("agentd/main.cc", "#include <yaml.h>", "libyaml"),
        ("agentd/main.cc", '#include "agentd/config/config.h"', None),
        ("agentd/engine/a.cc", '#include "agentd/config/config.h"', "may not see agentd/config"),
        ("runtime/a.cc", "#include <zlib.h>", "zlib"),
        ("runtime/a.h", "#include <absl/container/flat_hash_map.h>", "Abseil"),
        ("runtime/a.cc", "#include <absl/container/flat_hash_map.h>", None),
        ("libkvshare/include/kvshare/a.h", "#include <nlohmann/json.hpp>", "public header"),
        ("runtime/a.cc", "  #  include <vector>", None),
        ("attic/a.cc", "#include <vector>", "no room"),
    ]
    failed = 0
    for path, line, word in cases:
        found = [what for _, what in check_file(path, line)]
        if (word is None) != (not found) or (word is not None and word not in found[0]):
            failed += 1
            print(f"self-test: {path}: {line}: expected {word!r}, found {found}")
    print(f"{len(cases) - failed} passed, {failed} failed")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    if args.self_test:
        return 1 if self_test() else 0
    files, breaches = list(source_files(args.root)), 0
    for path in files:
        with open(os.path.join(args.root, path), encoding="utf-8") as f:
            for number, what in check_file(path, f.read()):
                breaches += 1
                print(f"{path}:{number}: {what}")
    print(f"check_layering: {len(files)} files, {breaches} breaches")
    return 1 if breaches or not files else 0


if __name__ == "__main__":
    sys.exit(main())
