import { randomUUID } from 'node:crypto'
import { lookup } from 'node:dns/promises'
import { once } from 'node:events'
import type { IncomingMessage } from 'node:http'
import type { TLSSocket } from 'node:tls'
import { parseArgs } from 'node:util'
import type { Config } from '../config.ts'
import { identifyEvent } from '../identity/event.ts'
import { baseUrl, createMixpanel } from '../mixpanel/client.ts'
import { startGet } from '../get.ts'
import { UsageError } from './admin.ts'

const TIMEOUT_MS = 5000

/** A check: its name, and a sentence when it passes. It rejects with the reason when it fails. */
type Check = [name: string, run: () => Promise<string>]

/**
 * Looks at the way to Mixpanel and yields a line for each part: DNS, TLS, and whether an HTTP server answers. Sends no
 * identity. With `--id-merge` it asks Mixpanel for the mode of the project, by an event that cannot merge anything.
 * Throws a UsageError at the end if a part failed.
 */
export async function * doctorCommand (config: Config, args: string[]): AsyncGenerator<string> {
  const asksMode = readArgs(args)
  const base = new URL(baseUrl(config))
  yield `The relay sends to ${base.origin} (MIXPANEL_REGION=${config.MIXPANEL_REGION}` +
    `${config.MIXPANEL_URL === undefined ? '' : ', MIXPANEL_URL is set'}), ` +
    `for a project with MIXPANEL_ID_MERGE=${config.MIXPANEL_ID_MERGE}.\n`
  const checks: Check[] = [
    ['DNS', () => checkDns(base)],
    ...base.protocol === 'https:' ? [['TLS', () => checkTls(base)] as Check] : [],
    ['HTTP', () => checkHttp(base)]
  ]
  if (asksMode) {
    yield 'An event with two equal ids asks for the mode. In a project with Original ID Merge it is stored, and free.\n'
    checks.push(['mode', () => checkMode(config)])
  }
  let failures = 0
  for (const [name, run] of checks) {
    try {
      yield `ok      ${name}: ${await run()}\n`
    } catch (error) {
      failures++
      yield `FAILED  ${name}: ${causeOf(error as Error)}\n`
    }
  }
  if (failures > 0) throw new UsageError(`${failures} of ${checks.length} checks failed.`)
}

function readArgs (args: string[]): boolean {
  try {
    return parseArgs({ args, options: { 'id-merge': { type: 'boolean', default: false } } }).values['id-merge']
  } catch {
    throw new UsageError('doctor takes only --id-merge.')
  }
}

const hostOf = ({ hostname }: URL) => hostname.replace(/^\[|\]$/g, '')

async function checkDns (base: URL): Promise<string> {
  const addresses = await lookup(hostOf(base), { all: true })
  return `${hostOf(base)} has ${addresses.map(({ address }) => address).join(', ')}.`
}

const get = (base: URL) => startGet(`${base.href.replace(/\/+$/, '')}/`, { timeoutMs: TIMEOUT_MS })

async function checkTls (base: URL): Promise<string> {
  const request = get(base)
  const failure = new Promise<never>((resolve, reject) => request.on('error', reject))
  const [socket] = await Promise.race([once(request, 'socket'), failure]) as [TLSSocket]
  await Promise.race([once(socket, 'secureConnect'), failure])
  const text = `${socket.getProtocol()}, and the certificate is valid until ${socket.getPeerCertificate().valid_to}.`
  // The end of the connection is no failure.
  failure.catch(() => {})
  request.destroy()
  return text
}

async function checkHttp (base: URL): Promise<string> {
  const request = get(base)
  const [{ statusCode: status }] = await once(request, 'response') as [IncomingMessage]
  request.destroy()
  if (Number(status) >= 500) throw new Error(`it answered ${status}`)
  return `it answered ${status}, which does not say that the token is right.`
}

/** Resolves with the mode of the project; rejects when it is not the configured one, or cannot be told. */
async function checkMode (config: Config): Promise<string> {
  const client = createMixpanel(config)
  try {
    const id = randomUUID()
    const event = identifyEvent({ identified_id: id, anon_id: id }, Date.now())
    const answer = await client.send(client.encode([event], { endpoint: 'import' }), config.MIXPANEL_TIMEOUT_MS)
    if (answer.code !== 'accepted' && answer.isForAll !== true) {
      throw new Error(`it cannot be told: ${[answer.code, answer.cause, answer.reason].filter(Boolean).join(', ')}`)
    }
    const mode = answer.code === 'accepted' ? 'original' : 'simplified'
    if (mode !== config.MIXPANEL_ID_MERGE) throw new Error(`the project needs MIXPANEL_ID_MERGE=${mode}`)
    // A project with legacy ID management takes the event as well.
    return `the project ${mode === 'original' ? 'does not have' : 'has'} Simplified ID Merge.`
  } finally {
    await client.close()
  }
}

function causeOf ({ code, message }: NodeJS.ErrnoException): string {
  // OpenSSL's messages have several lines.
  const words = message.replace(/\s+/g, ' ').trim()
  return code === undefined ? words : `${code} (${words})`
}
