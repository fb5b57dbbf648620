"""Uses a client that was generated from the OpenAPI document: makes a queue, sends, pulls, settles, looks.

    python generated_client.py FOLDER http://127.0.0.1:PORT     (FOLDER holds the package `generated`)
"""
import sys

sys.path.insert(0, sys.argv[1])
from generated import Client  # noqa: E402
from generated.api.messages import get_message  # noqa: E402
from generated.api.pulling import lease_messages, settle_leases  # noqa: E402
from generated.api.queues import get_queue, put_queue  # noqa: E402
from generated.api.schedules import list_schedules  # noqa: E402
from generated.api.sending import post_message, publish_message  # noqa: E402
from generated.api.topics import put_subscription  # noqa: E402
from generated.models import (  # noqa: E402
    Envelope, LeaseRequest, ProblemBody, SettingsBody, SettleBody, SettlementBody, SubscriptionPut, VerdictBody,
)

client = Client(base_url=sys.argv[2])
settings = SettingsBody.from_dict({"handler": {"kind": "pull"}, "concurrency": {"limit": 3}})
made = put_queue.sync_detailed("jobs", client=client, body=settings)
assert made.status_code == 201 and made.parsed.name == "jobs", made
assert get_queue.sync("jobs", client=client).concurrency.limit == 3

envelope = Envelope.from_dict({"payload": {"n": 1}, "type": "job.small", "priority": 5})
receipt = post_message.sync("jobs", client=client, body=envelope, idempotency_key="k-1")
assert receipt.state == "ready" and receipt.queue == "jobs", receipt
wrong = post_message.sync_detailed("missing", client=client, body=envelope)
assert wrong.status_code == 404 and isinstance(wrong.parsed, ProblemBody) and wrong.parsed.code == "no-such-queue"

leases = lease_messages.sync("jobs", client=client, body=LeaseRequest(max_=10, wait="5s")).leases
assert [lease.message.id for lease in leases] == [receipt.id] and leases[0].attempt == 1
settlement = SettlementBody(token=leases[0].token, verdict=VerdictBody.ACK)
heard = settle_leases.sync(client=client, body=SettleBody(settlements=[settlement]))
assert [item.status for item in heard.items] == [200]
assert get_message.sync(receipt.id, client=client).state == "completed"

put_subscription.sync("orders", "jobs", client=client, body=SubscriptionPut(queue="jobs"))
published = publish_message.sync("orders", client=client, body=envelope)
assert published.matched == 1 and published.messages[0].queue == "jobs"
assert list_schedules.sync(client=client).items == []
print("the generated client works")
