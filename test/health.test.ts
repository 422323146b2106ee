import { t } from 'tap'
import { healthcheck } from '#src/commands/healthcheck.js'
import { identity, listen, startRelay, startSandbox } from './helper.ts'

t.test('/livez, /healthz and /readyz say that the relay serves', async t => {
  const { inject } = await startRelay(t)
  for (const url of ['/livez', '/healthz']) t.same((await inject({ url })).json(), { status: 'alive' })
  t.same((await inject({ url: '/readyz' })).json(), { status: 'ready' })
  t.match((await inject({ url: '/livez?verbose' })).json().parts, { in_flight: 0, last_verdict: null }, '?verbose adds the parts')
})

t.test('/readyz does not depend on Mixpanel, and with ?verbose shows its last verdict', async t => {
  const { inject, post, sandbox } = await startRelay(t)
  sandbox.faults.add({ name: 'unauthorized' })
  await post(identity())
  const answer = await inject({ url: '/readyz?verbose' })
  t.equal(answer.statusCode, 200)
  t.match(answer.json(), { parts: { last_verdict: { code: 'mixpanel_rejected_credentials', at: String } } })
})

t.test('healthcheck asks /livez of the relay on this machine, whatever HOST is', async t => {
  const { port } = await listen(t)
  t.equal(await healthcheck({ PORT: String(port) }), 'The relay is alive.')
  t.equal(await healthcheck({ HOST: '0.0.0.0', PORT: String(port) }), 'The relay is alive.')
  for (const HOST of ['127.0.0.1', '::1', '::']) {
    await t.rejects(healthcheck({ HOST, PORT: '9' }), { message: /^The relay is not alive: .+\.$/ }, HOST)
  }
  t.match(await healthcheck({}).catch(({ message }: Error) => message), /^The relay is /, 'by default it asks port 8080')
  const { url } = await startSandbox(t)
  await t.rejects(healthcheck({ PORT: new URL(url).port }), { message: 'The relay is not alive: /livez answered 404.' })
})
