import { randomUUID } from 'node:crypto'
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { createServer, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Test } from 'tap'
import { buildApp } from '#src/http/app.js'
import { createUserTokens } from '#src/http/callers/user-tokens.js'
import { hasUserTokens, readConfig } from '#src/config.js'
import type { Metrics } from '#src/metrics.js'
import { createMixpanel } from '#src/mixpanel/client.js'
import { openapi } from '#src/http/openapi.js'
import { createLog } from '#src/log.js'
import { openOutbox } from '#src/outbox/open.js'
import type { Outbox } from '#src/outbox/outbox.js'
import type { Redis } from '#src/redis.js'
import { createRelay } from '#src/relay/relay.js'
import { createSandbox } from '#src/sandbox/app.js'

export type Env = Record<string, string>
export type Relay = Awaited<ReturnType<typeof startRelay>>
type SandboxOptions = NonNullable<Parameters<typeof createSandbox>[0]>

/** No log line, answer or error of any test may hold it, in any of the forms in which it travels. */
export const TOKEN = 'CANARY+4f1d/9c'
const CANARIES = [TOKEN, encodeURIComponent(TOKEN), Buffer.from(`${TOKEN}:`).toString('base64'), 'CANARY-SECRET', 'CANARY-KEY', 'CANARY-JWT']

/** The forms of the canary that `text` holds; one is a leak. */
export const leaks = (text: string) => CANARIES.filter(canary => text.includes(canary))

export { silentLog as silent } from '#src/log.js'

/** A fresh valid body; `given` replaces fields, and an undefined one leaves its field out. */
export const identity = (given: Record<string, unknown> = {}) =>
  ({ identified_id: `user-${randomUUID()}`, anon_id: randomUUID() as string, ...given })

export async function startSandbox (t: Test, options: SandboxOptions = {}) {
  const sandbox = createSandbox({ token: TOKEN, ...options })
  const url = await sandbox.app.listen({ host: '127.0.0.1', port: 0 })
  t.teardown(() => sandbox.app.close())
  return { ...sandbox, url }
}

interface RelayOptions { env?: Env, sandbox?: SandboxOptions, redis?: Redis, metrics?: Metrics }

/** The relay in this process in front of a sandbox. Its log lines and answers are searched for the token. */
export async function startRelay (t: Test, { env = {}, sandbox: sandboxOptions = {}, redis, metrics }: RelayOptions = {}) {
  const sandbox = await startSandbox(t, sandboxOptions)
  const config = readConfig({
    MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandbox.url, PORT: '0', RATE_LIMIT_MAX: '1000000', LOG_LEVEL: 'debug', ...env
  }, () => '')
  const lines: string[] = []
  const { logger, logRequest } = createLog(config.LOG_LEVEL, {
    write (line) {
      lines.push(line)
      if (leaks(line).length > 0) t.fail(`the token is in the log: ${line}`)
    }
  })
  const outbox = await openOutbox(config, redis, logger, metrics)
  const client = createMixpanel(config, logger)
  const relay = createRelay(config, client, logger, outbox, metrics)
  relay.start()
  const tokens = hasUserTokens(config) ? await createUserTokens(config, logger) : undefined
  const app = await buildApp(config, { relay, redis, tokens, metrics, logger, logRequest, document: async () => (await openapi(config)).document })
  t.teardown(async () => {
    await app.close()
    tokens?.close()
    await Promise.all([outbox?.close(), client.close()])
  })

  async function inject (options: { method?: string, url: string, headers?: Env, payload?: unknown, remoteAddress?: string }) {
    const answer = await app.inject(options as object)
    const text = JSON.stringify(answer.headers) + answer.payload
    if (leaks(text).length > 0) t.fail(`the token is in an answer: ${text}`)
    return answer
  }

  return {
    app,
    config,
    outbox: outbox as Outbox,
    relay,
    tokens,
    sandbox,
    lines,
    inject,
    logged: () => lines.map(line => JSON.parse(line) as Record<string, unknown>),
    post: (payload: unknown, { query = '', headers = {} as Env } = {}) =>
      inject({ method: 'POST', url: `/identify${query}`, payload, headers })
  }
}

/** The same relay with a SQLite outbox. */
export const startRelayWithOutbox = (t: Test, { env = {}, ...options }: RelayOptions = {}) =>
  startRelay(t, { env: { OUTBOX: `file:${t.testdir({})}/outbox`, ...env }, ...options })

/** Resolves when nothing waits in the outbox. */
export async function emptied ({ outbox }: Relay): Promise<void> {
  while (outbox.counts().waiting > 0) await sleep(20)
}

interface Parts { connections: number, bytes_in_flight: number }

/** The same relay, listening on a port of its own. `parts` is what `/readyz?verbose` says. */
export async function listen (t: Test, options: RelayOptions = {}) {
  const relay = await startRelay(t, options)
  const url = await relay.app.listen({ host: '127.0.0.1', port: 0 })
  const parts = async () => (await relay.inject({ url: '/readyz?verbose' })).json().parts as Parts
  return { ...relay, url, port: Number(new URL(url).port), parts }
}

/** Replaces performance.now for a test, or until the returned function is called. `t.capture` would take a stack trace of each call. */
export function setPerformanceNow (t: Test, now: () => number): () => void {
  const { now: real } = performance
  const restore = () => { performance.now = real }
  performance.now = now
  t.teardown(restore)
  return restore
}

/** A new directory with a short path, because the path of a socket has a limit. */
export function temporary (t: Test): string {
  const path = mkdtempSync(join(tmpdir(), 'relay-'))
  t.teardown(() => rmSync(path, { recursive: true, force: true }))
  return path
}

/** The options of a test that needs Redis: without redis-server it is skipped, with the reason. */
export const needsRedis = { skip: spawnSync('redis-server', ['--version']).status === 0 ? false : 'redis-server is not installed' }

/** A Redis of the test's own. */
export async function startRedis (t: Test, { port = 0, dir = t.testdir({}), fsync = 'always', more = [] as string[] } = {}) {
  const free = port === 0 ? await freePort() : port
  const child = spawn('redis-server', ['--port', String(free), '--bind', '127.0.0.1', '--dir', dir, '--save', '', '--appendonly', 'yes', '--appendfsync', fsync, ...more])
  const exit = new Promise(resolve => child.once('close', resolve))
  t.teardown(async () => {
    child.kill('SIGKILL')
    await exit
  })
  await new Promise<void>(resolve => child.stdout.on('data', chunk => /Ready to accept/.test(String(chunk)) && resolve()))
  return { child, exit, port: free, dir, url: `redis://127.0.0.1:${free}` }
}

export async function freePort (): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  await new Promise(resolve => server.close(resolve))
  return port
}
