import { closeSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { Writable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { createDestination, createLog, fileSink, streamSink, throttled, type Sink } from '#src/log.js'
import { readConfig } from '#src/config.js'
import { createCallerText } from '#src/http/caller-text.js'
import { identity, listen, startRelay, temporary, TOKEN } from './helper.ts'

/** A sink that a test stalls and breaks. */
function createSink () {
  const state = { isStalled: false, isBroken: false, text: '' }
  const waiting: [string, (error?: Error | null) => void][] = []
  const write: Sink['write'] = (text, done) => {
    if (state.isStalled) return waiting.push([text, done])
    if (!state.isBroken) state.text += text
    done(state.isBroken ? new Error('ENOSPC') : null)
  }
  const sink: Sink = {
    waiting: () => waiting.reduce((sum, [text]) => sum + text.length, 0), write, writeNow: text => { state.text += text }
  }
  const release = () => {
    state.isStalled = false
    for (const [text, done] of waiting.splice(0)) write(text, done)
  }
  return { state, sink, release }
}

const line = (index: number) => `{"index":${index},"text":"${'x'.repeat(1000)}"}\n`
const lines = (text: string) => text.split('\n').slice(0, -1).map(one => JSON.parse(one))

t.test('a request has one log line, without ids, query or secrets, and a health check has none', async t => {
  const { post, inject, logged, lines } = await startRelay(t)
  await post(identity({ identified_id: 'alice@example.com' }), { query: '?strict=1&secret=CANARY' })
  await post(identity({ identified_id: 'alice@example.com' }), { query: '?strict=0' })
  await inject({ url: '/livez' })
  await inject({ url: '/readyz?verbose' })
  await inject({ url: '/nope?secret=CANARY' })
  t.match(logged().filter(line => line.level === 30), [
    { msg: 'request completed', method: 'POST', route: '/identify', status: 400, code: 'invalid_request', ms: Number, caller: 'anonymous' },
    { msg: 'request completed', method: 'POST', route: '/identify', status: 200, request_id: String, insert_id: String },
    { msg: 'request completed', method: 'GET', route: null, status: 404, code: 'not_found' }
  ])
  t.notMatch(lines.join(''), /alice|CANARY|secret/)
})

t.test('toggleDebug switches to debug and back, with a line for each', async t => {
  const access = { method: 'GET', route: undefined, status: 200, ms: 1, requestId: 'a', caller: 'anonymous', insertId: undefined, sent: undefined, details: undefined }
  const rows: [level: string, lines: string[]][] = [
    ['info', ['request completed', 'debug', 'a detail', 'request completed', 'info', 'request completed']],
    ['warn', ['debug', 'a detail', 'request completed', 'warn']],
    ['silent', ['debug', 'a detail', 'request completed', 'silent']],
    ['debug', ['a detail', 'request completed', 'debug', 'a detail', 'request completed', 'debug', 'a detail', 'request completed']],
    ['trace', ['a detail', 'request completed', 'trace', 'a detail', 'request completed', 'trace', 'a detail', 'request completed']]
  ]
  for (const [level, expected] of rows) {
    const written: { msg: string, log_level?: string, level: number }[] = []
    const { logger, logRequest, toggleDebug } = createLog(level, { write: line => { written.push(JSON.parse(line)) } })
    const log = () => {
      logger.debug('a detail')
      logRequest(access)
    }
    log()
    toggleDebug()
    log()
    toggleDebug()
    log()
    const seen = written.map(({ msg, log_level: set }) => set ?? msg)
    t.same(seen, expected, level)
    t.ok(written.filter(line => line.log_level).every(line => line.level === 40 && line.msg === 'log level set'))
  }
})

t.test('each access line has its own fields, whatever it shares with the line before', async t => {
  const first = { method: 'POST', route: '/identify', status: 200, ms: 1, requestId: 'a-1', caller: 'key:one', insertId: 'b', sent: { mixpanel_ms: 2, attempts: 1, events: 3 }, details: undefined }
  const changes = [
    { method: 'GET' }, { route: undefined }, { status: 404 }, { ms: 1.5 }, { requestId: 'a-2' }, { caller: 'anonymous' }, { insertId: undefined },
    { sent: undefined }, { sent: { mixpanel_ms: 2.5, attempts: 2, events: 1 } }, { details: { code: 'internal', cause: 'a "quote" and é' } }
  ]
  const written: object[] = []
  const { logRequest } = createLog('info', { write: line => { written.push(JSON.parse(line)) } })
  for (const change of changes) {
    for (const access of [first, { ...first, ...change }, first]) {
      logRequest(access)
      const { route = null, requestId, insertId, sent, details, ...rest } = access
      t.match(written.at(-1), { level: 30, time: Number })
      t.same(Object.fromEntries(Object.entries(written.at(-1) as object).filter(([name]) => name !== 'level' && name !== 'time')), {
        ...rest, route, request_id: requestId, ...insertId !== undefined && { insert_id: insertId }, ...sent, ...details, msg: 'request completed'
      })
    }
  }
})

t.test('a line says what was wrong, and which trace it belongs to', async t => {
  const { inject, logged, post } = await startRelay(t)
  const trace = '4bf92f3577b34da6a3ce929d0e0e4736'
  await post(identity(), { headers: { traceparent: `00-${trace}-00f067aa0ba902b7-01` } })
  await post(identity(), { headers: { traceparent: 'x' } })
  await post({ identified_id: 'a secret id', anon_id: 'x', properties: { token: 'x' }, 'a secret field': 1 }, { headers: { traceparent: `00-${trace}-00f067aa0ba902b7-01` } })
  await inject({ url: '/a secret path?secret=1' })
  const [ok, other, bad] = logged().filter(line => line.msg === 'request completed')
  t.match(ok, { status: 200, trace_id: trace })
  t.notOk('trace_id' in (other as object))
  t.match(bad, { status: 400, trace_id: trace, code: 'invalid_request', pointers: ['', '/anon_id', '/properties'] })
  t.notMatch(JSON.stringify(logged()), /a secret|secret=1/)
})

t.test('a caller\'s request id is kept if it is safe in a log', async t => {
  const { post, logged } = await startRelay(t)
  for (const id of ['abc-123', 'x'.repeat(128), 'Root=1-67891233-abcdef012345678912345678']) {
    const answer = await post(identity(), { headers: { 'x-request-id': id } })
    t.equal(answer.headers['x-request-id'], id)
    t.equal(logged().at(-1)?.request_id, id)
  }
  for (const id of ['', 'x'.repeat(129), 'a b', '<script>', 'a"b', 'é']) {
    const answer = await post({}, { headers: { 'x-request-id': id } })
    t.match(answer.headers['x-request-id'], /^[0-9a-f]{16}-\d+$/)
    t.equal(answer.json().request_id, answer.headers['x-request-id'])
  }
})

t.test('a request whose client resets the connection is logged', async t => {
  const { port, inject, logged } = await listen(t)
  await new Promise<void>(resolve => {
    const socket = connect(port, '127.0.0.1', () => {
      socket.write('POST /identify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{')
      setTimeout(() => { socket.resetAndDestroy(); resolve() }, 50)
    })
  })
  await sleep(100)
  t.equal((await inject({ url: '/livez' })).statusCode, 200)
  t.equal(logged().filter(line => line.route === '/identify').length, 1, 'the request has its log line')
})

t.test('an exception in a route is a 500 that does not show its message', async t => {
  const { app, inject, logged } = await startRelay(t)
  app.get('/bug', async () => { throw new Error('the inside') })
  const answer = await inject({ url: '/bug' })
  t.match(answer.json(), { status: 500, code: 'internal', retryable: false })
  t.notMatch(answer.body, /the inside/)
  t.match(logged().find(line => line.msg === 'unhandled error'), { level: 50, err: { message: 'the inside' }, request_id: answer.json().request_id })
})

t.test('the destination writes many lines at once, and flush writes the rest', async t => {
  const { sink, state } = createSink()
  const { write, flush } = createDestination(sink)
  write(line(0))
  t.equal(state.text, '')
  await sleep(150)
  t.equal(lines(state.text).length, 1)
  for (let index = 1; index <= 100; index++) write(line(index))
  flush()
  flush()
  t.same(lines(state.text).map(({ index }) => index), Array.from({ length: 101 }, (_, index) => index))
})

t.test('while its reader stalls the destination drops lines beyond 1 MiB and logs their count', async t => {
  const { sink, state, release } = createSink()
  const { write, flush } = createDestination(sink)
  state.isStalled = true
  for (let index = 0; index < 10_000; index++) write(line(index))
  t.ok(sink.waiting() <= 1_048_576, 'at most 1 MiB waits')
  t.ok(sink.waiting() > 1_000_000 - 33_000, 'nearly 1 MiB waits')
  release()
  const written = lines(state.text)
  const { dropped } = written.find(one => 'dropped' in one)
  write(line(10_000))
  flush()
  t.match(written.find(one => 'dropped' in one), { level: 40, time: Number, msg: 'log lines dropped' })
  t.equal(lines(state.text).filter(one => 'index' in one).length + dropped, 10_001, 'each line is written or counted')
})

t.test('after a failed write the destination counts the lost lines and tries again', async t => {
  const { sink, state } = createSink()
  const { write, flush } = createDestination(sink)
  state.isBroken = true
  for (let index = 0; index < 100; index++) write(line(index))
  await sleep(150)
  flush()
  t.equal(state.text, '')
  state.isBroken = false
  write(line(100))
  await sleep(150)
  t.match(lines(state.text), [{ index: 100 }, { dropped: 100, msg: 'log lines dropped' }])
})

t.test('the count of dropped lines is logged again if it could not be written', async t => {
  const texts: string[] = []
  const results = [new Error('ENOSPC'), null, new Error('ENOSPC'), null, null]
  const { write } = createDestination({ waiting: () => 0, writeNow () {}, write (text, done) { texts.push(text); done(results.shift()) } })
  for (let index = 0; index < 3; index++) {
    write(line(index))
    await sleep(120)
  }
  t.match(texts.map(text => JSON.parse(text)), [{ index: 0 }, { index: 1 }, { dropped: 1 }, { index: 2 }, { dropped: 1 }])
})

t.test('fileSink writes in order and reports each error', async t => {
  const path = join(temporary(t), 'log')
  writeFileSync(path, '')
  const fd = openSync(path, 'a')
  const sink = fileSink(fd)
  const written = Promise.all(['a', 'b', 'c'.repeat(200_000)].map(text => new Promise(resolve => sink.write(text, resolve))))
  t.equal(sink.waiting(), 200_002)
  t.same(await written, [null, null, null])
  t.equal(sink.waiting(), 0)
  sink.writeNow('d')
  t.equal(readFileSync(path, 'utf8'), `ab${'c'.repeat(200_000)}d`)
  closeSync(fd)
  t.match(await new Promise(resolve => sink.write('e', resolve)), { code: 'EBADF' })
  t.doesNotThrow(() => sink.writeNow('f'))
  const full = openSync('/dev/full', 'w')
  t.match(await new Promise(resolve => fileSink(full).write('g', resolve)), { code: 'ENOSPC' })
  closeSync(full)
})

t.test('streamSink survives a stream whose reader has gone', async t => {
  const stream = new Writable({ write: (chunk, encoding, done) => done(new Error('EPIPE')) })
  const sink = streamSink(stream)
  t.match(await new Promise(resolve => sink.write('a', resolve)), { message: 'EPIPE' })
  sink.writeNow('b')
  t.equal(sink.waiting(), 0)
})

t.test('throttled logs at once, then at most once in its interval, with the number of calls', async t => {
  const logged: object[] = []
  const warn = throttled({ warn (fields, message) { logged.push({ ...fields, message }) } }, 'warn', 'a fault', 50)
  for (const cause of ['a', 'b', 'c']) warn({ cause })
  t.same(logged, [{ cause: 'a', count: 1, message: 'a fault' }])
  await sleep(80)
  t.same(logged.slice(1), [{ cause: 'c', count: 2, message: 'a fault' }], 'without a further call')
  await sleep(80)
  warn({ cause: 'd' })
  t.same(logged.slice(2), [{ cause: 'd', count: 1, message: 'a fault' }])
})

t.test('a text of a caller is masked and cut, in a time that grows as its length', async t => {
  const { forLog } = createCallerText(readConfig({ MIXPANEL_TOKEN: TOKEN, API_KEYS: 'web:a-key-of-words-alone' }, () => ''))
  t.equal(forLog(`/nope/5f0c8a1e-6a0b-4d53-9d3c-0a1f6f2b7c11/me@x.com/you%40x.com/${TOKEN}/a-key-of-words-alone/eyJhbGciOi`), '/nope/***/***/***/***/***/***')
  t.equal(forLog(`/${'a'.repeat(300)}`), `/${'a'.repeat(99)}`)
  const fastest = (length: number, part: string) => Math.min(...Array.from({ length: 5 }, () => {
    const text = part.repeat(length)
    const since = performance.now()
    forLog(text)
    return performance.now() - since
  }))
  for (const part of ['a', 'a1', 'a@', 'eyJ', '%4']) {
    const [short, long] = [fastest(4000, part), fastest(64_000, part)]
    t.ok(long < 100 * Math.max(short, 0.02), `${part}: 16 times the length takes ${(long / short).toFixed(0)} times as long, not 256 times`)
  }
})
