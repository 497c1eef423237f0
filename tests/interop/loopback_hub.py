"""A hub on the loopback: what huggingface_hub asks of one with a single repository, whose files lie in a directory."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def loopback_hub(files: Path, repository: str) -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and of each file how many bytes were sent."""
    sent: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            path = urlsplit(self.path).path
            if path.startswith(f"/api/models/{repository}/tree/"):
                found = [dict(type="file", path=f.name, size=f.stat().st_size, oid=f"{f.name}-1") for f in here()]
                return self.answer(json.dumps(found).encode(), body)
            if path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": f.name} for f in here()]
                return self.answer(json.dumps(dict(id=repository, sha=COMMIT, siblings=siblings)).encode(), body)
            file = files / path.rpartition("/")[2]
            if not path.startswith(f"/{repository}/resolve/") or not file.is_file():
                return self.answer(b"{}", body, 404)
            self.file(file, body)

        def file(self, file: Path, body: bool) -> None:
            content, code, more = file.read_bytes(), 200, {}
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                end = min(int(last or len(content)), len(content) - 1) + 1
                code, more = 206, {"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"}
                content = content[int(first) : end]
            if body:
                sent[file.name] += len(content)
            self.answer(content, body, code, {"ETag": f'"{file.name}-1"', "X-Repo-Commit": COMMIT, **more})

        def answer(self, content: bytes, body: bool, code: int = 200, more: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **(more or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    def here() -> list[Path]:
        return sorted(file for file in files.iterdir() if file.is_file())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
