import { t } from 'tap'
import { needsRedis, silent, startRedis, startRelay } from '../helper.ts'
import { checkOrder } from '../order-model.ts'
import { checkSequence } from '../verdict-model.ts'
import { connectRedis } from '#src/redis.js'

const seeds = (count: number, from: number) => Array.from({ length: count }, (_, index) => from + index)

t.test('no verdict says more than is known, in 10,000 random sequences of attempts', async t => {
  for (let from = 0; from < 10_000; from += 1000) {
    t.same((await Promise.all(seeds(1000, from).map(checkSequence))).flat(), [], `seeds from ${from}`)
  }
})

t.test('no claim overtakes an earlier one, in 10,000 random sequences', async t => {
  for (let from = 0; from < 9000; from += 300) {
    const relay = await startRelay(t, { env: { MAX_BATCH: ['1', '2', '50'][from / 300 % 3]!, LOG_LEVEL: 'fatal' } })
    t.same(await checkOrder(relay, seeds(300, from)), [], `seeds from ${from}`)
  }
})

t.test('no claim overtakes an earlier one on its way through SQLite', async t => {
  for (const [index, MAX_BATCH] of ['1', '50'].entries()) {
    const relay = await startRelay(t, { env: { MAX_BATCH, LOG_LEVEL: 'fatal', OUTBOX: `file:${t.testdir({})}` } })
    t.same(await checkOrder(relay, seeds(250, 9000 + 250 * index)), [], `MAX_BATCH=${MAX_BATCH}`)
  }
})

t.test('no claim overtakes an earlier one on its way through Redis', needsRedis, async t => {
  for (const [index, MAX_BATCH] of ['1', '50'].entries()) {
    const { url } = await startRedis(t)
    const redis = await connectRedis(url, silent)
    const relay = await startRelay(t, { env: { MAX_BATCH, LOG_LEVEL: 'fatal', OUTBOX: 'redis', REDIS_URL: url }, redis })
    t.teardown(() => redis.disconnect())
    t.same(await checkOrder(relay, seeds(250, 9500 + 250 * index)), [], `MAX_BATCH=${MAX_BATCH}`)
  }
})
