#!/usr/bin/env python3
"""The cases of cuda_bench.cc in torch, as peers: one JSON object a line, {"part", "case", "peer", "ms"}.

  gemm        torch.matmul in bf16 (which rounds its output to bf16; ours writes fp32)
  attention   scaled_dot_product_attention with each backend forced; an explicit mask where rows are not all
  attention   scaled_dot_product_attention, each backend forced; an explicit mask where rows are not all

A backend that refuses a case is left out. Random data; the least of several timed series, by CUDA events.
"""

import json
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, KV_HEADS, DIM, HIDDEN, INNER = 32, 8, 128, 4096, 14336
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


def randn(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def milliseconds(call):
    for _ in range(3):
        call()
    least = float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            call()
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end) / 5)
    return least


def report(part, case, peer, call):
    try:
        ms = milliseconds(call)
    except RuntimeError as error:  # this backend does not take this case, or memory is not enough
        print(f"{part}, {case}, {peer}: {str(error).splitlines()[0]}", file=sys.stderr)
        return
    print(json.dumps({"part": part, "case": case, "peer": peer, "ms": ms}), flush=True)


def gemm():
    qkv = HIDDEN + 2 * KV_HEADS * DIM
    for name, n, k, rows in (("qkv", qkv, HIDDEN, None), ("o", HIDDEN, HIDDEN, None),
                             ("gate_up", 2 * INNER, HIDDEN, None), ("down", HIDDEN, INNER, None),
                             ("square", 8192, 8192, (8192,))):
        w = randn(n, k) * 0.02
        for m in rows or (1, 16, 256, 2048, 8192):
            x, out = randn(m, k), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            report("gemm", f"{name} {m}x{n}x{k}", "torch.matmul", lambda: torch.matmul(x, w.T, out=out))


def sdpa(part, case, q, k, v, **options):
    for name, backend in BACKENDS.items():
        def call():
            with sdpa_kernel([backend]):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        report(part, case, f"sdpa {name}", call)


def attention():
    for length in (8192, 16384):
        k, v = randn(1, KV_HEADS, length, DIM), randn(1, KV_HEADS, length, DIM)
        positions = torch.arange(length, device="cuda")
        sdpa("attention", f"dense {length}", randn(1, HEADS, length, DIM), k, v, is_causal=True)
        some = positions[torch.rand(length, device="cuda") < 0.15]
        for name, rows in ((f"last quarter of {length}", positions[-length // 4:]), (f"15 % of {length}", some)):
            mask = positions[None, :] <= rows[:, None]
            sdpa("attention", name, randn(1, HEADS, len(rows), DIM), k, v, attn_mask=mask)


def hydragen(q, prefix, own):
    """Prefix over all rows of a kv head at once, own keys row by row; merged by log-sum-exp."""
    def part(queries, k, v):
        scores = torch.matmul(queries, k.transpose(-1, -2)).float() * DIM**-0.5
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        return torch.matmul(torch.exp(scores - lse).to(v.dtype), v).float(), lse

    agents, group = q.shape[0], HEADS // KV_HEADS
    grouped = q.view(agents, KV_HEADS, group, DIM)
    folded = grouped.transpose(0, 1).reshape(KV_HEADS, agents * group, DIM)
    out_a, lse_a = part(folded, *prefix)
    back = (KV_HEADS, agents, group)
    out_a = out_a.view(*back, DIM).transpose(0, 1)
    lse_a = lse_a.view(*back, 1).transpose(0, 1)
    out_b, lse_b = part(grouped, *own)
    weight = torch.sigmoid(lse_a - lse_b)
    return (weight * out_a + (1 - weight) * out_b).to(q.dtype)


def decode():
    agents, prefix, own = 32, 8192, 256
    q = randn(agents, HEADS, 1, DIM)
    size = f"{agents} agents, {prefix} + {own}"
    shared = [randn(KV_HEADS, prefix, DIM) for _ in range(2)]
    private = [randn(agents, KV_HEADS, own, DIM) for _ in range(2)]
    report("decode", f"shared, {size}", "hydragen in torch", lambda: hydragen(q[:, :, 0], shared, private))
    k, v = (torch.cat([s.expand(agents, -1, -1, -1), p], dim=2) for s, p in zip(shared, private))
    for how in ("shared", "same pages", "copies"):
        sdpa("decode", f"{how}, {size}", q, k, v)


def main():
    torch.manual_seed(1)
    parts = {"gemm": gemm, "attention": attention, "decode": decode}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
