import { fork, spawn, spawnSync, type ChildProcess, type StdioOptions } from 'node:child_process'
import { once } from 'node:events'
import { constants, mkdirSync, openSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { createServer, type AddressInfo } from 'node:net'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { Test } from 'tap'
import { SERVER } from '../processes.ts'
import type { Attack } from './attacks.ts'
import type { Watched } from './children.ts'

const { RELAY = SERVER, ATTACK_SECONDS = '60', PATH = '' } = process.env

export const MEMORY_MB = 256
/** Code is compiled and connections are opened; then /livez is measured without attack. Shorter in short runs. */
const WARM_UP_MS = Math.min(2000, Number(ATTACK_SECONDS) * 250)
const IDLE_MS = Math.min(3000, Number(ATTACK_SECONDS) * 500)
/** The time after which memory should be released when Mixpanel hung. */
const REST_MS = Number(ATTACK_SECONDS) < 30 ? 2000 : 10_000
/** The time that an exit may take beyond the relay's own bounds on a busy machine. */
const SLACK_MS = 1000

// The relay has the first core, all others share the second.
const canPin = availableParallelism() > 1 && spawnSync('taskset', ['-a', '-cp', '1', String(process.pid)]).status === 0

/** A memory cgroup (v1 or v2) of 256 MB, or undefined where none can be made. */
function memoryGroup () {
  for (const [root, limit] of [['/sys/fs/cgroup/memory', 'memory.limit_in_bytes'], ['/sys/fs/cgroup', 'memory.max']] as const) {
    const path = `${root}/relay-attack-${process.pid}`
    try {
      mkdirSync(path)
    } catch {
      continue
    }
    try {
      writeFileSync(join(path, limit), `${MEMORY_MB}M`, { flag: 'r+' })
      return { path, remove: () => rmdirSync(path) }
    } catch {
      rmdirSync(path)
    }
  }
  return undefined
}

/** A figure of /proc/PID/status in MB, or undefined when the process is gone. */
function memory (pid: number, name: 'VmHWM' | 'VmRSS'): number | undefined {
  try {
    const [, kB] = new RegExp(`${name}:\\s+(\\d+)`).exec(readFileSync(`/proc/${pid}/status`, 'utf8')) ?? []
    return kB === undefined ? undefined : Math.round(Number(kB) / 1024)
  } catch {
    return undefined
  }
}

async function freePort (): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  await new Promise(resolve => server.close(resolve))
  return port
}

/** The destination of the relay's log. */
function standardOutput (t: Test, log: Attack['log']): number | 'pipe' {
  if (log === undefined) return 'pipe'
  if (log === 'full') return openSync('/dev/full', 'w')
  // A real pipe, which Node's `pipe` is not. Its reader is this process, which never reads.
  const path = join(t.testdir({}), 'log')
  spawnSync('mkfifo', [path])
  openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
  return openSync(path, 'w')
}

/** The built relay with its default limits, in 256 MB of memory. */
async function startRelay (t: Test, { log, descriptors, env }: Attack, port: number, upstreamPort: number) {
  const group = memoryGroup()
  const script = [
    ...group ? [`echo $$ > ${group.path}/cgroup.procs`] : [],
    ...descriptors ? [`ulimit -n ${descriptors}`] : [],
    `exec ${canPin ? 'taskset -c 0 ' : ''}"$0" "$@"`
  ].join(' && ')
  const stdio: StdioOptions = ['ignore', standardOutput(t, log), 'pipe']
  const child = spawn('sh', ['-c', script, process.execPath, RELAY], {
    stdio, env: { PATH, MIXPANEL_TOKEN: 'attack', MIXPANEL_URL: `http://127.0.0.1:${upstreamPort}`, PORT: String(port), ...env }
  })
  let said = ''
  for (const stream of [child.stdout, child.stderr]) stream?.on('data', chunk => { said = (said + String(chunk)).slice(-1000) })
  const exit = new Promise<string>(resolve => child.once('close', (code, signal) => resolve(String(code ?? signal))))
  t.teardown(async () => {
    child.kill('SIGKILL')
    await exit
    // The kernel needs a moment to release the group.
    for (let tries = 0; tries < 50; tries++) {
      try {
        return group?.remove()
      } catch {
        await sleep(100)
      }
    }
  })
  for (let tries = 0; tries < 100 && child.exitCode === null; tries++) {
    if (await fetch(`http://127.0.0.1:${port}/livez`).then(({ ok }) => ok, () => false)) break
    await sleep(100)
  }
  return { child, pid: child.pid as number, exit, said: () => said, hasGroup: group !== undefined }
}

/** With few cores the witness has priority over the attacker. Without the permission nice(1) changes nothing. */
const NICENESS: Record<string, number> = { witness: -15, upstream: 0, attacker: 10 }

/** One of children.ts, with the loader of this process but without the other ones of tap. */
function startChild (t: Test, role: string, ...args: string[]): ChildProcess {
  const loader = process.execArgv.filter(argument => argument.includes('ts-blank-space'))
  const child = fork(fileURLToPath(new URL('children.ts', import.meta.url)), [role, ...args], {
    execPath: 'nice', execArgv: ['-n', String(NICENESS[role]), process.execPath, ...loader], env: { ...process.env, NODE_OPTIONS: '' }
  })
  t.teardown(() => { child.kill('SIGKILL') })
  return child
}

async function answer<T> (child: ChildProcess, question?: string): Promise<T> {
  if (question !== undefined) child.send(question)
  const [value] = await once(child, 'message')
  return value as T
}

/** Runs one attack against a fresh relay. Returns all figures. */
export async function underAttack (t: Test, attack: Attack) {
  const seconds = Math.max(Number(ATTACK_SECONDS), attack.leastSeconds ?? 0)
  // All start at once, because each takes a second to start. The attacker waits for its message.
  const port = await freePort()
  const upstream = startChild(t, 'upstream')
  const witness = startChild(t, 'witness', String(port))
  const attacker = startChild(t, 'attacker', attack.name, ...[port, seconds].map(String))
  const [address] = await Promise.all([answer<AddressInfo>(upstream), answer(witness)])
  const relay = await startRelay(t, attack, port, address.port)
  await sleep(WARM_UP_MS)
  await answer(witness, 'warm')
  await sleep(IDLE_MS)
  const idle = await answer<Watched>(witness, 'idle')
  const before = memory(relay.pid, 'VmRSS')
  let peak = 0
  const sampling = setInterval(() => { peak = memory(relay.pid, 'VmHWM') ?? peak }, 50)

  if (attack.hangs) upstream.send('hang')
  attacker.send(relay.pid)
  let got: Record<string, number> = {}
  attacker.on('message', tally => { got = tally as typeof got })
  await Promise.race([once(attacker, 'close'), relay.exit, sleep((seconds + 30) * 1000, undefined, { ref: false })])
  const attacked = await answer<Watched>(witness, 'attacked')
  const early = await Promise.race([relay.exit, sleep(0)])
  if (early === undefined && attack.hangs) await sleep(REST_MS)
  const after = memory(relay.pid, 'VmRSS')
  peak = memory(relay.pid, 'VmHWM') ?? peak
  clearInterval(sampling)
  attacker.kill('SIGKILL')
  witness.kill('SIGKILL')

  const bound = Number(attack.env?.SHUTDOWN_TIMEOUT_MS ?? 10_000) + 3000 + SLACK_MS
  const start = performance.now()
  relay.child.kill('SIGTERM')
  const exit = await Promise.race([relay.exit, sleep(bound, undefined, { ref: false })])
  const exitMs = Math.round(performance.now() - start)
  const largest = await answer<number>(upstream, 'largest')
  upstream.kill('SIGKILL')
  return { seconds, idle, attacked, before, peak, after, got, early, exit, exitMs, largest, hasGroup: relay.hasGroup, said: relay.said() }
}

export type Figures = Awaited<ReturnType<typeof underAttack>>
