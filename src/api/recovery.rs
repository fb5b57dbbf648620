//! What a queue's recovery would do: simulated, and checked against the other queues. Routes, bodies, handlers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{
    Action, ErrorKind, Failure, Invalid, QueueName, QueueRecord, QueueSettings, Recovery,
    Settlement,
};
use crate::policy::{self, Step};

use super::Doors;
use super::body::{Path, read_json};
use super::lasting::Lasting;
use super::problem::Problem;
use super::recovery_settings::RecoveryBody;

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().routes(routes!(simulate))
}

/// A row of failures to follow.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SimulateBody {
    /// What happens to the message, attempt by attempt; the last one happens again and again.
    failures: Vec<FailureBody>,
    /// In place of the queue's own.
    recovery: Option<RecoveryBody>,
}

/// One failure: a status that the handler answers, or a kind of failure without an answer.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct FailureBody {
    status: Option<u16>,
    /// `timeout`, `connect`, …; `status` where a status is given.
    error_kind: Option<String>,
    /// What the handler asks for.
    retry_after: Option<Lasting>,
    /// Headers of the answer that rules look at.
    #[serde(default)]
    headers: BTreeMap<String, String>,
}

/// What would follow.
#[derive(Debug, Serialize, ToSchema)]
struct Simulated {
    steps: Vec<StepBody>,
    /// The last step's `then`.
    ends: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
struct StepBody {
    /// Which failure, from 1.
    failure: u32,
    /// `retry`, `dead_letter`, `discard`, `move`, `stop_queue` (the message waits there) or `release`.
    then: &'static str,
    /// How long until the next attempt; null where there is none.
    wait: Option<Range>,
    /// How old the message is then, if attempts took no time.
    age: Range,
    /// Why it ends.
    reason: Option<String>,
    /// Where it is moved.
    to_queue: Option<String>,
    /// Why the queue stops, where it does.
    stops_queue: Option<String>,
}

/// As chance has it.
#[derive(Debug, Serialize, ToSchema)]
struct Range {
    min: Lasting,
    max: Lasting,
}

/// Show what a row of failures would lead to, with the waits. Nothing is changed.
#[utoipa::path(post, path = "/admin/v1/queues/{queue}/recovery/simulate", tag = "queues",
    request_body = SimulateBody,
    params(("queue" = String, Path, description = "The queue's name")), responses(
    (status = 200, body = Simulated)))]
async fn simulate(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Json<Simulated>, Problem> {
    let name = QueueName::parse(&name)?;
    let body = read_json::<SimulateBody>(request).await?;
    let queues = doors.pump().store().queues().await?;
    let queue = queues.iter().find(|queue| queue.name == name).cloned();
    let queue = queue.ok_or_else(|| Problem::no_such_queue(&name))?;
    if !(1..=FAILURES_MAX).contains(&body.failures.len()) {
        return Err(Invalid::new("/failures", "from 1 to 1000 failures").into());
    }
    let failures = body.failures.into_iter().enumerate().map(|(number, failure)| {
        failure.into_failure().map_err(|wrong| wrong.under(&format!("/failures/{number}")))
    });
    let failures = failures.collect::<Result<Vec<_>, _>>()?;
    let recovery = match body.recovery {
        Some(recovery) => {
            let recovery = checked(recovery, queue.settings)?;
            check_targets(&name, &recovery, &queues)?;
            recovery
        }
        None => queue.settings.recovery,
    };
    let steps = policy::simulate(&recovery, &failures);
    let ends = steps.last().map_or("retry", |step| word(&step.decision.settlement));
    Ok(Json(Simulated { steps: steps.into_iter().map(StepBody::from).collect(), ends }))
}

/// The recovery as the queue could have it.
fn checked(recovery: RecoveryBody, settings: QueueSettings) -> Result<Recovery, Problem> {
    let settings = QueueSettings { recovery: recovery.into_recovery()?, ..settings };
    settings.check().map_err(Problem::invalid)?;
    Ok(settings.recovery)
}

impl FailureBody {
    fn into_failure(self) -> Result<Failure, Invalid> {
        let kind = match (&self.error_kind, self.status) {
            (Some(kind), _) => {
                ErrorKind::parse(kind).map_err(|wrong| Invalid::new("/error_kind", wrong.detail))?
            }
            (None, Some(_)) => ErrorKind::Status,
            (None, None) => {
                return Err(Invalid::new("", "a failure has a status or an error_kind"));
            }
        };
        if self.status.is_some_and(|status| !(100..=599).contains(&status)) {
            return Err(Invalid::new("/status", "a status is from 100 to 599"));
        }
        let detail = match self.status {
            Some(status) => format!("the handler answered {status}"),
            None => "as simulated".to_owned(),
        };
        let headers =
            self.headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value));
        Ok(Failure {
            status: self.status,
            retry_after: self.retry_after.map(|lasting| lasting.0),
            headers: headers.collect(),
            ..Failure::new(kind, detail)
        })
    }
}

impl From<Step> for StepBody {
    fn from(step: Step) -> Self {
        let range =
            |(min, max): (Duration, Duration)| Range { min: Lasting(min), max: Lasting(max) };
        let then = word(&step.decision.settlement);
        let (reason, to_queue) = match step.decision.settlement {
            Settlement::DeadLetter { reason } | Settlement::Discard { reason } => {
                (Some(reason), None)
            }
            Settlement::Move { to_queue, reason } => (Some(reason), Some(to_queue.to_string())),
            Settlement::Ack
            | Settlement::Retry { .. }
            | Settlement::Postpone { .. }
            | Settlement::Release => (None, None),
        };
        Self {
            failure: step.number,
            then,
            wait: step.wait.map(range),
            age: range(step.age),
            reason,
            to_queue,
            stops_queue: step.decision.stop_queue,
        }
    }
}

fn word(settlement: &Settlement) -> &'static str {
    match settlement {
        Settlement::Ack => "ack",
        Settlement::Retry { .. } => "retry",
        Settlement::Postpone { .. } => "stop_queue",
        Settlement::DeadLetter { .. } => "dead_letter",
        Settlement::Discard { .. } => "discard",
        Settlement::Move { .. } => "move",
        Settlement::Release => "release",
    }
}

/// Complains of rules that cannot be fulfilled: they move messages to a queue that is not there, or round in a
/// circle. What the queue has already is left alone, so that the rest of it can be changed when a target is gone.
pub(super) fn check_targets(
    name: &QueueName,
    recovery: &Recovery,
    queues: &[QueueRecord],
) -> Result<(), Problem> {
    let known = |target: &QueueName| queues.iter().any(|queue| queue.name == *target);
    let before = queues.iter().find(|queue| queue.name == *name);
    let before = before.map_or(&[][..], |queue| &queue.settings.recovery.rules);
    let mut wrong = Vec::new();
    for (number, rule) in recovery.rules.iter().enumerate() {
        let Action::Move { to_queue } = &rule.action else { continue };
        if before.contains(rule) {
            continue;
        }
        let detail = if to_queue != name && !known(to_queue) {
            format!("there is no queue {to_queue}; make it first")
        } else if comes_back(name, to_queue, queues) {
            format!("from {to_queue} messages would come back to {name}, and go round for ever")
        } else {
            continue;
        };
        wrong.push(Invalid::new(format!("/recovery/rules/{number}/to_queue"), detail));
    }
    if wrong.is_empty() { Ok(()) } else { Err(Problem::invalid(wrong)) }
}

/// Whether rules lead from `to` to `name`.
fn comes_back(name: &QueueName, to: &QueueName, queues: &[QueueRecord]) -> bool {
    let mut seen = BTreeSet::new();
    let mut next = vec![to];
    while let Some(queue) = next.pop() {
        if queue == name {
            return true;
        }
        if !seen.insert(queue) {
            continue;
        }
        let record = queues.iter().find(|record| record.name == *queue);
        next.extend(record.iter().flat_map(|record| &record.settings.recovery.rules).filter_map(
            |rule| match &rule.action {
                Action::Move { to_queue } => Some(to_queue),
                _ => None,
            },
        ));
    }
    false
}

/// How many failures one simulation takes.
const FAILURES_MAX: usize = 1000;
