/** The interval between two checks that npm still runs. */
const CHECK_MS = 500

/**
 * Calls `end` once after npm has ended. A signal to `npm start` ends npm and the shell below it, but not this process.
 * `parent` returns the process id of the shell. `readStat` returns the text of `/proc/<pid>/stat` or throws.
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

/** Returns the parent's id in `/proc/<pid>/stat`, or '' when `read` throws, as on systems other than Linux. */
export function parentOf (read: () => string): string {
  try {
    const [, rest = ''] = read().split(') ')
    return rest.split(' ')[1] as string
  } catch {
    return ''
  }
}
