"""Sends events with the official CloudEvents SDK in three modes, and verifies with it what arrives.

    python sdk_events.py http://127.0.0.1:PORT

Makes queues whose handler is here, one that gets events in binary and one in structured mode.
"""
import json
import sys
import threading
import time
import urllib.request
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cloudevents.core.bindings.http import HTTPMessage, from_http_event, to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

BASE = sys.argv[1]
arrived, lock = [], threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with lock:
            arrived.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()


def ask(method, path, headers, body):
    request = urllib.request.Request(BASE + path, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.status, json.loads(answer.read() or b"null")


for queue in ("binary", "structured"):
    handler = {"kind": "http", "url": f"http://127.0.0.1:{server.server_port}/{queue}", "format": queue}
    body = json.dumps({"handler": handler}).encode()
    ask("PUT", f"/admin/v1/queues/{queue}", {"Content-Type": "application/json"}, body)
    ask("PUT", f"/admin/v1/topics/all/subscriptions/{queue}", {"Content-Type": "application/json"},
        json.dumps({"queue": queue, "filter": {"type": "com.example.**", "headers": {"ce-source": {"prefix": "/s"}}}}).encode())

DATA = [
    ("application/json", {"größe": [1, 2.5, None, "ü"]}),
    ("text/plain; charset=utf-8", "plain, with ü and 100 %"),
    ("application/octet-stream", bytes(range(256))),
    (None, None),
]


def events(mode):
    for number, (content_type, data) in enumerate(DATA):
        attributes = {
            "id": f"{mode} {number} %41 \"quoted\"", "source": "/shops/münchen?a=b%20c", "type": "com.example.sold",
            "time": datetime(2026, 3, 1, 12, 30, 15, 250000, tzinfo=timezone.utc),
            "subject": "Euro € 🐌 100%", "dataschema": "https://example.com/schema#1", "myextension": "värde %25",
        }
        if content_type:
            attributes["datacontenttype"] = content_type
        yield CloudEvent(attributes=attributes, data=data)


def send(mode, path):
    sent = list(events(f"{mode} {path}"))
    if mode == "batched":
        parts = [to_structured_event(event).body for event in sent]
        body = b"[" + b",".join(part if isinstance(part, bytes) else part.encode() for part in parts) + b"]"
        status, answer = ask("POST", path, {"Content-Type": "application/cloudevents-batch+json"}, body)
        assert status == 207 and all(item["status"] == 201 for item in answer["items"]), answer
    for event in sent if mode != "batched" else []:
        message = to_binary_event(event) if mode == "binary" else to_structured_event(event)
        body = message.body if isinstance(message.body, bytes) else message.body.encode()
        status, answer = ask("POST", path, message.headers, body)
        assert status == 201, answer
        status, again = ask("POST", path, message.headers, body)
        assert status == 200 and again["duplicate"], "source and id are its key"
    return sent


sent = []
for mode in ("binary", "structured", "batched"):
    for queue in ("binary", "structured"):
        sent += [(f"/{queue}", event) for event in send(mode, f"/v1/queues/{queue}/messages")]
    for event in send(mode, "/v1/topics/all/messages"):
        sent += [("/binary", event), ("/structured", event)]

deadline = time.monotonic() + 30
while len(arrived) < len(sent) and time.monotonic() < deadline:
    time.sleep(0.05)
assert len(arrived) == len(sent), f"{len(arrived)} of {len(sent)} arrived"

found = {}
for path, headers, body in arrived:
    content_type = headers.get("content-type", "")
    is_structured = content_type.startswith("application/cloudevents+json")
    assert is_structured == (path == "/structured"), (path, content_type)
    assert headers["webhook-id"]
    event = from_http_event(HTTPMessage(headers=headers, body=body))
    found[path, event.get_id()] = event


def raw(data):
    return data if isinstance(data, bytes) else (data or "").encode() if not isinstance(data, (dict, list)) else json.dumps(data)


for path, wanted in sent:
    event = found[path, wanted.get_id()]
    came, went = event.get_attributes(), wanted.get_attributes()
    for name, value in went.items():
        assert came[name] == value, (path, name, came[name], value)
    assert set(came) - set(went) <= {"datacontenttype"}, (set(came), set(went))
    if isinstance(wanted.get_data(), (dict, list)):
        assert event.get_data() == wanted.get_data(), (path, event.get_data())
    elif wanted.get_data() is not None:
        assert raw(event.get_data()) == raw(wanted.get_data()), (path, event.get_data(), wanted.get_data())
print(f"{len(sent)} events arrived as they were sent")
