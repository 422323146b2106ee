import { t } from 'tap'
import { startRelay, type Env } from './helper.ts'

const start = (t: Parameters<typeof startRelay>[0], env: Env = {}, more = {}) => startRelay(t, { env: { COMPAT: 'events', ...env }, ...more })

t.test('try', async t => {
  const { inject, sandbox, logged } = await start(t)
  const event = { event: 'x', properties: { token: 'dummy', distinct_id: 'u' } }
  const a = await inject({ method: 'POST', url: '/track/?verbose=1&ip=1', payload: [event, { event: '$identify', properties: { distinct_id: 'u', $anon_distinct_id: 'zz' } }] })
  console.log(a.statusCode, a.headers, a.body)
  const b = await inject({ method: 'GET', url: '/track?data=' + Buffer.from(JSON.stringify(event)).toString('base64') })
  console.log(b.statusCode, b.headers, b.body)
  console.log(sandbox.requests, logged().slice(-2))
  for (const url of ['/engage', '/groups/?verbose=1', '/flags/x', '/import', '/track/x']) { const c = await inject({ method: 'POST', url, payload: [event] }); console.log(url, c.statusCode, c.body) }
  const c = await inject({ method: 'PUT', url: '/track', payload: [event] }); console.log(c.statusCode, c.body)
  const d = await inject({ method: 'POST', url: '/track', headers: { origin: 'https://evil', 'content-type': 'application/x-www-form-urlencoded' }, payload: 'data=x&verbose=1&ip=0' }); console.log(d.statusCode, d.body)
  const e = await inject({ method: 'POST', url: '/track', headers: { origin: 'https://evil', 'content-type': 'application/x-www-form-urlencoded' }, payload: 'data=x&ip=0' }); console.log(e.statusCode, e.body)
})
