"""`lrface serve` at saturation, asked by a second process. Writes eval/results/serve_load.json.

Starts the server in a process of its own, and clients in another: so many connections, each of which sends its next
question as soon as the last one is answered. Questions are a mix of /embed (aligned crops), /compare, and /embed of a
photograph. Every 5 seconds the server's memory is noted. In the end: answers a second, p50 and p99 of each kind of
question, everything that was no 200, and whether memory is flat: the median of the last third of the run at most
FLAT per cent above that of the middle third.

    python eval/serve_load.py --model ../shared/oracle/mobilefacenet_ms1m.onnx --minutes 15
"""

import argparse
import http.client
import io
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lrface.data.synthetic import SyntheticFaces
from lrface.errors import LrfaceError, errors_for_users
from lrface.files import write_json
from lrface.progress import progress
from lrface.train.record import lrface_commit

RESULTS = Path(__file__).resolve().parent / "results" / "serve_load.json"
FLAT = 3.0
SHARES = {"embed": 0.70, "compare": 0.27, "photograph": 0.03}


def form(*parts: tuple[str, bytes]) -> tuple[bytes, dict[str, str]]:
    boundary = uuid.uuid4().hex
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in parts
    )
    return body + f"--{boundary}--\r\n".encode(), {
        "Content-Type": f"multipart/form-data; boundary={boundary}"
    }


def questions(seed: int) -> dict[str, list[tuple[str, bytes, dict[str, str]]]]:
    """Kind -> questions of it (path, body, headers)."""
    faces = SyntheticFaces(24, 2)
    crops = []
    for number in range(len(faces)):
        file = io.BytesIO()
        Image.fromarray(faces.image(number)).save(file, "JPEG", quality=92)
        crops.append(file.getvalue())
    pick = random.Random(seed)
    photograph = files("matplotlib").joinpath("mpl-data/sample_data/grace_hopper.jpg").read_bytes()
    pairs = [pick.sample(crops, 2) for _ in range(48)]
    return {
        "embed": [("/embed?kind=crop", *form(("image", crop))) for crop in crops],
        "compare": [("/compare?kind=crop", *form(("first", a), ("second", b))) for a, b in pairs],
        "photograph": [("/embed?kind=photo", *form(("image", photograph)))],
    }


def ask_until(
    end: float, address: str, seed: int, kinds: dict[str, list[Any]], found: dict[str, Any]
) -> None:
    """One connection: questions until the time is over."""
    pick = random.Random(seed)
    connection = http.client.HTTPConnection(address, timeout=120)
    while time.time() < end:
        kind = pick.choices(list(SHARES), list(SHARES.values()))[0]
        path, body, headers = pick.choice(kinds[kind])
        started = time.perf_counter()
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            status = str(answer.status)
            if answer.status == 200 and not content.startswith(b"{"):
                status = "200 without an answer"
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
            connection.close()
        found["seconds"][kind].append(time.perf_counter() - started)
        found["statuses"][status] += 1


def client(url: str, connections: int, seconds: float) -> dict[str, Any]:
    """The second process: asks over so many connections at once; gives latencies and statuses."""
    kinds = questions(0)
    found = [{"seconds": {kind: [] for kind in SHARES}, "statuses": Counter()} for _ in range(connections)]
    print("asking", flush=True)
    begun = time.time()
    threads = [
        threading.Thread(
            target=ask_until,
            args=(begun + seconds, url.removeprefix("http://"), number, kinds, found[number]),
        )
        for number in range(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.time() - begun
    statuses: Counter[str] = sum((each["statuses"] for each in found), Counter())
    rows = []
    for kind in SHARES:
        milliseconds = np.array([each for one in found for each in one["seconds"][kind]]) * 1000
        if len(milliseconds):
            rows.append(
                {
                    "question": kind,
                    "answers": len(milliseconds),
                    "per_second": round(len(milliseconds) / taken, 2),
                    **{
                        f"p{share}_ms": round(float(np.percentile(milliseconds, share)), 1)
                        for share in (50, 90, 99)
                    },
                    "max_ms": round(float(milliseconds.max()), 1),
                }
            )
    return {"rows": rows, "statuses": dict(statuses), "seconds": round(taken, 1)}


def resident(pid: int) -> float:
    """Memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LrfaceError(f"process {pid} has no memory: it has ended")


def measure(model: str, minutes: float, connections: int, threads: int | None, port: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "lrface.cli", "serve", model, "--port", str(port), "--json"]
    command += ["--device", "cpu"] + ([] if threads is None else ["--threads", str(threads)])
    with open(os.devnull, "w") as nowhere:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=nowhere, text=True)
    assert server.stdout is not None
    said = server.stdout.readline()
    if not said:
        raise LrfaceError(f"the server did not start; run it by itself to see why: {' '.join(command)}")
    url = json.loads(said)["url"]
    asking = subprocess.Popen(
        [
            sys.executable,
            __file__,
            "--client",
            url,
            "--connections",
            str(connections),
            "--minutes",
            str(minutes),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert asking.stdout is not None
    asking.stdout.readline()
    memory: list[float] = []
    interval = min(5.0, 60 * minutes / 20)
    try:
        with progress(round(60 * minutes / interval), "load", unit="samples") as bar:
            while asking.poll() is None:
                memory.append(round(resident(server.pid), 1))
                time.sleep(interval)
                bar.advance()
        output, _ = asking.communicate()
        if asking.returncode:
            raise LrfaceError(f"the clients failed with exit code {asking.returncode}")
        found = json.loads(output)
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    finally:
        asking.kill()
        server.send_signal(signal.SIGTERM)
        stopped = server.wait(90)
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    batches = float(numbers["lrface_batch_images_count"])
    third = len(memory) // 3
    middle, last = (statistics.median(part) for part in (memory[third : 2 * third], memory[2 * third :]))
    growth = 100 * (last / middle - 1)
    errors = sum(count for status, count in found["statuses"].items() if status != "200")
    return {
        "minutes": minutes,
        "connections": connections,
        "rows": found["rows"],
        "requests": sum(found["statuses"].values()),
        "requests_per_second": round(sum(found["statuses"].values()) / found["seconds"], 2),
        "statuses": found["statuses"],
        "errors": errors,
        "images_per_batch": round(float(numbers["lrface_batch_images_sum"]) / batches, 2),
        "memory_mib": {
            "begin": memory[0],
            "middle_third": round(middle, 1),
            "last_third": round(last, 1),
            "growth_percent": round(growth, 2),
            "flat": growth <= FLAT,
            "every_seconds": interval,
            "samples": memory,
        },
        "exit_code_after_sigterm": stopped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="as for lrface serve")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--threads", type=int, help="CPU threads of the network; default: its library's")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        print(json.dumps(client(given.client, given.connections, 60 * given.minutes)))
        return
    if not given.model:
        parser.error("--model is needed")
    started = time.monotonic()
    found = measure(given.model, given.minutes, given.connections, given.threads, given.port)
    write_json(
        given.out,
        {
            "table": "lrface serve at saturation, asked by a second process",
            "command": " ".join(["python", "eval/serve_load.py", *sys.argv[1:]]),
            "commit": lrface_commit(),
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_version()}",
            "seconds": round(time.monotonic() - started, 1),
            "model": Path(given.model).name,
            **found,
        },
    )
    memory = found["memory_mib"]
    print(
        f"{found['requests']} requests, {found['requests_per_second']}/s, {found['errors']} errors; "
        f"{found['images_per_batch']} images a batch; memory {memory['begin']} -> {memory['last_third']} MiB "
        f"({memory['growth_percent']:+} % over the last third)"
    )
    for row in found["rows"]:
        print(
            f"  {row['question']:<11} {row['per_second']:>7}/s  p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms"
        )
    if found["errors"] or not memory["flat"]:
        raise LrfaceError(f"not what was wanted: {found['statuses']}, memory {memory['growth_percent']:+} %")


if __name__ == "__main__":
    with errors_for_users():
        main()
