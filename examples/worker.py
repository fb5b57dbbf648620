#!/usr/bin/env python3
"""A worker that pulls: takes messages of a queue, works, says what became of each. Needs nothing but Python.

    python3 worker.py http://localhost:8080 jobs

The queue's handler is {"kind": "pull"}. SIGTERM or Ctrl-C ends it: what it has begun it finishes, the rest goes back.
"""
import json, signal, sys, time, urllib.request  # noqa: E401

BASE, QUEUE = sys.argv[1].rstrip("/"), sys.argv[2]
leaving = False


def leave(*_):
    global leaving
    leaving = True


def post(path, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(BASE + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=90) as answer:
        return json.load(answer)


def work(message):
    """The work itself. An exception means: try again, as the queue's recovery says."""
    print("done:", message["payload"], flush=True)


def settle(verdicts):
    """Says it until it is heard. A lease that is over by then is answered 409: somebody else has the message."""
    while verdicts:
        try:
            return post("/v1/leases/settle", {"settlements": verdicts})
        except OSError as error:
            print("not heard yet:", error, file=sys.stderr, flush=True)
            time.sleep(1)


for name in (signal.SIGTERM, signal.SIGINT):
    signal.signal(name, leave)
while not leaving:
    try:
        leases = post(f"/v1/queues/{QUEUE}/leases", {"max": 10, "wait": "2s", "duration": "60s"})["leases"]
    except OSError as error:
        print("no answer:", error, file=sys.stderr, flush=True)
        time.sleep(1)
        continue
    for number, lease in enumerate(leases):
        if leaving:
            settle([{"token": rest["token"], "verdict": "release"} for rest in leases[number:]])
            break
        try:
            work(lease["message"])
            settle([{"token": lease["token"], "verdict": "ack"}])
        except Exception as error:
            settle([{"token": lease["token"], "verdict": "retry", "reason": str(error)[:1000]}])
