-- The whole house in one file, in the schema that the connection's search_path names: pumphouse. Times are
-- whole microseconds since 1970, UTC. States are the numbers of `model::State`: 0 ready, 1 scheduled,
-- 2 leased, 3 completed, 4 discarded, 5 dead, 6 expired, 7 cancelled.
--
-- A message that can still be delivered has one token: a row in ready, scheduled or lease. Where the
-- token lies is the message's state, so that a step of its life moves one narrow row.
--
-- Runs on PostgreSQL 11 to 17.

-- The database's clock. It moves on within a transaction.
create function now_micros() returns bigint
    language sql volatile
    as $$ select (extract(epoch from clock_timestamp()) * 1000000)::bigint $$;

-- Queues. An id is never used again, so that what a deleted queue left behind finds no new owner. What
-- stands beside the settings is what statements need of them.
create table queue (
    id serial primary key,
    name text collate "C" not null unique,
    settings text not null,
    state text not null,
    guard text not null default '{}',
    max_messages bigint,
    max_crashes integer not null,
    dedup_window bigint not null,
    retention_completed bigint not null,
    retention_dead bigint not null,
    dead_on_expiry boolean not null,
    group_blocks boolean not null
);

-- Deleted queues of which something is left to be swept.
create table doomed (
    queue_id integer primary key
);

-- What holds for all queues: one row. The revision grows with every change of a queue or of this row.
create table pump (
    id integer primary key check (id = 1),
    state text not null,
    ceiling integer not null,
    revision bigint not null,
    checked_at bigint not null
);

-- What changes in a message's life, kept narrow. The state is 0 as long as the message can be delivered,
-- and one of those that end it after that. No index is over what changes, and each page is filled to less
-- than a half, so that there is room for the change of every message on it: a change that stays on its page
-- touches no index. The rank is the priority with its sign turned, so that the order of lease is ascending. The
-- group and the lane (of a fairness key, 0 without one) are bits of hashes.
create sequence message_seq;

create table message (
    seq bigint primary key,
    id uuid not null,
    enqueued_at bigint not null,
    expires_at bigint,
    due_at bigint not null,
    finished_at bigint,
    size bigint not null,
    grp bigint,
    queue_id integer not null,
    lane integer not null,
    attempts integer not null,
    failures integer not null,
    crashes integer not null,
    rank smallint not null,
    state smallint not null,
    reason text
) with (
    fillfactor = 45,
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0
);

create unique index message_id on message (id);
-- Lists of one queue, newest first.
create index message_listed on message (queue_id, seq);
create index message_grouped on message (queue_id, grp, seq) where grp is not null;

-- What never changes in a message's life: written once, deleted once.
create table content (
    seq bigint primary key,
    deliver_at bigint not null,
    kind text,
    correlation_id text,
    details text not null,
    body bytea not null
) with (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0
);

create index content_correlation on content (correlation_id, seq) where correlation_id is not null;

-- Tokens of what can be leased; the primary key is the order of lease. Rank, lane and due time are those of the
-- message. One with a group (grp) stands for no message: it says that the group may have one whose turn it is. Its
-- number is its own.
create table ready (
    due_at bigint not null,
    seq bigint not null,
    expires_at bigint,
    grp bigint,
    queue_id integer not null,
    lane integer not null,
    rank smallint not null,
    urgent boolean not null,
    primary key (queue_id, rank, lane, due_at, seq)
) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);

create index ready_urgent on ready (queue_id, rank, due_at, seq) where urgent;
create index ready_expiring on ready (expires_at) where expires_at is not null;
-- Whether messages take turns, and which of those is due longest.
create index ready_in_turn on ready (queue_id, due_at) where lane <> 0;

-- Tokens of what waits for its turn in a group, counted as 8, and not as ready. Whoever sends to a group adds to
-- this and leaves a token for the group in ready, and looks at nothing: so two senders never wait for each other, and
-- one in a long transaction for nobody.
create table behind (
    grp bigint not null,
    seq bigint not null,
    due_at bigint not null,
    expires_at bigint,
    queue_id integer not null,
    lane integer not null,
    primary key (queue_id, grp, seq)
) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);

create index behind_since on behind (queue_id, due_at);
create index behind_expiring on behind (expires_at) where expires_at is not null;

-- The message of each group whose turn it is: until it has ended, and longer if it is dead and blocks the others. Only
-- who claims adds to it, and only who ends a message takes away from it. A claim that meets a group with a head drops
-- the token and makes the head dirty: then whoever frees the group leaves a token again. See store/postgres/groups.rs.
create table head (
    grp bigint not null,
    seq bigint not null,
    queue_id integer not null,
    dirty boolean not null,
    primary key (grp, queue_id)
) with (
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);

-- Tokens of what is due later.
create table scheduled (
    due_at bigint not null,
    seq bigint not null,
    expires_at bigint,
    queue_id integer not null,
    lane integer not null,
    rank smallint not null,
    primary key (due_at, seq)
) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);

create index scheduled_queue on scheduled (queue_id, due_at, seq);
create index scheduled_expiring on scheduled (expires_at) where expires_at is not null;

-- Tokens of what somebody holds. The incarnation is 0 for a holder that has not reported itself.
create table lease (
    seq bigint primary key,
    token bigint not null,
    incarnation bigint not null,
    leased_at bigint not null,
    until bigint not null,
    queue_id integer not null,
    attempt integer not null,
    replica text collate "C" not null
) with (
    fillfactor = 80,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0
);

create index lease_until on lease (until);
create index lease_holder on lease (replica, incarnation);

-- Tokens of dead letters.
create table dead (
    seq bigint primary key,
    finished_at bigint not null,
    queue_id integer not null
);

create index dead_listed on dead (queue_id, seq);
create index dead_since on dead (queue_id, finished_at, seq);

-- Tokens of what has ended otherwise, for its retention.
create table ended (
    finished_at bigint not null,
    seq bigint not null,
    queue_id integer not null,
    primary key (queue_id, finished_at, seq)
);

-- One row for each attempt that ended.
create table delivery (
    seq bigint not null,
    started_at bigint not null,
    duration bigint not null,
    number integer not null,
    status integer,
    replica text not null,
    outcome text not null,
    error_kind text,
    error text,
    answer bytea not null,
    primary key (seq, number)
) with (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0
);

-- Idempotency keys with the answer that was given. Those over a whole batch have no message (seq 0).
-- A key counts until `expires_at`, and longer while its message needs it; `sweep_at` is when to look again. One
-- with `expires_at` = -1 counts as long as its message can be delivered.
create table idempotency (
    seq bigint not null,
    enqueued_at bigint not null,
    deliver_at bigint not null,
    expires_at bigint not null,
    sweep_at bigint not null,
    id uuid not null,
    queue_id integer not null,
    key bytea not null,
    fingerprint bytea not null,
    primary key (queue_id, key)
);

create index idempotency_sweep on idempotency (sweep_at);
-- Keys that were found past their window and needed: when their message goes, so may they.
create index idempotency_needed on idempotency (seq) where sweep_at <> expires_at;

-- Processes that have reported themselves, and what they may have open.
create table replica (
    name text collate "C" primary key,
    incarnation bigint not null,
    seen_at bigint not null,
    good_for bigint not null
);

create table share (
    queue_id integer not null,
    replica text collate "C" not null,
    slots integer not null,
    able boolean not null,
    primary key (queue_id, replica)
);

-- How many messages of a queue are in a state: the sum of all that is noted here. Notes are added by the
-- triggers below and folded together from time to time, so that no two transactions wait for a counter.
create table tally (
    n bigint not null,
    queue_id integer not null,
    state smallint not null
) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_cost_delay = 0
);

create function note_arrivals() returns trigger
    language plpgsql
    as $$
    begin
        insert into pumphouse.tally (queue_id, state, n)
        select queue_id, tg_argv[0]::smallint, count(*)
        from arrived
        group by queue_id;
        return null;
    end $$;

create function note_departures() returns trigger
    language plpgsql
    as $$
    begin
        insert into pumphouse.tally (queue_id, state, n)
        select queue_id, tg_argv[0]::smallint, -count(*)
        from departed
        group by queue_id;
        return null;
    end $$;

-- The same for ready, where a token of a group is no message.
create function note_ready_arrivals() returns trigger
    language plpgsql
    as $$
    begin
        insert into pumphouse.tally (queue_id, state, n)
        select queue_id, 0, count(*)
        from arrived
        where grp is null
        group by queue_id;
        return null;
    end $$;

create function note_ready_departures() returns trigger
    language plpgsql
    as $$
    begin
        insert into pumphouse.tally (queue_id, state, n)
        select queue_id, 0, -count(*)
        from departed
        where grp is null
        group by queue_id;
        return null;
    end $$;

create trigger arrivals after insert on ready
    referencing new table as arrived
    for each statement execute procedure note_ready_arrivals();
create trigger departures after delete on ready
    referencing old table as departed
    for each statement execute procedure note_ready_departures();
create trigger arrivals after insert on behind
    referencing new table as arrived
    for each statement execute procedure note_arrivals(8);
create trigger departures after delete on behind
    referencing old table as departed
    for each statement execute procedure note_departures(8);
create trigger arrivals after insert on scheduled
    referencing new table as arrived
    for each statement execute procedure note_arrivals(1);
create trigger departures after delete on scheduled
    referencing old table as departed
    for each statement execute procedure note_departures(1);
create trigger arrivals after insert on lease
    referencing new table as arrived
    for each statement execute procedure note_arrivals(2);
create trigger departures after delete on lease
    referencing old table as departed
    for each statement execute procedure note_departures(2);
create trigger arrivals after insert on dead
    referencing new table as arrived
    for each statement execute procedure note_arrivals(5);
create trigger departures after delete on dead
    referencing old table as departed
    for each statement execute procedure note_departures(5);

-- Takes messages in that carry no key and are due now, all of them, or none and answers null where one of the
-- queues has a limit or is not there. The arrays from `places` on have an entry for each message: where the
-- name of its queue stands in `names`, and what is stored of it; those from `spans` on say for how long, by
-- whom and by which start it is leased, and are null where nobody has a place; they are null where there is a
-- group. Answers the time, the messages'
-- numbers, and for each name whether messages were ready that come before new ones: then none of that queue is
-- leased.
--
-- The names are locked in a statement of their own, because each statement of a function sees what was
-- committed before it began: a queue that was deleted while we waited is gone for the next.
create function take_in(
    lock_class integer,
    names text[],
    places integer[],
    ids uuid[],
    ranks smallint[],
    lifetimes bigint[],
    sizes bigint[],
    groups bigint[],
    lanes integer[],
    kinds text[],
    correlation_ids text[],
    all_details text[],
    bodies bytea[],
    chance bigint,
    spans bigint[],
    incarnations bigint[],
    replicas text[],
    out taken_at bigint,
    out seqs bigint[],
    out waiting boolean[]
)
    language plpgsql volatile
    as $$
    #variable_conflict use_column
    declare
        queue_ids integer[];
        leases integer;
        grouped integer;
    begin
        perform pg_advisory_xact_lock_shared(lock_class, hashtext(name))
        from unnest(names) as name;

        select array_agg(found.id order by place), array_agg(first.seq is not null order by place)
        into queue_ids, waiting
        from unnest(names) with ordinality as given (name, place)
        cross join lateral (
            select id
            from queue
            where queue.name = given.name
                and queue.max_messages is null
            limit 1
        ) as found
        left join lateral (
            select seq
            from ready
            where ready.queue_id = found.id
            order by queue_id, rank, lane, due_at, seq
            limit 1
        ) as first on true;
        if cardinality(queue_ids) is distinct from cardinality(names) then
            return;
        end if;

        taken_at := now_micros();
        seqs := array(select nextval('message_seq') from generate_series(1, cardinality(ids)));

        insert into message (
            seq, id, queue_id, state, rank, due_at, attempts, failures, crashes, enqueued_at, expires_at, size,
            grp, lane
        )
        select seq, id, queue_ids[place], 0, rank, taken_at, 0, 0, 0, taken_at, taken_at + lifetime, size,
            grp, lane
        from unnest(seqs, ids, places, ranks, lifetimes, sizes, groups, lanes)
            as given (seq, id, place, rank, lifetime, size, grp, lane);

        insert into content (seq, deliver_at, kind, correlation_id, details, body)
        select seq, taken_at, kind, correlation_id, details, body
        from unnest(seqs, kinds, correlation_ids, all_details, bodies)
            as given (seq, kind, correlation_id, details, body);

        -- A table that is left out saves the call of its triggers.
        leases := (
            select count(span)
            from unnest(places, spans) as given (place, span)
            where not waiting[place]
        );
        if leases > 0 then
            insert into lease (seq, token, incarnation, leased_at, until, queue_id, attempt, replica)
            select seq, chance + seq, incarnation, taken_at, taken_at + span, queue_ids[place], 1, replica
            from unnest(seqs, places, spans, incarnations, replicas)
                as given (seq, place, span, incarnation, replica)
            where span is not null
                and not waiting[place];
        end if;
        grouped := (
            select count(grp)
            from unnest(groups) as grp
        );
        if leases + grouped < cardinality(ids) then
            insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
            select queue_ids[place], rank, lane, taken_at, seq, taken_at + lifetime, false
            from unnest(seqs, places, ranks, lanes, lifetimes, spans, groups)
                as given (seq, place, rank, lane, lifetime, span, grp)
            where (span is null or waiting[place])
                and grp is null;
        end if;
        if grouped > 0 then
            insert into behind (queue_id, grp, seq, due_at, lane, expires_at)
            select queue_ids[place], grp, seq, taken_at, lane, taken_at + lifetime
            from unnest(seqs, places, groups, lanes, lifetimes) as given (seq, place, grp, lane, lifetime)
            where grp is not null;

            insert into ready (queue_id, rank, lane, due_at, seq, grp, urgent)
            select queue_ids[place], 0, (array_agg(lane order by seq))[1], taken_at, nextval('message_seq'), grp, false
            from unnest(seqs, places, groups, lanes) as given (seq, place, grp, lane)
            where grp is not null
            group by place, grp;
        end if;
    end $$;

insert into pump (id, state, ceiling, revision, checked_at)
values (1, '{"state":"running"}', 1024, 1, 0);
