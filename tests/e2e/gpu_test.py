"""agentd on the emulated GPU (KVSHARE_CUDA_PLUGIN names its plug-in): serving, a warm restart, a note that is repaired,
and a GPU that fails."""

import json
import os
import subprocess
import unittest

from programs import BIN, MODEL, ProgramTest

PROMPT = [7 * i % 2000 + 5 for i in range(70)]


@unittest.skipUnless(os.environ.get("KVSHARE_CUDA_PLUGIN"), "KVSHARE_CUDA_PLUGIN names no plug-in")
class GpuTest(ProgramTest):
    def setUp(self):
        super().setUp()
        self.args = ("--cold-dir", self.path("cold"), "--cold-size", "64MiB", "--kv-pool-size", "64MiB")
        self.broken = self.path("broken")
        self.env = dict(KVSHARE_EMULATED_BREAK=self.broken)

    def generate(self, endpoint, code=0, reuse="exact", prompt=PROMPT, session=()):
        ids = self.path("ids.json", dict(ids=prompt))
        args = ("--ids", ids, "--max-tokens", 2, "--reuse", reuse, "--format", "json", *session)
        return self.kvctl("generate", "--endpoint", endpoint, *args, code=code)

    def test_a_daemon_serves_restarts_warm_and_ends_with_its_gpu(self):
        with self.daemon("--device", "cuda", *self.args, env=self.env) as (endpoint, _):
            self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["device"], "cuda")
            off = json.loads(self.generate(endpoint, reuse="off")[0])
            stored = json.loads(self.generate(endpoint)[0])
            hit = json.loads(self.generate(endpoint)[0])
            self.assertEqual([stored["ids"], hit["ids"]], [off["ids"]] * 2)
            self.assertEqual(hit["kvshare"]["prefix_tokens"], len(PROMPT) - 1)

        endpoint = "ipc://" + self.path("g.sock")
        argv = [os.path.join(BIN, "agentd"), "--model", MODEL, "--listen", endpoint, "--device", "auto", *self.args]
        log = self.path("g.log")
        with open(log, "w") as f:
            process = subprocess.Popen(argv, stderr=f, env={**os.environ, **self.env})
        self.addCleanup(process.kill)
        self.kvctl("ping", "--endpoint", endpoint, "--timeout", "60s")
        warm = json.loads(self.generate(endpoint)[0])
        self.assertEqual(warm["ids"], off["ids"])
        self.assertEqual(warm["kvshare"]["prefix_tokens"], len(PROMPT) - 1)
        self.path("broken", "")
        _, error = self.generate(endpoint, code=3)  # as of any daemon that cannot serve
        self.assertIn("an illegal address", error)
        self.assertEqual(process.wait(30), 1)
        self.assertIn("agentd: the device has failed", self.read(log))

        with self.daemon("--device", "auto", *self.args, name="c", env=self.env) as (endpoint, _):
            self.assertEqual(self.json("ping", "--endpoint", endpoint, "--format", "json")["device"], "cpu")

    def test_a_note_is_repaired_where_another_agent_reads_it(self):
        writer, reader = [9] * 20 + PROMPT, list(range(300, 312)) + PROMPT + [7, 8]
        with self.daemon("--device", "cuda", "--kv-pool-size", "64MiB") as (endpoint, _):
            for reuse in ("cacheblend", "dhd"):
                session = ("--session", reuse)
                self.generate(endpoint, reuse=reuse, prompt=writer, session=session)
                reply = json.loads(self.generate(endpoint, reuse=reuse, prompt=reader, session=session)[0])["kvshare"]
                self.assertTrue(reply["approximate"])
                found = reply["moved_tokens"] + reply["recomputed_tokens"]
                self.assertGreater(found, 60)
                self.assertEqual(reply["recomputed_tokens"], int(0.15 * found))


if __name__ == "__main__":
    unittest.main(verbosity=2)
