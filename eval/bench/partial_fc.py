"""Partial FC: memory and time of a step with 100,000 and a million identities, all classes against a sample of 10 %.

Embeddings of 128 numbers, batches of 64, CosFace, SGD with momentum, 2 threads; every case in a process of its own, whose
memory above that of the imports is read, and processor time, which other work on the machine disturbs less. The peer is
the same head with all classes and PyTorch's fused SGD. What ten million identities need, and embeddings of 512 numbers,
is computed from tensors on the meta device. The table of all cases goes to eval/results/partial_fc.json; the figure in
bench.json is steps a second with a million identities.
"""

import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lrface.files import write_json
from lrface.heads import PartialHead, build_head

NAMES = ["partial_fc"]
THREADS = 2
WIDTH, BATCH, SHARE, STEPS, WARM_UP = 128, 64, 0.1, 7, 2
IDENTITIES = (100_000, 1_000_000)
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results" / "partial_fc.json"

CASE = """
import json, resource, sys, time
import torch
from lrface.heads import build_head
identities, width, batch, share, steps, warm_up, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
torch.manual_seed(0)
weight = torch.randn(8, width, requires_grad=True)
torch.nn.functional.linear(torch.randn(batch, width), weight).sum().backward()  # what the first use of PyTorch takes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if share < 1:
    head = build_head("partial", width, identities, of="cosface", sample_share=share)
    optimiser = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    head.attach(optimiser)
else:
    head = build_head("cosface", width, identities)
    optimiser = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
seconds, work = [], []
for step in range(warm_up + steps):
    embeddings, labels = torch.randn(batch, width, requires_grad=True), torch.randint(identities, (batch,))
    started, busy = time.perf_counter(), time.process_time()
    optimiser.zero_grad()
    head.loss(embeddings, labels).loss.backward()
    optimiser.step()
    seconds.append(time.perf_counter() - started)
    work.append(time.process_time() - busy)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
middle = {"seconds": seconds, "work": work}
middle = {name: sorted(values[warm_up:])[steps // 2] for name, values in middle.items()}
print(json.dumps({**middle, "gib": (peak - before) / 2**20}))
"""


def measured(identities: int, share: float, steps: int) -> dict[str, Any]:
    settings = json.dumps([identities, WIDTH, BATCH, share, steps, WARM_UP, THREADS])
    found = json.loads(subprocess.check_output([sys.executable, "-c", CASE, settings]))
    return {
        "identities": identities,
        "embedding_size": WIDTH,
        "batch_size": BATCH,
        "sample_share": share,
        "ranks": 1,
        "kind": "measured",
        "seconds_per_step": round(found["seconds"], 4),
        "processor_seconds_per_step": round(found["work"], 4),
        "gib": round(found["gib"], 3),
    }


def computed(identities: int, width: int, batch: int, share: float, ranks: int) -> dict[str, Any]:
    """What a rank must hold at least: weights, momentum, the sample's gradient, its logits for the batch of all ranks."""
    with torch.device("meta"):
        head = build_head("partial", width, -(-identities // ranks), of="cosface", sample_share=share)
    assert isinstance(head, PartialHead)
    classes = round(share * len(head.weight))
    gradient = torch.empty(classes, width, device="meta")
    logits = torch.empty(batch, classes, device="meta")
    held = 2 * head.weight.nbytes + gradient.nbytes + logits.nbytes
    return {
        "identities": identities,
        "embedding_size": width,
        "batch_size": batch,
        "sample_share": share,
        "ranks": ranks,
        "kind": "computed",
        "gib": round(held / 2**30, 2),
        "gflop_per_step": round(6 * batch * classes * width / 1e9, 1),
    }


def run(quick: bool = False) -> list[dict[str, Any]]:
    began = time.perf_counter()
    sizes = [size // 10 for size in IDENTITIES] if quick else list(IDENTITIES)
    rows = [measured(size, share, 3 if quick else STEPS) for size in sizes for share in (1.0, SHARE)]
    rows += [
        computed(size, 512, batch, share, ranks)
        for size in (100_000, 1_000_000, 10_000_000)
        for ranks, batch in ((1, 128), (8, 1024))
        for share in (1.0, SHARE)
    ]
    whole, sampled = rows[2], rows[3]
    if not quick:
        spec = importlib.util.spec_from_file_location("lrface_bench_runner", ROOT / "eval" / "bench.py")
        assert spec is not None and spec.loader is not None
        runner = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(runner)
        write_json(
            RESULTS,
            {
                "table": "Partial FC: memory and time of a step of the classifier alone",
                "command": "make bench ONLY=partial_fc",
                "commit": runner.commit(),
                "config_sha256": None,
                "checkpoint_sha256": None,
                "data": "random embeddings and labels",
                "seeds": [0],
                "rows": rows,
                "seconds": round(time.perf_counter() - began),
                "machine": f"{platform.machine()}, {THREADS} threads, torch {torch.__version__}",
            },
        )
    ours, peer = 1 / sampled["seconds_per_step"], 1 / whole["seconds_per_step"]
    return [
        {
            "name": "partial_fc",
            "ours": round(ours, 3),
            "peer": round(peer, 3),
            "ratio": round(ours / peer, 2),
            "unit": f"steps/s, {whole['identities']:,} identities",
            "threads": THREADS,
            "processor_seconds": sampled["processor_seconds_per_step"],
            "peer_processor_seconds": whole["processor_seconds_per_step"],
            "gib": sampled["gib"],
            "peer_gib": whole["gib"],
        }
    ]
