#!/usr/bin/env python3
"""A worker that pulls: takes messages of a queue, works, says what became of each. Needs nothing but Python.

    python3 worker.py http://localhost:8080 jobs

The queue's handler is {"kind": "pull"}. SIGTERM or Ctrl-C ends it: what it has begun it finishes, the rest goes back.
"""
import base64, http.client, json, signal, sys, time, urllib.request  # noqa: E401

BASE, QUEUE = sys.argv[1].rstrip("/"), sys.argv[2]
LEASE = 60  # seconds, for all that is taken at once
TROUBLE = (OSError, http.client.HTTPException, ValueError)  # no answer, half of one, one that is no JSON
leaving = False

def leave(*_):
    global leaving
    leaving = True

def post(path, body):
    request = urllib.request.Request(BASE + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)

def work(message):
    """The work itself. An exception means: try again, as the queue's recovery says."""
    payload = message["payload"] if "payload" in message else base64.b64decode(message["payload_base64"])
    print("done:", payload, flush=True)

def settle(leases, until, **verdict):
    """Says it until it is heard, it is refused, or the leases are over: then somebody else gets the messages."""
    body = {"settlements": [{"token": lease["token"], **verdict} for lease in leases]}
    while leases and time.monotonic() < until:
        try:
            return post("/v1/leases/settle", body)
        except TROUBLE as error:
            print("not heard:", error, file=sys.stderr, flush=True)
            if 400 <= getattr(error, "code", 0) < 500 and error.code != 429:
                return  # it would be refused again
            time.sleep(1)

for name in (signal.SIGTERM, signal.SIGINT):
    signal.signal(name, leave)
while not leaving:
    until = time.monotonic() + LEASE
    try:
        leases = post(f"/v1/queues/{QUEUE}/leases", {"max": 10, "wait": "2s", "duration": f"{LEASE}s"})["leases"]
    except TROUBLE as error:
        print("no answer:", error, file=sys.stderr, flush=True)
        time.sleep(1)
        continue
    while leases and not leaving and time.monotonic() < until:
        lease, verdict = leases.pop(0), {"verdict": "ack"}
        try:
            work(lease["message"])
        except Exception as error:
            reason = str(error).encode(errors="replace")[:1000]  # bytes, not characters
            verdict = {"verdict": "retry", "reason": reason.decode(errors="ignore")}
        settle([lease], until, **verdict)
    settle(leases, until, verdict="release")
