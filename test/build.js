import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync, statSync } from 'node:fs'

// What the tests need: it runs before tap, and tap runs it again before the first test.

const run = command => {
  // Not with the loaders of tap.
  const { status } = spawnSync('sh', ['-c', command], { stdio: ['ignore', 'inherit', 'inherit'], env: { PATH: process.env.PATH } })
  if (status !== 0) process.exit(status ?? 1)
}

// tap applies the plugins of package.json only from its second run on.
const built = readFileSync('node_modules/@tapjs/test/test-built/dist/esm/index.js', 'utf8')
if (built.includes('@tapjs/typescript')) run('node_modules/.bin/tap build')

// The tests import the built program (`#src/` in package.json), so it must be newer than src.
const changedAt = path => statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0
const sources = ['tsconfig.json', 'src', ...readdirSync('src', { recursive: true }).map(name => `src/${name}`)]
if (Math.max(...sources.map(changedAt)) > changedAt('dist/server.js')) run('npm run --silent build')
