"""A server that speaks as much of Google Cloud Storage's JSON API as gcsfs, google-cloud-storage and TensorStore use.

    python tests/scaling/fake_gcs.py PORT

Objects lie in memory, each change under one lock, so that a precondition holds as it does there. Every bucket exists but "absent";
those named "refused-STATUS" answer all with that status.
The API: cloud.google.com/storage/docs/json_api/v1/objects.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
MOVE = re.compile(OBJECT.pattern + r"/(rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)")
LISTING = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"(?:/resumable)?/upload/storage/v1/b/([^/]+)/o")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")


class Stored(NamedTuple):
    data: bytes
    generation: int
    updated: str


class Refused(Exception):
    """status, reason."""


def environment(port: int) -> dict[str, str]:
    """What makes the clients talk to the server, without credentials."""
    url = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",  # TensorStore's
        "FSSPEC_GCS_TOKEN": "anon",
        "GOOGLE_CLOUD_PROJECT": "fake",
        "NO_PROXY": "127.0.0.1",
    }


class FakeGcs(ThreadingHTTPServer):
    """Serves from `start` until `stop`. `after` and `before` hold names of objects of which the next upload is answered with 503,
    after or before it is done; `writes` counts uploads by name."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.objects: dict[tuple[str, str], Stored] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.lock, self.numbers = threading.RLock(), itertools.count(1)
        self.writes: Counter[str] = Counter()
        self.after: set[str] = set()
        self.before: set[str] = set()

    def start(self) -> FakeGcs:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def names(self, bucket: str) -> list[str]:
        with self.lock:
            return sorted(name for of, name in self.objects if of == bucket)

    def read(self, bucket: str, name: str) -> bytes:
        return self.objects[bucket, name].data

    def found(self, bucket: str, name: str, asked: dict[str, str]) -> Stored:
        """The object, where it is there and the preconditions hold."""
        stored = self.objects.get((bucket, name))
        generation = stored.generation if stored else 0
        if "ifGenerationMatch" in asked and int(asked["ifGenerationMatch"]) != generation:
            raise Refused(412, "conditionNotMet")
        if stored is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        if int(asked.get("ifGenerationNotMatch", -1)) == generation:
            raise Refused(304, "notModified")
        if int(asked.get("generation", generation)) != generation:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return stored

    def put(self, bucket: str, name: str, data: bytes, asked: dict[str, str]) -> dict[str, Any]:
        """Stores an object whole, where the preconditions hold."""
        if bucket == "absent":
            raise Refused(404, "The specified bucket does not exist.")
        if name in self.before:
            self.before.remove(name)
            raise Refused(503, "backendError")
        with self.lock:
            known = self.objects.get((bucket, name))
            generation = known.generation if known else 0
            if "ifGenerationMatch" in asked and int(asked["ifGenerationMatch"]) != generation:
                raise Refused(412, "conditionNotMet")
            # As there, generations grow with time, so that an object made anew has none that one before it had.
            number = time.time_ns() // 1000 * 1000 + next(self.numbers) % 1000
            self.objects[bucket, name] = Stored(bytes(data), number, datetime.now(UTC).isoformat()[:23] + "Z")
            self.writes[name] += 1
        if name in self.after:
            self.after.remove(name)
            raise Refused(503, "backendError")
        return self.described(bucket, name)

    def described(self, bucket: str, name: str) -> dict[str, Any]:
        stored = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{stored.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(stored.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(stored.data)),
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "timeCreated": stored.updated,
            "updated": stored.updated,
        }

    def listing(self, bucket: str, asked: dict[str, str]) -> dict[str, Any]:
        """A page of objects, and of prefixes where there is a delimiter. The token of the next page is its first name."""
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        first, end = max(asked.get("pageToken", ""), asked.get("startOffset", "")), asked.get("endOffset")
        limit = int(asked.get("maxResults", 1000))
        items, prefixes = [], []
        with self.lock:
            for name in self.names(bucket):
                if not name.startswith(prefix) or (end and name >= end):
                    continue
                rest = name[len(prefix) :]
                folder = prefix + rest[: rest.index(delimiter) + 1] if delimiter and delimiter in rest else None
                if (folder or name) < first or folder in prefixes:
                    continue
                if len(items) + len(prefixes) == limit:
                    return self.page(items, prefixes) | {"nextPageToken": folder or name}
                prefixes.append(folder) if folder else items.append(self.described(bucket, name))
        return self.page(items, prefixes)

    @staticmethod
    def page(items: list[Any], prefixes: list[str]) -> dict[str, Any]:
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


class Handler(BaseHTTPRequestHandler):
    server: FakeGcs
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json; charset=UTF-8", **headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def serve(self) -> None:
        url, body = urlsplit(self.path), self.body()
        try:
            if match := re.search(r"/b/refused-(\d+)", url.path):
                raise Refused(int(match[1]), "not for you")
            self.route(url.path, dict(parse_qsl(url.query)), body)
        except Refused as refused:
            status, reason = refused.args
            if status == 304:
                self.send_response(304)
                self.end_headers()
            else:
                self.json({"error": {"code": status, "message": reason, "errors": [{"reason": reason}]}}, status)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def route(self, path: str, asked: dict[str, str], body: bytes) -> None:
        server = self.server
        if match := UPLOAD.fullmatch(path):
            self.upload(unquote(match[1]), asked, body)
        elif match := MOVE.fullmatch(path):
            bucket, name, how, to, target = (unquote(part) if part else "" for part in match.groups())
            with server.lock:
                data = server.found(bucket, name, {}).data
                found = server.put(to or bucket, target, data, asked)
                if how == "moveTo":
                    del server.objects[bucket, name]
            size = found["size"]
            done = {"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size, "objectSize": size}
            self.json(done | {"resource": found} if how == "rewriteTo" else found)
        elif match := OBJECT.fullmatch(path):
            bucket, name = unquote(match[1]), unquote(match[2])
            with server.lock:
                stored = server.found(bucket, name, asked)
                if self.command == "DELETE":
                    del server.objects[bucket, name]
                    self.answer(204)
                    return
                described = server.described(bucket, name)
            if asked.get("alt") == "media" or path.startswith("/download"):
                self.media(stored)
            else:
                self.json(described)
        elif match := LISTING.fullmatch(path):
            if unquote(match[1]) == "absent":
                raise Refused(404, "The specified bucket does not exist.")
            self.json(server.listing(unquote(match[1]), asked))
        elif match := BUCKET.fullmatch(path):
            if unquote(match[1]) == "absent":
                raise Refused(404, "The specified bucket does not exist.")
            self.json({"kind": "storage#bucket", "name": unquote(match[1]), "location": "FAKE"})
        else:
            raise Refused(404, f"the fake does not know {self.command} {self.path}")

    def media(self, stored: Stored) -> None:
        data, status = stored.data, 200
        more = {"X_Goog_Generation": str(stored.generation), "Content_Type": "application/octet-stream"}
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
            last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
            if first >= len(data):
                raise Refused(416, "requestedRangeNotSatisfiable")
            more["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.answer(status, data, **more)

    def upload(self, bucket: str, asked: dict[str, str], body: bytes) -> None:
        server, kind = self.server, asked.get("uploadType")
        if kind == "resumable" and "upload_id" not in asked:
            name = asked.get("name") or json.loads(body)["name"]
            key = str(next(server.numbers))
            server.uploads[key] = {"name": name, "data": b"", "asked": asked}
            host = self.headers["Host"]
            self.json({}, Location=f"http://{host}{urlsplit(self.path).path}?uploadType=resumable&upload_id={key}")
        elif kind == "resumable":
            begun = server.uploads[asked["upload_id"]]
            begun["data"] += body
            total = self.headers["Content-Range"].rpartition("/")[2]
            if total == "*" or len(begun["data"]) < int(total):
                self.answer(308, Range=f"bytes=0-{len(begun['data']) - 1}")
            else:
                self.json(server.put(bucket, begun["name"], begun["data"], begun["asked"]))
        elif kind == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            boundary = message_from_bytes(head).get_boundary() or ""
            _, about, content, _ = re.split(rb"(?:^|\r?\n)--" + re.escape(boundary.encode()), body)
            about, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content))
            self.json(server.put(bucket, json.loads(about)["name"], content, asked))
        else:
            self.json(server.put(bucket, asked["name"], body, asked))


if __name__ == "__main__":
    FakeGcs(int(sys.argv[1])).serve_forever()
