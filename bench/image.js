import { execFileSync, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import http from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'

// Measures and checks an image of the relay with the engine that `docker` finds: size, start-up time, memory, and how it
// runs. Exits with 1 if a bound is exceeded or a check fails. `node bench/image.js [IMAGE]`

const image = process.argv[2] ?? 'identify-relay'

/** About a fifth above what is measured, so that an image that grows is noticed. Start-up depends on the machine. */
const BOUNDS = { size: 200, start: 3000, rss: 110 }
const STARTS = 5
const IDLE_MS = 5000
const HARDENED = ['--read-only', '--cap-drop=ALL', '--security-opt=no-new-privileges', '--memory=256m', '--pids-limit=128']
const SETTINGS = ['-e', 'MIXPANEL_TOKEN=none', '-e', 'ALLOW_ANONYMOUS=true', '-e', 'LOG_LEVEL=silent']

const docker = (...args) => execFileSync('docker', args, { encoding: 'utf8' }).trim()
const containers = []

function report (name, value, isGood, bound = '') {
  console.log(`${isGood ? 'ok  ' : 'FAIL'} ${name.padEnd(32)} ${value}${bound}`)
  if (!isGood) process.exitCode = 1
}

/** Resolves with the status of a GET, or with undefined where there is no answer. */
async function statusOf (url) {
  const request = http.get(url, { agent: false, timeout: 1000 }).on('timeout', () => request.destroy(new Error('no answer')))
  const [response] = await once(request, 'response').catch(() => [])
  request.destroy()
  return response?.statusCode
}

/** Creates a container with the relay, and returns its id. */
function create (...options) {
  const id = docker('create', ...HARDENED, ...SETTINGS, ...options, image)
  containers.push(id)
  return id
}

/** Starts a container. Resolves with the milliseconds until the relay answers on the published port. */
async function start (id) {
  const since = performance.now()
  docker('start', id)
  const url = `http://${docker('port', id, '8080/tcp').split('\n')[0]}/livez`
  while (performance.now() - since < 30_000) {
    if (await statusOf(url) === 200) return performance.now() - since
    await sleep(5)
  }
  throw new Error(`the relay did not answer within 30 s: ${docker('logs', id)}`)
}

/** Returns what an expression is in the container. */
const inside = (id, expression) => JSON.parse(docker('exec', id, 'node', '-p', `JSON.stringify(${expression})`))

/** Resolves with the state of the health check once it has run. */
async function health (id) {
  for (let count = 0; count < 60; count++) {
    const state = docker('inspect', '-f', '{{.State.Health.Status}}', id)
    if (state !== 'starting') return state
    await sleep(500)
  }
  return 'starting'
}

try {
  const megabytes = Number(docker('image', 'inspect', '-f', '{{.Size}}', image)) / 1e6
  report('size', `${megabytes.toFixed(0)} MB`, megabytes <= BOUNDS.size, `, at most ${BOUNDS.size}`)

  const times = []
  let id = ''
  for (let count = 0; count < STARTS; count++) {
    id = create('-p', '127.0.0.1::8080')
    times.push(await start(id))
  }
  const median = times.toSorted((a, b) => a - b)[Math.floor(STARTS / 2)]
  report('start-up, median of 5', `${median.toFixed(0)} ms`, median <= BOUNDS.start, `, at most ${BOUNDS.start}`)

  await sleep(IDLE_MS)
  const rss = inside(id, "/VmRSS:\\s+(\\d+)/.exec(fs.readFileSync('/proc/1/status', 'utf8'))[1]") / 1000
  report('resident memory, idle', `${rss.toFixed(0)} MB`, rss <= BOUNDS.rss, `, at most ${BOUNDS.rss}`)

  report('health check', await health(id), await health(id) === 'healthy')
  const command = inside(id, "fs.readFileSync('/proc/1/cmdline', 'utf8').split('\\0')[0]")
  report('process 1', command, command === 'node')
  const user = inside(id, '[process.getuid(), process.getgid()].join()')
  report('user and group', user, user === '1000,1000')
  const state = inside(id, "(({ mode, uid }) => (mode & 0o7777).toString(8) + ' ' + uid)(fs.statSync('/var/lib/identify-relay'))")
  report('/var/lib/identify-relay', state, state === '700 1000')
  const shells = inside(id, "['sh', 'bash', 'dash', 'busybox', 'npm', 'npx'].filter(name => process.env.PATH.split(':').some(path => fs.existsSync(path + '/' + name)))")
  report('shells and package managers', shells.join(' ') || 'none', shells.length === 0)
  const authorities = inside(id, "fs.readFileSync('/etc/ssl/certs/ca-certificates.crt', 'utf8').split('BEGIN CERTIFICATE').length - 1")
  report('CA certificates', authorities, authorities > 50)
  const packages = inside(id, "JSON.parse(fs.readFileSync('/app/sbom.spdx.json', 'utf8')).packages.map(({ name }) => name)")
  report('packages in the SBOM', packages.length, packages.includes('fastify') && !packages.includes('typescript'))
  const unlisted = inside(id, "fs.readdirSync('/app/node_modules').filter(name => /^\\w/.test(name))").filter(name => !packages.includes(name))
  report('packages that the SBOM lacks', unlisted.join(' ') || 'none', unlisted.length === 0)
  const labels = JSON.parse(docker('image', 'inspect', '-f', '{{json .Config.Labels}}', image))
  const missing = ['title', 'description', 'licenses', 'version'].filter(name => !labels[`org.opencontainers.image.${name}`])
  report('missing labels', missing.join(' ') || 'none', missing.length === 0)

  const six = create('-e', 'HOST=::')
  docker('start', six)
  report('health check with HOST=::', await health(six), await health(six) === 'healthy')

  // As an orchestrator ends it.
  const since = performance.now()
  docker('stop', '-t', '10', id)
  const code = docker('inspect', '-f', '{{.State.ExitCode}}', id)
  report('stop', `exit ${code} after ${(performance.now() - since).toFixed(0)} ms`, code === '0')
} finally {
  if (containers.length > 0) spawnSync('docker', ['rm', '-f', ...containers])
}
