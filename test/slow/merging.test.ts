import { t } from 'tap'
import { needsRedis, startRedis, temporary, type Env } from '../helper.ts'
import { checkMerges } from '../merge-model.ts'

for (const [from, mode] of ([[0, 'original'], [100_000, 'simplified']] as const)) {
  const run = async (t: Parameters<typeof checkMerges>[0], sequences: number, start: number, env: Env) => {
    const { faults, counts } = await checkMerges(t, { mode, sequences, kills: 5, from: from + start, env })
    t.comment(`${sequences} sequences, ${JSON.stringify(counts)}`)
    t.same(faults, [])
    t.equal(counts.kills, 5)
  }

  t.test(`the clusters are those of first-write-wins, in 10,000 random sequences with ${mode} ID merge and kills`, async t => {
    await run(t, 2500, 0, {})
    await run(t, 2500, 2500, { MAX_BATCH: '1' })
    await run(t, 5000, 5000, { OUTBOX: `file:${temporary(t)}` })
  })

  t.test(`and in 1,000 through Redis, with ${mode} ID merge`, needsRedis, async t => {
    const { url } = await startRedis(t)
    await run(t, 1000, 10_000, { OUTBOX: 'redis', REDIS_URL: url })
  })
}
