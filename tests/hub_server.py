"""A Hub in one process: the endpoints that uploads, checks and downloads call, with faults on demand."""

import base64
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "SecretOfTheTests" * 2


@dataclass
class Repository:
    """
    Attributes:
        commits: every commit's files, by its id, in order; `main` is the last.
        tags: commits by the name of a tag.
    """

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        return name

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Of a branch, tag or commit; `None` where there is none."""
        name = list(self.commits)[-1] if revision == "main" else self.tags.get(revision, revision)
        return self.commits.get(name)


@dataclass
class Fault:
    """What a request is answered with in place of the Hub's answer, `times` times, after the first `after`."""

    method: str
    path: str
    answer: "int | Callable[[Handler], object]"
    times: int = 1
    after: int = 0


@dataclass
class Hub:
    """
    Attributes:
        large: whether a file goes to the storage of large files.
        faults: what goes wrong, in order.
        log: method, path and whether it had the token, of every request.
        stored: large files, by their SHA-256.
    """

    url: str = ""
    large: Callable[[str], bool] = lambda path: path.endswith(".safetensors")
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, bool]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def sent(self, method: str, part: str) -> int:
        """How many requests were made."""
        return sum(each[0] == method and part in each[1] for each in self.log)

    def fault(self, method: str, path: str) -> "int | Callable[[Handler], object] | None":
        for fault in self.faults:
            if fault.method == method and fault.path in path and fault.times:
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault.answer
        return None


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int = 200, content: object = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str = "", message: str = "refused") -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.has_token))
        fault = self.hub.fault(self.command, path)
        if callable(fault):
            if fault(self) is not None:
                return
        elif fault is not None:
            self.read()
            return self.fail(fault)
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self.api(path, parts)
        elif parts[0] == "storage":
            self.hub.stored[parts[1]] = self.read()
            self.answer()
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch()
        else:
            self.resolve(parts)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def api(self, path: str, parts: list[str]) -> None:
        if path == "/api/validate-yaml":
            self.read()
            return self.answer()
        if not self.has_token:
            self.read()
            return self.fail(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(self.read()))
        name, verb, revision = "/".join(parts[2:4]), (parts[4:5] or [""])[0], "/".join(parts[5:])
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.read()
            return self.fail(404, "RepoNotFound")
        if verb in ("", "revision"):
            sha = list(repository.commits)[-1] if not revision or revision == "main" else revision
            return self.answer(200, {"id": name, "sha": sha, "private": repository.private, "siblings": []})
        if verb == "tree":
            return self.tree(repository, revision)
        if verb == "refs":
            tags = [
                {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit}
                for tag, commit in repository.tags.items()
            ]
            return self.answer(200, {"branches": [], "converts": [], "tags": tags})
        data = self.read()
        if verb == "preupload":
            return self.preupload(repository, json.loads(data))
        if verb == "commit":
            return self.commit(name, repository, [json.loads(line) for line in data.splitlines()])
        if verb == "tag":
            tag = json.loads(data)["tag"]
            if tag in repository.tags:
                return self.fail(409, message="tag exists")
            repository.tags[tag] = revision
            return self.answer()
        self.fail(404)

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        repository = self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def preupload(self, repository: Repository, asked: dict) -> None:
        there, files = repository.files("main"), []
        for file in asked["files"]:
            is_large, content = self.hub.large(file["path"]), there.get(file["path"])
            oid = content and (hashlib.sha256(content).hexdigest() if is_large else git_oid(content))
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self) -> None:
        objects = json.loads(self.read())["objects"]
        for each in objects:
            if each["oid"] not in self.hub.stored:
                each["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{each['oid']}"}}
        self.answer(200, {"objects": objects, "transfer": "basic"})

    def commit(self, name: str, repository: Repository, lines: list[dict]) -> None:
        files = dict(repository.files("main"))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        oid = repository.commit(files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def tree(self, repository: Repository, revision: str) -> None:
        revision, _, under = revision.partition("/")
        files, entries = repository.files(revision), []
        if files is None:
            return self.fail(404, "RevisionNotFound")
        if under:  # of templates that no tokenizer here has
            return self.fail(404, "EntryNotFound")
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if self.hub.large(path):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def resolve(self, parts: list[str]) -> None:
        repository = self.hub.repositories.get("/".join(parts[:2]))
        files = repository.files(parts[3]) if repository and parts[2:3] == ["resolve"] else None
        if files is None:
            return self.fail(404, "RepoNotFound" if repository is None else "RevisionNotFound")
        if repository.private and not self.has_token:
            return self.fail(401, message="Invalid credentials in Authorization header")
        commit = next(name for name, found in repository.commits.items() if found is files)
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        self.answer(200, content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=commit)


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that listens on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def drop(handler: Handler) -> bool:
    """Close the connection in the middle of a request."""
    handler.rfile.read(min(64, int(handler.headers.get("Content-Length") or 0)))
    handler.close_connection = True
    handler.connection.close()
    return True


def echo(status: int) -> Callable[[Handler], bool]:
    """Refuse with a message that repeats what was sent, as careless proxies do."""

    def answer(handler: Handler) -> bool:
        handler.read()
        handler.fail(status, message=f"no: {handler.headers['Authorization']}")
        return True

    return answer


def slow(seconds: float) -> Callable[[Handler], None]:
    """Answer as ever, after a while: the disk behind is slow."""
    return lambda handler: time.sleep(seconds)
