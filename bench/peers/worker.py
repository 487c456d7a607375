"""One peer engine in one process: loads a model, then answers one measurement per line of standard input.

A request is {"test": "pp512" | "tg64" | "greedy", "seed": n[, "ids": [...]]}; the answer is one JSON line:
  ppN     {"seconds"}: from handing over N fresh random token ids to holding the first generated token
  tgN     {"seconds"}: from the first generated token to the (N+1)th, after a prompt of one random token
  greedy  {"ids"}: 8 tokens decoded greedily after "ids"; run.py uses it to see that all engines run the same model
run.py starts it inside its virtual environment: worker.py ENGINE MODEL.gguf THREADS
"""

import json
import os
import sys
import time

import numpy as np

DECODE_PROMPT = 1
# Ids below 300 are special tokens and single bytes in the models at hand.
FIRST_ORDINARY_ID = 300


def random_ids(seed, count, vocab):
    # Seeded by the length too: a 2,048-token prompt that began with the 512 tokens of the last one would be a hit in an
    # engine with a prefix cache.
    return np.random.default_rng([seed, count]).integers(FIRST_ORDINARY_ID, vocab, count)


class OpenVino:
    """LLMPipeline on token ids. `backend`: PA (paged attention, continuous batching) or SDPA (stateful model)."""

    def __init__(self, model, threads, backend):
        import openvino
        import openvino_genai
        self.tensor = openvino.Tensor
        self.pipe = openvino_genai.LLMPipeline(model, "CPU", ATTENTION_BACKEND=backend, INFERENCE_NUM_THREADS=threads,
                                               INFERENCE_PRECISION_HINT="bf16")
        self.vocab = 49152

    def generate(self, ids, count):
        begin = time.perf_counter()
        out = self.pipe.generate(self.tensor(np.asarray(ids, dtype=np.int64)[None, :]), max_new_tokens=count,
                                 min_new_tokens=count, ignore_eos=True, do_sample=False, apply_chat_template=False)
        whole = time.perf_counter() - begin
        tokens = [int(t) for t in out.tokens[0]]
        if len(tokens) != count:
            raise RuntimeError(f"asked for {count} tokens, got {len(tokens)}")
        return tokens, out.perf_metrics.get_ttft().mean / 1000, whole

    def prefill(self, ids):
        return self.generate(ids, 1)[2]

    def decode(self, ids, count):
        _, first, whole = self.generate(ids, count + 1)
        return whole - first

    def greedy(self, ids, count):
        return self.generate(ids, count)[0]


class LlamaCpp:
    """llama.cpp through its C API: n_batch 2048, n_ubatch 512, flash attention where it chooses, KV in f16."""

    def __init__(self, model, threads):
        import llama_cpp
        self.api = llama_cpp
        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        self.keep_alive = quiet
        llama_cpp.llama_log_set(quiet, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        loader = getattr(llama_cpp, "llama_model_load_from_file", None) or llama_cpp.llama_load_model_from_file
        self.model = loader(model.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        ctx = llama_cpp.llama_context_default_params()
        ctx.n_ctx, ctx.n_batch, ctx.n_ubatch = 4096, 2048, 512
        ctx.n_threads = ctx.n_threads_batch = threads
        new_context = getattr(llama_cpp, "llama_init_from_model", None) or llama_cpp.llama_new_context_with_model
        self.ctx = new_context(self.model, ctx)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def reset(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.ctx), True)

    def forward(self, ids, start):
        """Computes ids at positions start.. and returns the most likely next token."""
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = int(token)
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(ids) - 1
        if self.api.llama_decode(self.ctx, batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.api.llama_synchronize(self.ctx)
        logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.ctx, -1), shape=(self.vocab,))
        return int(logits.argmax())

    def prefill(self, ids):
        self.reset()
        begin = time.perf_counter()
        self.forward(ids, 0)
        return time.perf_counter() - begin

    def decode(self, ids, count):
        self.reset()
        token = self.forward(ids, 0)
        begin = time.perf_counter()
        for i in range(count):
            token = self.forward([token], len(ids) + i)
        return time.perf_counter() - begin

    def greedy(self, ids, count):
        self.reset()
        out = [self.forward(ids, 0)]
        while len(out) < count:
            out.append(self.forward([out[-1]], len(ids) + len(out) - 1))
        return out


class Ceilings:
    """The machine's limits, measured without any of the engines: a bf16 matrix product, and reading memory."""

    def __init__(self, threads):
        import openvino
        from openvino import opset13 as op
        m, k, n = 2048, 2048, 4096
        x = op.parameter([m, k], np.float32)
        w = op.constant((np.random.default_rng(1).standard_normal((n, k)) / 50).astype(np.float32))
        model = openvino.Model([op.matmul(x, w, False, True)], [x], "product")
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads,
                                                                "INFERENCE_PRECISION_HINT": "bf16"})
        self.request = compiled.create_infer_request()
        self.input = np.random.default_rng(2).standard_normal((m, k)).astype(np.float32)
        self.flops = 2 * m * k * n
        self.memory = [np.ones(64 << 20, dtype=np.float32) for _ in range(threads)]

    def measure(self):
        import concurrent.futures
        self.request.infer([self.input])
        best = min(self.timed(lambda: self.request.infer([self.input])) for _ in range(10))
        with concurrent.futures.ThreadPoolExecutor(len(self.memory)) as pool:
            read = min(self.timed(lambda: list(pool.map(np.max, self.memory))) for _ in range(10))
        read_bytes = sum(a.nbytes for a in self.memory)
        return {"bf16_gflops": self.flops / best / 1e9, "read_gb_per_s": read_bytes / read / 1e9}

    @staticmethod
    def timed(call):
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin


def answer(engine, request):
    test = request["test"]
    if test == "ceilings":
        return engine.measure()
    if test == "greedy":
        return {"ids": engine.greedy(request["ids"], 8)}
    count = int(test[2:])
    if test.startswith("pp"):
        return {"seconds": engine.prefill(random_ids(request["seed"], count, engine.vocab))}
    return {"seconds": engine.decode(random_ids(request["seed"], DECODE_PROMPT, engine.vocab), count)}


def main():
    name, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    # Standard output belongs to the answers; whatever a library prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name == "llama.cpp":
        engine = LlamaCpp(model, threads)
    elif name == "ceilings":
        engine = Ceilings(threads)
    else:
        engine = OpenVino(model, threads, name.split("/")[1])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
