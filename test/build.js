import { spawnSync } from 'node:child_process'
import { readdirSync, statSync } from 'node:fs'

// tap runs this before the tests. They import the built program (`#src/` in package.json), so it must be newer than src.

const changedAt = path => statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0
const sources = ['tsconfig.json', 'src', ...readdirSync('src', { recursive: true }).map(name => `src/${name}`)]

if (Math.max(...sources.map(changedAt)) > changedAt('dist/server.js')) {
  // Not with the loaders of tap.
  const { status } = spawnSync('npm', ['run', '--silent', 'build'], { stdio: ['ignore', 'inherit', 'inherit'], env: { PATH: process.env.PATH } })
  process.exitCode = status ?? 1
}
