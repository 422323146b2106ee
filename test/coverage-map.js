import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'

// Without redis-server its tests are skipped, and the files that they cover do not count. All others always count.
const isRedisHere = spawnSync('redis-server', ['--version']).status === 0
if (!isRedisHere) console.error('redis-server is not installed: the tests that need it are skipped')
const files = readdirSync('src', { recursive: true }).map(name => `src/${name}`)
  .filter(name => name.endsWith('.ts') && (isRedisHere || !/\/(redis|scripts|rate-limit|rate-limit-store|commands\/outbox|open)\.ts$/.test(name)))

// Node records no coverage of a thread with an empty environment. Every test of a SQLite outbox runs through this one.
const counted = files.filter(name => name !== 'src/outbox/sqlite-thread.ts')

/** The files whose coverage counts, for each test. */
export default () => counted
