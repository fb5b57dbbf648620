// graphile-worker (npm) on Postgres.
import { readFileSync } from 'node:fs'
import { Logger, makeWorkerUtils, run } from 'graphile-worker'
import pg from 'pg'
import { measure } from './lib.mjs'

const TASK = 'bench'
const CONNECTIONS_MAX = 20
const { version } = JSON.parse(readFileSync(new URL('./node_modules/graphile-worker/package.json', import.meta.url)))

const preset = {
  // Throughput: jobs are fetched 500 at a time, and completions that fall together become one statement.
  drain: { concurrentJobs: 24, localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 },
  // Waking by NOTIFY straight into a free job: the local queue would only hold jobs back here.
  latency: { concurrentJobs: 24 },
}

await measure(async (ask) => {
  const pgPool = new pg.Pool({ connectionString: ask.url, max: CONNECTIONS_MAX })
  // The library insists on both: a lost connection is its own to report.
  pgPool.on('error', () => {})
  pgPool.on('connect', (client) => client.on('error', () => {}))

  const logger = new Logger(() => (level, message) => level === 'error' && console.error(message))
  const utils = await makeWorkerUtils({ pgPool, logger })
  await utils.migrate()
  return {
    version,
    settings: {
      enqueue: `addJob, pool of ${CONNECTIONS_MAX}`,
      bulk: 'addJobs',
      drain: 'concurrency 24, localQueue 500, completeJobBatchDelay 0',
      latency: 'concurrency 24, NOTIFY, no local queue',
    },
    enqueue: (body) => utils.addJob(TASK, body),
    bulk: (bodies) => utils.addJobs(bodies.map((payload) => ({ identifier: TASK, payload }))),
    work: async (handled) => {
      const runner = await run({
        pgPool,
        logger,
        noHandleSignals: true,
        preset: { worker: preset[ask.measure] },
        taskList: { [TASK]: (body) => handled([body]) },
      })
      return () => runner.stop()
    },
    close: () => utils.release(),
  }
})
