import { createInFlight } from './in-flight.ts'

/** The tasks of a key: those that run, and those that wait. */
interface Line {
  owner: string | undefined
  running: number
  /** Most keys have none. */
  queue?: { owner: string | undefined, start: () => void }[]
}

/**
 * A mutex for each key: tasks with one key run one at a time, in the order of the calls. Those that follow each other
 * and have one `owner` run together. Of each key at most `maxQueued` tasks wait.
 */
export function createKeyedMutex (maxQueued = Infinity) {
  const lines = new Map<string, Line>()
  const inFlight = createInFlight()

  const isShared = (line: Line, owner: string | undefined) => owner !== undefined && line.owner === owner

  return {
    /**
     * Begins a task, which `leave` must end, whatever happens. Returns undefined if it may run at once, as nearly all
     * may; otherwise a promise that resolves after the earlier tasks with this key. Returns `full` if `maxQueued` tasks
     * wait already: then it has not begun, and must not be ended.
     */
    enter (key: string, owner?: string): Promise<void> | 'full' | undefined {
      const line = lines.get(key)
      if (line?.queue !== undefined && line.queue.length >= maxQueued) return 'full'
      inFlight.begin()
      if (line === undefined) lines.set(key, { owner, running: 1 })
      else if (isShared(line, owner) && !line.queue?.length) line.running++
      else return new Promise<void>(resolve => { (line.queue ??= []).push({ owner, start: resolve }) })
      return undefined
    },

    /** Ends a task, and starts those that may follow it. */
    leave (key: string): void {
      inFlight.end()
      const line = lines.get(key) as Line
      if (--line.running > 0) return
      let next = line.queue?.shift()
      if (next === undefined) {
        lines.delete(key)
        return
      }
      line.owner = next.owner
      for (; next !== undefined; next = isShared(line, line.queue?.[0]?.owner) ? line.queue?.shift() : undefined) {
        line.running++
        next.start()
      }
    },

    inFlight: inFlight.count,
    /** Resolves when every task has ended. */
    idle: inFlight.idle
  }
}
