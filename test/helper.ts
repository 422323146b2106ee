import { randomUUID } from 'node:crypto'
import { spawn, spawnSync, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { connect, createServer, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { buildApp } from '../src/http/app.ts'
import { readConfig } from '../src/config.ts'
import { createMixpanel } from '../src/mixpanel/client.ts'
import { openapi } from '../src/http/openapi.ts'
import { createLog } from '../src/log.ts'
import { openOutbox } from '../src/outbox/open.ts'
import type { Outbox } from '../src/outbox/outbox.ts'
import type { Redis } from '../src/redis.ts'
import { createRelay } from '../src/relay/relay.ts'
import { createSandbox } from '../src/sandbox/app.ts'

export type Env = Record<string, string>

/** No log line, answer or error of any test may hold it, in any of the forms in which it travels. */
export const TOKEN = 'CANARY+4f1d/9c'
const CANARIES = [TOKEN, encodeURIComponent(TOKEN), Buffer.from(`${TOKEN}:`).toString('base64'), 'CANARY-SECRET']

/** The canary's forms that `text` holds: none, or there is a leak. */
export const leaks = (text: string) => CANARIES.filter(canary => text.includes(canary))

/** A fresh valid body; `given` replaces fields, and an undefined one leaves its field out. */
export const identity = (given: Record<string, unknown> = {}) =>
  ({ identified_id: `user-${randomUUID()}`, anon_id: randomUUID() as string, ...given })

export async function startSandbox (t: Test, options: Parameters<typeof createSandbox>[0] = {}) {
  const sandbox = createSandbox({ token: TOKEN, ...options })
  const url = await sandbox.app.listen({ host: '127.0.0.1', port: 0 })
  t.teardown(() => sandbox.app.close())
  return { ...sandbox, url }
}

/** The relay in this process before a sandbox: whatever it logs or answers is searched for the token. */
export async function startRelay (t: Test, env: Env = {}, options: Parameters<typeof createSandbox>[0] = {}, redis?: Redis) {
  const sandbox = await startSandbox(t, options)
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
  const outbox = await openOutbox(config, redis, logger)
  const client = createMixpanel(config)
  const relay = createRelay(config, client, logger, outbox)
  relay.start()
  const app = await buildApp(config, { relay, redis, logger, logRequest, document: async () => (await openapi(config)).document })
  t.teardown(async () => {
    await app.close()
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
    sandbox,
    lines,
    inject,
    logged: () => lines.map(line => JSON.parse(line) as Record<string, unknown>),
    post: (payload: unknown, { query = '', headers = {} as Env } = {}) =>
      inject({ method: 'POST', url: `/identify${query}`, payload, headers })
  }
}

/** A built program of ours as a real process: what it printed so far, its exit, and a wait for some words. It must not break. */
export function startProcess (t: Test, script: string, args: string[] = [], env: Env = {}, { mayBreak = false } = {}) {
  // Of tap's loaders the program needs none; of its environment what makes coverage work.
  const loaders = process.execArgv.filter(argument => /processinfo/.test(argument))
  const tap = Object.fromEntries(Object.entries(process.env).filter(([name]) => /^_?TAP|^NODE_|^PATH$/.test(name)))
  const child: ChildProcess = spawn(process.execPath, [...loaders, script, ...args], { env: { ...tap as Env, ...env } })
  let output = ''
  for (const stream of [child.stdout, child.stderr]) stream?.on('data', chunk => { output += String(chunk) })
  const exit = new Promise<number | null>(resolve => child.once('close', code => {
    // An unhandled rejection, or any other bug outside of requests.
    if (/"level":60|unhandledRejection|uncaughtException/.test(output) && !mayBreak) t.fail(`the process broke: ${output.slice(-2000)}`)
    resolve(code)
  }))
  t.teardown(() => { child.kill('SIGKILL') })

  async function until (words: RegExp): Promise<RegExpExecArray> {
    for (;;) {
      const found = words.exec(output)
      if (found !== null) return found
      if (child.exitCode !== null) throw new Error(`exited before it said ${words}: ${output}`)
      await new Promise(resolve => setTimeout(resolve, 20))
    }
  }
  return { child, exit, until, output: () => output }
}

/** A new directory with a short path: that of a socket has a limit. */
export function temporary (t: Test): string {
  const path = mkdtempSync(join(tmpdir(), 'relay-'))
  t.teardown(() => rmSync(path, { recursive: true, force: true }))
  return path
}

/** For tests that need a Redis: they say so, and are skipped, where it is not installed. */
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

/** Sends raw bytes; resolves with all that came back until the other side closed, or until `ms` have passed. */
export function exchange (port: number, bytes: string | Buffer, ms = 1000): Promise<string> {
  return new Promise(resolve => {
    let received = ''
    const socket = connect(port, '127.0.0.1', () => socket.write(bytes))
    const timer = setTimeout(() => socket.destroy(), ms)
    socket.on('data', chunk => { received += String(chunk) })
    socket.on('error', () => {})
    socket.on('close', () => { clearTimeout(timer); resolve(received) })
  })
}
