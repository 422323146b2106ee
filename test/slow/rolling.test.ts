import { t } from 'tap'
import { startServer, rolling } from '../scenarios.ts'
import { needsRedis, startRedis } from '../helper.ts'
import { violations } from '../delivery-check.ts'

t.test('ten relays replace each other under load, before one Redis: nobody is dropped', needsRedis, async t => {
  const redis = await startRedis(t)
  const env = { OUTBOX: 'redis', REDIS_URL: redis.url }
  const { sandbox, callers, codes } = await rolling(t, { rounds: 10, callers: 64, env: () => env })
  t.same(new Set(codes), new Set([0]))
  t.same(Object.keys(callers.told()).filter(status => status !== '200' && status !== '202'), [], JSON.stringify(callers.told()))
  t.comment(JSON.stringify(callers.told()))
  const last = await startServer(t, sandbox.url, env)
  await last.drained()
  t.equal(await last.kill('SIGTERM'), 0)
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: callers.calls.length }), [])
})
