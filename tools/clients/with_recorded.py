"""What open-webui sends, as its source code has it (commit 02530d50): no package to install."""

from __future__ import annotations

import json
import urllib.request
import uuid

from operations import check_image, make_photo, server, tell

PROMPT = "a big red circle on a blue background at the left"
HEADERS = {"Authorization": "Bearer none"}


def post(path: str, body: bytes, content_type: str) -> dict:
    headers = {**HEADERS, "Content-Type": content_type}
    request = urllib.request.Request(f"{server()}/v1{path}", body, headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.load(answer)


def list_models() -> None:
    request = urllib.request.Request(f"{server()}/v1/models", headers=HEADERS)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        assert "demo:outline" in {model["id"] for model in json.load(answer)["data"]}


def generate() -> None:
    body = {"model": "demo", "prompt": PROMPT, "n": 1, "size": "64x64"}
    text = json.dumps({**body, "response_format": "b64_json"}).encode()
    answer = post("/images/generations?api-version=2026-01-01", text, "application/json")
    check_image(answer["data"][0]["b64_json"])


def edit(name: str = "image") -> None:
    boundary = uuid.uuid4().hex
    fields = {
        "model": "demo",
        "prompt": PROMPT,
        "n": "1",
        "size": "64x64",
        "response_format": "b64_json",
        "background": "auto",
    }
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in fields.items()
    ]
    head = f'Content-Disposition: form-data; name="{name}"; filename="image.png"'
    parts.append(f"--{boundary}\r\n{head}\r\nContent-Type: image/png\r\n\r\n".encode())
    body = b"".join([*parts, make_photo(), f"\r\n--{boundary}--\r\n".encode()])
    answer = post("/images/edits", body, f"multipart/form-data; boundary={boundary}")
    check_image(answer["data"][0]["b64_json"])


def edit_list() -> None:
    edit("image[]")


if __name__ == "__main__":
    for operation, work in {
        "models": list_models,
        "generate": generate,
        "edit": edit,
        "edit of a list": edit_list,
    }.items():
        tell("open-webui (its calls)", operation, work)
