"""A local stand-in of the Hub's HTTP API, for the real `huggingface_hub` code to talk to."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by id, each a folder; `gated` ones answer 403. Remembers what was fetched."""

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.repositories = repositories
        self.gated = gated
        self.fetched: list[str] = []
        self.url = ""

    def files(self, repository: str) -> list[str]:
        root = self.repositories[repository]
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


@contextmanager
def serve(hub: Hub):
    """Serves the hub on a free loopback port while the context is open."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        if repository not in self.hub.repositories:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        if repository in self.hub.gated and not is_api:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        if is_api and rest[:1] == ["tree"]:
            return self._send_json(self._tree(repository), with_body)
        if is_api:
            siblings = [{"rfilename": name} for name in self.hub.files(repository)]
            return self._send_json(
                {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings},
                with_body,
            )
        return self._send_file(repository, "/".join(rest[2:]), with_body)

    def _tree(self, repository: str) -> list[dict[str, object]]:
        root = self.hub.repositories[repository]
        return [
            {"type": "file", "path": name, "size": (root / name).stat().st_size, "oid": "0" * 40}
            for name in self.hub.files(repository)
        ]

    def _send_file(self, repository: str, name: str, with_body: bool) -> None:
        path = self.hub.repositories[repository] / name
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        data = path.read_bytes()
        if with_body:
            self.hub.fetched.append(name)
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        return self._send(200, data, headers, with_body)

    def _send_json(self, value: object, with_body: bool) -> None:
        headers = {"Content-Type": "application/json"}
        self._send(200, json.dumps(value).encode(), headers, with_body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)
