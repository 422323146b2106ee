import { existsSync } from 'node:fs'
import { t } from 'tap'
import { ATTACKS, type Attack } from './attacks.ts'
import { MEMORY_MB, underAttack, type Figures } from './harness.ts'

/** The bound on the time of an answer of /livez. A short run has too few probes for a p99, so its median is judged. */
const QUANTILE = Number(process.env.ATTACK_SECONDS ?? 60) < 30 ? 'median' : 'p99'
const FRESH_QUANTILE = QUANTILE === 'median' ? 'freshMedian' : 'freshP99'
const LIVEZ_MS = 100
/** For a new connection among hundreds. Node accepts one in a turn of its event loop, in the order of their arrival. */
const CROWDED_MS = 2500
const UPSTREAM_BYTES = 1_048_576

/** ATTACK=^7 runs those whose names begin with 7. */
const chosen = ATTACKS.filter(({ name }) => new RegExp(process.env.ATTACK ?? '').test(name))

const HEADINGS = ['attack', 'bound', 'RSS MB before → peak → after', 'livez p99 ms idle / attacked', 'on a new connection (max, lost)',
  'good caller ok / slow / failed', 'largest request to Mixpanel', 'exit', 'what the attacker got']

function rowOf ({ name, bound = '', hangs }: Attack, { idle, attacked, before, peak, after, early, exit, exitMs, largest, got }: Figures): string {
  const statuses = attacked.failed > 0 ? ` ${JSON.stringify(attacked.statuses)}` : ''
  return [
    name, bound, `${before} → ${peak} → ${after ?? '–'}`, `${idle.p99.toFixed(1)} / ${attacked.p99.toFixed(1)}`,
    `${idle.freshP99.toFixed(1)} / ${attacked.freshP99.toFixed(1)} (${attacked.max.toFixed(0)}, ${attacked.lost})`,
    `${attacked.ok} / ${attacked.slow} / ${attacked.failed}${hangs ? ' (Mixpanel hangs)' : ''}${statuses}`, largest,
    early === undefined ? `${exit ?? 'none'} after ${exitMs} ms` : `DIED: ${early}`, Object.entries(got).map(([what, count]) => `${what}: ${count}`).join(', ')
  ].join(' | ')
}

t.test('the relay keeps its bounds under each attack', { skip: !existsSync('/proc/self/status') && 'needs /proc' }, async t => {
  const rows: string[] = []
  for (const attack of chosen) {
    await t.test(attack.name, async t => {
      const figures = await underAttack(t, attack)
      const { early, peak, idle, attacked, exit, largest, got, said, hasGroup } = figures
      if (!hasGroup) t.comment('no memory cgroup can be made here: VmHWM alone is judged')
      t.equal(early, undefined, 'the relay survives')
      if (early !== undefined) t.comment(said)
      t.ok(peak <= MEMORY_MB, `${peak} MB are at most ${MEMORY_MB}`)
      const [ms, freshMs] = [attacked[QUANTILE], attacked[FRESH_QUANTILE]]
      t.ok(ms <= LIVEZ_MS, `/livez ${QUANTILE} ${ms.toFixed(1)} ms is at most ${LIVEZ_MS} (idle ${idle[QUANTILE].toFixed(1)})`)
      const freshBound = attack.crowds ? CROWDED_MS : LIVEZ_MS
      t.ok(freshMs <= freshBound, `/livez ${QUANTILE} on a new connection ${freshMs.toFixed(1)} ms is at most ${freshBound}`)
      if (!attack.hangs) t.match(attacked, { slow: 0, failed: 0 }, 'every identity of the good caller is accepted within a second')
      t.ok(largest <= UPSTREAM_BYTES, `the largest request to Mixpanel has ${largest} bytes`)
      t.match(exit, /^\d+$/, `the relay exits after SIGTERM, and did after ${figures.exitMs} ms`)
      for (const name of ['500', ...attack.never ?? []]) t.equal(got[name], undefined, `${name} does not occur`)
      rows.push(rowOf(attack, figures))
      t.comment(rows.at(-1))
    })
  }
  t.comment([HEADINGS.join(' | '), HEADINGS.map(() => '---').join(' | '), ...rows].map(row => `| ${row} |`).join('\n'))
})
