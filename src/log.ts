import { appendFile, writeSync } from 'node:fs'
import type { Writable } from 'node:stream'
import { pino, type Logger } from 'pino'

/** The logger methods that most modules need. A pino logger has them. */
export type Log = Record<'debug' | 'info' | 'warn' | 'error', (fields: object, message: string) => void>

const noop = () => {}

/** Logs nothing. */
export const silentLog: Log = { debug: noop, info: noop, warn: noop, error: noop }

export interface AccessLine {
  method: string
  /** The route's pattern, or undefined when no route matches. Never the URL, whose query may contain anything. */
  route: string | undefined
  status: number
  ms: number
  requestId: string
  /** Letters, digits and `.:_-`: its kind, and of a service the name. */
  caller: string
  /** Letters, digits and hyphens. */
  insertId: string | undefined
  /** What it took to send the event. */
  sent: { mixpanel_ms: number, attempts: number, events: number } | undefined
  /** The other fields that the handler adds. */
  details: object | undefined
}

/**
 * Returns a pino logger, and `logRequest`, which writes an access line at `info` for a quarter of pino's cost. Only
 * `details` needs escapes: methods and routes come from fixed lists, `requestId` and `caller` have fixed alphabets.
 * `toggleDebug` switches the level to `debug` and back, and logs the level that holds from now on.
 */
export function createLog (level: string, destination: { write: (line: string) => void }) {
  const logger: Logger = pino({ level, base: null }, destination)
  const info = logger.levels.values.info as number

  let hasAccessLines = logger.isLevelEnabled('info')

  function toggleDebug (): void {
    // `debug` would switch off a part of `trace`.
    const isVerbose = logger.isLevelEnabled('debug')
    const next = isVerbose ? level : 'debug'
    // The line is written at the more verbose of both levels, so it always appears.
    if (!isVerbose) logger.level = next
    logger.warn({ log_level: next, hint: 'SIGUSR2 toggles debug' }, 'log level set')
    logger.level = next
    hasAccessLines = logger.isLevelEnabled('info')
  }

  // Most lines share these with the one before, and so their text.
  let last: Pick<AccessLine, 'method' | 'route' | 'status' | 'caller'> | undefined
  let requestText = ''
  let lastSent: AccessLine['sent']
  let sentText = ''

  function logRequest ({ method, route, status, ms, requestId, caller, insertId, sent, details }: AccessLine): void {
    if (!hasAccessLines) return
    if (method !== last?.method || route !== last.route || status !== last.status || caller !== last.caller) {
      last = { method, route, status, caller }
      requestText = `,"method":"${method}","route":${route === undefined ? null : `"${route}"`},"status":${status},` +
        `"caller":"${caller}","ms":`
    }
    if (sent !== lastSent) {
      lastSent = sent
      sentText = sent === undefined
        ? ''
        : `"mixpanel_ms":${sent.mixpanel_ms},"attempts":${sent.attempts},"events":${sent.events},`
    }
    const added = details === undefined ? '' : `${JSON.stringify(details).slice(1, -1)},`
    destination.write(`{"level":${info},"time":${Date.now()}${requestText}${ms},"request_id":"${requestId}",` +
      `${insertId === undefined ? '' : `"insert_id":"${insertId}",`}${sentText}${added}"msg":"request completed"}\n`)
  }
  return { logger, logRequest, toggleDebug }
}

/** The shortest time between two log lines about one fault that many requests meet. */
const LOG_INTERVAL_MS = 60_000

/**
 * Returns a function that logs `message` at once when it is first called. Calls in the `ms` after a line share the next
 * one, which has the fields of the last of them. Each line has the number of its calls as `count`.
 */
export function throttled (
  log: Partial<Log> | undefined, level: 'warn' | 'error', message: string, ms = LOG_INTERVAL_MS
): (fields: object) => void {
  let last: object = {}
  let count = 0
  let timer: NodeJS.Timeout | undefined

  function write (): void {
    timer = undefined
    if (count === 0) return
    log?.[level]?.({ ...last, count }, message)
    count = 0
    timer = setTimeout(write, ms).unref()
  }

  return fields => {
    last = fields
    count++
    if (timer === undefined) write()
  }
}

/** One write costs as much as many lines, so lines are gathered. A crash that runs no code loses gathered lines. */
const DELAY_MS = 100
const CHUNK = 32_768

/** The most characters that wait for a log reader or a disk. Lines beyond that are dropped. */
const MAX_WAITING = 1_048_576

/** A log target that never blocks. */
export interface Sink {
  /** Returns the number of characters that are not written yet. */
  waiting: () => number
  /** Writes `text`, then calls `done`, with an error when the write failed. */
  write: (text: string, done: (error?: Error | null) => void) => void
  /** Writes as much of `text` as possible at once, at the end of the process. */
  writeNow: (text: string) => void
}

/**
 * Returns a sink for a pipe, a socket or a terminal. pino's own destination hangs at exit while the pipe is full;
 * Node's stream does not. After its reader is gone, every write fails.
 */
export function streamSink (stream: Writable): Sink {
  stream.on('error', () => {})
  return {
    waiting: () => stream.writableLength,
    write: (text, done) => { stream.write(text, done) },
    writeNow: text => { stream.write(text) }
  }
}

/** Returns a sink for a file or a device. Node's stream would stop permanently at the first error (a full disk). */
export function fileSink (fd: number): Sink {
  const queue: [text: string, done: (error?: Error | null) => void][] = []
  let waiting = 0

  function writeNext (): void {
    const [text, done] = queue[0] as typeof queue[0]
    appendFile(fd, text, error => {
      queue.shift()
      waiting -= text.length
      if (queue.length > 0) writeNext()
      done(error)
    })
  }

  return {
    waiting: () => waiting,
    write (text, done) {
      waiting += text.length
      queue.push([text, done])
      if (queue.length === 1) writeNext()
    },
    writeNow (text) {
      try {
        writeSync(fd, text)
      } catch {}
    }
  }
}

/**
 * Returns the destination of log lines, which writes many at once. `flush` at the end of the process writes the rest.
 * A sink that stalls or fails blocks nothing: lines beyond a bound are dropped, and a later write logs their number.
 */
export function createDestination (sink: Sink) {
  let lines = ''
  let count = 0
  let dropped = 0
  let droppedInAll = 0
  let isSinkWorking = true

  function drop (size: number): void {
    dropped += size
    droppedInAll += size
  }

  /** Writes the gathered lines, or drops them when the sink has no room. */
  function writeLines (): void {
    const [text, size] = [lines, count]
    lines = ''
    count = 0
    if (size === 0) return
    if (sink.waiting() + text.length > MAX_WAITING) {
      drop(size)
      return
    }
    sink.write(text, error => {
      isSinkWorking = !error
      if (error) drop(size)
      else reportDropped()
    })
  }

  function reportDropped (): void {
    if (dropped === 0) return
    const line = JSON.stringify({ level: 40, time: Date.now(), dropped, msg: 'log lines dropped' })
    const reported = dropped
    dropped = 0
    sink.write(`${line}\n`, error => {
      if (error) dropped += reported
    })
  }

  return {
    write (line: string): void {
      if (count === 0) setTimeout(writeLines, DELAY_MS).unref()
      lines += line
      count++
      if (lines.length > CHUNK) writeLines()
    },
    /** Returns how many lines were dropped since the start. */
    dropped: () => droppedInAll,
    /** Writes the gathered lines at once, as far as possible. */
    flush (): void {
      if (count > 0 && isSinkWorking) sink.writeNow(lines)
      lines = ''
      count = 0
    }
  }
}
