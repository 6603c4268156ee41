"""A few answers of Kaggle's server over HTTP, for the official client itself: which
``KAGGLE_API_ENVIRONMENT=LOCALHOST`` sends to port 80 (its TEST, port 7777, is known to the SDK alone)."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PORT = 80
ADDRESS = "http://localhost"


class Server:
    """Keeps what it was asked; ``answers`` replace its own by request name, with a status other than 200 as a pair."""

    def __init__(self):
        self.asked: list[tuple[str, dict]] = []
        self.answers: dict[str, dict] = {}
        self.datasets: dict[str, int] = {}
        self.kernels: dict[str, dict] = {}
        self.files: dict[str, str] = {}
        self.signature = "0a1b2c3d"
        self._http = ThreadingHTTPServer(("localhost", PORT), self._handler())

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def answer(self, name: str, content: dict) -> tuple[int, dict]:
        """Status and body of a request."""
        self.asked.append((name, content))
        if name in self.answers:
            return self.answers[name] if isinstance(self.answers[name], tuple) else (200, self.answers[name])
        return getattr(self, f"_{name}")(content)

    def file(self, path: str) -> tuple[int, str]:
        """Status and text of an output file, by name and signature."""
        name, _, signature = path.partition("?Signature=")
        return (200, self.files[name]) if signature == self.signature else (403, "<Error>the signature has expired</Error>")

    def _IntrospectToken(self, content):
        return 200, {"active": True, "username": "anna"}

    def _GetDatasetStatus(self, content):
        name = f"{content['ownerSlug']}/{content['datasetSlug']}"
        if name not in self.datasets:
            return 404, {"code": 404, "message": "Dataset not found"}
        return 200, {"status": "READY"}

    def _GetDataset(self, content):
        return 200, {"currentVersionNumber": self.datasets[f"{content['ownerSlug']}/{content['datasetSlug']}"]}

    def _StartBlobUpload(self, content):
        return 200, {"token": content["name"], "createUrl": f"{ADDRESS}/upload/{content['name']}"}

    def _CreateDataset(self, content):
        self.datasets[f"{content['ownerSlug']}/{content['slug']}"] = 1
        return 200, {"status": "ok", "url": f"{ADDRESS}/datasets/x"}

    def _CreateDatasetVersion(self, content):
        self.datasets[f"{content['ownerSlug']}/{content['datasetSlug']}"] += 1
        return 200, {"status": "ok", "url": f"{ADDRESS}/datasets/x"}

    def _SaveKernel(self, content):
        self.kernels[content["slug"]] = content
        return 200, {"versionNumber": 1, "url": f"https://www.kaggle.com/code/{content['slug']}"}

    def _GetKernelSessionStatus(self, content):
        if f"{content['userName']}/{content['kernelSlug']}" not in self.kernels:
            return 404, {"code": 404, "message": "Not found"}
        return 200, {"status": "COMPLETE"}

    def _ListKernelSessionOutput(self, content):
        files = [{"fileName": name, "url": f"{ADDRESS}/files/{name}?Signature=0a1b2c3d"} for name in self.files]
        return 200, {"files": files, "log": "[]"}

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                self._send(*server.answer(self.path.rpartition("/")[2], body))

            def do_PUT(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._send(200, {})

            def do_GET(self):
                self._send(*server.file(self.path.removeprefix("/files/")))

            def _send(self, status, content):
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        return Handler
