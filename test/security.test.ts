import { readFileSync } from 'node:fs'
import { t } from 'tap'
import { parse } from 'yaml'
import { identity, listen } from './helper.ts'
import { exchange, get } from './raw-http.ts'

t.test('every answer has the headers of a JSON API, and /docs a policy of its own', async t => {
  const { inject, port } = await listen(t, { env: { CORS_ORIGINS: 'https://app.example.com' } })
  const json = { 'content-type': 'application/json' }
  const answers = [
    await inject({ method: 'POST', url: '/identify', payload: identity() }),
    await inject({ method: 'POST', url: '/identify', payload: 'x', headers: json }),
    await inject({ method: 'POST', url: '/identify', payload: identity(), headers: { origin: 'https://evil.test' } }),
    await inject({ method: 'POST', url: '/identify', payload: 'x', headers: { 'content-type': 'text/html' } }),
    await inject({ method: 'OPTIONS', url: '/identify', headers: { origin: 'https://app.example.com', 'access-control-request-method': 'POST' } }),
    await inject({ url: '/nope' }), await inject({ url: '/identify' }), await inject({ url: '/livez' }), await inject({ url: '/openapi.json' }), await inject({ url: '/%zz' })
  ]
  t.same(answers.map(({ statusCode }) => statusCode), [200, 400, 403, 415, 204, 404, 405, 200, 200, 400])
  for (const { headers } of answers) {
    t.match(headers, { 'x-content-type-options': 'nosniff', 'content-security-policy': "default-src 'none'; frame-ancestors 'none'" })
  }
  const page = await inject({ url: '/docs' })
  t.match(page.headers, { 'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer', 'content-security-policy': /^default-src 'self';.* frame-ancestors 'none'$/ })
  t.match(await exchange(port, 'no HTTP\r\n\r\n', { answers: 1 }), /^HTTP\/1\.1 400 .*x-content-type-options: nosniff\r\n.*\r\n\r\n\{/s)
  t.match(await exchange(port, get('/livez'), { answers: 1 }), /content-security-policy/)
})

interface Package { version?: string, integrity?: string, resolved?: string, hasInstallScript?: boolean, dev?: boolean, link?: boolean }

t.test('no dependency runs a script when it is installed, and each has a digest', async t => {
  const { packages } = JSON.parse(readFileSync('package-lock.json', 'utf8')) as { packages: Record<string, Package> }
  const installed = Object.entries(packages).filter(([path]) => path !== '')
  const served = installed.filter(([, { dev }]) => dev !== true)
  t.ok(served.length > 40, 'the relay has dependencies')
  t.same(served.filter(([, { hasInstallScript }]) => hasInstallScript), [])
  t.same(installed.filter(([, { integrity }]) => !/^sha512-/.test(integrity ?? '')).map(([path]) => path), [])
  t.same(installed.filter(([, { resolved }]) => resolved !== undefined).map(([path]) => path), [], 'no address is fixed')
  t.match(readFileSync('.npmrc', 'utf8'), /^ignore-scripts=true$/m)
})

t.test('the image and Compose give the relay no more than it needs', async t => {
  const lines = readFileSync('Dockerfile', 'utf8').split('\n')
  const last = lines.slice(lines.findLastIndex(line => line.startsWith('FROM')))
  t.ok(last.includes('USER 1000:1000'), 'the relay is not root')
  t.notMatch(last.join('\n'), /\b(?:npm|apt-get|ADD|curl)\b/, 'the image installs nothing after the build')
  const { services } = parse(readFileSync('docker-compose.yml', 'utf8'), { merge: true })
  for (const name of ['relay', 'sandbox']) {
    t.match(services[name], { read_only: true, cap_drop: ['ALL'], security_opt: ['no-new-privileges:true'], mem_limit: '256m', pids_limit: 128 }, name)
  }
  for (const { ports } of [services.relay, services.sandbox]) t.match(ports[0], /^127\.0\.0\.1:/, 'the port is published on loopback')
})
