// The processes that are measured: how they start, what they use, and on which core they run.
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmdirSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

const here = new URL('.', import.meta.url).pathname
const children = new Set()

process.on('exit', () => { for (const child of children) child.kill() })
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(1))

/**
 * Moves this process to core 1; later children go with it unless they get a core of their own. Returns false where
 * there is no second core: then all share all cores.
 */
export function takeSecondCore () {
  const isPinned = spawnSync('taskset', ['-acp', '1', String(process.pid)]).status === 0
  if (!isPinned) console.error('no taskset or no second core: the servers and the load share all cores')
  if (!isFine) console.error('no /proc/PID/schedstat: CPU in ticks, summed over the slots')
  return isPinned
}

/** Makes a control group with so many MB, which needs root. Returns the command that runs another one in it. */
function limitMemory (mb) {
  const isUnified = existsSync('/sys/fs/cgroup/cgroup.controllers')
  const group = mkdtempSync(`/sys/fs/cgroup/${isUnified ? '' : 'memory/'}bench-`)
  writeFileSync(join(group, isUnified ? 'memory.max' : 'memory.limit_in_bytes'), String(mb * 2 ** 20))
  return { group, wrapper: ['sh', '-c', `echo $$ > ${group}/cgroup.procs; exec "$0" "$@"`] }
}

/**
 * Starts a child on a core, or on those of this process, with at most `limit` MB. Node bounds its heap by such a limit.
 * The child's output goes to a pipe that is read.
 */
export function start (core, [command, ...args], env, limit) {
  const { group, wrapper } = limit === undefined ? { wrapper: [] } : limitMemory(limit)
  const [first, ...rest] = [...core === undefined ? [] : ['taskset', '-c', String(core)], ...wrapper, command, ...args]
  const child = spawn(first, rest, { cwd: here, env: { PATH: process.env.PATH, ...env }, stdio: ['ignore', 'pipe', 'inherit'] })
  child.stdout.resume()
  children.add(child)
  child.over = new Promise(resolve => child.once('close', resolve)).then(() => {
    children.delete(child)
    if (group !== undefined) rmdirSync(group)
  })
  return child
}

/** Ends children and resolves when they have ended. */
export async function stop (...list) {
  for (const child of list) child.kill()
  await Promise.all(list.map(child => child.over))
}

/** Resolves when the child answers `request`, the bytes of an HTTP request, with 200. */
export async function isUp (child, port, request) {
  for (const since = performance.now(); performance.now() - since < 20_000; await sleep(1)) {
    if (child.exitCode !== null) break
    if (await statusOf(port, request) === '200') return
  }
  throw new Error(`${child.spawnargs.join(' ')} does not answer 200`)
}

function statusOf (port, request) {
  return new Promise(resolve => {
    const socket = connect(port, '127.0.0.1', () => socket.write(request))
    socket.on('error', () => resolve(undefined)).on('close', () => resolve(undefined))
    socket.on('data', bytes => {
      resolve(String(bytes.subarray(9, 12)))
      socket.destroy()
    })
  })
}

// schedstat has nanoseconds for each thread, but not every kernel has schedstat. stat has ticks of 10 ms, too coarse for
// a slot, good enough for the sum of all slots.
export const isFine = existsSync('/proc/self/schedstat')
const TICK_US = isFine ? 0 : 1e6 / Number(spawnSync('getconf', ['CLK_TCK']).stdout)

/** Returns the microseconds that the threads of a process have run, and waited for a core that another had. */
export function usage (pid) {
  if (!isFine) {
    const [, , , , , , , , , , , user, system] = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1].split(' ')
    return { cpu: (Number(user) + Number(system)) * TICK_US, waited: 0 }
  }
  const sum = { cpu: 0, waited: 0 }
  for (const thread of readdirSync(`/proc/${pid}/task`)) {
    const [cpu, waited] = readFileSync(`/proc/${pid}/task/${thread}/schedstat`, 'utf8').split(' ')
    sum.cpu += Number(cpu) / 1000
    sum.waited += Number(waited) / 1000
  }
  return sum
}

/** Returns the resident memory of a process in MB, now and at its peak. */
export function memory (pid) {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  const [now, peak] = ['VmRSS', 'VmHWM'].map(name => Number(new RegExp(`${name}:\\s+(\\d+)`).exec(status)[1]) / 1024)
  return { now, peak }
}
