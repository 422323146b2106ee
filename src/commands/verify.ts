import { open } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { parseArgs } from 'node:util'
import type { Config } from '../config.ts'
import { addDays, ExportError, exportEvents, type ExportedEvent } from '../mixpanel/export.ts'
import { UsageError } from './admin.ts'
import { createDigestSet, type DigestSet } from './digest-set.ts'

const USAGE = 'use verify --from YYYY-MM-DD --to YYYY-MM-DD [--sent FILE] [--all]'

/** The exit code when an identity was refused or is missing. */
const SOME_FAILED = 2

interface Output {
  /** The log for `--sent -`. */
  stdin: Readable
  /** Prints a line for people, which is no result. */
  report: (line: string) => void
  /** Sets the exit code. */
  exit: (code: number) => void
}

/** What an event of the export says about its identity. */
interface Finding {
  verdict: 'refused' | 'merged' | 'no_failure'
  reason?: string
  identified_id: unknown
  anon_id: unknown
  insert_id: unknown
  /** As in the export. */
  time: unknown
}

/**
 * Compares what the relay has sent with what Mixpanel has merged. Yields JSON lines: an identity that Mixpanel refused,
 * and with `--sent` one that it does not have; with `--all` all others too. Throws a UsageError with a sentence when
 * that cannot be told.
 */
export async function * verifyCommand (config: Config, args: string[], output: Output): AsyncGenerator<string> {
  const { from, to, sent, all } = readArgs(args)
  if (config.MIXPANEL_SERVICE_ACCOUNT === undefined || config.MIXPANEL_PROJECT_ID === undefined) {
    throw new UsageError('verify needs MIXPANEL_SERVICE_ACCOUNT and MIXPANEL_PROJECT_ID.')
  }
  const event = config.MIXPANEL_ID_MERGE === 'original' ? '$identify' : config.MERGE_EVENT
  // Before the export, of which Mixpanel permits sixty an hour.
  const log = sent === undefined || sent === '-' ? output.stdin : await openLog(sent)
  const seen = createDigestSet()
  const counts = { refused: 0, merged: 0, no_failure: 0, not_seen: 0 }
  try {
    // The days of the export may be those of the project's time zone.
    for await (const events of exportEvents(config, { from: addDays(from, -1), to: addDays(to, 1), event })) {
      const findings = events.filter(one => one.event === event && isFirst(one, seen)).map(findingOf)
      for (const { verdict } of findings) counts[verdict]++
      yield findings.filter(({ verdict }) => all || verdict === 'refused').map(toLine).join('')
    }
  } catch (error) {
    if (error instanceof ExportError) throw new UsageError(`It cannot be told what merged: ${error.message}.`)
    throw error
  }
  if (sent !== undefined) {
    for await (const missing of missingIdentities(log, { from, to }, seen)) {
      counts.not_seen++
      yield toLine(missing)
    }
  }
  output.report(Object.entries(counts).map(([name, count]) => `${name}: ${count}`).join(', '))
  if (counts.not_seen > 0) output.report('An event may be missing from the export for some 45 minutes.')
  output.exit(counts.refused + counts.not_seen > 0 ? SOME_FAILED : 0)
}

const toLine = (value: object) => `${JSON.stringify(value)}\n`

function readArgs (args: string[]): { from: string, to: string, sent: string | undefined, all: boolean } {
  const text = { type: 'string' } as const
  try {
    const options = { from: text, to: text, sent: text, all: { type: 'boolean', default: false } } as const
    const { from, to, sent, all } = parseArgs({ args, options }).values
    if (!isDay(from) || !isDay(to) || from > to) throw new Error('no days')
    return { from, to, sent, all }
  } catch {
    throw new UsageError(`The arguments are wrong: ${USAGE}.`)
  }
}

function isDay (text = ''): text is string {
  return /^\d{4}-\d{2}-\d{2}$/.test(text) && !Number.isNaN(Date.parse(text)) && addDays(text, 0) === text
}

/** Returns false for a repeat: the raw export has duplicates. */
function isFirst ({ properties: { $insert_id: id } }: ExportedEvent, seen: DigestSet): boolean {
  return typeof id !== 'string' || seen.add(id)
}

function findingOf ({ properties }: ExportedEvent): Finding {
  const { $identity_failure_reason: reasonOfDevice, $failure_reason: reason = reasonOfDevice } = properties
  const hasFailed = typeof reason === 'string' && reason !== ''
  // Mixpanel adds these when an event's distinct_id has changed by a merge.
  const hasMerged = '$distinct_id_before_identity' in properties || '$preshuffle_distinct_id' in properties
  return {
    verdict: hasFailed ? 'refused' : hasMerged ? 'merged' : 'no_failure',
    ...hasFailed && { reason },
    identified_id: properties.$identified_id ?? properties.$user_id ?? properties.distinct_id,
    anon_id: properties.$anon_id ?? properties.$anon_distinct_id ?? properties.$device_id,
    insert_id: properties.$insert_id,
    time: properties.time
  }
}

interface LogLine { time?: unknown, status?: unknown, insert_id?: unknown, insert_ids?: unknown }

/**
 * Yields each identity that a relay's log has as sent on these days and that `seen` does not have, once. `time` is in
 * seconds since the epoch. Throws a UsageError when the log names no identity at all.
 */
async function * missingIdentities (
  log: Readable, { from, to }: { from: string, to: string }, seen: DigestSet
): AsyncGenerator<object> {
  let count = 0
  const reported = createDigestSet()
  for await (const line of createInterface({ input: log, crlfDelay: Infinity })) {
    const { time, ids } = sentIn(line)
    count += ids.length
    const day = ids.length > 0 ? new Date(time).toISOString().slice(0, 10) : ''
    if (day < from || day > to) continue
    for (const id of ids) {
      if (!seen.has(id) && reported.add(id)) {
        yield { verdict: 'not_seen', insert_id: id, time: Math.floor(time / 1000) }
      }
    }
  }
  if (count === 0) throw new UsageError('The log names no identity: it must be that of a relay with LOG_LEVEL=info.')
}

async function openLog (path: string): Promise<Readable> {
  try {
    return (await open(path)).createReadStream()
  } catch (error) {
    throw new UsageError(`The log cannot be read (${(error as NodeJS.ErrnoException).code}).`)
  }
}

/** Returns the identities that a line of a log reports as accepted or queued. Text before the JSON is skipped. */
function sentIn (line: string): { time: number, ids: string[] } {
  const none = { time: 0, ids: [] }
  try {
    const { time, status, insert_id: one, insert_ids: many }: LogLine = JSON.parse(line.slice(line.indexOf('{')))
    if (typeof time !== 'number' || ![200, 202, 207].includes(Number(status))) return none
    return { time, ids: [one, ...Array.isArray(many) ? many : []].filter(id => typeof id === 'string') }
  } catch {
    return none
  }
}
