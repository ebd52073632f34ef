"""A local stand-in of the Hub's HTTP API, for the real `huggingface_hub` code to talk to.

It has branches, commits, redirects to a store of large files, ETags, ranges, and faults to order.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_right"
USER = "tester"
LARGE = ".safetensors"  # what a redirect leads to, as for files in LFS


class Hub:
    """Repositories by id, each a folder.

    `revisions` are folders for `"owner/name@revision"`. `gated` ones answer 403, `private` ones
    404, without the token. `faults` are used up one by one: for an end of a path, what the next
    requests for it get: a status, or `"cut"`: half the body. Remembers what was fetched.
    Repositories that are made by an upload lie in `new_folder`.
    """

    def __init__(self, repositories, gated=(), private=(), revisions=None, new_folder=None):
        self.repositories = dict(repositories)
        self.gated = gated
        self.private = private
        self.revisions = dict(revisions or {})
        self.faults: dict[str, list[int | str]] = {}
        self.fetched: list[str] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.more_names: list[str] = []
        self.url = ""
        self.new_folder = new_folder
        self.created: dict[str, dict] = {}

    def folder(self, repository: str, revision: str) -> Path | None:
        if revision in ("main", COMMIT):
            return self.repositories[repository]
        if revision == OTHER_COMMIT:
            revision = "v2"
        return self.revisions.get(f"{repository}@{revision}")

    def next_fault(self, path: str) -> int | str | None:
        for end, faults in self.faults.items():
            if path.endswith(end) and faults:
                return faults.pop(0)
        return None


@contextmanager
def serve(hub: Hub):
    """Serves the hub on a free loopback port while the context is open."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        """An upload of small files: make the repository, ask how to send each file, commit."""
        body = self._read_body()
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(("POST", self.path, {}))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}", {})
        fault = self.hub.next_fault(path)
        if isinstance(fault, int):
            return self._send(fault, b"{}", {})
        if path == "api/repos/create":
            return self._create(json.loads(body))
        repository = "/".join(path.split("/")[2:4])
        if "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._send_json({"files": files})
        assert "/commit/" in path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = self.hub.repositories[repository] / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"{self.hub.url}/{repository}/commit/{COMMIT}"
        return self._send_json({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def _create(self, wanted):
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name in self.hub.repositories:
            return self._send(409, b"{}", {})
        self.hub.repositories[name] = self.hub.new_folder / name
        self.hub.created[name] = wanted
        return self._send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def _read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *args):
        pass

    def _answer(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(
            (self.command, self.path, {key.lower(): value for key, value in self.headers.items()})
        )
        fault = self.hub.next_fault(path)
        if isinstance(fault, int):
            return self._send(fault, b"{}", {"Retry-After": "0"} if fault == 429 else {})
        parts = path.split("/")
        if parts[0] == "large":
            return self._send_large(Path("/", *parts[1:]), cut=fault == "cut")
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        if parts[0] in ("models", "datasets"):
            parts = parts[1:]
        return self._answer_repository("/".join(parts[:2]), parts[2:], is_api, fault == "cut")

    def _answer_repository(self, repository, rest, is_api, cut):
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not has_token:
            return self._send(401, b"{}", {"X-Error-Message": "Invalid credentials"})
        if repository in self.hub.private and not has_token:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repository not in self.hub.repositories:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = rest[1] if len(rest) > 1 else "main"
        folder = self.hub.folder(repository, revision)
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        commit = COMMIT if folder == self.hub.repositories[repository] else OTHER_COMMIT
        if repository in self.hub.gated and not is_api and not has_token:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        if is_api and rest[:1] == ["tree"]:
            return self._send_json([_entry(folder / name, name) for name in names])
        if is_api:
            siblings = [{"rfilename": name} for name in [*names, *self.hub.more_names]]
            info = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
            return self._send_json(info)
        return self._send_file(folder, "/".join(rest[2:]), commit, cut)

    def _send_file(self, folder, name, commit, cut):
        path = folder / name
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if name.endswith(LARGE):
            size = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{etag}"'}
            # Another host, as the Hub does it: the client follows with the next request only.
            place = self.hub.url.replace("127.0.0.1", "localhost")
            return self._send(302, b"", {**headers, **size, "Location": f"{place}/large{path}"})
        if self.command == "GET":
            self.hub.fetched.append(name)
        return self._send(200, path.read_bytes(), headers, cut=cut)

    def _send_large(self, path, cut):
        data = path.read_bytes()
        if self.command == "GET":
            self.hub.fetched.append(path.name)
        start = self.headers.get("Range", "")
        if not start.startswith("bytes="):
            return self._send(200, data, {"Accept-Ranges": "bytes"}, cut=cut)
        first = int(start.removeprefix("bytes=").split("-")[0])
        span = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        return self._send(206, data[first:], span, cut=cut)

    def _send_json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data, headers, cut=False):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True


def _entry(path, name):
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
