import { once } from 'node:events'
import { createServer, type AddressInfo } from 'node:net'
import { t } from 'tap'
import { identity, listen, startRelay, startSandbox, type Env } from './helper.ts'
import { SERVER, startProcess } from './processes.ts'

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
  const check = async (env: Env) => {
    const { exit, output } = startProcess(t, SERVER, ['healthcheck'], env, { isCovered: true })
    return [await exit, output().trim()]
  }
  const { port } = await listen(t)
  const alive = [0, 'The relay is alive.']
  t.same(await check({ PORT: String(port) }), alive)
  t.same(await check({ HOST: '0.0.0.0', PORT: String(port) }), alive)
  t.same(await check({ HOST: 'localhost', PORT: String(port) }), alive)
  for (const HOST of ['127.0.0.1', '::1', '::']) {
    t.match(await check({ HOST, PORT: '9' }), [1, /^The relay is not alive: .*ECONNREFUSED.+\.$/], HOST)
  }
  t.match(await check({}), [Number, /^The relay is /], 'by default it asks port 8080')
  const { url } = await startSandbox(t)
  t.same(await check({ PORT: new URL(url).port }), [1, 'The relay is not alive: /livez answered 404.'])
  const answers: [answer: string | null, sentence: string][] = [
    ['SSH-2.0-OpenSSH', '/livez answered something that is not HTTP'], ['', 'no answer'], [null, 'no answer in time']
  ]
  for (const [answer, sentence] of answers) {
    const server = createServer(socket => { if (answer !== null) socket.end(answer) }).listen(0, '127.0.0.1')
    t.teardown(() => server.close())
    await once(server, 'listening')
    t.same(await check({ PORT: String((server.address() as AddressInfo).port) }), [1, `The relay is not alive: ${sentence}.`])
  }
})
