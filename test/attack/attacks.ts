import { randomUUID } from 'node:crypto'
import type { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { Agent, fetch } from 'undici'
import type { Attacker } from './attacker.ts'

export interface Attack {
  name: string
  /** The bound of this attack, in addition to those of every attack. */
  bound?: string
  /** Mixpanel never answers during the attack, so the answers to the good caller are not judged. */
  hangs?: boolean
  /** The destination of the relay's log; by default a pipe that is read. */
  log?: 'unread' | 'full'
  /** `ulimit -n` of the relay. */
  descriptors?: number
  env?: Record<string, string>
  /** It opens so many connections that a new one waits to be accepted. */
  crowds?: boolean
  /** The attack lasts this long even in a short run. */
  leastSeconds?: number
  /** Tallies that must be zero; 500 is one of them in every attack. */
  never?: string[]
  run: (attacker: Attacker) => Promise<unknown>
}

const KB = 1024

/** The largest body of a batch; 4194304 for a relay from before the hardening. */
const BATCH_BYTES = Number(process.env.ATTACK_BATCH_BYTES ?? 1024 * KB) - 100

/** A client that does not read keeps its connection for this long. */
const UNREAD_MS = 15_000

const ONE_ANON_ID = randomUUID()
let made = 0
const identity = (padding = '', anonId: string = randomUUID()) =>
  `{"identified_id":"user-${++made}","anon_id":"${anonId}"${padding && `,"properties":{"p":"${padding}"}`}}`
const batch = (identities: string[]) => `{"identities":[${identities.join()}]}`
/** An identity with the given JSON for its properties, in a batch. */
const withProperties = (json: string) => batch([`{"identified_id":"a","anon_id":"${randomUUID()}","properties":${json}}`])
const always = <T>(value: T) => () => value
const times = <T>(count: number, make: (n: number) => T) => Array.from({ length: count }, (_, n) => make(n))
/** As many items as the largest body of a batch has room for. */
const fill = (item: string) => Array<string>(Math.floor((BATCH_BYTES - 200) / (item.length + 1))).fill(item)

const get = (path: string, headers = '') => `GET ${path} HTTP/1.1\r\nhost: relay\r\n${headers}\r\n`
const head = (path: string, headers: string) => `POST ${path} HTTP/1.1\r\nhost: relay\r\ncontent-type: application/json\r\n${headers}\r\n`
const post = (path: string, body: string, headers = '') => head(path, `${headers}content-length: ${Buffer.byteLength(body)}\r\n`) + body
const single = (padding = '', headers = '') => post('/identify', identity(padding), headers)
const batchOf = (identities: string[], headers = '') => post('/identify/batch', batch(identities), headers)

const ASCII = 'x'.repeat(60 * KB)
const CLOSE = 'connection: close\r\n'

/** Sends all but the last byte of each request, then all the last bytes at once, repeatedly. */
const together = (requests: () => string[]) => async ({ dial, closed, isOver }: Attacker) => {
  while (!isOver()) {
    const bytes = [...requests(), batchOf(times(200, () => identity()), CLOSE)].map(text => Buffer.from(text))
    const sockets = bytes.map(() => dial())
    const flushed = sockets.map((socket, n) => new Promise(resolve => {
      socket.once('close', resolve).write(bytes[n]!.subarray(0, -1), resolve)
    }))
    await Promise.race([sleep(2000), Promise.all(flushed)])
    await sleep(200)
    for (const socket of sockets) if (socket.writable) socket.write('}')
    await Promise.race([sleep(3000), Promise.all(sockets.map(closed))])
    for (const socket of sockets) socket.destroy()
    await sleep(100)
  }
}

/** Clients that send the bytes, keep their side open, and connect again after a pause when the relay has closed it. */
const holding = (clients: number, bytes: (n: number) => string | Buffer, pauseMs: number) => ({ loop, dial, closed }: Attacker) =>
  loop(clients, async n => {
    const socket = dial()
    socket.write(bytes(n))
    await closed(socket)
  }, pauseMs)

/** Clients that do not read the answers. */
const unread = (clients: number, bytes: () => string) => ({ loop, dial, closed }: Attacker) => loop(clients, async () => {
  const socket = dial({ reads: false })
  socket.write(bytes())
  await Promise.race([sleep(UNREAD_MS), closed(socket)])
  socket.destroy()
})

/** Callers with an address each, that send a request as soon as the one before is answered. */
const asking = (callers: number, bytes: (() => string)[], answers = 1) => ({ loop, dial, ask, isOver }: Attacker) =>
  loop(callers, async n => {
    const socket = dial({ from: `127.0.9.${1 + n % 8}` })
    for (let turn = 0; !socket.destroyed && !isOver(); turn++) {
      if (await ask(socket, bytes[turn % bytes.length]!(), answers) === 429) await sleep(200)
    }
  }, 20)

/** Clients that send one byte a second, of a head or of a body. */
const dripping = (clients: number) => ({ loop, dial, closed }: Attacker) => loop(clients, async n => {
  const socket = dial()
  socket.write(n % 2 === 0 ? 'GET /livez HTTP/1.1\r\nhost: relay\r\nx-slow: ' : head('/identify', 'content-length: 60000\r\n'))
  const timer = setInterval(() => socket.write('x'), 1000)
  await closed(socket)
  clearInterval(timer)
}, 100)

/** Clients that keep their side open after a 400 or 408. The descriptors of the relay show if it does so too. */
async function halfOpen ({ dial, left, descriptors, got }: Attacker) {
  const beginnings = ['\x16\x03\x01\x02\x00 no HTTP\r\n\r\n', 'GET / HTTP/9\r\n\r\n', 'GET /livez HTTP/1.1\r\nhost: rel']
  while (left() > 15_500) {
    const before = descriptors()
    const sockets = times(600, n => dial({ allowHalfOpen: true }).on('connect', function (this: Socket) { this.write(beginnings[n % 3]!) }))
    await sleep(15_000)
    // The witness has connections of its own.
    const held = descriptors() - before
    if (held > 5) got.held = held
    for (const socket of sockets) socket.destroy()
  }
}

/** Ordinary clients with bodies that are too large. They must read an answer, and not get a reset. */
async function ordinary ({ port, tally, isOver }: Attacker) {
  const large = Buffer.alloc(5_000_000, 'x')
  const streamed = () => new ReadableStream({
    start (controller) {
      for (let chunk = 0; chunk < 10; chunk++) controller.enqueue(large.subarray(0, 50_000))
      controller.close()
    }
  })
  let sent = 0
  const client = async (n: number) => {
    const dispatcher = new Agent({ connect: { localAddress: `127.0.9.${1 + n % 8}` } })
    while (sent < 200 || !isOver()) {
      const body = sent++ % 2 === 0 ? large : streamed()
      try {
        const answer = await fetch(`http://127.0.0.1:${port}/identify`, {
          method: 'POST', headers: { 'content-type': 'application/json' }, body, duplex: 'half', dispatcher, signal: AbortSignal.timeout(10_000)
        })
        await answer.text()
        tally(String(answer.status))
      } catch {
        tally(body === large ? 'reset 5 MB' : 'reset streamed')
      }
      await sleep(100)
    }
    await dispatcher.destroy()
  }
  await Promise.all(times(10, client))
}

/** Each connection comes from another address. */
const addresses = (bytes: () => string, answers = 1) => ({ loop, dial, ask }: Attacker) => loop(50, async () => {
  const n = made++ % 60_000
  const socket = dial({ from: `127.10.${n >> 8}.${n & 255}` })
  await ask(socket, bytes(), answers)
  socket.destroy()
})

/** Anonymous callers are allowed, because the good caller is one. */
const credentials = { API_KEYS: 'service:0123456789abcdef', JWT_SECRET: 'x'.repeat(32), ALLOW_ANONYMOUS: 'true' }
const part = (value: object) => Buffer.from(JSON.stringify(value)).toString('base64url')
/** A token with a wrong signature, which must be computed to tell. */
const forged = () => `${part({ alg: 'HS256' })}.${part({ sub: `user-${++made}`, exp: 9_999_999_999 })}.${'A'.repeat(43)}`
const bearing = (credential: () => string) => () => times(10, () => single('', `authorization: Bearer ${credential()}\r\n`)).join('')

const silent = ({ loop, dial, closed }: Attacker) => loop(1100, () => closed(dial()), 100)

const oneShort = (request: string) => Buffer.from(request).subarray(0, -1)
const chunked = Buffer.from(head('/identify', 'transfer-encoding: chunked\r\n') + [...identity(ASCII)].map(byte => `1\r\n${byte}\r\n`).join(''))

const wrongFields = `{${times(100, n => `"${n.toString(36)}":0`).join()}}`
const deepObject = '{"a":'.repeat(8) + '0' + '}'.repeat(8)
const hundredNumbers = `[${Array(100).fill(0).join()}]`
const brokenProperties = `{"identified_id":0,"anon_id":0,"properties":{${times(200, n => `"mp_${n}":${n % 2 ? hundredNumbers : deepObject}`).join()}}}`
const nested = (open: string, close: string, depth: number) => open.repeat(depth) + (open.endsWith(':') ? '0' : '') + close.repeat(depth)
const manyKeys = `{${times(Math.floor(BATCH_BYTES / 9.1), n => `"${n.toString(36).padStart(4, '0')}":0`).join()}}`

const refusals = [
  get('/nope'), get('/identify'), 'OPTIONS /identify HTTP/1.1\r\nhost: relay\r\norigin: https://evil.example\r\naccess-control-request-method: POST\r\n\r\n',
  post('/identify', '{}', 'origin: https://evil.example\r\n'), 'DELETE /identify/batch HTTP/1.1\r\nhost: relay\r\n\r\n',
  single().replace('application/json', 'application/xml')
].join('')
const tooLarge = [head('/identify', 'content-length: 5000000\r\n'), head('/identify', 'transfer-encoding: chunked\r\n') + '7A120\r\n' + 'x'.repeat(500_000)]

/** Just under Node's 16 KB for a head. */
const tinyHeaders = times(3000, n => `${(n + 36).toString(36).padStart(2, '0').slice(-2)}:\r\n`).join('')
const pipelined = (path: string) => get(path).repeat(1000)

export const ATTACKS: Attack[] = [
  { name: '1a together: 44 batches with a property of 4 MB', run: together(() => times(44, () => batchOf([identity('x'.repeat(4_000_000))], CLOSE))) },
  { name: '1b together: 44 batches with a property of 1 MiB', run: together(() => times(44, () => batchOf([identity('x'.repeat(1024 * KB - 300))], CLOSE))) },
  { name: '1c together: 44 batches of 16 × 60 KB', run: together(() => times(44, () => batchOf(times(16, () => identity(ASCII)), CLOSE))) },
  { name: '1d together: 88 singles of 60 KB', run: together(() => times(88, () => single(ASCII, CLOSE))) },
  { name: '2a Mixpanel hangs: 2,500 singles of 60 KB', crowds: true, hangs: true, run: holding(2500, () => single(ASCII, CLOSE), 3000) },
  { name: '2b Mixpanel hangs: the same, of quotes', crowds: true, hangs: true, run: holding(2500, () => single('\\"'.repeat(30 * KB), CLOSE), 3000) },
  { name: '2c Mixpanel hangs: the same, with one emoji', crowds: true, hangs: true, run: holding(2500, () => single(`${ASCII}😀`, CLOSE), 3000) },
  { name: '3a one byte short: 600 of the largest batches', crowds: true, run: holding(600, always(oneShort(batchOf(fill(identity('x'.repeat(50_000)))))), 1000) },
  { name: '3b one byte short: 1,100 singles of 60 KB', crowds: true, run: holding(1100, always(oneShort(single(ASCII))), 1000) },
  { name: '4 half open after 400 and 408: 600', bound: 'none held after 15 s', never: ['held'], leastSeconds: 16, run: halfOpen },
  { name: '5 silent: 1,100, with 1,024 descriptors', crowds: true, descriptors: 1024, run: silent },
  { name: '6 one byte a second: 1,100 heads and bodies', crowds: true, run: dripping(1100) },
  { name: '7a unread: 50 × 1,000 of swagger-ui-bundle.js', crowds: true, run: unread(50, always(pipelined('/docs/swagger-ui-bundle.js'))) },
  { name: '7b unread: 50 × 1,000 of /livez', crowds: true, run: unread(50, always(pipelined('/livez'))) },
  { name: '7c unread: 50 × 17 singles and 2,300 GETs, hanging', crowds: true, hangs: true, run: unread(50, () => times(17, () => single()).join('') + 'GET / HTTP/1.1\r\nhost:x\r\n\r\n'.repeat(2300)) },
  { name: '8a batches of 2,000 zeros', run: asking(16, [always(batchOf(Array(2000).fill('0')))]) },
  { name: '8b batches of 2,000 {}', run: asking(16, [always(batchOf(Array(2000).fill('{}')))]) },
  { name: '8c batches of identities with 100 wrong fields', run: asking(16, [always(batchOf(fill(wrongFields).slice(0, 2000)))]) },
  { name: '8d unread: 50 × 10 batches of 2,000 zeros', run: unread(50, always(batchOf(Array(2000).fill('0')).repeat(10))) },
  { name: '9a log: a pipe that is not read', log: 'unread', env: { SHUTDOWN_TIMEOUT_MS: '2000' }, run: asking(16, [always(get('/nope').repeat(10))], 10) },
  { name: '9b log: /dev/full', log: 'full', env: { SHUTDOWN_TIMEOUT_MS: '2000' }, run: asking(16, [always(get('/nope').repeat(10))], 10) },
  { name: '10a CPU: batches of broken properties', run: asking(2, [always(batchOf(fill(brokenProperties)))]) },
  {
    name: '10b CPU: deep nesting',
    run: asking(2, [nested('[', ']', BATCH_BYTES / 2 - 100), withProperties(nested('{"a":', '}', BATCH_BYTES / 6 - 100)),
      withProperties(`{"p":${nested('[', ']', BATCH_BYTES / 2 - 200)}}`)].map(body => always(post('/identify/batch', body))))
  },
  {
    name: '10c CPU: many keys, many zeros, many identities',
    run: asking(2, [manyKeys, withProperties(manyKeys.slice(0, -300).replace(/,[^,]*$/, '}')), withProperties(`{"p":[${fill('0').join()}]}`), batch(fill('{}'))]
      .map(body => always(post('/identify/batch', body))))
  },
  { name: '11 chunks of one byte: 200 × 60 KB', crowds: true, run: holding(200, () => chunked, 1000) },
  { name: '12a refusals: 404, 405, 403, 415', run: asking(16, [always(refusals)], 6) },
  { name: '12b refusals: 413 of 5 MB and of streamed 500 KB', run: asking(16, tooLarge.map(always)) },
  { name: '12c ordinary clients with too large bodies', bound: 'all are answered', never: ['reset 5 MB', 'reset streamed'], run: ordinary },
  { name: '13 a request from each of many addresses', run: addresses(always(get('/nope'))) },
  // Beyond the issue's list.
  { name: '14a heads: 3,000 of 3,000 tiny headers, one byte short', crowds: true, run: holding(3000, always(oneShort(get('/livez', tinyHeaders))), 1000) },
  { name: '14b heads: 100 connections × 4 of 3,000 tiny headers', crowds: true, run: asking(100, [always(get('/nope', tinyHeaders).repeat(4))], 4) },
  { name: '14c order: batches of 2,000 on one anon_id', run: asking(16, [() => batchOf(times(2000, () => identity('', ONE_ANON_ID)))]) },
  { name: '15a credentials: wrong keys from many addresses', env: credentials, run: addresses(bearing(() => `wrong-${++made}-0123456789`), 10) },
  { name: '15b credentials: forged tokens from many addresses', env: credentials, run: addresses(bearing(forged), 10) },
  { name: '15c credentials: forged tokens of 8 KB', env: credentials, run: asking(16, [bearing(() => `${forged().slice(0, -43)}${'A'.repeat(8000)}`)], 10) }
]
