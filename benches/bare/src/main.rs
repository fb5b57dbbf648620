//! What the machine allows: bare programs that do the least that a durable message pump can do. They
//! validate nothing, retry nothing and count nothing, but what they acknowledge has been synced.

use clap::{Parser, Subcommand};

mod chain;
mod client;
mod commit;
mod door;
mod http;
mod postgres;
mod report;
mod sink;
mod sqlite;

#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(about, version)]
struct Command {
    #[command(subcommand)]
    program: Program,
}

#[derive(Subcommand)]
enum Program {
    /// Answer every POST with 201: what HTTP alone costs
    Echo(door::Listen),
    /// Take a POST into SQLite by group commit
    SqliteEnqueue(sqlite::Enqueue),
    /// Take a POST into Postgres by group commit
    PostgresEnqueue(postgres::Enqueue),
    /// Insert into SQLite, in process
    SqliteInsert(sqlite::Insert),
    /// Lease and delete from SQLite, in process, two durable transactions for a batch
    SqliteDrain(sqlite::Drain),
    /// Insert into Postgres, without HTTP
    PostgresInsert(postgres::Insert),
    /// Lease and delete from Postgres, without HTTP, two durable transactions for a batch
    PostgresDrain(postgres::Drain),
    /// Answer every POST with 200 and count it; GET /count tells
    Sink(door::Listen),
    /// Send POSTs as fast as they are answered
    Client(client::Client),
    /// From a POST through SQLite to a POST to the sink
    ChainSqlite(chain::Sqlite),
    /// From a POST through Postgres to a POST to the sink
    ChainPostgres(chain::Postgres),
    /// How long one commit of one row takes
    Commit(commit::Commit),
}

fn main() {
    let done = match Command::parse().program {
        Program::Echo(listen) => run(sink::echo(listen)),
        Program::SqliteEnqueue(enqueue) => run(enqueue.run()),
        Program::PostgresEnqueue(enqueue) => run(enqueue.run()),
        Program::SqliteInsert(insert) => insert.run(),
        Program::SqliteDrain(drain) => drain.run(),
        Program::PostgresInsert(insert) => run(insert.run()),
        Program::PostgresDrain(drain) => run(drain.run()),
        Program::Sink(listen) => run(sink::sink(listen)),
        Program::Client(client) => client.run(),
        Program::ChainSqlite(chain) => run(chain.run()),
        Program::ChainPostgres(chain) => run(chain.run()),
        Program::Commit(commit) => commit.run(),
    };
    if let Err(error) = done {
        door::give_up(error);
    }
}

fn run(program: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(program)
}
