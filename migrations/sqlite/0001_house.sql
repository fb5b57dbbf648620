-- The whole house in one file. Times are whole microseconds since 1970, UTC. States are the numbers of
-- `model::State`: 0 ready, 1 scheduled, 2 leased, 3 completed, 4 discarded, 5 dead, 6 expired, 7 cancelled.

-- Queues. An id is never used again, so that what a deleted queue left behind finds no new owner.
create table queue (
    id integer primary key autoincrement,
    name text not null unique,
    settings text not null,
    state text not null,
    guard text not null default '{}'
) strict;

-- Deleted queues of which something is left to be swept.
create table doomed (
    queue_id integer primary key
) strict;

-- What holds for all queues: one row. The revision grows with every change of a queue or of this row.
create table pump (
    id integer primary key check (id = 1),
    state text not null,
    ceiling integer not null,
    revision integer not null,
    incarnation integer not null
) strict;

-- What changes in a message's life, kept narrow, because every step of that life writes it again.
-- The rank is the priority with its sign turned, so that the order of lease is ascending. The group and the
-- lane (of a fairness key, 0 without one) are bits of hashes; what waits for its turn in its group is behind.
create table message (
    seq integer primary key,
    id blob not null,
    queue_id integer not null,
    state integer not null,
    rank integer not null,
    due_at integer not null,
    urgent integer not null,
    attempts integer not null,
    failures integer not null,
    crashes integer not null,
    token integer not null,
    leased_at integer not null,
    lease_until integer not null,
    incarnation integer not null,
    enqueued_at integer not null,
    expires_at integer,
    finished_at integer,
    size integer not null,
    grp integer,
    lane integer not null,
    behind integer not null,
    replica text,
    reason text
) strict;

create unique index message_id on message (id);
-- The order of lease.
create index message_ready on message (queue_id, rank, lane, due_at, seq) where state = 0 and behind = 0;
-- Whether messages take turns, and which of those is due longest.
create index message_in_turn on message (queue_id, due_at) where state = 0 and behind = 0 and lane <> 0;
-- The order of a group, and what of a queue is due longest.
create index message_behind on message (queue_id, grp, seq) where behind = 1;
create index message_behind_since on message (queue_id, due_at) where behind = 1;
create index message_urgent on message (queue_id, rank, due_at, seq) where urgent = 1;
-- What comes due next, over all queues; and what is scheduled in one queue, to be purged.
create index message_due on message (due_at) where state = 1;
create index message_scheduled on message (queue_id, seq) where state = 1;
create index message_leased on message (lease_until) where state = 2;
-- Dead letters, of one queue and of all.
create index message_dead on message (queue_id, seq) where state = 5;
create index message_dead_all on message (seq) where state = 5;
create index message_expiring on message (expires_at) where expires_at is not null and state in (0, 1);
-- What has ended, by when: for retention.
create index message_ended on message (queue_id, state, finished_at) where finished_at is not null;
-- Lists of one queue, newest first.
create index message_listed on message (queue_id, seq);
create index message_grouped on message (queue_id, grp, seq) where grp is not null;

-- The message of each group whose turn it is: until it has ended, and longer if it is dead and blocks the others.
create table head (
    seq integer primary key,
    queue_id integer not null,
    grp integer not null
) strict;

create unique index head_group on head (queue_id, grp);

-- What never changes in a message's life: written once, deleted once.
create table content (
    seq integer primary key,
    deliver_at integer not null,
    kind text,
    correlation_id text,
    details text not null,
    body blob not null,
    shared integer
) strict;

create index content_shared on content (shared) where shared is not null;
create index content_correlation on content (correlation_id, seq) where correlation_id is not null;

-- Payloads that several messages have: the copies of what was published to a topic. What of those is in content is
-- empty. It goes with the last of them. The number is that of the first.
create table shared (
    id integer primary key,
    body blob not null
) strict;

-- Which queues want what is published to a topic.
create table subscription (
    topic text not null,
    name text not null,
    queue_id integer not null,
    filter text not null,
    primary key (topic, name)
) strict, without rowid;

-- Clocks that send. The version changes with every change, so that of several who write only one does.
create table schedule (
    name text primary key,
    schedule text not null,
    state text not null,
    version integer not null
) strict, without rowid;

-- One row for each attempt that ended.
create table delivery (
    seq integer not null,
    number integer not null,
    replica text not null,
    started_at integer not null,
    duration integer not null,
    outcome text not null,
    status integer,
    error_kind text,
    error text,
    answer blob not null,
    primary key (seq, number)
) strict, without rowid;

-- Idempotency keys with the answer that was given. Those over a whole batch have no message (seq 0).
-- A key counts until `expires_at`, and longer while its message needs it; `sweep_at` is when to look again. One
-- with `expires_at` = -1 counts as long as its message can be delivered. Those of topics are of queue 0, and have the
-- answer as text.
create table idempotency (
    queue_id integer not null,
    key blob not null,
    fingerprint blob not null,
    seq integer not null,
    id blob not null,
    enqueued_at integer not null,
    deliver_at integer not null,
    expires_at integer not null,
    sweep_at integer not null,
    answer text,
    primary key (queue_id, key)
) strict, without rowid;

create index idempotency_sweep on idempotency (sweep_at);

-- How many messages of a queue are in a state: changed in the transactions that move them. Those that wait for
-- their turn in a group are counted as 8, and not as 0.
create table tally (
    queue_id integer not null,
    state integer not null,
    n integer not null,
    primary key (queue_id, state)
) strict, without rowid;
