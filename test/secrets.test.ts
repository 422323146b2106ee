import { spawnSync } from 'node:child_process'
import { mkdirSync, renameSync, rmSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t, type Test } from 'tap'
import { readConfig, type Config } from '#src/config.js'
import { connectBackground, connectRedis, useRedisCredentials } from '#src/redis.js'
import { watchSecrets } from '#src/secrets.js'
import { createCredentials } from '#src/mixpanel/credentials.js'
import { identity, leaks, needsRedis, silent, startRedis, startSandbox, temporary, TOKEN, type Env } from './helper.ts'
import { startServer } from './processes.ts'

t.jobs = 3
const NEW_TOKEN = 'CANARY-SECRET-2'
const KEYS = ['CANARY-KEY-0123456789', 'CANARY-KEY-9876543210'] as const

/** A watch on the files of `texts`, with what it has logged and changed. */
function watch (t: Test, texts: Env, env: Env = {}) {
  const directory = temporary(t)
  const paths = Object.fromEntries(Object.keys(texts).map(name => [name, join(directory, name)]))
  for (const [name, text] of Object.entries(texts)) writeFileSync(paths[name] as string, text)
  const files = Object.entries(paths)
  const all = { ...env, ...Object.fromEntries(files.map(([name, path]) => [`${name}_FILE`, path])) }
  const lines: { message: string, variable?: string, cause?: string }[] = []
  const write = (fields: object, message: string) => { lines.push({ ...fields, message }) }
  const changes: Config[] = []
  const { close, state } = watchSecrets({
    files,
    texts: new Map(files.map(([name, path]) => [path, String(texts[name])])),
    reread: readFile => readConfig(all, readFile),
    log: { ...silent, info: write, error: write },
    onChange: config => { changes.push(config) }
  })
  t.teardown(close)
  return { paths: paths as Record<string, string>, lines, changes, close, state }
}

/** Resolves when `count` is reached. */
async function reached (list: unknown[], count: number): Promise<void> {
  while (list.length < count) await sleep(10)
}

t.test('a new value counts, a broken one is logged once and the old value stays', async t => {
  const { paths, lines, changes, close } = watch(t, { MIXPANEL_TOKEN: `${TOKEN}\n`, API_KEYS: KEYS[0] })
  const [token, keys] = [String(paths.MIXPANEL_TOKEN), String(paths.API_KEYS)]
  await sleep(700)
  t.same([lines, changes], [[], []], 'files that have not changed change nothing')

  const broken: [cause: RegExp, damage: () => void][] = [
    [/API_KEYS_FILE is empty/, () => truncateSync(keys)],
    [/API_KEYS must be 1 to 100 keys/, () => writeFileSync(keys, 'short')],
    [/ENOENT/, () => rmSync(keys)],
    [/not a regular file/, () => mkdirSync(keys)],
    [/more than 65536 bytes/, () => { rmSync(keys, { recursive: true }); writeFileSync(keys, 'k'.repeat(70_000)) }],
    [/not a regular file/, () => { rmSync(keys); spawnSync('mkfifo', [keys]) }]
  ]
  for (const [index, [cause, damage]] of broken.entries()) {
    damage()
    await reached(lines, index + 1)
    t.match(lines[index], { message: 'secret file unusable, old value kept', variable: 'API_KEYS_FILE', cause })
  }
  await sleep(700)
  t.equal(lines.length, broken.length, 'each problem is logged once')
  t.equal(changes.length, 0)

  writeFileSync(token, `${NEW_TOKEN}\n`)
  await reached(changes, 1)
  t.match(changes[0], { MIXPANEL_TOKEN: NEW_TOKEN, API_KEYS: [KEYS[0]] }, 'a broken file does not hold up another')
  rmSync(keys)
  writeFileSync(keys, `web:${KEYS[1]}\n${KEYS[0]}\n`)
  await reached(changes, 2)
  t.match(changes[1], { MIXPANEL_TOKEN: NEW_TOKEN, API_KEYS: [`web:${KEYS[1]}`, KEYS[0]] })
  t.match(lines.slice(broken.length), [{ message: 'secret reloaded', variable: 'MIXPANEL_TOKEN' }, { message: 'secret reloaded', variable: 'API_KEYS' }])

  truncateSync(keys)
  await reached(lines, broken.length + 3)
  writeFileSync(keys, `web:${KEYS[1]}\n${KEYS[0]}\n`)
  await reached(lines, broken.length + 4)
  t.match(lines.at(-1), { message: 'secret file usable again', variable: 'API_KEYS_FILE' })
  truncateSync(keys)
  await reached(lines, broken.length + 5)
  t.equal(lines.at(-1)?.cause, 'API_KEYS_FILE is empty.', 'a problem that comes back is logged again')
  t.same(leaks(JSON.stringify(lines)), [])
  close()
  writeFileSync(token, TOKEN)
  await sleep(700)
  t.equal(changes.length, 2, 'after close nothing changes')
})

t.test('a file that is being written does not count before it is whole', async t => {
  const { paths, lines, changes } = watch(t, { MIXPANEL_TOKEN: 'old' })
  for (let length = 1; length <= NEW_TOKEN.length; length++) {
    writeFileSync(String(paths.MIXPANEL_TOKEN), NEW_TOKEN.slice(0, length))
    await sleep(100)
  }
  await reached(changes, 1)
  t.equal(changes[0]?.MIXPANEL_TOKEN, NEW_TOKEN)
  t.equal(lines.length, 1)
})

t.test('secrets of earlier configurations are masked as well', async t => {
  const credentials = createCredentials({ MIXPANEL_TOKEN: 'first-token', MIXPANEL_SERVICE_ACCOUNT: 'me:first-secret' })
  credentials.use({ MIXPANEL_TOKEN: 'second-token' })
  t.equal(credentials.mask(`first-token first-secret second-token ${Buffer.from('me:first-secret').toString('base64')}`), '*** *** *** ***')
  t.equal(credentials.basic(), `Basic ${Buffer.from('second-token:').toString('base64')}`)
  for (let count = 0; count < 100; count++) credentials.use({ MIXPANEL_TOKEN: `token-${count}` })
  t.equal(credentials.mask('token-99 token-98'), '*** ***')
  t.equal(credentials.mask('first-token'), 'first-token', 'what is remembered is bounded')
})

/** The directory of a mounted secret as Kubernetes makes it; `swap` replaces all files at once. */
function mountSecret (directory: string, files: Env) {
  let version = 0
  function write (next: Env): string {
    const name = `..${++version}`
    mkdirSync(join(directory, name))
    for (const [file, text] of Object.entries(next)) writeFileSync(join(directory, name, file), text)
    return name
  }
  symlinkSync(write(files), join(directory, '..data'))
  for (const file of Object.keys(files)) symlinkSync(join('..data', file), join(directory, file))
  return {
    path: (file: string) => join(directory, file),
    swap (next: Env): void {
      const before = version
      symlinkSync(write(next), join(directory, '..data_tmp'))
      renameSync(join(directory, '..data_tmp'), join(directory, '..data'))
      rmSync(join(directory, `..${before}`), { recursive: true })
    }
  }
}

t.test('a swapped secret of Kubernetes takes effect without a restart, and the outbox goes out with the new token', async t => {
  const sandbox = await startSandbox(t, { token: NEW_TOKEN })
  const secret = mountSecret(temporary(t), { token: TOKEN, keys: `web:${KEYS[0]}` })
  const env = {
    MIXPANEL_TOKEN_FILE: secret.path('token'),
    MIXPANEL_TOKEN: '',
    API_KEYS_FILE: secret.path('keys'),
    JWT_SECRET: `CANARY-JWT-${'s'.repeat(32)}`,
    MIXPANEL_PROJECT_ID: '42',
    OUTBOX: `file:${temporary(t)}`
  }
  const server = await startServer(t, sandbox.url, env, { isCovered: true })
  const post = (key: string, headers = {}, body = identity()) => fetch(`${server.url}/identify`, {
    method: 'POST', headers: { 'content-type': 'application/json', authorization: `Bearer ${key}`, ...headers }, body: JSON.stringify(body)
  }).then(answer => answer.status)
  sandbox.faults.add({ name: 'edge_down', times: 1_000_000 })
  const queued = Array.from({ length: 20 }, () => identity())
  for (const one of queued) t.equal(await post(KEYS[0], { prefer: 'respond-async' }, one), 202)

  secret.swap({ token: NEW_TOKEN, keys: KEYS[1] })
  await server.until(/"variable":"API_KEYS","msg":"secret reloaded"/)
  await server.until(/"variable":"MIXPANEL_TOKEN","msg":"secret reloaded"/)
  t.equal(await post(KEYS[0]), 401, 'a removed key stops at the next request')
  sandbox.faults.clear()
  await server.emptied()
  t.equal(await post(KEYS[1]), 200)
  const events = sandbox.ledger.rows()
  for (const { identified_id: user } of queued) t.ok(events.some(event => JSON.stringify(event).includes(user)), 'a queued identity was sent')
  const tokens = sandbox.requests.slice(-1).map(({ body }) => JSON.parse(new URLSearchParams(body).get('data') ?? '').properties.token)
  t.same(tokens, [NEW_TOKEN])
  t.same(leaks(server.output()), [])
  t.equal(await server.kill('SIGTERM'), 0)

  const again = await startServer(t, sandbox.url, env)
  t.notMatch(again.output(), /outbox bound to this token/, 'with MIXPANEL_PROJECT_ID a new token does not orphan the outbox')
  t.equal(await again.kill('SIGTERM'), 0)
})

t.test('without MIXPANEL_PROJECT_ID the relay says at start what a new token needs', async t => {
  const { url } = await startSandbox(t)
  const server = await startServer(t, url, { OUTBOX: `file:${temporary(t)}` })
  t.match(server.output(), /"hint":"before you change the token, set MIXPANEL_PROJECT_ID and restart","msg":"outbox bound to this token"/)
})

t.test('the password of Redis may change, its address may not', needsRedis, async t => {
  const { port } = await startRedis(t, { more: ['--requirepass', 'first'] })
  const at = (password: string, rest = `127.0.0.1:${port}`) => `redis://:${password}@${rest}`
  const admin = await connectRedis(at('first'), silent)
  const redis = await connectRedis(at('first'), silent)
  const background = await connectBackground(redis, 1000)
  t.teardown(() => { for (const one of [admin, redis, background]) one.disconnect() })
  await admin.config('SET', 'requirepass', 'second%')
  t.equal(useRedisCredentials(redis, at('first'), at('second', '127.0.0.2:1')), false)
  t.equal(useRedisCredentials(redis, at('first'), at('second%25')), true)
  for (const one of [redis, background]) {
    const ready = new Promise(resolve => one.once('ready', resolve))
    one.stream.destroy()
    await ready
    t.equal(await one.ping(), 'PONG', 'the next connection has the new password')
  }
})

t.test('a running relay takes the new password of Redis from its file', needsRedis, async t => {
  const { port } = await startRedis(t, { more: ['--requirepass', 'first'] })
  const { url } = await startSandbox(t)
  const secret = mountSecret(temporary(t), { redis: `redis://:first@127.0.0.1:${port}` })
  const server = await startServer(t, url, { REDIS_URL_FILE: secret.path('redis') }, { isCovered: true })
  secret.swap({ redis: `redis://:second@127.0.0.1:${port}` })
  await server.until(/"variable":"REDIS_URL","msg":"secret reloaded"/)
  t.notMatch(server.output(), /needs a restart/)
  secret.swap({ redis: 'redis://:second@127.0.0.1:1' })
  await server.until(/REDIS_URL needs a restart/)
  t.notMatch(server.output(), /first@|second@/)
  t.equal((await server.post()).status, 200)
  t.equal(await server.kill('SIGTERM'), 0)
})
