// RabbitMQ by amqplib (npm): one quorum queue, publisher confirms.
import amqp from 'amqplib'
import { measure } from './lib.mjs'

const QUEUE = 'bench'
const UNACKNOWLEDGED_MAX = 2_000
const ACKNOWLEDGE_EVERY = 200
const ACKNOWLEDGE_WITHIN_MS = 2

await measure(async (ask) => {
  // The library leaves Nagle's algorithm on, which holds a small frame back for up to 40 ms.
  const connect = () => amqp.connect(ask.url, { noDelay: true })
  const connection = await connect()
  const channel = await connection.createConfirmChannel()
  await channel.assertQueue(QUEUE, { durable: true, arguments: { 'x-queue-type': 'quorum' } })

  const enqueue = (body) =>
    new Promise((resolve, reject) =>
      channel.sendToQueue(QUEUE, Buffer.from(JSON.stringify(body)), { persistent: true }, (error) =>
        error ? reject(error) : resolve(),
      ),
    )

  return {
    version: connection.connection.serverProperties.version,
    settings: {
      enqueue: 'quorum queue, publisher confirms',
      bulk: 'quorum queue, 1000 published, then all confirms awaited',
      drain: `quorum queue, prefetch ${UNACKNOWLEDGED_MAX}, acks by ${ACKNOWLEDGE_EVERY}`,
      latency: 'quorum queue, publisher confirms, ack each',
    },
    enqueue,
    bulk: (bodies) => Promise.all(bodies.map(enqueue)),
    work: async (handled) => {
      // RabbitMQ advises two connections: one that is throttled for publishing too fast must not hold up acks.
      const consuming = await connect()
      const consumer = await consuming.createChannel()
      await consumer.prefetch(UNACKNOWLEDGED_MAX)
      const many = ask.measure === 'drain' ? ACKNOWLEDGE_EVERY : 1
      let unacknowledged = 0
      let newest
      const acknowledge = () => {
        if (unacknowledged === 0) return
        consumer.ack(newest, true)
        unacknowledged = 0
      }
      const timer = setInterval(acknowledge, ACKNOWLEDGE_WITHIN_MS)
      await consumer.consume(QUEUE, (message) => {
        handled([JSON.parse(message.content)])
        newest = message
        if (++unacknowledged >= many) acknowledge()
      })
      return async () => {
        clearInterval(timer)
        acknowledge()
        await consuming.close()
      }
    },
    close: () => connection.close(),
  }
})
