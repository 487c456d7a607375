"""Runs agentd and kvctl from outside. KVSHARE_BIN: where they are; KVSHARE_SOURCE: the source tree."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import unittest

SOURCE = os.environ.get("KVSHARE_SOURCE", os.getcwd())
BIN = os.environ.get("KVSHARE_BIN", os.path.join(SOURCE, "build", "release", "bin"))
MODEL = os.path.join(SOURCE, "models", "notes-3m")
TRACE = os.path.join(SOURCE, "bench", "traces", "team.ktr.jsonl")


class ProgramTest(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="kvs-e2e-")
        self.addCleanup(subprocess.run, ["rm", "-rf", self.dir])

    def path(self, name, data=None):
        path = os.path.join(self.dir, name)
        if data is not None:
            with open(path, "w", encoding="utf-8") as f:
                f.write(data if isinstance(data, str) else json.dumps(data))
        return path

    def kvctl(self, *argv, code=0):
        """Runs kvctl; the exit code must be `code`. Returns (stdout, stderr)."""
        p = subprocess.run([os.path.join(BIN, "kvctl"), *map(str, argv)], capture_output=True, text=True, timeout=120)
        self.assertEqual(p.returncode, code, f"kvctl {argv}: {p.stderr[-400:]}{p.stdout[-200:]}")
        if code != 0:
            lines = p.stderr.strip().splitlines()
            self.assertTrue(lines and lines[-1].startswith("kvctl: "), p.stderr)
        return p.stdout, p.stderr

    def agentd_refuses(self, code, *words, args=(), env=None):
        """The line that agentd says, which must end at once with `code`; all `words` are in it."""
        p = subprocess.run(
            [os.path.join(BIN, "agentd"), *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **(env or {})},
        )
        self.assertEqual(p.returncode, code, p.stderr)
        self.assertEqual(len(p.stderr.strip().splitlines()), 1, p.stderr)
        self.assertTrue(p.stderr.startswith("agentd: "), p.stderr)
        for word in words:
            self.assertIn(word, p.stderr)
        return p.stderr

    def json(self, *argv):
        return json.loads(self.kvctl(*argv)[0])

    def read(self, path, mode="r"):
        with open(path, mode) as f:
            return f.read()

    @contextlib.contextmanager
    def daemon(self, *args, name="d", model=MODEL, env=None):
        """agentd on a fresh socket; ended by SIGTERM, after which it must have exited with 0. Its log is NAME.log."""
        endpoint = "ipc://" + self.path(name + ".sock")
        log = open(self.path(name + ".log"), "w")
        process = subprocess.Popen(
            [os.path.join(BIN, "agentd"), "--model", model, "--listen", endpoint, *map(str, args)],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, **(env or {})},
        )
        try:
            self.kvctl("ping", "--endpoint", endpoint, "--timeout", "60s")
            yield endpoint, process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(30), 0, "agentd's exit code after SIGTERM")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            log.close()

    def ask(self, endpoint, messages, tokens=8, **options):
        name = f"ask-{os.urandom(4).hex()}.json"
        extra = [x for key, value in options.items() for x in ("--" + key, value)]
        return self.json(
            "generate",
            "--endpoint",
            endpoint,
            "--messages",
            self.path(name, messages),
            "--max-tokens",
            tokens,
            "--format",
            "json",
            *extra,
        )

    def render(self, messages):
        return self.json("render", "--model", MODEL, "--messages", self.path("render.json", messages))["ids"]


def talk(agent, question, history=()):
    rules = "Follow the plan of the team and answer in one short sentence. " * 4
    return [
        dict(role="system", content=f"You are the {agent}. {rules}"),
        *history,
        dict(role="user", content=question),
    ]
