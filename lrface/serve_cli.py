"""The commands `lrface serve` and `lrface ui`: parse, call, print."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lrface.errors import errors_for_users
from lrface.shipped import NAME as SHIPPED

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run of `lrface train`, a .safetensors, .onnx or .pt2 file, or module:function, as for `lrface embed`. "
        "Shipped: the model inside lrface.",
    ),
]
Host = Annotated[
    str, typer.Option("--host", help="Address to serve on; other machines reach all but loopback addresses.")
]
Port = Annotated[int, typer.Option("--port", help="0 takes a free one.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="File with the token that requests must bear; else $LRFACE_TOKEN."),
]
Anyone = Annotated[bool, typer.Option("--anyone", help="Serve other machines without a token, whoever asks.")]
GalleryPlace = Annotated[
    Path | None, typer.Option("--gallery", help="Folder of `lrface gallery` that /search looks in.")
]
MaxUpload = Annotated[float, typer.Option("--max-upload", help="Mebibytes of a request, at most.")]
MaxPixels = Annotated[float, typer.Option("--max-pixels", help="Megapixels of an image, at most.")]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds for a request.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
DetectorModel = Annotated[
    Path | None,
    typer.Option(
        "--detector-model", help="SCRFD or RetinaFace .onnx file that finds faces; default: MTCNN, included."
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of the network; default: its library's.")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="When it answers, print one JSON object with its url on standard output."),
]


def serve(
    model: Model = SHIPPED,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: TokenFile = None,
    anyone: Anyone = False,
    gallery: GalleryPlace = None,
    gallery_uri: Annotated[
        str | None, typer.Option("--gallery-uri", help="Milvus, where --gallery is a collection of it.")
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Images embedded together, at most.")] = 32,
    max_wait: Annotated[
        float, typer.Option("--max-wait", help="Milliseconds a lone image waits for others to join it.")
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Images in memory; above that requests get 503.")
    ] = 256,
    max_images: Annotated[int, typer.Option("--max-images", help="Images of a request, at most.")] = 16,
    max_upload: MaxUpload = 16.0,
    max_pixels: MaxPixels = 24.0,
    timeout: Timeout = 30.0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option("--precision", help="float32 or bfloat16.")] = "float32",
    detector_model: DetectorModel = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Answer /embed, /compare and, with --gallery, /search over HTTP until Ctrl-C or SIGTERM.

    What is in work then is finished first. /openapi.json describes everything; /health and /metrics (Prometheus) are there
    too. Images are neither stored nor logged. Needs: pip install 'lrface[serve]'.
    """
    with errors_for_users():
        from lrface.serve import Limits, run

        run(
            model,
            host=host,
            port=port,
            token_file=token_file,
            anyone=anyone,
            gallery=gallery,
            gallery_uri=gallery_uri,
            limits=Limits(
                batch=max_batch,
                wait=max_wait / 1000,
                queue=max_queue,
                images=max_images,
                upload=int(max_upload * (1 << 20)),
                pixels=int(max_pixels * 1_000_000),
                seconds=timeout,
            ),
            ready=lambda url: _ready(url, "serving", json_output),
            device=device,
            precision=precision,
            detector_model=detector_model,
            threads=threads,
        )


def ui(
    model: Model = SHIPPED,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: TokenFile = None,
    anyone: Anyone = False,
    max_upload: MaxUpload = 32.0,
    max_pixels: MaxPixels = 50.0,
    timeout: Timeout = 60.0,
    device: Device = "auto",
    detector_model: DetectorModel = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """A page for the browser: two photographs at every resolution, what the network sees, and its verdict.

    Drop two photographs and slide their resolutions: aligned faces, what the model's decoder draws of them (runs of
    QualNet), similarity against resolution, and whether it is one person. The page asks nothing of other machines. Needs:
    pip install 'lrface[ui]'.
    """
    with errors_for_users():
        from lrface.serve import Limits, run

        run(
            model,
            host=host,
            port=port,
            token_file=token_file,
            anyone=anyone,
            page=True,
            limits=Limits(
                upload=int(max_upload * (1 << 20)), pixels=int(max_pixels * 1_000_000), seconds=timeout
            ),
            ready=lambda url: _ready(url, "open", json_output),
            device=device,
            detector_model=detector_model,
            threads=threads,
        )


def _ready(url: str, what: str, json_output: bool) -> None:
    print(f"{what} {url} (Ctrl-C stops)", file=sys.stderr, flush=True)
    if json_output:
        print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)
