import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { dirname, join, normalize } from 'node:path'
import { t } from 'tap'
import { PROBLEMS } from '#src/http/problem.js'

const pagesIn = (folder: string) => readdirSync(folder, { recursive: true }).map(String).filter(name => name.endsWith('.md')).map(name => join(folder, name))
const pages = ['README.md', ...pagesIn('docs'), ...pagesIn('examples')]
const textOf = (page: string) => readFileSync(page, 'utf8')
const withoutCode = (text: string) => text.replace(/^```.*?^```/gms, '')

/** The anchor that GitHub gives to a heading. */
const anchorOf = (heading: string) => heading.replaceAll('`', '').toLowerCase().replace(/[^\p{L}\p{N}\-_ ]/gu, '').replaceAll(' ', '-')
const anchorsIn = (page: string) => [...withoutCode(textOf(page)).matchAll(/^#+ (.*)$/gm)].map(([, heading = '']) => anchorOf(heading))

t.test('README.md has at most 9,000 bytes', async t => {
  const { size } = statSync('README.md')
  t.ok(size <= 9000, `README.md has at most 9,000 bytes, and has ${size}`)
})

t.test('each link in README.md, docs and examples leads to a file and a heading that exist', async t => {
  for (const page of pages) {
    for (const [, link = ''] of textOf(page).matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^[a-z]+:/.test(link)) continue
      const [file = '', anchor] = link.split('#')
      const target = file === '' ? page : normalize(join(dirname(page), file))
      if (!t.ok(existsSync(target), `${page} links to ${link}: the file exists`) || anchor === undefined) continue
      t.ok(anchorsIn(target).includes(anchor), `${page} links to ${link}: the heading exists`)
    }
  }
})

t.test('each npm script and each path that README.md, docs and examples mention exists', async t => {
  const { scripts } = JSON.parse(readFileSync('package.json', 'utf8'))
  for (const page of pages) {
    for (const [, name = ''] of textOf(page).matchAll(/npm run ([a-z:]+)/g)) t.ok(name in scripts, `${page} mentions npm run ${name}: the script exists`)
    for (const [path] of textOf(page).matchAll(/(?<![\w/.-])(?:src|test|bench|docs|examples)\/[\w./-]*[\w/]/g)) {
      t.ok(existsSync(path) || existsSync(join(dirname(page), path)), `${page} mentions ${path}: the path exists`)
    }
  }
})

t.test('the table in docs/api.md has every code with its status and its retryable', async t => {
  const rows = [...textOf('docs/api.md').matchAll(/^\| (\d{3}) \| `([a-z_]+)` \|.*\| (yes|no) \|$/gm)]
    .map(([, status, code, retryable]) => ({ status: Number(status), code, retryable: retryable === 'yes' }))
  const expected: { status: number, code: string, retryable: boolean }[] = Object.entries(PROBLEMS).map(([code, { status, retryable }]) => ({ status, code, retryable }))
  // A request that cannot be read has a status of its own.
  for (const status of [408, 431]) expected.push({ status, code: 'invalid_request', retryable: false })
  const sorted = (list: { status: number, code?: string | undefined }[]) => list.toSorted((a, b) => a.status - b.status || String(a.code).localeCompare(String(b.code)))
  t.same(sorted(rows), sorted(expected))
})

t.test('each log message in docs/deployment.md exists in src', async t => {
  const logs = textOf('docs/deployment.md').split(/^## Logs$/m)[1]?.split(/^## /m)[0] ?? ''
  const messages = ['request completed', ...[...logs.matchAll(/^\| `([^`]+)` \|/gm)].map(([, message = '']) => message)]
  t.ok(messages.length > 1, 'docs/deployment.md lists log messages')
  const sources = readdirSync('src', { recursive: true }).map(String).filter(name => name.endsWith('.ts')).map(name => readFileSync(join('src', name), 'utf8')).join()
  for (const message of messages) t.ok(sources.includes(message), `src logs '${message}'`)
})
