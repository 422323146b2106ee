import { once } from 'node:events'
import type { IncomingMessage } from 'node:http'
import type { Readable } from 'node:stream'
import { StringDecoder } from 'node:string_decoder'
import { setTimeout as sleep } from 'node:timers/promises'
import { createGunzip } from 'node:zlib'
import type { Config } from '../config.ts'
import { startGet } from '../get.ts'
import { proxyFor, TunnelError, type Proxy } from '../proxy.ts'
import { createCredentials } from './credentials.ts'

const BASE_URLS = {
  us: 'https://data.mixpanel.com', eu: 'https://data-eu.mixpanel.com', in: 'https://data-in.mixpanel.com'
}

/** Mixpanel asks for a backoff from 2 s to 60 s with 1 to 5 s of jitter after a 429 or 5xx. */
const MAX_TRIES = 7
const MAX_WAIT_SECONDS = 300

/** A large export takes long to begin, and is then streamed. */
const SILENCE_MS = 300_000

/** Mixpanel's events have at most 1 MB. */
const MAX_LINE = 4_194_304

const DAY_MS = 86_400_000

/** An event of the raw export. */
export interface ExportedEvent { event: unknown, properties: Record<string, unknown> }

/** The error of an export that is not complete. `message` is a sentence without a full stop, and holds no secret. */
export class ExportError extends Error {}

interface Query {
  /** The first and the last day, as YYYY-MM-DD, by the clock of the project. */
  from: string
  to: string
  /** The name of the events. */
  event: string
}

/** Returns the base URL of the raw export, without a trailing slash. */
export function dataUrl ({ MIXPANEL_DATA_URL: url, MIXPANEL_URL: other, MIXPANEL_REGION: region }: Config): string {
  return (url ?? other ?? BASE_URLS[region]).replace(/\/+$/, '')
}

/** Returns a day as YYYY-MM-DD, `days` after another one. */
export const addDays = (day: string, days: number) =>
  new Date(Date.parse(`${day}T00:00:00Z`) + days * DAY_MS).toISOString().slice(0, 10)

/**
 * Yields the events of some days as they stand in the project, in arrays, with duplicates. It streams, so it holds one
 * chunk at a time. Throws an ExportError when Mixpanel does not send all of them. Waits and asks again when Mixpanel
 * limits the project or fails. `pause` waits for some seconds.
 */
export async function * exportEvents (
  config: Config, { from, to, event }: Query, pause = (seconds: number): Promise<unknown> => sleep(seconds * 1000)
): AsyncGenerator<ExportedEvent[]> {
  const { mask } = createCredentials(config)
  const proxy = proxyFor(config, dataUrl(config))
  const today = new Date().toISOString().slice(0, 10)
  // Mixpanel refuses days that have not begun.
  const lastDay = to > today ? today : to

  let response = await ask(lastDay)
  // The day of a project west of Greenwich may still be yesterday's.
  if (response.statusCode === 400 && lastDay === today && from < today) {
    const text = await textOf(response)
    if (!/later than today/i.test(text)) throw refusal(400, text)
    response = await ask(addDays(today, -1))
  }
  if (response.statusCode !== 200) throw refusal(Number(response.statusCode), await textOf(response))
  yield * readEvents(response)

  async function ask (lastDay: string): Promise<IncomingMessage> {
    const query = new URLSearchParams({
      project_id: String(config.MIXPANEL_PROJECT_ID), from_date: from, to_date: lastDay, event: JSON.stringify([event])
    })
    const account = Buffer.from(String(config.MIXPANEL_SERVICE_ACCOUNT)).toString('base64')
    const url = `${dataUrl(config)}/api/2.0/export?${query}`
    const headers = { authorization: `Basic ${account}`, 'accept-encoding': 'gzip' }
    for (let tries = 1; tries < MAX_TRIES; tries++) {
      const answer = await get(url, headers, proxy)
      const { statusCode: status = 0, headers: { 'retry-after': retryAfter } } = answer
      if (status !== 429 && status < 500) return answer
      answer.destroy()
      const backoff = Math.min(2 ** tries, 60) + 1 + Math.random() * 4
      await pause(Number(retryAfter) > 0 ? Math.min(Number(retryAfter), MAX_WAIT_SECONDS) : backoff)
    }
    return get(url, headers, proxy)
  }

  function refusal (status: number, text: string): ExportError {
    const words = new Map([
      [401, 'Mixpanel rejected the service account: see MIXPANEL_SERVICE_ACCOUNT'],
      [402, 'the plan of the project has no raw export'],
      [403, 'the service account may not read the project: see MIXPANEL_PROJECT_ID'],
      [429, 'Mixpanel limits the exports of the project: try again in an hour']
    ]).get(status) ?? `Mixpanel answered ${status}`
    const reason = mask(text).replace(/[\p{Cc}\s]+/gu, ' ').trim().slice(0, 300)
    return new ExportError(reason === '' ? words : `${words} (${reason})`)
  }
}

/** Resolves with an answer, whose body is read no faster than it is used. */
async function get (
  url: string, headers: Record<string, string>, proxy: Proxy | undefined
): Promise<IncomingMessage> {
  try {
    const request = startGet(url, { timeoutMs: SILENCE_MS, headers, proxy })
    const [answer] = await once(request, 'response') as [IncomingMessage]
    return answer
  } catch (error) {
    const cause = error instanceof TunnelError ? error.message : (error as NodeJS.ErrnoException).code
    throw new ExportError(`Mixpanel cannot be reached (${cause})`)
  }
}

/** Resolves with the beginning of an answer, for people. */
async function textOf (body: IncomingMessage): Promise<string> {
  let text = ''
  for await (const chunk of body) {
    text += String(chunk)
    if (text.length > 2000) break
  }
  return text
}

async function * readEvents (body: IncomingMessage): AsyncGenerator<ExportedEvent[]> {
  const { headers } = body
  const isGzip = headers['content-encoding'] === 'gzip'
  // Otherwise an answer that was cut between two lines would look complete.
  const hasEnd = isGzip || headers['content-length'] !== undefined || headers['transfer-encoding'] === 'chunked'
  if (!hasEnd) throw new ExportError('the answer has no length, so its end cannot be told')
  const bytes = isGzip ? unzipped(body) : body
  const decoder = new StringDecoder('utf8')
  let rest = ''
  try {
    for await (const chunk of bytes) {
      const lines = (rest + decoder.write(chunk)).split('\n')
      rest = lines.pop() as string
      if (rest.length > MAX_LINE) throw new ExportError('the answer is no export: a line has more than 4 MB')
      if (lines.length > 0) yield lines.flatMap(parseLine)
    }
  } catch (error) {
    if (error instanceof ExportError) throw error
    throw new ExportError(`the export broke off (${(error as NodeJS.ErrnoException).code})`)
  }
  if (rest !== '') yield parseLine(rest)
}

function unzipped (body: Readable): Readable {
  const gunzip = createGunzip()
  // pipe() passes on no errors.
  return body.on('error', error => gunzip.destroy(error)).pipe(gunzip)
}

function parseLine (line: string): ExportedEvent[] {
  if (line.trim() === '') return []
  let value: unknown
  try {
    value = JSON.parse(line)
  } catch {}
  const { event, properties } = Object(value) as Partial<ExportedEvent>
  if (typeof properties === 'object' && properties !== null) return [{ event, properties }]
  if (/terminated early/i.test(line)) throw new ExportError('Mixpanel terminated the export early: ask for fewer days')
  throw new ExportError('the answer is no export: a line is no event')
}
