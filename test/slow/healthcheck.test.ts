import { spawnSync } from 'node:child_process'
import { t } from 'tap'
import { startSandbox } from '../helper.ts'
import { startServer, withoutCoverage } from '../processes.ts'

const RUNS = 15

/** An orchestrator runs the health check every few seconds, so its cost must be close to that of Node itself. */
const MAX_RATIO = 1.5

/** The CPU time of some Node processes one after the other, in seconds. */
function cpuOf (env: NodeJS.ProcessEnv, ...args: string[]): number {
  const one = ['env', ...withoutCoverage(env, ...args)].map(word => `'${word}'`).join(' ')
  const { stdout, status } = spawnSync('bash', ['-c', `for i in {1..${RUNS}}; do ${one} >/dev/null || exit 1; done; times`], { encoding: 'utf8' })
  if (status !== 0) throw new Error(`${args.join(' ')} fails`)
  const [, children = ''] = stdout.trim().split('\n')
  return [...children.matchAll(/(\d+)m([\d.]+)s/g)].reduce((sum, [, minutes, seconds]) => sum + Number(minutes) * 60 + Number(seconds), 0)
}

t.test(`the health check costs at most ${MAX_RATIO} times the CPU of a bare Node`, async t => {
  const sandbox = await startSandbox(t)
  const relay = await startServer(t, sandbox.url)
  const env = { PORT: String(relay.port) }
  const ratios = Array.from({ length: 3 }, () => cpuOf(env, 'dist/server.js', 'healthcheck') / cpuOf({}, '-e', '0')).sort()
  t.comment(`ratios ${ratios.map(ratio => ratio.toFixed(2)).join(', ')}`)
  t.ok(Number(ratios[1]) <= MAX_RATIO, `the median is at most ${MAX_RATIO}`)
})
