"""LoRA through the programs: every command takes the adapter, and KV of other weights is never answered from."""

import json
import os
import random
import struct
import unittest

from programs import MODEL, ProgramTest, talk

NOTE = " ".join(f"Note {i}: the {thing} is in the attic." for i, thing in enumerate(["key", "map", "lamp"] * 8))


def write_adapter(path, seed=1):
    """An adapter of rank 4 for the q and v projections of the small model, strong enough to change answers."""
    os.makedirs(path)
    with open(os.path.join(MODEL, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    with open(os.path.join(path, "adapter_config.json"), "w", encoding="utf-8") as f:
        json.dump(dict(peft_type="LORA", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), f)
    rng, header, data = random.Random(seed), {}, b""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads = dict(q_proj=config["num_attention_heads"], v_proj=config["num_key_value_heads"])
    for layer in range(config["num_hidden_layers"]):
        for module, count in heads.items():
            for matrix, shape in (("lora_A", [4, hidden]), ("lora_B", [count * dim, 4])):
                values = [rng.uniform(-0.2, 0.2) for _ in range(shape[0] * shape[1])]
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.{matrix}.weight"
                end = len(data) + 4 * len(values)
                header[name] = dict(dtype="F32", shape=shape, data_offsets=[len(data), end])
                data += struct.pack(f"<{len(values)}f", *values)
    text = json.dumps(header).encode()
    with open(os.path.join(path, "adapter_model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
    return path


class LoraTest(ProgramTest):
    def setUp(self):
        super().setUp()
        self.lora = write_adapter(self.path("lora"))
        self.prompt = self.path("prompt.json", talk("planner", f"{NOTE} Where is the key?"))

    def generate(self, *extra):
        args = ("--messages", self.prompt, "--max-tokens", 12, "--format", "json")
        return self.json("generate", "--model", MODEL, *args, *extra)

    def test_every_command_takes_it(self):
        plain, adapted = self.generate()["ids"], self.generate("--lora", self.lora)["ids"]
        self.assertNotEqual(plain, adapted, "the adapter changes nothing")
        told = [self.json("model", "--model", MODEL, *x, "--format", "json") for x in ((), ("--lora", self.lora))]
        self.assertNotEqual(told[0]["space"], told[1]["space"])
        with self.daemon("--lora", self.lora, name="adapted") as (endpoint, _):
            reply = self.ask(endpoint, json.loads(self.read(self.prompt)), tokens=12)
            self.assertEqual(reply["ids"], adapted)
        wrong = self.path("nothing-here")
        for command in (("generate", "--messages", self.prompt), ("explain", "--messages", self.prompt), ("model",)):
            self.assertIn(wrong, self.kvctl(*command, "--model", MODEL, "--lora", wrong, code=5)[1])
        self.agentd_refuses(5, wrong, args=("--model", MODEL, "--lora", wrong, "--listen", "ipc://" + self.path("x")))

    def test_kv_of_other_weights_is_a_miss(self):
        cold = ("--cold-dir", self.path("cold"), "--cold-size", "1GiB")
        other = write_adapter(self.path("other"), seed=2)
        messages = json.loads(self.read(self.prompt))
        with self.daemon(*cold, name="plain") as (endpoint, _):
            self.ask(endpoint, messages)
        for name, flags, stored in (
            ("adapted", ("--lora", self.lora), False),
            ("another", ("--lora", other), False),
            ("adapted-again", ("--lora", self.lora), True),
            ("plain-again", (), True),
        ):
            with self.daemon(*cold, *flags, name=name) as (endpoint, _):
                reply = self.ask(endpoint, messages)
                self.assertEqual(reply["ids"], self.generate(*flags)["ids"][:8])
                self.assertEqual(reply["kvshare"]["prefix_tokens"] > 64, stored, name)
                told = self.kvctl("explain", "--endpoint", endpoint, "--request", reply["kvshare"]["request_id"])[0]
                self.assertEqual("model_changed" in told, not stored, told)


if __name__ == "__main__":
    unittest.main()
