//! Messages sent in a transaction of one's own, on Postgres: `cargo run --example own_transaction -- postgres://…`
//!
//! It needs a table `placed (id integer, customer text)` and a queue `orders` in the same database.

#![expect(clippy::disallowed_methods, reason = "nobody cancels these transactions half-way")]

use pumphouse::model::{NewMessage, QueueName};
use pumphouse::store::Postgres;
use sqlx::PgPool;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).ok_or("the URL of the database is missing")?;
    let database = PgPool::connect(&url).await?;
    with_sql(&database).await?;
    with_the_library(&database).await
}

async fn with_sql(database: &PgPool) -> Result<(), Box<dyn std::error::Error>> {
    let mut transaction = database.begin().await?;
    sqlx::query("insert into placed (id, customer) values (20, 'grace')")
        .execute(&mut *transaction)
        .await?;
    let send = "select pumphouse.send('orders', $1::json, correlation_id => 'order-20')";
    sqlx::query(send).bind(r#"{"customer": "grace"}"#).execute(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(())
}

async fn with_the_library(database: &PgPool) -> Result<(), Box<dyn std::error::Error>> {
    let mut transaction = database.begin().await?;
    let message = NewMessage::new(QueueName::parse("orders")?, r#"{"customer": "edsger"}"#);
    Postgres::enqueue_in(&mut transaction, &message).await?;
    transaction.commit().await?;
    Ok(())
}
