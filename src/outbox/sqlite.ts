import { once } from 'node:events'
import { MessageChannel, Worker, type MessagePort } from 'node:worker_threads'
import type { Project } from '../config.ts'
import type { Log } from '../log.ts'
import { NO_METRICS, type Metrics } from '../metrics.ts'
import { groupCalls } from './grouped.ts'
import { OPENED, type Answer, type Call } from './calls.ts'
import type { Database, NewRow } from './database.ts'
import { DirectoryInUse, NO_CLAIM, type Counts, type Limits, type Outbox } from './outbox.ts'
import { listed, readRows, UNREADABLE } from './rows.ts'
import type { ThreadData } from './sqlite-thread.ts'
import type { WaitingRow } from './statements.ts'

/** The most events in one transaction. */
const MAX_GROUP = 1000

/** The longest time that a request waits for the disk. */
const FOREGROUND_TIMEOUT_MS = 5000
const TOO_SLOW = 'the disk does not answer'

interface Pending { resolve: (result: never) => void, reject: (error: Error) => void }

/**
 * Opens an outbox in a directory: SQLite, in a thread of its own, because each commit waits for the disk. Rejects with
 * DirectoryInUse, an error of SQLite or of the files, or an error when they hold events of another project.
 */
export function openSqlite (
  directory: string, project: Project, log: Log, limits: Limits, metrics?: Metrics
): Promise<Outbox> {
  const { port1: ours, port2: port } = new MessageChannel()
  const workerData: ThreadData = { port, directory, project, limits }
  // The thread needs no variable, and none of the loaders that a test runner passes in NODE_OPTIONS.
  const worker = new Worker(new URL('./sqlite-thread.js', import.meta.url), {
    workerData, transferList: [port], execArgv: [], env: {}
  })
  // A bug in the thread ends the process, as one in this thread would.
  worker.on('error', error => { setImmediate(() => { throw error }) })
  return connectOutbox(ours, log, metrics)
}

/** Resolves with the outbox whose database answers on the other end of `port`. Rejects as `openSqlite` does. */
export async function connectOutbox (
  port: MessagePort, log: Log, metrics: Metrics = NO_METRICS
): Promise<Outbox> {
  const closed = once(port, 'close')
  const calls = new Map<number, Pending>()
  let lastId = OPENED
  let counts: Counts = { waiting: 0, dead: 0, bytes: 0, paused: false }

  port.on('message', ({ id, result, error, counts: now }: Answer) => {
    const call = calls.get(id)
    calls.delete(id)
    counts = now ?? counts
    if (error === undefined) call?.resolve(result as never)
    else call?.reject(error.isInUse ? new DirectoryInUse(error.message) : new Error(error.message))
  })

  const answerTo = (id: number) => new Promise<never>((resolve, reject) => { calls.set(id, { resolve, reject }) })

  function call<Name extends keyof Database> (
    name: Name, ...args: Parameters<Database[Name]>
  ): Promise<ReturnType<Database[Name]>> {
    const message: Call = { id: ++lastId, name, args }
    port.postMessage(message)
    return answerTo(message.id)
  }

  await answerTo(OPENED)
  /** How many calls for waiting requests are late. Until the disk answers them, no further ones are made. */
  let lateCalls = 0
  let lateSince: Date | undefined

  /** Rejects when the disk has not answered in time; what it answers later does not matter. */
  function inTime<Result> (answer: Promise<Result>): Promise<Result> {
    return new Promise((resolve, reject) => {
      let isLate = false
      const timer = setTimeout(() => {
        isLate = true
        lateCalls++
        lateSince ??= new Date()
        reject(new Error(TOO_SLOW))
      }, FOREGROUND_TIMEOUT_MS)
      answer.then(resolve, reject).finally(() => {
        clearTimeout(timer)
        if (isLate && --lateCalls === 0) lateSince = undefined
      })
    })
  }

  const groups = groupCalls({
    maxGroup: MAX_GROUP,
    maxStores: 1,
    async store (events) {
      if (lateCalls > 0) return { results: events.map(() => 'rejected'), cause: TOO_SLOW }
      const rows = events.map(
        ({ event: { anonKey = NO_CLAIM, json, bytes }, maxBytes }): NewRow => [anonKey, json, bytes, maxBytes]
      )
      return inTime(call('put', rows))
    },
    async lookUp (anonKeys) {
      if (lateCalls > 0) throw new Error(TOO_SLOW)
      return inTime(call('has', anonKeys))
    }
  }, log)

  return {
    put: groups.put,
    // A put is counted before it resolves.
    has: anonKey => counts.waiting === 0 ? 'no' : groups.has(anonKey),
    async next (count, after) {
      if (counts.waiting === 0) return []
      const rows = (await call('next', count, after)).map(asRow)
      return readRows(rows, unreadable =>
        call('deadLetter', unreadable.map(({ id }) => ({ id, reason: UNREADABLE }))), log, metrics)
    },
    ack: entries => call('ack', idsOf(entries)),
    deadLetter: letters => call('deadLetter', letters.map(({ entry: { id }, reason }) => ({ id, reason }))),
    disk: () => call('disk'),
    outage: () => lateSince && { part: 'disk', since: lateSince },
    counts: () => counts,
    waiting: async (count, after) => (await call('waiting', count, after)).map(row => listed(asRow(row))),
    dead: async (count, after) => (await call('dead', count, after)).map(({ id, json, reason, died }) =>
      ({ ...listed({ id: String(id), json }), reason, died: new Date(died) })),
    replay: letters => call('replay', letters),
    drop: letters => call('drop', idsOf(letters)),
    expire: before => call('expire', before.getTime()),
    erase: entries => call('erase', idsOf(entries)),
    pause: isPaused => call('pause', isPaused),
    async close () {
      await groups.idle()
      await call('close')
      await closed
    }
  }
}

const asRow = ({ id, json, endpoint }: WaitingRow) => ({ id: String(id), json, ...endpoint !== null && { endpoint } })
const idsOf = (list: { id: string }[]) => list.map(({ id }) => ({ id }))
