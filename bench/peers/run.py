#!/usr/bin/env python3
"""kvshare beside the two engines that people run on CPUs, OpenVINO GenAI and llama.cpp: same weights, interleaved.

Everything it installs or writes lies under build/peers (a virtual environment from the Python package index; llama.cpp
is compiled there for this machine). Nothing of the peers is part of this repository.

Workloads (fresh random token ids each time, so no engine can reuse a prefix):
  pp512, pp2048   seconds to the first token of a prompt of that length; shown as prompt tokens per second
  tg64            64 tokens decoded one by one after a prompt of one; shown as tokens per second
Rows: each engine with 16-bit weights (the GGUF's tensors, dequantised: what kvshare computes with), and the peers
with the quantised file as it is. A round measures every row once, one after the other; the table shows the median of
the rounds in which other processes used less than --noise of the cores, and says so when there were too few.

  bench/peers/run.py --model SmolLM2-135M-Instruct.Q4_1.gguf [--kvctl build/release/bin/kvctl] [--repeat 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
WORK = os.path.join(ROOT, "build", "peers")
PYTHON = os.path.join(WORK, "venv", "bin", "python")
WHEELS = ["openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "gguf==0.19.0",
          "numpy"]
LLAMA = "llama-cpp-python==0.3.36"
LLAMA_CMAKE = "-DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF"
DEFAULT_MODEL = os.path.expanduser("~/.cache/kvshare/models/SmolLM2-135M-Instruct.Q4_1.gguf")
TICKS = os.sysconf("SC_CLK_TCK")


def say(text):
    print(text, file=sys.stderr, flush=True)


def prepare(model):
    """Installs the peers and makes the 16-bit copies of the model, whichever of these are missing."""
    os.makedirs(WORK, exist_ok=True)
    if not os.path.exists(PYTHON):
        subprocess.run([sys.executable, "-m", "venv", os.path.join(WORK, "venv")], check=True)
    pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted, stamp = "\n".join(WHEELS), os.path.join(WORK, "venv", "kvshare-wheels.txt")
    if not os.path.exists(stamp) or open(stamp).read() != wanted:
        subprocess.run(pip + WHEELS, check=True)
        with open(stamp, "w") as f:
            f.write(wanted)
    if subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode != 0:
        say("run.py: compiling llama.cpp for this machine (minutes)")
        env = dict(os.environ, CMAKE_ARGS=LLAMA_CMAKE, CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count()))
        subprocess.run(pip + ["typing-extensions", "diskcache", "jinja2", LLAMA], check=True, env=env)
    copies = {}
    for dtype in ("bf16", "f16"):
        copies[dtype] = os.path.join(WORK, os.path.basename(model).rsplit(".", 1)[0] + f".{dtype}.gguf")
        if not os.path.exists(copies[dtype]):
            made = copies[dtype] + ".part"
            subprocess.run([PYTHON, os.path.join(HERE, "dequantise.py"), model, made, dtype], check=True)
            os.rename(made, copies[dtype])
    return copies


def busy_ticks():
    """Ticks that all cores have spent on anything but idling, the hypervisor's steal included."""
    with open("/proc/stat") as f:
        values = [int(v) for v in f.readline().split()[1:9]]
    return sum(values) - values[3] - values[4]


def process_ticks(pid):
    with open(f"/proc/{pid}/stat") as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


class Noise:
    """The share of the cores that others used between start() and share()."""

    def start(self, own):
        self.begin, self.busy, self.own = time.monotonic(), busy_ticks(), own

    def share(self, own):
        wall = max(time.monotonic() - self.begin, 1e-9)
        others = (busy_ticks() - self.busy) - (own - self.own)
        return max(0.0, others / TICKS / wall / os.cpu_count())


class Worker:
    """A peer in a process of its own (worker.py). It sleeps on its standard input between measurements."""

    def __init__(self, engine, model, threads):
        self.log = open(os.path.join(WORK, "worker.log"), "a")
        self.process = subprocess.Popen([PYTHON, os.path.join(HERE, "worker.py"), engine, model, str(threads)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("it ended; see build/peers/worker.log")
        return json.loads(line)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def measure(self, test, seed):
        noise = Noise()
        noise.start(process_ticks(self.process.pid))
        seconds = self.ask(test=test, seed=seed)["seconds"]
        return int(test[2:]) / seconds, noise.share(process_ticks(self.process.pid))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Ours:
    """`kvctl bench model`, one process per measurement: it loads, warms up, and reports tokens per second."""

    def __init__(self, kvctl, model, threads):
        self.command = [kvctl, "bench", "model", "--model", model, "--threads", str(threads), "--format", "json"]
        self.ceilings = {}

    def measure(self, test, seed):
        del seed  # kvctl draws its own fresh prompts
        # kvctl measures prompts and generation together; the other of the two is one token and ignored.
        what = ["--prompt", test[2:], "--gen", "1"] if test.startswith("pp") else ["--prompt", "1", "--gen", test[2:]]
        before, noise = os.times(), Noise()
        noise.start(0)
        done = subprocess.run(self.command + what + ["--repeat", "3"], capture_output=True, text=True)
        after = os.times()
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip())
        spent = (after.children_user + after.children_system - before.children_user - before.children_system) * TICKS
        report = json.loads(done.stdout)
        self.ceilings = report.get("ceilings", {}).get("per_threads", [{}])[0]
        result = next(r for r in report["results"] if r["test"] == test)
        return result["tokens_per_second"], noise.share(spent)

    def close(self):
        pass


def same_model(rows):
    """Which rows continue a fixed prompt alike; a difference is shown, not hidden: quantised rows may well differ."""
    prompt = list(range(1000, 1064))
    return {name: row.ask(test="greedy", ids=prompt)["ids"] for name, row in rows.items() if isinstance(row, Worker)}


def measure(rows, tests, args):
    samples = {(name, test): [] for name in rows for test in tests}
    for name, row in rows.items():  # one round to warm up, not counted
        for test in tests:
            row.measure(test, 1)
    for number in range(args.rounds):
        for test in tests:
            for i, (name, row) in enumerate(rows.items()):
                samples[name, test].append(row.measure(test, 1000 * number + 10 * i + 7))
        quiet = min(sum(n < args.noise for _, n in s) for s in samples.values())
        say(f"run.py: round {number + 1}, {quiet} of {args.repeat} quiet measurements of every row")
        if quiet >= args.repeat:
            break
    return samples


def summary(samples, args):
    quiet = [v for v, n in samples if n < args.noise]
    used = quiet if len(quiet) >= args.repeat else [v for v, _ in samples]
    return {"median": statistics.median(used), "min": min(used), "max": max(used), "samples": len(used),
            "quiet": used is quiet, "others_share": statistics.median(n for _, n in samples)}


def show(results, tests, ours, ceilings, continuations):
    baseline = {test: max((results[name][test]["median"] for name in results if name != ours and "16-bit" in name),
                          default=None) for test in tests}
    print(f"{'tokens/s: median (best)':38}" + "".join(f"{t:>19} " for t in tests))
    for name, row in results.items():
        cells = "".join(f"{row[t]['median']:>10.1f} {'(%.1f)' % row[t]['max']:>8}{' ' if row[t]['quiet'] else '*'}"
                        for t in tests)
        print(f"{name:38}{cells}")
    if ours in results:
        print("ratio to the faster 16-bit peer: " +
              ", ".join(f"{t} {results[ours][t]['median'] / baseline[t]:.2f}x" for t in tests if baseline[t]))
    if any(not row[t]["quiet"] for row in results.values() for t in tests):
        print("* too few quiet measurements: the median of all of them, while other processes ran")
    print("ceilings: " + ", ".join(f"{k} {v:.0f}" for k, v in ceilings.items() if isinstance(v, (int, float))))
    alike = {}
    for name, ids in continuations.items():
        alike.setdefault(tuple(ids), []).append(name)
    print("greedy continuation of a fixed prompt: " + "; ".join(f"{', '.join(n)}: {list(i)}" for i, n in alike.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a Llama-architecture GGUF file")
    parser.add_argument("--kvctl", default=os.path.join(ROOT, "build", "release", "bin", "kvctl"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5, help="quiet measurements wanted of each cell")
    parser.add_argument("--rounds", type=int, default=15, help="rounds at most")
    parser.add_argument("--noise", type=float, default=0.05, help="share of the cores that others may use")
    parser.add_argument("--tests", default="pp512,pp2048,tg64")
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these words (comma-separated)")
    parser.add_argument("--out", default=os.path.join(WORK, "report.json"))
    args = parser.parse_args()
    if not os.path.exists(args.model):
        sys.exit(f"run.py: no model at {args.model}; ./quickstart fetches it, or give --model FILE.gguf")
    copies, tests = prepare(args.model), args.tests.split(",")

    ours = "kvshare, 16-bit"
    makers = {
        ours: lambda: Ours(args.kvctl, args.model, args.threads),
        "OpenVINO GenAI PA, 16-bit": lambda: Worker("openvino/PA", copies["f16"], args.threads),
        "OpenVINO GenAI SDPA, 16-bit": lambda: Worker("openvino/SDPA", copies["f16"], args.threads),
        "llama.cpp, 16-bit": lambda: Worker("llama.cpp", copies["bf16"], args.threads),
        "OpenVINO GenAI PA, file as it is": lambda: Worker("openvino/PA", args.model, args.threads),
        "llama.cpp, file as it is": lambda: Worker("llama.cpp", args.model, args.threads),
    }
    if not os.path.exists(args.kvctl):
        say(f"run.py: no {args.kvctl}: the peers alone (cmake --build --preset release builds it)")
        del makers[ours]
    words = [w for w in args.rows.split(",") if w]
    rows = {}
    for name, make in makers.items():
        if not words or any(w in name for w in words):
            try:
                rows[name] = make()
            except RuntimeError as error:
                say(f"run.py: left out: {name}: {error}")
    limits = Worker("ceilings", "-", args.threads)
    ceilings = limits.ask(test="ceilings")
    limits.close()
    continuations = same_model(rows)
    samples = measure(rows, tests, args)
    results = {name: {t: summary(samples[name, t], args) for t in tests} for name in rows}
    if ours in rows:
        ceilings.update({f"kvctl_{k}": v for k, v in rows[ours].ceilings.items()})
    for row in rows.values():
        row.close()
    show(results, tests, ours, ceilings, continuations)
    with open(args.out, "w") as f:
        json.dump({"model": args.model, "threads": args.threads, "results": results, "ceilings": ceilings,
                   "greedy": continuations, "samples": {f"{n}: {t}": s for (n, t), s in samples.items()}}, f, indent=1)
    say(f"run.py: all samples in {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
