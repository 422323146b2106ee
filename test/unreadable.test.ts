import { deflateSync, gzipSync } from 'node:zlib'
import { t } from 'tap'
import { jsonFault } from '#src/http/json-fault.js'
import { startRelay } from './helper.ts'

const ROWS: [body: string | Buffer, detail: string][] = [
  ['', 'must not be empty'],
  [' \n ', 'must not be empty'],
  [gzipSync('{}'), 'must not be compressed'],
  [deflateSync('{}'), 'must not be compressed'],
  [Buffer.from('{"identified_id":"é"}', 'latin1'), 'must be UTF-8'],
  ['{"identified_id":NaN}', 'must not contain NaN, Infinity or undefined'],
  ['{"identified_id":[1,undefined]}', 'must not contain NaN, Infinity or undefined'],
  ["{'identified_id':'x'}", 'must have double quotes around names and strings'],
  ['{identified_id:"x"}', 'must have double quotes around names and strings'],
  ['{"identified_id":"x",}', 'must not have a comma before a closing bracket'],
  ['{"a":[1, 2 ,\n]}', 'must not have a comma before a closing bracket'],
  ['{"a":1} // CANARY', 'must not contain comments'],
  ['# CANARY\n{}', 'must not contain comments'],
  ['{"a":"\n"}', 'must escape control characters in strings'],
  ['{"a":"x', 'must not end inside a string'],
  ['{"a":"x\\', 'must not end inside a string'],
  ['{"a":{"b":[true,false,null,1e5', 'must not end before its last bracket'],
  ['{"a":1}}', 'must be JSON'],
  ['{"a" 1}', 'must be JSON']
]

t.test('an unreadable body gets the rule that it breaks, and none of its own text', async t => {
  const { inject } = await startRelay(t)
  for (const [payload, detail] of ROWS) {
    // A batch parses each element of its lists by itself.
    const urls = String(payload).includes('[') ? ['/identify'] : ['/identify', '/identify/batch', '/identify/']
    for (const url of urls) {
      const answer = await inject({ method: 'POST', url, payload, headers: { 'content-type': 'application/json' } })
      t.match(answer.json(), { status: 400, code: 'invalid_request', errors: [{ pointer: '', detail }] }, `${url} ${JSON.stringify(String(payload))}`)
      t.notMatch(answer.body, /CANARY/)
    }
  }
})

t.test('a request without a body gets 400 as well', async t => {
  const { inject } = await startRelay(t)
  for (const url of ['/identify', '/identify/batch']) {
    t.match((await inject({ method: 'POST', url })).json(), { status: 400, errors: [{ pointer: '', detail: 'must not be empty' }] }, url)
  }
})

t.test('the reason is found in linear time', async t => {
  for (const text of ['"', '\\"', '[', '{"a":', 'a', ',', '""']) {
    const cost = (count: number) => {
      const bytes = Buffer.from(text.repeat(count))
      const since = process.cpuUsage()
      jsonFault(bytes)
      const { user, system } = process.cpuUsage(since)
      return user + system
    }
    cost(10_000)
    const [small, large] = [cost(20_000), cost(200_000)]
    t.ok(large < 40 * (small + 2000), `${JSON.stringify(text)}: ten times the bytes took ${large} µs in place of ${small}`)
  }
})

t.test('a path with a slash at its end is the same path', async t => {
  const { inject } = await startRelay(t)
  t.equal((await inject({ url: '/livez/' })).statusCode, 200)
  t.match(await inject({ url: '/identify/' }), { statusCode: 405, headers: { allow: 'POST' } })
  t.equal((await inject({ url: '/' })).statusCode, 404)
})

t.test('a preflight allows the headers of credentials and of tracing', async t => {
  const { inject } = await startRelay(t, { env: { CORS_ORIGINS: 'https://app.example.com' } })
  const { headers } = await inject({
    method: 'OPTIONS', url: '/identify', headers: { origin: 'https://app.example.com', 'access-control-request-method': 'POST' }
  })
  const allowed = String(headers['access-control-allow-headers']).split(', ')
  for (const name of ['content-type', 'authorization', 'x-api-key', 'traceparent', 'tracestate', 'baggage', 'sentry-trace', 'x-requested-with']) t.ok(allowed.includes(name), name)
})
