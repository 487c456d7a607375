"""agentd's settings: layers, messages with file and line, what can be checked without a model."""

import os
import subprocess
import unittest

from programs import BIN, MODEL, ProgramTest, talk

GOOD = f"""version: 1
model: {{path: {MODEL}}}
server: {{listen: ipc:///nowhere/kvs.sock}}
reuse: {{mode: off}}
"""


class ConfigTest(ProgramTest):
    def agentd(self, *args, env=None):
        return subprocess.run(
            [os.path.join(BIN, "agentd"), *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, **(env or {})},
        )

    def test_a_good_file_is_accepted_and_bad_ones_name_the_line(self):
        good = self.agentd("--config", self.path("good.yaml", GOOD), "--check-config")
        self.assertEqual((good.returncode, good.stderr), (0, ""))
        for text, words in (
            (GOOD + "modle: {path: x}\n", ("bad.yaml:5", "did you mean 'model'?")),
            (GOOD + "pool:\n  sise: 1GiB\n", ("bad.yaml:6", "did you mean 'size'?")),
            (GOOD + "pool: {size: plenty}\n", ("bad.yaml:5", "pool.size", "8GiB")),
            (GOOD + "server: {threads: 1}\n", ("bad.yaml:5", "given twice")),
            ("model: {path: x}\n", ("bad.yaml:1", "version: 1")),
            ("{", ("bad.yaml:", "not YAML")),
        ):
            bad = self.path("bad.yaml", text)
            self.agentd_refuses(2, *words, args=("--config", bad, "--check-config"))
            self.agentd_refuses(2, *words, args=("--config", bad))
        self.agentd_refuses(2, "none.yaml", args=("--config", self.path("none.yaml")))

    def test_flags_are_strict(self):
        need = ("--model", MODEL, "--listen", "ipc:///nowhere/kvs.sock")
        self.agentd_refuses(2, "--modle", "did you mean '--model'?", args=("--modle", "x"))
        self.agentd_refuses(2, "--model is required", args=("--check-config",))
        self.agentd_refuses(2, "--listen is required", args=("--model", MODEL))
        self.agentd_refuses(2, "--cold-size", "--cold-dir", args=(*need, "--cold-size", "1GiB"))
        self.agentd_refuses(2, "--kv-pool-size", "size", args=(*need, "--kv-pool-size", "lots"))
        self.agentd_refuses(2, "--reuse", "did you mean 'exact'?", args=(*need, "--reuse", "exat"))
        self.agentd_refuses(2, "--eviction", "s3fifo", args=(*need, "--eviction", "random"))
        self.agentd_refuses(2, "--blend-recompute", "0 to 1", args=(*need, "--blend-recompute", "2"))
        self.agentd_refuses(2, "--blend-filter", "did you mean 'gradual'?", args=(*need, "--blend-filter", "gradually"))
        self.agentd_refuses(2, "--http", "HOST:PORT", args=(*need, "--http", "nonsense"))
        self.agentd_refuses(2, "--threads", args=(*need, "--threads", "many"))
        self.agentd_refuses(2, "KVSHARE_POOL_SISE", "KVSHARE_POOL_SIZE", args=need, env={"KVSHARE_POOL_SISE": "1GiB"})

    def test_print_config_names_origins_and_reads_back(self):
        config = self.path("c.yaml", GOOD)
        printed = self.agentd(
            "--config", config, "--threads", "1", "--print-config", env={"KVSHARE_POOL_SIZE": "64MiB"}
        ).stdout
        self.assertIn(f"mode: off  # {config}:4", printed)
        self.assertIn("size: 64MiB  # KVSHARE_POOL_SIZE", printed)
        self.assertIn("threads: 1  # --threads", printed)
        self.assertIn("max_running: 64  # default", printed)
        again = self.agentd("--config", self.path("again.yaml", printed), "--print-config").stdout
        strip = [line.split("  # ")[0] for line in printed.splitlines()]
        self.assertEqual(strip, [line.split("  # ")[0] for line in again.splitlines()])

    def test_settings_take_effect(self):
        config = self.path("c.yaml", "version: 1\nreuse: {mode: off}\nobserve: {log: error}\npool: {size: 256MiB}\n")
        env = {"KVSHARE_POOL_SIZE": "128MiB"}
        with self.daemon("--config", config, "--max-running", 3, env=env, name="quiet") as (endpoint, _):
            info = self.json("info", "--endpoint", endpoint, "--format", "json")
            self.assertEqual(info["reuse"]["mode"], "off")
            self.assertLessEqual(info["pool"]["capacity_bytes"], 128 << 20)
            self.assertGreater(info["pool"]["capacity_bytes"], 120 << 20)
            self.assertTrue(self.ask(endpoint, talk("planner", "Hi"))["ids"])
        self.assertEqual(self.read(self.path("quiet.log")), "")


if __name__ == "__main__":
    unittest.main(verbosity=2)
