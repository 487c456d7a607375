#!/usr/bin/env python3
"""Holds the house's habits that a compiler does not: form of the code, room cards, names in the documentation.

Checks of one file:
  form        clang-format 14 leaves every C++ file as it is (skipped, saying so, where that version is absent)
  words       no FIXME, XXX, HACK; a TODO names its issue
  lines       120 columns; files over 500 lines are mentioned, over 700 refused
  headers     #pragma once (a C header: the guard that standard C knows); a .cc file includes its own header first
  tests       no sleeping: a test waits for an event, never for time
  paths       no absolute path of one machine, no package-registry host
Checks of the tree:
  cmake       every .cc and .fbs file is listed in a CMakeLists.txt
  cards       every code file is named by a room card: the README.md of its folder, or else of the next one above
  names       links, docs/*.md and file names that documentation mentions exist

  tools/tidy.py [--root DIR]   prints one line per finding; exit 1 if there is any
  tools/tidy.py --self-test    checks the checker
"""

import argparse
import fnmatch
import os
import posixpath
import re
import shutil
import subprocess
import sys

CODE = (".cc", ".h", ".cu", ".cuh", ".fbs", ".py", ".sh")
CPP = (".cc", ".h", ".cu", ".cuh")
TEXT = CODE + (".cmake", ".md", "CMakeLists.txt", "quickstart", "run_tests", ".ci/run")
COLUMNS, LONG_FILE, TOO_LONG_FILE = 120, 500, 700
FORMAT_VERSION = 14
SELF = "tools/tidy.py"  # holds the words that it looks for

BANNED = re.compile(r"\b(FIXME|XXX|HACK)\b|\bTODO\b(?!\(issue \d+\):)")
SLEEP = re.compile(r"\b(sleep_for|sleep_until|usleep|nanosleep|time\.sleep)\b")
MACHINE_PATH = re.compile(r"(?<![\w/.}])/(work|root|tmp|home/\w+|Users/\w+)/")
# In pieces, so that this file does not name what it forbids.
REGISTRY_HOSTS = (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", ""), ("crates", "io"), ("deb", "debian", "org"),
                  ("archive", "ubuntu", "com"))
REGISTRY = re.compile("|".join(re.escape(".".join(host)) for host in REGISTRY_HOSTS))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
C_GUARD = re.compile(r'^#ifndef (\w+_H_)\n#define \1\n(?=.*^extern "C" \{$)', re.MULTILINE | re.DOTALL)
CMAKE_SOURCE = re.compile(r"[\w./${}-]+\.(?:cc|fbs)(?![\w.])")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
DOC_REFERENCE = re.compile(r"\bdocs/[\w./-]+\.md\b")
QUOTED_FILE = re.compile(r"`([\w./-]+?\.(?:cc|h|py|fbs|md|cmake))(?:/\.(?:cc|h))?`")
# Files that the documentation may mention although they are not ours.
OUTSIDE_FILES = {"zmq.h", "zmq.hpp", "dnnl.hpp", "omp.h", "pcre2.h", "zlib.h", "DESIGN.md", "CONTRACT.md", "line.py"}


def check_words(path, text):
    for number, line in enumerate(text.splitlines(), 1):
        match = BANNED.search(line)
        if match:
            yield number, f"{match.group(0)}: finish it, or write TODO(issue 12): reason"


def check_lines(path, text):
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns, {COLUMNS} at most"
    if len(lines) > TOO_LONG_FILE:
        yield 1, f"{len(lines)} lines, {TOO_LONG_FILE} at most: which second idea moved in?"


def check_headers(path, text):
    if not path.endswith((".h", ".cuh")) or "#pragma once" in text:
        return
    if C_GUARD.search(text) is None:
        yield 1, "no #pragma once"


def check_own_header(path, text, exists):
    own = path[: -len(".cc")] + ".h"
    if not path.endswith(".cc") or not exists(own):
        return
    first = INCLUDE.search(text)
    if first is None or first.group(1) != own:
        yield 1, f'the first include is not its own header, "{own}"'


def check_sleep(path, text):
    if not path.startswith("tests/"):
        return
    for number, line in enumerate(text.splitlines(), 1):
        match = SLEEP.search(line)
        if match:
            yield number, f"{match.group(0)} in a test: wait for the event itself"


def check_paths(path, text):
    for number, line in enumerate(text.splitlines(), 1):
        match = MACHINE_PATH.search(line) or REGISTRY.search(line)
        if match:
            yield number, f"{match.group(0)}: no path of one machine, no registry host"


def listed_sources(tree):
    """Paths from the root of all sources that CMakeLists.txt files name."""
    listed = set()
    for path, text in tree.items():
        folder, name = posixpath.split(path)
        if name == "CMakeLists.txt":
            for source in CMAKE_SOURCE.findall(re.sub(r"#.*", "", text)):
                source = source.replace("${CMAKE_CURRENT_SOURCE_DIR}/", "")
                near = folder if "${PROJECT_SOURCE_DIR}/" not in source else ""
                listed.add(posixpath.normpath(posixpath.join(near, source.replace("${PROJECT_SOURCE_DIR}/", ""))))
    return listed


def check_cmake(listed, path):
    if path.endswith((".cc", ".fbs")) and path not in listed:
        yield 1, "no CMakeLists.txt lists it"


def names_file(card, name):
    """Whether a card names a file: by its name, as `stem` or `stem.h` for stem.cc, or by a pattern in back-quotes."""
    stem, suffix = posixpath.splitext(name)
    if suffix in CPP and re.search(r"(?<![\w/-])" + re.escape(stem) + r"(\.(h|cc|\{)|`)", card):
        return True
    if re.search(r"(?<![\w/.-])" + re.escape(name) + r"(?![\w-])", card):
        return True
    return any(fnmatch.fnmatch(name, pattern) for pattern in re.findall(r"`([^`\s]*\*[^`\s]*)`", card))


def check_card(tree, path):
    here, name = posixpath.split(path)
    if not path.endswith(CODE):
        return
    folder = here
    while folder and posixpath.join(folder, "README.md") not in tree:
        folder, last = posixpath.split(folder)
        name = posixpath.join(last, name)
    if not folder:
        if path == min(p for p in tree if posixpath.dirname(p) == here and p.endswith(CODE)):  # once for a folder
            yield 1, f"no room card: neither {here} nor a folder above it has a README.md"
    elif not names_file(tree[posixpath.join(folder, "README.md")], name):
        yield 1, f"{folder}/README.md does not name {name}"


def check_names(tree, path, text):
    """Links and file names that a document mentions: relative to it or to the root, or the name of any file of ours."""
    here = posixpath.dirname(path)
    base_names = {posixpath.basename(p) for p in tree}

    def exists(target):
        places = [posixpath.join(here, target), target, posixpath.join("libkvshare/include", target)]
        places = [posixpath.normpath(p) for p in places]
        return any(t in tree or any(p.startswith(t.rstrip("/") + "/") for p in tree) for t in places)

    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        # Another project's document, if this line or the one before names the project.
        outside = re.search(r"github\.com|ggml", "".join(lines[max(0, number - 2) : number]))
        for target in () if outside else DOC_REFERENCE.findall(line):
            if not exists(target):
                yield number, f"{target} does not exist"
        if not path.endswith(".md"):
            continue
        for target in LINK.findall(line):
            if not re.match(r"[a-z]+:", target) and not exists(target):
                yield number, f"a link to {target}, which does not exist"
        for target in QUOTED_FILE.findall(line):
            bare = "/" not in target and (target in base_names or target in OUTSIDE_FILES)
            if not bare and not target.startswith(("build/", "../")) and not exists(target):
                yield number, f"`{target}` does not exist"


def findings(tree):
    """[(path, line, what)] for {path from the root: text}."""
    found, listed = [], listed_sources(tree)
    for path, text in sorted(tree.items()):
        checks = [] if path == SELF else [check_names(tree, path, text), check_paths(path, text)]
        if path.endswith(CODE) or path.endswith("CMakeLists.txt"):
            if path != SELF:
                checks += [check_words(path, text), check_sleep(path, text)]
            checks += [check_lines(path, text), check_headers(path, text), check_card(tree, path)]
            checks += [check_own_header(path, text, tree.__contains__), check_cmake(listed, path)]
        found += [(path, number, what) for check in checks for number, what in check]
    return found


def read_tree(root):
    tree = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in ("build", ".git", ".cache", "__pycache__")]
        for name in files:
            path = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            if path.endswith(TEXT):
                with open(os.path.join(root, path), encoding="utf-8") as f:
                    tree[path] = f.read()
            else:
                tree[path] = ""  # only its name matters
    return tree


def check_format(root, paths):
    program = shutil.which(f"clang-format-{FORMAT_VERSION}") or shutil.which("clang-format")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout if program else ""
    if f"version {FORMAT_VERSION}." not in version:
        print(f"tidy: form not checked, no clang-format {FORMAT_VERSION} (other versions format differently)")
        return []
    found = []
    for path in paths:
        made = subprocess.run([program, "--style=file", path], cwd=root, capture_output=True, text=True).stdout
        with open(os.path.join(root, path), encoding="utf-8") as f:
            if f.read() != made:
                found.append((path, 1, f"not as clang-format writes it: clang-format -i {path}"))
    return found


def self_test():
    good = {
        "README.md": "see [the docs](docs/A.md), `a/x.h` and `x.cc`",
        "docs/A.md": "`zmq.h`",
        "a/README.md": "| `x.h`, `x.cc` | x |\n| `CMakeLists.txt` |",
        "a/CMakeLists.txt": "kvs_library(a SRCS x.cc)",
        "a/x.h": "#pragma once\n",
        "a/x.cc": '#include "a/x.h"\n#include <vector>\n',
        "tests/README.md": "`a/*_test.cc`",
        "tests/a/CMakeLists.txt": "kvs_test(t SRCS x_test.cc)",
        "tests/a/x_test.cc": "// waits for the event; connects to ipc:///tmp/x\n",
    }
    cases = [  # what to change, a word of the only finding
        ({}, None),
        ({"a/x.h": "// TODO later\n#pragma once\n"}, "TODO"),
        ({"a/x.h": "// TODO(issue 12): widen\n#pragma once\n"}, None),
        ({"a/x.h": "// XXX\n#pragma once\n"}, "XXX"),
        ({"a/x.h": "// mkstemp(\"XXXXXX\")\n#pragma once\n"}, None),
        ({"a/x.h": "#pragma once\n//" + "x" * 119}, "121 columns"),
        ({"a/x.h": "#pragma once\n" + "\n" * 700}, "701 lines"),
        ({"a/x.h": "int x;\n"}, "#pragma once"),
        ({"a/x.h": "#ifndef X_H_\n#define X_H_\nint x;\n#endif\n"}, "#pragma once"),
        ({"a/x.h": "#ifndef X_H_\n#define Y_H_\n#ifdef __cplusplus\nextern \"C\" {\n"}, "#pragma once"),
        ({"a/x.h": "#ifndef X_H_\n#define X_H_\n#ifdef __cplusplus\nextern \"C\" {\n"}, None),
        ({"a/x.cc": '#include <vector>\n#include "a/x.h"\n'}, "first include"),
        ({"tests/a/x_test.cc": "std::this_thread::sleep_for(1s);\n"}, "sleep_for"),
        ({"a/x.h": '#pragma once\n// "/' + 'work/model"\n'}, "/" + "work/"),
        ({"docs/A.md": "see /home/me/x"}, "/home/me/"),
        ({"docs/A.md": "from https://" + ".".join(REGISTRY_HOSTS[0]) + "/x"}, ".".join(REGISTRY_HOSTS[0])),
        ({"a/CMakeLists.txt": "kvs_library(a SRCS xx.cc)"}, "no CMakeLists.txt lists it"),
        ({"a/CMakeLists.txt": "# x.cc"}, "no CMakeLists.txt lists it"),
        ({"a/CMakeLists.txt": "", "CMakeLists.txt": "kvs_library(a SRCS a/x.cc)"}, None),
        ({"a/CMakeLists.txt": "", "tests/a/CMakeLists.txt": "kvs_test(t SRCS x_test.cc ../../a/x.cc)"}, None),
        ({"a/CMakeLists.txt": "f(${CMAKE_CURRENT_SOURCE_DIR}/x.cc)"}, None),
        ({"a/README.md": "| `y.txt` |"}, "does not name x.cc"),
        ({"a/README.md": "| `x.{h,cc}` |"}, None),
        ({"a/README.md": "| `x` |"}, None),
        ({"b/x.h": "#pragma once\n"}, "no room card"),
        ({"a/sub/y.h": "#pragma once\n"}, "does not name sub/y.h"),
        ({"a/sub/y.h": "#pragma once\n", "a/README.md": "`x.h`, `sub/y.h`"}, None),
        ({"tests/README.md": "`b/*_test.cc`"}, "does not name a/x_test.cc"),
        ({"docs/A.md": "[gone](B.md)"}, "a link to B.md"),
        ({"docs/A.md": "[up](../a/x.h#top) [web](https://example.org)"}, None),
        ({"docs/A.md": "`a/gone.h`"}, "`a/gone.h`"),
        ({"docs/A.md": "`gone.h`"}, "`gone.h`"),
        ({"a/README.md": "`x.h/.cc`"}, None),
        ({"a/README.md": "`x.h`, `gone.h/.cc`"}, "`gone.h`"),
        ({"a/x.h": "#pragma once\n// docs/formats/gone.md\n"}, "docs/formats/gone.md"),
    ]
    failed = 0
    for change, word in cases:
        found = [what for _, _, what in findings({**good, **change})]
        if (word is None and found) or (word is not None and not any(word in what for what in found)):
            failed += 1
            print(f"self-test: {change}: expected {word!r}, found {found}")
    print(f"{len(cases) - failed} passed, {failed} failed")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser.add_argument("--self-test", action="store_true")
    args = parser.parse_args()
    if args.self_test:
        return 1 if self_test() else 0
    tree = read_tree(args.root)
    found = findings(tree) + check_format(args.root, sorted(p for p in tree if p.endswith(CPP)))
    for path, number, what in found:
        print(f"{path}:{number}: {what}")
    for path, text in sorted(tree.items()):
        if path.endswith(CODE) and LONG_FILE < len(text.splitlines()) <= TOO_LONG_FILE:
            print(f"tidy: mentioned only: {path} has {len(text.splitlines())} lines")
    print(f"tidy: {len(tree)} files, {len(found)} findings")
    return 1 if found or not tree else 0


if __name__ == "__main__":
    sys.exit(main())
