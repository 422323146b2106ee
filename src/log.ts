import { appendFile, writeSync } from 'node:fs'
import type { Writable } from 'node:stream'
import { pino, type Logger } from 'pino'

/** The methods of a logger that most modules need; pino has them. */
export type Log = Record<'debug' | 'info' | 'warn' | 'error', (what: object, message: string) => void>

/** One request as the access log shows it. */
export interface AccessLine {
  method: string
  /** The route's pattern, never the URL, whose query may hold anything; undefined where no route was found. */
  route: string | undefined
  status: number
  ms: number
  requestId: string
  /** What the handler adds. */
  details: object
}

/**
 * Returns pino, and `logRequest`, which writes an access line at `info` for a quarter of what pino takes. Only
 * `details` can need escapes: Node knows the methods, routes are this program's own, `requestId` has a fixed alphabet.
 */
export function createLog (level: string, destination: { write: (line: string) => void }) {
  const logger: Logger = pino({ level, base: null }, destination)
  const info = logger.levels.values.info as number

  function logRequest ({ method, route, status, ms, requestId, details }: AccessLine): void {
    const added = JSON.stringify(details).slice(1, -1)
    destination.write(`{"level":${info},"time":${Date.now()},"method":"${method}",` +
      `"route":${route === undefined ? null : `"${route}"`},"status":${status},"ms":${ms},` +
      `"request_id":"${requestId}","caller":"anonymous",${added}${added === '' ? '' : ','}"msg":"request completed"}\n`)
  }
  return { logger, logRequest: logger.isLevelEnabled('info') ? logRequest : () => {} }
}

/** Returns a way to say what may happen to many at the same time: at most once in `ms`. */
export function throttledError (say: Log['error'], ms: number): Log['error'] {
  let last = -Infinity
  return (what, message) => {
    if (performance.now() - last < ms) return
    last = performance.now()
    say(what, message)
  }
}

/** A write costs as much as many lines do, so lines wait for others; a crash that runs no code loses them. */
const DELAY_MS = 100
const CHUNK = 32_768

/** How many characters may wait for a reader of the log, or for its disk. What comes beyond is dropped. */
const MAX_WAITING = 1_048_576

/** Where text is written without ever waiting for a reader. */
export interface Sink {
  /** How many characters are not written yet. */
  waiting: () => number
  /** Writes, and calls back when that is done or has failed. */
  write: (text: string, done: (error?: Error | null) => void) => void
  /** Writes what can be written now; for the end of the process. */
  writeNow: (text: string) => void
}

/**
 * For a pipe, a socket or a terminal. pino's own destination hangs the exit of a process whose pipe is full; Node's
 * stream does not. Once its reader is gone every write fails.
 */
export function streamSink (stream: Writable): Sink {
  stream.on('error', () => {})
  return {
    waiting: () => stream.writableLength,
    write: (text, done) => { stream.write(text, done) },
    writeNow: text => { stream.write(text) }
  }
}

/** For a file or a device. Node's stream would stop for good at the first error, such as a full disk's. */
export function fileSink (fd: number): Sink {
  const queue: [text: string, done: (error?: Error | null) => void][] = []
  let waiting = 0

  function next (): void {
    const [text, done] = queue[0] as typeof queue[0]
    appendFile(fd, text, error => {
      queue.shift()
      waiting -= text.length
      if (queue.length > 0) next()
      done(error)
    })
  }

  return {
    waiting: () => waiting,
    write (text, done) {
      waiting += text.length
      queue.push([text, done])
      if (queue.length === 1) next()
    },
    writeNow (text) {
      try {
        writeSync(fd, text)
      } catch {}
    }
  }
}

/**
 * Where pino's lines go. Many are written at once; at the end of the process call `flush`, and none is missing. A sink
 * that stalls or fails stops nothing: lines beyond a bound are dropped, and their count is logged when it takes some
 * again.
 */
export function createDestination (sink: Sink) {
  let lines = ''
  let count = 0
  let dropped = 0
  let isSinkWell = true

  /** Hands the lines over, if the sink has room for them. */
  function pass (): void {
    const [text, size] = [lines, count]
    lines = ''
    count = 0
    if (size === 0) return
    if (sink.waiting() + text.length > MAX_WAITING) {
      dropped += size
      return
    }
    sink.write(text, error => {
      isSinkWell = !error
      if (error) dropped += size
      else report()
    })
  }

  /** Logs how many lines are missing. */
  function report (): void {
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
      if (count === 0) setTimeout(pass, DELAY_MS).unref()
      lines += line
      count++
      if (lines.length > CHUNK) pass()
    },
    /** Writes what waits, as far as that can be done now. */
    flush (): void {
      if (count > 0 && isSinkWell) sink.writeNow(lines)
      lines = ''
      count = 0
    }
  }
}
