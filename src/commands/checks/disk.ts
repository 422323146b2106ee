import { randomUUID } from 'node:crypto'
import { existsSync } from 'node:fs'
import { open, rm, statfs, type FileHandle } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import type { Config } from '../../config.ts'
import { directoryOf, weakFileSystem } from '../../outbox/open.ts'
import { reservedBytes } from '../../outbox/outbox.ts'
import { failed, ok, reasonOf, warning, type Finding } from './check.ts'

const SAMPLES = 9
const SAMPLING_MS = 2000
const PAGE = Buffer.alloc(4096)

/** A 202 waits for an fsync. A local disk needs 0.1 to 20 ms. */
const SLOW_MS = 50

/**
 * Checks the disk of the outbox directory: free space, kind and fsync. It writes a file of its own beside the
 * relay's directory and removes it, so a running relay is not disturbed.
 */
export async function checkDisk (config: Config): Promise<Finding> {
  const wanted = dirname(String(directoryOf(config)))
  let directory = wanted
  while (!existsSync(directory)) directory = dirname(directory)
  const place = directory === wanted ? wanted : `${wanted} does not exist yet; ${directory}`
  const path = join(directory, `doctor-${randomUUID()}`)
  let median: number
  try {
    const file = await open(path, 'wx', 0o600)
    // At once: nothing stays behind when the disk hangs.
    await rm(path)
    median = await medianFsync(file)
    await file.close()
  } catch (error) {
    return failed(`${place} cannot be written: ${reasonOf(error)}`,
      'the user of the relay must be able to write there, and the disk must have space')
  }
  const disk = await statfs(directory)
  return judgeDisk(place, {
    free: disk.bavail * disk.bsize,
    reserved: reservedBytes(disk),
    wanted: config.OUTBOX_MAX_BYTES,
    kind: weakFileSystem(directory),
    ms: median
  })
}

/** Bytes, the name of a weak file system, and the median time of an fsync. */
interface Disk { free: number, reserved: number, wanted: number, kind: string | undefined, ms: number }

/** Returns what a disk means for the outbox. */
export function judgeDisk (place: string, { free, reserved, wanted, kind, ms }: Disk): Finding {
  const text = `${place} has ${mebibytes(free)} free, and an fsync takes ${ms.toFixed(1)} ms` +
    (kind === undefined ? '' : ` on ${kind}`)
  if (free < reserved) return failed(text, 'free some space: the outbox stores nothing now')
  if (kind !== undefined) {
    return warning(text, 'use a local disk: queued identities may be lost when the machine or its network fails')
  }
  if (ms > SLOW_MS) return warning(text, 'use a faster disk: a 202 waits for an fsync')
  return free < wanted
    ? warning(text, `OUTBOX_MAX_BYTES permits ${mebibytes(wanted)}: lower it, or use a larger disk`)
    : ok(text)
}

const mebibytes = (bytes: number) => `${Math.floor(bytes / 1_048_576)} MiB`

/** Resolves with the median time of some fsyncs, each after a write, in milliseconds. */
async function medianFsync (file: FileHandle): Promise<number> {
  const times: number[] = []
  const end = performance.now() + SAMPLING_MS
  while (times.length < SAMPLES && performance.now() < end) {
    await file.write(PAGE, 0, PAGE.length, 0)
    const since = performance.now()
    await file.sync()
    times.push(performance.now() - since)
  }
  return times.sort((a, b) => a - b)[times.length >> 1] as number
}
