// pg-boss (npm) on Postgres.
import { readFileSync } from 'node:fs'
import { PgBoss } from 'pg-boss'
import { measure } from './lib.mjs'

const QUEUE = 'bench'
const CONNECTIONS_MAX = 20
const { version } = JSON.parse(readFileSync(new URL('./node_modules/pg-boss/package.json', import.meta.url)))

const work = {
  drain: { batchSize: 1_000, localConcurrency: 4, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 },
  latency: { batchSize: 10, localConcurrency: 4, burstWhenBatchFull: true },
}

await measure(async (ask) => {
  // NOTIFY costs every enqueue a database-wide lock at commit, so it is on only where it is what is measured.
  const notify = ask.measure === 'latency'
  const boss = new PgBoss({
    connectionString: ask.url,
    max: CONNECTIONS_MAX,
    useListenNotify: notify,
    supervise: false,
    schedule: false,
  })
  boss.on('error', (error) => console.error(error))
  await boss.start()
  await boss.createQueue(QUEUE, { notify })
  return {
    version,
    settings: {
      enqueue: `send, pool of ${CONNECTIONS_MAX}, NOTIFY off`,
      bulk: 'insert, NOTIFY off',
      drain: 'batchSize 1000, localConcurrency 4, burstWhenBatchFull',
      latency: 'NOTIFY on, batchSize 10, localConcurrency 4',
    },
    enqueue: (body) => boss.send(QUEUE, body),
    bulk: (bodies) => boss.insert(QUEUE, bodies.map((data) => ({ data }))),
    work: async (handled) => {
      await boss.work(QUEUE, work[ask.measure], async (jobs) => handled(jobs.map((job) => job.data)))
      return () => boss.offWork(QUEUE)
    },
    close: () => boss.stop({ graceful: false }),
  }
})
