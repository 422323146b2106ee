// A clock that a program moves: timers, setImmediate, performance.now, Date.now and Math.random of this process. Import it
// before the modules that shall run on it. Timers have whole milliseconds, as in Node.
import { syncBuiltinESMExports } from 'node:module'
import timersPromises from 'node:timers/promises'

const realImmediate = globalThis.setImmediate
const since = Date.UTC(2027, 0, 1)
let now = 0
let immediates = []
/** Timers by the millisecond in which they are due. */
const due = new Map()
/** The keys of `due`, as a binary heap. */
const times = []

function push (time) {
  let at = times.push(time) - 1
  for (let parent; at > 0 && times[parent = (at - 1) >> 1] > time; at = parent) times[at] = times[parent]
  times[at] = time
}

function pop () {
  const [first] = times
  const last = times.pop()
  if (times.length === 0) return first
  let at = 0
  for (let child; (child = 2 * at + 1) < times.length; at = child) {
    if (times[child + 1] < times[child]) child++
    if (times[child] >= last) break
    times[at] = times[child]
  }
  times[at] = last
  return first
}

function setTimer (callback, ms = 1, ...args) {
  const time = now + Math.max(1, Math.round(ms))
  const timer = { run: () => callback(...args), unref: () => timer, ref: () => timer }
  if (due.has(time)) due.get(time).push(timer)
  else {
    due.set(time, [timer])
    push(time)
  }
  return timer
}

function setVirtualImmediate (callback, ...args) {
  const immediate = { run: () => callback(...args) }
  immediates.push(immediate)
  return immediate
}

const clear = timer => { if (timer !== undefined) timer.run = () => {} }

Object.assign(globalThis, { setTimeout: setTimer, clearTimeout: clear, setImmediate: setVirtualImmediate, clearImmediate: clear })
timersPromises.setTimeout = (ms, value) => new Promise(resolve => setTimer(resolve, ms, value))
timersPromises.setImmediate = value => new Promise(resolve => setVirtualImmediate(resolve, value))
syncBuiltinESMExports()
performance.now = () => now
Date.now = () => since + now

let state = 0
/** Mulberry32: the same numbers in every run. */
Math.random = () => {
  state = (state + 0x6d2b79f5) | 0
  let mixed = Math.imul(state ^ (state >>> 15), state | 1)
  mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
  return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
}

/** Resolves when all promises that can settle now have settled. */
const settled = () => new Promise(resolve => realImmediate(resolve))

/** Forgets all timers, and begins again at 0. */
export function reset (seed) {
  now = 0
  state = seed
  immediates = []
  due.clear()
  times.length = 0
}

/** Moves the clock to `end`, in ms, and runs what is due until then. */
export async function advanceTo (end) {
  for (;;) {
    await settled()
    if (immediates.length > 0) {
      for (const { run } of immediates.splice(0)) run()
    } else {
      if (times.length === 0 || times[0] > end) break
      now = pop()
      const timers = due.get(now)
      due.delete(now)
      for (const { run } of timers) run()
    }
  }
  now = end
}
