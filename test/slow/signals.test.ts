import { spawn, spawnSync } from 'node:child_process'
import { createSocket } from 'node:dgram'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { t } from 'tap'
import { identity, temporary, TOKEN } from '../helper.ts'
import { SERVER } from '../processes.ts'

const can = (...args: string[]) => spawnSync('unshare', [...args, 'true']).status === 0

t.test('as process 1 of a container the relay ends at a signal during its start', { skip: can('--pid', '--fork') ? false : 'namespaces are not permitted here' }, async t => {
  const launch = () => spawn('unshare', ['--pid', '--fork', '--kill-child', process.execPath, SERVER], { env: { PATH: process.env.PATH, MIXPANEL_TOKEN: TOKEN, PORT: '0' } })
  const started = performance.now()
  const whole = launch()
  await new Promise<void>(resolve => whole.stdout.on('data', chunk => /Server listening/.test(String(chunk)) && resolve()))
  const startMs = performance.now() - started
  whole.kill('SIGKILL')
  for (const share of [0.5, 0.6, 0.7, 0.8, 0.9]) {
    const outer = launch()
    const over = once(outer, 'exit')
    await sleep(startMs * share)
    const inner = spawnSync('pgrep', ['-P', String(outer.pid)]).stdout.toString().trim()
    process.kill(Number(inner), 'SIGTERM')
    const how = await Promise.race([over, sleep(4000)])
    outer.kill('SIGKILL')
    t.match(how, [0], `a signal after ${share} of the start is exit 0`)
  }
})

t.test('a name server that never answers does not delay the exit', { skip: can('--mount') ? false : 'namespaces are not permitted here' }, async t => {
  const silent = createSocket('udp4')
  silent.bind(53, '127.0.0.53')
  t.teardown(() => silent.close())
  await once(silent, 'listening')
  const file = join(temporary(t), 'resolv.conf')
  writeFileSync(file, 'nameserver 127.0.0.53\noptions timeout:30 attempts:5\n')
  const child = spawn('unshare', ['--mount', 'sh', '-c', `mount --bind ${file} /etc/resolv.conf && exec ${process.execPath} ${SERVER}`], {
    env: { PATH: process.env.PATH, MIXPANEL_TOKEN: TOKEN, PORT: '0', DEADLINE_MS: '500', MIXPANEL_TIMEOUT_MS: '300', SHUTDOWN_TIMEOUT_MS: '1000' }
  })
  t.teardown(() => { child.kill('SIGKILL') })
  let output = ''
  child.stdout.on('data', chunk => { output += String(chunk) })
  while (!/Server listening at (http:[^"]+)"/.test(output)) await sleep(50)
  const [, url] = /Server listening at (http:[^"]+)"/.exec(output) as unknown as [string, string]
  const answer = await fetch(`${url}/identify`, { method: 'POST', body: JSON.stringify(identity()) })
  t.equal(answer.status, 504)
  const started = performance.now()
  child.kill('SIGTERM')
  const over = await Promise.race([once(child, 'exit'), sleep(20_000)])
  t.ok(over, 'the process ends')
  const ms = performance.now() - started
  t.ok(ms < 5000, `the process ends within 5 s, and did after ${ms} ms`)
})
