//! Topics: who has subscribed, and how much is published. Routes, bodies, handlers.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{
    Condition, Invalid, QueueName, Subscription, SubscriptionFilter, SubscriptionName, TopicName,
};
use crate::store::{PutSubscription, SUBSCRIPTIONS_MAX};
use crate::telemetry::rates;

use super::Doors;
use super::body::{Path, read_json};
use super::problem::{self, Problem};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .routes(routes!(list_topics))
        .routes(routes!(list_subscriptions))
        .routes(routes!(get_subscription, put_subscription, delete_subscription))
}

/// Topics that have subscriptions, or to which somebody published lately; by name.
#[derive(Debug, Serialize, ToSchema)]
struct TopicList {
    items: Vec<TopicBody>,
}

/// A topic.
#[derive(Debug, Default, Serialize, ToSchema)]
struct TopicBody {
    topic: String,
    subscriptions: usize,
    /// How many messages were published in the last minute through the process that answers.
    published_last_minute: u64,
    /// The same for each second.
    published_per_second: f64,
}

/// The subscriptions of a topic, by name.
#[derive(Debug, Serialize, ToSchema)]
struct SubscriptionList {
    items: Vec<SubscriptionBody>,
}

/// A queue's wish for what is published to a topic.
#[derive(Debug, Serialize, ToSchema)]
struct SubscriptionBody {
    topic: String,
    name: String,
    queue: String,
    filter: FilterBody,
}

/// A subscription as it is put. What only can be read is taken and overlooked.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SubscriptionPut {
    /// Where the copies go.
    queue: String,
    /// Which messages it wants; without it, all.
    #[serde(default)]
    filter: FilterBody,
    #[serde(default)]
    #[schema(read_only)]
    #[expect(dead_code, reason = "so that what a GET shows can be put back")]
    topic: Option<String>,
    #[serde(default)]
    #[schema(read_only)]
    #[expect(dead_code, reason = "so that what a GET shows can be put back")]
    name: Option<String>,
}

/// Which messages are wanted: those for which every condition holds.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = SubscriptionFilter)]
struct FilterBody {
    /// What the type is like: `orders.placed`, `orders.*` (one word), `orders.**` (any number of words),
    /// `{"prefix": "orders."}`, or a list of those, of which one has to fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    r#type: Option<ConditionBody>,
    /// What headers are like: a value, a prefix, or a list of those; `ce-<attribute>` is an attribute of a CloudEvent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(required = false)]
    headers: BTreeMap<String, ConditionBody>,
}

/// What a value is to be like.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
#[schema(as = Condition)]
enum ConditionBody {
    /// This value.
    Is(String),
    /// It begins like this.
    Begins(PrefixBody),
    /// Like one of these.
    Any(Vec<SimpleConditionBody>),
}

/// One of a list of conditions.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
#[schema(as = SimpleCondition)]
enum SimpleConditionBody {
    Is(String),
    Begins(PrefixBody),
}

/// How a value begins.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Prefix)]
struct PrefixBody {
    prefix: String,
}

impl From<SimpleConditionBody> for Condition {
    fn from(body: SimpleConditionBody) -> Self {
        match body {
            SimpleConditionBody::Is(text) => Self::Is(text),
            SimpleConditionBody::Begins(PrefixBody { prefix }) => Self::Begins { prefix },
        }
    }
}

impl From<ConditionBody> for Condition {
    fn from(body: ConditionBody) -> Self {
        match body {
            ConditionBody::Is(text) => Self::Is(text),
            ConditionBody::Begins(PrefixBody { prefix }) => Self::Begins { prefix },
            ConditionBody::Any(all) => Self::Any(all.into_iter().map(Self::from).collect()),
        }
    }
}

impl From<&Condition> for SimpleConditionBody {
    fn from(condition: &Condition) -> Self {
        match condition {
            Condition::Is(text) => Self::Is(text.clone()),
            Condition::Begins { prefix } => Self::Begins(PrefixBody { prefix: prefix.clone() }),
            // A list in a list is refused when it is put.
            Condition::Any(_) => Self::Is(String::new()),
        }
    }
}

impl From<&Condition> for ConditionBody {
    fn from(condition: &Condition) -> Self {
        match condition {
            Condition::Is(text) => Self::Is(text.clone()),
            Condition::Begins { prefix } => Self::Begins(PrefixBody { prefix: prefix.clone() }),
            Condition::Any(all) => Self::Any(all.iter().map(SimpleConditionBody::from).collect()),
        }
    }
}

impl From<FilterBody> for SubscriptionFilter {
    fn from(body: FilterBody) -> Self {
        let headers = body.headers.into_iter();
        Self {
            kind: body.r#type.map(Condition::from),
            // Names are as HTTP has them: in any case.
            headers: headers
                .map(|(name, condition)| (name.to_ascii_lowercase(), condition.into()))
                .collect(),
        }
    }
}

impl From<&SubscriptionFilter> for FilterBody {
    fn from(filter: &SubscriptionFilter) -> Self {
        let header = |(name, condition): (&String, &Condition)| (name.clone(), condition.into());
        Self {
            r#type: filter.kind.as_ref().map(ConditionBody::from),
            headers: filter.headers.iter().map(header).collect(),
        }
    }
}

impl From<&Subscription> for SubscriptionBody {
    fn from(subscription: &Subscription) -> Self {
        Self {
            topic: subscription.topic.to_string(),
            name: subscription.name.to_string(),
            queue: subscription.queue.to_string(),
            filter: FilterBody::from(&subscription.filter),
        }
    }
}

/// List topics, by name.
///
/// Those with subscriptions, and those to which something was published in the last minute through the process that
/// answers: a name in which somebody made a typing error shows up here, with no subscriptions.
#[utoipa::path(get, path = "/admin/v1/topics", tag = "topics", responses((status = 200, body = TopicList)))]
async fn list_topics(State(doors): State<Doors>) -> Result<Json<TopicList>, Problem> {
    let mut topics = BTreeMap::<TopicName, TopicBody>::new();
    for subscription in doors.pump().store().subscriptions().await? {
        topics.entry(subscription.topic).or_default().subscriptions += 1;
    }
    for (topic, count) in rates::last_minute() {
        let topic = topics.entry(topic).or_default();
        topic.published_last_minute = count;
        topic.published_per_second = count as f64 / rates::OVER.as_secs_f64();
    }
    let named = |(topic, body): (TopicName, TopicBody)| TopicBody { topic: topic.into(), ..body };
    Ok(Json(TopicList { items: topics.into_iter().map(named).collect() }))
}

/// List a topic's subscriptions, by name.
#[utoipa::path(get, path = "/admin/v1/topics/{topic}/subscriptions", tag = "topics",
    params(("topic" = String, Path, description = "The topic's name")),
    responses((status = 200, body = SubscriptionList)))]
async fn list_subscriptions(
    State(doors): State<Doors>,
    Path(topic): Path<String>,
) -> Result<Json<SubscriptionList>, Problem> {
    let topic = TopicName::parse(&topic)?;
    let all = doors.pump().store().subscriptions().await?;
    let its_own = all.iter().filter(|subscription| subscription.topic == topic);
    Ok(Json(SubscriptionList { items: its_own.map(SubscriptionBody::from).collect() }))
}

/// Show a subscription.
#[utoipa::path(get, path = "/admin/v1/topics/{topic}/subscriptions/{name}", tag = "topics",
    params(("topic" = String, Path, description = "The topic's name"),
        ("name" = String, Path, description = "The subscription's name")),
    responses((status = 200, body = SubscriptionBody)))]
async fn get_subscription(
    State(doors): State<Doors>,
    Path((topic, name)): Path<(String, String)>,
) -> Result<Json<SubscriptionBody>, Problem> {
    let (topic, name) = (TopicName::parse(&topic)?, SubscriptionName::parse(&name)?);
    let all = doors.pump().store().subscriptions().await?;
    let found = all.iter().find(|it| it.topic == topic && it.name == name);
    found.map(|it| Json(it.into())).ok_or_else(|| no_such_subscription(&topic, &name))
}

/// Subscribe a queue to a topic, or change what it wants. In force for the next publish on every replica.
#[utoipa::path(put, path = "/admin/v1/topics/{topic}/subscriptions/{name}", tag = "topics",
    params(("topic" = String, Path, description = "The topic's name"),
        ("name" = String, Path, description = "The subscription's name")),
    request_body = SubscriptionPut,
    responses(
        (status = 201, description = "It is new", body = SubscriptionBody),
        (status = 200, description = "It says this now", body = SubscriptionBody)))]
async fn put_subscription(
    State(doors): State<Doors>,
    Path((topic, name)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Problem> {
    let (topic, name) = (TopicName::parse(&topic)?, SubscriptionName::parse(&name)?);
    let body = read_json::<SubscriptionPut>(request).await?;
    let queue = QueueName::parse(&body.queue);
    let queue = queue.map_err(|wrong| Invalid::new("/queue", wrong.detail))?;
    let subscription = Subscription { topic, name, queue, filter: body.filter.into() };
    subscription.filter.check().map_err(Problem::invalid)?;
    let shown = SubscriptionBody::from(&subscription);
    let all = doors.pump().store().subscriptions().await?;
    let others =
        all.iter().filter(|it| it.topic == subscription.topic && it.name != subscription.name);
    if others.count() >= SUBSCRIPTIONS_MAX {
        let detail = format!("a topic has at most {SUBSCRIPTIONS_MAX} subscriptions");
        return Err(Invalid::new("", detail).into());
    }
    let store = doors.pump().store().clone();
    let put = async move { Ok(store.put_subscription(subscription).await?) };
    let status = match doors.to_the_end(put).await? {
        PutSubscription::Created => StatusCode::CREATED,
        PutSubscription::Replaced => StatusCode::OK,
        PutSubscription::NoSuchQueue => {
            let detail = format!("there is no queue {}; make it first", shown.queue);
            return Err(Invalid::new("/queue", detail).into());
        }
    };
    Ok((status, Json(shown)).into_response())
}

/// End a subscription. What was published before stays in its queue.
#[utoipa::path(delete, path = "/admin/v1/topics/{topic}/subscriptions/{name}", tag = "topics",
    params(("topic" = String, Path, description = "The topic's name"),
        ("name" = String, Path, description = "The subscription's name")),
    responses((status = 204, description = "It is gone")))]
async fn delete_subscription(
    State(doors): State<Doors>,
    Path((topic, name)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let (topic, name) = (TopicName::parse(&topic)?, SubscriptionName::parse(&name)?);
    let store = doors.pump().store().clone();
    let (of, named) = (topic.clone(), name.clone());
    let delete = async move { Ok(store.delete_subscription(&of, &named).await?) };
    if doors.to_the_end(delete).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(no_such_subscription(&topic, &name))
    }
}

fn no_such_subscription(topic: &TopicName, name: &SubscriptionName) -> Problem {
    let detail = format!("the topic {topic} has no subscription {name}");
    Problem::new(problem::NO_SUCH_SUBSCRIPTION, detail)
}
