"""A stand-in for the Hugging Face Hub: one model, served by the calls that huggingface_hub makes."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMIT = "a" * 40


@contextmanager
def serve(hub_id: str, folder: Path, wrong: dict[str, bytes] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of a folder as a model of the Hub; gives its address, and the paths of the files it was asked
    for. wrong: other bytes that are sent for a file, while its digest stays."""
    asked: list[str] = []
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    large = {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if not name.endswith("json")}

    def entry(name: str) -> dict:
        size = {"size": len(files[name])}
        if name not in large:
            return size
        return {**size, "lfs": {**size, "sha256": large[name], "oid": large[name], "pointerSize": 100}}

    information = {
        "_id": "1",
        "id": hub_id,
        "modelId": hub_id,
        "sha": COMMIT,
        "siblings": [{"rfilename": name, "blobId": "b" * 40, **entry(name)} for name in files],
    }
    tree = [{"type": "file", "path": name, "oid": "b" * 40, **entry(name)} for name in files]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool):
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{hub_id}"):
                self.send(json.dumps(tree if "/tree/" in path else information).encode(), body, {})
            elif path.startswith(f"/{hub_id}/resolve/") and (name := path.split("/", 5)[5]) in files:
                if body:
                    asked.append(name)
                etag = large.get(name, hashlib.sha1(files[name]).hexdigest())
                self.send((wrong or {}).get(name, files[name]), body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send(self, content: bytes, body: bool, headers: dict[str, str]):
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
