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
    checked_at bigint not null,
    -- The most bytes of a payload, as the program was told last.
    body_limit bigint not null default 1048576
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
    body bytea not null,
    shared bigint
) with (
    autovacuum_vacuum_scale_factor = 0.05,
    autovacuum_vacuum_cost_delay = 0
);

create index content_shared on content (shared) where shared is not null;
create index content_correlation on content (correlation_id, seq) where correlation_id is not null;

-- Payloads that several messages have: the copies of what was published to a topic. What of those is in content is
-- empty. The number is that of the first.
create table shared (
    id bigint primary key,
    body bytea not null
);

-- Numbers of such payloads of which a message was deleted: those that were the last are found here, because two who
-- delete the last two at once do not see each other.
create table released (
    shared bigint not null
) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);

-- Which queues want what is published to a topic.
create table subscription (
    topic text collate "C" not null,
    name text collate "C" not null,
    queue_id integer not null,
    filter text not null,
    primary key (topic, name)
);

-- Clocks that send. The version changes with every change, so that of several who write only one does.
create table schedule (
    name text collate "C" primary key,
    schedule text not null,
    state text not null,
    version bigint not null
);

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
-- The tokens of a group.
create index ready_tokens on ready (queue_id, grp) where grp is not null;
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
-- with `expires_at` = -1 counts as long as its message can be delivered. Those of topics are of queue 0, and have the
-- answer as text.
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
    answer text,
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

-- Queues to which a transaction of somebody else's has sent: nobody tells the pumps of it, so they look here.
create table sent (
    queue_id integer not null
) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);

-- Bits of a SHA-256, as `model::group_number` and `Details::lane` have them.
create function bits_of(key text) returns bigint
    language sql immutable strict
    as $$ select ('x' || encode(substring(sha256(convert_to(key, 'UTF8')) from 1 for 8), 'hex'))::bit(64)::bigint $$;

-- A key as `model::Idempotency` has it.
create function key_of(scope text, key text) returns bytea
    language sql immutable strict
    as $$
        select substring(
            sha256(int8send(octet_length(scope)::bigint) || convert_to(scope || key, 'UTF8')) from 1 for 16
        )
    $$;

-- Takes one message in that was checked before, in the transaction of the caller, and waits for nobody but one
-- who sends with the same key. The keys have a fingerprint and, whether they count only while the message is
-- pending. Answers the message that is there now: this one, or the first with one of its keys.
--
-- The queue is kept from being deleted until the caller's transaction ends, and from nothing else: neither
-- those who send to it nor those who change its settings wait.
create function take_one(
    queue_name text,
    message_id uuid,
    payload bytea,
    kind text,
    correlation_id text,
    details text,
    wait bigint,
    moment bigint,
    lifetime bigint,
    end_moment bigint,
    rank smallint,
    message_group text,
    fairness_key text,
    keys bytea[],
    fingerprints bytea[],
    pending boolean[],
    out id uuid,
    out duplicate boolean,
    out enqueued_at bigint,
    out deliver_at bigint
)
    language plpgsql volatile
    security definer
    set search_path = pumphouse, pg_temp
    as $$
    #variable_conflict use_variable
    declare
        place record;
        known idempotency;
        first idempotency;
        number bigint;
        end_at bigint;
        grp bigint;
        lane integer;
        unsettled bigint;
    begin
        select queue.id, queue.max_messages, queue.dedup_window
        into place
        from queue
        where queue.name = queue_name
        for key share;
        if not found then
            raise exception 'there is no queue %', queue_name
                using errcode = 'undefined_object', hint = 'Make it first: PUT /admin/v1/queues/' || queue_name;
        end if;
        number := nextval('message_seq');
        enqueued_at := now_micros();
        deliver_at := greatest(enqueued_at, coalesce(moment, enqueued_at + coalesce(wait, 0)));
        -- Not `greatest` alone, which overlooks what is null.
        end_at := case
            when end_moment is not null then greatest(end_moment, enqueued_at)
            else enqueued_at + lifetime
        end;
        grp := bits_of(message_group);
        lane := case
            when fairness_key is null then 0
            else greatest((bits_of(fairness_key) & 2147483647)::integer, 1)
        end;

        -- In one order everywhere, so that two who send with the same keys do not wait for each other.
        select array_agg(given.key order by given.key), array_agg(given.fingerprint order by given.key),
            array_agg(given.pending order by given.key)
        into keys, fingerprints, pending
        from unnest(keys, fingerprints, pending) as given (key, fingerprint, pending);
        for at in 1 .. coalesce(cardinality(keys), 0) loop
            delete from idempotency
            where idempotency.queue_id = place.id
                and idempotency.key = keys[at]
                and idempotency.expires_at <= enqueued_at
                and coalesce((
                    select case
                        when idempotency.expires_at < 0 then message.state <> 0
                        else message.state not in (0, 5)
                    end
                    from message
                    where message.seq = idempotency.seq
                ), true);
            insert into idempotency (
                queue_id, key, fingerprint, seq, id, enqueued_at, deliver_at, expires_at, sweep_at
            )
            values (
                place.id, keys[at], fingerprints[at], number, message_id, enqueued_at, deliver_at,
                case when pending[at] then -1 else enqueued_at + place.dedup_window end,
                case when pending[at] then enqueued_at + 60000000 else enqueued_at + place.dedup_window end
            )
            on conflict (queue_id, key) do nothing;
            if not found then
                select * into known
                from idempotency
                where idempotency.queue_id = place.id
                    and idempotency.key = keys[at];
                if not found then
                    raise exception 'somebody else has just used this key'
                        using errcode = 'serialization_failure', hint = 'Run the transaction again.';
                end if;
                if known.fingerprint <> fingerprints[at] then
                    raise exception 'this idempotency key came before with another request'
                        using errcode = 'invalid_parameter_value', hint = 'Use a new key for a new request.';
                end if;
                if first.id is null then
                    first := known;
                end if;
            end if;
        end loop;
        -- Of a row, `is not null` asks whether no column is null.
        if first.id is not null then
            -- What was put down for the other keys goes.
            delete from idempotency
            where idempotency.seq = number
                and idempotency.queue_id = place.id
                and idempotency.key = any(keys);
            id := first.id;
            duplicate := true;
            enqueued_at := first.enqueued_at;
            deliver_at := first.deliver_at;
            return;
        end if;

        if place.max_messages is not null then
            select coalesce(sum(n), 0) into unsettled
            from tally
            where tally.queue_id = place.id
                and tally.state in (0, 1, 2, 8);
            if unsettled >= place.max_messages then
                raise exception 'the queue % has as many messages as its max_messages allows', queue_name
                    using errcode = 'program_limit_exceeded';
            end if;
        end if;

        insert into message (
            seq, id, queue_id, state, rank, due_at, attempts, failures, crashes, enqueued_at, expires_at, size,
            grp, lane
        )
        values (
            number, message_id, place.id, 0, rank, deliver_at, 0, 0, 0, enqueued_at, end_at,
            octet_length(payload), grp, lane
        );
        insert into content (seq, deliver_at, kind, correlation_id, details, body)
        values (number, deliver_at, kind, correlation_id, details, payload);
        if grp is not null then
            insert into behind (queue_id, grp, seq, due_at, lane, expires_at)
            values (place.id, grp, number, deliver_at, lane, end_at);
            insert into ready (queue_id, rank, lane, due_at, seq, grp, urgent)
            values (place.id, 0, lane, deliver_at, nextval('message_seq'), grp, false);
        elsif deliver_at > enqueued_at then
            insert into scheduled (due_at, seq, queue_id, rank, lane, expires_at)
            values (deliver_at, number, place.id, rank, lane, end_at);
        else
            insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
            values (place.id, rank, lane, deliver_at, number, end_at, false);
        end if;
        insert into sent (queue_id) values (place.id);
        id := message_id;
        duplicate := false;
    end $$;

-- Fails where an option of a message is not what it may be over HTTP: 1 to 255 bytes without control characters.
create function check_option(option text, value text) returns void
    language plpgsql immutable
    as $$
    begin
        if octet_length(value) not between 1 and 255 or value ~ '[\u0001-\u001f\u007f-\u009f]' then
            raise exception '%: 1 to 255 bytes without control characters', option
                using errcode = 'invalid_parameter_value';
        end if;
    end $$;

-- The same for a key: 1 to 255 visible ASCII characters without quotes.
create function check_key(option text, value text) returns void
    language plpgsql immutable
    as $$
    begin
        if octet_length(value) not between 1 and 255 or value !~ '^[ !#-~]+$' then
            raise exception '%: a key is 1 to 255 visible ASCII characters without quotes', option
                using errcode = 'invalid_parameter_value';
        end if;
    end $$;

-- The same for a time ahead; answers it in microseconds.
create function check_span(option text, value interval) returns bigint
    language plpgsql immutable
    as $$
    begin
        if value < interval '0' or value > interval '366 days' then
            raise exception '%: from nothing to 366 days', option using errcode = 'invalid_parameter_value';
        end if;
        return (extract(epoch from value) * 1000000)::bigint;
    end $$;

create function check_moment(option text, value timestamptz) returns bigint
    language plpgsql stable
    as $$
    begin
        if value > clock_timestamp() + interval '366 days' then
            raise exception '%: at most 366 days from now', option using errcode = 'invalid_parameter_value';
        end if;
        return (extract(epoch from value) * 1000000)::bigint;
    end $$;

-- The same for the headers to forward: an object of texts. Answers them as `model::Details` has them.
create function check_headers(headers json) returns jsonb
    language plpgsql immutable
    as $$
    declare
        header record;
        size integer := 0;
        listed jsonb := '[]';
    begin
        if headers is null then
            return null;
        end if;
        if json_typeof(headers) <> 'object' then
            raise exception 'headers: an object of names and texts' using errcode = 'invalid_parameter_value';
        end if;
        for header in select lower(key) as name, value #>> '{}' as value, json_typeof(value) as kind
            from json_each(headers)
        loop
            if header.kind <> 'string' then
                raise exception 'headers: the value of % is no text', header.name
                    using errcode = 'invalid_parameter_value';
            end if;
            if header.name !~ '^[a-z0-9!#$%&''*+.^_`|~-]+$' then
                raise exception 'headers: % is no header name', header.name
                    using errcode = 'invalid_parameter_value';
            end if;
            if header.name ~ '^(content-|webhook-|ce-|pumphouse-)' or header.name = any(array[
                'connection', 'keep-alive', 'proxy-authenticate', 'proxy-authorization', 'proxy-connection', 'te',
                'trailer', 'transfer-encoding', 'upgrade', 'host', 'expect', 'traceparent', 'tracestate', 'baggage'
            ]) then
                raise exception 'headers: % is reserved', header.name
                    using errcode = 'invalid_parameter_value',
                        hint = 'Reserved are connection headers, Host, Content-*, webhook-*, ce-*, Pumphouse-*, trace headers.';
            end if;
            if header.value ~ '[\u0001-\u0008\u000a-\u001f\u007f-\u009f]' then
                raise exception 'headers: the value of % has control characters', header.name
                    using errcode = 'invalid_parameter_value';
            end if;
            size := size + octet_length(header.name) + octet_length(header.value);
            listed := listed || jsonb_build_array(jsonb_build_array(header.name, header.value));
        end loop;
        if jsonb_array_length(listed) > 32 or size > 16384 then
            raise exception 'headers: at most 32 of 16 KiB together' using errcode = 'invalid_parameter_value';
        end if;
        return listed;
    end $$;

-- Sends a message in the transaction of the caller: it is there when that commits, or never. What is checked over HTTP
-- is checked here too, and fails the statement. See docs/protocol.md.
create function send_bytes(
    queue text,
    payload bytea,
    content_type text default null,
    type text default null,
    in_group text default null,
    fairness_key text default null,
    priority integer default 0,
    delay interval default null,
    deliver_at timestamptz default null,
    expires_in interval default null,
    expires_at timestamptz default null,
    correlation_id text default null,
    causation_id text default null,
    idempotency_key text default null,
    unique_while_pending text default null,
    headers json default null,
    traceparent text default null
)
    returns uuid
    language plpgsql volatile
    security definer
    set search_path = pumphouse, pg_temp
    as $$
    #variable_conflict use_variable
    declare
        body_limit bigint := (select pump.body_limit from pump where pump.id = 1);
        name bytea;
        details jsonb;
        keys bytea[] := '{}';
        fingerprints bytea[] := '{}';
        pending boolean[] := '{}';
    begin
        if queue is null or payload is null then
            raise exception 'a message has a queue and a payload' using errcode = 'null_value_not_allowed';
        end if;
        if octet_length(payload) > body_limit then
            raise exception 'a payload has at most % bytes', body_limit using errcode = 'program_limit_exceeded';
        end if;
        perform check_option('content_type', content_type), check_option('type', type),
            check_option('in_group', in_group), check_option('fairness_key', fairness_key),
            check_option('correlation_id', correlation_id), check_option('causation_id', causation_id),
            check_option('traceparent', traceparent),
            check_key('idempotency_key', idempotency_key),
            check_key('unique_while_pending', unique_while_pending);
        if priority is null or priority not between -100 and 100 then
            raise exception 'priority: a whole number from -100 to 100' using errcode = 'invalid_parameter_value';
        end if;
        if delay is not null and deliver_at is not null then
            raise exception 'delay and deliver_at exclude each other' using errcode = 'invalid_parameter_value';
        end if;
        if expires_in is not null and expires_at is not null then
            raise exception 'expires_in and expires_at exclude each other' using errcode = 'invalid_parameter_value';
        end if;
        if in_group is not null and (delay is not null or deliver_at is not null or priority <> 0) then
            raise exception 'a message of a group has neither delay nor priority'
                using errcode = 'invalid_parameter_value';
        end if;
        details := jsonb_strip_nulls(jsonb_build_object(
            'content_type', content_type,
            'headers', check_headers(headers),
            'causation_id', causation_id,
            'group', in_group,
            'fairness_key', fairness_key,
            'traceparent', traceparent
        ));
        if idempotency_key is not null then
            keys := keys || key_of('sql', idempotency_key);
            fingerprints := fingerprints || sha256(payload || convert_to(jsonb_build_array(
                -- Times as numbers: their text depends on the settings of the session.
                details, type, priority, check_span('delay', delay), check_moment('deliver_at', deliver_at),
                check_span('expires_in', expires_in), check_moment('expires_at', expires_at), correlation_id,
                unique_while_pending
            )::text, 'UTF8'));
            pending := pending || false;
        end if;
        if unique_while_pending is not null then
            keys := keys || key_of('while-pending', unique_while_pending);
            fingerprints := fingerprints || decode(repeat('00', 32), 'hex');
            pending := pending || true;
        end if;
        -- A UUIDv7 (RFC 9562): the time in milliseconds, and chance.
        name := decode(md5(random()::text || clock_timestamp()::text || nextval('message_seq')), 'hex');
        name := overlay(name placing substring(int8send(now_micros() / 1000) from 3 for 6) from 1 for 6);
        name := set_byte(name, 6, (get_byte(name, 6) & 15) | 112);
        name := set_byte(name, 8, (get_byte(name, 8) & 63) | 128);
        return (
            select taken.id
            from take_one(
                queue, encode(name, 'hex')::uuid, payload, type, correlation_id, details::text,
                check_span('delay', delay), check_moment('deliver_at', deliver_at),
                check_span('expires_in', expires_in), check_moment('expires_at', expires_at),
                (-priority)::smallint, in_group, fairness_key, keys, fingerprints, pending
            ) as taken
        );
    end $$;

-- The same for JSON, whose text is the payload.
create function send(
    queue text,
    payload json,
    type text default null,
    in_group text default null,
    fairness_key text default null,
    priority integer default 0,
    delay interval default null,
    deliver_at timestamptz default null,
    expires_in interval default null,
    expires_at timestamptz default null,
    correlation_id text default null,
    causation_id text default null,
    idempotency_key text default null,
    unique_while_pending text default null,
    headers json default null,
    traceparent text default null
)
    returns uuid
    language sql volatile
    security definer
    set search_path = pumphouse, pg_temp
    as $$
        select send_bytes(
            queue, convert_to(payload::text, 'UTF8'), 'application/json', type, in_group, fairness_key, priority,
            delay, deliver_at, expires_in, expires_at, correlation_id, causation_id, idempotency_key,
            unique_while_pending, headers, traceparent
        )
    $$;

-- Applications send as a role of their own, which sees no table. Where the owner of the schema may make no
-- roles, an operator grants the same to whom it concerns.
do $$
declare
    ours regprocedure;
begin
    for ours in
        select oid::regprocedure
        from pg_proc
        where pronamespace = 'pumphouse'::regnamespace
            and proname in ('take_one', 'send', 'send_bytes')
    loop
        execute format('revoke execute on function %s from public', ours);
    end loop;
end $$;

do $$
begin
    create role pumphouse_sender nologin;
exception
    when duplicate_object or unique_violation then
        null;
    when insufficient_privilege then
        raise notice 'pumphouse_sender is not made: %', sqlerrm;
end $$;

do $$
begin
    grant usage on schema pumphouse to pumphouse_sender;
    grant execute on function
        send(
            text, json, text, text, text, integer, interval, timestamptz, interval, timestamptz, text, text, text,
            text, json, text
        ),
        send_bytes(
            text, bytea, text, text, text, text, integer, interval, timestamptz, interval, timestamptz, text, text,
            text, text, json, text
        )
        to pumphouse_sender;
exception
    when undefined_object then
        null;
end $$;

insert into pump (id, state, ceiling, revision, checked_at)
values (1, '{"state":"running"}', 1024, 1, 0);
