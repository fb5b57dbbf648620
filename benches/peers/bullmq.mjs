// BullMQ (npm) on Redis.
import { readFileSync } from 'node:fs'
import { Queue, Worker } from 'bullmq'
import { measure } from './lib.mjs'

const QUEUE = 'bench'
const { version } = JSON.parse(readFileSync(new URL('./node_modules/bullmq/package.json', import.meta.url)))
// A finished job is deleted, as in every other peer, rather than kept in a set of its own.
const job = { removeOnComplete: true, removeOnFail: true }

const work = {
  drain: { workers: 4, concurrency: 64 },
  latency: { workers: 1, concurrency: 64 },
}

await measure(async (ask) => {
  const { hostname: host, port } = new URL(ask.url)
  const connection = { host, port: Number(port), maxRetriesPerRequest: null }
  const queue = new Queue(QUEUE, { connection, defaultJobOptions: job })
  await queue.waitUntilReady()
  return {
    version,
    settings: {
      enqueue: 'appendfsync always; add, one connection',
      bulk: 'appendfsync always; addBulk',
      drain: 'appendfsync always; 4 workers of concurrency 64, removeOnComplete',
      latency: 'appendfsync always; concurrency 64',
    },
    enqueue: (body) => queue.add('job', body),
    bulk: (bodies) => queue.addBulk(bodies.map((data) => ({ name: 'job', data }))),
    work: async (handled) => {
      const { workers, concurrency } = work[ask.measure]
      const started = Array.from(
        { length: workers },
        () => new Worker(QUEUE, async (job) => handled([job.data]), { connection, concurrency }),
      )
      for (const worker of started) worker.on('error', (error) => console.error(error))
      await Promise.all(started.map((worker) => worker.waitUntilReady()))
      return () => Promise.all(started.map((worker) => worker.close(true)))
    },
    close: () => queue.close(),
  }
})
