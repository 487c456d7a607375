"""Installs into a temporary prefix, builds programs of a user's against it by find_package and by pkg-config, and runs
them with the installed daemon (a client waits for its daemon by itself). Also holds what the package promises: a
versioned soname, no symbols but the public ones, headers that need nobody else's.

KVSHARE_BUILD is the build folder (all of it built), KVSHARE_SOURCE the source."""

import os
import re
import subprocess
import sys
import tempfile

BUILD = os.environ["KVSHARE_BUILD"]
SOURCE = os.environ["KVSHARE_SOURCE"]
CONSUMER = os.path.join(SOURCE, "tests", "package", "consumer")
PUBLIC = re.compile(r"kvs_\w+|KVSHARE_0|(vtable for |typeinfo (name )?for )?kvshare::[A-Z].*")


def run(*args, **kwargs):
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, **kwargs)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(args)}\n{done.stdout}")
    return done.stdout


def find(prefix, name):
    for folder, _, files in os.walk(prefix):
        if name in files:
            return os.path.join(folder, name)
    sys.exit(f"{name} was not installed")


def check_library(library):
    dynamic = run("readelf", "-d", library)
    assert re.search(r"SONAME.*\[libkvshare\.so\.\d+\]", dynamic), dynamic
    for line in run("nm", "-DC", "--defined-only", library).splitlines():
        name = line.split(" ", 2)[2].split("@@")[0]
        assert PUBLIC.fullmatch(name), f"{name} is exported"


def check_headers(include):
    own = os.path.join(include, "kvshare")
    for name in sorted(os.listdir(own)):
        with open(os.path.join(own, name), encoding="utf-8") as file:
            for header in re.findall(r'#include\s+["<]([^">]+)[">]', file.read()):
                assert header.startswith("kvshare/") or "/" not in header, f"{name} includes {header}"


def main():
    with tempfile.TemporaryDirectory() as top:
        prefix = os.path.join(top, "prefix")
        run("cmake", "--install", BUILD, "--prefix", prefix)
        library = os.path.realpath(find(prefix, "libkvshare.so"))
        lib_dir = os.path.dirname(library)
        check_library(library)
        check_headers(os.path.join(prefix, "include"))

        by_cmake = os.path.join(top, "by_cmake")
        run("cmake", "-S", CONSUMER, "-B", by_cmake, f"-DCMAKE_PREFIX_PATH={prefix}")
        run("cmake", "--build", by_cmake)

        environment = dict(os.environ, PKG_CONFIG_PATH=os.path.join(lib_dir, "pkgconfig"))
        flags = run("pkg-config", "--cflags", "--libs", "kvshare", env=environment).split()
        by_hand = os.path.join(top, "by_pkg_config")
        run(os.environ.get("CXX", "c++"), "-std=c++20", os.path.join(CONSUMER, "consumer.cc"), "-o", by_hand,
            *flags, f"-Wl,-rpath,{lib_dir}")

        socket = os.path.join(top, "d.sock")
        agentd = [find(prefix, "agentd"), "--model", os.path.join(SOURCE, "models", "notes-3m"),
                  "--listen", f"ipc://{socket}", "--kv-pool-size", "128MiB"]
        with subprocess.Popen(agentd, stderr=subprocess.PIPE, text=True) as daemon:
            try:
                programs = [os.path.join(by_cmake, "consumer_cpp"), by_hand, os.path.join(by_cmake, "consumer_c")]
                said = [run(program, f"ipc://{socket}") for program in programs]
            finally:
                daemon.terminate()
                daemon.communicate(timeout=60)
        assert re.fullmatch(r"tokens [1-9]\d* bytes \d+\n", said[0]), said[0]
        assert said[1] == said[0], "both ways give the same program"
        assert '"requests":2' in said[2], said[2]
    print("ok")


if __name__ == "__main__":
    main()
