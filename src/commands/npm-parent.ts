/** How often the relay looks whether npm still runs. */
const CHECK_MS = 500

/**
 * Calls `end` once when npm is gone: a supervisor signals `npm start`, which ends only the shell between npm and this
 * process. `parent` returns the id of the shell, `readStat` the text of `/proc/<pid>/stat`, or throws.
 */
export function whenOrphaned (parent: () => number, readStat: (pid: number) => string, end: () => void): void {
  const ancestors = () => `${parent()} ${parentOf(() => readStat(parent()))}`
  const before = ancestors()
  const timer = setInterval(() => {
    if (ancestors() === before) return
    clearInterval(timer)
    end()
  }, CHECK_MS).unref()
}

/** The parent of a process, from its `/proc/<pid>/stat`; empty where `read` throws, elsewhere than on Linux. */
export function parentOf (read: () => string): string {
  try {
    const [, rest = ''] = read().split(') ')
    return rest.split(' ')[1] as string
  } catch {
    return ''
  }
}
