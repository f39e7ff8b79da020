"""A Hub on loopback that the real clients talk to: models and data sets in memory, and faults at its endpoints.

`Hub.faults` maps an endpoint ("create", "info", "refs", "tree", "resolve", "yaml", "preupload", "lfs", "put",
"verify", "commit", "branch", "tag", "pulls") to a list of faults to play in turn: a status ("500", "429", "403"),
"reset" (nothing is done), "lost" (it is done, the answer is not sent), "timeout" (it is done, nobody answers).
"""

import base64
import hashlib
import json
import os
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote


TOKEN = "hf_loopback"
READER = "hf_loopback_reader"  # of the same user, without the right to write
# Of every token: its user, and the owners whose repositories it may write to.
USERS = {TOKEN: ("user", {"user", "team"}), READER: ("user", set())}
LFS = (".parquet", ".safetensors", ".png")


class Refused(Exception):
    """A request that ends with an error."""

    def __init__(self, status, message, code=None, commit=None):
        self.status, self.message, self.code, self.commit = status, message, code, commit


class Repo:
    """Commits are (sha, {path: bytes}), in order; branches, tags and pull requests name them."""

    def __init__(self, private):
        self.private, self.gated = private, False
        self.commits, self.tags, self.pulls = [], {}, []
        self.branches = {"main": self.add({".gitattributes": b"*.parquet filter=lfs"})}

    def add(self, files):
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, dict(files)))
        return sha

    def head(self, revision):
        revision = unquote(revision or "main")
        if match := re.fullmatch(r"refs/pr/(\d+)", revision):
            return self.pulls[int(match[1]) - 1]["sha"]
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in dict(self.commits):
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def files(self, revision="main"):
        return dict(self.commits)[self.head(revision)]


class Hub:
    """Holds `repos`: ("models" or "datasets", name) -> `Repo`. `seen` lists the endpoints or paths, in order."""

    def __init__(self):
        self.repos, self.blobs, self.verified, self.faults, self.seen = {}, {}, set(), {}, []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        """The variables by which another process talks to this Hub, its caches in the folder `home`."""
        ours = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        return {**os.environ, **ours, **quiet, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def repo(self, name, kind="datasets"):
        return self.repos[kind, name]

    def files(self, name, kind="datasets", revision="main"):
        """What a push has written in a revision."""
        return {path: data for path, data in self.repo(name, kind).files(revision).items() if path != ".gitattributes"}


@contextmanager
def in_this_process(monkeypatch):
    """Yield a Hub; nobody waits between attempts, and no token of the machine is used."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with Hub() as hub:
        yield hub


@contextmanager
def as_default(monkeypatch):
    """Yield the same as the Hub that is asked where no other is named, with the right to write."""
    with in_this_process(monkeypatch) as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    retry_after = "0"
    damage = staticmethod(lambda data: data)
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: two wait for each other's acknowledgement, 40 ms each
    disable_nagle_algorithm = True
    # Method, path, endpoint: the endpoint's method of this class gets the path's groups and the body.
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("POST", r"/api/validate-yaml", "yaml"),
        ("POST", r"/(?:(datasets)/)?(.+?)\.git/info/lfs/objects/batch", "lfs"),
        ("PUT", r"/blob/(\w+)", "put"),
        ("POST", r"/verify", "verify"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/tag/([^/]+)", "tag"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", "paths"),
        ("POST", r"/api/(models|datasets)/([^/]+/[^/]+)/discussions/(\d+)/merge", "merge"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/discussions", "pulls"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *args):
        pass

    def do_GET(self):
        method = "GET" if self.command == "HEAD" else self.command
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = None
        for verb, pattern, endpoint in self.routes:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                return self.play(endpoint, match.groups(), body)
        self.hub.seen.append(path)
        return self.answer(404, {"error": f"No such page: {path}"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def play(self, endpoint, groups, body):
        """Answer a request, or play the next fault planned for its endpoint."""
        with self.hub.lock:
            self.hub.seen.append(endpoint)
            planned = self.hub.faults.get(endpoint) or []
            self.fault = planned.pop(0) if planned else None
        if self.fault == "reset":
            return self.hang_up()
        if self.fault and self.fault.isdigit():
            return self.answer(int(self.fault), b"<html>fault</html>", {"Retry-After": self.retry_after})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.writes = USERS.get(token, (None, set()))
        try:
            if token and token not in USERS:
                raise Refused(401, "Invalid credentials in Authorization header")
            with self.hub.lock:
                answer = getattr(self, endpoint)(*groups, body)
        except Refused as refused:
            error = {
                "X-Error-Message": refused.message, "X-Error-Code": refused.code, "X-Repo-Commit": refused.commit
            }  # fmt: skip
            told = {name: value for name, value in error.items() if value}
            return self.answer(refused.status, {"error": refused.message}, told)
        return self.answer(*answer)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def answer(self, status, body=b"", headers=()):
        if self.fault == "timeout":
            self.connection.settimeout(20)
            self.connection.recv(1)  # until the client gives up
        if self.fault in ("lost", "timeout"):
            return self.hang_up()
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reach(self, kind, name, write=False, read=False):
        """The repository, if this user may do this with it."""
        repo = self.hub.repos.get((kind or "models", name))
        if repo is None or (repo.private and self.user is None):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if (write or repo.private) and self.user is None:
            raise Refused(401, "Invalid username or password.")
        if write and name.split("/")[0] not in self.writes:
            raise Refused(403, "Forbidden: you must use a token with write access.")
        if read and repo.gated and name.split("/")[0] not in self.writes:
            raise Refused(403, f"Access to {name} is restricted.", "GatedRepo")
        return repo

    def url(self, kind, name):
        return f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"

    def whoami(self, body):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return 200, {"type": "user", "name": self.user, "orgs": []}

    def create(self, body):
        body = json.loads(body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        kind, owner = body.get("type", "model") + "s", body.get("organization") or self.user
        name = f"{owner}/{body['name']}"
        if owner not in self.writes:
            raise Refused(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        url = {"url": self.url(kind, name), "name": name, "id": name}
        if (kind, name) in self.hub.repos:
            return 409, {**url, "error": "You already created this repo"}
        self.hub.repos[kind, name] = Repo(body.get("visibility") == "private")
        return 200, url

    def delete(self, body):
        body = json.loads(body)
        kind, name = body.get("type", "model") + "s", f"{body.get('organization') or self.user}/{body['name']}"
        self.reach(kind, name, write=True)
        del self.hub.repos[kind, name]
        return (200,)

    def yaml(self, body):
        if "\t" in json.loads(body)["content"]:
            return 400, {"errors": [{"message": "a tab in YAML"}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def preupload(self, kind, name, revision, body):
        repo = self.reach(kind, name, write="create_pr" not in self.query)
        held = {path: entry(path, data) for path, data in repo.files(revision).items()}
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            known = held.get(path, {})
            oid = known.get("lfs", {}).get("oid") or known.get("oid")
            mode = "lfs" if path.endswith(LFS) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def lfs(self, kind, name, body):
        self.reach(kind, name)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.url}/blob/{item['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify"}}
            known = item["oid"] in self.hub.verified
            objects.append({"oid": item["oid"], "size": item["size"], **({} if known else {"actions": actions})})
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def put(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "The hash is another")
        self.hub.blobs[oid] = body
        return (200,)

    def verify(self, body):
        oid = json.loads(body)["oid"]
        if oid not in self.hub.blobs:
            raise Refused(404, "No such blob")
        self.hub.verified.add(oid)
        return 200, {}

    def commit(self, kind, name, revision, body):
        pulled = "create_pr" in self.query
        repo = self.reach(kind, name, write=not pulled)
        header, *lines = [json.loads(line) for line in body.splitlines()]
        revision = unquote(revision)
        if header["value"].get("parentCommit") not in (None, repo.head(revision)):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(revision))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.damage(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.damage(self.hub.blobs[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.add(files)
        answer = {"commitUrl": f"{self.url(kind, name)}/commit/{sha}", "commitOid": sha, "hookOutput": ""}
        if pulled:
            repo.pulls.append({"sha": sha, "title": header["value"]["summary"], "status": "open"})
            answer["pullRequestUrl"] = f"{self.url(kind, name)}/discussions/{len(repo.pulls)}"
        elif match := re.fullmatch(r"refs/pr/(\d+)", revision):
            repo.pulls[int(match[1]) - 1]["sha"] = sha
        else:
            repo.branches[revision] = sha
        return 200, answer

    def branch(self, kind, name, branch, body):
        repo, branch = self.reach(kind, name, write=True), unquote(branch)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.head(json.loads(body or b"{}").get("startingPoint"))
        return (200,)

    def tag(self, kind, name, revision, body):
        repo, tag = self.reach(kind, name, write=True), json.loads(body)["tag"]
        if tag in repo.tags:
            raise Refused(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.head(revision)
        return (200,)

    def refs(self, kind, name, body):
        repo = self.reach(kind, name)

        def refs(folder, found):
            return [{"name": key, "ref": f"refs/{folder}/{key}", "targetCommit": sha} for key, sha in found.items()]

        return 200, {"branches": refs("heads", repo.branches), "tags": refs("tags", repo.tags), "converts": []}

    def pulls(self, kind, name, body):
        pulls = [
            {
                "num": number,
                "title": pull["title"],
                "status": pull["status"],
                "isPullRequest": True,
                "createdAt": "2026-01-01T00:00:00.000Z",
                "author": {"name": "user"},
                "repo": {"name": name, "type": kind[:-1]},
            }
            for number, pull in enumerate(self.reach(kind, name).pulls, 1)
            if pull["status"] in self.query.get("status", ["open"])
        ]
        return 200, {"discussions": pulls, "count": len(pulls), "start": 0}

    def merge(self, kind, name, number, body):
        repo = self.reach(kind, name, write=True)
        pull = repo.pulls[int(number) - 1]
        pull["status"], repo.branches["main"] = "merged", pull["sha"]
        return 200, {}

    def info(self, kind, name, revision, body):
        repo = self.reach(kind, name)
        siblings = [{"rfilename": path} for path in sorted(repo.files(revision))]
        facts = {"id": name, "private": repo.private, "gated": repo.gated, "tags": [], "siblings": siblings}
        return 200, {**facts, "sha": repo.head(revision)}

    def tree(self, kind, name, revision, folder, body):
        files = self.reach(kind, name, read=True).files(revision)
        prefix = f"{unquote(folder)}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(prefix)}
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = [entry(path, inside[path]) for path in sorted(inside) if deep or "/" not in path[len(prefix) :]]
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        if prefix and not entries:
            raise Refused(404, "No such folder", "EntryNotFound")
        return 200, entries

    def paths(self, kind, name, revision, body):
        files = self.reach(kind, name, read=True).files(revision)
        asked = parse_qs(body.decode())["paths"] if b"=" in body else json.loads(body)["paths"]
        return 200, [entry(path, files[path]) for path in asked if path in files]

    def resolve(self, kind, name, revision, path, body):
        repo, path = self.reach(kind or "models", name, read=True), unquote(path)
        sha, files = repo.head(revision), repo.files(revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound", sha)
        data, facts = files[path], entry(path, files[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{facts["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in facts:
            headers |= {"X-Linked-ETag": f'"{facts["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            return 206, data[start : end + 1], headers
        return 200, data, headers


def entry(path, data):
    """What the Hub tells of a file: its size and git's hash, of an LFS file also the content's own."""
    facts = {"type": "file", "path": path, "size": len(data)}
    if path.endswith(LFS):
        facts["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {**facts, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
