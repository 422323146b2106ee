import { t } from 'tap'
import { startServer } from '../processes.ts'
import { rolling } from '../scenarios.ts'
import { needsRedis, startRedis } from '../helper.ts'
import { violations } from '../delivery-check.ts'

t.test('ten relays that share a Redis replace each other under load, and every answer is 200 or 202', needsRedis, async t => {
  const redis = await startRedis(t)
  const env = { OUTBOX: 'redis', REDIS_URL: redis.url }
  const { sandbox, callers, codes } = await rolling(t, { rounds: 10, callers: 64, env: () => env })
  t.same(new Set(codes), new Set([0]))
  t.same(Object.keys(callers.statuses()).filter(status => status !== '200' && status !== '202'), [], JSON.stringify(callers.statuses()))
  t.comment(JSON.stringify(callers.statuses()))
  const last = await startServer(t, sandbox.url, env)
  await last.emptied()
  t.equal(await last.kill('SIGTERM'), 0)
  t.same(violations(callers.calls, sandbox.ledger.rows(), { repeats: callers.calls.length }), [])
})
