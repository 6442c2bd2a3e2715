"""A local HTTP server with the part of the Hugging Face hub's protocol that uploading needs.

It does not replace the library huggingface_hub, which the tests run unchanged against this server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_for_tests"


class FakeHub:
    """Repositories of files, which requests create and fill.

    Attributes:
        refuse: {part of a path: (status, message)}; requests whose path has this part are refused.
        repositories: {id: {branch: {name of a file: bytes}}}.
        created: (id, private) of each request to create a repository; private is None if the request does not say.
        commits: (id, branch, message) of each commit.
    """

    def __init__(self):
        self.refuse: dict[str, tuple[int, str]] = {}
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.created: list[tuple[str, bool | None]] = []
        self.commits: list[tuple[str, str, str]] = []
        self._objects: dict[str, bytes] = {}

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            def answer(self, path: str, body: bytes) -> tuple[int, object]:
                return hub._answer(self.command, path, body, self.headers)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def download(self, repo_id: str, folder: Path, branch: str = "main") -> Path:
        """Write the files of a branch into a new folder."""
        folder.mkdir()
        for name, content in self.repositories[repo_id][branch].items():
            (folder / name).write_bytes(content)
        return folder

    def _answer(self, method: str, path: str, body: bytes, headers) -> tuple[int, object]:
        for part, (status, words) in self.refuse.items():
            if part in path:
                return status, {"error": words, "errors": [{"message": words}]}
        if path.startswith("/objects/"):  # an address from the batch API, which needs no token, as on the hub
            self._objects[path.rpartition("/")[2]] = body
            return 200, {}
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        if path.startswith("/api/models/"):
            owner, name, action, *branch = [*path.removeprefix("/api/models/").split("/"), ""]
            return self._model(f"{owner}/{name}", action, "/".join(branch).strip("/"), body)
        return 404, {"error": f"Entry not found: {method} {path}"}

    def _create(self, asked: dict) -> tuple[int, object]:
        repo_id = f"{asked.get('organization', 'me')}/{asked['name']}"
        visibility = {"private": True, "public": False, None: None}[asked.get("visibility")]
        self.created.append((repo_id, asked.get("private", visibility)))  # versions of the client use either key
        status = 409 if repo_id in self.repositories else 200
        self.repositories.setdefault(repo_id, {"main": {}})
        return status, {"url": f"{self.url}/{repo_id}"}

    def _batch(self, asked: dict) -> dict:
        objects = []
        for entry in asked["objects"]:
            upload = {"href": f"{self.url}/objects/{entry['oid']}", "header": {}}
            objects.append({**entry, "actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def _model(self, repo_id: str, action: str, branch: str, body: bytes) -> tuple[int, object]:
        if repo_id not in self.repositories:
            return 404, {"error": "Repository not found"}
        branches = self.repositories[repo_id]
        if not action:
            return 200, {"id": repo_id}
        if action == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return 200, {}
        if branch not in branches:
            return 404, {"error": f"Invalid rev id: {branch}"}
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith((".safetensors", ".png")) else "regular" for file in files]
            answers = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
                for file, mode in zip(files, modes, strict=True)
            ]
            return 200, {"files": answers}
        if action == "commit":
            return 200, self._commit(repo_id, branch, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"Entry not found: {action}"}

    def _commit(self, repo_id: str, branch: str, lines: list[dict]) -> dict:
        files = self.repositories[repo_id][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((repo_id, branch, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self._objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            else:
                raise AssertionError(f"unknown line of a commit: {line['key']}")
        oid = f"{len(self.commits):040x}"
        return {"commitUrl": f"{self.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, path: str, body: bytes) -> tuple[int, object]:
        raise NotImplementedError

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, content = self.answer(self.path.partition("?")[0], body)
        data = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _respond

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""
