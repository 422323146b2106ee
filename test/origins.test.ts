import { t } from 'tap'
import { identity, startRelay } from './helper.ts'

t.test('a POST from an origin that is not in CORS_ORIGINS gets 403 and is not sent', async t => {
  const { inject, post, sandbox } = await startRelay(t, { env: { CORS_ORIGINS: 'https://app.example.com, capacitor://localhost' } })
  for (const origin of ['https://app.example.com', 'capacitor://localhost']) {
    const answer = await post(identity(), { headers: { origin } })
    t.match(answer, { statusCode: 200, headers: { 'access-control-allow-origin': origin, vary: 'Origin' } })
    t.match(answer.headers['access-control-expose-headers'], /x-request-id/)
    t.equal(answer.headers['access-control-allow-credentials'], 'true', 'a JSON beacon arrives only with it')
    const broken = await post({}, { headers: { origin } })
    t.match(broken, { statusCode: 400, headers: { 'access-control-allow-origin': origin } }, 'a listed page can read the error')
    const preflight = await inject({
      method: 'OPTIONS', url: '/identify', headers: { origin, 'access-control-request-method': 'POST' }
    })
    t.match(preflight, { statusCode: 204, headers: { 'access-control-allow-origin': origin, 'access-control-max-age': '7200', 'access-control-allow-credentials': 'true' } })
    t.match(preflight.headers['access-control-allow-headers'], /content-type/)
  }
  t.equal(sandbox.requests.length, 2)
  const foreign = ['https://evil.test', 'null', 'https://app.example.com.evil.test', 'http://app.example.com',
    'https://app.example.com:8443', 'https://APP.example.com', 'https://app.example.com/', '']
  for (const origin of foreign) {
    for (const type of ['application/json', 'text/plain']) {
      const answer = await post(JSON.stringify(identity()), { headers: { origin, 'content-type': type } })
      t.match(answer.json(), { status: 403, code: 'forbidden', retryable: false }, origin)
      t.notOk('access-control-allow-origin' in answer.headers)
      t.notOk('access-control-allow-credentials' in answer.headers)
    }
    const preflight = await inject({
      method: 'OPTIONS', url: '/identify', headers: { origin, 'access-control-request-method': 'POST' }
    })
    t.equal(preflight.statusCode, 403)
  }
  t.equal((await inject({ url: '/livez', headers: { origin: 'https://evil.test' } })).statusCode, 200, 'a GET from another origin is answered')
  t.equal(sandbox.requests.length, 2, 'nothing from other origins was sent')

  const closed = await startRelay(t)
  t.equal((await closed.post(identity(), { headers: { origin: 'https://app.example.com' } })).statusCode, 403)
  t.equal((await closed.post(identity())).statusCode, 200, 'a request without Origin is served')
})

t.test('a beacon sends JSON as text/plain', async t => {
  const { post, sandbox } = await startRelay(t, { env: { CORS_ORIGINS: 'https://app.example.com' } })
  const headers = { 'content-type': 'text/plain;charset=UTF-8', origin: 'https://app.example.com' }
  t.equal((await post(JSON.stringify(identity()), { headers })).statusCode, 200)
  t.match((await post('hello', { headers })).json(), { code: 'invalid_request', errors: [{ pointer: '' }] })
  t.equal(sandbox.requests.length, 1)
})
