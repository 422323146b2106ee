import { spawn, spawnSync } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { parse } from 'yaml'
import { freePort, identity, startSandbox, temporary } from './helper.ts'
import { startServer } from './processes.ts'

const FOLDER = 'examples/observability'
const needsPrometheus = { skip: spawnSync('prometheus', ['--version']).status === 0 ? false : 'prometheus is not installed' }

interface Rule { alert: string, expr: string }
const rules = (parse(readFileSync(join(FOLDER, 'alerts.yml'), 'utf8')) as { groups: { rules: Rule[] }[] }).groups.flatMap(group => group.rules)
const queries = (JSON.parse(readFileSync(join(FOLDER, 'dashboard.json'), 'utf8')) as { panels: { targets: { expr: string }[] }[] }).panels
  .flatMap(({ targets }) => targets.map(({ expr }) => expr.replaceAll('$__rate_interval', '20s').replaceAll('$instance', '.*')))

t.test('each alert has a row in docs/operations.md and a test that makes it fire', async t => {
  const page = readFileSync('docs/operations.md', 'utf8')
  const tests = parse(readFileSync(join(FOLDER, 'alerts.test.yml'), 'utf8')) as { tests: { alert_rule_test: { alertname: string, exp_alerts?: object[] }[] }[] }
  const firing = tests.tests.flatMap(test => test.alert_rule_test).filter(({ exp_alerts: expected = [] }) => expected.length > 0).map(({ alertname }) => alertname)
  const rows = [...page.matchAll(/^\| `(IdentifyRelay\w+)` \|/gm)].map(([, name]) => name)
  t.same(rows, rules.map(({ alert }) => alert))
  t.same([...new Set(firing)].sort(), rules.map(({ alert }) => alert).sort())
})

t.test('docs/operations.md names each metric that the alerts and the dashboard use', async t => {
  const page = readFileSync('docs/operations.md', 'utf8')
  for (const [name] of [...rules.map(({ expr }) => expr), ...queries].join(' ').matchAll(/identify_relay_\w+/g)) {
    t.match(page, `\`${name.replace(/_(?:bucket|sum|count)$/, '')}`)
  }
})

t.test('promtool accepts the rules, and each alert fires in its test', needsPrometheus, async t => {
  for (const args of [['check', 'rules', 'alerts.yml'], ['test', 'rules', 'alerts.test.yml']]) {
    const { status, stdout, stderr } = spawnSync('promtool', args, { cwd: FOLDER, encoding: 'utf8' })
    t.equal(status, 0, `promtool ${args.join(' ')}: ${stdout}${stderr}`)
  }
})

t.test('Prometheus answers each query of the dashboard about a relay under faults, and its alerts fire', needsPrometheus, async t => {
  const sandbox = await startSandbox(t)
  const directory = temporary(t)
  const [metricsPort, port] = [await freePort(), await freePort()]
  const relay = await startServer(t, sandbox.url, { METRICS_PORT: String(metricsPort), OUTBOX: `file:${directory}/outbox`, MAX_ANON_PER_USER: '1', RATE_LIMIT_MAX: '120' })
  const faster = readFileSync(join(FOLDER, 'alerts.yml'), 'utf8').replaceAll(/for: \d+m/g, 'for: 0s').replaceAll(/\[\d+m\]/g, '[20s]').replace('seconds > 60', 'seconds > 1')
  writeFileSync(join(directory, 'alerts.yml'), faster)
  writeFileSync(join(directory, 'prometheus.yml'), JSON.stringify({
    global: { scrape_interval: '1s', evaluation_interval: '1s' },
    rule_files: ['alerts.yml'],
    scrape_configs: [{ job_name: 'identify-relay', static_configs: [{ targets: [`127.0.0.1:${metricsPort}`] }] }]
  }))
  const prometheus = spawn('prometheus', [
    `--config.file=${directory}/prometheus.yml`, `--storage.tsdb.path=${directory}/data`, `--web.listen-address=127.0.0.1:${port}`
  ], { stdio: 'ignore' })
  t.teardown(() => { prometheus.kill('SIGKILL') })
  interface Data { result: unknown[], alerts: { state: string, labels: { alertname: string } }[] }
  const api = async (path: string) => (await (await fetch(`http://127.0.0.1:${port}/api/v1/${path}`)).json() as { data: Data }).data
  const firing = async () => (await api('alerts')).alerts.filter(({ state }) => state === 'firing').map(({ labels }) => labels.alertname)

  // Its first scrape comes some seconds after its start.
  for (let isUp = false; !isUp; await sleep(100)) isUp = await api('query?query=identify_relay_build_info').then(({ result }) => result.length > 0, () => false)
  for (let count = 0; count < 20; count++) await relay.post()
  await relay.post(identity({ identified_id: 'a-kiosk' }))
  sandbox.faults.add({ name: 'unauthorized', times: 10 }, { name: 'refused', times: 2 }, { name: 'edge_down', times: 10_000 })
  const wanted = ['IdentifyRelayMixpanelFailing', 'IdentifyRelayCredentialsRejected', 'IdentifyRelayFailures', 'IdentifyRelayMergeStorm']
  const fired = new Set<string>()
  for (const end = Date.now() + 60_000; Date.now() < end && !wanted.every(name => fired.has(name));) {
    await relay.post()
    await relay.post(identity({ identified_id: 'a-kiosk' }))
    await sleep(500)
    for (const name of await firing()) fired.add(name)
  }
  for (const name of wanted) t.ok(fired.has(name), `${name} fires`)
  for (let status = 0; status !== 429;) ({ status } = await relay.post())
  await sleep(2500)
  for (const query of queries) {
    const { result } = await api(`query?query=${encodeURIComponent(query)}`)
    t.ok(result.length > 0, `a result for ${query}`)
  }
})
