import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'

// Where redis-server is not installed its tests are skipped, and so are its files here. Everything else counts always.
const isRedisHere = spawnSync('redis-server', ['--version']).status === 0
if (!isRedisHere) console.error('redis-server is not installed here: the tests that need it are skipped')
const files = readdirSync('src', { recursive: true }).map(name => `src/${name}`)
  .filter(name => name.endsWith('.ts') && (isRedisHere || !/\/(redis|scripts|rate-limit|commands\/outbox|open)\.ts$/.test(name)))

/** The files whose coverage counts, for each test. */
export default () => files
