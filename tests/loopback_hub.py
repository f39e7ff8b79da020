"""A Hub on loopback that the real clients talk to: data set repositories in memory, and faults at its endpoints.

`Hub.faults` maps an endpoint ("create", "info", "tree", "preupload", "lfs", "put", "commit") to a list of faults to
play in turn: "500", "429", "reset" (nothing is done), "lost" (it is done, the answer is not sent).
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


TOKEN = "hf_loopback"


class Hub:
    """Holds `repos`: name -> list of revisions, each (sha, {path: bytes}); the last one is main."""

    def __init__(self):
        self.repos, self.blobs, self.faults, self.seen = {}, {}, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo):
        return self.repos[repo][-1][1]

    def revision(self, repo, name):
        revisions = self.repos[repo]
        return revisions[-1] if name in (None, "main") else next(r for r in revisions if r[0] == name)

    def commit(self, repo, files):
        sha = hashlib.sha1(f"{repo}{len(self.repos[repo])}{sorted(files)}".encode()).hexdigest()
        self.repos[repo].append((sha, files))
        return sha


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if self.lose:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fault(self, endpoint):
        """Play the next fault of an endpoint; true where the request ends with it."""
        self.hub.seen.append(endpoint)
        planned = self.hub.faults.get(endpoint) or []
        kind = planned.pop(0) if planned else None
        self.lose = kind == "lost"
        if kind == "reset":
            self.close_connection = True
            self.connection.close()
        elif kind in ("500", "429"):
            self.answer(int(kind), {"error": "fault"}, {"Retry-After": "0"})
        return kind in ("reset", "500", "429")

    def do_POST(self):
        self.lose = False
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        if self.path == "/api/repos/create":
            return self.create(json.loads(data))
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/datasets/(.+?)\.git/info/lfs/objects/batch", self.path):
            return None if self.fault("lfs") else self.lfs(json.loads(data))
        match = re.fullmatch(r"/api/datasets/(.+?)/(preupload|commit)/main", self.path.split("?")[0])
        if not match:
            return self.answer(404, {"error": self.path})
        repo, endpoint = match.groups()
        if self.fault(endpoint):
            return None
        if endpoint == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".parquet") else "regular"}
                for f in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        return self.commit(repo, [json.loads(line) for line in data.splitlines()])

    def create(self, body):
        if self.fault("create"):
            return
        repo = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        url = {"url": f"{self.hub.url}/datasets/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repos:
            return self.answer(409, {**url, "error": "exists"})
        self.hub.repos[repo] = []
        self.hub.commit(repo, {".gitattributes": b"*.parquet filter=lfs"})
        return self.answer(200, url)

    def lfs(self, body):
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/blob/{o['oid']}"}}}
            for o in body["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def commit(self, repo, lines):
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, self.hub.repos[repo][-1][0]):
            return self.answer(412, {"error": "A commit has happened since."})
        files = dict(self.hub.files(repo))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repo, files)
        return self.answer(
            200, {"commitUrl": f"{self.hub.url}/datasets/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""}
        )

    def do_PUT(self):
        self.lose = False
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.fault("put"):
            return None
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        return self.answer(200)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.lose = False
        path = self.path.split("?")[0]
        if match := re.fullmatch(r"/api/datasets/(.+?)/tree/([^/]+)(?:/(.*))?", path):
            return None if self.fault("tree") else self.tree(*match.groups())
        if match := re.fullmatch(r"/datasets/(.+?)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return None if self.fault("info") else self.info(*match.groups())
        return self.answer(404, {"error": path}, {"X-Error-Code": "EntryNotFound"})

    def info(self, repo, revision):
        if repo not in self.hub.repos:
            return self.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        sha, files = self.hub.revision(repo, revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        return self.answer(200, {"id": repo, "sha": sha, "siblings": siblings, "private": False, "tags": []})

    def tree(self, repo, revision, folder):
        _, files = self.hub.revision(repo, revision)
        prefix = f"{folder}/" if folder else ""
        entries = []
        for name, data in sorted(files.items()):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or ("/" in rest and "recursive=true" not in self.path.lower()):
                continue
            entries.append({"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
        inner = {
            name.removeprefix(prefix).split("/")[0]
            for name in files
            if name.startswith(prefix) and "/" in name[len(prefix) :]
        }
        entries += [{"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in sorted(inner)]
        if not entries:
            return self.answer(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, entries)

    def resolve(self, repo, revision, name):
        sha, files = self.hub.revision(repo, revision)
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = files[name]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            return self.answer(206, data[start : end + 1], headers)
        return self.answer(200, data, headers)
