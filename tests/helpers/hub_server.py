"""A Hub on this machine: the part of its HTTP API with which `huggingface_hub` makes, fills, lists and reads a model.

Large files (`LFS`) are uploaded and downloaded on their own, from another host name, as from the Hub's storage.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 30
LFS = (".safetensors", ".png")
REPO = r"(?P<repo>[^/]+/[^/]+)"

Files = dict[str, bytes]


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The repositories and what clients did.

    Attributes:
        commits: by repository, the files of each commit; the last one is `main`.
        private: repositories that only the owner of the token can read.
        objects: large files by SHA-256.
        downloads: paths of the downloaded files.
        cuts: how many downloads of large files break off in the middle of the file.
        broken: whether the storage of large files refuses uploads.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"
        self.commits: dict[str, list[Files]] = {}
        self.private: set[str] = set()
        self.objects: Files = {}
        self.downloads: list[str] = []
        self.cuts = 0
        self.broken = False

    def files(self, repo: str) -> Files:
        return self.commits[repo][-1]

    def create(self, repo: str, files: Files) -> None:
        self.commits[repo] = [{".gitattributes": b"*.safetensors filter=lfs"} | files]

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Refused(Exception):
    """An answer of the Hub that is an error: status, its code or message in a header, and a body."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: object) -> None:
        self.status, self.headers, self.body = status, {"X-Error-Code": code, "X-Error-Message": message}, body


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = b"".join(self.chunks()) if chunked else self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method and (found := re.fullmatch(pattern, path)):
                    return getattr(self, answer)(**found.groupdict())
            raise Refused(404, message=f"no such route: {self.command} {path}")
        except Refused as error:
            self.send(error.body, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send(self, content, status=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def has_token(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise Refused(401, message="Invalid credentials in Authorization header")
        return given is not None

    def require_token(self):
        if not self.has_token():
            raise Refused(401, message="Invalid username or password.")

    def commit_of(self, repo, revision="main") -> tuple[str, Files]:
        """Id and files of a commit; a missing repository and a private one look the same without a token."""
        allowed = self.has_token()
        if repo not in self.server.commits or (repo in self.server.private and not allowed):
            raise Refused(404 if allowed else 401, "RepoNotFound")
        commits = self.server.commits[repo]
        ids = [hashlib.sha1(repr((number, repo, files)).encode()).hexdigest() for number, files in enumerate(commits)]
        for name, files in zip(ids, commits, strict=True):
            if revision in (name, "main") and (revision == name or files is commits[-1]):
                return name, files
        raise Refused(404, "RevisionNotFound")

    def create_repo(self):
        self.require_token()
        values = json.loads(self.body)
        repo = f"{values.get('organization') or 'user'}/{values['name']}"
        url = f"{self.server.url}/{repo}"
        if repo in self.server.commits:
            raise Refused(409, message="You already created this model repo", url=url)
        self.server.create(repo, {})
        if values.get("visibility") == "private" or values.get("private"):
            self.server.private.add(repo)
        self.send({"url": url})

    def check_card(self):
        licence = re.search(r"^license: (.+)$", json.loads(self.body)["content"], re.MULTILINE)
        if licence and licence[1] not in ("apache-2.0", "mit"):
            raise Refused(400, errors=[{"message": '"license" must be one of [apache-2.0, mit]'}])
        self.send({"errors": [], "warnings": []})

    def preupload(self, repo, revision):
        self.require_token()
        files = self.commit_of(repo, revision)[1]
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": git_id(files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send({"files": answers})

    def lfs_batch(self, repo):
        self.require_token()
        objects = []
        for one in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.storage}/storage/{one['oid']}/upload"}}
            objects.append(one if one["oid"] in self.server.objects else one | {"actions": upload})
        self.send({"transfer": "basic", "objects": objects})

    def store(self, oid, path):
        if self.server.broken or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(403, message="the storage refuses")
        self.server.objects[oid] = self.body
        self.send(b"")

    def commit(self, repo, revision):
        self.require_token()
        files = dict(self.commit_of(repo, revision)[1])
        for line in self.body.splitlines():
            kind, value = (json.loads(line)[name] for name in ("key", "value"))
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]  # uploaded before, or the client is wrong
            elif kind == "deletedFile":
                del files[value["path"]]
        self.server.commits[repo].append(files)
        name, _ = self.commit_of(repo)
        self.send({"commitUrl": f"{self.server.url}/{repo}/commit/{name}", "commitOid": name})

    def info(self, repo, revision="main"):
        name, files = self.commit_of(repo, revision)
        self.send({"id": repo, "sha": name, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, repo, revision):
        rows = []
        for path, content in self.commit_of(repo, revision)[1].items():
            rows.append({"type": "file", "path": path, "size": len(content), "oid": git_id(content)})
            if path.endswith(LFS):
                oid = hashlib.sha256(content).hexdigest()
                rows[-1]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        self.send(rows)

    def resolve(self, repo, revision, path):
        name, files = self.commit_of(repo, revision)
        headers = {"X-Repo-Commit": name}
        if path not in files:
            raise Refused(404, "EntryNotFound")
        content = files[path]
        if path.endswith(LFS):
            oid = hashlib.sha256(content).hexdigest()
            self.server.objects[oid] = content
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return self.send(b"", 302, headers | {"Location": f"{self.server.storage}/storage/{oid}/{path}"})
        if self.command == "GET":
            self.server.downloads.append(path)
        self.send(content, 200, headers | {"ETag": f'"{git_id(content)}"'})

    def fetch(self, oid, path):
        """Sends a large file, or the rest of it; no token of the Hub reaches the storage."""
        assert self.headers.get("Authorization") is None
        content = self.server.objects[oid]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"Content-Length": str(len(content) - start)}
        headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if self.server.cuts:
            self.server.cuts -= 1
            self.close_connection = True
            return self.send(content[start : len(content) // 2], 206 if start else 200, headers)
        self.server.downloads.append(path)
        self.send(content[start:], 206 if start else 200, headers)


ROUTES = (
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "check_card"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/storage/(?P<oid>\w+)/(?P<path>.+)", "store"),
    ("GET", r"/storage/(?P<oid>\w+)/(?P<path>.+)", "fetch"),
    ("GET", rf"/api/models/{REPO}", "info"),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
)


@contextlib.contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Runs a Hub in a thread."""
    server = HubServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.stop()
