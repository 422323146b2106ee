import { spawn, type ChildProcess } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Test } from 'tap'
import { identity, TOKEN, type Env } from './helper.ts'

export const SERVER = 'dist/server.js'

/**
 * The arguments with which env(1) runs a program with `env` alone. tap adds its loader for coverage to the environment of
 * every child process, and the loader costs a second of CPU.
 */
export const withoutCoverage = (env: NodeJS.ProcessEnv, ...args: string[]) =>
  ['-i', `PATH=${process.env.PATH}`, ...Object.entries(env).map(([name, value]) => `${name}=${value}`), process.execPath, ...args]

interface Options {
  /** True where the process is expected to log a fatal error. */
  mayBreak?: boolean
  /** True where its coverage counts, which costs a second of CPU. One process for each line of code is enough. */
  isCovered?: boolean
}

/** A process that has not printed by then what it should fails its test. */
const UNTIL_MS = 30_000

/** A built program as a real process. Its output is collected, and a fatal error in it fails the test. */
export function startProcess (t: Test, script: string, args: string[] = [], env: Env = {}, { mayBreak = false, isCovered = false }: Options = {}) {
  const coverage = Object.fromEntries(Object.entries(process.env).filter(([name]) => /^_?TAP|^NODE_V8|^PATH$/.test(name)))
  return watch(t, isCovered
    ? spawn(process.execPath, [script, ...args], { env: { ...coverage, ...env } })
    : spawn('env', withoutCoverage(env, script, ...args)), mayBreak)
}

/** Another program as a process with `env` alone, watched in the same way. */
export const startCommand = (t: Test, command: string, args: string[], env: Env = {}) =>
  watch(t, spawn(command, args, { env: { PATH: process.env.PATH, ...env } }), false)

function watch (t: Test, child: ChildProcess, mayBreak: boolean) {
  let output = ''
  for (const stream of [child.stdout, child.stderr]) stream?.on('data', chunk => { output += String(chunk) })
  const exit = new Promise<number | null>(resolve => child.once('close', code => {
    if (/"level":60|unhandledRejection|uncaughtException/.test(output) && !mayBreak) t.fail(`a fatal error in the process: ${output.slice(-2000)}`)
    resolve(code)
  }))
  t.teardown(() => { child.kill('SIGKILL') })

  /** Resolves when the output matches. */
  async function until (words: RegExp): Promise<RegExpExecArray> {
    for (const end = Date.now() + UNTIL_MS; ;) {
      const found = words.exec(output)
      if (found !== null) return found
      if (child.exitCode !== null) throw new Error(`the process exited before its output matched ${words}: ${output}`)
      if (Date.now() > end) throw new Error(`the output did not match ${words} within ${UNTIL_MS} ms: ${output}`)
      await sleep(20)
    }
  }
  return { child, exit, until, output: () => output }
}

interface Parts { outbox: { waiting: number, dead: number }, mixpanel: string }

/** The built relay as a process in front of a sandbox. */
export async function startServer (t: Test, sandboxUrl: string, env: Env = {}, options: Options = {}) {
  const server = startProcess(t, SERVER, [], {
    MIXPANEL_TOKEN: TOKEN, MIXPANEL_URL: sandboxUrl, PORT: '0', RATE_LIMIT_MAX: '1000000000', ...env
  }, options)
  const [, url] = await server.until(/Server listening at (http:[^"]+)"/) as unknown as [string, string]
  const parts = async () => (await (await fetch(`${url}/readyz?verbose`)).json() as { parts: Parts }).parts

  return {
    ...server,
    url,
    port: Number(new URL(url).port),
    parts,
    post: (body: unknown = identity()) => fetch(`${url}/identify`, {
      method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body)
    }),
    /** Resolves when nothing waits in the outbox. */
    async emptied (): Promise<void> {
      while ((await parts()).outbox.waiting > 0) await sleep(50)
    },
    async kill (signal: NodeJS.Signals = 'SIGKILL'): Promise<number | null> {
      server.child.kill(signal)
      return server.exit
    }
  }
}
