// What every Node driver shares: how the four measures are taken. A driver says only how its peer is called.
//
// A driver hands `measure` a function that connects and returns
//   { version, settings, enqueue(body), bulk(bodies), work(handled), close() }
// `handled(bodies)` is called by the no-op handler at its start, with everything that one call of it was given.

const WARMUP_MS = 1_000
const BATCH = 1_000

/** Takes the one measure that run.py asked for (as JSON in argv) and prints it as one line. */
export async function measure(connect) {
  const ask = JSON.parse(process.argv[2])
  const peer = await connect(ask)
  const figures = await { enqueue, bulk, drain, latency }[ask.measure](peer, ask)
  process.stdout.write(JSON.stringify({ ...figures, version: peer.version, settings: peer.settings[ask.measure] }) + '\n')
  await peer.close()
  process.exit(0)
}

/** One awaited call per job, from `producers` loops at once. */
async function enqueue(peer, ask) {
  return callUntilDeadline(ask, 1, (n) => peer.enqueue(body(n, ask.payload)))
}

/** 1,000 jobs in each awaited call. */
async function bulk(peer, ask) {
  return callUntilDeadline(ask, BATCH, (n) => peer.bulk(bodies(n * BATCH, BATCH, ask.payload)))
}

/** `jobs` are queued before the worker starts. The first call of the handler starts the clock and is not counted. */
async function drain(peer, ask) {
  for (let queued = 0; queued < ask.jobs; queued += BATCH) {
    await peer.bulk(bodies(queued, Math.min(BATCH, ask.jobs - queued), ask.payload))
  }
  const left = resolvers()
  let first, last
  let inFirstCall = 0
  let seen = 0
  const stop = await peer.work((handled) => {
    last = performance.now()
    if (first === undefined) {
      first = last
      inFirstCall = handled.length
    }
    seen += handled.length
    if (seen >= ask.jobs) left.resolve()
  })
  await left.promise
  await stop()
  return { jobs: ask.jobs, per_second: round(((ask.jobs - inFirstCall) * 1_000) / (last - first)) }
}

/** Open loop: a call is made when it is due, whether or not the earlier ones have been answered. */
async function latency(peer, ask) {
  const called = []
  const times = []
  const warm = (WARMUP_MS / 1_000) * ask.rate
  const total = warm + ask.seconds * ask.rate
  const done = resolvers()
  let arrived = 0
  let last
  const stop = await peer.work((handled) => {
    const now = performance.now()
    last = now
    for (const { n } of handled) {
      if (n >= warm) times.push(now - called[n])
      if (++arrived >= total) done.resolve()
    }
  })
  const began = performance.now()
  for (let n = 0; n < total; ) {
    const due = Math.min(total, Math.floor(((performance.now() - began) * ask.rate) / 1_000) + 1)
    for (; n < due; n++) {
      called[n] = performance.now()
      peer.enqueue(body(n, ask.payload)).catch(done.reject)
    }
    await new Promise((tick) => setTimeout(tick, 1))
  }
  await done.promise
  await stop()
  return { jobs: times.length, rate: ask.rate, ...percentiles(times), behind_ms: round(last - called[total - 1]) }
}

async function callUntilDeadline(ask, jobsPerCall, call) {
  const times = []
  let next = 0
  const countFrom = performance.now() + WARMUP_MS
  const deadline = countFrom + ask.seconds * 1_000
  let last = countFrom
  async function producer() {
    for (;;) {
      const began = performance.now()
      if (began >= deadline) return
      await call(next++)
      const now = performance.now()
      // A call belongs to the window when it began in it; the window then lasts until the last of them was answered.
      if (began >= countFrom) {
        times.push(now - began)
        last = Math.max(last, now)
      }
    }
  }
  await Promise.all(Array.from({ length: ask.producers }, producer))
  return {
    producers: ask.producers,
    per_second: round((times.length * jobsPerCall * 1_000) / (last - countFrom)),
    ...percentiles(times),
  }
}

function bodies(from, count, payload) {
  return Array.from({ length: count }, (_, i) => body(from + i, payload))
}

/** An object whose JSON is `payload` bytes long. */
function body(n, payload) {
  return { n, pad: 'x'.repeat(payload - 15 - String(n).length) }
}

function percentiles(times) {
  const sorted = Float64Array.from(times).sort()
  const at = (q) => Number(sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * q))].toFixed(3))
  return { p50_ms: at(0.5), p99_ms: at(0.99) }
}

function round(value) {
  return Number(value.toPrecision(4))
}

function resolvers() {
  const made = {}
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }))
  return made
}
