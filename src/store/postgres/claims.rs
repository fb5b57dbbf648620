//! The statements that claim, of which there is one for each way of finding what comes first.

/// Claims what `first` finds: the places of tokens in ready (tid), their numbers (seq), groups and lanes, in the order of
/// lease, at most $2. Of a group it claims the first message, if it is its turn. See `groups.rs`.
///
/// Lives on: the primary keys of message, content, shared, behind and head; then of lease. Locks the tokens it takes, and passes
/// over those that others take. Always answers a first row, which says what there is to know of the claim.
macro_rules! claim {
    ($with:literal, $first:literal) => {
        concat!(
            "\
with ",
            $with,
            "clock as (
    select now_micros() as now
),
first as (",
            $first,
            "),
sized as (
    select first.tid, first.lane, row_number() over () as place,
        coalesce(sum(message.size) over (rows unbounded preceding), 0) as bytes
    from first
    left join lateral (
        select size
        from message
        where message.seq = case
                when first.grp is null then first.seq
                else (
                    select behind.seq
                    from behind
                    where behind.queue_id = (select id from queue where name = $1)
                        and behind.grp = first.grp
                    order by behind.queue_id, behind.grp, behind.seq
                    limit 1
                )
            end
        limit 1
    ) as message on true
),
taken as (
    delete from ready
    where ctid = any(array(select tid from sized where bytes <= $7 or place = 1))
    returning ready.seq, ready.queue_id, ready.grp
),
turns as (
    select distinct queue_id, grp
    from taken
    where grp is not null
    order by grp
),
next as (
    select turns.queue_id, turns.grp, behind.seq, behind.tid
    from turns
    cross join lateral (
        select behind.seq, behind.ctid as tid
        from behind
        where behind.queue_id = turns.queue_id
            and behind.grp = turns.grp
            and (behind.expires_at is null or behind.expires_at > (select now from clock))
        order by behind.queue_id, behind.grp, behind.seq
        limit 1
        for update
    ) as behind
),
heads as (
    insert into head (queue_id, grp, seq, dirty)
    select queue_id, grp, seq, false
    from next
    order by grp
    on conflict (grp, queue_id) do update
    set dirty = true
    where not head.dirty
    returning seq
),
won as (
    delete from behind
    where ctid = any(array(select tid from next where seq = any(array(select seq from heads))))
    returning seq
),
leased as (
    insert into lease (seq, token, incarnation, leased_at, until, queue_id, attempt, replica)
    select message.seq, $3 + message.seq, $4, clock.now, clock.now + $5,
        message.queue_id, message.attempts + 1, $6
    from (
        select seq
        from taken
        where grp is null
        union all
        select seq
        from won
    ) as chosen
    cross join lateral (
        select seq, queue_id, attempts
        from message
        where message.seq = chosen.seq
        limit 1
    ) as message
    cross join clock
    returning lease.seq, lease.token, lease.attempt, lease.leased_at
)
select array(
        select grp
        from turns
        where not grp = any(array(
            select grp
            from next
            where seq = any(array(select seq from won))
        ))
    ) as dropped,
    (select count(*) from taken) as taken,
    (select lane from sized where bytes <= $7 or place = 1 order by place desc limit 1) as last_lane,
    exists (
        select 1
        from ready
        where ready.queue_id = (select id from queue where name = $1)
            and ready.lane <> 0
    ) as fair,
    leased.seq, leased.token, leased.attempt as attempts, leased.leased_at, message.id, message.rank,
    message.due_at, message.failures, message.crashes, message.enqueued_at, message.expires_at,
    content.kind, content.correlation_id, content.details,
    coalesce((select shared.body from shared where shared.id = content.shared), content.body) as body
from clock
left join leased on true
left join lateral (select * from message where message.seq = leased.seq limit 1) as message on true
left join lateral (select * from content where content.seq = leased.seq limit 1) as content on true"
        )
    };
}

// Lives on: queue_name_key and the primary key of ready, which is the order of lease; see `claim`.
pub(super) const CLAIM: &str = claim!(
    "",
    "
    select ready.ctid as tid, ready.seq, ready.grp, ready.lane
    from ready
    where ready.queue_id = (select id from queue where name = $1)
        and (ready.expires_at is null or ready.expires_at > (select now from clock))
    order by ready.queue_id, ready.rank, ready.lane, ready.due_at, ready.seq
    limit $2
    for update skip locked
"
);

// Lives on: queue_name_key and ready_urgent; see `claim`.
pub(super) const CLAIM_URGENT: &str = claim!(
    "",
    "
    select ready.ctid as tid, ready.seq, ready.grp, ready.lane
    from ready
    where ready.queue_id = (select id from queue where name = $1)
        and (ready.expires_at is null or ready.expires_at > (select now from clock))
        and ready.urgent
    order by ready.queue_id, ready.rank, ready.due_at, ready.seq
    limit $2
    for update skip locked
"
);

// Lives on: queue_name_key and the primary key of ready, one step for each lane; see `claim`. Of the highest priority
// that is ready, round the lanes: those after $8, then those up to it, at most $2 of them.
pub(super) const CLAIM_IN_TURN: &str = claim!(
    "recursive front as (
    select rank
    from ready
    where ready.queue_id = (select id from queue where name = $1)
        and (ready.expires_at is null or ready.expires_at > now_micros())
    order by ready.queue_id, ready.rank, ready.lane, ready.due_at, ready.seq
    limit 1
),
after (lane, n) as (
    select $8::integer, 0::bigint
    union all
    select next.lane, after.n + 1
    from after
    cross join lateral (
        select ready.lane
        from ready
        where ready.queue_id = (select id from queue where name = $1)
            and ready.rank = (select rank from front)
            and ready.lane > after.lane
            and (ready.expires_at is null or ready.expires_at > now_micros())
        order by ready.queue_id, ready.rank, ready.lane, ready.due_at, ready.seq
        limit 1
    ) as next
    where after.n < $2
),
upto (lane, n) as (
    select -1, $2
    union all
    select next.lane, upto.n + 1
    from upto
    cross join lateral (
        select ready.lane
        from ready
        where ready.queue_id = (select id from queue where name = $1)
            and ready.rank = (select rank from front)
            and ready.lane > upto.lane
            and ready.lane <= $8
            and (ready.expires_at is null or ready.expires_at > now_micros())
        order by ready.queue_id, ready.rank, ready.lane, ready.due_at, ready.seq
        limit 1
    ) as next
    where upto.n < $2 + $2
),
lanes as (
    select lane, n as turn
    from (
        select lane, n from after where n > 0
        union all
        select lane, n from upto where n > $2
    ) as found
    order by turn
    limit $2
),
each as (
    select ($2 + count(*) - 1) / greatest(count(*), 1) as most
    from lanes
),
",
    "
    select tid, seq, grp, lane
    from (
        select lanes.turn, lanes.lane, ready.tid, ready.seq, ready.grp,
            row_number() over (partition by lanes.turn order by ready.due_at, ready.seq) as round
        from lanes
        cross join lateral (
            select ready.ctid as tid, ready.seq, ready.grp, ready.due_at
            from ready
            where ready.queue_id = (select id from queue where name = $1)
                and ready.rank = (select rank from front)
                and ready.lane = lanes.lane
                and (ready.expires_at is null or ready.expires_at > (select now from clock))
            order by ready.queue_id, ready.rank, ready.lane, ready.due_at, ready.seq
            limit (select most from each)
            for update skip locked
        ) as ready
    ) as dealt
    order by round, turn
    limit $2
"
);

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[CLAIM, CLAIM_URGENT, CLAIM_IN_TURN];
